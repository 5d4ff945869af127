"""Explanations: against autograd, complete, the same for a row alone, and clear about mistakes."""

from __future__ import annotations

import dataclasses
import importlib.util
import io
import json

import pytest
import torch
import transformers
from matplotlib.image import imread
from safetensors.torch import load_file, save_file
from torch import nn

import lamella
from lamella.errors import BackendError, GraphError, SamplesError
from lamella.explanation import explainer, files, plots
from tests.tiny import save_language_model

TEXT = "a small model reads words"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_language_model(tmp_path_factory.mktemp("explained") / "model", layers=2)


@pytest.fixture(scope="module")
def graph(folder):
    return lamella.capture(folder)


@pytest.fixture(scope="module")
def found(folder):
    """Of a text."""
    return lamella.explain(folder, TEXT, target="logit")


@pytest.fixture(scope="module")
def ids():
    return torch.tensor([[3, 9, 12, 7, 5]])


def autograd(folder, ids, label):
    """Embedding times gradient of a logit of the last token, by transformers and PyTorch."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
    model(inputs_embeds=embedded).logits[0, -1, label].backward()
    return (embedded * embedded.grad).detach()


def test_the_gradient_preset_is_autograd_of_the_original_model(folder, graph, ids):
    found = lamella.explain(graph, {"input_ids": ids}, target=(0, -1, 17), preset="gradient")
    want = autograd(folder, ids, 17)
    # Two programs for one function in float32.
    torch.testing.assert_close(found.inputs["input_ids"], want, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(found.tokens, want.sum(-1), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("preset", ["cp", "attnlrp", "relp"])
def test_tokens_and_ledger_sum_up_to_the_logit(graph, ids, preset):
    found = lamella.explain(graph, {"input_ids": ids}, target=17, preset=preset, ledger=True)
    logit = float(graph(input_ids=ids, attention_mask=torch.ones_like(ids))["logits"][0, -1, 17])
    assert found.start == pytest.approx(logit, rel=1e-5)
    total = float(found.tokens.double().sum()) + sum(found.ledger.kept.values())
    # float32 on the way.
    assert total == pytest.approx(logit, rel=1e-4)
    assert abs(found.ledger.closure) < 1e-4


def test_a_class_a_label_an_index_and_a_tensor_say_the_same(graph, ids):
    seed = torch.zeros(1, 5, 64)
    seed[0, -1, 17] = 1
    targets = (17, (0, -1, 17), (0, 4, -47), "logit:17", seed)
    found = [lamella.explain(graph, {"input_ids": ids}, target=target) for target in targets]
    for other in found[1:]:
        torch.testing.assert_close(other.tokens, found[0].tokens, rtol=0, atol=0)


def test_activations_of_one_block_at_a_time_give_the_same(graph, ids):
    kept, again = (
        lamella.explain(graph, {"input_ids": ids}, target=17, checkpoint=mode)
        for mode in ("", "blocks")
    )
    assert torch.equal(kept.tokens, again.tokens)
    with pytest.raises(ValueError, match="checkpoint must be 'blocks'"):
        lamella.explain(graph, {"input_ids": ids}, target=17, checkpoint="block")


def test_a_padded_row_is_explained_as_it_is_alone(graph, ids):
    padded = torch.cat([ids, torch.tensor([[4, 8, 2, 0, 0]])])
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    both = lamella.explain(graph, {"input_ids": padded, "attention_mask": mask}, target=17)
    alone = lamella.explain(graph, {"input_ids": padded[1:, :3]}, target=17)
    # Sums over other numbers of hidden tokens, in float32.
    torch.testing.assert_close(both.tokens[1:, :3], alone.tokens, rtol=1e-3, atol=1e-6)
    assert float(both.tokens[1, 3:].abs().max()) == 0


def test_texts_come_with_their_words(found):
    assert len(found.words[0]) == found.tokens.shape[1]
    assert "small" in found.words[0]
    assert "small" in str(found)
    assert "small" in found.html()
    assert "<script" not in found.html()
    assert {part.kind for part in found.sublayers} == {"attention", "mlp"}
    assert [len(each.heads) for each in found.heads] == [4, 4]


@pytest.mark.parametrize("backend", ["eager", "onnxruntime"])
def test_an_explainer_is_lowered_and_saved_like_a_model(graph, ids, backend, tmp_path):
    made = explainer(graph, target=17)
    lamella.lower(made, backend).save(tmp_path / "explainer")
    loaded = lamella.load(tmp_path / "explainer")
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    want = lamella.explain(graph, given, target=17).inputs["input_ids"]
    # Another runtime adds in another order.
    got = loaded(**given)["relevance.input_ids"]
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-5)


class Images(nn.Module):
    """A convolution and two classes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.head = nn.Linear(4, 2)

    def forward(self, pixels):
        return self.head(self.conv(pixels).relu().mean((2, 3)))


