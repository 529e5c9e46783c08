"""Headers of good and bad checkpoints: what is accepted, what is refused under which code, and that nothing else escapes."""

from __future__ import annotations

import http.server
import json
import os
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import checkpoints
import pytest
from checkpoints import CONFIG, entry, index, shard, shard_bytes, sharded, write
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quantplan.checkpoint.layout import json_bytes
from quantplan.errors import QuantplanError, render
from quantplan.headers import INDEX, Checkpoint, read_checkpoint, read_header, shapes_document

ONE = {"a.weight": ("BF16", [4, 2])}
TWO = {"b.weight": ("F32", [3])}
SHARDS = {"one.safetensors": ONE, "two.safetensors": TWO}


def refused(model: str | Path, code: str, *shown: str) -> QuantplanError:
    """Reads `model`, which must be refused with `code`; the message must show every one of `shown`."""
    with pytest.raises(QuantplanError) as caught:
        read_checkpoint(model)
    problem = caught.value.problems[0]
    assert problem.code == code, render(problem)
    for text in shown:
        assert text in render(problem)
    return caught.value


def test_good_checkpoints(tmp_path: Path) -> None:
    found = read_checkpoint(sharded(tmp_path, SHARDS))
    assert {n: (t.dtype, t.shape, t.file) for n, t in found.tensors.items()} == {
        "a.weight": ("BF16", (4, 2), "one.safetensors"),
        "b.weight": ("F32", (3,), "two.safetensors"),
    }
    assert found.size == 16 + 12
    assert found.files == ["one.safetensors", "two.safetensors"]
    assert found.config == CONFIG
    assert found.header_hashes.keys() == SHARDS.keys()
    again = read_checkpoint(tmp_path / "config.json")
    assert again == found
    alone = read_checkpoint(tmp_path / "two.safetensors")
    assert list(alone.tensors) == ["b.weight"]


@pytest.mark.parametrize(
    "tensors",
    [
        {},
        {"scalar": ("F32", [])},
        {"empty": ("BF16", [0, 5])},
        {"empty": ("BF16", [0]), "a": ("U8", [3]), "empty2": ("I64", [4, 0])},
        {"six": ("F6_E2M3", [4, 1]), "four": ("F4", [3, 2])},
        {"deep": ("BOOL", [1] * 8)},
        {"n" * 1024: ("F8_E4M3", [2, 2])},
        {"caf\u00e9 \u4e2d": ("C64", [1])},
    ],
    ids=lambda tensors: next(iter(tensors), "nothing")[:8],
)
def test_unusual_but_good(tmp_path: Path, tensors: dict[str, tuple[str, list[int]]]) -> None:
    write(tmp_path, {"model.safetensors": shard(tensors)})
    assert {n: (t.dtype, list(t.shape)) for n, t in read_checkpoint(tmp_path).tensors.items()} == tensors


def test_order_of_entries_does_not_matter(tmp_path: Path) -> None:
    header = {"b": entry("U8", [2], 3), "a": entry("U8", [3], 0)}
    write(tmp_path, {"model.safetensors": shard_bytes(header, b"aaabb")})
    infos, _ = read_header(tmp_path / "model.safetensors")
    assert [t.name for t in infos] == ["a", "b"]


def eight(length: int) -> bytes:
    return length.to_bytes(8, "little")


