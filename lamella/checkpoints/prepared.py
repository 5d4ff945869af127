"""A checkpoint that is ready to be written: everything that can be wrong has been looked at."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lamella.ir.graph import Graph

_TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "merges.txt",
    "sentencepiece.bpe.model",
    "source.spm",
    "target.spm",
    "spiece.model",
    "vocab.txt",
    "vocab.json",
    "preprocessor_config.json",
    "processor_config.json",
)
_GENERATION = "generation_config.json"


@dataclass(frozen=True)
class Prepared:
    """What a format will write.

    Attributes:
        write: Writes the files into an empty folder.
        needed_bytes: About how many bytes that will be.
        types: How many weights are stored as what.
        remarks: What is stored otherwise than the graph has it.
    """

    write: Callable[[Path], object]
    needed_bytes: int
    types: Mapping[str, int]
    remarks: tuple[str, ...] = ()


def companions(graph: Graph, tokenizer: Any | None) -> tuple[Path, ...]:
    """Files of the folder that the model came from which go along as they are.

    Args:
        graph: Knows its folder.
        tokenizer: Writes its own files; those of the folder stay behind then.
    """
    if graph.origin.folder is None:
        return ()
    names = (_GENERATION,) if tokenizer is not None else (_GENERATION, *_TOKENIZER)
    paths = [Path(graph.origin.folder) / name for name in names]
    return tuple(path for path in paths if path.is_file())


def write_companions(folder: Path, files: Iterable[Path], tokenizer: Any | None) -> None:
    """Copy `files`, and let `tokenizer` write its own."""
    for path in files:
        # The cache of the hub keeps its files behind links: what they show is copied.
        shutil.copyfile(path, folder / path.name)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
