"""The quantized matrices of an output as they lie on disk: sizes and schemes, from its record and its headers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import count
from typing import Any

from pydantic import ValidationError

from quantplan.checkpoint.reader import TensorReader
from quantplan.errors import fail
from quantplan.models.modules import EXPERT_PARTS, Matrix
from quantplan.scheme import SCHEMES, SchemeConfig

ASK_TO_UPGRADE = "use the quantplan that wrote it, or a later one"


@dataclass(frozen=True)
class StoredMatrix:
    """A quantized matrix on disk, and how its weights and inputs are quantized."""

    matrix: Matrix
    wq: SchemeConfig
    aq: SchemeConfig | None


def scheme_of(options: Mapping[str, Any]) -> SchemeConfig:
    """A scheme from its name and options as files hold them. Raises QP107 for an unknown scheme, QP222 for unknown options."""
    member = SCHEMES.get(options.get("scheme", ""))
    try:
        return member(**{name: value for name, value in options.items() if name != "scheme"})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        what = f"{member.name}: {'.'.join(map(str, first['loc']))}: {first['msg']}"
        raise fail(
            "QP222", f"the quantization_config has an option this quantplan cannot read ({what})", ASK_TO_UPGRADE
        ) from None


def stored_matrices(treatment: Mapping[str, Any], reader: TensorReader) -> Iterator[StoredMatrix]:
    """The matrices of one entry of the record's `treatments`, in either format, in the record's order."""
    wq = scheme_of(treatment["wq"])
    aq = scheme_of(treatment["aq"]) if treatment.get("aq") else None
    for module in treatment["modules"]:
        for name in _matrix_names(module, reader):
            yield StoredMatrix(_matrix(name, wq, reader), wq, aq)


def _matrix_names(module: str, reader: TensorReader) -> Iterator[str]:
    """The stored matrices of a module: itself, or those that fused experts were split into."""
    parent, _, part = module.rpartition(".")
    if f"{module}.weight_scale" in reader.tensors or part not in EXPERT_PARTS:
        yield module
        return
    for index in count():
        names = [f"{parent}.{index}.{sub}" for sub in EXPERT_PARTS[part]]
        if f"{names[0]}.weight_scale" not in reader.tensors:
            return
        yield from names


def _matrix(name: str, wq: SchemeConfig, reader: TensorReader) -> Matrix:
    """A stored matrix with its size: said beside packed integers, else seen from the codes' shape."""
    if f"{name}.weight_shape" in reader.tensors:
        rows, columns = reader.read(f"{name}.weight_shape").tolist()
    elif f"{name}.weight" in reader.tensors:
        rows, columns = reader.tensors[f"{name}.weight"].shape
    elif f"{name}.weight_packed" in reader.tensors:
        rows, width = reader.tensors[f"{name}.weight_packed"].shape
        columns = width * 8 // wq.bits
    else:
        rows, columns = _native_shape(name, wq, reader)
    return Matrix(name, "", rows, columns)


def _native_shape(name: str, wq: SchemeConfig, reader: TensorReader) -> tuple[int, int]:
    """The size behind native codes, whose rows are padded with zero bits to 32: groups tell it, else columns at the end that
    are zero in every row are taken for padding."""
    codes = f"{name}.weight_codes"
    info = reader.tensors.get(codes)
    if info is None:
        raise fail("QP221", "tensor is missing", file=str(reader.folder), tensor=codes)
    rows, width = info.shape
    columns = width * 8 // wq.bits
    if wq.group:
        return rows, reader.tensors[f"{name}.weight_scale"].shape[-1] * wq.group
    from quantplan.numerics import unpack_bits

    spare = 31 // wq.bits
    used = unpack_bits(reader.read(codes), wq.bits, columns)[:, columns - spare :].any(0).tolist()
    while used and not used.pop():
        columns -= 1
    return rows, columns
