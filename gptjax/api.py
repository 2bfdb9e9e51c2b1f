"""`load` and `LanguageModel`: from a checkpoint to text."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Unpack, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

import convert
from gptjax import checkpoint, hub, runtime
from gptjax.config import GenerationDefaults, ModelConfig, read_config, read_generation_defaults
from gptjax.engine import steps
from gptjax.engine.engine import Engine, prefill, settings_of
from gptjax.engine.generate import generate
from gptjax.engine.options import GenerateOptions, Prompt, SamplingOptions, make_request, sampling_params, split_prompts
from gptjax.engine.output import Chunk, Completion
from gptjax.engine.request import Request, check_prompt
from gptjax.errors import CheckpointError, GptjaxError, RequestError
from gptjax.models import registry
from gptjax.models.registry import Model, Params
from gptjax.progress import progress
from gptjax.text import Tokenizer, load_tokenizer
from pallas_kernels.dispatch import IMPLEMENTATIONS

DEFAULT_MODEL = "gpt2-tales"
_MOST_ROWS = 32  # rows of one call where `max_batch` is not given


def load(
    name: str | os.PathLike[str] = DEFAULT_MODEL,
    *,
    dtype: DTypeLike | None = None,
    max_length: int | None = None,
    max_batch: int | None = None,
    implementation: str = "auto",
    tokenizer: str | os.PathLike[str] | None = None,
) -> "LanguageModel":
    """Loads a model onto the default device.

    Args:
      name: a demo ("gpt2-tales"), a directory (a Hugging Face checkpoint as it is, or one that `gptjax convert` wrote),
        or a Hub id, looked up in the local Hub cache first.
      dtype: what to hold the weights and compute in: "float32", "bfloat16" or "float16". Left out: float32 on a CPU,
        else bfloat16.
      max_length: the most positions of a sequence, prompt and output together. Left out: $GPTJAX_MAX_LENGTH, else all
        that the model has.
      max_batch: rows of the one compiled decode step. At a given `max_batch` a prompt's results are the same to the
        bit alone or beside others. Left out: each call takes as many rows as it has prompts, rounded up to a power of
        two, 32 at most.
      implementation: which kernels to use; "auto" takes the best there is, a named one runs or raises.
      tokenizer: a directory to take the tokenizer from, if not the checkpoint's own.

    Raises:
      CheckpointError, ConfigError: there is no such checkpoint, or it is damaged or unsupported.
      CapacityError: `max_length` is more than the model has positions.
    """
    runtime.enable_compilation_cache()
    directory = hub.resolve(name)
    config = read_config(directory)
    length = registry.positions(config, max_length)
    if max_batch is not None and (isinstance(max_batch, bool) or not isinstance(max_batch, int) or max_batch < 1):
        raise RequestError(f"max_batch must be a whole number of at least 1, found {max_batch!r}")
    if implementation not in IMPLEMENTATIONS:
        raise RequestError(f"there is no implementation {implementation!r}; choose one of {', '.join(IMPLEMENTATIONS)}")
    model = registry.build(config, dtype=runtime.compute_dtype(dtype), implementation=implementation)
    text: Tokenizer | GptjaxError
    try:
        text = load_tokenizer(directory if tokenizer is None else tokenizer)
    except GptjaxError as error:
        # None at all, or one of an unsupported kind: the model still works on token ids. A damaged one is a fault.
        if tokenizer is not None or (isinstance(error, CheckpointError) and _has_tokenizer(directory)):
            raise
        text = error
    return LanguageModel(
        model,
        load_params(directory, model),
        tokenizer=text,
        defaults=read_generation_defaults(directory),
        max_length=length,
        max_batch=max_batch,
    )


def load_params(directory: Path, model: Model) -> Params:
    """The weights of a checkpoint directory, on the default device, in the model's dtype, each leaf checked."""
    targets = registry.abstract_params(model)
    if checkpoint.is_converted(directory):
        return checkpoint.restore(directory, targets, progress=progress)
    return checkpoint.place(convert.stream_params(directory, model.config), targets, progress=progress)


