"""`gptjax bench-server`."""

import argparse
import json
import math
import os
from typing import TYPE_CHECKING, Any

from gptjax.cli.common import add_command

if TYPE_CHECKING:
    from gptjax.bench.serving.load import Load
    from gptjax.bench.serving.result import Result

_URL = "http://127.0.0.1:8000/v1"
_REQUESTS_OF_A_CLIENT = 4


def add(commands: Any) -> None:
    """Declares the command."""
    parser = add_command(
        commands,
        "bench-server",
        run,
        summary="measure a server under load: throughput, and the latencies that clients see",
        epilog="""For any server that has OpenAI's POST /v1/completions with token ids as prompts, and knows
`ignore_eos`; only gptjax's own was tried. Each number of clients, or each rate, is measured by itself, after a request
that is not counted. A client sends its next request when it has the answer to the last one. "Gap" is the time between
two events of a stream; a server may send several tokens in one.

examples:
  gptjax bench-server --clients 1 8 32 --prompt-length 512 --output-length 256
  gptjax bench-server http://gpu:8080/v1 --rate 2 4 8 --requests 200 --plot latency.svg
  gptjax bench-server --clients 64 --prompt-length 2080 --shared-prefix 2048 --json""",
    )
    parser.add_argument("url", nargs="?", default=_URL, help=f"the server's API (default: {_URL})")
    parser.add_argument("--model", metavar="NAME", help="a model to ask for (default: the first that the server names)")
    parser.add_argument(
        "--clients", type=int, nargs="+", metavar="C", help="clients at once (default: 1 8 32, without --rate)"
    )
    parser.add_argument(
        "--rate", type=float, nargs="+", metavar="R", help="instead, requests per second, at random times"
    )
    parser.add_argument(
        "--requests",
        type=int,
        metavar="N",
        help=f"requests to measure (default: {_REQUESTS_OF_A_CLIENT} for each client, or 10 s at the rate)",
    )
    parser.add_argument(
        "--prompt-length", type=int, default=512, metavar="T", help="prompt tokens, with random ids (default: 512)"
    )
    parser.add_argument("--prompts", metavar="FILE", help="instead, take turns with the lines of a text file")
    parser.add_argument(
        "--shared-prefix", type=int, default=0, metavar="T", help="prompt tokens that are the same in all requests"
    )
    parser.add_argument("--output-length", type=int, default=128, metavar="T", help="tokens to ask for (default: 128)")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="X", help="of sampling (default: 0)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of random prompts and times (default: 0)")
    parser.add_argument(
        "--timeout", type=float, default=600.0, metavar="S", help="seconds for an answer (default: 600)"
    )
    parser.add_argument(
        "--processes", type=int, metavar="N", help="processes to run the clients in (default: as needed)"
    )
    parser.add_argument(
        "--api-key", metavar="KEY", help="of the server (default: the environment's OPENAI_API_KEY, if it is set)"
    )
    parser.add_argument("--plot", metavar="FILE", help="draw throughput against latency: PNG, PDF or SVG")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    from gptjax.bench.serving.clients import run as send
    from gptjax.bench.serving.plot import plot
    from gptjax.bench.serving.result import Result
    from gptjax.support.plots import check_plot

    url = _checked(args)
    if args.plot is not None:
        check_plot(args.plot)
    key = args.api_key or os.environ.get("OPENAI_API_KEY")
    model = args.model or _first_model(url, key)
    results: list[Result] = []
    if not args.json:
        print(f"{model} at {url}, {_asked(args)}")
        print(_HEAD)
    for number, load in enumerate(_loads(args, model)):
        _try(url, key, load, number)
        results.append(Result(load, send(url, key, load, args.processes)))
        if not args.json:
            _print(results[-1])
    if args.json:
        facts = {"url": url, "model": model, "prompts": args.prompts, "output_length": args.output_length}
        if args.prompts is None:
            facts |= {"prompt_length": args.prompt_length, "shared_prefix": args.shared_prefix}
        print(json.dumps({**facts, "results": [result.to_json() for result in results]}))
    if args.plot is not None:
        plot(results, args.plot, title=f"{model}, {_asked(args)}")
    return 0 if all(not result.errors for result in results) else 1


_HEAD = (
    f"{'':24} {'tokens/s':^17}  {'first token, ms':^20}  {'gap, ms':^20}  {'whole answer, s':^20}\n"
    f"{'clients':>9} {'requests':>8} {'/s':>5} {'output':>8} {'total':>8}  " + "  ".join(["   p50    p90    p99"] * 3)
)


