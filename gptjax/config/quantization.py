"""Which weights of a checkpoint are packed, and how."""

from typing import Any, Final

from gptjax.config.keys import Keys
from gptjax.support.quoting import quoted

# What can be packed; each includes those before it. "linear" means the blocks' matrices (attention and MLP, but not the
# router, where small errors would choose other experts), "all" the embeddings and the head as well.
TARGETS: Final = ("none", "experts", "linear", "all")
# What OpenAI's checkpoints list for transformers; it packs only GPT-OSS's experts.
_NOT_CONVERTED: Final = ("model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head")
# The types of GGUF files that stay packed. Others are expanded when they are loaded.
KEPT: Final = ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q4_K", "Q5_K", "Q6_K")
# By the path of a weight: the type of all its rows, or those of the parts that it is made of (queries, keys and values;
# gate and up), in order.
Types = tuple[tuple[str, tuple[str, ...]], ...]
BLOCK: Final = 32  # values that share a scale, along a weight's input axis


def packs(mxfp4: str, kind: str) -> bool:
    """Whether packing `mxfp4` includes weights of this kind: "experts", "linear" or "embedding"."""
    return TARGETS.index(mxfp4) >= {"experts": 1, "linear": 2, "embedding": 3}[kind]


def read_packing(keys: Keys, *, experts: tuple[int, ...] = (), linear: tuple[int, ...] = ()) -> dict[str, Any]:
    """What `quantization_config` says, as the fields `mxfp4` (an entry of TARGETS) and `types` of a configuration.

    Published checkpoints pack only the experts; `targets` is gptjax's own key, for those in which it packed more, and
    `types` the one for those that it made of a GGUF file.

    Args:
      keys: those of config.json; faults are noted there.
      experts, linear: the input widths of such weights; a model without experts gives none.
    """
    section = keys.section("quantization_config")
    if section is None:
        return {"mxfp4": "none", "types": ()}
    section.ignore("modules_to_not_convert", "dequantize")
    method = section.choice("quant_method", {"mxfp4": "mxfp4", "ggml": "ggml"}, absent=None)
    types = _read_types(section)
    if method == "ggml":
        keys.take("quantization_config", section)
        return {"mxfp4": "none", "types": types}
    targets = TARGETS[1:] if experts else TARGETS[2:]
    target = section.choice("targets", {name: name for name in targets}, absent="experts" if experts else None)
    keys.take("quantization_config", section)
    check_widths(keys, experts if target == "experts" else (*experts, *linear))
    return {"mxfp4": target or "none", "types": types}


def _read_types(section: Keys) -> Types:
    found = section.mapping("types")
    for path, types in found.items():
        if (
            not isinstance(types, list)
            or not types
            or not all(isinstance(kind, str) and kind in KEPT for kind in types)
        ):
            section.fault(f"types of {quoted(path)} are {quoted(types)}; expected a list of {', '.join(KEPT)}")
            return ()
    return tuple((path, tuple(types)) for path, types in sorted(found.items()))


def check_widths(keys: Keys, widths: tuple[int, ...]) -> None:
    """Notes a fault for each input width that is not a multiple of the block."""
    for width in widths:
        if width % BLOCK:
            keys.fault(f"the width {width} is not a multiple of MXFP4's block of {BLOCK}")


def packing_to_json(mxfp4: str, types: Types) -> dict[str, Any]:
    """The inverse of `read_packing`: the keys to write."""
    listed = {"types": {path: list(kinds) for path, kinds in types}} if types else {}
    if mxfp4 == "none":
        return {"quantization_config": {"quant_method": "ggml", **listed}} if types else {}
    further: dict[str, Any] = (
        {"modules_to_not_convert": [*_NOT_CONVERTED]} if mxfp4 == "experts" else {"targets": mxfp4}
    )
    return {"quantization_config": {"quant_method": "mxfp4", **further, **listed}}
