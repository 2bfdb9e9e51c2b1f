"""`gptjax serve`."""

import argparse
import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final, TypeVar

from gptjax.cli.common import (
    CACHE_DTYPE,
    HOSTS,
    MESH_HELP,
    MODEL_HELP,
    PACKED,
    PACKED_HELP,
    add_command,
    add_overrides,
    followed,
    joined,
    mesh,
    model_name,
    overrides,
    packed,
)
from gptjax.support.processes import leave

if TYPE_CHECKING:
    from gptjax.checkpoints.checkpoint import Checkpoint
    from gptjax.language_model import LanguageModel
    from gptjax.server.worker.front_process import FrontProcess

_Number = TypeVar("_Number", int, float)
_PREFIX: Final = "GPTJAX_SERVE_"
_DEFAULT_LENGTH: Final = 8192
_LEVELS: Final = ("debug", "info", "warning", "error")
_CHUNK: Final = 1024
_CHUNKS: Final = tuple(1 << power for power in range(5, 12))
_CHUNKS_TEXT: Final = f"a power of two from {_CHUNKS[0]} to {_CHUNKS[-1]}"
_YES_OR_NO: Final = ("yes", "no")


def add(commands: Any) -> None:
    """Declares the command. Most options have an environment variable too, which the option overrides."""
    parser = add_command(
        commands,
        "serve",
        run,
        summary="serve a model over HTTP with OpenAI's API",
        epilog=f"""Every option has an environment variable, {_PREFIX}MAX_QUEUE for --max-queue and so on (except
--ignore-config and --no-generation-config).
The server listens on this machine only, unless --host says otherwise; if it does, set a key, ideally in
{_PREFIX}API_KEY.

examples:
  gptjax serve
  gptjax serve -m openai/gpt-oss-20b --max-batch 16 --max-length 32768 --memory 0.9
  {_PREFIX}API_KEY=secret gptjax serve -m ./my-gpt2 --host 0.0.0.0""",
    )
    _option(parser, "-m", "--model", help=MODEL_HELP)
    _option(parser, "--name", metavar="NAME", help="what clients call the model (default: the value of --model)")
    _option(
        parser,
        "--alias",
        type=_aliases,
        default=[],
        metavar="NAMES",
        help="other names for it, separated by commas, such as 'claude-*', where * at the end stands for anything",
    )
    _option(parser, "--host", default="127.0.0.1", help="the address to listen on (default: 127.0.0.1)")
    _option(parser, "--port", type=_port, default=8000, metavar="N", help="(default: 8000; 0 picks a free one)")
    _option(parser, "--api-key", metavar="KEY", help="what clients must send (default: anything works)")
    _option(
        parser,
        "--cors-origins",
        default="",
        metavar="ORIGINS",
        help="origins, separated by commas, whose web pages may use the server, or *",
    )
    _option(parser, "--max-batch", type=_size, default=8, metavar="N", help="requests computed together (default: 8)")
    _option(parser, "--max-queue", type=_size, default=64, metavar="N", help="requests that may wait (default: 64)")
    _option(
        parser,
        "--prefill-chunk",
        type=_chunk,
        default=_CHUNK,
        metavar="N",
        help=f"prompt tokens read between two steps: {_CHUNKS_TEXT} (default: {_CHUNK}); running streams wait for "
        "them, and a conversation reuses the cache in multiples of this",
    )
    _option(
        parser,
        "--max-length",
        type=int,
        metavar="N",
        help=f"tokens of prompt and output (default: $GPTJAX_MAX_LENGTH, else the model's, up to {_DEFAULT_LENGTH})",
    )
    _option(
        parser,
        "--memory",
        metavar="SHARE",
        help="the share of the device's memory to use, such as 0.9; or the number of tokens that the cache has room "
        "for, such as 262144tokens (default: 0.75 of a GPU, which is what JAX takes; on a CPU, up to half of the free "
        "memory for the cache)",
    )
    _option(
        parser,
        "--exact",
        choices=_YES_OR_NO,
        help="whether a request gets the same bits whatever else runs or ran before; where that is not free, each step "
        "then computes all --max-batch rows, and each prompt is read by itself (default: yes where it is free: on a "
        "CPU in float32, and on a Hopper GPU with GPT-OSS, Llama, Qwen and, up to 8 slots, GPT-2 in bfloat16; else no)",
    )
    _option(parser, "--dtype", help="float32, bfloat16 or float16 (default: float32 on a CPU, else bfloat16)")
    _option(parser, "--cache-dtype", **CACHE_DTYPE)
    _option(parser, "--packed", choices=tuple(PACKED), help=PACKED_HELP)
    _option(parser, "--mesh", metavar="SIZES", help=MESH_HELP)
    for name, settings in HOSTS.items():
        _option(parser, name, **settings)
    _option(parser, "--tokenizer", metavar="PATH", help="take the tokenizer from this directory or GGUF file instead")
    _option(
        parser,
        "--chat-format",
        metavar="NAME",
        help="how conversations are written, such as chatml (default: recognised by the checkpoint's chat template)",
    )
    add_overrides(parser)
    _option(
        parser, "--max-body", type=_size, default=10 << 20, metavar="BYTES", help="largest request (default: 10485760)"
    )
    _option(
        parser,
        "--store-responses",
        type=_amount,
        default=1000,
        metavar="N",
        help="responses kept in memory for clients that continue them, 256 MiB at most; 0 keeps none (default: 1000)",
    )
    _option(
        parser,
        "--send-timeout",
        type=_seconds,
        default=30.0,
        metavar="SECONDS",
        help="disconnect a client idle for this long (default: 30)",
    )
    _option(
        parser,
        "--drain",
        type=_seconds,
        default=30.0,
        metavar="SECONDS",
        help="time for open requests to finish on SIGTERM (default: 30)",
    )
    _option(parser, "--log-format", choices=("lines", "json"), default="lines", help="(default: lines)")
    _option(parser, "--log-level", choices=_LEVELS, default="info", help="(default: info)")