def _print(result: "Result") -> None:
    from gptjax.bench.serving.result import PERCENTILES, percentile

    def latencies(seconds: list[float], unit: float, digits: int) -> str:
        return " ".join(f"{percentile(seconds, share) * unit:6.{digits}f}" for share in PERCENTILES)

    load = result.load
    print(
        f"{load.clients if load.clients is not None else f'{load.rate:g}/s':>9} {len(result.served):8} "
        f"{len(result.served) / result.seconds:5.1f} {result.output_rate:8.0f} {result.total_rate:8.0f}  "
        f"{latencies(result.first, 1e3, 0)}  {latencies(result.gaps, 1e3, 1)}  {latencies(result.whole, 1, 2)}",
        flush=True,
    )
    for error, count in result.errors.items():
        print(f"          {count} failed: {error}")
    if result.clients_are_slow:
        print(
            f"          a process of the clients computed {result.measured.busy:.0%} of the time: these may be the "
            "clients' own figures; run them on another machine, or in more --processes"
        )


def _checked(args: argparse.Namespace) -> str:
    """The URL of the API, without a slash at its end. Raises `RequestError` if an argument makes no sense."""
    from urllib.parse import urlsplit

    from gptjax.errors import RequestError

    for name in ("clients", "rate", "requests", "prompt_length", "output_length", "processes", "timeout"):
        values = getattr(args, name)
        for value in values if isinstance(values, list) else [values]:
            if value is not None and not (1 <= value < math.inf or (name in ("rate", "timeout") and 0 < value < 1)):
                least = "a number above 0" if name in ("rate", "timeout") else "at least 1"
                raise RequestError(f"--{name.replace('_', '-')} must be {least}, found {value:g}")
    if args.clients is not None and args.rate is not None:
        raise RequestError("--clients send when they have an answer, --rate does not wait: leave one of them out")
    if not 0 <= args.shared_prefix < args.prompt_length:
        raise RequestError(
            f"--shared-prefix must be less than --prompt-length ({args.prompt_length}), found {args.shared_prefix}"
        )
    if args.shared_prefix and args.prompts:
        raise RequestError("--shared-prefix is for random ids: leave out --prompts, or put the beginning into the file")
    try:
        url = urlsplit(args.url)
        _ = url.port
    except ValueError as error:
        raise RequestError(f"{args.url} is not a URL ({error})") from None
    if url.scheme not in ("http", "https") or not url.hostname:
        raise RequestError(f"{args.url} is not the URL of an API; it looks like {_URL}")
    return str(args.url).rstrip("/")


def _loads(args: argparse.Namespace, model: str) -> "list[Load]":
    """What to measure, one after another. Each has prompts of its own, which the server cannot have kept."""
    from gptjax.bench.serving.load import Load

    texts = _lines(args.prompts) if args.prompts else ()
    common = {"model": model, "prompt_length": args.prompt_length, "shared_prefix": args.shared_prefix, "texts": texts}
    common |= {"output_length": args.output_length, "temperature": args.temperature, "timeout": args.timeout}
    loads = []
    for number, value in enumerate(args.rate or args.clients or [1, 8, 32]):
        clients, rate = (None, value) if args.rate else (value, None)
        requests = args.requests or (_REQUESTS_OF_A_CLIENT * value if clients else max(1, round(10 * value)))
        loads.append(Load(requests=requests, clients=clients, rate=rate, seed=1000 * args.seed + number, **common))
    return loads


def _lines(path: str) -> tuple[str, ...]:
    from pathlib import Path

    from gptjax.errors import RequestError

    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"{path} cannot be read as text ({error})") from None
    found = tuple(line for line in lines if line.strip())
    if not found:
        raise RequestError(f"{path} has no prompts: write one a line")
    return found


def _first_model(url: str, key: str | None) -> str:
    """The first model that a server names."""
    import asyncio
    from urllib.parse import urlsplit

    from gptjax.bench.serving.stream import Endpoint, answer
    from gptjax.errors import GptjaxError

    try:
        return str(json.loads(asyncio.run(answer(Endpoint(urlsplit(url), key), "GET", "/models")))["data"][0]["id"])
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise GptjaxError(
            f"{url}/models does not say which models there are ({error}): is a server running there? Start one with "
            "gptjax serve, or name its model with --model"
        ) from None


def _try(url: str, key: str | None, load: "Load", number: int) -> None:
    """One request that is not counted, so that what a server does once is not measured. Raises if it fails."""
    import asyncio
    import dataclasses
    from urllib.parse import urlsplit

    from gptjax.bench.serving.stream import Endpoint, completion
    from gptjax.errors import GptjaxError

    endpoint, other = Endpoint(urlsplit(url), key), dataclasses.replace(load, seed=-1 - number)
    record = asyncio.run(completion(endpoint, endpoint.completion(other.body(0)), timeout=load.timeout))
    if record.error is not None:
        raise GptjaxError(f"{url}/completions fails: {record.error}")


def _asked(args: argparse.Namespace) -> str:
    shared = f", {args.shared_prefix} of them shared" if args.shared_prefix else ""
    source = f"prompts from {args.prompts}" if args.prompts else f"{args.prompt_length} tokens in{shared}"
    return f"{source}, {args.output_length} out"
