"""How much longer a normalizer makes a text: the library allocates all of it, and aborts if it cannot."""

import math
from typing import Any, Final

MOST_GROWTH: Final = 64
# By the normalizer's type, at most: Unicode's longest decomposition has 18 characters. "Precompiled" has a table of its
# own, which is not looked into.
_OF_ONE: Final = {
    **{"NFC": 3, "NFD": 4, "NFKC": 18, "NFKD": 18, "Lowercase": 2, "BertNormalizer": 4, "ByteLevel": 4},
    **dict.fromkeys(("Sequence", "Replace", "Prepend", "Strip", "StripAccents", "Nmt"), 1),  # but for what they contain
    "Precompiled": MOST_GROWTH + 1,
}
_UNTYPED: Final = 4  # read by its other keys, as BertNormalizer's, whatever its type says


def growth(normalizer: Any) -> int:
    """The most characters that one becomes, if `normalizer` is one of the library's, which refuses all others.

    What it contains counts whatever its type is: the library ignores keys that are not the type's, and reads an unknown
    type by its keys.
    """
    if not isinstance(normalizer, dict):
        return 1
    of_parts, parts = 1, normalizer.get("normalizers")
    for part in parts if isinstance(parts, list) else ():
        of_parts = min(of_parts * growth(part), MOST_GROWTH + 1)  # a product of thousands would take long
    contents = [value for key in ("content", "prepend") if isinstance(value := normalizer.get(key), str)]
    of_contents = (_of_content(normalizer.get("pattern"), len(content)) for content in contents)
    return max(_OF_ONE.get(str(normalizer.get("type")), _UNTYPED), of_parts, *of_contents)


def _of_content(pattern: Any, count: int) -> int:
    text = pattern.get("String") if isinstance(pattern, dict) else None
    if isinstance(text, str) and text:
        return max(1, math.ceil(count / len(text)))
    return 1 + 2 * count  # put before a text, or wherever an expression matches nothing: before and after a character
