"""Store weights in 2 to 8 bits."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from lamella.data import Samples
from lamella.errors import PassError, SamplesError
from lamella.ir.graph import Graph
from lamella.ir.ops import aten
from lamella.ir.plan import Plan, PlanEntry
from lamella.ir.quantize import (
    BITS,
    SCALE_DTYPES,
    Format,
    integers,
    quantize,
    weight_bytes,
    wider_kernels,
)
from lamella.ir.reducers import MeanSquare
from lamella.ir.runner import Request
from lamella.passes.base import Analyses, Effect, Transform
from lamella.passes.options import options_of, plain
from lamella.passes.rounding.base import Rounded
from lamella.passes.rounding.chain import Chain, ChainOptions
from lamella.passes.rounding.experts import ExpertNotes, experts_to_nearest, round_experts
from lamella.passes.rounding.methods import Method, check_method, rounding_of
from lamella.passes.rounding.report import tell, tell_experts
from lamella.passes.rounding.resume import BlockFiles, run_key
from lamella.passes.rounding.tokens import TokenWeights, gradient_norms
from lamella.passes.scores.target import loss_target
from lamella.passes.sites import Site, find_sites, other_weights
from lamella.passes.transforms.integer_layers import ACTIVATIONS, integer_layers, rewire
from lamella.passes.transforms.rewiring import rewire_rounded


@dataclass(frozen=True)
class QuantizeWeights(Transform):
    """Round the weights of linear layers and embeddings to few bits, with searched scales.

    A block of weights along `in` is stored as unsigned codes ``q`` with one scale and stands for
    ``s * (q - z)``; the scale is the one of least squared error on a grid (see
    `lamella.ir.quantize`). A linear layer becomes `lamella::linear_nbits`, an embedding
    `lamella::embedding_nbits`; where both read one weight they read the same codes.

    With `bits` the plan is uniform: every weight gets that width, except that the router of a
    mixture of experts never gets less than 8. Without it the plan that `allocate-bits` left on
    the graph is followed. Weights are read, rounded and put back one by one.

    With `activations` the linear layers that see many rows multiply 8-bit integers by 8-bit
    integers: their symmetric weights of 8 bits get one scale per output instead of blocks, and
    they become `lamella::linear_int8` (see `lamella.passes.transforms.integer_layers`). All others
    are stored as before.

    Attributes:
        bits: 2, 3, 4, 5, 6 or 8 for all; None follows the plan of the graph. There is no kernel
            for 3, 5 and 6: codes are held in the next width (see `lamella.ir.quantize`).
        block: Weights that share a scale: 32, 64, 128 or 256; only with `bits`.
        symmetric: No zero points, zero is the middle code; only with `bits`.
        scales: ``"float16"`` or ``"float32"``; only with `bits`.
        min_size: Weights with fewer entries stay as they are; only with `bits`.
        int8_activations: Round the inputs of linear layers to 8 bits per row and block, as the
            fast kernels do; the loss is then measured with the numerics that will run.
        activations: ``"none"``; ``"int8-rows"``: a scale for every row of the inputs, so that the
            result for a token does not depend on the batch; ``"int8-tensor"``: one scale for all
            rows, faster and less exact; ``"int8"``: one scale where the samples show that rows
            are alike, a scale for every row elsewhere and without samples.
        min_rows: Layers that see fewer rows of one input of 128 tokens, where reading the weight
            takes longer than multiplying, stay as they are stored; only with `activations`.
        measure: Instead of counting rows, take for each layer the kernel that is measured to be
            faster on this machine for one input of 128 tokens; only with `activations`.
        by_inputs: Weigh the squared error of each column by the mean square of its inputs over
            the samples, instead of all alike.
        method: How weights are rounded: ``"rtn"`` to nearest, each entry for itself, without
            samples; ``"gptq"`` so that columns make up for the errors of those before them;
            ``"quantease"`` descends from there one column at a time; ``"flexround"`` learns
            scales and rounding by gradients, block by block, and takes minutes; ``"pb-llm"``
            keeps a share of the weights in 8 bits and one bit of each other, which no kernel
            reads (the weights stay dense).
        damping: Share of the mean of its diagonal that is added to a Gram matrix; ten times as
            much where that is not enough, up to 1. For gptq, quantease and pb-llm.
        act_order: Round the columns with the largest inputs first; it leaves no trace in what is
            stored. For gptq and quantease.
        refits: How often scales are fitted to the codes and all columns are rounded again, which
            takes as long as the first time. For gptq and quantease.
        sweeps: How often quantease visits every column, and fits scales in between.
        outliers: Share of the columns that quantease keeps exactly in a linear layer beside the
            codes.
        salient: Share of the weights that pb-llm keeps in 8 bits.
        steps: How many updates of each block flexround makes.
        tokens: How much tokens count in a Gram matrix: ``"uniform"``; ``"attention"``, by how
            much attention they get in the block; ``"gradient"``, by the squared gradient at the
            output of the layer, which needs the activations of one sample in all blocks.
        sequential: Layers are rounded for the inputs that the rounded layers before them give;
            otherwise for those of the model as it is.
        experts: Round the matrices of mixtures of experts too, each for the tokens that are routed
            to it; only with `bits`, for rtn, gptq and quantease. No kernel reads their codes:
            they stay dense, and the report says what codes would take. They are rounded after
            all others, and `resume` does not keep them.
        resume: A folder where finished blocks are kept: the same call goes on after the last of
            them when it was interrupted, and gives the same bits. For all methods but rtn.

    Raises:
        ValueError: An option has another value, or the method does not take it.

    References:
        [Frantar2023] and [Behdin2023] for the layer's problem, [LeeJ2023], [Shang2024] and
        [Sung2025] for methods, [Dettmers2022] for scales per block.
    """

    name: ClassVar[str] = "quantize-weights"
    effect: ClassVar[Effect] = Effect.LOSSY

    bits: int | None = None
    block: int = 32
    symmetric: bool = True
    scales: str = "float16"
    min_size: int = 1 << 14
    int8_activations: bool = True
    activations: str = "none"
    min_rows: int = 16
    measure: bool = False
    by_inputs: bool = False
    method: Method = "rtn"
    damping: float = 0.1
    act_order: bool = True
    refits: int = 4
    sweeps: int = 3
    outliers: float = 0.0
    salient: float = 0.1
    steps: int = 200
    tokens: str = "uniform"
    sequential: bool = True
    experts: bool = False
    resume: Path | None = None

    def __post_init__(self) -> None:
        if self.bits not in (None, *_WIDTHS):
            known = ", ".join(map(str, _WIDTHS))
            raise ValueError(f"bits must be one of {known}, or none for the plan, got {self.bits}")
        if self.scales not in SCALE_DTYPES:
            raise ValueError(
                f"scales must be one of {', '.join(SCALE_DTYPES)}, got {self.scales!r}"
            )
        if self.min_size < 0:
            raise ValueError(f"min_size must not be negative, got {self.min_size}")
        if self.activations not in ACTIVATIONS:
            raise ValueError(
                f"activations must be one of {', '.join(ACTIVATIONS)}, got {self.activations!r}"
            )
        if self.min_rows < 0:
            raise ValueError(f"min_rows must not be negative, got {self.min_rows}")
        if self.activations != "none" and self.bits not in (None, 8):
            raise ValueError(
                f"activations={self.activations} needs weights of 8 bits, got bits={self.bits}; "
                f"use bits=8, or allocate-bits with 8 among its choices"
            )
        self._format(self.bits or 4)
        defaults = {field.name: field.default for field in fields(self)}
        check_method(self.method, vars(self), defaults)
        if self.experts and self.bits is None:
            raise ValueError("experts=true needs bits=, a plan has no widths for experts")
        if self.method == "pb-llm" and self.bits not in (None, 8):
            raise ValueError(
                f"method=pb-llm stores salient weights in 8 bits, got bits={self.bits}; use bits=8 "
                f"and salient= for their share"
            )

    def run(self, graph: Graph, analyses: Analyses) -> None:
        """Replace the readers of each weight of the plan."""
        sites = find_sites(graph)
        plan = self._uniform(sites) if self.bits else _stored_plan(graph, sites)
        todo = [site for site in sites if plan.get(site.weight, _AS_IT_IS).bits != 32]
        importance = _importance(todo, analyses) if self.by_inputs else {}
        per_row = self._integer_layers(graph, analyses, {s: plan[s.weight] for s in todo})
        in_chain = {site: plan[site.weight] for site in todo if site not in per_row}
        chained = self._chained(graph, analyses, in_chain)
        for site in todo:
            columns = importance.get(site.weight)
            with _named(site):
                if site in per_row:
                    rewire(graph, site, integers(graph.weight(site.node), columns), per_row[site])
                    continue
                rounded = chained.get(site)
                if rounded is None:
                    stored = quantize(graph.weight(site.node), plan[site.weight], columns)
                    rounded = Rounded(stored)
                rewire_rounded(graph, site, rounded, int8_activations=self.int8_activations)
        graph.plan = {k: v for k, v in graph.plan.items() if k not in plan}
        if self.experts and self.bits:
            self._round_experts(graph, analyses, self._format(self.bits))
        wider = wider_kernels(plan[site.weight] for site in todo)
        if wider:
            analyses.remark(wider)
        _report(graph, analyses, sites, todo)

    def _chained(
        self, graph: Graph, analyses: Analyses, formats: Mapping[Site, Format]
    ) -> Mapping[Site, Rounded]:
        """What the method makes of the weights; nothing for rounding to nearest."""
        rounding = rounding_of(self.method, vars(self))
        if rounding is None or not formats:
            return {}
        samples = _samples(self.method, analyses)
        weights = self._token_weights(graph, samples, formats)
        files = None
        if self.resume is not None:
            files = BlockFiles(self.resume, self._key(graph, samples, formats))
            files.prepare()
            _tell_others(files, analyses)
        options = ChainOptions(
            self.sequential, self.int8_activations, weights, files, analyses.progress
        )
        chain = Chain(graph, samples, formats, rounding, options)
        rounded = chain.run()
        tell(chain.notes, analyses, None if self.method == "flexround" else self.damping)
        _tell_dense(rounded, analyses)
        nearest = {name for names in chain.notes.nearest.values() for name in names}
        coded = {s: formats[s] for s, one in rounded.items() if one.codes is not None}
        _write_down(graph, {s: f for s, f in coded.items() if s.weight not in nearest}, self.method)
        return rounded

    def _round_experts(self, graph: Graph, analyses: Analyses, format: Format) -> None:
        rounding, notes = rounding_of(self.method, vars(self)), ExpertNotes()
        if rounding is None:
            rounded = experts_to_nearest(graph, format, notes)
        else:
            rounded = round_experts(graph, _samples(self.method, analyses), rounding, format, notes)
        for node, value in rounded:
            graph.set_weight(node, value)
        tell_experts(notes, analyses)

    def _token_weights(
        self, graph: Graph, samples: Samples, formats: Mapping[Site, Format]
    ) -> TokenWeights:
        if self.tokens != "gradient":
            return TokenWeights(self.tokens)
        readers = [r for s in formats for r in s.readers if r.target is aten.linear.default]
        norms = gradient_norms(graph, loss_target(graph), samples, readers)
        return TokenWeights(self.tokens, norms)

    def _key(self, graph: Graph, samples: Samples, formats: Mapping[Site, Format]) -> str:
        """The digest of all that the rounded weights hang on."""
        options = {k: v for k, v in plain(options_of(self)).items() if k != "resume"}
        named = {site.weight: str(format) for site, format in formats.items()}
        dtypes = {site.weight: str(format.scale_dtype) for site, format in formats.items()}
        digest = f"{samples.digest} {samples.seed}"
        return run_key(graph, digest, {"options": options, "formats": named, "scales": dtypes})

    def _integer_layers(
        self, graph: Graph, analyses: Analyses, formats: Mapping[Site, Format]
    ) -> Mapping[Site, bool]:
        """The sites that become products of integers -> whether each row has a scale."""
        if self.activations == "none":
            return {}
        min_rows = None if self.measure else self.min_rows
        return integer_layers(graph, analyses, formats, (self.activations, min_rows))

    def _format(self, bits: int) -> Format:
        return Format(bits, self.block, self.symmetric, SCALE_DTYPES[self.scales])

    def _uniform(self, sites: tuple[Site, ...]) -> dict[str, Format]:
        assert self.bits is not None
        widths = {s.weight: max(self.bits, 8) if s.role == "router" else self.bits for s in sites}
        return {s.weight: self._format(widths[s.weight]) for s in sites if s.size >= self.min_size}


_AS_IT_IS = Format(bits=32)
_WIDTHS = tuple(bits for bits in BITS if bits != 32)


def _stored_plan(graph: Graph, sites: tuple[Site, ...]) -> Mapping[str, Format]:
    """The plan of the graph; it must fit the weights that are there now."""
    if not graph.plan:
        raise PassError(
            "quantize-weights has no plan to follow; run allocate-bits before it, or give bits="
        )
    gone = sorted(set(graph.plan) - {site.weight for site in sites})
    if gone:
        raise PassError(
            f"the bit plan names weights that are no longer there: {', '.join(gone)}; run "
            f"allocate-bits right before quantize-weights"
        )
    return graph.plan


@contextlib.contextmanager
def _named(site: Site) -> Generator[None]:
    """Say which weight can't be quantized."""
    try:
        yield
    except ValueError as error:
        raise PassError(f"weight {site.weight!r} can't be quantized: {error}") from error


