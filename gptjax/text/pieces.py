"""SentencePiece's BPE in the terms of the `tokenizers` library.

SentencePiece has no list of merges. It joins the two neighbours whose joined piece has the highest score, the leftmost
first. As merges, that is each way to divide each piece in two, in the order of the scores.
"""

from collections.abc import Iterable, Mapping
from typing import Final

# Merges that a vocabulary may have for each piece. Llama 2's has two; a run of one character of length n has n / 2.
_PER_PIECE: Final = 4
_ALWAYS: Final = 4096


def merges_of(scores: Mapping[str, float]) -> list[tuple[str, str]]:
    """The merges of a BPE vocabulary, best first.

    Which division of one piece comes first matters only where two overlap and give the same piece. No such text was
    found for the vocabularies that SentencePiece trains; transformers' converter orders them in the same way.

    Args:
      scores: of the pieces that merges may build or join; no control or byte tokens.

    Raises:
      ValueError: the pieces have far more divisions than those of a trained vocabulary.
    """
    known = {piece: piece for piece in scores}  # one object per piece
    most, merges = _PER_PIECE * len(scores) + _ALWAYS, []
    for piece in scores:
        for cut in range(1, len(piece)):
            left, right = known.get(piece[:cut]), known.get(piece[cut:])
            if left is not None and right is not None:
                merges.append((left, right))
        if len(merges) > most:
            raise ValueError(f"can be divided in more than {most:,} ways")
    merges.sort(key=lambda pair: (scores[pair[0] + pair[1]], len(pair[0]), len(pair[1])), reverse=True)
    return merges


def equal_scores(scores: Mapping[str, float], merges: Iterable[tuple[str, str]]) -> tuple[str, str] | None:
    """Two pieces that merges build and that have the same score, if there are any: the leftmost comes first, not one of
    the two. Merges express that only for runs of one character, as Llama 2 has them of spaces: longest first.
    """
    found: dict[float, str] = {}
    for left, right in merges:
        piece = left + right
        other = found.setdefault(scores[piece], piece)
        if other != piece and len({*other, *piece}) > 1:
            return other, piece
    return None
