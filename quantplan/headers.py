"""What a checkpoint holds, read from its headers alone: names, dtypes, shapes and places of tensors, and config.json.

Our own strict parse of safetensors headers: stricter than the library (duplicate names are refused) and every refusal
names the file and the tensor. No weights are read, no torch is imported, no code of the checkpoint runs.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quantplan.errors import QuantplanError, fail, printable

DTYPE_BITS = {
    "F64": 64, "I64": 64, "U64": 64, "C64": 64, "F32": 32, "I32": 32, "U32": 32, "F16": 16, "BF16": 16, "I16": 16, "U16": 16,
    "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "I8": 8, "U8": 8, "BOOL": 8,
    "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
}  # fmt: skip
FLOAT_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
HEADER_LIMIT, INDEX_LIMIT, CONFIG_LIMIT = 100_000_000, 256_000_000, 16_000_000
NAME_LIMIT, RANK_LIMIT, TENSOR_LIMIT = 1024, 8, 5_000_000
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".h5", ".keras", ".msgpack", ".npy", ".npz")
PICKLE_STARTS = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")  # torch's zip, and bare ones
CONVERT = "convert it to safetensors first: load it where you trust it and save with safe_serialization=True"
SHAPES_FORMAT = "quantplan-shapes"


@dataclass(frozen=True)
class TensorInfo:
    """A stored tensor: `start` and `end` are byte offsets in `file` (a plain file name)."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str = ""
    start: int = 0
    end: int = 0

    @property
    def size(self) -> int:
        """Bytes of its data."""
        return math.prod(self.shape) * DTYPE_BITS[self.dtype] // 8


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint's tensors and config. `path` is None when only names and shapes are known (a shapes file, a Hub id)."""

    source: str
    path: Path | None
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]
    revision: str = ""
    header_hashes: Mapping[str, str] = field(default_factory=dict)  # file -> sha256 of its header

    @property
    def files(self) -> list[str]:
        """The files that hold tensors, sorted."""
        return sorted({t.file for t in self.tensors.values()})

    @property
    def size(self) -> int:
        """Bytes of all tensors."""
        return sum(t.size for t in self.tensors.values())

    def require_path(self) -> Path:
        """The directory of the weights. Raises QP202 when only shapes are known."""
        if self.path is None:
            raise fail("QP202", f"'{self.source}' has shapes but no weights", "give a model directory or a Hub id")
        return self.path


def read_checkpoint(model: str | os.PathLike[str], revision: str | None = None) -> Checkpoint:
    """The headers of `model`: a directory, its config.json, a .safetensors file, a shapes file, or a Hub id.

    Raises QuantplanError QP2xx (structure), QP3xx (refused for safety), QP4xx (unreachable).
    """
    name, path = str(model), Path(model)
    try:
        if path.is_dir():
            return _read_directory(path)
        if path.is_file():
            if path.name == "config.json":
                return _read_directory(path.parent)
            if path.suffix == ".safetensors":
                return _read_directory(path.parent, only=path.name)
            return read_shapes(path)
    except OSError as error:
        raise fail("QP202", f"cannot be read: {error.strerror}", file=str(error.filename or name)) from None
    if name.count("/") == 1 and not name.startswith((".", "/", "~")) and not name.endswith((".json", ".safetensors")):
        from quantplan.hub import read_hub_headers

        return read_hub_headers(name, revision)
    raise fail("QP202", "no such model", "give a directory, a shapes file, or a Hub id such as org/name", file=name)


def _read_directory(path: Path, only: str | None = None) -> Checkpoint:
    config = read_config(path)
    present = sorted(p.name for p in path.iterdir() if p.suffix == ".safetensors")
    if only:
        names, listed = [only], None
    elif os.path.lexists(path / INDEX):
        listed = _read_index(checked_file(path, INDEX))
        names = sorted(set(listed.values()))
        if SINGLE in present and SINGLE not in names:
            raise fail(
                "QP206",
                f"both {SINGLE} and an index; readers differ in which they take",
                "remove one",
                file=str(path / INDEX),
            )
    elif SINGLE in present or len(present) == 1:  # as transformers: files beside it are something else
        names, listed = [SINGLE] if SINGLE in present else present, None
    elif present:
        raise fail("QP206", f"{len(present)} safetensors files and no index", f"add {INDEX}, or name one file", file=str(path))
    else:
        raise _no_safetensors(path)
    tensors: dict[str, TensorInfo] = {}
    hashes: dict[str, str] = {}
    for name in names:
        found, hashes[name] = read_header(checked_file(path, name))
        for info in found:
            if info.name in tensors:
                raise fail("QP207", f"tensor also stored in {tensors[info.name].file}", file=name, tensor=info.name)
            tensors[info.name] = info
    if listed is not None:
        _compare_with_index(listed, tensors, str(path / INDEX))
    return Checkpoint(str(path), path, config, tensors, header_hashes=hashes)


def _no_safetensors(path: Path) -> QuantplanError:
    pickles = sorted(p.name for p in path.iterdir() if p.suffix in PICKLES)
    if pickles:
        return fail("QP301", "only pickled weights, which can run code when opened", CONVERT, file=str(path / pickles[0]))
    return fail("QP202", "no safetensors file in the model directory", "is the download complete?", file=str(path))


