"""What the configurations of GPT-OSS and Llama have in common: which layers slide, and how heads share keys."""

from collections.abc import Sequence
from typing import Final

from gptjax.config.keys import Keys
from gptjax.support.quoting import quoted

_SLIDING, _FULL = "sliding_attention", "full_attention"
_SLIDES: Final = {_SLIDING: True, _FULL: False}


def read_layer_types(keys: Keys, num_layers: int, *, absent: Sequence[bool]) -> list[bool]:
    """Whether each layer slides, as `layer_types` says; faults are noted, and give an empty list."""
    types = keys.listed("layer_types")
    if types is None:
        return list(absent)
    unknown = sorted({quoted(kind) for kind in types if not isinstance(kind, str) or kind not in _SLIDES})
    if unknown:
        keys.fault(f"layer_types has {', '.join(unknown[:10])}; gptjax supports {', '.join(_SLIDES)}")
        return []
    if len(types) != num_layers:
        keys.fault(f"layer_types has {len(types)} entries, but num_hidden_layers is {num_layers}")
    return [_SLIDES[kind] for kind in types]


def layer_types(windows: Sequence[int | None]) -> list[str]:
    """The inverse of `read_layer_types`, from the layers' windows."""
    return [_FULL if window is None else _SLIDING for window in windows]


def check_heads(num_heads: int, num_kv_heads: int, head_width: int, keys: Keys) -> None:
    """Notes a fault if query heads cannot share key/value heads evenly, or a head has no pairs to rotate."""
    if num_kv_heads and num_heads % num_kv_heads:
        keys.fault(f"{num_heads} query heads cannot share {num_kv_heads} key/value heads")
    if head_width % 2:
        keys.fault(f"head_dim {head_width} is odd: rotary positions rotate pairs")
