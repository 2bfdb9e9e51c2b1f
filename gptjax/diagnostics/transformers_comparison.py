"""Compares us with transformers stage by stage, to find where we first differ."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from gptjax.checkpoints.manifest import is_converted
from gptjax.config import GPT2Config, GptOssConfig, LlamaConfig, ModelConfig
from gptjax.engine.request import check_prompt
from gptjax.errors import CheckpointError, GptjaxError
from gptjax.models.params import Params
from gptjax.models.registry import Model
from gptjax.models.stages import activations, stages
from gptjax.support import installation

# Relative to a stage's largest magnitude. Sums of D or F float32 products in another order differ by about
# sqrt(F)·2^-24 each (3e-6 at F = 3072), and the errors of blocks add up.
TOLERANCE = {"float32": 3e-5, "bfloat16": 6e-2, "float16": 8e-3}


@dataclasses.dataclass(frozen=True)
class Row:
    """One stage, ours and theirs."""

    stage: str
    ours: np.ndarray
    theirs: np.ndarray
    tolerance: float  # relative to their largest magnitude
    left_out: tuple[int, ...] = ()  # positions of tokens that are not compared; see `compare`

    @property
    def difference(self) -> float:
        """The largest absolute difference; NaN if either has one or all is left out, infinite if the shapes differ."""
        if self.ours.shape != self.theirs.shape:
            return float("inf")
        differences = np.abs(self.ours.astype(np.float64) - self.theirs.astype(np.float64))
        compared = np.delete(differences, self.left_out, axis=0)
        return float(compared.max()) if compared.size else float("nan")

    @property
    def magnitude(self) -> float:
        """Their largest absolute value."""
        return float(np.abs(self.theirs).max())

    @property
    def agrees(self) -> bool:
        """Whether the difference is within the tolerance. NaN never is."""
        return self.difference <= self.tolerance * self.magnitude


def compare(model: Model, params: Params, directory: Path, token_ids: Sequence[int]) -> list[Row]:
    """Runs transformers on the same checkpoint and tokens, in the model's dtype, and compares every stage.

    When experts are nearly tied, rounding decides which of them a token gets. A token whose router logits agree but
    whose experts do not is left out of the experts' output and of every later stage.

    Raises:
      GptjaxError: torch or transformers is not installed.
    """
    check_prompt(token_ids, vocab_size=model.config.vocab_size, max_length=model.config.context_length)
    theirs = transformers_activations(directory, model.config, token_ids, dtype=np.dtype(model.dtype).name)
    ours = activations(model, params, token_ids)
    tolerance = TOLERANCE[np.dtype(model.dtype).name]
    rows: list[Row] = []
    left_out: tuple[int, ...] = ()
    for stage in stages(model.config):
        rows.append(Row(stage, ours[stage], theirs[stage], tolerance, left_out))
        if isinstance(model.config, GptOssConfig) and stage.endswith("/router"):
            left_out = tuple(sorted({*left_out, *other_experts(rows[-1], top=model.config.experts_per_token)}))
    return rows


def other_experts(router: Row, *, top: int) -> list[int]:
    """The positions of tokens that get other experts from us than from transformers, if the router's logits agree."""
    if not router.agrees:
        return []
    ours, theirs = (np.sort(np.argsort(-logits)[:, :top]) for logits in (router.ours, router.theirs))
    return [int(position) for position in np.flatnonzero((ours != theirs).any(axis=1))]


def first_difference(rows: Sequence[Row]) -> Row | None:
    """The first stage that does not agree; None if all do."""
    return next((row for row in rows if not row.agrees), None)


@dataclasses.dataclass(frozen=True)
class Tap:
    """Where to find a stage in transformers: a module's input or output, and how to bring it to our shape."""

    stage: str
    module: str
    side: str  # "input" or "output"
    shape: Callable[[np.ndarray], np.ndarray] = lambda array: array
    batched: bool = True  # whether the first axis is the batch, of size 1