def test_pixels_of_one_image_sum_up_without_biases():
    torch.manual_seed(0)
    model = Images().eval()
    nn.init.zeros_(model.conv.bias)
    nn.init.zeros_(model.head.bias)
    pixels = torch.randn(1, 3, 6, 6)
    found = lamella.explain(model, {"pixels": pixels}, target=1, preset="gamma")
    assert found.pixels.shape == (1, 6, 6)
    # Without biases nothing is kept but rounding of float32.
    logit = float(model(pixels)[0, 1].detach())
    assert float(found.pixels.sum()) == pytest.approx(logit, rel=1e-4)
    with pytest.raises(SamplesError, match="sequence of tokens"):
        _ = found.tokens


@pytest.mark.parametrize(
    ("target", "says"),
    [
        ((0, -1, 64), "axis 2 has size 64"),
        ((0, 0, 0, 0), "4 axes"),
        ((0, 5, 17), "axis 1 has size 5"),
        ((1, -1, 17), "axis 0 has size 1"),
        ((0, 0.5, 17), "whole numbers"),
        (64, "there are 64"),
        ("contrastive:3,4,5", "names its classes wrong"),
        ("difference:3,99", "class 99 of 'difference:3,99' does not exist: there are 64"),
        ("nothing-like-it", "no class 'nothing-like-it'; a target is also"),
        (1.5, "a target is"),
        (torch.zeros(1, 2, 3), "shape"),
    ],
)
def test_a_target_that_is_not_in_the_output_is_refused(graph, ids, target, says):
    with pytest.raises(SamplesError, match=says):
        lamella.explain(graph, {"input_ids": ids}, target=target)


