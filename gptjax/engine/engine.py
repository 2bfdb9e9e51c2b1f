"""Slots on one compiled decode step: requests join and leave at any step, rows do not affect each other."""

import dataclasses
from collections import deque
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from gptjax import sampling
from gptjax.cache import KVCache
from gptjax.engine import steps
from gptjax.engine.flat_params import AnyParams, FlatParams
from gptjax.engine.request import MAX_TOP_LOGPROBS, Request, SamplingParams
from gptjax.models import registry
from gptjax.models.registry import Model

# Beside an H200, asking for one step takes the host 0.55 ms for GPT-2 124M and 1.3 ms for gpt-oss-20b (hundreds of
# arrays go with each call), which is more than the device takes to compute it.
_STEPS_PER_DISPATCH = 8


@dataclasses.dataclass(frozen=True)
class Token:
    """One token that a slot produced."""

    slot: int
    token_id: int  # -1 where the model's logits were not finite
    logprob: float
    top: tuple[tuple[int, float], ...]  # (token id, log-probability), most likely first


@dataclasses.dataclass
class _Chunk:
    """Steps that the device was asked for in one go, and whose tokens `Engine.step` has not all returned."""

    num_steps: int
    sampled: sampling.Sampled  # on the device; of several steps, stacked
    slots: set[int]  # those that were busy then, less those released since: whose tokens are wanted
    on_host: deque[sampling.Sampled] | None = None  # of each step that is left; None until they are read

    def read(self) -> deque[sampling.Sampled]:
        """The steps that are left, waited for."""
        if self.on_host is None:
            host = jax.device_get(self.sampled)
            self.on_host = deque([host] if self.num_steps == 1 else _unstacked(host))
        return self.on_host


class Engine:
    """A batch of `batch` slots. Not thread-safe: one engine belongs to one thread at a time.

    `admit` prefills a request into a free slot, `step` gives the busy slots their next tokens, `release` frees a slot.
    A slot that has filled its cache must be released; until then its further tokens are -1.

    The device is asked for one step at a time, or for a chunk of `steps_per_dispatch`, where asking takes the host
    longer than a step takes the device. Tokens and their order are the same to the bit. The price of a chunk is that
    its first token comes with its last, and that what a request no longer wants is computed to the chunk's end. So
    it is one step where a newcomer waits for its first token, and where fewer than half a chunk is wanted by any
    request (`max_tokens` and `max_length` tell): no more than half a chunk is computed that is known to be of no use.
    Where a request ends of itself, it is the rest of its chunk and one chunk more, which the device works on meanwhile.
    """

    def __init__(
        self, model: Model, params: AnyParams, *, batch: int, max_length: int, steps_per_dispatch: int | None = None
    ):
        """`steps_per_dispatch` is 1 on a CPU if not given, and 8 elsewhere."""
        if steps_per_dispatch is None:
            steps_per_dispatch = 1 if jax.default_backend() == "cpu" else _STEPS_PER_DISPATCH
        if steps_per_dispatch < 1:
            raise ValueError(f"steps_per_dispatch must be at least 1, found {steps_per_dispatch}")
        self.model = model
        self._params = FlatParams.of(params)
        self.max_length = max_length
        self.steps_per_dispatch = steps_per_dispatch
        self._state = steps.init_state(model, batch=batch, max_length=max_length)
        self._row = registry.create_cache(model, batch=1, max_length=max_length)  # what prefill works on
        self._requests: list[Request | None] = [None] * batch
        self._wanted = [0] * batch  # steps that a slot's request still wants and the device was not yet asked for
        self._newcomers: set[int] = set()  # the slots of which the device was asked for no step yet
        self._chunks: deque[_Chunk] = deque()  # oldest first; each has slots whose tokens are wanted
        self._features = Features()
        self._settings: sampling.Sampling | None = None  # of the rows as they are; None where they changed
        self._active_B: jax.Array | None = None

    @property
    def batch(self) -> int:
        """B: the number of slots."""
        return len(self._requests)

    @property
    def free_slots(self) -> list[int]:
        """The slots without a request."""
        return [slot for slot, request in enumerate(self._requests) if request is None]

    def admit(self, slot: int, request: Request) -> None:
        """Prefills a checked request with a seed into a free slot, in chunks whose cuts depend on its length alone."""
        if self._requests[slot] is not None:
            raise ValueError(f"slot {slot} is busy")
        tokens = np.asarray(request.prompt_ids, np.int32)
        # The device does this after the chunks it was asked for, which know nothing of the request.
        self._state, self._row = prefill(self.model, self._params, self._state, slot, tokens, self._row)
        self._requests[slot] = request
        self._wanted[slot] = request.room(self.max_length)
        self._newcomers.add(slot)
        self._features |= Features.of(request.params)
        self._settings = self._active_B = None

    def wait(self) -> None:
        """Returns when the device has done all that it was asked for; for those who measure."""
        jax.block_until_ready(self._state)

    def release(self, slot: int) -> None:
        """Frees a slot. What it held is overwritten by the next request, and tokens on their way to it are dropped."""
        self._requests[slot] = None
        self._wanted[slot] = 0
        self._newcomers.discard(slot)
        self._settings = self._active_B = None
        for chunk in self._chunks:
            chunk.slots.discard(slot)
        self._chunks = deque(chunk for chunk in self._chunks if chunk.slots)

    def step(self) -> list[Token]:
        """The next token of every busy slot, less those admitted while steps were under way, whose turn comes later.

        Of busy slots there is always one that gets a token. When this returns, the device already works on what is
        wanted next.
        """
        if len(self.free_slots) == self.batch:
            return []
        if self._newcomers or not self._chunks:
            self._dispatch()
        chunk = self._chunks[0]
        # While a chunk's tokens are handed out, the device works on as many steps. (A single step's token is read
        # while its `advance` is under way.)
        while max(self._wanted) > 0 and self._ahead < chunk.num_steps - 1:
            self._dispatch()
        left = chunk.read()
        sampled = left.popleft()
        if not left:
            self._chunks.popleft()
        return [_token(sampled, slot) for slot in sorted(chunk.slots)]

    @property
    def _ahead(self) -> int:
        """Steps that the device was asked for after the oldest chunk."""
        return sum(chunk.num_steps for chunk in self._chunks) - self._chunks[0].num_steps

    def _dispatch(self) -> None:
        """Asks the device for one step, or for a chunk of them."""
        if self._settings is None or self._active_B is None:
            self._settings = settings_of(self._requests, self.model.config.vocab_size, self._features)
            self._active_B = jnp.asarray(np.asarray([request is not None for request in self._requests]))
        enough = 2 * max(self._wanted) >= self.steps_per_dispatch and not self._newcomers
        num_steps = self.steps_per_dispatch if enough else 1
        if num_steps == 1:
            # Two calls, so that the token can be read before the step is done.
            sampled = steps.sample(self._state, self._settings)
            self._state = steps.advance(self.model, self._params, self._state, sampled.token_B, self._active_B)
        else:
            self._state, sampled = steps.decode(
                self.model, self._params, self._state, self._settings, self._active_B, num_steps
            )
        busy = {slot for slot, request in enumerate(self._requests) if request is not None}
        self._chunks.append(_Chunk(num_steps, sampled, busy))
        self._newcomers.clear()
        for slot in busy:
            self._wanted[slot] -= num_steps