def _gpt2_taps(config: GPT2Config) -> Iterator[Tap]:
    heads, width = (config.num_heads, config.head_width), config.width

    def third(index: int) -> Callable[[np.ndarray], np.ndarray]:
        return lambda x: x[:, index * width : (index + 1) * width].reshape(-1, *heads)

    yield Tap("embedding", "transformer.h.0", "input")
    for layer in range(config.num_layers):
        ours, theirs = f"block_{layer}", f"transformer.h.{layer}"
        yield Tap(f"{ours}/attention_norm", f"{theirs}.ln_1", "output")
        for index, name in enumerate("qkv"):
            yield Tap(f"{ours}/attention/{name}", f"{theirs}.attn.c_attn", "output", third(index))
        yield Tap(f"{ours}/attention/heads", f"{theirs}.attn.c_proj", "input", lambda x: x.reshape(-1, *heads))
        yield Tap(f"{ours}/attention/out", f"{theirs}.attn.c_proj", "output")
        yield Tap(f"{ours}/attention_residual", f"{theirs}.ln_2", "input")
        yield Tap(f"{ours}/mlp_norm", f"{theirs}.ln_2", "output")
        yield Tap(f"{ours}/mlp/up", f"{theirs}.mlp.c_fc", "output")
        yield Tap(f"{ours}/mlp/activation", f"{theirs}.mlp.c_proj", "input")
        yield Tap(f"{ours}/mlp/down", f"{theirs}.mlp.c_proj", "output")
        yield Tap(f"{ours}/mlp_residual", f"{theirs}", "output")
    yield Tap("final_norm", "transformer.ln_f", "output")
    yield Tap("logits", "lm_head", "output")


def _attention_taps(config: GptOssConfig | LlamaConfig, ours: str, theirs: str) -> Iterator[Tap]:
    def heads(x: np.ndarray) -> np.ndarray:
        return x.reshape(len(x), -1, config.head_width)

    yield Tap(f"{ours}/attention_norm", f"{theirs}.input_layernorm", "output")
    for name in "qkv":
        yield Tap(f"{ours}/attention/{name}", f"{theirs}.self_attn.{name}_proj", "output", heads)
    if isinstance(config, LlamaConfig) and config.qk_norm:
        for name in ("q_norm", "k_norm"):
            yield Tap(f"{ours}/attention/{name}", f"{theirs}.self_attn.{name}", "output")
    yield Tap(f"{ours}/attention/heads", f"{theirs}.self_attn.o_proj", "input", heads)
    yield Tap(f"{ours}/attention/out", f"{theirs}.self_attn.o_proj", "output")
    yield Tap(f"{ours}/attention_residual", f"{theirs}.post_attention_layernorm", "input")


def _decoder_taps(config: GptOssConfig | LlamaConfig, *, rest: Callable[[str, str], Iterator[Tap]]) -> Iterator[Tap]:
    """The stages of a model; `rest` has those of a block that follow its attention."""
    yield Tap("embedding", "model.layers.0", "input")
    for layer in range(config.num_layers):
        ours, theirs = f"block_{layer}", f"model.layers.{layer}"
        yield from _attention_taps(config, ours, theirs)
        yield from rest(ours, theirs)
    yield Tap("final_norm", "model.norm", "output")
    yield Tap("logits", "lm_head", "output")


def _moe_taps(ours: str, theirs: str) -> Iterator[Tap]:
    yield Tap(f"{ours}/moe_norm", f"{theirs}.post_attention_layernorm", "output")
    yield Tap(f"{ours}/moe/router", f"{theirs}.mlp.router", "output", batched=False)
    yield Tap(f"{ours}/moe", f"{theirs}.mlp", "output")
    yield Tap(f"{ours}/moe_residual", f"{theirs}", "output")


def _gated_mlp_taps(ours: str, theirs: str) -> Iterator[Tap]:
    yield Tap(f"{ours}/mlp_norm", f"{theirs}.post_attention_layernorm", "output")
    yield Tap(f"{ours}/mlp/gate", f"{theirs}.mlp.gate_proj", "output")
    yield Tap(f"{ours}/mlp/up", f"{theirs}.mlp.up_proj", "output")
    yield Tap(f"{ours}/mlp/activation", f"{theirs}.mlp.down_proj", "input")
    yield Tap(f"{ours}/mlp/down", f"{theirs}.mlp.down_proj", "output")
    yield Tap(f"{ours}/mlp_residual", f"{theirs}", "output")