def _option(parser: argparse.ArgumentParser, *names: str, **settings: Any) -> None:
    """Declares an option whose default is its environment variable's value, if that is set."""
    variable = _PREFIX + names[-1].removeprefix("--").replace("-", "_").upper()
    given = os.environ.get(variable)
    if given is not None:
        settings["default"] = given
    parser.add_argument(*names, **settings)


def _port(text: str) -> int:
    return _whole(text, 0, 65535)


def _size(text: str) -> int:
    return _whole(text, 1, 1 << 40)


def _amount(text: str) -> int:
    return _whole(text, 0, 1 << 40)


def _chunk(text: str) -> int:
    if _number(text, int) not in _CHUNKS:
        raise argparse.ArgumentTypeError(f"{text} is not {_CHUNKS_TEXT}")
    return int(text)


def _whole(text: str, low: int, high: int) -> int:
    number = _number(text, int)
    if not low <= number <= high:
        raise argparse.ArgumentTypeError(f"{number} is not from {low} to {high}")
    return number


def _seconds(text: str) -> float:
    number = _number(text, float)
    if not 0 <= number <= 86400:
        raise argparse.ArgumentTypeError(f"{text} is not from 0 to 86400 seconds")
    return number


def _number(text: str, kind: type[_Number]) -> _Number:
    try:
        return kind(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a {'whole ' * (kind is int)}number") from None


def _aliases(text: str) -> list[str]:
    names = _listed(text)
    if inner := [name for name in names if "*" in name[:-1]]:
        raise argparse.ArgumentTypeError(f"{inner[0]!r} is not a name or a beginning with * at its end")
    return names


def _listed(text: str) -> list[str]:
    return [each.strip() for each in text.split(",") if each.strip()]


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    with _ends_at_once():
        status = _run(args)
        if threading.active_count() > 1:
            leave(status)
    return status


@contextlib.contextmanager
def _ends_at_once() -> Iterator[None]:
    """Lets SIGTERM and SIGINT end the process with 0: before the server listens, no client is waiting."""
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.signal(number, lambda *_: leave(0)) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _run(args: argparse.Namespace) -> int:
    import dataclasses
    import logging.config

    from gptjax.checkpoints.checkpoint import open_checkpoint
    from gptjax.errors import GptjaxError
    from gptjax.server import logs
    from gptjax.server.ipc.messages import Text
    from gptjax.server.worker.front_process import FrontProcess

    _check(args)
    log_config = logs.config(args.log_format, args.log_level)
    logging.config.dictConfig(log_config)
    checkpoint = open_checkpoint(model_name(args), **overrides(args))
    text = Text(dataclasses.replace(checkpoint, gguf=None), args.tokenizer, args.chat_format, log_config)
    with joined(args) as follows:
        if follows:
            return _load_and_follow(args, checkpoint)
        with FrontProcess(text) as front:  # it starts and reads the tokenizer while this one loads weights
            status = _load_and_serve(args, checkpoint, front)
        if status and args.coordinator is not None:
            raise GptjaxError("the server died: its log says why")  # so that all processes end with an error
        return status


def _check(args: argparse.Namespace) -> None:
    """Raises `RequestError` for what argparse does not check: choices from the environment, and what is installed."""
    import importlib.util

    from gptjax.errors import RequestError
    from gptjax.support.installation import with_extra

    choices = {"log_format": ("lines", "json"), "log_level": _LEVELS, "packed": tuple(PACKED), "exact": _YES_OR_NO}
    for name, known in choices.items():
        if getattr(args, name) not in (None, *known):
            raise RequestError(
                f"{_PREFIX}{name.upper()} is {getattr(args, name)!r}; expected one of {', '.join(known)}"
            )
    for name in ("starlette", "uvicorn", "prometheus_client"):
        if importlib.util.find_spec(name) is None:
            raise RequestError(f"serving needs {name}, which is not installed: {with_extra('serve')}")


def _load_and_follow(args: argparse.Namespace, checkpoint: "Checkpoint") -> int:
    # Those who end a job signal all of it, but process 0 first finishes what is open.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    lm = _load(args, checkpoint)
    return followed(lm.model, lm.params)


def _load(args: argparse.Namespace, checkpoint: "Checkpoint") -> "LanguageModel":
    import logging
    import time

    import psutil

    from gptjax.api import load_checkpoint
    from gptjax.engine.limits import positions

    # The cache has room for at least one request of this length: 3 GB for the 131072 tokens of gpt-oss-20b.
    length = positions(checkpoint.config, args.max_length, default=_DEFAULT_LENGTH)
    imported, started = time.time() - psutil.Process().create_time(), time.monotonic()
    lm = load_checkpoint(
        checkpoint,
        dtype=args.dtype,
        cache_dtype=args.cache_dtype,
        max_length=length,
        max_batch=args.max_batch,
        memory=args.memory,
        exact=None if args.exact is None else args.exact == "yes",
        packed=packed(args),
        mesh=mesh(args),
        tokenizer=args.tokenizer,
        chat_format=args.chat_format,
    )
    logging.getLogger(__name__).info(
        "Python and its modules took %.1f s, the weights %.1f s", imported, time.monotonic() - started
    )
    return lm


def _load_and_serve(args: argparse.Namespace, checkpoint: "Checkpoint", front: "FrontProcess") -> int:
    from gptjax.server.ipc.settings import Limits
    from gptjax.server.worker import hosting

    lm = _load(args, checkpoint)
    lm.defaults.check()  # now, not at the first request
    return hosting.serve(
        lm,
        hosting.facts_of(
            lm,
            args.name or model_name(args),
            aliases=args.alias,
            checkpoint=checkpoint,
            tokenizer_from=args.tokenizer,
        ),
        front,
        max_queue=args.max_queue,
        prefill_chunk=args.prefill_chunk,
        limits=Limits(body_bytes=args.max_body, send_seconds=args.send_timeout, stored_responses=args.store_responses),
        options={
            "host": args.host,
            "port": args.port,
            "api_key": args.api_key or None,
            "cors_origins": [each.rstrip("/") for each in _listed(args.cors_origins)],
            "drain_seconds": args.drain,
        },
    )
