"""The `usage` of completions and chat completions."""

from collections.abc import Sequence

from gptjax.engine.output import Usage


def usage_json(
    usages: Sequence[Usage], *, choices: int, cached: int, reasoning: int | None = None
) -> dict[str, object]:
    """The usage of all rows. A prompt counts once, however many choices it has."""
    prompt = sum(usage.prompt_tokens for usage in usages[::choices])
    completion = sum(usage.completion_tokens for usage in usages)
    found: dict[str, object] = {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
    }
    if reasoning is not None:
        found["completion_tokens_details"] = {"reasoning_tokens": reasoning}
    return found
