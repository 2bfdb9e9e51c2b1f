"""Writes a GGUF file's tokenizer in Hugging Face's files, from which transformers encodes and decodes as we do."""

from collections.abc import Mapping
from typing import Any, Final

from gptjax.text.gguf import Description
from gptjax.text.kinds import BYTE_LEVEL_DECODER, sentencepiece_decoder
from gptjax.text.spelling import SENTENCEPIECE
from gptjax.text.vocabulary import AddedToken, Vocabulary

# With it, transformers takes all of tokenizer.json. The classes of single models take the words and cut in their way.
_CLASS: Final = "PreTrainedTokenizerFast"


def huggingface_files(found: Description, settings: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The contents of tokenizer.json, tokenizer_config.json and generation_config.json.

    Args:
      settings: those of generation_config.json, to which the first and last tokens are added.
    """
    ends = {"bos_token_id": found.ids["bos_token_id"], "eos_token_id": list(found.eos_ids) or None}
    return {
        "tokenizer.json": _tokenizer(found.vocabulary),
        "tokenizer_config.json": _config(found),
        "generation_config.json": {**settings, **ends},
    }


def _config(found: Description) -> dict[str, Any]:
    # transformers would make these tokens special: it leaves special ones out of texts, so no ordinary one is named.
    special = {token.id: token.content for token in found.vocabulary.added if token.special}
    last = found.eos_ids[0] if found.eos_ids else None
    purposes = {"bos_token": found.ids["bos_token_id"], "eos_token": last}
    purposes |= {"unk_token": found.ids["unknown_token_id"], "pad_token": found.ids["padding_token_id"]}
    optional = {
        **{name: special.get(number) for name, number in purposes.items() if number is not None},
        "model_max_length": found.context_length,
        "chat_template": found.chat_template,
    }
    return {
        "tokenizer_class": _CLASS,
        "clean_up_tokenization_spaces": False,
        **{name: value for name, value in optional.items() if value is not None},
    }


def _tokenizer(vocabulary: Vocabulary) -> dict[str, Any]:
    # Added tokens are in the model's vocabulary, too: the tokenizers library would number others itself, without gaps.
    added = sorted(vocabulary.added + vocabulary.ordinary, key=lambda token: token.id)
    ids = vocabulary.ids | {token.content: token.id for token in added}
    falls_back = vocabulary.spelling is SENTENCEPIECE
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_flags(token) for token in added],
        "normalizer": vocabulary.normalizer,
        "pre_tokenizer": vocabulary.pre_tokenizer,
        "post_processor": vocabulary.post_processor,
        "decoder": sentencepiece_decoder(strips_space=vocabulary.strips_space) if falls_back else BYTE_LEVEL_DECODER,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,  # every byte has a token
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": falls_back,
            "ignore_merges": vocabulary.ignore_merges,
            "vocab": dict(sorted(ids.items(), key=lambda item: item[1])),
            "merges": [list(pair) for pair in vocabulary.merges],
        },
    }


def _flags(token: AddedToken) -> dict[str, Any]:
    return {
        "id": token.id,
        "content": token.content,
        "single_word": token.single_word,
        "lstrip": token.lstrip,
        "rstrip": token.rstrip,
        "normalized": token.normalized,
        "special": token.special,
    }