K1 = {
    "empty file": (b"", "has 0 bytes"),
    "seven bytes": (b"\x01" * 7, "has 7 bytes"),
    "length 0": (eight(0), "does not begin with '{'"),
    "length 2^64-1": (b"\xff" * 8 + b"{}", "18,446,744,073,709,551,615"),
    "length over the limit": (eight(100_000_001) + b"{}", "100,000,001"),
    "length over the file": (eight(3) + b"{}", "has 3 bytes"),
    "not UTF-8": (shard_bytes(b'{"\xff": 1}'), "not UTF-8: byte 2"),
    "not JSON": (shard_bytes(b'{"a": }'), "not valid JSON"),
    "two documents": (shard_bytes(b"{}{}"), "not valid JSON"),
    "BOM": (shard_bytes(b"\xef\xbb\xbf{}"), "does not begin with '{'"),
    "a list": (shard_bytes(b"[]"), "does not begin with '{'"),
    "leading space": (shard_bytes(b" {}"), "does not begin with '{'"),
    "nested": (shard_bytes(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"), "nested too deeply"),
    "an integer of 5000 digits": (shard_bytes(b'{"a": ' + b"9" * 5000 + b"}"), "not valid JSON"),
    "metadata a list": (shard_bytes({"__metadata__": []}), "__metadata__ is not an object of strings"),
    "metadata null": (shard_bytes({"__metadata__": None}), "__metadata__ is not an object of strings"),
    "metadata of numbers": (shard_bytes({"__metadata__": {"a": 1}}), "__metadata__ is not an object of strings"),
}


@pytest.mark.parametrize("name", K1)
def test_k1_headers(tmp_path: Path, name: str) -> None:
    data, shown = K1[name]
    # the place comes before the message, and the byte with it
    message, _, byte = shown.partition(": byte ")
    write(tmp_path, {"model.safetensors": data})
    error = refused(tmp_path, "QP201", "model.safetensors", message)
    if byte:
        assert error.problems[0].place.byte == int(byte)


GOOD = entry("F32", [2], 0)
K2: dict[str, tuple[dict[str, Any], int, str, str]] = {
    "truncated": ({"a": GOOD}, 7, "QP203", "ends at byte"),
    "trailing": ({"a": GOOD}, 9, "QP203", "1 bytes follow"),
    "trailing nothing": ({}, 1, "QP203", "1 bytes follow"),
    "hole": ({"z": GOOD, "a": entry("F32", [2], 9)}, 17, "QP203", "hole of 1 bytes"),
    "hole first": ({"a": entry("F32", [2], 4)}, 12, "QP203", "hole of 4 bytes"),
    "overlap": ({"z": GOOD, "a": entry("F32", [2], 4)}, 12, "QP203", "overlaps"),
    "same place": ({"z": GOOD, "a": GOOD}, 8, "QP203", "overlaps"),
    "negative": ({"a": {**GOOD, "data_offsets": [-8, 0]}}, 8, "QP204", "data_offsets"),
    "backwards": ({"a": {**GOOD, "data_offsets": [8, 0]}}, 8, "QP204", "data_offsets"),
    "too few bytes": ({"a": {**GOOD, "data_offsets": [0, 7]}}, 7, "QP204", "takes 8 bytes, its offsets span 7"),
    "overflow": ({"a": {**GOOD, "shape": [2**32, 2**32]}}, 8, "QP204", "takes 73,786,976,294,838,206,464 bytes"),
    "overflow to zero": ({"a": {**GOOD, "shape": [2**62, 4], "data_offsets": [0, 0]}}, 0, "QP204", "shape"),
    "huge dimension": ({"a": {**GOOD, "shape": [2**64]}}, 8, "QP204", "shape"),
    "negative dimensions": ({"a": {**GOOD, "shape": [-1, -2]}}, 8, "QP204", "shape"),
    "fraction": ({"a": {**GOOD, "shape": [2.0]}}, 8, "QP204", "shape"),
    "truth": ({"a": {**GOOD, "shape": [True, 2]}}, 8, "QP204", "shape"),
    "offsets of truth": ({"a": {**GOOD, "data_offsets": [False, 8]}}, 8, "QP204", "data_offsets"),
    "nine dimensions": ({"a": {**GOOD, "shape": [1] * 8 + [2]}}, 8, "QP204", "shape"),
    "unknown dtype": ({"a": {**GOOD, "dtype": "F128"}}, 8, "QP204", "unknown dtype 'F128'"),
    "dtype of control characters": ({"a": {**GOOD, "dtype": "\x1b[2J"}}, 8, "QP204", "unknown dtype '\\x1b[2J'"),
    "dtype a list": ({"a": {**GOOD, "dtype": []}}, 8, "QP204", "unknown dtype"),
    "dtype missing": ({"a": {"shape": [2], "data_offsets": [0, 8]}}, 8, "QP204", "unknown dtype 'None'"),
    "shape missing": ({"a": {"dtype": "F32", "data_offsets": [0, 8]}}, 8, "QP204", "shape"),
    "offsets missing": ({"a": {"dtype": "F32", "shape": [2]}}, 8, "QP204", "data_offsets"),
    "three offsets": ({"a": {**GOOD, "data_offsets": [0, 4, 8]}}, 8, "QP204", "data_offsets"),
    "not an object": ({"a": 1}, 0, "QP204", "entry lacks"),
    "half a byte": ({"a": {"dtype": "F4", "shape": [3], "data_offsets": [0, 1]}}, 1, "QP204", "F4 [3]"),
    "six bits misaligned": ({"a": {"dtype": "F6_E3M2", "shape": [2], "data_offsets": [0, 1]}}, 1, "QP204", "F6_E3M2"),
}


@pytest.mark.parametrize("name", K2)
def test_k2_entries(tmp_path: Path, name: str) -> None:
    header, size, code, shown = K2[name]
    write(tmp_path, {"model.safetensors": shard_bytes(header, bytes(size))})
    error = refused(tmp_path, code, "model.safetensors", shown)
    assert error.problems[0].place.tensor == ("" if "follow" in shown else "a")


@pytest.mark.parametrize("name", ["", "x" * 1025, "a\nb", "\x1b[2Ja", "\ud800", "a\u202eb"], ids=ascii)
def test_names_that_are_not_printable(tmp_path: Path, name: str) -> None:
    write(tmp_path, {"model.safetensors": shard_bytes({name: GOOD}, bytes(8))})
    error = refused(tmp_path, "QP204", "model.safetensors", "not printable")
    assert all(c.isprintable() or c == "\n" for c in str(error))


K3 = {
    "twice": '{"a": %s, "a": %s}',
    "twice, one escaped": '{"a": %s, "\\u0061": %s}',
    "metadata twice": '{"__metadata__": {}, "a": %s, "__metadata__": {}}',
    "in the metadata": '{"__metadata__": {"a": "1", "a": "2"}, "a": %s}',
    "in an entry": '{"a": {"dtype": "F32", "dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}',
}


@pytest.mark.parametrize("name", K3)
def test_k3_keys_twice(tmp_path: Path, name: str) -> None:
    header = K3[name].replace("%s", json.dumps(GOOD))
    write(tmp_path, {"model.safetensors": shard_bytes(header, bytes(8))})
    key = {"metadata twice": "__metadata__", "in an entry": "dtype"}.get(name, "a")
    refused(tmp_path, "QP205", "model.safetensors", f"'{key}' twice")


def test_k4_index_and_shards_disagree(tmp_path: Path) -> None:
    files = {"one.safetensors": shard(ONE), "two.safetensors": shard(TWO)}
    good = {"a.weight": "one.safetensors", "b.weight": "two.safetensors"}

    def model(name: str, listed: Any, **more: bytes) -> Path:
        listing = listed if isinstance(listed, bytes) else index(listed)
        return write(tmp_path / name, {**files, **{f"{n}.safetensors": data for n, data in more.items()}, INDEX: listing})

    refused(model("stored twice", good, two=shard({**TWO, **ONE})), "QP207", "two.safetensors", '"a.weight"', "one.safetensors")
    refused(model("unlisted", good, two=shard({**TWO, "c": ("U8", [1])})), "QP208", "two.safetensors", '"c"', "not in the index")
    refused(model("nowhere", {**good, "c": "one.safetensors"}), "QP208", INDEX, '"c"', "in no shard")
    refused(model("elsewhere", {"a.weight": "two.safetensors", "b.weight": "one.safetensors"}), "QP208", INDEX, '"a.weight"')
    refused(model("no shard", {**good, "c": "three.safetensors"}), "QP202", "three.safetensors", "not found")
    refused(model("no tensors", {}), "QP206", INDEX, "no tensors")
    refused(model("both", good, model=shard(ONE)), "QP206", INDEX, "both model.safetensors and an index")
    twice = index(good).replace(b'"b.weight"', b'"a.weight"')
    refused(model("twice in the index", twice), "QP205", INDEX, "'a.weight' twice")
    for name, document in {
        "list": b"[]",
        "no map": b"{}",
        "map a list": b'{"weight_map": []}',
        "numbers": b'{"weight_map": {"a": 1}}',
    }.items():
        refused(model(name, document), "QP206", INDEX)
    refused(model("torn", index(good)[:-4]), "QP206", INDEX, "not valid JSON")
    refused(model("binary", b"\x80\x81"), "QP206", INDEX, "not UTF-8")
    extra = read_checkpoint(model("extra", good, three=shard(ONE)))  # the index decides what belongs to the model
    assert extra.files == ["one.safetensors", "two.safetensors"]


def test_single_files_as_transformers_takes_them(tmp_path: Path) -> None:
    beside = {"model.safetensors": shard(ONE), "consolidated.safetensors": shard(TWO)}
    assert list(read_checkpoint(write(tmp_path / "a", beside)).tensors) == ["a.weight"]
    assert list(read_checkpoint(write(tmp_path / "b", {"any.safetensors": shard(TWO)})).tensors) == ["b.weight"]
    refused(write(tmp_path / "c", {"one.safetensors": shard(ONE), "two.safetensors": shard(TWO)}), "QP206", "no index")


BAD_NAMES = [
    "../x.safetensors",
    "/etc/passwd",
    "a/b.safetensors",
    "..\\x",
    "x\0y",
    "",
    ".",
    "..",
    ".hidden.safetensors",
    "\ud800",
    "a\nb",
]


@pytest.mark.parametrize("name", BAD_NAMES, ids=ascii)
def test_k5_names_that_are_not_plain(tmp_path: Path, name: str) -> None:
    write(tmp_path / "x.safetensors", {}, None).rmdir()
    write(tmp_path, {"x.safetensors": shard(ONE)}, None)
    model = write(tmp_path / "model", {INDEX: index({"a.weight": name}), "a/b.safetensors": shard(ONE)})
    refused(model, "QP303", str(model), "not a plain file name")


def test_k5_files_that_are_not_regular(tmp_path: Path) -> None:
    def model(name: str) -> Path:
        folder = write(tmp_path / name, {INDEX: index({"a.weight": "a.safetensors"})})
        (tmp_path / "outside.safetensors").write_bytes(shard(ONE))
        return folder / "a.safetensors"

    link = model("link out")
    link.symlink_to(tmp_path / "outside.safetensors")
    refused(link.parent, "QP303", "a.safetensors", "outside the model directory")
    loop = model("loop")
    loop.symlink_to(loop)
    refused(loop.parent, "QP303", "a.safetensors", "cannot be resolved")
    dangling = model("dangling")
    dangling.symlink_to("nothing")
    refused(dangling.parent, "QP202", "a.safetensors", "not found")
    folder = model("folder")
    folder.mkdir()
    refused(folder.parent, "QP303", "a.safetensors", "not a regular file")
    device = model("device")
    device.symlink_to("/dev/zero")
    refused(device.parent, "QP303", "a.safetensors", "not a regular file")
    long = write(tmp_path / "long", {INDEX: index({"a.weight": "x" * 5000})})
    refused(long, "QP303", "cannot be resolved")
    inside = model("link inside")
    inside.symlink_to("real")
    (inside.parent / "real").write_bytes(shard(ONE))
    assert list(read_checkpoint(inside.parent).tensors) == ["a.weight"]
    hard = model("hard link")
    os.link(tmp_path / "outside.safetensors", hard)
    assert list(read_checkpoint(hard.parent).tensors) == ["a.weight"]


@pytest.mark.timeout(20)
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", INDEX])
def test_k5_pipes_do_not_hang(tmp_path: Path, name: str) -> None:
    files = {"model.safetensors": shard(ONE)} if name == "config.json" else {}
    write(tmp_path, files, None if name == "config.json" else CONFIG)
    os.mkfifo(tmp_path / name)
    refused(tmp_path, "QP303", name, "not a regular file")
    assert stat.S_ISFIFO((tmp_path / name).stat().st_mode)


def test_a_pipe_is_no_model(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    refused(tmp_path / "pipe", "QP202", "no such model")


def test_the_hub_cache_is_accepted_and_only_its_own_blobs(tmp_path: Path) -> None:
    files = {"config.json": json.dumps(CONFIG).encode(), "model.safetensors": shard(ONE)}
    snapshot = checkpoints.hub_cache(tmp_path, files)
    assert list(read_checkpoint(snapshot).tensors) == ["a.weight"]
    other = checkpoints.hub_cache(tmp_path / "other", {"model.safetensors": shard(TWO)})
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to(other / "model.safetensors")
    refused(snapshot, "QP303", "model.safetensors", "outside the model directory")
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to("/etc/hostname")
    refused(snapshot, "QP303", "config.json", "outside the model directory")


def test_k6_pickles(tmp_path: Path) -> None:
    zipped, bare = b"PK\x03\x04" + bytes(40), b"\x80\x02}q\x00X\x05\x00\x00\x00" + bytes(40)
    refused(write(tmp_path / "bin", {"pytorch_model.bin": zipped}), "QP301", "pytorch_model.bin", "convert it")
    refused(write(tmp_path / "renamed", {"model.safetensors": zipped}), "QP301", "model.safetensors")
    refused(write(tmp_path / "renamed2", {"model.safetensors": bare}), "QP301", "model.safetensors")
    refused(write(tmp_path / "listed", {"x.bin": zipped, INDEX: index({"a": "x.bin"})}), "QP301", "x.bin")
    mixed = write(tmp_path / "mixed", {"pytorch_model.bin": zipped, "model.safetensors": shard(ONE)})
    assert list(read_checkpoint(mixed).tensors) == ["a.weight"]


def test_a_header_that_begins_like_a_pickle(tmp_path: Path) -> None:
    header = json.dumps({"a": GOOD}).encode().ljust(0x280)  # its length begins with the bytes of pickle's protocol 2
    write(tmp_path, {"model.safetensors": shard_bytes(header, bytes(8))})
    assert list(read_checkpoint(tmp_path).tensors) == ["a"]


def test_k8_configs(tmp_path: Path) -> None:
    files = {"model.safetensors": shard(ONE)}
    refused(write(tmp_path / "missing", files, None), "QP211", "config.json", "missing")
    refused(write(tmp_path / "list", files, []), "QP211", "config.json", "not a JSON object")
    for name, data in {"torn": b'{"a', "binary": b"\xff\xfe", "empty": b"", "deep": b"[" * 100_000}.items():
        refused(write(tmp_path / name, {**files, "config.json": data}, None), "QP211", "config.json")
    refused(write(tmp_path / "twice", {**files, "config.json": b'{"a": 1, "a": 2}'}, None), "QP205", "config.json", "'a' twice")
    large = write(tmp_path / "large", {**files, "config.json": b" " * 16_000_001}, None)
    refused(large, "QP211", "config.json", "larger than 16,000,000 bytes")


def test_k8_contradictions_with_the_plan(tmp_path: Path) -> None:
    from quantplan.engine.apply import prepare

    def codes(model: Path, plan: dict[str, Any]) -> list[str]:
        try:
            return [p.code for p in prepare(model, plan).notes if p.code.startswith(("QP2", "QP3"))]
        except QuantplanError as error:
            return [p.code for p in error.problems]

    weights = {
        "model.embed_tokens.weight": ("BF16", [8, 64]),
        "lm_head.weight": ("BF16", [8, 64]),
        "a.weight": ("BF16", [64, 64]),
    }
    files, plan = {"model.safetensors": shard(weights)}, {"default": {"wq": "int4"}}
    for method in ("gptq", "fp8", "compressed-tensors"):
        config = {**CONFIG, "quantization_config": {"quant_method": method}}
        assert codes(write(tmp_path / method, files, config), plan) == ["QP212"]
    for key in ("auto_map", "_attn_implementation_internal", "trust_remote_code"):
        assert codes(write(tmp_path / key, files, {**CONFIG, key: "x"}), plan) == ["QP302"]
    head = {**plan, "overrides": [{"pattern": "lm_head", "wq": "int4"}]}
    assert codes(write(tmp_path / "tied", files, {**CONFIG, "tie_word_embeddings": True}), head) == ["QP118"]


def test_models_that_are_not_there(tmp_path: Path) -> None:
    refused(tmp_path, "QP211", "config.json")
    refused(write(tmp_path / "empty", {}), "QP202", "no safetensors file")
    refused(tmp_path / "nothing", "QP202", "no such model")
    refused("gpt2", "QP202", "no such model", "org/name")
    refused("./org/name", "QP202", "no such model")
    refused("x" * 5000, "QP202", "cannot be read")
    refused("a\0b", "QP202", "no such model")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_permission(tmp_path: Path) -> None:
    write(tmp_path, {"model.safetensors": shard(ONE)})
    (tmp_path / "model.safetensors").chmod(0)
    refused(tmp_path, "QP202", "model.safetensors", "cannot be read")


def test_shapes_file_round_trip(tmp_path: Path) -> None:
    model = read_checkpoint(sharded(tmp_path / "model", SHARDS, config={**CONFIG, "odd": [1e-5, None, "\u4e2d", "\ud800"]}))
    path = tmp_path / "model.shapes.json"
    path.write_bytes(json_bytes(shapes_document(model)))
    shapes = read_checkpoint(path)
    assert kinds(shapes) == kinds(model)
    assert shapes.config == model.config
    assert shapes.path is None
    with pytest.raises(QuantplanError, match="QP202"):
        shapes.require_path()
    again = json_bytes(shapes_document(shapes))
    assert again == path.read_bytes()


def kinds(checkpoint: Checkpoint) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {name: (t.dtype, t.shape) for name, t in checkpoint.tensors.items()}


SHAPES = {"format": "quantplan-shapes", "version": 1, "config": {}, "tensors": {"a": ["F32", 2]}}


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"format": "x"}, "QP209"),
        ({"version": 2}, "QP209"),
        ({"config": []}, "QP209"),
        ({"tensors": None}, "QP209"),
        ({"tensors": {"a": "F32"}}, "QP209"),
        ({"tensors": {"a": []}}, "QP209"),
        ({"tensors": {"a": ["F32", -1]}}, "QP204"),
        ({"tensors": {"a": ["F32", "2"]}}, "QP204"),
        ({"tensors": {"a": [["F32"]]}}, "QP204"),
        ({"tensors": {"a\n": ["F32", 1]}}, "QP204"),
    ],
    ids=str,
)
def test_bad_shapes_files(tmp_path: Path, change: dict[str, Any], code: str) -> None:
    (tmp_path / "shapes.json").write_text(json.dumps({**SHAPES, **change}))
    refused(tmp_path / "shapes.json", code, "shapes.json")


