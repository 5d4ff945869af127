"""A folder of Hugging Face whose weights of few bits keep their codes: `compressed-tensors`.

The packing of the format (``pack-quantized``) is that of Lamella with bytes read as 32-bit words:
codes with the offset ``2**(bits-1)``, low bits first, in the width of their grid (3, 5 and 6 bits
are a dense stream). Codes, scales and zero points go out as they are, so that a reader computes
exactly the weights of the graph.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lamella.checkpoints.huggingface import write_config
from lamella.checkpoints.names import Stored, stored
from lamella.checkpoints.packed import Packed
from lamella.checkpoints.prepared import Prepared, companions, write_companions
from lamella.checkpoints.reference import reference_of
from lamella.checkpoints.report import listed
from lamella.checkpoints.safetensors_writer import write_shards
from lamella.checkpoints.weights import Weight, weights_for
from lamella.errors import CheckpointError
from lamella.ir.graph import Graph
from lamella.ir.packing import pack_dense

Scheme = tuple[int, int, bool]
"""Bits, block and whether it is symmetric."""

_FORMAT = "pack-quantized"
_MERGED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("query", "key", "value"))
"""Layers of one parent that runtimes merge into one matrix product."""


def compressed_tensors(graph: Graph, tokenizer: Any | None, max_shard_bytes: int) -> Prepared:
    """The folder of an edited graph with its weights of few bits as they are.

    Tables of embeddings, and weights whose rows are no whole number of blocks, become floating
    point: the format has no place for them.

    Raises:
        CheckpointError: No config and weights say what `graph` computes, or it holds no weights
            of few bits that the format can store.
    """
    reference = reference_of(graph)
    found = weights_for(graph, reference)
    plan = _Plan.of(reference.model, found.weights)
    if not plan.packed:
        raise CheckpointError(
            "the graph has no linear layers of few bits for compressed-tensors; run "
            "quantize-weights first, or write format='huggingface'"
        )
    reference.config.quantization_config = plan.config(reference.model)
    tensors = list(plan.tensors(reference.model, found.weights))
    files = companions(graph, tokenizer)

    def write(folder: Path) -> None:
        write_config(folder, reference.config)
        write_shards(folder, tensors, max_shard_bytes)
        write_companions(folder, files, tokenizer)

    needed = sum(one.nbytes for one in tensors) + sum(path.stat().st_size for path in files)
    remarks = (
        *found.remarks,
        *plan.remarks(reference.model),
        *_merged_weights(reference.model, found.weights),
    )
    return Prepared(write, needed, plan.types(found.weights), remarks)


@dataclass(frozen=True)
class _Plan:
    """Which weights keep their codes, and why others don't.

    Attributes:
        packed: Name of a linear layer -> its weight.
        unpacked: Name of a weight of few bits that becomes floating point -> why.
    """

    packed: dict[str, Packed]
    unpacked: dict[str, str]

    @classmethod
    def of(cls, model: PreTrainedModel, weights: Iterable[Weight]) -> _Plan:
        modules = dict(model.named_modules())
        few_bits = {one.name: one.packed for one in weights if one.packed is not None}
        reasons = {
            name: _obstacle(modules.get(name.removesuffix(".weight")), name, packed, model)
            for name, packed in few_bits.items()
        }
        kept = {n.removesuffix(".weight"): p for n, p in few_bits.items() if not reasons[n]}
        return cls(kept, {name: why for name, why in reasons.items() if why})

    def config(self, model: PreTrainedModel) -> dict[str, Any]:
        """The ``quantization_config``: a group for each scheme, with the layers by name."""
        groups: dict[Scheme, list[str]] = {}
        for layer, packed in self.packed.items():
            groups.setdefault(_scheme(packed), []).append(layer)
        linear = [name for name, one in model.named_modules() if isinstance(one, nn.Linear)]
        return {
            "quant_method": "compressed-tensors",
            "format": _FORMAT,
            "quantization_status": "compressed",
            "config_groups": {
                f"group_{place}": _group(scheme, layers)
                for place, (scheme, layers) in enumerate(sorted(groups.items()))
            },
            "ignore": [name for name in linear if name not in self.packed],
        }

    def tensors(self, model: PreTrainedModel, weights: Iterable[Weight]) -> Iterator[Stored]:
        """What the files hold."""
        for weight in weights:
            packed = self.packed.get(weight.name.removesuffix(".weight"))
            plain = list(stored(model, [weight]))
            if packed is not None:
                yield from _parts(plain[0].name.removesuffix(".weight"), packed, weight.dtype)
            elif len(plain) > 1:
                # The reader in transformers merges experts of few bits only; whole they just load.
                yield Stored(weight.name, weight.shape, weight.dtype, weight.read)
            else:
                yield from plain

    def types(self, weights: Iterable[Weight]) -> dict[str, int]:
        """How many weights are stored as what."""
        names = Counter(_text(_scheme(packed)) for packed in self.packed.values())
        layers = {f"{layer}.weight" for layer in self.packed}
        names.update(
            str(one.dtype).removeprefix("torch.") for one in weights if one.name not in layers
        )
        return dict(names)

    def remarks(self, model: PreTrainedModel) -> Iterator[str]:
        """What is not as the graph has it, and what a runtime may not like."""
        if self.unpacked:
            names = [f"{name} ({why})" for name, why in self.unpacked.items()]
            yield f"{len(names)} weights of few bits are written as floats: {listed(names)}"
        few = sum(packed.bits == 2 for packed in self.packed.values())
        if few:
            yield f"{few} weights have 2 bits, for which most runtimes have no fast kernel"
        if any(packed.bits != packed.held_bits for packed in self.packed.values()):
            yield (
                "weights of 3, 5 or 6 bits are one stream of bits, as compressed-tensors reads "
                "them since 0.20; older readers expect whole codes in each word"
            )
        if any(not packed.is_symmetric for packed in self.packed.values()):
            yield (
                "weights with zero points: transformers reads them with compressed-tensors up to "
                "0.20 only when it is told to dequantize, and only if all have one scheme; "
                "quantize with symmetric=true"
            )
        uneven = [names for names in self._merged(model) if len({self._of(n) for n in names}) > 1]
        if uneven:
            groups = [" with ".join(names) for names in uneven]
            yield (
                f"layers that runtimes merge have different schemes, which those refuse: "
                f"{listed(groups)}; allocate-bits gives them one"
            )

    def _merged(self, model: PreTrainedModel) -> Iterator[list[str]]:
        known = dict(model.named_modules())
        for parent in dict.fromkeys(layer.rpartition(".")[0] for layer in self.packed):
            for names in _MERGED:
                full = [name for name in (f"{parent}.{one}" for one in names) if name in known]
                if any(name in self.packed for name in full):
                    yield full

    def _of(self, layer: str) -> Scheme | None:
        return _scheme(self.packed[layer]) if layer in self.packed else None


def _merged_weights(model: PreTrainedModel, weights: Iterable[Weight]) -> Iterator[str]:
    """Weights that files of the architecture usually hold in parts, and these files don't."""
    names = [weight.name for weight in weights if len(list(stored(model, [weight]))) > 1]
    if names:
        yield (
            f"{listed(names)} are stored as transformers holds them in memory: it can't read "
            f"floating experts one by one beside weights of few bits"
        )


