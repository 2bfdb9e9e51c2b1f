"""Asks an instruct model for a haiku that has the current minute in words, and checks what it wrote.

    python examples/haiku.py path/to/Qwen2.5-7B-Instruct
    python examples/haiku.py model.gguf --tries 5

The minute changes, so the poem cannot be one that the model remembers, and a broken tokenizer, chat format or rotation
shows at once: the word is missing, other characters appear, or words repeat. Small models (SmolLM2's 135M) fail often.
"""

import argparse
import datetime
import itertools
import re
import sys
from collections.abc import Iterator

import gptjax

ONES = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen".split()
ONES += "seventeen eighteen nineteen".split()
TENS = "twenty thirty forty fifty".split()
ALLOWED = re.compile(r"[A-Za-z ,.;:!?'’“”\"…—–-]+")


def in_words(minute: int) -> str:
    if minute < len(ONES):
        return ONES[minute]
    tens, ones = TENS[minute // 10 - 2], minute % 10
    return f"{tens}-{ONES[ones]}" if ones else tens


def faults(poem: str, word: str) -> Iterator[str]:
    lines = [line.strip() for line in poem.strip().splitlines() if line.strip()]
    words = re.findall(r"[a-z'’-]+", poem.lower())
    if len(lines) != 3:
        yield f"it has {len(lines)} lines"
    if word not in poem.lower().replace("‑", "-") and word.replace("-", " ") not in poem.lower():
        yield f"it lacks {word!r}"
    if strange := sorted({character for line in lines for character in ALLOWED.sub("", line)}):
        yield f"it has the characters {' '.join(strange)}"
    if len(set(lines)) < len(lines) or any(one == other for one, other in itertools.pairwise(words)):
        yield "something repeats"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="an instruct checkpoint: a directory, a GGUF file or a Hub id")
    parser.add_argument("--minute", type=int, choices=range(60), metavar="0-59", default=datetime.datetime.now().minute)
    parser.add_argument("--tries", type=int, default=1, help="how many poems to ask for until one is right")
    args = parser.parse_args()
    if args.model is None:
        print("name an instruct checkpoint, as in: python examples/haiku.py path/to/Qwen2.5-7B-Instruct")
        return 0
    word = in_words(args.minute)
    lm = gptjax.load(args.model, max_length=2048)
    request = (
        f'Write a haiku about time that contains the word "{word}". Answer with its three lines only, in plain English '
        "words, without any digits, title or explanation."
    )
    for seed in range(args.tries):
        poem = lm.chat([{"role": "user", "content": request}], max_tokens=1024, temperature=0.7, seed=seed).text
        found = list(faults(poem, word))
        print(poem.strip(), f"-- {'; '.join(found) or 'a haiku'}", sep="\n")
        if not found:
            return 0
    return 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except gptjax.GptjaxError as error:  # no such model, or one without a chat format
        sys.exit(f"haiku: {error}")