# K12: whatever the bytes, only QuantplanError escapes

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
ENTRIES = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "BF16", "F4", "X", ""]) | JSON,
        "shape": st.lists(st.integers(-1, 3) | st.integers() | JSON, max_size=4) | JSON,
        "data_offsets": st.lists(st.integers(-1, 20) | st.integers() | JSON, max_size=3) | JSON,
        "more": JSON,
    },
)
HEADERS = (
    st.dictionaries(st.sampled_from(["a", "b", "__metadata__", ""]) | st.text(max_size=6), ENTRIES | JSON, max_size=4) | JSON
)
FUZZ = settings(max_examples=150, deadline=2000, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)


def only_ours(path: Path) -> None:
    try:
        read_checkpoint(path)
    except QuantplanError as error:
        assert error.problems[0].code[:3] in ("QP2", "QP3")
        str(error).encode()  # the message can be printed


@FUZZ
@given(header=HEADERS, data=st.binary(max_size=24), cut=st.integers(0, 40))
def test_fuzz_headers(tmp_path: Path, header: Any, data: bytes, cut: int) -> None:
    whole = shard_bytes(header, data)
    write(tmp_path, {"model.safetensors": whole[: len(whole) - cut] if cut < 20 else whole})
    only_ours(tmp_path)


@FUZZ
@given(position=st.integers(0, 300), replacement=st.binary(min_size=1, max_size=4))
def test_fuzz_bytes_of_a_good_file(tmp_path: Path, position: int, replacement: bytes) -> None:
    good = shard({**ONE, **TWO})
    at = position % len(good)
    write(tmp_path, {"model.safetensors": good[:at] + replacement + good[at + len(replacement) :]})
    only_ours(tmp_path)