def _obstacle(module: Any, name: str, packed: Packed, model: PreTrainedModel) -> str:
    """Why a weight can't keep its codes, or nothing."""
    if packed.is_embedding:
        return "a table of embeddings"
    if name in set((getattr(model, "all_tied_weights_keys", None) or {}).values()):
        return "tied to an embedding"
    if not isinstance(module, nn.Linear):
        return f"in a {type(module).__name__}"
    if packed.shape[1] % packed.block:
        return f"rows of {packed.shape[1]} are no whole blocks of {packed.block}"
    return ""


def _scheme(packed: Packed) -> Scheme:
    return packed.bits, packed.block, packed.is_symmetric


def _text(scheme: Scheme) -> str:
    bits, block, symmetric = scheme
    return f"{bits} bits/{block}{'' if symmetric else ' with zeros'}"


def _group(scheme: Scheme, layers: list[str]) -> dict[str, Any]:
    bits, block, symmetric = scheme
    weights = {
        "num_bits": bits,
        "type": "int",
        "symmetric": symmetric,
        "strategy": "group",
        "group_size": block,
        "dynamic": False,
    }
    return {
        "targets": layers,
        "weights": weights,
        "input_activations": None,
        "output_activations": None,
        "format": _FORMAT,
    }


def _parts(layer: str, packed: Packed, dtype: torch.dtype) -> Iterator[Stored]:
    """Codes, scales, zero points and shape of one linear layer of a model of type `dtype`."""
    rows, columns = packed.shape
    blocks = columns // packed.block
    words = columns * packed.bits // 32

    def part(
        name: str, shape: tuple[int, ...], dtype: torch.dtype, make: Callable[[], Tensor]
    ) -> Stored:
        return Stored(f"{layer}.weight_{name}", shape, dtype, make)

    yield part(
        "packed",
        (rows, words),
        torch.int32,
        lambda: packed.packed().reshape(rows, -1).contiguous().view(torch.int32),
    )
    # Readers multiply in the type of the scales: in half precision the products would be rounded.
    wide = dtype if dtype.itemsize >= 4 else packed.scales().dtype
    yield part("scale", (rows, blocks), wide, lambda: packed.scales().to(wide))
    if not packed.is_symmetric:
        height = -(-rows * packed.bits // 32)
        yield part("zero_point", (height, blocks), torch.int32, lambda: _zeros(packed, height))
    yield part("shape", (2,), torch.int64, lambda: torch.tensor(packed.shape))


def _zeros(packed: Packed, height: int) -> Tensor:
    """Zero points packed along the rows of the weight, ``[words, blocks]``."""
    zeros = packed.zeros()
    assert zeros is not None
    codes = pack_dense(zeros.t(), packed.bits)
    missing = height * 4 - codes.shape[1]
    padded = nn.functional.pad(codes, (0, missing))
    return padded.contiguous().view(torch.int32).t().contiguous()
