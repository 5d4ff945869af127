"""What a score is worth beside measured losses: Spearman, regret, and their intervals."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from scipy.stats import rankdata
from torch import Tensor

from benchmarks.scores.truth import Losses
from lamella.faithfulness import Interval, pearson
from lamella.ir.graph import Graph
from lamella.ir.quantize import Format, weight_bytes
from lamella.passes.allocation.knapsack import Option, solve
from lamella.passes.sites import find_sites, tie_groups

DRAWS = 400
"""Sets of sequences, drawn with replacement, that intervals are made from."""

BUDGETS = (2.5, 3.0, 3.5, 4.0, 5.0)
"""Bits per weight, codes only, of the plans whose regret is told."""

Table = Mapping[str, Mapping[Format, float]]


def drawn(sequences: int) -> Tensor:
    """How often each sequence counts, float64 ``[1 + DRAWS, sequences]``; the first row is 1."""
    generator = torch.Generator().manual_seed(0)
    picks = torch.randint(sequences, (DRAWS, sequences), generator=generator)
    counts = torch.zeros(DRAWS, sequences, dtype=torch.float64)
    counts.scatter_add_(1, picks, torch.ones_like(picks, dtype=torch.float64))
    return torch.cat([torch.ones(1, sequences, dtype=torch.float64), counts])


def spearman(truth: Tensor, score: Tensor) -> Tensor:
    """Rank correlation of each row of `truth` with `score`; 0 for a constant."""
    ranks = (torch.from_numpy(rankdata(value.numpy(), axis=-1)) for value in (truth, score))
    return pearson(*ranks)


def interval(values: Sequence[Tensor]) -> Interval:
    """Of a figure over seeds and draws; each vector is of one seed, as it is first."""
    mean = float(torch.stack([value[0] for value in values]).mean())
    pool = torch.cat([value[1:] for value in values])
    low, high = torch.quantile(pool, torch.tensor([0.025, 0.975], dtype=pool.dtype)).tolist()
    return Interval(mean, low, high)


@dataclass(frozen=True)
class BitsTruth:
    """The measured losses of single roundings.

    Attributes:
        graph: The model.
        losses: Weight -> format -> loss of each sequence.
        tokens: Of each sequence.
    """

    graph: Graph
    losses: Mapping[str, Mapping[Format, Losses]]
    tokens: Tensor

    @cached_property
    def pairs(self) -> list[tuple[str, Format]]:
        """All weights in all formats."""
        return [(name, f) for name, by_format in self.losses.items() for f in by_format]

    @cached_property
    def means(self) -> Tensor:
        """Loss per token, ``[1 + DRAWS, pairs]``."""
        each = torch.tensor([self.losses[n][f] for n, f in self.pairs], dtype=torch.float64)
        weights = drawn(len(self.tokens))
        return weights @ each.T / (weights @ self.tokens)[:, None]

    def as_table(self) -> dict[str, dict[Format, float]]:
        """The means over all sequences."""
        found: dict[str, dict[Format, float]] = {}
        for (name, f), value in zip(self.pairs, self.means[0].tolist(), strict=True):
            found.setdefault(name, {})[f] = value
        return found

    def rank(self, score: Table) -> Tensor:
        """Spearman over all pairs, ``[1 + DRAWS]``."""
        return spearman(self.means, self._of(score))

    def rank_within(self, score: Table) -> Tensor:
        """The mean over widths of the Spearman of all weights in one width."""
        found: list[Tensor] = []
        for format in dict.fromkeys(f for _, f in self.pairs):
            chosen = torch.tensor([f == format for _, f in self.pairs])
            found.append(spearman(self.means[:, chosen], self._of(score)[chosen]))
        return torch.stack(found).mean(0)

    def regret(self, score: Table) -> Tensor:
        """Measured loss (single changes, added) of plans by `score` over the best, minus 1."""
        shares: list[Tensor] = []
        for budget in BUDGETS:
            chosen, best = self.plan(score, budget), self._best(budget)
            shares.append(self._total(chosen) / self._total(best) - 1.0)
        return torch.stack(shares).mean(0)

    def plan(self, score: Table, budget: float) -> dict[str, Format]:
        """The format of each weight that `score` chooses; tied weights get one width."""
        # A weight that the compared output does not depend on has no measured loss.
        sites = [site for site in find_sites(self.graph) if site.weight in self.losses]
        sizes = {site.weight: site.shape for site in sites}
        formats = list(next(iter(self.losses.values())))
        room = _room(list(sizes.values()), formats, budget)
        groups = [[site.weight for site in group] for group in tie_groups(sites)]
        options = [
            [
                Option(
                    sum(max(score[name][f], 0.0) for name in group),
                    sum(weight_bytes(sizes[name], f) for name in group),
                )
                for f in formats
            ]
            for group in groups
        ]
        picked = zip(groups, solve(options, room), strict=True)
        return {name: formats[index] for group, index in picked for name in group}

    def _best(self, budget: float) -> dict[str, Format]:
        if budget not in self._plans:
            self._plans[budget] = self.plan(self.as_table(), budget)
        return self._plans[budget]

    @cached_property
    def _plans(self) -> dict[float, dict[str, Format]]:
        return {}

    def _total(self, plan: Mapping[str, Format]) -> Tensor:
        chosen = [plan[name] == f for name, f in self.pairs]
        return self.means[:, torch.tensor(chosen)].sum(1)

    def _of(self, score: Table) -> Tensor:
        return torch.tensor([score[name][f] for name, f in self.pairs], dtype=torch.float64)


def _room(shapes: Sequence[tuple[int, int]], formats: Sequence[Format], budget: float) -> int:
    """Bytes of all weights at a width between two formats; scales and padding counted."""
    narrow, wide = (pick(formats, key=lambda f: f.bits) for pick in (min, max))
    least, most = (sum(weight_bytes(shape, f) for shape in shapes) for f in (narrow, wide))
    return int(least + (most - least) * (budget - narrow.bits) / (wide.bits - narrow.bits))


@dataclass(frozen=True)
class DropsTruth:
    """The measured losses without parts.

    Attributes:
        names: The parts that can go.
        of: From some parts to the loss of each sequence without them.
        tokens: Of each sequence.
    """

    names: tuple[str, ...]
    of: Callable[[Sequence[str]], Losses]
    tokens: Tensor

    def mean(self, gone: Sequence[str]) -> Tensor:
        """Loss per token, ``[1 + DRAWS]``."""
        weights = drawn(len(self.tokens))
        losses = torch.tensor(self.of(gone), dtype=torch.float64)
        return weights @ losses / (weights @ self.tokens)

    @cached_property
    def singles(self) -> Tensor:
        """Loss without each one alone, ``[1 + DRAWS, parts]``."""
        return torch.stack([self.mean([name]) for name in self.names], dim=1)

    def rank(self, importance: Mapping[str, float]) -> Tensor:
        """Spearman over all parts."""
        score = torch.tensor([importance[name] for name in self.names], dtype=torch.float64)
        return spearman(self.singles, score)
