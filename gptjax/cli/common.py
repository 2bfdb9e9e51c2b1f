"""What the commands share."""

import argparse
import contextlib
import difflib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from gptjax.models.params import Params
    from gptjax.models.registry import Model

DEFAULT_CHAT_MODEL: Final = "gpt-oss-tales"
EFFORTS: Final = ("low", "medium", "high")
MODEL_HELP = (
    "a demo (gpt2-tales, the default), a directory (a Hugging Face checkpoint, or one that `gptjax convert` wrote), a "
    "GGUF file, smollm2, or a Hub id such as openai-community/gpt2"
)


class CommandParser(argparse.ArgumentParser):
    """Parses a command's arguments. An unknown one is an error that shows this command's options.

    (argparse leaves that to the main parser, which shows the list of commands.)
    """

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> tuple[Any, list[str]]:
        """Like argparse's, but leftovers are an error."""
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:
            known = [option for action in self._actions for option in action.option_strings]
            near = [near for given in unknown for near in difflib.get_close_matches(given.split("=")[0], known, n=1)]
            meant = f" (did you mean {' and '.join(near)}?)" if near else ""
            self.error(f"unrecognized arguments: {' '.join(unknown)}{meant}")
        return found, unknown

    def format_help(self) -> str:
        """Like argparse's. An epilog that takes time to write is a function, which is called only now."""
        if callable(self.epilog):
            self.epilog = self.epilog()
        return super().format_help()


def model_name(args: argparse.Namespace) -> str:
    """The requested model, or the default. (An empty name, as from an unset variable, is an error later.)"""
    from gptjax.api import DEFAULT_MODEL

    return DEFAULT_MODEL if args.model is None else str(args.model)


def add_command(
    commands: Any,
    name: str,
    run: Callable[[argparse.Namespace], int],
    *,
    summary: str,
    epilog: str | Callable[[], str],
) -> argparse.ArgumentParser:
    """A subcommand: `run` gets its arguments and returns the exit status."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run, parser=parser)
    return parser


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Declares the options of `gptjax.load`."""
    add_dtype(parser)
    add_cache_dtype(parser)
    add_packed(parser)
    parser.add_argument("--max-length", type=int, metavar="N", help="positions per sequence (default: the model's)")


def add_dtype(parser: argparse.ArgumentParser) -> None:
    """Declares --dtype, for weights and computation."""
    parser.add_argument("--dtype", help="float32, bfloat16 or float16 (default: float32 on a CPU, else bfloat16)")


CACHE_DTYPE: Final[dict[str, Any]] = {
    "choices": ("fp8",),
    "help": "keep keys and values as float8_e4m3fn with scales, in half the memory of bfloat16 (default: --dtype)",
}


def add_cache_dtype(parser: argparse.ArgumentParser) -> None:
    """Declares --cache-dtype."""
    parser.add_argument("--cache-dtype", **CACHE_DTYPE)


PACKED: Final = {"keep": True, "expand": False}  # what `load(packed=)` takes
PACKED_HELP: Final = (
    "whether a GGUF file's packed weights stay packed in memory (default: keep; on a CPU, expand if there is room, "
    "which is faster)"
)


def add_packed(parser: argparse.ArgumentParser) -> None:
    """Declares --packed."""
    parser.add_argument("--packed", choices=tuple(PACKED), help=PACKED_HELP)


def packed(args: argparse.Namespace) -> bool | None:
    """The argument of `gptjax.load` from --packed."""
    return None if args.packed is None else PACKED[args.packed]


MESH_HELP: Final = (
    "divide the model and its rows among several devices, as in tensor=2 or data=2,tensor=2,expert=4 "
    "(see docs/more-than-one-device.md)"
)


def add_mesh(parser: argparse.ArgumentParser) -> None:
    """Declares --mesh."""
    parser.add_argument("--mesh", metavar="SIZES", help=MESH_HELP)


def mesh(args: argparse.Namespace) -> dict[str, int] | None:
    """The argument of `gptjax.load` from --mesh. Raises `RequestError`."""
    from gptjax.sharding.mesh import parsed

    return None if args.mesh is None else parsed(args.mesh)