def prefill(
    model: Model, params: AnyParams, state: steps.State, slot: int, tokens: np.ndarray, row: KVCache
) -> tuple[steps.State, KVCache]:
    """Fills a row of a state with a sequence from its start.

    Args:
      tokens: int32 [T], 1 <= T <= max_length.
      row: a cache of one row to work on, donated.

    Returns:
      The state, and the cache of one row for the next call.
    """
    if not len(tokens):
        raise ValueError("a sequence needs at least one token")
    for _, _, chunk in steps.padded_chunks(tokens):
        logits_1V, row = steps.prefill_chunk(model, params, row, chunk)
    history_S = np.zeros(state.cache.capacity, np.int32)
    history_S[: len(tokens)] = tokens
    return steps.insert(state, np.int32(slot), row, history_S, logits_1V), row


@dataclasses.dataclass(frozen=True)
class Features:
    """Which parts of sampling are compiled in: those that any row so far has used, so that they change rarely."""

    draws: bool = False
    truncates: bool = False
    penalises: bool = False
    biases: bool = False
    num_top: int = 0  # rounded up to one of a few

    @classmethod
    def of(cls, params: SamplingParams) -> "Features":
        """What one request uses."""
        num_top = next(size for size in (0, 5, MAX_TOP_LOGPROBS) if size >= params.top_logprobs)
        return cls(params.temperature > 0, params.truncates, params.penalises, bool(params.logit_bias), num_top)

    def __or__(self, other: "Features") -> "Features":
        return Features(*map(max, dataclasses.astuple(self), dataclasses.astuple(other)))


def settings_of(requests: Sequence[Request | None], vocab_size: int, features: Features) -> sampling.Sampling:
    """The rows' settings as arrays; what `features` does not have is None, so that it is not computed."""
    off = SamplingParams(seed=0)
    rows = [off if request is None else request.params for request in requests]

    def column(name: str, dtype: type[np.generic]) -> jax.Array:
        values = [getattr(params, name) for params in rows]
        # A k beyond the vocabulary keeps all, and may be beyond int32.
        return jnp.asarray(
            np.asarray([min(value, vocab_size) for value in values] if name == "top_k" else values, dtype)
        )

    bias_BV = None
    if features.biases:
        bias_BV = np.zeros((len(rows), vocab_size), np.float32)
        for row, params in enumerate(rows):
            for token, bias in params.logit_bias.items():
                bias_BV[row, token] = bias
    prompt_lengths = [0 if request is None else len(request.prompt_ids) for request in requests]
    return sampling.Sampling(
        seed_B=column("seed", np.uint32),
        temperature_B=column("temperature", np.float32) if features.draws else None,
        truncation=sampling.Truncation(
            top_k_B=column("top_k", np.int32),
            top_p_B=column("top_p", np.float32),
            min_p_B=column("min_p", np.float32),
        )
        if features.truncates
        else None,
        penalties=sampling.Penalties(
            repetition_B=column("repetition_penalty", np.float32),
            presence_B=column("presence_penalty", np.float32),
            frequency_B=column("frequency_penalty", np.float32),
            prompt_lengths_B=jnp.asarray(prompt_lengths, jnp.int32),
        )
        if features.penalises
        else None,
        bias_BV=None if bias_BV is None else jnp.asarray(bias_BV),
        num_top=min(features.num_top, vocab_size),
    )


def _unstacked(stacked: sampling.Sampled) -> list[sampling.Sampled]:
    leaves, tree = jax.tree.flatten(stacked)
    return [jax.tree.unflatten(tree, of_step) for of_step in zip(*leaves, strict=True)]


def _token(sampled: sampling.Sampled, slot: int) -> Token:
    top = zip(sampled.top_ids_BC[slot].tolist(), sampled.top_logprobs_BC[slot].tolist(), strict=True)
    return Token(slot, int(sampled.token_B[slot]), float(sampled.logprob_B[slot]), tuple(top))