class LanguageModel:
    """A model with its weights and tokenizer. Made by `load`.

    `model`, `params`, `config` and `tokenizer` are what everything here is built on, for those who compose.
    """

    def __init__(
        self,
        model: Model,
        params: Params,
        *,
        tokenizer: Tokenizer | GptjaxError,
        defaults: GenerationDefaults,
        max_length: int,
        max_batch: int | None = None,
    ):
        """`tokenizer` may be the error that says why there is none; calls that need text raise it."""
        self.model = model
        self.params = params
        self.defaults = defaults
        self.max_length = max_length
        self.max_batch = max_batch
        self._tokenizer = tokenizer

    @property
    def config(self) -> ModelConfig:
        """The architecture."""
        return self.model.config

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer. Raises what says why there is none: files are missing, or of an unsupported kind."""
        if isinstance(self._tokenizer, GptjaxError):
            raise self._tokenizer
        return self._tokenizer

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """The token ids that end a text."""
        if self.defaults.eos_ids or isinstance(self._tokenizer, GptjaxError):
            return self.defaults.eos_ids
        return self._tokenizer.eos_ids

    @overload
    def generate(self, prompt: str | Sequence[int], **options: Unpack[GenerateOptions]) -> Completion: ...
    @overload
    def generate(
        self, prompt: list[str] | Sequence[Sequence[int]], **options: Unpack[GenerateOptions]
    ) -> list[Completion]: ...
    def generate(
        self, prompt: Prompt | Sequence[Prompt], **options: Unpack[GenerateOptions]
    ) -> Completion | list[Completion]:
        """Continues a prompt, or each of a list of prompts, which are then computed together.

        Args:
          prompt: text, or a list of token ids, or a list of either. Special tokens written in text are plain text.
          **options: `max_tokens` (256), `temperature`, `top_k`, `top_p`, `min_p`, `repetition_penalty`,
            `presence_penalty`, `frequency_penalty`, `logit_bias`, `seed`, `top_logprobs`, `stop`, `stop_ids`,
            `ignore_eos`: see `GenerateOptions`. Left out, sampling follows the checkpoint's generation_config.json,
            and is greedy where that says nothing.

        Returns:
          A `Completion`, or a list of them in the order of the prompts. A row whose logits are not finite ends with
          `finish_reason` "error" and says so in `error`; the others go on.

        Raises:
          RequestError: options or token ids out of range, an empty prompt or list.
          CapacityError: a prompt longer than `max_length`.
          CheckpointError, ConfigError: text was given, but the checkpoint has no tokenizer, or an unsupported one.
        """
        prompts, single = split_prompts(prompt)
        requests = [self._request(each, options) for each in prompts]
        done: dict[int, Completion] = {}
        for number, chunk in self._run(requests):
            if chunk.completion is not None:
                done[number] = chunk.completion
        completions = [done[number] for number in range(len(requests))]
        return completions[0] if single else completions

    def stream(self, prompt: Prompt, **options: Unpack[GenerateOptions]) -> Iterator[Chunk]:
        """`generate` for one prompt, a chunk for each token as it is drawn; the last has the `completion`.

        Arguments are checked when the call is made, not when the first chunk is asked for.
        """
        prompts, single = split_prompts(prompt)
        if not single:
            raise RequestError("stream takes one prompt; use generate for a list")
        request = self._request(prompts[0], options)
        return (chunk for _, chunk in self._run([request]))

    def logits(self, token_ids: Sequence[int]) -> np.ndarray:
        """Teacher-forced logits: what follows each of the given tokens, [T, V] float32 on the host."""
        ids = self._checked_ids(token_ids, self.max_length)
        cache = registry.create_cache(self.model, batch=1, max_length=self.max_length)
        logits_TV = np.empty((len(ids), self.config.vocab_size), np.float32)
        for start, tokens, count in steps.padded_chunks(np.asarray(ids, np.int32)):
            chunk_TV, cache = steps.score_chunk(
                self.model, self.params, cache, tokens, np.int32(start), np.int32(count)
            )
            logits_TV[start : start + count] = np.asarray(chunk_TV)[:count]
        return logits_TV

    def init_state(self, *, batch: int = 1, max_length: int | None = None) -> steps.State:
        """An empty state for those who drive the loop themselves: a pytree with the cache and the last logits.

        Raises:
          CapacityError: `max_length` is more than the model has positions.
        """
        length = self.max_length if max_length is None else registry.positions(self.config, max_length)
        return steps.init_state(self.model, batch=batch, max_length=length)

    def prefill(
        self, state: steps.State, token_ids: Sequence[int] | Sequence[Sequence[int]]
    ) -> tuple[jax.Array, steps.State]:
        """Fills every row of a state from its start: one list of ids, or as many as the state has rows.

        Returns:
          logits_BV float32 of what follows each row, and the new state; the old one is donated and must not be used.
        """
        prompts, _ = split_prompts(token_ids)
        if len(prompts) != state.batch:
            raise RequestError(f"the state has {state.batch} rows, but {len(prompts)} lists of token ids were given")
        for slot, prompt in enumerate(prompts):
            ids = self._checked_ids(prompt, state.max_length)
            state = prefill(self.model, self.params, state, slot, np.asarray(ids, np.int32))
        # A copy: the state is donated by the next step, and its logits with it.
        return jnp.copy(state.logits_BV), state

    def decode(self, state: steps.State, **options: Unpack[SamplingOptions]) -> tuple[jax.Array, steps.State]:
        """Draws a token for every row from the state's logits and adds it to the row. Works under `jax.jit` as well.

        Returns:
          token_B int32, not waited for, and the new state; the old one is donated. A token is -1 where the logits
          were not finite, which those of a row beyond its `max_length` are.
        """
        params = sampling_params(options, self.defaults)
        params.check(self.config.vocab_size)
        row = Request(prompt_ids=(), max_tokens=1, params=params).with_seed()
        sampled = steps.sample(state, settings_of([row] * state.batch, self.config.vocab_size))
        active_B = np.ones((state.batch,), np.bool_)
        return sampled.token_B, steps.advance(self.model, self.params, state, sampled.token_B, active_B)

    def close(self) -> None:
        """Frees the weights on the device. The model cannot be used afterwards."""
        for leaf in jax.tree.leaves(self.params):
            leaf.delete()
        self.params = {}

    def __enter__(self) -> "LanguageModel":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _request(self, prompt: Prompt, options: GenerateOptions) -> Request:
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else _as_ints(prompt)
        request = make_request(ids, options, self.defaults, self.eos_ids)
        request.check(vocab_size=self.config.vocab_size, max_length=self.max_length)
        if request.stop:
            _ = self.tokenizer  # stop strings are text: say so now if there can be none
        return request

    def _checked_ids(self, token_ids: object, max_length: int) -> list[int]:
        ids = _as_ints(token_ids)
        check_prompt(ids, vocab_size=self.config.vocab_size, max_length=max_length)
        return ids

    def _run(self, requests: list[Request]) -> Iterator[tuple[int, Chunk]]:
        batch = self.max_batch or min(1 << (len(requests) - 1).bit_length(), _MOST_ROWS)
        engine = Engine(self.model, self.params, batch=batch, max_length=self.max_length)
        detokenizer = None if isinstance(self._tokenizer, GptjaxError) else self._tokenizer.stream
        chunks = generate(engine, requests, detokenizer)
        with progress("Compiling and reading the prompt", None):
            first = next(chunks)
        yield first
        yield from chunks


def _has_tokenizer(directory: Path) -> bool:
    """Whether there are files of a tokenizer: if they cannot be read, that is a fault and not a lack."""
    return any((directory / name).exists() for name in ("tokenizer.json", "vocab.json", "merges.txt"))


def _as_ints(token_ids: object) -> list[int]:
    if isinstance(token_ids, np.ndarray | jax.Array):
        token_ids = np.asarray(token_ids).tolist()
    if isinstance(token_ids, str) or not isinstance(token_ids, Sequence):
        raise RequestError(f"expected a list of token ids, found {type(token_ids).__name__}")
    # Anything else than an integer stays what it is, for the check of each id to name it.
    return [int(token) if isinstance(token, np.integer) else token for token in token_ids]
