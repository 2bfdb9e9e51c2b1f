"""Text to token ids and back."""

from gptjax.text.detokenizer import Detokenizer
from gptjax.text.gguf import tokenizer_from_gguf
from gptjax.text.tokenizer import Tokenizer, load_tokenizer

__all__ = ["Detokenizer", "Tokenizer", "load_tokenizer", "tokenizer_from_gguf"]
