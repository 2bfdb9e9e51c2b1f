"""Looking for a string in a text that comes in pieces."""


def overlap(text: str, wanted: str) -> int:
    """The length of the longest proper prefix of `wanted` that `text` ends with."""
    for length in range(min(len(wanted) - 1, len(text)), 0, -1):
        if text.endswith(wanted[:length]):
            return length
    return 0
