"""SentencePiece's BPE in the terms of the `tokenizers` library.

SentencePiece has no list of merges. It joins the two neighbours whose joined piece has the highest score, the leftmost
first. As merges, that is each way to divide each piece in two, in the order of the scores.
"""

from collections.abc import Iterable, Mapping


def merges_of(scores: Mapping[str, float]) -> list[tuple[str, str]]:
    """The merges of a BPE vocabulary, best first.

    Which division of one piece comes first matters only where two overlap and give the same piece. No such text was
    found for the vocabularies that SentencePiece trains; transformers' converter orders them in the same way.

    Args:
      scores: of the pieces that merges may build or join; no control or byte tokens.
    """
    merges = []
    for piece, score in scores.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in scores and right in scores:
                merges.append((score, cut, len(right), left, right))
    merges.sort(key=lambda merge: merge[:3], reverse=True)
    return [(left, right) for *_, left, right in merges]


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
