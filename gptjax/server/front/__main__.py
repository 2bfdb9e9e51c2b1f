"""The process that speaks HTTP: `python -m gptjax.server.front FD`, started by the one that has the engine.

It does not import JAX. Whatever happens to the other process, this one ends with it.
"""

import logging.config
import signal
import socket
import sys
import threading
from queue import SimpleQueue

from gptjax.errors import GptjaxError
from gptjax.server.front.remote_worker import RemoteWorker
from gptjax.server.front.serving import Server, make_server, make_service, run
from gptjax.server.ipc.channel import Channel
from gptjax.server.ipc.messages import Setup, Text
from gptjax.support.processes import leave
from gptjax.text import Tokenizer

_log = logging.getLogger("gptjax.server.front")  # not "__main__"


def main(descriptor: int) -> int:
    """Serves the model of the process at the other end of a socket. Returns the exit status."""
    channel = Channel(socket.socket(fileno=descriptor))
    text: Text | None = channel.receive()
    if text is None:
        return 0
    logging.config.dictConfig(text.log_config)
    setups: SimpleQueue[Setup] = SimpleQueue()
    threading.Thread(target=_await_setup, args=(channel, setups), daemon=True).start()
    try:
        tokenizer = text.checkpoint.tokenizer_or_reason(text.tokenizer)
    except GptjaxError as error:  # the other process finds the same, says so, and ends
        setups.get()
        _log.error("the tokenizer was readable a moment ago: %s", error)
        return 1
    server = _server(channel, text, setups.get(), tokenizer)
    # SIGINT stays blocked: Ctrl-C goes to all processes of a terminal, and a second one has a meaning of its own.
    signal.signal(signal.SIGTERM, server.handle_exit)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    return run(server)


def _await_setup(channel: Channel, setups: SimpleQueue[Setup]) -> None:
    """Waits for the other process to have loaded the model. If it ends before that, so does this one."""
    setup = channel.receive()
    if setup is None:
        leave(0)
    setups.put(setup)


def _server(channel: Channel, text: Text, setup: Setup, tokenizer: Tokenizer | GptjaxError) -> Server:
    worker = RemoteWorker(channel, setup, on_signal=lambda number: server.handle_exit(number, None))
    service = make_service(
        worker,
        setup.facts,
        tokenizer,
        text.chat_format,
        score=worker.score,
        memory_in_use=worker.memory_in_use,
        limits=setup.limits,
    )
    server = make_server(service, log_config=text.log_config, **setup.options)
    return server


if __name__ == "__main__":
    leave(main(int(sys.argv[1])))
