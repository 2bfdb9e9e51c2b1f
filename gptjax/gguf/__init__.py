"""GGUF, llama.cpp's file format: `open_gguf` reads metadata and tensors, and expands packed types."""

from gptjax.gguf.file import GGUFFile as GGUFFile
from gptjax.gguf.file import open_gguf as open_gguf
from gptjax.gguf.file import read_metadata as read_metadata
from gptjax.gguf.header import Tensor as Tensor