@FUZZ
@given(data=st.binary(max_size=64))
def test_fuzz_any_bytes(tmp_path: Path, data: bytes) -> None:
    write(tmp_path, {"model.safetensors": data, "config.json": data, "shapes": data}, None)
    only_ours(tmp_path / "shapes")
    only_ours(tmp_path)
    write(tmp_path, {})
    only_ours(tmp_path)


@FUZZ
@given(
    document=st.fixed_dictionaries(
        {"weight_map": st.dictionaries(st.text(max_size=6), st.text(max_size=12) | JSON, max_size=4) | JSON}
    )
    | JSON
)
def test_fuzz_indexes(tmp_path: Path, document: Any) -> None:
    write(tmp_path, {"one.safetensors": shard(ONE), INDEX: json.dumps(document).encode()})
    only_ours(tmp_path)


@FUZZ
@given(changes=st.fixed_dictionaries({}, optional={k: JSON for k in SHAPES}))
def test_fuzz_shapes_files(tmp_path: Path, changes: dict[str, Any]) -> None:
    (tmp_path / "shapes.json").write_text(json.dumps({**SHAPES, **changes}))
    only_ours(tmp_path / "shapes.json")


# the Hub


def in_a_process(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING")) and "proxy" not in k.lower()}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env={**kept, **environment}, capture_output=True, text=True, timeout=120)


def test_a_hub_id_offline(tmp_path: Path) -> None:
    code = "from quantplan.headers import read_checkpoint\ntry: read_checkpoint('org/name')\nexcept Exception as e: print(e)"
    done = in_a_process(code, HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path))
    assert done.stdout.startswith("org/name: QP406 the Hub is switched off (HF_HUB_OFFLINE)"), done.stderr


