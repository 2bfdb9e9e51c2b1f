from pallas_kernels.logits.api import Summary, summary

__all__ = ["Summary", "summary"]