_TAPS: Mapping[type[ModelConfig], Callable[[Any], Iterator[Tap]]] = {
    GPT2Config: _gpt2_taps,
    GptOssConfig: functools.partial(_decoder_taps, rest=_moe_taps),
    LlamaConfig: functools.partial(_decoder_taps, rest=_gated_mlp_taps),
}


def taps(config: ModelConfig) -> list[Tap]:
    """Where transformers has each stage, in the order of `stages`."""
    return list(_TAPS[type(config)](config))


def transformers_activations(
    directory: Path, config: ModelConfig, token_ids: Sequence[int], *, dtype: str = "float32"
) -> dict[str, np.ndarray]:
    """Every stage as transformers computes it on the CPU with eager attention, with our names and shapes."""
    torch, _ = oracle()
    loaded = load_transformers(directory, getattr(torch, dtype), attn_implementation="eager")
    tapped = taps(config)
    with _recording(loaded, tapped) as recorded, torch.no_grad():
        loaded.eval()(input_ids=torch.tensor([list(token_ids)]), use_cache=False)
    return {tap.stage: tap.shape(recorded[tap.module, tap.side]) for tap in tapped}


@contextmanager
def _recording(loaded: Any, taps: Sequence[Tap]) -> Iterator[dict[tuple[str, str], np.ndarray]]:
    """Records the inputs and outputs of the tapped modules, without the batch axis, in float32."""
    recorded: dict[tuple[str, str], np.ndarray] = {}
    flat = {tap.module for tap in taps if not tap.batched}

    def keep(name: str, side: str, value: Any) -> None:
        tensor = value[0] if isinstance(value, tuple) else value
        recorded[name, side] = (tensor if name in flat else tensor[0]).float().numpy()

    handles = []
    for name in {tap.module for tap in taps}:
        module = loaded.get_submodule(name)
        # The default argument binds the current value of the loop variable.
        handles.append(module.register_forward_pre_hook(lambda _, args, name=name: keep(name, "input", args)))
        handles.append(module.register_forward_hook(lambda _, __, out, name=name: keep(name, "output", out)))
    try:
        yield recorded
    finally:
        for handle in handles:
            handle.remove()


def oracle() -> tuple[Any, Any]:
    """The modules torch and transformers. Raises `GptjaxError`, saying what to install, if one is missing."""
    try:
        import torch
        import transformers
    except ImportError as error:
        raise GptjaxError(
            f"this needs transformers and torch, but {error.name} is not installed: {installation.with_extra('oracle')}"
        ) from None
    return torch, transformers


def load_transformers(directory: Path, dtype: Any, **options: Any) -> Any:
    """transformers' model of a Hugging Face directory; `dtype` is torch's.

    Raises:
      CheckpointError: a GGUF file, or a directory that gptjax converted or that transformers cannot load.
    """
    import transformers

    if directory.is_file():
        raise CheckpointError(
            f"{directory} is a GGUF file; name the Hugging Face directory it was made from, or one with the same "
            f"weights expanded: gptjax convert {directory} DIRECTORY --to hf"
        )
    if is_converted(directory):
        raise CheckpointError(f"{directory} was converted by gptjax; name the Hugging Face directory it was made from")
    transformers.utils.logging.disable_progress_bar()
    try:
        return transformers.AutoModelForCausalLM.from_pretrained(
            directory, dtype=dtype, local_files_only=True, use_safetensors=True, **options
        )
    except (OSError, ValueError) as error:
        raise CheckpointError(f"transformers cannot load {directory}: {error}") from error


def random_transformers(config: ModelConfig, dtype: Any) -> Any:
    """transformers' model of a configuration, with random weights; `dtype` is torch's."""
    _, transformers = oracle()
    raw = config.to_json()
    raw.pop("quantization_config", None)  # transformers would pack random weights with code other than that measured
    theirs = transformers.AutoConfig.for_model(raw.pop("model_type"), **raw)
    return transformers.AutoModelForCausalLM.from_config(theirs).to(dtype)
