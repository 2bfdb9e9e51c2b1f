"""Rewrites error messages, which name the arguments of Python functions, with the options of the command line."""

import argparse
import re
from typing import Final

# Arguments that have an option of another name; the other options have the argument's own, with dashes.
_OTHERS: Final = {"reasoning_effort": "--effort", "enable_thinking": "--no-thinking"}
_BOTH: Final = re.compile(r"\b\w+=(?:\"[^\"]*\"|\w+) \((--[a-z-]+)( [^)]*)?\)")  # max_length=64 (--max-length 64)
_OR_IN_PYTHON: Final = re.compile(r"(--[a-z-]+), or \w+= in gptjax\.load")


def in_options(message: str, parser: argparse.ArgumentParser) -> str:
    """A message with the options of a command in place of the arguments of Python functions.

    A message that names a JSON file keeps its names: they are keys of that file.
    """
    options = {option for action in parser._actions for option in action.option_strings if option.startswith("--")}
    message = _BOTH.sub(lambda found: found[1] + (found[2] or "") if found[1] in options else found[0], message)
    message = _OR_IN_PYTHON.sub(lambda found: found[1] if found[1] in options else found[0], message)
    if ".json" in message:
        return message
    named = {option[2:].replace("-", "_"): option for option in options}
    named |= {keyword: option for keyword, option in _OTHERS.items() if option in options}
    long = "|".join(keyword for keyword in named if "_" in keyword) or "(?!)"
    # A name of one word is also a word: it is the option's only where the message begins with it.
    short = "|".join(keyword for keyword in named if "_" not in keyword) or "(?!)"
    pattern = rf"(?<![\w./'\"=-])(?:{long})(?![\w.=(\[])|\A(?:{short})(?= must be )"
    return re.sub(pattern, lambda found: named[found[0]], message)
