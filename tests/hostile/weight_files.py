"""Hand-made hostile files of weights but for GGUF's (tests/gguf/test_hostile.py), each with its expected error."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.checkpoints import weights_material
from tests.convert import made
from tests.hostile import formats
from tests.hostile.rows import DEEP, HUGE, LFS, Make, Row, put

ONE = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}


def tensors(header: object, *, data: bytes = bytes(16), length: int | None = None) -> Make:
    """A safetensors file with this header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return lambda directory: made.write_raw(directory / "model.safetensors", text, data, length=length)


def tensor(**changes: object) -> Make:
    """A file of one tensor of four numbers, its entry changed."""
    return tensors({"a": {**ONE, **changes}})


def two(first: list[int], second: list[int], size: int) -> Make:
    """A file of two tensors of two numbers each, at these offsets."""
    entry = {"dtype": "F32", "shape": [2]}
    return tensors({"a": {**entry, "data_offsets": first}, "b": {**entry, "data_offsets": second}}, data=bytes(size))


SAFETENSORS = {
    "an empty file": Row(put("model.safetensors", b""), "is truncated: expected 10 bytes, found 0"),
    "seven bytes": Row(put("model.safetensors", bytes(7)), "is truncated: expected 10 bytes, found 7"),
    "a header of 2^64 - 1 bytes": Row(tensors(b"{}", length=HUGE), f"its header claims {HUGE:,} bytes; at most"),
    "a header of 2^63 bytes": Row(tensors(b"{}", length=2**63), f"its header claims {2**63:,} bytes; at most"),
    "a header beyond the file": Row(
        tensors(b"{}", length=1 << 24), "is truncated: expected 16,777,224 bytes, found 26"
    ),
    "not JSON": Row(tensors(b"{'a': 1}"), "its header is not valid JSON (Expecting property name"),
    "not UTF-8": Row(tensors(b'{"\xff": 1}'), "its header is not valid JSON ('utf-8' codec"),
    "a list": Row(tensors([1, 2]), "it is a JSON list, expected an object"),
    "arrays in each other": Row(tensors(b'{"a": ' + DEEP.encode() + b"}"), "nested too deeply, more than 64 levels"),
    "a tensor twice": Row(
        tensors(f'{{"a": {json.dumps(ONE)}, "a": {json.dumps(ONE)}}}'.encode()), "the key 'a' occurs twice"
    ),
    "NaN": Row(tensors(b'{"__metadata__": {"x": NaN}}'), "NaN is not JSON"),
    "an entry that is a number": Row(tensors({"a": 1}), "its entry 'a' does not consist of dtype, shape and data_off"),
    "an entry with more": Row(tensor(more=1), "its entry 'a' does not consist of dtype, shape and data_offsets"),
    "a name of 100,000 letters": Row(tensors({"a" * 100_000: 1}), "aaa… does not consist of dtype"),
    "an escape in a name": Row(tensors({"\x1b[2J": 1}), r"its entry '\x1b[2J' does not consist of dtype"),
    "a negative size": Row(tensor(shape=[-2, -2]), "'a' has the invalid shape [-2, -2]"),
    "a size of 2.0": Row(tensor(shape=[2.0, 2]), "'a' has the invalid shape [2.0, 2]"),
    "a size that is true": Row(tensor(shape=[True, 4]), "'a' has the invalid shape [True, 4]"),
    "a product that is 4 in 64 bits": Row(tensor(shape=[2**62, 2**62, 4, 4]), "4611686018427387904, 4, 4], has 16 byt"),
    "33 axes": Row(tensor(shape=[1] * 32 + [4]), "'a' has the invalid shape [1, 1, 1"),
    "an unknown dtype": Row(tensor(dtype="F99"), "'a' has the unknown dtype 'F99'"),
    "a dtype that is a list": Row(tensor(dtype=["F32"]), "'a' has the unknown dtype ['F32']"),
    "offsets in disorder": Row(tensor(data_offsets=[16, 0]), "'a' has the invalid data_offsets [16, 0]"),
    "negative offsets": Row(tensor(data_offsets=[-16, 0]), "'a' has the invalid data_offsets [-16, 0]"),
    "offsets of 2^63": Row(tensor(data_offsets=[2**63, 2**63 + 16]), "'a' has the invalid data_offsets [92233720368"),
    "tensors that overlap": Row(two([0, 8], [4, 12], 12), "the data of 'b' overlaps another tensor's or leaves a gap"),
    "tensors in one place": Row(two([0, 8], [0, 8], 8), "the data of 'b' overlaps another tensor's or leaves a gap"),
    "a gap": Row(two([0, 8], [12, 20], 20), "the data of 'b' overlaps another tensor's or leaves a gap"),
    "data that are cut off": Row(tensors({"a": ONE}, data=bytes(15)), "is truncated: expected"),
    "more data": Row(tensors({"a": ONE}, data=bytes(17)), "but its header accounts for"),
    "a Git LFS pointer": Row(put("model.safetensors", LFS), "is a Git LFS pointer, not the file itself: run `git lfs"),
    "a web page": Row(put("model.safetensors", "<!DOCTYPE html>"), "is a web page, not weights"),
    "a ggml file": Row(put("model.safetensors", b"lmgg" + bytes(60)), "is a ggml file from before GGUF"),
}


