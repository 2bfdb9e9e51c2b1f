"""Keys and values in float8 by ml_dtypes, in float64: what `pallas_kernels.fp8_pages` is compared with."""

import ml_dtypes
import numpy as np

LARGEST = float(ml_dtypes.finfo(ml_dtypes.float8_e4m3fn).max)  # 448


def exponents(x: np.ndarray) -> np.ndarray:
    """Of each vector [..., H], the least e, from -100 on, with |x| ≤ 448 · 2^e: found by trying all, [..., 1]."""
    found = np.full((*x.shape[:-1], 1), 200)
    largest = np.abs(x.astype(np.float64)).max(axis=-1, keepdims=True)
    for e in range(200, -101, -1):
        found = np.where(largest <= LARGEST * 2.0**e, e, found)
    return found


def rounded(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The numbers, float8_e4m3fn, and the exponents."""
    e = exponents(x)
    return (x.astype(np.float64) / 2.0**e).astype(ml_dtypes.float8_e4m3fn), e


def as_read(x: np.ndarray) -> np.ndarray:
    """What comes back of vectors, in float64."""
    numbers, e = rounded(x)
    return numbers.astype(np.float64) * 2.0**e