class Hub:
    """As much of the Hub as reading a repository takes: model info, files with ranges. `served`: bytes of each file sent."""

    commit = "0123456789abcdef0123456789abcdef01234567"

    def __init__(self, files: dict[str, bytes], status: int = 200) -> None:
        self.files, self.status = files, status
        self.served: dict[str, int] = {}
        hub = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *arguments: object) -> None:
                pass

            def do_HEAD(self) -> None:
                hub.answer(self, body=False)

            def do_GET(self) -> None:
                hub.answer(self, body=True)

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def answer(self, request: http.server.BaseHTTPRequestHandler, body: bool) -> None:
        path = request.path.partition("?")[0]
        status, data, headers = self.status, b"", {}
        if status != 200:
            pass
        elif path.startswith("/api/models/org/name/tree/"):
            data = json.dumps([{"type": "file", "path": n, "size": len(d), "oid": n} for n, d in self.files.items()]).encode()
        elif path.startswith("/api/models/org/name"):
            siblings = [{"rfilename": name} for name in self.files]
            data = json.dumps({"id": "org/name", "sha": self.commit, "siblings": siblings, "private": False}).encode()
        elif path.startswith("/org/name/resolve/") and path.split("/", 5)[5] in self.files:
            name = path.split("/", 5)[5]
            data = self.files[name]
            headers = {"ETag": f'"{len(data)}{name}"', "X-Repo-Commit": self.commit, "Accept-Ranges": "bytes"}
            if request.headers.get("Range"):
                first, _, last = request.headers["Range"].removeprefix("bytes=").partition("-")
                whole = len(data)
                data = data[int(first) : int(last or whole) + 1]
                status, headers["Content-Range"] = 206, f"bytes {first}-{int(first) + len(data) - 1}/{whole}"
            if body:
                self.served[name] = self.served.get(name, 0) + len(data)
        else:
            status, headers = 404, {"X-Error-Code": "EntryNotFound"}
        request.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(data))}.items():
            request.send_header(key, value)
        request.end_headers()
        if body:
            request.wfile.write(data)


