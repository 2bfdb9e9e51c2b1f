from pallas_kernels.attention.api import attention, attention_over_pages, packed_attention_over_pages

__all__ = ["attention", "attention_over_pages", "packed_attention_over_pages"]
