"""What checking costs: verification and bookkeeping beside the passes themselves.

``python -m benchmarks.manager``
"""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import lamella
from benchmarks.record import Result

PASSES = ["fold-norms", "drop-blocks count=2 by=similarity", "quantize-weights bits=4"]


def llama(blocks: int = 12, width: int = 768) -> LlamaForCausalLM:
    """A random Llama of 12 blocks, 768 wide, with 4 of 12 key-value heads."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(
            LlamaConfig(
                hidden_size=width,
                intermediate_size=2048,
                num_hidden_layers=blocks,
                num_attention_heads=12,
                num_key_value_heads=4,
                vocab_size=8192,
            )
        ).eval()


def main() -> None:
    """Run a recipe on the 12-block model and divide its time."""
    model = llama()
    tokens = torch.randint(3, 8192, (2, 64), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    graph = lamella.capture(model, inputs)
    report = lamella.transform(graph, PASSES, samples=[inputs])
    rows = [
        (r.name, r.seconds * 1e3, r.verify_seconds * 1e3, r.check_seconds * 1e3)
        for r in report.passes
    ]
    total, verified = sum(r[1] for r in rows), sum(r[2] for r in rows)
    checked = sum(r[3] for r in rows)
    rows.append(("all", total, verified, checked))
    Result(
        name="manager",
        title="Time of passes and of checks on a 12-block, 768-wide Llama",
        columns=("pass", "pass ms", "verification ms", "numeric check ms"),
        rows=rows,
        notes=(
            f"Verification and bookkeeping are {verified / total:.1%} of the time of the passes; "
            "the numeric check runs the model and is counted apart.",
        ),
    ).publish()


if __name__ == "__main__":
    main()
