"""The input and the tools of `/v1/responses`, in the form of chat completions, which harmony reads."""

from collections.abc import Mapping
from typing import Any

from gptjax.server.body import check_text
from gptjax.server.errors import bad_request

_TEXTS = ("input_text", "output_text", "text", "reasoning_text", "summary_text")


def read_messages(given: object, instructions: str | None) -> list[dict[str, Any]]:
    """`input`, a string or a list of items, after `instructions`. Raises `ApiError`."""
    messages: list[dict[str, Any]] = []
    if instructions:
        messages.append({"role": "system", "content": instructions})
    if isinstance(given, str):
        return [*messages, {"role": "user", "content": check_text(given, "input")}]
    if not isinstance(given, list) or not given:
        raise bad_request("input must be a string or a list of items, and not empty", "input")
    return messages + [_read_item(item, f"input[{index}]") for index, item in enumerate(given)]


def read_tools(given: object) -> list[Any]:
    """`tools`, whose functions are flat here. Raises `ApiError`."""
    if given is None:
        return []
    if not isinstance(given, list):
        raise bad_request("tools must be a list", "tools")
    return [_read_tool(tool) for tool in given]


def _read_tool(tool: object) -> object:
    if not isinstance(tool, Mapping) or tool.get("type") != "function":
        return tool  # harmony knows it, or says what is wrong
    return {"type": "function", "function": {name: tool.get(name) for name in ("name", "description", "parameters")}}


def _read_item(item: object, where: str) -> dict[str, Any]:
    if not isinstance(item, Mapping):
        raise bad_request(f"{where} must be an object", "input")
    match item.get("type", "message"):
        case "message":
            return {"role": item.get("role"), "content": _read_content(item.get("content"), where)}
        case "reasoning":
            text = _read_content(item.get("content") or item.get("summary") or [], where)
            return {"role": "assistant", "reasoning_content": text, "content": None if text else ""}
        case "function_call":
            function = {"name": item.get("name"), "arguments": item.get("arguments")}
            call = {"id": item.get("call_id"), "type": "function", "function": function}
            return {"role": "assistant", "content": None, "tool_calls": [call]}
        case "function_call_output":
            content = _read_content(item.get("output"), where)
            return {"role": "tool", "tool_call_id": item.get("call_id"), "content": content}
        case kind:
            raise bad_request(f"{where} has the type {repr(kind)[:60]}, which is not supported", "input", "unsupported")


def _read_content(content: object, where: str) -> Any:
    """Text, or parts of it, joined; what is neither is left for harmony to refuse."""
    if not isinstance(content, list):
        return content
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind not in _TEXTS:
            raise bad_request(f"{where} has a part of the type {repr(kind)[:60]}: the model reads text only", "input")
        texts.append(check_text(part.get("text"), where))
    return "".join(texts)