def bomb(name: str, protocol: int = 2) -> Make:
    return lambda directory: (directory / name).write_bytes(
        pickle.dumps(formats.Bomb(directory / "exploded"), protocol=protocol)
    )


PICKLES = {
    "pytorch_model.bin": Row(
        bomb("pytorch_model.bin"), "pytorch_model.bin is a PyTorch pickle file; gptjax never opens"
    ),
    "a pickle of protocol 5": Row(bomb("model.pt", 5), "model.pt is a PyTorch pickle file; gptjax never opens"),
    "a pickle of protocol 0": Row(bomb("model.ckpt", 0), "model.ckpt is a PyTorch pickle file; gptjax never opens"),
    "a pickle called safetensors": Row(bomb("model.safetensors"), "model.safetensors is a PyTorch pickle file"),
    "a zip called safetensors": Row(
        put("model.safetensors", b"PK\3\4" + bytes(60)), "a zip archive, as torch.save writes it"
    ),
}


def index(weight_map: object, *files: str) -> Make:
    """An index, and files that have the tensor a."""

    def make(directory: Path) -> None:
        for name in files:
            made.write(directory / name, {"a": formats.TENSORS["wte.weight"]})
        (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    return make


def linked(**links: str) -> Make:
    """An index that names the first of these links."""

    def make(directory: Path) -> None:
        for name, target in links.items():
            (directory / f"{name}.safetensors").symlink_to(target)
        index({"a": f"{next(iter(links))}.safetensors"})(directory)

    return make


NOT_PLAIN = "which is not a plain file name; an index may only name files in its own directory"
INDEX = {
    "a file above": Row(index({"a": "../x.safetensors"}), f"names the file '../x.safetensors', {NOT_PLAIN}"),
    "an absolute path": Row(index({"a": "/etc/x.safetensors"}), f"names the file '/etc/x.safetensors', {NOT_PLAIN}"),
    "a path of another system": Row(index({"a": "..\\x.safetensors"}), NOT_PLAIN),
    "a NUL": Row(index({"a": "x\0.safetensors"}), rf"names the file 'x\x00.safetensors', {NOT_PLAIN}"),
    "no name": Row(index({"a": ""}), f"names the file '', {NOT_PLAIN}"),
    "the directory itself": Row(index({"a": "."}), f"names the file '.', {NOT_PLAIN}"),
    "half a surrogate pair": Row(index({"a": "\ud800.safetensors"}), "which is not a usable name"),
    "a name of 100,000 letters": Row(
        index({"a": "x" * 100_000 + ".safetensors"}), "xxx… cannot be read (File name too long): use a shorter name"
    ),
    "the index itself": Row(index({"a": "model.safetensors.index.json"}), "which is not a safetensors file"),
    "a pickle": Row(
        index({"a": "pytorch_model.bin"}), "names the file 'pytorch_model.bin', which is not a safetensors"
    ),
    "a link that leads out": Row(linked(a="/etc/passwd"), "a link that leads out of the directory"),
    "a link above": Row(linked(a="../x.safetensors"), "a link that leads out of the directory"),
    "a link to itself": Row(linked(a="a.safetensors"), "loop"),
    "links in a circle": Row(linked(a="b.safetensors", b="a.safetensors"), "loop"),
    "a link to nothing": Row(linked(a="b.safetensors"), "links to a file that does not exist; download the file"),
    "a file that is not there": Row(index({"a": "x.safetensors"}), "x.safetensors does not exist but belongs to the"),
    "a tensor in two files": Row(
        index({"a": "x.safetensors", "b": "y.safetensors"}, "x.safetensors", "y.safetensors"),
        "a is in several files: x.safetensors, y.safetensors",
    ),
    "a tensor that is not there": Row(
        index({"a": "x.safetensors", "b": "x.safetensors"}, "x.safetensors"), "says that b is in x.safetensors, but it"
    ),
    "a name twice": Row(
        put("model.safetensors.index.json", '{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}'),
        "the key 'a' occurs twice",
    ),
    "a list": Row(index(["a"]), "has no weight_map from tensor names to file names"),
    "a list in place of a file": Row(index({"a": [["x"]]}), "has no weight_map from tensor names to file names"),
    "nothing": Row(index({}), "lists no tensors"),
    "arrays in each other": Row(put("model.safetensors.index.json", DEEP), "nested too deeply, more than 64 levels"),
    "50 files above": Row(index({f"{n}": f"../{n}.safetensors" for n in range(50)}), "and 30 more"),
}


def manifest(change: Callable[[dict[str, Any]], object]) -> Make:
    def make(directory: Path) -> None:
        weights_material.save(directory / "dst")
        path = directory / "dst" / "manifest.json"
        raw = json.loads(path.read_text())
        changed = change(raw)
        path.write_text(changed if isinstance(changed, str) else json.dumps(raw))

    return make


def leaf(**changes: object) -> Make:
    return manifest(lambda raw: raw["leaves"][0].update(changes))


def zarray(**changes: object) -> Make:
    """Another description of a weight, with a manifest that agrees about its size."""

    def make(directory: Path) -> None:
        weights_material.save(directory / "dst")
        path = next((directory / "dst" / "params").rglob(".zarray"))
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
        manifest_path = directory / "dst" / "manifest.json"
        raw = json.loads(manifest_path.read_text())
        raw["pieces"][path.parts[-3]]["/".join(path.parts[-2:])] = path.stat().st_size
        manifest_path.write_text(json.dumps(raw))

    return make


MANIFEST = {
    "a later version": Row(
        manifest(lambda raw: raw.update(version=2)), "has version 2, but this gptjax reads version 1"
    ),
    "a version of 100,000 letters": Row(
        manifest(lambda raw: raw.update(version="v" * 100_000)), "vvv…, but this gptjax"
    ),
    "arrays in each other": Row(manifest(lambda raw: DEEP), "nested too deeply, more than 64 levels"),
    "no weights": Row(manifest(lambda raw: raw.pop("leaves")), "is damaged (KeyError: 'leaves')"),
    "a weight of a file above": Row(leaf(path="../../x"), "the weight '../../x' is not a path of names"),
    "a weight with a NUL": Row(leaf(path="a\0"), r"the weight 'a\x00' is not a path of names"),
    "a weight 100 levels deep": Row(leaf(path="/".join("a" * 100)), "is not a path of names joined with slashes"),
    "a weight twice": Row(manifest(lambda raw: raw["leaves"].append(raw["leaves"][0])), "a weight is listed twice"),
    "2^63 rows": Row(leaf(shape=[2**63, 4]), f"{2**63} is not a count"),
    "-6 rows": Row(leaf(shape=[-6, 4]), "-6 is not a count"),
    "1,000 axes": Row(leaf(shape=[1] * 1000), "is not a shape"),
    "arrays in a shape": Row(leaf(shape=[[6], [4]]), "[6] is not a count"),
    "an unknown dtype": Row(leaf(dtype="|O"), "the dtype '|O' is unknown"),
    "a dtype that is a list": Row(leaf(dtype=["float32"]), "is damaged"),
    "a piece above": Row(leaf(piece="../x"), "the piece '../x' is not a number"),
    "a piece that is not listed": Row(leaf(piece="9999"), "the piece 9999 is not listed"),
    "a file above": Row(
        manifest(lambda raw: raw["others"].update({"params/0000/../../../x": "0"})),
        "'params/0000/../../../x' is not the name of a file",
    ),
    "a file that is not there": Row(
        manifest(lambda raw: raw["pieces"]["0000"].update(x=5)), "params/0000 is damaged: its file x is missing"
    ),
    "a piece that is not there": Row(
        manifest(lambda raw: raw["pieces"].update({"9999": {}})), "params/9999 is missing; copy the whole directory"
    ),
    "another checksum": Row(leaf(crc32=0), "have changed"),
    "an enormous chunk": Row(zarray(shape=[1 << 40, 1 << 20], chunks=[1 << 40, 1 << 20]), "/.zarray does not describe"),
    "a compressed chunk": Row(zarray(compressor={"id": "zlib", "level": 9}), "/.zarray does not describe"),
    "objects in a chunk": Row(zarray(dtype="|O"), "/.zarray does not describe"),
    "a long description": Row(zarray(attributes="x" * 5000), "is larger than the limit of 4,096 bytes"),
}
