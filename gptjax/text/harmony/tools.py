"""The tools of a request: functions in the form of OpenAI's chat API, and the built-in ones."""

from gptjax.errors import RequestError
from gptjax.support.quoting import quoted
from gptjax.text.fields import check_amount, check_name, read_list, read_object, read_string
from gptjax.text.harmony.builtin import BUILTIN
from gptjax.text.harmony.messages import Function, Namespace


def read_tools(tools: object) -> tuple[tuple[Function, ...], tuple[Namespace, ...]]:
    """The functions, in order, and the built-in tools. Raises RequestError, naming the tool and the fault."""
    check_amount(tools, "tools")
    functions: dict[str, Function] = {}
    builtin: dict[str, Namespace] = {}
    for index, value in enumerate(read_list(tools, "tools")):
        where = f"tools[{index}]"
        tool = read_object(value, where)
        kind = tool.get("type")
        if kind == "function":
            function = _read_function(tool.get("function"), f"{where}.function")
            if function.name in functions:
                raise RequestError(f"{where} is the second function {function.name}: give each its own name")
            functions[function.name] = function
        elif isinstance(kind, str) and kind in BUILTIN:
            builtin[kind] = BUILTIN[kind]
        else:
            raise RequestError(f"{where} has the type {quoted(kind)}; expected one of function, {', '.join(BUILTIN)}")
    return tuple(functions.values()), tuple(builtin.values())


def _read_function(value: object, where: str) -> Function:
    function = read_object(value, where)
    name = check_name(function.get("name"), f"{where}.name")
    description = function.get("description")
    about = "" if description is None else read_string(description, f"{where}.description")
    try:
        return Function(name, about, function.get("parameters"))
    except RequestError as error:
        raise RequestError(f"{where}: {error}") from error
