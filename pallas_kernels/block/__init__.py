from pallas_kernels.block.api import MOST_PAGES, MOST_ROWS, block, takes
from pallas_kernels.block.stream import LinearWeights, NormWeights, Stream, Weights

__all__ = ["MOST_PAGES", "MOST_ROWS", "LinearWeights", "NormWeights", "Stream", "Weights", "block", "takes"]
