"""gptjax's exceptions. Each message names the fault and what to do next.

All derive from `GptjaxError`, so that one `except` catches everything that this package raises on purpose.
"""


class GptjaxError(Exception):
    """Base class of all errors that gptjax raises on purpose."""


class ConfigError(GptjaxError, ValueError):
    """A model configuration that gptjax does not understand or support."""


class CheckpointError(GptjaxError):
    """A checkpoint that is missing, damaged, incomplete or in an unsupported format."""


class CapacityError(GptjaxError):
    """A request or setting that is larger than the model, the cache or the memory allows."""


class RequestError(GptjaxError, ValueError):
    """A request's arguments that are out of range or contradict each other."""