@pytest.fixture
def hub() -> Iterator[Any]:
    made: list[Hub] = []

    def make(files: dict[str, bytes], status: int = 200) -> Hub:
        made.append(Hub(files, status))
        return made[-1]

    yield make
    for each in made:
        each.server.shutdown()
        each.server.server_close()


READ = """
import sys
from quantplan.errors import QuantplanError
from quantplan.headers import read_checkpoint
try:
    found = read_checkpoint("org/name")
    tensors = {n: (t.dtype, t.shape, t.file) for n, t in found.tensors.items()}
    print(found.revision, found.path, tensors, found.config["model_type"])
except QuantplanError as error:
    print(error)
assert "torch" not in sys.modules
"""


def from_hub(hub: Hub, home: Path, code: str = READ) -> str:
    done = in_a_process(code, HF_ENDPOINT=hub.url, HF_HOME=str(home), HF_HUB_DISABLE_TELEMETRY="1", HF_HUB_DISABLE_XET="1")
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_headers_from_a_hub_without_the_weights(tmp_path: Path, hub: Any) -> None:
    large = {"a.weight": ("BF16", [1024, 1024]), "c.weight": ("U8", [8])}
    files = {"one.safetensors": shard(large), "two.safetensors": shard(TWO), "config.json": json.dumps(CONFIG).encode()}
    listed = {"a.weight": "one.safetensors", "c.weight": "one.safetensors", "b.weight": "two.safetensors"}
    fake = hub({**files, INDEX: index(listed)})
    shown = from_hub(fake, tmp_path)
    assert shown.split()[:2] == [fake.commit, "None"], shown
    for part in (
        "'a.weight': ('BF16', (1024, 1024), 'one.safetensors')",
        "'b.weight': ('F32', (3,), 'two.safetensors')",
        "llama",
    ):
        assert part in shown
    assert len(files["one.safetensors"]) > 2_000_000
    assert fake.served["one.safetensors"] <= 100_001


