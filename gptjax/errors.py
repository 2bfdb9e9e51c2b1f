"""The exceptions of gptjax. Each message names the fault and what to do next.

All derive from `GptjaxError`, so that one `except` catches everything this package raises on purpose.
"""


class GptjaxError(Exception):
    """Base of all errors that gptjax raises on purpose."""


class ConfigError(GptjaxError, ValueError):
    """A model configuration that gptjax does not understand or does not support."""


class CheckpointError(GptjaxError):
    """A checkpoint that is missing, damaged, incomplete or of an unsupported form."""


class CapacityError(GptjaxError):
    """A request or a setting that is larger than the model, the cache or the memory allows."""


class RequestError(GptjaxError, ValueError):
    """Arguments of a generation request that are out of range or contradict each other."""
