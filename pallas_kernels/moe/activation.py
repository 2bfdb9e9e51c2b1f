"""The activation between experts' products, as a kernel's setting."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class SwiGLU:
    """Clamped SwiGLU: the rows of `gate_up` alternate between gate and up, one pair per unit."""

    alpha: float
    limit: float
