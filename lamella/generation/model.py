"""A compiled language model: callable like the model, and with its `generate`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, GenerationConfig, GenerationMixin, PreTrainedConfig
from transformers.modeling_outputs import CausalLMOutputWithPast, Seq2SeqLMOutput
from transformers.utils.generic import ModelOutput

from lamella.backends.base import Executable
from lamella.backends.decoder import Decoder
from lamella.backends.inputs import InputSpec, check_inputs
from lamella.errors import GenerationError, SamplesError
from lamella.generation.cache import StateCache
from lamella.ir.cache import CacheLayout, Source
from lamella.ir.signature import Signature
from lamella.report import Report

STEP, ONCE, TOKENIZER = "step", "once", "tokenizer"
"""The folders of a saved model."""


@dataclass(frozen=True)
class Language:
    """What `generate` needs to know of a model.

    Attributes:
        config: The config of the model, as data.
        generation: Its generation config, as data.
        architecture: Its class in transformers.
    """

    config: Mapping[str, Any]
    generation: Mapping[str, Any]
    architecture: str


@dataclass(frozen=True)
class Parts:
    """The executables that a language model consists of.

    Attributes:
        step: Continues from the cache.
        once: What runs once for a sequence (an encoder), or None.
        layout: The cache of `step`.
        outputs: Where each flat output of the model comes from.
    """

    step: Executable
    once: Executable | None
    layout: CacheLayout
    outputs: tuple[Source, ...]


@dataclass
class EncoderStates(ModelOutput):
    """What the encoder of a compiled model gives to its decoder, by name."""

    last_hidden_state: Tensor | None = None


class _Encoder:
    """The encoder, as `generate` looks at it and calls it."""

    def __init__(self, executable: Executable) -> None:
        self._executable = executable
        self._names = executable.signature.inputs
        self.main_input_name = self._names[0]

    @property
    def forward(self) -> Callable[..., EncoderStates]:
        """The call, with the names of the inputs in its signature."""

        def forward(**kwargs: Any) -> EncoderStates:
            return self(**kwargs)

        names = [*self._names, *(["attention_mask"] if "input_ids" in self._names else [])]
        keywords = inspect.Parameter.KEYWORD_ONLY
        parameters = [inspect.Parameter(name, keywords) for name in dict.fromkeys(names)]
        rest = inspect.Parameter("kwargs", inspect.Parameter.VAR_KEYWORD)
        vars(forward)["__signature__"] = inspect.Signature([*parameters, rest])
        return forward

    def __call__(self, **kwargs: Any) -> EncoderStates:
        """The states; what the encoder doesn't take is left out."""
        for name in self._names:
            if kwargs.get(name) is None:
                if name != "attention_mask":
                    raise GenerationError(f"the encoder needs the input {name!r}")
                kwargs[name] = torch.ones_like(kwargs["input_ids"])
        states = EncoderStates()
        for name, value in self._executable(**{n: kwargs[n] for n in self._names}).items():
            states[name] = value
        return states