def _compare_with_index(listed: Mapping[str, str], tensors: Mapping[str, TensorInfo], file: str) -> None:
    for name, shard in listed.items():
        info = tensors.get(name)
        if info is None or info.file != shard:
            where = "is in no shard" if info is None else f"is in {info.file}"
            raise fail("QP208", f"the index says {printable(shard)}, but the tensor {where}", file=file, tensor=name)
    extra = next((name for name in tensors if name not in listed), None)
    if extra is not None:
        raise fail("QP208", "the tensor is in a shard but not in the index", file=tensors[extra].file, tensor=extra)


def checked_file(folder: Path, name: str) -> Path:
    """`folder/name` when `name` is a plain file name and the file is a regular one inside `folder` or, through a link, in
    the Hub cache's blobs beside it. Raises QP303 otherwise, QP202 when there is none."""
    if not name or name != os.path.basename(name) or name.startswith(".") or "\\" in name or not name.isprintable():
        raise fail("QP303", f"'{printable(name)}' is not a plain file name", "shards lie beside the index", file=str(folder))
    path = folder / name
    try:
        real = path.resolve(strict=True)
        mode = real.stat().st_mode
    except FileNotFoundError:
        raise fail("QP202", "file not found", "is the download complete?", file=str(path)) from None
    except (OSError, RuntimeError) as error:
        raise fail("QP303", f"cannot be resolved ({error})", file=str(path)) from None
    if not stat.S_ISREG(mode):
        raise fail("QP303", "not a regular file", file=str(path))
    home = folder.resolve()
    blobs = home.parent.parent / "blobs"  # models--org--name/snapshots/REVISION -> models--org--name/blobs
    if path.is_symlink() and home not in real.parents and not (home.parent.name == "snapshots" and blobs in real.parents):
        text = f"is a link to {printable(str(real))}, outside the model directory"
        raise fail("QP303", text, "copy the file, or give the directory it lies in", file=str(path))
    return path


def _unique(kind: str, file: str) -> Any:
    def hook(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            seen: set[str] = set()
            twice = next(k for k, _ in pairs if k in seen or seen.add(k))  # type: ignore[func-returns-value]
            raise fail("QP205", f"{kind} has the key '{printable(twice)}' twice", file=file)
        return found

    return hook


def _parse_json(data: bytes, kind: str, file: str, code: str) -> Any:
    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=_unique(kind, file))
    except UnicodeDecodeError as error:
        raise fail(code, f"{kind} is not UTF-8", file=file, byte=error.start) from None
    except (ValueError, RecursionError) as error:
        text = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise fail(code, f"{kind} is not valid JSON: {text}", file=file) from None


def _read_limited(path: Path, limit: int, kind: str, code: str) -> bytes:
    try:
        with open(path, "rb") as file:
            data = file.read(limit + 1)
    except OSError as error:
        raise fail("QP202", f"cannot be read: {error.strerror}", file=str(path)) from None
    if len(data) > limit:
        raise fail(code, f"{kind} is larger than {limit:,} bytes", file=str(path))
    return data


def read_config(folder: Path) -> dict[str, Any]:
    """`folder/config.json` as a dict. Raises QP211 when it is missing or not a JSON object, QP303 as `checked_file` does."""
    path = folder / "config.json"
    if not path.exists():
        raise fail("QP211", "config.json is missing", "give the directory of a Hugging Face checkpoint", file=str(path))
    checked_file(folder, path.name)
    config = _parse_json(_read_limited(path, CONFIG_LIMIT, "config.json", "QP211"), "config.json", str(path), "QP211")
    if not isinstance(config, dict):
        raise fail("QP211", "config.json is not a JSON object", file=str(path))
    return config


def _read_index(path: Path) -> dict[str, str]:
    index = _parse_json(_read_limited(path, INDEX_LIMIT, "the index", "QP206"), "the index", str(path), "QP206")
    listed = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(listed, dict) or not all(isinstance(v, str) for v in listed.values()):
        raise fail("QP206", "the index has no weight_map from names to files", file=str(path))
    if not listed:
        raise fail("QP206", "the index lists no tensors", file=str(path))
    return listed


def read_header(path: Path) -> tuple[list[TensorInfo], str]:
    """The tensors of one safetensors file, in file order, and the sha256 of its header. Raises QP201, QP203 to QP205.

    Checked as the format's specification demands: sizes match shapes, data is contiguous and fills the file.
    """
    import hashlib

    name = path.name
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            prefix = file.read(8)
            if len(prefix) < 8:
                raise fail("QP201", f"has {size} bytes, less than a header length", "re-download it", file=str(path))
            length = int.from_bytes(prefix, "little")
            if length > HEADER_LIMIT or length > size - 8:
                if prefix.startswith(PICKLE_STARTS):
                    raise fail("QP301", "is a pickle, which can run code when opened", CONVERT, file=str(path))
                raise fail(
                    "QP201",
                    f"says its header has {length:,} bytes, the file has {size:,}",
                    "re-download it",
                    file=str(path),
                )
            raw = file.read(length)
    except OSError as error:
        raise fail("QP202", f"cannot be read: {error.strerror}", file=str(path)) from None
    if not raw.startswith(b"{"):
        raise fail("QP201", "header does not begin with '{'", "is it a safetensors file?", file=str(path), byte=8)
    header = _parse_json(raw, "the header", str(path), "QP201")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise fail("QP201", "__metadata__ is not an object of strings", file=str(path))
    if len(header) > TENSOR_LIMIT:
        raise fail("QP201", f"lists more than {TENSOR_LIMIT:,} tensors", file=str(path))
    infos = sorted(_tensors(header, name, 8 + length, str(path)), key=lambda t: (t.start, t.end))
    _check_contiguous(infos, 8 + length, size, str(path))
    return infos, hashlib.sha256(prefix + raw).hexdigest()


