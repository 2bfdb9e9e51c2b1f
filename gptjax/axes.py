"""The axis letters. Each letter has one meaning everywhere in gptjax.

An array's name has its axes as a suffix: `q_BTNH` is [batch, query position, query head, head width]. The same letters
are the logical axes that every weight declares (`nn.with_logical_partitioning`), from which shardings follow. A suffix
that lies is a bug; `tests/test_axes.py` parses them. In kernels, a small letter is a tile of that axis: `scores_ts` is
[queries, positions] of one tile each.
"""

from typing import Final

GLOSSARY: Final = {
    "B": "batch: rows, or slots of the cache",
    "T": "query positions: tokens of this call",
    "S": "cache positions: keys and values that can be attended to",
    "P": "positions that a model has, as its learned embedding counts them",
    "D": "model width",
    "N": "query heads",
    "K": "key/value heads",
    "G": "query heads that share one key/value head: N / K",
    "H": "head width",
    "F": "feed-forward width",
    "E": "experts",
    "X": "experts a token is routed to",
    "R": "heads of q, k and v together: N + 2K",
    "V": "vocabulary",
    "C": "candidates: the most likely tokens, reported with the one drawn",
    "L": "layers",
    # of kernels
    "I": "inputs of a product: what it sums over",
    "O": "outputs of a product",
    "J": "splits: programs that share an axis, whose results are summed after them",
    "U": "groups of tokens that go to one expert",
    "M": "slots: rows of a group or tile, of which some may be empty",
    "A": "rows that row numbers point into: tokens, or the slots of all groups in turn",
    "Q": "tiles of query positions",
    "Y": "pages of a pool of keys and values",
    "Z": "blocks of cache positions: pages of a row",
    "W": "words of a workspace",
}

# Logical axes of weights. A product of axes is one axis of a matrix and is sharded by its first factor.
WIDTH: Final = "D"
VOCAB: Final = "V"
POSITION: Final = "P"
MLP: Final = "F"
GATE_UP: Final = "2F"  # all gates, then all ups
HEADS: Final = "NH"
HEAD_WIDTH: Final = "H"
QUERY_HEADS: Final = "N"
EXPERTS: Final = "E"
CHOICES: Final = "E of a router"  # never divided: every device routes among all experts
QKV_HEADS: Final = "RH"  # all query heads, then all key heads, then all value heads
