"""Measures models: medians with their spread, without compilation and first calls, against the same run's ceiling."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from gptjax.bench.figure import Figure, timed
from gptjax.bench.loading import peak_memory
from gptjax.config import ModelConfig
from gptjax.diagnostics.transformers_comparison import load_transformers, oracle, random_transformers
from gptjax.engine import cost, memory
from gptjax.engine.engine import Engine
from gptjax.engine.request import Request, SamplingParams
from gptjax.errors import CapacityError
from gptjax.models.params import Params
from gptjax.models.registry import Model


@dataclasses.dataclass(frozen=True)
class Result:
    """One model at one batch size and prompt length."""

    engine: str  # "gptjax" or "transformers"
    batch: int
    prompt_length: int
    steps: int  # decode steps in each measurement
    compile: float  # seconds to trace and compile in the first round; executables that are on disk need neither
    peak_memory: int  # the most bytes that the device (on a CPU, the process) held up to the end of this measurement
    prefill: Figure  # of all rows' prompts
    step: Figure  # one decode step of all rows: the mean over `steps`
    bytes_per_step: int  # the bytes that must move
    flops_per_step: int

    @property
    def prefill_tokens_per_second(self) -> float:
        """Prompt tokens of all rows together."""
        return self.batch * self.prompt_length / self.prefill.median

    @property
    def decode_tokens_per_second(self) -> float:
        """Tokens of all rows together."""
        return self.batch / self.step.median

    def share(self, ceiling: float) -> float | None:
        """Decoding's share of the memory's speed in bytes a second; None for other engines, whose reads are unknown."""
        if self.engine != "gptjax":
            return None
        return self.bytes_per_step / self.step.median / ceiling

    def to_json(self, ceiling: float) -> dict[str, Any]:
        """Everything for JSON, in SI units."""
        return {
            **dataclasses.asdict(self),
            "prefill_seconds": self.prefill.median,
            "prefill_spread_seconds": self.prefill.spread,
            "prefill_tokens_per_second": self.prefill_tokens_per_second,
            "step_seconds": self.step.median,
            "step_spread_seconds": self.step.spread,
            "decode_tokens_per_second": self.decode_tokens_per_second,
            "share_of_ceiling": self.share(ceiling),
            "prefill_noisy": self.prefill.noisy,
            "step_noisy": self.step.noisy,
        }


def needed_length(config: ModelConfig, prompt_length: int, steps: int) -> int:
    """The positions that a measurement needs. Raises `CapacityError` if the model does not have them."""
    # One step more than measured: the first also waits for the prefill.
    length = prompt_length + steps + 1
    if length > config.context_length:
        raise CapacityError(
            f"{prompt_length} prompt tokens and {steps} steps need {length} positions, but the model has only "
            f"{config.context_length}; choose a shorter prompt or fewer steps"
        )
    return length


Turn = Callable[[], tuple[float, float]]  # one measurement: seconds of prefill, seconds of one step


def ours(model: Model, params: Params, *, batch: int, prompt_length: int, steps: int, seed: int = 0) -> Turn:
    """Measures gptjax: each turn prefills every row again, then decodes `steps` tokens greedily.

    Raises:
      CapacityError: the prompt and the steps need more positions than the model has.
    """
    length = needed_length(model.config, prompt_length, steps)
    memory.check_state(model, batch=batch, max_length=length)
    engine = Engine(model, params, batch=batch, max_length=length)
    prompts_BT = np.random.default_rng(seed).integers(0, model.config.vocab_size, (batch, prompt_length))
    requests = [Request(tuple(row), steps + 1, SamplingParams(seed=0)) for row in prompts_BT.tolist()]

    def turn() -> tuple[float, float]:
        numbers = [engine.add(request) for request in requests]

        def fill() -> None:
            engine.read()
            engine.wait()

        def decode() -> None:
            for _ in range(steps):
                engine.step()
            engine.wait()

        prefill = timed(fill)
        # After the first step the device is idle, so everything timed below is also dispatched there. (If `steps` is
        # not a multiple of what the engine dispatches at once, up to half that many more steps run uncounted.)
        engine.step()
        engine.wait()
        step = timed(decode) / steps
        for number in numbers:
            engine.end(number)
        return prefill, step

    return turn


def transformers_turn(
    model: Model, *, directory: Any | None, batch: int, prompt_length: int, steps: int, seed: int = 0
) -> Turn:
    """Measures transformers' default `generate` on the same device; random weights if `directory` is None.

    A step's time is that of a long generation minus that of a short one, over the number of steps.

    Raises:
      GptjaxError: transformers or torch is not installed.
    """
    torch, _ = oracle()
    dtype = getattr(torch, np.dtype(model.dtype).name)
    loaded = random_transformers(model.config, dtype) if directory is None else load_transformers(directory, dtype)
    device = "cuda" if jax.default_backend() == "gpu" else "cpu"
    loaded = loaded.to(device).eval()
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, model.config.vocab_size, (batch, prompt_length), generator=generator).to(device)

    def generate(tokens: int) -> None:
        with torch.no_grad():
            loaded.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=tokens,
                min_new_tokens=tokens,
                do_sample=False,
                pad_token_id=0,
            )
        if device == "cuda":
            torch.cuda.synchronize()

    def turn() -> tuple[float, float]:
        short, long = timed(lambda: generate(1)), timed(lambda: generate(steps + 1))
        return short, (long - short) / steps

    return turn


def run(
    turns: Sequence[tuple[str, Turn]], model: Model, *, batch: int, prompt_length: int, steps: int, repeats: int
) -> list[Result]:
    """Takes turns, one of each per round, so that all see the same drift of the machine; the first is not counted."""
    compiling = [_compile_seconds(turn) for _, turn in turns]
    rounds = [[turn() for _, turn in turns] for _ in range(repeats)]
    # In the middle of the measured steps, each row attends to this many positions.
    length, rows = prompt_length + 1 + steps // 2, model.own.rows_of(batch)
    return [
        Result(
            engine=name,
            batch=batch,
            prompt_length=prompt_length,
            steps=steps,
            compile=compiling[index],
            peak_memory=peak_memory(),
            prefill=Figure(tuple(measured[index][0] for measured in rounds)),
            step=Figure(tuple(measured[index][1] for measured in rounds)),
            bytes_per_step=cost.decode_bytes(model, batch=rows, length=length),
            flops_per_step=rows * cost.token_flops(model, length=length),
        )
        for index, (name, _) in enumerate(turns)
    ]


def _compile_seconds(action: Callable[[], Any]) -> float:
    """Seconds that JAX spends tracing, lowering and compiling while the action runs."""
    spent = [0.0]

    def listen(event: str, duration_secs: float, **_: Any) -> None:
        if event.startswith("/jax/core/compile/"):
            spent[0] += duration_secs

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        action()
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    return spent[0]
