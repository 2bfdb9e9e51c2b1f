"""SentencePiece's BPE in the terms of the `tokenizers` library.

SentencePiece has no list of merges. It joins the two neighbours whose joined piece has the highest score, the leftmost
first. As merges, that is each way to divide each piece in two, in the order of the scores.
"""

from collections.abc import Mapping


def equal_scores(scores: Mapping[str, float]) -> tuple[str, str] | None:
    """Two pieces with the same score whose order merges cannot express, if there are any.

    They can for runs of one character, as Llama 2 has them of spaces: there, leftmost first is longest first.
    """
    found: dict[float, str] = {}
    for piece, score in scores.items():
        if len(piece) > 1 and len({*found.setdefault(score, piece), *piece}) > 1 and found[score] != piece:
            return found[score], piece
    return None


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