class GenerativeExecutable(GenerationMixin, Executable):
    """A language model that was lowered, with the `generate` of transformers.

    Everything that `transformers.GenerationMixin` does works: greedy search, sampling, beams,
    stop strings, streamers, logits processors, batches padded on the left, conversations that
    go on. The cache stays with the backend.

    Attributes:
        config: Config of the model.
        generation_config: How `generate` works when it is not told otherwise.
        layout: What the model keeps between calls.
        tokenizer: The tokenizer of the model, saved and loaded with it; None without one.
    """

    main_input_name = "input_ids"
    base_model_prefix = ""
    # Transformers looks for modules of these names.
    decoder = None  # pyright: ignore[reportAssignmentType, reportIncompatibleMethodOverride]
    _is_stateful = False

    def __init__(
        self,
        parts: Parts,
        language: Language,
        signature: Signature,
        inputs: Sequence[InputSpec],
        report: Report | None = None,
    ) -> None:
        """Put the parts together; `inputs` are those of the model without cache."""
        super().__init__(signature, report, inputs)
        self.backend = parts.step.backend  # pyright: ignore[reportAttributeAccessIssue]  (of the parts)
        self.parts, self.language, self.layout = parts, language, parts.layout
        self.config = config_of(language.config)
        self.generation_config = GenerationConfig.from_dict(dict(language.generation))
        self._decoder: Decoder = parts.step.decoder(parts.layout)
        self.tokenizer: Any = None
        self.device, self.dtype = torch.device("cpu"), torch.float32
        if parts.once is not None:
            self.main_input_name = parts.once.signature.inputs[0]

    # ---- as the model -------------------------------------------------------------------

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run as the model is called, or one step of `generate`.

        The result has the model's output type; with ``use_cache=True`` or `past_key_values` it
        holds the cache too.

        Raises:
            SamplesError: An input is missing, unknown, or of another dtype or shape.
            GenerationError: Sizes of tokens, mask and cache don't agree.
        """
        if kwargs.get("use_cache") or kwargs.get("past_key_values") is not None:
            return self.forward(*args, **kwargs)
        if "return_dict" in kwargs or "logits_to_keep" in kwargs:
            return self.forward(*args, **kwargs)
        return super().__call__(*args, **kwargs)

    def run(self, values: Sequence[Any]) -> Sequence[Any]:
        """The flat outputs of flat inputs, from an empty cache."""
        check_inputs(self.inputs, values)
        given = dict(zip(self.signature.inputs, values, strict=True))
        made: dict[str, Tensor] = {}
        if self.parts.once is not None:
            made = self.parts.once(**{n: given[n] for n in self.parts.once.signature.inputs})
        tokens = given[self.layout.tokens]
        once = {name: made[name] for name in self.layout.once}
        state = self._decoder.start(tokens.shape[0], tokens.shape[1], once)
        mask = given.get(self.layout.mask)
        positions = given.get(self.layout.positions or "")
        logits = self._decoder.step(state, tokens, mask, positions)
        made_values = list(made.values())
        return [
            logits
            if source.graph == STEP
            else made_values[source.index]
            if source.graph == ONCE
            else source.value
            for source in self.parts.outputs
        ]

    def forward(  # noqa: PLR0913  (generate looks for these names)
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        encoder_outputs: EncoderStates | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        decoder_position_ids: Tensor | None = None,
        **other: Any,
    ) -> Any:
        """One step of `generate`: logits ``[batch, new, vocabulary]`` and the cache.

        Raises:
            GenerationError: The cache is of another kind, or sizes don't agree.
            SamplesError: The model has no such input.
        """
        _refuse(other)
        if past_key_values is not None and not isinstance(past_key_values, StateCache):
            raise GenerationError(
                f"a compiled model continues from its own cache, not from a "
                f"{type(past_key_values).__name__}; leave past_key_values out"
            )
        cache = StateCache() if past_key_values is None else past_key_values
        if self.parts.once is not None:
            step = (decoder_input_ids, decoder_attention_mask, decoder_position_ids)
            states = encoder_outputs or self._encoded(input_ids, attention_mask, other)
        else:
            step, states = (input_ids, attention_mask, position_ids), EncoderStates()
        logits = self._step(cache, states, step, last_only=logits_to_keep == 1)
        kept = cache if use_cache or past_key_values is not None else None
        if self.parts.once is not None:
            return Seq2SeqLMOutput(logits=logits, past_key_values=kept)  # pyright: ignore[reportArgumentType]
        return CausalLMOutputWithPast(logits=logits, past_key_values=kept)  # pyright: ignore[reportArgumentType]

    def _step(
        self,
        cache: StateCache,
        states: EncoderStates,
        step: tuple[Tensor | None, Tensor | None, Tensor | None],
        last_only: bool,
    ) -> Tensor:
        tokens, mask, positions = step
        if tokens is None:
            raise GenerationError(f"the model needs the input {self.layout.tokens!r}")
        if cache.state is None:
            once = {name: states[name] for name in self.layout.once}
            cache.state = self._decoder.start(tokens.shape[0], self._room(cache.capacity), once)
        return self._decoder.step(cache.state, tokens, mask, positions, last_only=last_only)

    def _room(self, capacity: int) -> int:
        """Tokens to make room for: a text may end before the positions of the model do."""
        limit = self.layout.positions_limit
        return capacity if limit is None else min(capacity, limit)

    def _encoded(
        self, input_ids: Tensor | None, mask: Tensor | None, other: Mapping[str, Any]
    ) -> EncoderStates:
        return self.get_encoder()(input_ids=input_ids, attention_mask=mask, **other)

    # ---- what generate asks -------------------------------------------------------------

    def can_generate(self) -> bool:
        """True."""
        return True

    def is_remote_code(self) -> bool:
        """False: the code is that of Lamella."""
        return False

    @property
    def encoder(self) -> _Encoder | None:
        """What runs once for a sequence, or None."""
        return None if self.parts.once is None else _Encoder(self.parts.once)

    def get_encoder(self, *_: Any, **__: Any) -> _Encoder:
        """What runs once for a sequence.

        Raises:
            GenerationError: The model has no encoder.
        """
        if self.encoder is None:
            raise GenerationError("the model has no encoder")
        return self.encoder

    def get_experts_implementation(self) -> dict[str, str]:
        """Nothing to choose: experts are compiled."""
        return {}

    def eval(self) -> GenerativeExecutable:
        """Itself: a compiled model is always in inference mode."""
        return self

    def to(self, *_: Any, **__: Any) -> GenerativeExecutable:
        """Itself: a compiled model stays on the device it was compiled for."""
        return self

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Text from a prompt; arguments and results are those of transformers.

        Raises:
            GenerationError: The mask is not that of the tokens, there are more tokens than the
                model has positions for, or something is asked for that it has no answer to.
        """
        ids = kwargs.get("input_ids", args[0] if args else kwargs.get("inputs"))
        _check_mask(ids, kwargs.get("attention_mask"), kwargs.get("past_key_values"))
        return super().generate(*args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]  (the mixins are models)

    def _prepare_cache_for_generation(
        self,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> Any:
        given = model_kwargs.get("past_key_values")
        if given is None and generation_config.use_cache is not False:
            model_kwargs["past_key_values"] = StateCache(max_cache_length)
        elif given is not None:
            given._is_user_defined = True

    # ---- files --------------------------------------------------------------------------

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights as they are stored."""
        return sum(part.weight_bytes for part in self._executables().values())

    @property
    def file_bytes(self) -> int:
        """Bytes of the files that `save` writes, without the manifest."""
        return sum(part.file_bytes for part in self._executables().values())

    def write_files(self, folder: Path) -> Mapping[str, Any]:
        """Write each part, and the tokenizer, into a folder of its own."""
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(folder / TOKENIZER)
        details: dict[str, Any] = {}
        for name, part in self._executables().items():
            (folder / name).mkdir()
            details[name] = {
                "details": dict(part.write_files(folder / name)),
                "signature": part.signature.to_json(),
                "inputs": [spec.to_json() for spec in part.inputs],
            }
        return {
            "generation": {
                "parts": details,
                "layout": self.layout.to_json(),
                "outputs": [[s.graph, s.index, s.value] for s in self.parts.outputs],
                "config": dict(self.language.config),
                "generation_config": dict(self.language.generation),
                "architecture": self.language.architecture,
            }
        }

    def _executables(self) -> dict[str, Executable]:
        parts = {STEP: self.parts.step}
        return parts if self.parts.once is None else parts | {ONCE: self.parts.once}


def config_of(data: Mapping[str, Any]) -> PreTrainedConfig:
    """The config of a model from its data.

    Raises:
        GenerationError: Transformers doesn't know the kind of model.
    """
    kind = str(data.get("model_type"))
    if kind not in CONFIG_MAPPING:
        raise GenerationError(f"transformers has no config for the model type {kind!r}")
    return CONFIG_MAPPING[kind].from_dict(dict(data))


def _check_mask(ids: Any, mask: Any, cache: Any) -> None:
    """Refuse a mask that is not that of the tokens; transformers would cut it, or guess.

    Raises:
        GenerationError: Its shape is another one.
    """
    tokens = isinstance(ids, Tensor) and ids.ndim == 2 and not ids.is_floating_point()
    if not tokens or not isinstance(mask, Tensor) or mask.ndim != 2:
        return
    past = cache.get_seq_length() if isinstance(cache, StateCache) else 0
    batch, length = ids.shape
    if tuple(mask.shape) not in ((batch, length), (batch, past + length)):
        raise GenerationError(
            f"the mask has shape {list(mask.shape)}, expected {[batch, length]}: an entry for each "
            f"token of the prompt; give the attention_mask that came with the tokens"
        )


def _refuse(other: Mapping[str, Any]) -> None:
    """Refuse what a compiled model has no answer for; what is off by default may be given."""
    harmless = {"return_dict", "use_cache", "cache_position"}
    asked = [name for name, value in other.items() if value and name not in harmless]
    outputs = [name for name in asked if name.startswith("output_")]
    if outputs:
        raise GenerationError(
            f"a compiled model gives logits only; {', '.join(outputs)} need the original model"
        )
    embeds = [name for name in asked if name.endswith("inputs_embeds")]
    if embeds:
        raise SamplesError(f"a compiled model takes tokens, not {', '.join(embeds)}")