def _samples(method: str, analyses: Analyses) -> Samples:
    if analyses.samples is None:
        raise SamplesError(
            f"quantize-weights method={method} rounds weights for the inputs that layers see; "
            f"pass samples=, an iterable of input dicts, or use method=rtn"
        )
    return analyses.samples


def _write_down(graph: Graph, formats: Mapping[Site, Format], method: str) -> None:
    """Put the method into the plan that is written beside the model."""
    made = graph.plan_made or Plan({})
    entries = dict(made.entries)
    for site, format in formats.items():
        known = entries.get(site.weight)
        if known is None or known.format != format:
            known = PlanEntry(format, site.shape, weight_bytes(site.shape, format))
        entries[site.weight] = replace(known, quantizer=method)
    graph.plan_made = Plan(entries, made.origin)


def _tell_others(files: BlockFiles, analyses: Analyses) -> None:
    others = files.others()
    if others:
        analyses.note(
            f"{len(others)} files in {str(files.folder)!r} are of another model, other samples, "
            f"options or versions and are not used: {', '.join(others[:4])}"
        )


def _tell_dense(rounded: Mapping[Site, Rounded], analyses: Analyses) -> None:
    dense = {site: one for site, one in rounded.items() if one.codes is None}
    if dense:
        stored = sum(one.stored_bytes for one in dense.values())
        weights = sum(site.size for site in dense)
        analyses.note(
            f"no kernel reads the codes of {len(dense)} weights, which go on as dense ones; a file "
            f"of their codes would have {stored} bytes, {8 * stored / weights:.3g} bits per weight"
        )


def _importance(sites: list[Site], analyses: Analyses) -> dict[str, Tensor]:
    """The mean square of the inputs of each column, where linear layers read the weight."""
    requests: dict[str, list[Request]] = {}
    for site in sites:
        linears = [r for r in site.readers if r.target is aten.linear.default]
        inputs = [r.all_input_nodes[0] for r in linears]
        requests[site.weight] = [Request.of(MeanSquare(), node) for node in inputs]
    known = analyses.statistics([r for several in requests.values() for r in several])
    return {
        weight: torch.stack([known[r] for r in several]).mean(0)
        for weight, several in requests.items()
        if several
    }


def _report(graph: Graph, analyses: Analyses, sites: tuple[Site, ...], todo: list[Site]) -> None:
    done = {site.weight for site in todo}
    kept = [site.weight for site in sites if site.weight not in done]
    if kept:
        analyses.note(f"left as they are (too small, or the plan says so): {', '.join(kept)}")
    odd = other_weights(graph)
    if odd:
        listed = ", ".join(f"{name} ({why})" for name, why in odd.items())
        analyses.remark(f"no operator of few bits for {len(odd)} weights: {listed}")
    if not todo:
        analyses.remark("no weight was quantized: lower min_size, or change the plan")
