"""From a model and its inputs to an explanation: emit, run, collect."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lamella import api
from lamella.backends.inputs import check_inputs, specs_of
from lamella.errors import SamplesError
from lamella.explanation.finite import check_entries, check_finite
from lamella.explanation.result import Explanation, Ledger
from lamella.explanation.targets import (
    Start,
    Target,
    at_last_seen,
    check_place,
    check_seed,
    hides_the_last,
    masks_of,
    start_of,
)
from lamella.ir.graph import Graph
from lamella.ir.huggingface import is_pretrained
from lamella.ir.sources import Model, Source
from lamella.passes.analyses.relevance_results import report_of
from lamella.passes.relevance import taps
from lamella.passes.relevance.emit import SEED, emit
from lamella.passes.relevance.relevance_graph import RelevanceGraph
from lamella.passes.relevance.request import Request, Tap
from lamella.rules.relevance.presets import Preset, preset_of


def explain(
    model: Model,
    inputs: Mapping[str, Any] | str | Sequence[str],
    *,
    target: Target,
    preset: str | Preset = "cp",
    ledger: bool = False,
    checkpoint: str = "",
) -> Explanation:
    """The relevance of the inputs, blocks and heads of a model for one of its outputs.

    It takes one forward and one sweep back, about the price of a gradient.

    Args:
        model: As for `capture`.
        inputs: The inputs by name; texts for a model with a tokenizer.
        target: What is explained, in the first output: an index such as ``(0, -1, 17)`` (row,
            token, class), a class or its label, a token of the vocabulary (of the last token of
            each row), a seed (``"logit"`` for the largest, ``"contrastive:3"``, ``"softmax:3"``,
            ``"difference:3,5"``), or a tensor of the shape of the output.
        preset: Name of the rules: ``"cp"``, ``"attnlrp"``, ``"gradient"``, ``"gamma"``, …; or a
            preset of your own. Which are most faithful depends on the model: of those measured
            in ``benchmarks/faithfulness.py``, ``attnlrp`` for a vision transformer, ``cp`` and
            ``gamma`` for a text encoder.
        ledger: Also account for what biases, softmax and others kept.
        checkpoint: ``"blocks"`` keeps the activations of one block at a time and runs the forward
            of each once more: less memory for more time.

    Raises:
        ValueError: The preset or the checkpoint is unknown.
        SamplesError: The target is not in the output, an input is missing or has another shape.
        MissingRuleError: Some operators have no rule; all are listed.
        GraphError: The model computes NaN or infinities; the first such operation is named.
    """
    wanted = Request(ledger=ledger, checkpoint=checkpoint)
    rules = preset_of(preset)
    source = _source(model, inputs)
    given = _given(source, inputs)
    start = _placed(start_of(target, source.graph, source.tokenizer), source.graph, given)
    made = emit(source.graph, rules, _request(source.graph, start, wanted))
    found = _run(made, source.graph, start, given)
    return _told(source, made, found, (rules.name, start.text), given)


def explainer(model: Model, *, target: Target | None = None, preset: str | Preset = "cp") -> Graph:
    """The graph that computes the relevance of inputs, to be lowered and saved like a model.

    Called with the inputs of the model, it gives the outputs of the model and
    ``"relevance.<input>"`` for each input; no autograd takes part.

    Args:
        model: As for `capture`; a module that is not from Hugging Face is captured first.
        target: As for `explain`, but no tensor. None adds an input ``"seed"`` of the shape of
            the first output.
        preset: As for `explain`.

    Raises:
        SamplesError: The target is not in the output.
        MissingRuleError: Some operators have no rule; all are listed.
    """
    source = api.read(model)
    seed = None
    if target is not None:
        start = start_of(target, source.graph, source.tokenizer)
        if start.seed is None:
            raise SamplesError("a seed tensor is given at each call; leave target out")
        seed = start.seed
    graph = emit(source.graph, preset_of(preset), Request(seed=seed)).graph
    # It explains a language model, and is none: nothing to lower with a cache.
    graph.origin = dataclasses.replace(graph.origin, generation=None)
    return graph


def _source(model: Model, inputs: object) -> Source:
    if isinstance(model, nn.Module) and not is_pretrained(model):
        if not isinstance(inputs, Mapping):
            raise SamplesError("inputs must be given by name: a dict of tensors")
        # The sizes of the inputs may be 1, which no dynamic size can be captured from.
        source = api.read(model, dict(inputs), dynamic=False)
    else:
        source = api.read(model)
    return source


def _given(source: Source, inputs: Mapping[str, Any] | str | Sequence[str]) -> dict[str, Any]:
    """The flat inputs by name."""
    names = source.graph.signature.inputs
    by_name = inputs if isinstance(inputs, Mapping) else _tokenized(source, inputs)
    by_name = {name: value for name, value in by_name.items() if name in names} | {
        name: value for name, value in by_name.items() if isinstance(inputs, Mapping)
    }
    if "input_ids" in by_name and "attention_mask" in names:
        by_name.setdefault("attention_mask", torch.ones_like(by_name["input_ids"]))
    values = source.graph.signature.flatten((), by_name)
    check_inputs(specs_of(source.graph), values)
    return dict(zip(names, values, strict=True))


def _tokenized(source: Source, texts: str | Sequence[str]) -> dict[str, Any]:
    if source.tokenizer is None:
        raise SamplesError("the model has no tokenizer for texts; give its inputs by name")
    chosen = [texts] if isinstance(texts, str) else list(texts)
    sample = api.samples_for(source, chosen)
    assert sample is not None
    batches = list(sample)
    if len(batches) != 1:
        raise SamplesError(f"{len(chosen)} texts are too many at once; explain fewer of them")
    return dict(batches[0])


def _placed(start: Start, graph: Graph, given: Mapping[str, Any]) -> Start:
    """With a seed tensor where the place depends on the mask, or where one was given."""
    mask = masks_of(given)
    if start.tensor is None and (start.label is None or not hides_the_last(mask)):
        return start
    with torch.no_grad():
        output = graph.run(list(given.values()))[0]
    tensor = start.tensor
    if tensor is None:
        assert start.label is not None
        assert isinstance(mask, Tensor)
        tensor = at_last_seen(start.label, mask, output.shape)
    check_seed(tensor, output)
    return Start(start.text, tensor=tensor.to(output.dtype))


def _request(graph: Graph, start: Start, request: Request) -> Request:
    wanted = [*taps.block_taps(graph), *taps.sublayer_taps(graph), *taps.head_taps(graph)]
    # A model without any of these has an output all the same.
    wanted.append(Tap("output", (graph.outputs[0].name,), taps.amounts_of))
    return dataclasses.replace(request, seed=start.seed, taps=tuple(wanted))


def _run(
    made: RelevanceGraph, graph: Graph, start: Start, given: Mapping[str, Any]
) -> dict[str, Tensor]:
    """What the relevance graph gives."""
    seed = {} if start.tensor is None else {SEED: start.tensor}
    check_entries(graph, given)
    found: dict[str, Tensor] = made(**given, **seed)
    name = graph.signature.outputs[0]
    check_place(start, name, found[name])
    check_finite(found, graph, given)
    return found


def _told(
    source: Source,
    made: RelevanceGraph,
    found: Mapping[str, Tensor],
    named: tuple[str, str],
    given: Mapping[str, Any],
) -> Explanation:
    totals = {
        name: value.double()
        for name, value in found.items()
        if name == "start" or name.startswith(("tap.", "ledger."))
    }
    inputs = {name: found[f"relevance.{name}"] for name in made.sources}
    for name, value in inputs.items():
        totals[f"relevance.{name}"] = torch.stack(
            (value.double().sum(), value.double().abs().sum())
        )
    report = report_of(source.graph, made, totals, (named[0], 1))
    return Explanation(
        preset=named[0],
        target=named[1],
        start=report.start,
        inputs=inputs,
        blocks=report.blocks,
        sublayers=report.sublayers,
        heads=report.heads,
        words=_words(source.tokenizer, given),
        given=given,
        ledger=Ledger(report.ledger, report.closure) if made.ledger else None,
    )


def _words(
    tokenizer: Callable[..., Any] | None, given: Mapping[str, Any]
) -> tuple[tuple[str, ...], ...]:
    ids = given.get("input_ids")
    spell = getattr(tokenizer, "convert_ids_to_tokens", None)
    if spell is None or not isinstance(ids, Tensor):
        return ()
    rows: Iterable[list[int]] = ids.tolist()
    return tuple(tuple(map(str, spell(row))) for row in rows)
