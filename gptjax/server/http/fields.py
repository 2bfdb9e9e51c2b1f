"""The fields of a request, checked one by one."""

from collections.abc import Collection
from typing import Any

from gptjax.server.errors import as_json, bad_request
from gptjax.text.vocabulary import is_text


class Fields:
    """The fields of a request; null counts as absent. Each is taken once, then `finish` refuses the rest."""

    def __init__(self, values: dict[str, Any], within: str | None = None) -> None:
        """`within`: the field whose value this is, for errors."""
        self._values = {name: value for name, value in values.items() if value is not None}
        self._within = "" if within is None else f"{within}."

    def __contains__(self, name: str) -> bool:
        return name in self._values

    def take(self, name: str) -> Any:
        """A field, unchecked; None if it is absent."""
        return self._values.pop(name, None)

    def options(self, name: str) -> "Fields":
        """The fields of an object; none if it is absent."""
        value, place = self.take(name), self._within + name
        if not isinstance(value, dict | None):
            raise bad_request(f"{place} must be an object, found {as_json(value)}", place)
        return Fields(value or {}, place)

    def flag(self, name: str) -> bool:
        """True or false; false if it is absent."""
        value, place = self.take(name), self._within + name
        if value is not None and not isinstance(value, bool):
            raise bad_request(f"{place} must be true or false, found {as_json(value)}", place)
        return bool(value)

    def text(self, name: str) -> str | None:
        """A string."""
        value = self.take(name)
        return None if value is None else check_text(value, self._within + name)

    def whole(self, name: str, low: int, high: int) -> int | None:
        """A whole number; 3.0 counts as one, as in JSON."""
        value, place = self.take(name), self._within + name
        if value is None:
            return None
        if isinstance(value, float) and value.is_integer() and abs(value) < 1 << 53:
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise bad_request(f"{place} must be a whole number from {low} to {high}, found {as_json(value)}", place)
        return value

    def number(self, name: str, low: float, high: float) -> float | None:
        """A finite number."""
        value = self.take(name)
        return None if value is None else check_number(value, low, high, self._within + name)

    def finish(self, ignored: Collection[str]) -> None:
        """Raises `ApiError` for fields that were not taken and are not in `ignored`."""
        unknown = [name for name in self._values if name not in ignored]
        if unknown:
            place = self._within + unknown[0]
            raise bad_request(f"{as_json(place)} is not a field that this server knows", place, "unknown_parameter")


def check_text(value: object, name: str) -> str:
    """A string that can be written as UTF-8. Raises `ApiError`."""
    if not isinstance(value, str):
        raise bad_request(f"{name} must be a string, found {as_json(value)}", name)
    if not is_text(value):
        raise bad_request(f"{name} has a lone surrogate, which is not a character", name)
    return value


def check_number(value: object, low: float, high: float, name: str) -> float:
    """A finite number in a range. Raises `ApiError`."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    # An integer may be too large for a float; comparing the two is exact.
    if not is_number or value != value or not low <= value <= high:  # type: ignore[operator]
        raise bad_request(f"{name} must be a number from {low:g} to {high:g}, found {as_json(value)}", name)
    return float(value)  # type: ignore[arg-type]
