"""`LanguageModel`: prompts in, text out, plus the parts for custom programs."""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, Unpack, overload

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.chat import ChatChunk, ChatCompletion, chat_chunks
from gptjax.config import GenerationDefaults, ModelConfig
from gptjax.engine import limits, memory, steps
from gptjax.engine.flat_params import FlatParams
from gptjax.engine.memory import Memory
from gptjax.engine.options import (
    GenerateOptions,
    Prompt,
    SamplingOptions,
    as_ids,
    make_request,
    sampling_params,
    special_of,
    split_prompts,
    split_seeds,
)
from gptjax.engine.output import Chunk, Completion, Decoder
from gptjax.engine.request import Request, check_prompt
from gptjax.engine.settings import Features, settings_of
from gptjax.engine.shared import SharedEngine, generate
from gptjax.errors import CapacityError, GptjaxError, RequestError
from gptjax.models import registry, shards
from gptjax.models.params import Params
from gptjax.models.registry import Model
from gptjax.models.stages import activations
from gptjax.structured.matching import compiler_of, prepare
from gptjax.structured.wishes import described, grammar_of_turn, read_response_format
from gptjax.support import runtime
from gptjax.support.progress import progress
from gptjax.text import Tokenizer
from gptjax.text.chat_formats import DEFAULT, ChatFormat, ChatOptions, choose_format


