"""How much longer a normalizer makes a text: the library allocates all of it, and aborts if it cannot."""

import math
from typing import Any, Final

MOST_GROWTH: Final = 64
# By the normalizer's type, at most: Unicode's longest decomposition has 18 characters. "Precompiled" has a table of its
# own, which is not looked into.
_OF_ONE: Final = {"NFC": 3, "NFD": 4, "NFKC": 18, "NFKD": 18, "Lowercase": 2, "BertNormalizer": 4, "ByteLevel": 4}
_OF_ONE["Precompiled"] = MOST_GROWTH + 1


def growth(normalizer: Any) -> int:
    """The most characters that one becomes, if `normalizer` is one of the library's, which refuses all others."""
    if not isinstance(normalizer, dict):
        return 1
    parts, content = normalizer.get("normalizers"), normalizer.get("content", normalizer.get("prepend"))
    if isinstance(parts, list):
        most = 1
        for part in parts:
            most = min(most * growth(part), MOST_GROWTH + 1)  # a product of thousands would take long
        return most
    if isinstance(content, str):
        return _of_content(normalizer.get("pattern"), len(content))
    return _OF_ONE.get(str(normalizer.get("type")), 1)


def _of_content(pattern: Any, count: int) -> int:
    text = pattern.get("String") if isinstance(pattern, dict) else None
    if isinstance(text, str) and text:
        return max(1, math.ceil(count / len(text)))
    return 1 + 2 * count  # put before a text, or wherever an expression matches nothing: before and after a character