HOSTS: Final[Mapping[str, dict[str, Any]]] = {
    "--coordinator": {
        "metavar": "HOST:PORT",
        "help": "run one model with other processes, usually on other hosts, that --mesh also has the devices of: an "
        "address of process 0 and a free port there; or auto, if Slurm, Open MPI or a TPU's environment says all of it "
        "(see docs/deployment.md)",
    },
    "--num-processes": {"type": int, "metavar": "N", "help": "with --coordinator: how many processes there are"},
    "--process-id": {
        "type": int,
        "metavar": "I",
        "help": "with --coordinator: which of them this is; 0 does the command, the others only compute for it",
    },
}


def add_hosts(parser: argparse.ArgumentParser) -> None:
    """Declares the options of `joined`."""
    for name, settings in HOSTS.items():
        parser.add_argument(name, **settings)


@contextlib.contextmanager
def joined(args: argparse.Namespace) -> Iterator[bool]:
    """Joins the other processes that --coordinator asks for, as long as the body runs.

    Yields:
      Whether this process follows another: then `followed` is all that it does with the model.
    """
    from gptjax.errors import RequestError

    numbers = args.num_processes, args.process_id
    if args.coordinator is None:
        if numbers != (None, None):
            raise RequestError("--num-processes and --process-id need --coordinator, the address of process 0")
        yield False
        return

    from gptjax.sharding import hosts

    if args.mesh is None:
        raise RequestError("--coordinator needs --mesh, which divides the model among the devices of all processes")
    if args.coordinator == hosts.AUTO:
        numbers = None, None
    elif None in numbers or not 0 <= args.process_id < args.num_processes:
        raise RequestError("--coordinator HOST:PORT needs --num-processes N, and --process-id from 0 to N - 1")
    elif not args.coordinator.rpartition(":")[2].isdecimal():
        raise RequestError(f"--coordinator is an address with a port, such as 10.0.0.1:1234, not {args.coordinator!r}")
    with hosts.joined(args.coordinator, *numbers) as follows:
        yield follows


def followed(model: "Model", params: "Params") -> int:
    """Computes for process 0 until it ends. Returns the exit status."""
    import signal

    from gptjax.engine.leading import follow

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # what a Ctrl-C means, process 0 decides
    follow(model, params)
    return 0


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """Declares the options that ignore parts of config.json and generation_config.json."""
    add_ignore_config(parser)
    parser.add_argument(
        "--no-generation-config",
        action="store_true",
        help="ignore generation_config.json, except for its BOS and EOS tokens",
    )


def add_ignore_config(parser: argparse.ArgumentParser) -> None:
    """Declares the option that ignores keys of config.json."""
    parser.add_argument(
        "--ignore-config",
        action="append",
        default=[],
        metavar="KEY",
        help="ignore this key of config.json, if you know that it changes nothing; may be repeated",
    )


def overrides(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `gptjax.load` from the options that `add_overrides` or `add_ignore_config` declared."""
    given: dict[str, Any] = {}
    if args.ignore_config:
        given["ignore_config"] = tuple(args.ignore_config)
    if getattr(args, "no_generation_config", False):
        given["generation_config"] = False
    return given


def add_tokenizer(parser: argparse.ArgumentParser) -> None:
    """Declares --tokenizer."""
    parser.add_argument(
        "--tokenizer", metavar="PATH", help="take the tokenizer from this directory or GGUF file instead"
    )


def add_chat_format(parser: argparse.ArgumentParser) -> None:
    """Declares --chat-format."""
    parser.add_argument(
        "--chat-format",
        metavar="NAME",
        help="how conversations are written, such as chatml; an unknown name lists all (default: recognised by the "
        "checkpoint's chat template)",
    )


def read_stdin() -> str:
    """All of standard input. Raises `RequestError` if it is not text."""
    from gptjax.errors import RequestError

    try:
        # The last newline, of a file or of echo, is not meant as part of the prompt.
        text = sys.stdin.read().removesuffix("\n")
        text.encode()  # in some locales Python reads bytes that are not UTF-8 as lone surrogates
        return text
    except UnicodeError as error:
        raise RequestError(f"standard input is not UTF-8 text ({error}); convert it first, as with iconv") from None
