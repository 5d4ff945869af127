"""Greedy decoding of a package with nothing but PyTorch: ``run_package.py FOLDER COUNT ID...``."""

import json
import sys
from pathlib import Path

import torch

folder, count, *prompt = sys.argv[1:]
told = json.loads((Path(folder) / "model.json").read_text())
run = torch._inductor.aoti_load_package(str(Path(folder) / "model.pt2"))
slots, tokens, past = told["cache"]["slots"], [int(token) for token in prompt], 0
cache = {s["input"]: torch.zeros(1, *(max(n, 0) for n in s["shape"])) for s in slots}
new = torch.tensor([tokens])
for _ in range(int(count)):
    length = past + new.shape[1]
    given = {
        "input_ids": new,
        "attention_mask": torch.ones(1, length, dtype=torch.int64),
        "position_ids": torch.arange(past, length)[None],
        **cache,
    }
    found = dict(
        zip(told["outputs"], run(*(given[i["name"]] for i in told["inputs"])), strict=True)
    )
    cache = {s["input"]: found[s["output"]] for s in slots}
    new, past = found["logits"][:, -1:].argmax(-1), length
    tokens.append(int(new))
assert not {"lamella", "transformers", "safetensors"} & set(sys.modules)
print(*tokens)
