from pallas_kernels.attention.api import (
    append_and_attend,
    attention,
    attention_over_pages,
    packed_attention_over_pages,
    takes_product,
)

__all__ = [
    "append_and_attend",
    "attention",
    "attention_over_pages",
    "packed_attention_over_pages",
    "takes_product",
]
