"""The model as transformers runs it, and as its exporter hands it to ONNX Runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, LlamaForCausalLM

from benchmarks.decoders.candidate import STEPS, Call, Candidate, Sizes, prompt, token
from lamella.backends.onnxruntime.session import Session


def eager(model: LlamaForCausalLM, sizes: Sizes) -> Candidate:
    """PyTorch in float32."""
    read = sum(p.numel() * 4 for p in model.parameters()) - sizes.embedding_bytes

    @torch.inference_mode()
    def start(past: int) -> DynamicCache:
        cache = DynamicCache(config=model.config)
        model(prompt(past), past_key_values=cache, logits_to_keep=1)
        return cache

    def decode(past: int) -> Call:
        cache = start(past)

        @torch.inference_mode()
        def call() -> None:
            for _ in range(STEPS):
                model(token(), past_key_values=cache)
            cache.crop(-STEPS)

        return call

    return Candidate("transformers, eager", read, decode, lambda n: lambda: start(n))


def exported(model: LlamaForCausalLM, folder: Path, sizes: Sizes) -> Candidate:
    """A session of what transformers exports; its caches grow, and are not taken back here."""
    from transformers.exporters.configs import OnnxConfig
    from transformers.exporters.exporter_onnx import OnnxExporter

    ids = torch.ones(2, 8, dtype=torch.int64)
    with torch.no_grad():
        past = model(ids, use_cache=True).past_key_values
    inputs: dict[str, Any] = {
        "input_ids": ids[:, :3],
        "attention_mask": torch.ones(2, 11, dtype=torch.int64),
        "position_ids": torch.arange(8, 11).expand(2, 3).contiguous(),
        "past_key_values": past,
        "use_cache": True,
    }
    config = OnnxConfig(dynamic=True, ort_fusions="cpu")
    OnnxExporter().export(model, inputs, config).save_pretrained(folder)
    session = Session(next(folder.rglob("*.onnx")))

    def fed(before: int, new: int) -> Call:
        feeds: dict[str, Tensor] = {name: sizes.cache(before) for name in session.inputs}
        feeds["input_ids"] = prompt(new)
        feeds["attention_mask"] = prompt(before + new)
        feeds["position_ids"] = torch.arange(before, before + new).unsqueeze(0)
        feeds = {key: feeds[key] for key in session.inputs}
        return lambda: session.run(feeds, session.outputs)

    def decode(before: int) -> Call:
        once = fed(before, 1)
        return lambda: [once() for _ in range(STEPS)]

    read = sum(p.numel() * 4 for p in model.parameters()) - sizes.embedding_bytes
    return Candidate("transformers exporter, fused", read, decode, lambda n: fed(0, n))
