"""Which weights of a checkpoint are in MXFP4."""

from typing import Any, Final

from gptjax.config.keys import Keys

# What can be packed; each includes those before it. "linear" means the blocks' matrices (attention and MLP, but not the
# router, where small errors would choose other experts), "all" the embeddings and the head as well.
TARGETS: Final = ("none", "experts", "linear", "all")
# What OpenAI's checkpoints list for transformers; it packs only GPT-OSS's experts.
_NOT_CONVERTED: Final = ("model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head")
BLOCK: Final = 32  # values that share a scale, along a weight's input axis


def packs(mxfp4: str, kind: str) -> bool:
    """Whether packing `mxfp4` includes weights of this kind: "experts", "linear" or "embedding"."""
    return TARGETS.index(mxfp4) >= {"experts": 1, "linear": 2, "embedding": 3}[kind]


def read_mxfp4(keys: Keys, *, experts: tuple[int, ...] = (), linear: tuple[int, ...] = ()) -> str:
    """The entry of TARGETS that `quantization_config` names; "none" if it is absent.

    Published checkpoints pack only the experts; `targets` is gptjax's own key, for those in which it packed more.

    Args:
      keys: those of config.json; faults are noted there.
      experts, linear: the input widths of such weights; a model without experts gives none.
    """
    section = keys.section("quantization_config")
    if section is None:
        return "none"
    section.ignore("modules_to_not_convert", "dequantize")
    section.choice("quant_method", {"mxfp4": "mxfp4"}, absent=None)
    targets = TARGETS[1:] if experts else TARGETS[2:]
    target = section.choice("targets", {name: name for name in targets}, absent="experts" if experts else None)
    keys.take("quantization_config", section)
    check_widths(keys, experts if target == "experts" else (*experts, *linear))
    return target or "none"


def check_widths(keys: Keys, widths: tuple[int, ...]) -> None:
    """Notes a fault for each input width that is not a multiple of the block."""
    for width in widths:
        if width % BLOCK:
            keys.fault(f"the width {width} is not a multiple of MXFP4's block of {BLOCK}")


def mxfp4_to_json(mxfp4: str) -> dict[str, Any]:
    """The inverse of `read_mxfp4`: the keys to write."""
    if mxfp4 == "none":
        return {}
    further = {"modules_to_not_convert": [*_NOT_CONVERTED]} if mxfp4 == "experts" else {"targets": mxfp4}
    return {"quantization_config": {"quant_method": "mxfp4", **further}}
