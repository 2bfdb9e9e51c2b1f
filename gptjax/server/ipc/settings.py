"""What a server is told at its start, apart from where it listens."""

import dataclasses

from gptjax.config import GenerationDefaults


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a client may request, and how long it may keep the server waiting."""

    body_bytes: int = 10 << 20
    body_seconds: float = 30.0  # for the whole body to arrive
    send_seconds: float = 30.0  # for a client to take a piece of a stream
    ping_seconds: float = 15.0  # of silence before a stream gets a comment
    heartbeat_seconds: float = 60.0  # without one, the worker counts as hung; compiling takes time
    rows: int = 128  # prompts times `n` of one request
    scoring: int = 64  # requests with `echo` and `logprobs` at a time
    stored_responses: int = 1000
    stored_bytes: int = 256 << 20  # of all stored responses
    stored_conversation: int = 10 << 20  # bytes of the items that led to a stored response: as those of a body


@dataclasses.dataclass(frozen=True)
class Facts:
    """What is known of the served model."""

    name: str
    defaults: GenerationDefaults
    eos_ids: tuple[int, ...]
    vocab_size: int  # of the logits
    max_length: int  # positions of prompt and output
    quant_kind: str  # of the weights: "MXFP4", "Q4_K_M", "BF16", …
    tokenizer_kind: str | None  # "hf-json" or "gguf-bpe"; None: no tokenizer, or not known
    # Other names that clients may use; a * at the end stands for anything.
    aliases: tuple[str, ...] = dataclasses.field(default=(), kw_only=True)