def test_a_hub_repository_that_is_malformed(tmp_path: Path, hub: Any) -> None:
    config = json.dumps(CONFIG).encode()
    cases = {
        "QP204 unknown dtype 'F128'": {"model.safetensors": shard_bytes({"a": {**GOOD, "dtype": "F128"}}, bytes(8))},
        "QP201": {"model.safetensors": shard_bytes(b"[]")},
        "name: QP201": {"model.safetensors": b"\xff" * 16},
        "QP207": {
            "one.safetensors": shard(ONE),
            "two.safetensors": shard({**TWO, **ONE}),
            INDEX: index({"a.weight": "one.safetensors", "b.weight": "two.safetensors"}),
        },
        "QP202 the repository has no safetensors weights": {"pytorch_model.bin": b"x"},
    }
    for number, (shown, files) in enumerate(cases.items()):
        assert shown in from_hub(hub({**files, "config.json": config}), tmp_path / str(number))


@pytest.mark.parametrize("status", [401, 404])
def test_a_hub_that_refuses(tmp_path: Path, hub: Any, status: int) -> None:
    assert "org/name: QP406 cannot be fetched from the Hub: " in from_hub(hub({}, status), tmp_path)


FETCH = """
from quantplan.engine.apply import with_weights
from quantplan.headers import read_checkpoint
found = read_checkpoint("org/name")
local = with_weights(found)
print(found.tensors.keys() == local.tensors.keys(), local.revision, local.source, sorted(p.name for p in local.path.iterdir()))
"""


def test_weights_are_fetched_of_the_commit_whose_headers_were_read(tmp_path: Path, hub: Any) -> None:
    fake = hub(
        {"model.safetensors": shard(ONE), "config.json": json.dumps(CONFIG).encode(), "model.bin": b"x", "tokenizer.json": b"{}"}
    )
    shown = from_hub(fake, tmp_path, FETCH)
    assert shown.split(maxsplit=3)[:3] == ["True", fake.commit, "org/name"]
    assert shown.split(maxsplit=3)[3].strip() == "['config.json', 'model.safetensors', 'tokenizer.json']"
    assert "model.bin" not in fake.served
