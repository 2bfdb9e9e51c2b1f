"""What experts do between their products, as their kernels are told."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class SwiGLU:
    """The activation between the products: rows of `gate_up` are gate and up of one unit in turn."""

    alpha: float
    limit: float
