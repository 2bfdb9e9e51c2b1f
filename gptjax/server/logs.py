"""The log, as lines for people or as JSON for machines, on standard error."""

import json
import logging
import time
from contextvars import ContextVar
from typing import Any, Final

request_id: Final[ContextVar[str | None]] = ContextVar("request_id", default=None)
"""The id of the request being answered."""


class LineFormatter(logging.Formatter):
    """A record as a line, with the id of its request."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        """The time, level, logger and message."""
        name = request_id.get()
        return super().formatMessage(record) + ("" if name is None else f" [{name}]")


class JsonFormatter(logging.Formatter):
    """A record as one line of JSON."""

    def format(self, record: logging.LogRecord) -> str:
        """The time (UTC), level, logger and message; the request's id and the traceback if there are any."""
        seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        found: dict[str, Any] = {
            "time": f"{seconds}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if (name := request_id.get()) is not None:
            found["request_id"] = name
        if record.exc_info:
            found["exception"] = self.formatException(record.exc_info)
        return json.dumps(found)


def config(form: str, level: str) -> dict[str, Any]:
    """For `logging.config.dictConfig`: `form` is "lines" or "json", `level` a level's name in lower case."""
    lines = {"()": LineFormatter, "fmt": "%(asctime)s %(levelname)s %(name)s: %(message)s"}
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"all": lines if form == "lines" else {"()": JsonFormatter}},
        "handlers": {"all": {"class": "logging.StreamHandler", "formatter": "all", "stream": "ext://sys.stderr"}},
        "loggers": {
            name: {"handlers": ["all"], "level": level.upper(), "propagate": False} for name in ("uvicorn", "gptjax")
        },
    }
