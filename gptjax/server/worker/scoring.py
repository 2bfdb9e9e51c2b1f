"""Log-probabilities of a prompt's tokens, for `echo` with `logprobs`."""

import logging
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.engine import memory, steps
from gptjax.engine.flat_params import FlatParams
from gptjax.engine.request import MAX_TOP_LOGPROBS
from gptjax.errors import CapacityError, RequestError
from gptjax.language_model import LanguageModel
from gptjax.models import registry
from gptjax.server.errors import NO_RETRY, ApiError
from gptjax.server.ipc.events import PromptScores

_log = logging.getLogger(__name__)
_TOPS = (0, 1, 5, MAX_TOP_LOGPROBS)  # numbers of alternatives, so that few programs are compiled


def score(lm: LanguageModel, token_ids: Sequence[int], num_top: int) -> PromptScores:
    """For each token of a checked prompt after the first: its log-probability, and the most likely in its place.

    This runs next to the worker: the device alternates between the two, a chunk of the prompt at a time.

    Args:
      num_top: how many of the most likely, at least.

    Raises:
      RequestError: the logits are not finite.
      ApiError: 503, there is not enough memory next to the worker's slots. The log has the details.
    """
    try:
        with memory.explained(lm.model, batch=1, max_length=lm.max_length):
            return _score(lm, token_ids, num_top)
    except CapacityError as error:
        _log.warning("not enough memory to score a prompt; fewer slots (--max-batch) leave more: %s", error)
        message = "the server has too little memory to score this prompt; see its log"
        raise ApiError(503, message, kind="server_error", code="no_memory", headers=NO_RETRY) from error


def _score(lm: LanguageModel, token_ids: Sequence[int], num_top: int) -> PromptScores:
    ids = np.asarray(token_ids, np.int32)
    top = min(next(size for size in _TOPS if size >= num_top), lm.config.vocab_size)
    cache = registry.create_cache(lm.model, batch=1, max_length=lm.max_length, chunk=steps.SCORED_CHUNK)
    found: list[tuple[float, tuple[tuple[int, float], ...]]] = []
    params = FlatParams.of(lm.params)
    for start, count, chunk in steps.padded_chunks(ids, steps.SCORED_CHUNK):
        logits_TV, cache = steps.score_chunk(lm.model, params, cache, chunk)
        following = ids[start + 1 : start + count + 1]  # nothing follows the prompt's last token
        targets_T = np.pad(following, (0, len(logits_TV) - len(following)))
        own_T, top_TC, ids_TC = jax.device_get(_scored(logits_TV, targets_T, top))
        if not np.isfinite(own_T[: len(following)]).all():
            raise RequestError("the model's logits for this prompt were not finite, so it cannot be scored")
        rows = zip(own_T.tolist(), ids_TC.tolist(), top_TC.tolist(), strict=True)
        found += [(own, tuple(zip(*both, strict=True))) for own, *both in rows][: len(following)]
    return found


@partial(jax.jit, static_argnames="num_top")
def _scored(logits_TV: jax.Array, targets_T: jax.Array, num_top: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Log-probabilities of the targets [T] and of the most likely tokens [T, C], with the latter's ids."""
    logits_TV = logits_TV.astype(jnp.float32)
    total_T = jax.nn.logsumexp(logits_TV, axis=-1)
    own_T = jnp.take_along_axis(logits_TV, targets_T[:, None], axis=-1)[:, 0] - total_T
    top_TC, ids_TC = jax.lax.top_k(logits_TV, num_top)
    return own_T, top_TC - total_T[:, None], ids_TC
