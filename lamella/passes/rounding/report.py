"""What is said about a chain in the report of a compilation."""

from __future__ import annotations

from lamella.passes.base import Analyses
from lamella.passes.rounding.chain import ChainNotes
from lamella.passes.rounding.experts import ExpertNotes

_LISTED = 12


def tell(notes: ChainNotes, analyses: Analyses, asked: float | None) -> None:
    """Put what happened into the report; what is not as asked for is an error when strict.

    Args:
        notes: Of the chain.
        analyses: Where remarks go.
        asked: The damping that was asked for, or None if the method has none.

    Raises:
        PassError: The compilation is strict, and something is not as asked for.
    """
    for sentence in notes.files:
        analyses.note(sentence)
    if notes.resumed:
        analyses.note(f"{notes.resumed} blocks were read from files of a run before")
    for reason, names in notes.nearest.items():
        text = f"rounded to nearest, because {reason}: {_listed(names)}"
        if "factor" in reason:
            analyses.remark(text)
        else:
            analyses.note(text)
    for damping, names in sorted(notes.damped.items()):
        if asked is not None and damping > asked:
            analyses.remark(
                f"the Gram matrix is singular with a damping of {asked:g}, {damping:g} was "
                f"needed: {_listed(names)}"
            )
    if notes.few:
        held = min(tokens for tokens, _ in notes.few.values())
        needed = max(width for _, width in notes.few.values())
        analyses.remark(
            f"too few tokens for the Gram matrix of {len(notes.few)} weights: the samples hold "
            f"{held}, {needed} are needed at least (one for each input) and ten times as many are "
            f"better: {_listed(list(notes.few))}"
        )
    if notes.unweighted:
        analyses.note(
            f"tokens count alike, because the samples give them no weights there: "
            f"{_listed(notes.unweighted)}"
        )
    if notes.losses:
        first, last = (sum(both) / len(notes.losses) for both in zip(*notes.losses, strict=True))
        analyses.note(
            f"learning brought the relative squared error of {len(notes.losses)} blocks from "
            f"{first:.3g} to {last:.3g} on average"
        )


def tell_experts(notes: ExpertNotes, analyses: Analyses) -> None:
    """Put what happened to experts into the report.

    Raises:
        PassError: The compilation is strict, and something is not as asked for.
    """
    if not notes.weights:
        analyses.remark("experts=true finds no experts whose weights nothing else reads")
        return
    bits = 8 * notes.stored_bytes / notes.entries
    analyses.note(
        f"experts are rounded and stay dense, because no kernel reads their codes; a file of them "
        f"would have {notes.stored_bytes} bytes, {bits:.3g} bits per weight: "
        f"{_listed(notes.weights)}"
    )
    if notes.nearest:
        analyses.remark(
            f"rounded to nearest, because their Gram matrix has no factor: {_listed(notes.nearest)}"
        )
    if notes.few:
        told = [f"{name} ({tokens} of {width})" for name, (tokens, width) in notes.few.items()]
        analyses.remark(
            f"too few tokens are routed to {len(told)} experts for their Gram matrix (one for each "
            f"input are needed at least; those without any are rounded to nearest): {_listed(told)}"
        )


def _listed(names: list[str]) -> str:
    more = len(names) - _LISTED
    return ", ".join(names[:_LISTED]) + (f", and {more} more" if more > 0 else "")
