"""Explanations: against autograd, complete, the same for a row alone, and clear about mistakes."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from torch import nn

import lamella
from lamella.errors import GraphError, SamplesError
from lamella.explanation import explainer
from tests.tiny import save_language_model

TEXT = "a small model reads words"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_language_model(tmp_path_factory.mktemp("explained") / "model", layers=2)


@pytest.fixture(scope="module")
def graph(folder):
    return lamella.capture(folder)


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


def test_a_padded_row_is_explained_as_it_is_alone(graph, ids):
    padded = torch.cat([ids, torch.tensor([[4, 8, 2, 0, 0]])])
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    both = lamella.explain(graph, {"input_ids": padded, "attention_mask": mask}, target=17)
    alone = lamella.explain(graph, {"input_ids": padded[1:, :3]}, target=17)
    # Sums over other numbers of hidden tokens, in float32.
    torch.testing.assert_close(both.tokens[1:, :3], alone.tokens, rtol=1e-3, atol=1e-6)
    assert float(both.tokens[1, 3:].abs().max()) == 0


def test_texts_come_with_their_words(folder):
    found = lamella.explain(folder, TEXT, target="logit")
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
        (64, "there are 64"),
        ("contrastive:3,4,5", "names its classes wrong"),
        ("nothing-like-it", "no class"),
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
    with pytest.raises(SamplesError, match="is an image"):
        _ = lamella.explain(graph, {"input_ids": ids}, target=1).pixels
    with pytest.raises(SamplesError, match="pixel_values"):
        lamella.explain(graph, {"input_ids": ids, "pixel_values": ids}, target=1)
    with pytest.raises(SamplesError, match="int32"):
        lamella.explain(graph, {"input_ids": ids.int()}, target=1)
    with pytest.raises(ValueError, match="preset"):
        lamella.explain(graph, {"input_ids": ids}, target=1, preset="best")


class Broken(nn.Module):
    """Computes the root of a negative number."""

    def forward(self, x):
        return (x * 2).sqrt() + 1


def test_the_first_operation_that_computes_nan_is_named():
    with pytest.raises(GraphError, match=r"first in sqrt.* \(aten.sqrt"):
        lamella.explain(Broken(), {"x": -torch.ones(1, 3)}, target=(0, 0), preset="gradient")


def test_the_command_prints_tokens_and_writes_a_page(folder, lamella_cli, tmp_path):
    page = tmp_path / "page.html"
    status, out, err = lamella_cli("explain", folder, TEXT, "--target", "17", "--html", page)
    assert (status, err) == (0, "")
    assert "class 17 at the last token" in out
    assert "small" in page.read_text()
    _, out, _ = lamella_cli("explain", folder, TEXT, "--target", "(0,-1,17)", "--ledger", "--json")
    data = json.loads(out)
    assert abs(data["closure"]) < 1e-4
    assert [token["token"] for token in data["tokens"]].count("small") == 1
    status, _, err = lamella_cli("explain", folder, TEXT, "--target", "999")
    assert status
    assert "there are 64" in err
