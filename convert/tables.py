"""The conversion table for each kind of configuration."""

from collections.abc import Callable, Collection
from typing import Any, Final

from convert import gpt2, gpt_oss, llama
from convert.rules import Table
from gptjax.config import GPT2Config, GptOssConfig, LlamaConfig, ModelConfig

_TABLES: Final[dict[type[ModelConfig], Callable[[Any, Collection[str]], Table]]] = {
    GPT2Config: gpt2.table,
    GptOssConfig: gpt_oss.table,
    LlamaConfig: llama.table,
}


def table(config: ModelConfig, names: Collection[str] = ()) -> Table:
    """The table for a configuration's checkpoints, in the layout that `names` show."""
    return _TABLES[type(config)](config, names)
