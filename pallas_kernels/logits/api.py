"""The largest of a row's logits, and the sum that its probabilities are divided by."""

import jax

from pallas_kernels import dispatch
from pallas_kernels.logits import reference
from pallas_kernels.logits.summary import Summary as Summary


def summary(logits_BV: jax.Array, *, implementation: str = dispatch.AUTO) -> Summary:
    """What is needed of all of a row's logits.

    Means, in float32:

        largest = max(logits)
        token   = the least v where logits[v] = largest
        total   = Σ exp(logits - largest)

    so that logits[v] - largest - log(total) is the logarithm of v's probability.

    Args:
      logits_BV: float32.
      implementation: "auto", "mosaic" (up to 262,144 logits a row, on Hopper) or "xla".

    Returns:
      See `Summary`. By "mosaic", a row's bits depend neither on the others nor on their number; by "xla" on a CPU
      neither.

    Raises:
      ValueError: an unknown implementation, or one that does not support these operands.
    """
    available = {dispatch.XLA: reference.summary}
    if dispatch.wanted(implementation) == dispatch.MOSAIC:
        from pallas_kernels.logits import mosaic_sm90

        if mosaic_sm90.supports(logits_BV):
            available[dispatch.MOSAIC] = mosaic_sm90.summary
    return dispatch.choose("summary", implementation, available)(logits_BV)
