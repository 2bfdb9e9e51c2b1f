"""Runs plans on the devices of several processes: process 0 makes them, and the others follow."""

import dataclasses
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from gptjax._version import __version__
from gptjax.engine import sampling
from gptjax.engine.executor import Executor
from gptjax.engine.flat_params import AnyParams
from gptjax.engine.request import Request, SamplingParams
from gptjax.engine.settings import Features, Words
from gptjax.errors import RequestError
from gptjax.models.registry import Model
from gptjax.scheduling.plan import Plan
from gptjax.scheduling.policy import Policy
from gptjax.sharding import hosts
from gptjax.structured import Grammar


class LeadingExecutor(Executor):
    """Process 0's. Before it dispatches anything, it tells the other processes."""

    most_losses = 0  # the others do not know that a program failed here

    def __init__(
        self,
        leader: hosts.Leader,
        model: Model,
        params: AnyParams,
        *,
        policy: Policy,
        pages: Sequence[int],
        max_length: int,
        levels: Sequence[Features] = (),
    ):
        self._leader = leader
        plain = [dataclasses.asdict(level) for level in levels]
        leader.send("make", _digest(model), dataclasses.asdict(policy), tuple(pages), max_length, plain)
        super().__init__(model, params, policy=policy, pages=pages, max_length=max_length, levels=levels)

    def run(self, plan: Plan, requests: Mapping[int, Request], words_BW: Words = None) -> sampling.Sampled | None:
        """Dispatches a plan in all processes."""
        joining = [(join.request, _plain(requests[join.request])) for join in plan.joins]
        with self._leader.step("run", plan.to_json(), joining, array=words_BW):
            return super().run(plan, requests, words_BW)

    def warm_up(self) -> None:
        """Compiles all programs in all processes."""
        with self._leader.step("warm_up"):
            super().warm_up()

    @property
    def result(self) -> jax.Array:
        """An array that is there when all plans so far have run."""
        with self._leader.step("result"):
            return super().result


def executor_of(model: Model, params: AnyParams, **how: Any) -> Executor:
    """The executor of an engine, as of `Executor`: one that leads, if the model's mesh is that of several processes.

    Raises:
      RequestError: this process is not the one that leads.
    """
    mesh = model.own.mesh
    if not (isinstance(mesh, Mesh) and mesh.is_multi_process):
        return Executor(model, params, **how)
    leader = hosts.current()
    if not isinstance(leader, hosts.Leader):
        raise RequestError(
            "the mesh has devices of several processes, and only process 0 of those that `hosts.joined` has joined "
            "takes requests: the others call `follow`"
        )
    return LeadingExecutor(leader, model, params, **how)


def follow(model: Model, params: AnyParams) -> None:
    """Does what process 0 does with the same model, until it ends. For the other processes of `hosts.joined`.

    Raises:
      RequestError: process 0 has another model, or other versions of JAX or gptjax.
    """
    follower = hosts.current()
    assert isinstance(follower, hosts.Follower)
    execute(model, params, follower.messages())


def execute(model: Model, params: AnyParams, messages: Iterable[tuple[Any, np.ndarray | None]]) -> Executor | None:
    """Does what messages of a `LeadingExecutor` say. Returns the last executor. Raises what `follow` does."""
    executor: Executor | None = None
    for (kind, *rest), words_BW in messages:
        if kind == "make":
            executor = None  # frees its pools first
            executor = _made(model, params, *rest)
            continue
        assert executor is not None
        if kind == "run":
            text, joining = rest
            executor.run(Plan.from_json(text), {number: _request(*plain) for number, plain in joining}, words_BW)
        elif kind == "warm_up":
            executor.warm_up()
        else:
            _ = executor.result
    return executor


def _made(
    model: Model,
    params: AnyParams,
    digest: str,
    policy: dict[str, Any],
    pages: list[int],
    max_length: int,
    levels: list[dict[str, Any]],
) -> Executor:
    if digest != _digest(model):
        raise RequestError(
            "this process does not have the same model as process 0, or not the same version of gptjax or JAX: start "
            "all of them with the same options"
        )
    found = [Features(**level) for level in levels]
    return Executor(model, params, policy=Policy(**policy), pages=pages, max_length=max_length, levels=found)


def _digest(model: Model) -> str:
    return hashlib.sha256(f"{__version__} {jax.__version__} {model!r}".encode()).hexdigest()


def _plain(request: Request) -> tuple[Any, ...]:
    """What an executor asks of a request."""
    params = dataclasses.asdict(request.params) | {"logit_bias": list(request.params.logit_bias.items())}
    prompt_ids = tuple(request.prompt_ids) if request.params.penalises else ()
    return params, prompt_ids, request.max_tokens, request.grammar is not None


def _request(params: dict[str, Any], prompt_ids: list[int], max_tokens: int, constrained: bool) -> Request:
    params = params | {"logit_bias": dict(params["logit_bias"])}
    grammar = Grammar("") if constrained else None  # only process 0 knows which: it sends what may be drawn
    return Request(tuple(prompt_ids), max_tokens, SamplingParams(**params), grammar=grammar)
