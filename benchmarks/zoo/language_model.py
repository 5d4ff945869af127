"""A 12-block Llama of about 10 million parameters, trained on Python sources."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.zoo.cache import cached
from benchmarks.zoo.corpus import Corpus, Split

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Training:
    """How the language model is trained; every field is part of the key of the cache."""

    vocabulary: int = 4096
    width: int = 256
    feedforward: int = 768
    blocks: int = 12
    heads: int = 8
    kv_heads: int = 4
    sequence: int = 256
    batch: int = 8
    steps: int = 1600
    matrix_learning_rate: float = 0.02
    learning_rate: float = 3e-3
    warmup: int = 40
    weight_decay: float = 0.05
    threads: int = 2
    seed: int = 0


def language_model(training: Training | None = None) -> Path:
    """The folder of the trained model with its tokenizer, as Hugging Face writes it."""
    training = training or Training()
    corpus = Corpus()
    key = {**asdict(training), "corpus": corpus.digest(), "torch": torch.__version__.split("+")[0]}
    return cached("python-llama", key, lambda folder: _train(folder, training, corpus))


def tokenizer_of(corpus: Corpus, vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on the training split."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus.texts("train"), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def windows(
    tokenizer: PreTrainedTokenizerFast, split: Split, length: int, count: int | None = None
) -> Tensor:
    """Rows of `length` tokens of a split, without overlap, each file started with ``<s>``.

    Returns:
        int64, ``[rows, length]``; at most `count` rows.
    """
    stream: list[int] = []
    for text in Corpus().texts(split):
        stream += [tokenizer.bos_token_id, *tokenizer(text, verbose=False)["input_ids"]]
        if count is not None and len(stream) >= count * length:
            break
    rows = len(stream) // length
    return torch.tensor(stream[: rows * length]).reshape(rows, length)[:count]


def perplexity(model: object, rows: Tensor, batch: int = 8) -> float:
    """Perplexity per token over rows of tokens, of anything that returns ``.logits``."""
    total, count = 0.0, 0
    for chunk in rows.split(batch):
        logits = model(input_ids=chunk, attention_mask=torch.ones_like(chunk)).logits  # type: ignore[operator]
        loss = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1).float(), chunk[:, 1:].flatten(), reduction="sum"
        )
        total, count = total + float(loss), count + chunk[:, 1:].numel()
    return math.exp(total / count)


def _train(folder: Path, training: Training, corpus: Corpus) -> None:
    started = time.monotonic()
    torch.set_num_threads(training.threads)
    tokenizer = tokenizer_of(corpus, training.vocabulary)
    tokenizer.save_pretrained(folder)
    rows = windows(tokenizer, "train", training.sequence)
    logger.info("%d training rows of %d tokens", len(rows), training.sequence)
    with torch.random.fork_rng():
        torch.manual_seed(training.seed)
        model = LlamaForCausalLM(_config(training))
        history = _optimize(model, rows, training)
    model.eval()
    with torch.no_grad():
        reached = perplexity(model, windows(tokenizer, "test", training.sequence, 64))
    model.save_pretrained(folder)
    record = {
        "seconds": round(time.monotonic() - started, 1),
        "parameters": sum(p.numel() for p in model.parameters()),
        "test_perplexity": reached,
        "history": history,
        "transformers": transformers.__version__,
    }
    (folder / "training.json").write_text(json.dumps(record, indent=1))
    logger.info("perplexity %.3f after %.0f s", reached, record["seconds"])


def _config(training: Training) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=training.vocabulary,
        hidden_size=training.width,
        intermediate_size=training.feedforward,
        num_hidden_layers=training.blocks,
        num_attention_heads=training.heads,
        num_key_value_heads=training.kv_heads,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )


def _optimize(model: LlamaForCausalLM, rows: Tensor, training: Training) -> list[float]:
    """Muon for the matrices of the blocks, AdamW for the rest, in bfloat16.

    At this size Muon is at the loss after 100 steps that AdamW reaches after about 400.
    """
    optimizers = _optimizers(model, training)
    rates = [[float(group["lr"]) for group in one.param_groups] for one in optimizers]
    model.train()
    history: list[float] = []
    for step, batch in enumerate(_batches(rows, training)):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, initial in zip(optimizers, rates, strict=True):
            for group, rate in zip(optimizer.param_groups, initial, strict=True):
                group["lr"] = rate * _schedule(step, training)
            optimizer.step()
            optimizer.zero_grad()
        if step % 50 == 0 or step == training.steps - 1:
            history.append(round(float(loss.detach()), 4))
            logger.info("step %d of %d, loss %.4f", step, training.steps, history[-1])
    return history


def _optimizers(model: LlamaForCausalLM, training: Training) -> list[torch.optim.Optimizer]:
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    inside = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in inside]
    return [
        torch.optim.Muon(
            matrices,
            lr=training.matrix_learning_rate,
            weight_decay=training.weight_decay,
            momentum=0.95,
        ),
        torch.optim.AdamW(rest, lr=training.learning_rate, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def _schedule(step: int, training: Training) -> float:
    if step < training.warmup:
        return (step + 1) / training.warmup
    share = (step - training.warmup) / max(1, training.steps - training.warmup)
    return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * share))


def _batches(rows: Tensor, training: Training) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(training.seed)
    done = 0
    while True:
        for order in torch.randperm(len(rows), generator=generator).split(training.batch):
            if done == training.steps:
                return
            if len(order) == training.batch:
                yield rows[order]
                done += 1