def test_what_the_model_does_not_have_is_refused(graph, ids):
    with pytest.raises(SamplesError, match="no tokenizer"):
        lamella.explain(graph, TEXT, target=1)
    found = lamella.explain(graph, {"input_ids": ids}, target=1)
    for ask in (lambda: found.pixels, found.png, lambda: found.save("why.png", over=True)):
        with pytest.raises(SamplesError, match="input_ids holds integers, whose relevance is"):
            ask()
    with pytest.raises(ValueError, match=r"can't tell from 'why.htm'.* mean '.html'"):
        found.save("why.htm")
    with pytest.raises(SamplesError, match="pixel_values"):
        lamella.explain(graph, {"input_ids": ids, "pixel_values": ids}, target=1)
    with pytest.raises(SamplesError, match="int32"):
        lamella.explain(graph, {"input_ids": ids.int()}, target=1)
    with pytest.raises(SamplesError, match="'input_ids' holds 64, and there are 64 entries"):
        lamella.explain(graph, {"input_ids": torch.tensor([[3, 64]])}, target=1)
    with pytest.raises(ValueError, match="preset"):
        lamella.explain(graph, {"input_ids": ids}, target=1, preset="best")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A vision transformer with labels, and images of it in a file."""
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=16,
        patch_size=8,
        label2id={"cat": 0, "owl": 1},
        id2label={0: "cat", 1: "owl"},
    )
    folder = tmp_path_factory.mktemp("images")
    transformers.ViTForImageClassification(config).eval().save_pretrained(folder / "model")
    batch = folder / "batch.safetensors"
    save_file({"pixel_values": torch.randn(2, 3, 16, 16)}, batch)
    return folder / "model", batch


def colors_of(png):
    """The pixels of a picture, ``[height, width, 3]`` in [0, 1]."""
    return torch.from_numpy(imread(io.BytesIO(png))[..., :3])


def test_a_pixel_map_is_red_where_pixels_speak_for_and_blue_where_against():
    relevance = torch.tensor([[[1.0, -1.0], [0.0, 0.0]]])
    alone = colors_of(plots.pixel_maps(relevance, None, "a class"))
    # Which half of the picture is which: the map fills it, and the bar of colors is at the right.
    height, width = alone.shape[:2]
    red, blue, white = (
        alone[height * row // 4, width * column // 8] for row, column in ((1, 2), (1, 5), (3, 2))
    )
    assert red[0] > 2 * red[2]
    assert blue[2] > 2 * blue[0]
    # The middle of a table of 256 colors lies between two of them.
    torch.testing.assert_close(white, torch.ones(3), rtol=0, atol=0.01)
    image = torch.tensor([[[0.0, 0.0], [0.0, 1.0]]]).unsqueeze(0)
    over = colors_of(plots.pixel_maps(relevance, image, "a class"))
    assert torch.equal(over[height * 1 // 4, width * 2 // 8], red)
    assert torch.equal(over[height * 3 // 4, width * 2 // 8], torch.zeros(3))
    with pytest.raises(SamplesError, match="65 images are too many"):
        plots.pixel_maps(torch.zeros(65, 2, 2), None, "")


def test_the_command_explains_images(images, lamella_cli, tmp_path):
    folder, batch = images
    files = [tmp_path / name for name in ("map.png", "page.html", "all.json")]
    status, out, err = lamella_cli(
        *("explain", folder, batch, "--target", "owl", "--over"),
        *("--png", files[0], "--html", files[1], "--out", files[2], "--json"),
    )
    assert (status, err) == (0, "")
    assert colors_of(files[0].read_bytes()).ndim == 3
    assert 'src="data:image/png;base64,' in files[1].read_text()
    data = json.loads(files[2].read_text())
    assert data == json.loads(out)
    assert data["target"] == "class 'owl'"
    assert [len(bars["flows"]) for bars in data["heads"]] == [2, 2]
    assert not list(tmp_path.glob(".*"))
    for arguments, says in (
        ((folder, "missing.png"), "there is no file"),
        ((folder, batch, "--png", "map.jpg"), "a file ends with .png"),
        ((folder, batch, "--png", tmp_path / "no" / "map.png"), "there is no folder"),
        ((folder, files[0]), "no preprocessor_config.json"),
    ):
        status, _, err = lamella_cli("explain", *arguments)
        assert status == 2
        assert says in err


def test_without_matplotlib_pictures_say_what_to_install(images, monkeypatch):
    folder, batch = images
    found = lamella.explain(folder, load_file(batch), target="owl")
    assert "data:image" in found.html()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for draw in (found.png, found.chart, lambda: files.check("why.png", [".png"])):
        with pytest.raises(BackendError, match=r"pip install 'lamella\[plots\]'"):
            draw()
    assert "data:image" not in found.html()


def test_bars_of_blocks_add_up_to_those_of_branches(found):
    added = [block.added for block in found.blocks]
    branches = [part.amounts.flow for part in found.sublayers]
    assert added == pytest.approx([sum(branches[:2]), sum(branches[2:])])
    assert colors_of(found.chart()).ndim == 3
    text = str(found)
    assert all(word in text for word in ("block", "branch", "attention", "strongest", "head"))


def test_a_page_holds_all_it_shows_and_escapes_its_text(found):
    evil = ("<script>alert(1)</script>", '"><img src=x>', "&amp;", "\x1b[31m")
    words = (*evil, *found.words[0][len(evil) :])
    page = dataclasses.replace(found, words=(words,), target="<b>&").html()
    assert "<script" not in page
    assert "<img" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "&amp;amp;" in page
    assert "&lt;b&gt;&amp;" in page
    assert "\x1b" not in page
    assert "default-src 'none'" in page
    assert "http" not in page.replace("http-equiv", "")


class Broken(nn.Module):
    """A root and an exponential of twice the input."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((3,), 2.0))

    def forward(self, x):
        return (x * self.weight).sqrt().exp() + 1


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (-1.0, r"computes NaN, first in sqrt.* \(aten.sqrt"),
        (1e5, r"computes infinite numbers, first in exp.* \(aten.exp"),
        (float("nan"), "input 'x' holds NaN"),
        (float("inf"), "input 'x' holds infinite numbers"),
    ],
)
def test_the_first_operation_that_computes_no_number_is_named(value, says):
    with pytest.raises(GraphError, match=says):
        lamella.explain(Broken(), {"x": torch.full((1, 3), value)}, target=(0, 0), preset="relp")


def test_a_weight_that_holds_no_numbers_is_named():
    model = Broken()
    nn.init.constant_(model.weight, float("nan"))
    with pytest.raises(GraphError, match="weight 'weight' holds NaN"):
        lamella.explain(model, {"x": torch.ones(1, 3)}, target=(0, 0), preset="gradient")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_gives_the_relevance_of_float32(folder, graph, ids, dtype):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    # Coefficients of 1e-5 and less, which are no normal numbers of float16.
    seed = torch.zeros(1, 5, 64)
    seed[0, -1, 17] = 1e-5
    got = lamella.explain(model, {"input_ids": ids}, target=seed)
    want = lamella.explain(graph, {"input_ids": ids}, target=seed)
    assert bool(got.tokens.isfinite().all())
    scale = float(want.tokens.abs().max())
    # 8 bits of a bfloat16, some operations.
    torch.testing.assert_close(got.tokens.float(), want.tokens, rtol=0.05, atol=0.03 * scale)


def test_the_command_prints_tokens_and_writes_a_page(folder, lamella_cli, tmp_path):
    page = tmp_path / "page.html"
    status, out, err = lamella_cli(
        *("explain", folder, TEXT, "--target", "(0,-1,17)", "--ledger", "--html", page)
    )
    assert (status, err) == (0, "")
    assert "logits[0, -1, 17]" in out
    assert "the sum closes to" in out
    assert "small" in out
    assert "small" in page.read_text()
