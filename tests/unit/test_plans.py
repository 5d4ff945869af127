"""Plan files, the folders that hold them, several budgets, and the front of all budgets."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import lamella
from lamella.data import Samples
from lamella.errors import BudgetError, PassError, PlanError
from lamella.ir.graph import Graph
from lamella.ir.huggingface import load_tokenizer
from lamella.ir.plan import PLAN_FILE, Plan
from lamella.ir.quantize import Format, dequantized, weight_bytes
from lamella.ir.stored_plan import stored_plan
from lamella.passes.allocation.knapsack import Option, least_beside, solve
from lamella.passes.analyses.pareto import Pareto
from lamella.passes.base import Analyses
from lamella.passes.sites import find_sites
from lamella.passes.times import Times
from lamella.passes.transforms.allocate_bits import AllocateBits
from lamella.passes.trials import Trials
from tests.tiny import TEXTS, save_encoder, save_language_model

OPTIONS = "min_size=0 embedding_min=2 head_min=2"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_language_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def fresh(folder: Path) -> Graph:
    return lamella.capture(folder)


@pytest.fixture(scope="module")
def planned(fresh: Graph) -> tuple[Graph, Graph]:
    """The graph with a plan, and after the plan was followed."""
    graph = fresh.copy()
    lamella.transform(graph, [f"allocate-bits budget=5 by=weight-error {OPTIONS}"])
    done = graph.copy()
    lamella.transform(done, ["quantize-weights"])
    return graph, done


def _samples(folder: Path, texts: tuple[str, ...] = TEXTS) -> Samples:
    return Samples.of(texts, tokenizer=load_tokenizer(folder)).select(
        ["input_ids", "attention_mask"]
    )


def test_a_plan_is_read_back_as_it_was_written(
    planned: tuple[Graph, Graph], tmp_path: Path
) -> None:
    made = planned[0].plan_made
    assert made is not None
    assert made.formats == planned[0].plan
    made.write(tmp_path / "plan.json")
    assert Plan.read(tmp_path / "plan.json") == made
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]
    sites = {site.weight: site for site in find_sites(planned[0])}
    stored = {n: weight_bytes(sites[n].shape, f) for n, f in made.formats.items()}
    assert {name: entry.bytes for name, entry in made.entries.items()} == stored


def test_what_is_stored_is_what_was_planned(planned: tuple[Graph, Graph]) -> None:
    graph, done = planned
    assert stored_plan(graph) is None
    assert stored_plan(done) == graph.plan_made
    done.plan_made = None
    again = stored_plan(done)
    assert again is not None
    # Without the plan that was made the formats are still those of the operators.
    assert again.formats == graph.plan


@pytest.mark.parametrize("backend", ["onnxruntime", "eager"])
def test_a_saved_folder_is_a_plan(
    planned: tuple[Graph, Graph], fresh: Graph, tmp_path: Path, backend: str
) -> None:
    graph, done = planned
    lamella.lower(done, backend).save(tmp_path / "out")
    loaded = lamella.load(tmp_path / "out")
    assert loaded.plan is not None
    assert loaded.plan.formats == graph.plan
    other = fresh.copy()
    lamella.transform(other, [f"follow-plan file={tmp_path / 'out'}"], strict=True)
    assert other.plan == graph.plan


@pytest.mark.parametrize("format", ["compressed-tensors", "gguf", "huggingface"])
def test_a_checkpoint_is_a_plan(planned: tuple[Graph, Graph], tmp_path: Path, format: str) -> None:
    graph, done = planned
    lamella.save_checkpoint(done, tmp_path / "out", format=format)
    lamella.verify(tmp_path / "out")
    assert Plan.read(tmp_path / "out").formats == graph.plan


def test_a_plan_gives_the_same_weights_again(
    planned: tuple[Graph, Graph], fresh: Graph, tmp_path: Path
) -> None:
    graph, done = planned
    assert graph.plan_made is not None
    graph.plan_made.write(tmp_path / "plan.json")
    other = fresh.copy()
    lamella.transform(other, [f"follow-plan file={tmp_path / 'plan.json'}", "quantize-weights"])
    one = {str(node.target): done.weight(node) for node in done.weight_nodes()}
    two = {str(node.target): other.weight(node) for node in other.weight_nodes()}
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_plans_for_other_models_are_refused(planned: tuple[Graph, Graph], tmp_path: Path) -> None:
    made = planned[0].plan_made
    assert made is not None
    path = tmp_path / "plan.json"
    made.write(path)
    follow = [f"follow-plan file={path}"]
    encoder = lamella.capture(save_encoder(tmp_path / "encoder"))
    with pytest.raises(PlanError, match=r"for another model.*not there"):
        lamella.transform(encoder, follow)
    with pytest.raises(PlanError, match="quantized already"):
        lamella.transform(planned[1].copy(), follow)
    sibling = lamella.capture(save_language_model(tmp_path / "sibling", seed=1))
    report = lamella.transform(sibling, follow)
    assert "with other weights" in report.passes[0].remarks[0]
    with pytest.raises(PassError, match="with other weights"):
        lamella.transform(sibling, follow, strict=True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", "no bit plan of version 1"),
        ("[]", "no bit plan of version 1"),
        ("{", "can't be read"),
        ('{"lamella_plan": 1}', "malformed"),
        ('{"lamella_plan": 1, "weights": {"a": {"bits": 7}}}', "malformed"),
        ('{"lamella_plan": 1, "weights": {}, "origin": {"x": 1}}', "malformed"),
    ],
)
def test_malformed_plans(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(text)
    with pytest.raises(PlanError, match=message):
        Plan.read(path)


def test_missing_plans(folder: Path, fresh: Graph, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="allocate-bits write=FILE"):
        Plan.read(tmp_path / "none.json")
    with pytest.raises(PlanError, match=f"has no {PLAN_FILE}"):
        Plan.read(folder)
    with pytest.raises(ValueError, match="file must name a bit plan"):
        lamella.transform(fresh.copy(), ["follow-plan"])


def test_from_the_command_line(folder: Path, tmp_path: Path, lamella_cli: Any) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text("\n".join(TEXTS))
    plans, picture = tmp_path / "plans", tmp_path / "front.png"
    arguments = ["--samples", texts, "--points", 3, "--plans", plans, "--plot", picture]
    status, text, _ = lamella_cli("pareto", folder, *arguments)
    assert status == 0
    assert "bits a weight" in text
    assert picture.read_bytes().startswith(b"\x89PNG")
    first = min(plans.iterdir())
    target = tmp_path / "out"
    status, text, err = lamella_cli("compile", folder, "--plan", first, "-o", target, "--json")
    assert status == 0, err
    names = [one["name"] for one in json.loads(text)["passes"]]
    assert names == ["follow-plan", "quantize-weights"]
    assert Plan.read(target).formats == Plan.read(first).formats
    status, _, err = lamella_cli("pareto", folder, "--plot", tmp_path / "front.gif")
    assert (status, "a picture ends with" in err) == (2, True)


def test_the_front_is_that_of_single_budgets(folder: Path, fresh: Graph) -> None:
    graph = fresh.copy()
    found = Analyses(graph, _samples(folder)).get(Pareto(by="weight-error", points=5, min_size=0))
    assert 2 <= len(found.points) <= 5
    for one, two in itertools.pairwise(found.points):
        assert one.bytes < two.bytes
        assert one.predicted > two.predicted
    for point in found.points:
        other = graph.copy()
        budget = f"{point.bytes} bytes"
        AllocateBits(budget=budget, by="weight-error", min_size=0).run(other, Analyses(other))
        assert other.plan_made is not None
        assert other.plan_made.origin.predicted == pytest.approx(point.predicted, rel=1e-12)


def test_measured_losses_are_those_of_rounded_models(folder: Path, fresh: Graph) -> None:
    graph, samples = fresh.copy(), _samples(folder)
    sites = find_sites(graph)
    plan = {site.weight: Format((2, 4, 8)[i % 3]) for i, site in enumerate(sites)}
    other = graph.copy()
    for site in sites:
        node = next(n for n in other.weight_nodes() if str(n.target) == site.weight)
        other.set_weight(node, dequantized(graph.weight(site.node), plan[site.weight]))
    trials = Trials(graph, samples, int8_activations=False)
    # The same products of the same weights; logarithms are rounded in float32.
    assert trials.loss(plan) == pytest.approx(_divergence(graph, other, samples), rel=1e-4)
    assert trials.loss({}) == pytest.approx(0.0, abs=1e-7)
    changes = [{site.weight: Format(8)} for site in sites]
    around = trials.losses_around(plan, changes)
    alone = [trials.loss({**plan, **change}) for change in changes]
    # What runs before a change is the same in both.
    assert around == pytest.approx(alone, rel=1e-9)


def _divergence(one: Graph, two: Graph, samples: Samples) -> float:
    total, tokens = 0.0, 0
    for batch in samples:
        flat = one.signature.flatten((), batch)
        place = list(one.signature.outputs).index("logits")
        p, q = (g.run(flat)[place].detach().double().log_softmax(-1) for g in (one, two))
        kl = (p.exp() * (p - q)).sum(-1)
        mask = batch.get("attention_mask", torch.ones(kl.shape)).bool()
        total += float(kl[mask].sum())
        tokens += int(mask.sum())
    return total / tokens


def test_a_plan_that_loses_too_much_is_scored_again(folder: Path, fresh: Graph) -> None:
    # The fisher score of a random model at 2 bits is off by more than half.
    graph, samples = fresh.copy(), _samples(folder, TEXTS * 2)
    report = lamella.transform(graph, [f"allocate-bits budget=3 {OPTIONS}"], samples=samples)
    text = "\n".join(report.passes[0].remarks)
    assert "measured" in text
    made = graph.plan_made
    assert made is not None
    assert made.origin.measured is not None
    if "scored again" in text:
        assert made.origin.predicted is not None
        plain = fresh.copy()
        options = f"allocate-bits budget=3 measure=false {OPTIONS}"
        lamella.transform(plain, [options], samples=samples)
        judge = Trials(graph, Samples(samples.batches[1::2]))
        assert judge.loss(graph.plan) <= judge.loss(plain.plan) * (1 + 1e-9)


def test_a_plan_without_the_narrowest_width_is_tried(folder: Path, fresh: Graph) -> None:
    # The score knows nothing of the model, so that the plan it likes best is not the best.
    graph = fresh.copy()
    options = {"by": "random", "budget": 4.6, "min_size": 0, "embedding_min": 2, "head_min": 2}
    a_pass = AllocateBits(**options)
    samples = _samples(folder, TEXTS * 2)
    a_pass.run(graph, Analyses(graph, samples))
    wide = {site.weight: Format(4) for site in find_sites(graph)}
    judge = Trials(graph, Samples(samples.batches[1::2]))
    # Four bits everywhere are within the budget.
    assert judge.loss(graph.plan) <= judge.loss(wide) * (1 + 1e-9)


def test_every_budget_is_met(fresh: Graph) -> None:
    graph = fresh.copy()
    analyses = Analyses(graph)
    analyses.times = _times()
    AllocateBits(budget="40%, 20ms decode, 60ms prefill=32", by="weight-error", min_size=0).run(
        graph, analyses
    )
    text = "\n".join(analyses.take_remarks())
    assert "batch=1 tokens=1 past=" in text
    assert "batch=1 tokens=32 past=0" in text
    small = graph.copy()
    lamella.transform(small, ["quantize-weights"])
    assert small.weight_bytes() <= 0.4 * graph.weight_bytes()
    with pytest.raises(BudgetError, match="can't meet a budget of 1e-05 ms decode; the smallest"):
        AllocateBits(budget="40%, 0.00001ms decode", by="weight-error", min_size=0).run(
            graph, analyses
        )


def _times() -> Times:
    class Linear(Times):
        merges, cache_bytes = True, 0

        def seconds(self, kernels: Any) -> Any:
            return {k: 1e-9 * k.rows * k.inputs * k.bits for k in kernels}

        def rest(self, graph: Any, workload: Any) -> float:
            return 1e-6

    return Linear()


@pytest.mark.parametrize("seed", range(20))
def test_two_budgets_equal_brute_force(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)

    def draw(most: int) -> int:
        return int(torch.randint(1, most, (), generator=generator))

    groups = [
        [Option(draw(10**6) / 10**6, draw(60) * 17, (draw(500),)) for _ in range(draw(5))]
        for _ in range(draw(7) + 1)
    ]
    choices = [
        (sum(o.loss for o in c), sum(o.price for o in c), sum(o.more[0] for o in c))
        for c in itertools.product(*groups)
    ]
    _, first, second = choices[draw(len(choices))] if len(choices) > 1 else choices[0]
    best = min(loss for loss, one, two in choices if one <= first and two <= second)
    chosen = [options[i] for options, i in zip(groups, solve(groups, first, second), strict=True)]
    assert sum(o.price for o in chosen) <= first
    assert sum(o.more[0] for o in chosen) <= second
    # The same sums in the same order, up to their rounding.
    assert sum(o.loss for o in chosen) == pytest.approx(best, rel=1e-9)
    least = min(two for _, one, two in choices if one <= first)
    assert least_beside(groups, 1, first, 0) == least


def test_budgets_that_exclude_each_other() -> None:
    groups = [[Option(1.0, 1, (9,)), Option(1.0, 9, (1,))]]
    with pytest.raises(BudgetError, match="not all of them together"):
        solve(groups, 5, 5)


def test_layers_with_spikes_stay_wide() -> None:
    torch.manual_seed(0)
    layers = torch.nn.Sequential(*(torch.nn.Linear(32, 32) for _ in range(3)), torch.nn.Tanh())
    x = torch.randn(8, 32)
    graph = lamella.capture(torch.nn.Sequential(torch.nn.Tanh(), layers), (x,))
    first, *rest = (site.weight for site in find_sites(graph))
    # Behind the hyperbolic tangent no row is larger than others by much; the next layer has one
    # row that is, because of a weight that only answers to it.
    direction = torch.nn.functional.normalize(x[0].tanh(), dim=0)
    node = next(n for n in graph.weight_nodes() if str(n.target) == first)
    graph.set_weight(node, torch.outer(torch.ones(32), 1e4 * (direction - _others(x, direction))))
    samples = Samples.of([{graph.signature.inputs[0]: x}])
    analyses = Analyses(graph, samples)
    options: dict[str, Any] = {"budget": 7, "by": "size", "min_size": 0, "measure": False}
    AllocateBits(spiky_min=8, head_min=2, **options).run(graph, analyses)
    assert graph.plan[rest[0]].bits == 8
    assert graph.plan[first].bits < 8
    assert f"{rest[0]} gets at least 8 bits" in "\n".join(analyses.take_remarks())


def _others(x: torch.Tensor, direction: torch.Tensor) -> torch.Tensor:
    """What of a direction the rows but the first have in common with it."""
    basis = torch.linalg.qr(x[1:].tanh().T).Q
    return basis @ (basis.T @ direction)