def _tensors(header: Mapping[str, Any], file: str, base: int, path: str) -> Iterable[TensorInfo]:
    for name, entry in header.items():
        info = tensor_entry(name, entry, path)
        begin, end = entry["data_offsets"]
        if end - begin != info.size or math.prod(info.shape) * DTYPE_BITS[info.dtype] % 8:
            shown = f"{info.dtype} {list(info.shape)} takes {info.size:,} bytes, its offsets span {end - begin:,}"
            raise fail("QP204", shown, "re-download the file", file=path, tensor=name)
        yield TensorInfo(name, info.dtype, info.shape, file, base + begin, base + end)


def tensor_entry(name: str, entry: Any, path: str) -> TensorInfo:
    """Name, dtype and shape of a header's or a shapes file's entry, checked. Raises QP204."""
    if not name or len(name) > NAME_LIMIT or not name.isprintable():
        raise fail("QP204", "tensor name is empty, too long or not printable", file=path, tensor=name)
    well_formed = (
        isinstance(entry, dict)
        and isinstance(entry.get("shape"), list)
        and all(type(n) is int and 0 <= n < 2**48 for n in entry["shape"])
        and len(entry["shape"]) <= RANK_LIMIT
        and isinstance(entry.get("data_offsets"), list)
        and len(entry["data_offsets"]) == 2
        and all(type(n) is int and n >= 0 for n in entry["data_offsets"])
        and entry["data_offsets"][0] <= entry["data_offsets"][1]
    )
    if not well_formed:
        raise fail("QP204", "entry lacks a valid dtype, shape or data_offsets", file=path, tensor=name)
    if not isinstance(entry.get("dtype"), str) or entry["dtype"] not in DTYPE_BITS:
        raise fail("QP204", f"unknown dtype '{printable(str(entry.get('dtype')))}'", file=path, tensor=name)
    return TensorInfo(name, entry["dtype"], tuple(entry["shape"]))


def _check_contiguous(infos: list[TensorInfo], base: int, size: int, path: str) -> None:
    at = base
    for info in infos:
        if info.start != at:
            kind = "overlaps the tensor before it" if info.start < at else f"leaves a hole of {info.start - at:,} bytes before it"
            raise fail("QP203", kind, "re-download the file", file=path, tensor=info.name, byte=info.start)
        at = info.end
        if at > size:
            raise fail("QP203", f"ends at byte {at:,} but the file has {size:,}", "re-download it", file=path, tensor=info.name)
    if at != size:
        raise fail("QP203", f"{size - at:,} bytes follow the last tensor", "re-download the file", file=path, byte=at)


def shapes_document(checkpoint: Checkpoint) -> dict[str, Any]:
    """The committed shapes file: names, dtypes and shapes, and config.json, enough to resolve any plan without weights."""
    tensors = {name: [info.dtype, *info.shape] for name, info in sorted(checkpoint.tensors.items())}
    return {"format": SHAPES_FORMAT, "version": 1, "config": dict(checkpoint.config), "tensors": tensors}


def read_shapes(path: Path) -> Checkpoint:
    """A shapes file written by `quantplan shapes`. Raises QP209 when it is not one."""
    advice = "write one with 'quantplan shapes MODEL'"
    document = _parse_json(_read_limited(path, INDEX_LIMIT, "the shapes file", "QP209"), "the shapes file", str(path), "QP209")
    if not isinstance(document, dict) or document.get("format") != SHAPES_FORMAT:
        raise fail("QP209", "not a shapes file", advice, file=str(path))
    if document.get("version") != 1:
        raise fail(
            "QP209",
            f"shapes file of version {document.get('version')!r}, this quantplan reads 1",
            advice,
            file=str(path),
        )
    config, listed = document.get("config"), document.get("tensors")
    if not isinstance(config, dict) or not isinstance(listed, dict):
        raise fail("QP209", "config or tensors is missing", advice, file=str(path))
    tensors = {}
    for name, entry in listed.items():
        if not isinstance(entry, list) or not entry:
            raise fail("QP209", "entry is not [dtype, dimensions...]", advice, file=str(path), tensor=name)
        tensors[name] = tensor_entry(name, {"dtype": entry[0], "shape": entry[1:], "data_offsets": [0, 0]}, str(path))
    return Checkpoint(str(path), None, config, tensors)
