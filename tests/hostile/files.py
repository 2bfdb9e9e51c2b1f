"""All hand-made hostile files."""

import os
from pathlib import Path

from tests.hostile import formats
from tests.hostile.rows import Group
from tests.hostile.settings_files import CONFIG, GENERATION
from tests.hostile.tokenizer_files import METADATA, PAIR, TEMPLATE, TOKENIZER
from tests.hostile.weight_files import INDEX, MANIFEST, PICKLES, SAFETENSORS

GROUPS = {
    "safetensors": Group(formats.read_tensors, "model.safetensors", SAFETENSORS),
    "pickle": Group(formats.read_pickle, "", PICKLES),
    "index": Group(formats.read_tensors, "safetensors", INDEX),
    "config": Group(formats.read_config, "config.json", CONFIG),
    "generation": Group(formats.read_defaults, "generation_config.json", GENERATION),
    "tokenizer": Group(formats.read_text, "tokenizer.json", TOKENIZER),
    "vocab and merges": Group(formats.read_text, "", PAIR),
    "template": Group(formats.read_template, "template", TEMPLATE),
    "converted": Group(formats.read_converted, "dst", MANIFEST),
    "metadata.gguf": Group(formats.read_metadata, "metadata.gguf", METADATA),
}
CASES = [(group, name) for group, of in GROUPS.items() for name in of.rows]


def made_in(directory: Path, group: str, name: str) -> Path:
    """A row's files, in a directory of their own."""
    place = directory / f"{list(GROUPS).index(group)} {list(GROUPS[group].rows).index(name)}"
    os.makedirs(place)
    GROUPS[group].rows[name].make(place)
    return place