class LanguageModel:
    """A model with its weights and tokenizer. Made by `load`.

    `generate`, `stream`, `chat` and `stream_chat` may be called from several threads, and while streams are unfinished.
    They share one engine, which the first call makes. It is kept, with the keys and values of earlier prompts, until
    the model is closed or another call needs the memory.

    `model`, `params`, `config` and `tokenizer` are the parts that everything here is built on.
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
        exact: bool = True,
        chat_format: str | None = None,
        memory_limit: limits.MemoryLimit | None = None,
    ):
        """`tokenizer` may be an error that says why it is missing; calls that need text raise it.

        `chat_format` names the format of conversations; None recognises it by the tokenizer. See `load` for the rest.
        """
        self.model = model
        self._params: Params | None = params
        self.compiler = compiler = compiler_of(tokenizer, model.config.vocab_size)
        self._shared = SharedEngine(
            model, max_length=max_length, max_batch=max_batch, exact=exact, memory_limit=memory_limit, compiler=compiler
        )
        self.defaults = defaults
        self.max_length = max_length
        self.max_batch = max_batch
        self.exact = exact
        self.memory_limit = memory_limit
        self._tokenizer = tokenizer
        self._chat_format = chat_format

    @property
    def params(self) -> Params:
        """The weights: nested dicts of arrays. Raises `RequestError` if the model was closed or the process forked."""
        return self._check_open()

    @property
    def config(self) -> ModelConfig:
        """The architecture."""
        return self.model.config

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer. If it has none, raises the reason: files are missing or of an unsupported kind."""
        if isinstance(self._tokenizer, GptjaxError):
            raise self._tokenizer
        return self._tokenizer

    @cached_property
    def chat_format(self) -> ChatFormat:
        """How its conversations are written. Raises `RequestError` if that is not known, or as `tokenizer` does."""
        return choose_format(self.tokenizer, self._chat_format)

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """The token ids that end a text, without those outside the vocabulary."""
        ids = self.defaults.eos_ids
        if not ids and not isinstance(self._tokenizer, GptjaxError):
            ids = self._tokenizer.eos_ids
        return tuple(token for token in ids if token < self.config.vocab_size)

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
          prompt: text, a list of token ids, or a list of either. Text gets the tokens that the tokenizer adds before
            and after it, if any (`Tokenizer.prompt`); token ids are used unchanged.
          **options: `max_tokens` (256), `temperature`, `top_k`, `top_p`, `min_p`, `repetition_penalty`,
            `presence_penalty`, `frequency_penalty`, `logit_bias`, `seed` (or a list, one for each prompt),
            `top_logprobs`, `stop`, `stop_ids`, `ignore_eos`, `special`, `grammar`: see `GenerateOptions`. Special
            tokens written in text are plain text unless `special` is true. Sampling defaults to the
            checkpoint's generation_config.json, and without one to greedy. `grammar` is a JSON schema (a dict), a
            Lark grammar (text) or a `Grammar`; an output that ends by itself, not at a `stop`, is of that form.

        Returns:
          A `Completion`, or a list of them in the order of the prompts. A row whose logits are not finite ends with
          `finish_reason` "error" and says so in `error`; the others go on.

        Raises:
          RequestError: options or token ids out of range, or an empty prompt or list.
          CapacityError: a prompt longer than `max_length`.
          CheckpointError: text was given, but the checkpoint has no tokenizer.
          ConfigError: text was given, but the tokenizer is unsupported; or the checkpoint's generation_config.json has
            unsupported settings (see `load`).
        """
        prompts, single = split_prompts(prompt)
        seeds = split_seeds(options.get("seed"), len(prompts))
        requests = [self._request(each, {**options, "seed": seed}) for each, seed in zip(prompts, seeds, strict=True)]
        done = {number: chunk.completion for number, chunk in self._run(requests) if chunk.completion is not None}
        completions = [done[number] for number in range(len(requests))]
        return completions[0] if single else completions

    def stream(self, prompt: Prompt, **options: Unpack[GenerateOptions]) -> Iterator[Chunk]:
        """`generate` for one prompt, one chunk per token.

        The last chunk has the `completion`. Arguments are checked by the call itself, not when the first chunk is
        requested.
        """
        prompts, single = split_prompts(prompt)
        if not single:
            raise RequestError("stream takes one prompt; use generate for a list")
        request = self._request(prompts[0], options)
        return (chunk for _, chunk in self._run([request]))

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        reasoning_effort: str | None = None,
        current_date: str | None = DEFAULT,
        enable_thinking: bool | None = None,
        response_format: Mapping[str, Any] | None = None,
        tool_choice: str | Mapping[str, Any] | None = None,
        **options: Unpack[GenerateOptions],
    ) -> ChatCompletion:
        """The assistant's next turn of a conversation, for models that were trained to chat.

        Args:
          messages: as in OpenAI's chat API: `{"role": "user", "content": "Hello"}` and so on; special tokens written in
            them are plain text. Append `ChatCompletion.message` to continue the conversation.
          tools: functions, as in that API, and for GPT-OSS `{"type": "browser"}` or `{"type": "python"}`. They are not
            called here.
          reasoning_effort: "low", "medium" or "high", for GPT-OSS, whose default is "medium".
          current_date: the date given to the model, such as "2025-06-28" or "today"; None leaves it out. Default: what
            the model's template says, which is today's date for GPT-OSS and Llama 3.2, and a fixed one for Llama 3.1.
          enable_thinking: false makes Qwen3 answer without thinking first.
          response_format, tool_choice: as in that API. Reasoning stays free. GPT-OSS is also told of a schema.
          **options: as for `generate`. `stop` applies to the answer, not to the reasoning; `grammar` to the answer.

        Raises:
          RequestError: invalid messages, tools or options; an option that the model's chat format does not have; or a
            model whose `chat_format` is not known.
          CapacityError: a conversation longer than `max_length`.
        """
        *_, last = self.stream_chat(
            messages,
            tools=tools,
            reasoning_effort=reasoning_effort,
            current_date=current_date,
            enable_thinking=enable_thinking,
            response_format=response_format,
            tool_choice=tool_choice,
            **options,
        )
        assert last.completion is not None  # the last chunk has it
        return last.completion

    def stream_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        reasoning_effort: str | None = None,
        current_date: str | None = DEFAULT,
        enable_thinking: bool | None = None,
        response_format: Mapping[str, Any] | None = None,
        tool_choice: str | Mapping[str, Any] | None = None,
        **options: Unpack[GenerateOptions],
    ) -> Iterator[ChatChunk]:
        """`chat`, one chunk per token, with reasoning and answer separate.

        The last chunk has the `completion`. Arguments are checked by the call itself, not when the first chunk is
        requested.
        """
        chat_format, tokenizer = self.chat_format, self.tokenizer
        given = read_response_format(response_format), tool_choice, options.get("grammar")
        tools = () if tool_choice == "none" else tools or ()
        how = ChatOptions(tools, reasoning_effort, current_date, enable_thinking, described(response_format))
        ids = chat_format.render(messages, tokenizer, how, max_length=self.max_length)
        options["grammar"] = grammar_of_turn(chat_format, tokenizer, how, *given)
        ends = tuple(dict.fromkeys((*self.eos_ids, *chat_format.stop_ids(tokenizer))))
        request = self._request(ids, options, eos_ids=ends)
        reader = chat_format.reader(tokenizer, how)
        return chat_chunks((chunk for _, chunk in self._run([request], lambda: reader)), reader)

    def logits(self, token_ids: Sequence[int]) -> np.ndarray:
        """Teacher-forced logits for the token after each of the given tokens, [T, V] float32 on the host.

        If one position's values are not finite, those of earlier positions in the same chunk may not be either.
        """
        ids = self._checked_ids(token_ids, self.max_length)
        with self._guard():
            self._check_state(batch=1, max_length=self.max_length)
            model, params = shards.alike(self.model), FlatParams.of(self.params)
            cache = registry.create_cache(model, batch=1, max_length=self.max_length, chunk=steps.SCORED_CHUNK)
            logits_TV = np.empty((len(ids), self.config.vocab_size), np.float32)
            for start, count, chunk in steps.padded_chunks(np.asarray(ids, np.int32), steps.SCORED_CHUNK):
                chunk_TV, cache = steps.score_chunk(model, params, cache, chunk)
                logits_TV[start : start + count] = np.asarray(chunk_TV)[:count]
        return logits_TV

    def activations(self, token_ids: Sequence[int]) -> dict[str, np.ndarray]:
        """Every stage of the forward pass over the given tokens, by name, in the order of computation.

        "embedding", then for each block "block_0/attention_norm", "…/attention/q", "…/k", "…/v", "…/heads" (the
        weighted values), "…/out", "block_0/attention_residual", the MLP's or the experts' stages, and finally
        "final_norm" and "logits"; see `gptjax.models.stages` for their names and shapes.
        """
        ids = self._checked_ids(token_ids, self.config.context_length)
        self._check_one_device("activations")
        self._shared.release()  # all stages together may need more memory than a cache
        with self._guard(max_length=len(ids)):
            return activations(self.model, self.params, ids)

    def init_state(self, *, batch: int = 1, max_length: int | None = None) -> steps.State:
        """An empty state for your own generation loop: a pytree with the cache and the last logits.

        Raises:
          CapacityError: `max_length` is more than the model's positions, or memory is short.
        """
        self._check_one_device("init_state")
        length = self.max_length if max_length is None else limits.positions(self.config, max_length)
        rows = limits.at_least_one("batch", batch)
        with self._guard(batch=rows, max_length=length, state=True):
            self._check_state(batch=rows, max_length=length)
            return jax.block_until_ready(steps.init_state(self.model, batch=rows, max_length=length))

    def prefill(
        self, state: steps.State, token_ids: Sequence[int] | Sequence[Sequence[int]]
    ) -> tuple[jax.Array, steps.State]:
        """Fills every row of a state from position 0, with one list of ids, or one for each row.

        Returns:
          logits_BV float32 for the token after each row, and the new state; the old one is donated and must not be
          used.
        """
        prompts, _ = split_prompts(token_ids)
        if len(prompts) != state.batch:
            raise RequestError(f"the state has {state.batch} rows, but {len(prompts)} lists of token ids were given")
        # All are checked before the state is donated for the first one.
        checked = [self._checked_ids(prompt, state.max_length) for prompt in prompts]
        with self._guard(batch=state.batch, max_length=state.max_length, state=True):
            params = FlatParams.of(self.params)
            for slot, ids in enumerate(checked):
                state = steps.prefill(self.model, params, state, slot, np.asarray(ids, np.int32))
            # A copy, because the next step donates the state with its logits.
            return jax.block_until_ready(jnp.copy(state.logits_BV)), state

    def decode(self, state: steps.State, **options: Unpack[SamplingOptions]) -> tuple[jax.Array, steps.State]:
        """Draws a token for every row from the state's logits and appends it to the row. Also works under `jax.jit`.

        There is no hidden randomness: `seed` defaults to 0, and the draw depends only on it and the position. All
        tokens in the state count as output for the presence and frequency penalties.

        Returns:
          token_B int32, not waited for, and the new state; the old one is donated. A token is -1 if the logits were not
          finite, as in a row that was not filled or is beyond its `max_length`.
        """
        params = sampling_params({"seed": 0} | options, self.defaults)
        params.check(self.config.vocab_size)
        request = Request(prompt_ids=(), max_tokens=1, params=params)
        settings = settings_of([request] * state.batch, self.config.vocab_size, Features.of(params))
        with self._guard(batch=state.batch, max_length=state.max_length, state=True):
            sampled = steps.sample(state, settings)
            return sampled.token_B, steps.advance(self.model, FlatParams.of(self.params), state, sampled.token_B)

    def memory(self, *, batch: int | None = None, max_length: int | None = None) -> Memory:
        """Bytes that the weights and generating `batch` rows of `max_length` positions need, and those available.

        With less, down to `least`, longer rows wait for each other: see `Memory`. Defaults: `batch` is `max_batch` (1
        if not set), and `max_length` the model's. Allocates nothing.
        """
        self._check_open()
        length = self.max_length if max_length is None else limits.positions(self.config, max_length)
        rows = limits.at_least_one("batch", (self.max_batch or 1) if batch is None else batch)
        return memory.needed(self.model, batch=rows, max_length=length, policy=self._shared.policy(rows))

    def close(self) -> None:
        """Frees weights and engine, also that of unfinished streams. Later use of the model raises `RequestError`."""
        params, self._params = self._params, None
        self._shared.close()
        for leaf in jax.tree.leaves(params):
            leaf.delete()

    def __enter__(self) -> "LanguageModel":
        self._check_open()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check_open(self) -> Params:
        runtime.check_process()
        if self._params is None:
            raise RequestError("this model was closed; load it again")
        return self._params

    def _check_one_device(self, what: str) -> None:
        if self.model.own.mesh is not None:
            raise RequestError(f"{what} is for a model on one device: load it without a mesh")

    def _guard(
        self, *, batch: int = 1, max_length: int | None = None, state: bool = False
    ) -> contextlib.AbstractContextManager[None]:
        """Guards a computation: raises if the model is closed, and says what to try if the body runs out of memory."""
        self._check_open()
        length = self.max_length if max_length is None else max_length
        return memory.explained(self.model, batch=batch, max_length=length, state=state)

    def _check_state(self, *, batch: int, max_length: int) -> None:
        """Raises `CapacityError` if a state does not fit. If it is in the way, gives up what earlier prompts left."""
        try:
            memory.check_state(self.model, batch=batch, max_length=max_length)
        except CapacityError:
            if not self._shared.release():
                raise
            memory.check_state(self.model, batch=batch, max_length=max_length)

    def _request(self, prompt: Prompt, options: GenerateOptions, eos_ids: Sequence[int] | None = None) -> Request:
        self._check_open()
        ids = self.tokenizer.prompt(prompt, special=special_of(options)) if isinstance(prompt, str) else as_ids(prompt)
        request = make_request(ids, options, self.defaults, self.eos_ids if eos_ids is None else eos_ids)
        request.check(vocab_size=self.config.vocab_size, max_length=self.max_length)
        if request.stop or request.grammar is not None:
            _ = self.tokenizer  # these need a tokenizer: raise now if there is none
        prepare(self.compiler, request.grammar)
        return request

    def _checked_ids(self, token_ids: object, max_length: int) -> list[int]:
        self._check_open()
        check_prompt(ids := as_ids(token_ids), vocab_size=self.config.vocab_size, max_length=max_length)
        return ids

    def _run(
        self, requests: list[Request], detokenizer: Callable[[], Decoder] | None = None
    ) -> Iterator[tuple[int, Chunk]]:
        if detokenizer is None and not isinstance(self._tokenizer, GptjaxError):
            detokenizer = functools.partial(self._tokenizer.stream, start=False)  # a completion continues its prompt
        chunks = generate(self._shared, requests, detokenizer, max_length=self.max_length, params=self._check_open)
        with self._guard(batch=self._shared.begin(len(requests)).rows), contextlib.closing(chunks):
            with progress("compiling and reading the prompt", None):
                chunk = next(chunks, None)
            while chunk is not None:
                yield chunk
                self._check_open()
                chunk = next(chunks, None)
