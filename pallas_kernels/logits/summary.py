"""What is needed of all of a row's logits."""

from typing import NamedTuple

import jax


class Summary(NamedTuple):
    """Of each row: its largest logit, whose that is, and the sum of exponentials relative to it."""

    largest_B: jax.Array  # float32; NaN if any logit is
    token_B: jax.Array  # int32: the first of the largest; any token if there is NaN
    total_B: jax.Array  # float32: Σ exp(logit - largest); NaN if the largest is not finite
