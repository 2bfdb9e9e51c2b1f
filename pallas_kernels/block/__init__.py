from pallas_kernels.block.api import block, takes
from pallas_kernels.block.stream import LinearWeights, NormWeights, Stream, Weights

__all__ = ["LinearWeights", "NormWeights", "Stream", "Weights", "block", "takes"]
