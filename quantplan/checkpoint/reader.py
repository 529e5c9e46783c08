"""Reading tensors: `pread` into fresh memory, so that a file cut short under us is an error and not a dead process."""

from __future__ import annotations

import contextlib
import math
import os
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from quantplan.errors import fail
from quantplan.headers import TensorInfo, checked_file
from quantplan.models.modules import Matrix

if TYPE_CHECKING:
    import torch
    from torch import Tensor

TORCH_DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32", "I16": "int16",
    "I8": "int8", "U8": "uint8", "BOOL": "bool", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "U16": "uint16",
    "U32": "uint32", "U64": "uint64", "F8_E8M0": "float8_e8m0fnu", "C64": "complex64",
}  # fmt: skip


@contextlib.contextmanager
def reading(source: str | os.PathLike[str], tensor: str = "") -> Iterator[None]:
    """The operating system's refusals to read as QP202, naming the file."""
    try:
        yield
    except OSError as error:
        raise fail("QP202", f"cannot be read: {error.strerror}", file=str(error.filename or source), tensor=tensor) from error


class TensorReader:
    """Open files of one checkpoint directory; any thread may read. Close it, or use it in a `with`."""

    changed: frozenset[str] = frozenset()  # tensors that are read as something else than what is stored

    def __init__(self, folder: Path, tensors: Mapping[str, TensorInfo]) -> None:
        self.folder, self.tensors = folder, tensors
        self._descriptors: dict[str, int] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> TensorReader:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes every file."""
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    def _descriptor(self, name: str) -> int:
        with self._lock:
            if name not in self._descriptors:
                with reading(self.folder / name):
                    self._descriptors[name] = os.open(checked_file(self.folder, name), os.O_RDONLY | os.O_CLOEXEC)
            return self._descriptors[name]

    def read_bytes(self, info: TensorInfo, start: int = 0, size: int | None = None) -> bytearray:
        """`size` bytes of a tensor's data from `start` (all of it by default). Raises QP210 when the file has become
        shorter than its header said, QP202 when it cannot be read."""
        size = info.size - start if size is None else size
        buffer = bytearray(size)
        view, at = memoryview(buffer), 0
        descriptor = self._descriptor(info.file)
        while at < size:
            with reading(info.file, info.name):
                got = os.preadv(descriptor, [view[at:]], info.start + start + at)
            if got == 0:
                raise fail(
                    "QP210",
                    "the file became shorter while it was read",
                    "is something writing it?",
                    file=info.file,
                    tensor=info.name,
                )
            at += got
        return buffer

    def read(self, name: str) -> Tensor:
        """A whole tensor."""
        info = self.tensors.get(name)
        if info is None:
            raise fail("QP221", "tensor is missing", file=str(self.folder), tensor=name)
        return self._tensor(self.read_bytes(info), info.dtype).view(info.shape)

    def read_rows(self, matrix: Matrix, start: int, stop: int) -> Tensor:
        """Rows `[start, stop)` of a matrix, in the dtype they are stored in."""
        info = self.tensors[matrix.tensor]
        slab_rows, slab_columns = info.shape[-2:]
        width = slab_columns * info.size // max(1, math.prod(info.shape))
        slab = (matrix.index or 0) * slab_rows
        if matrix.transposed:
            whole = self._tensor(self.read_bytes(info, slab * width, slab_rows * width), info.dtype)
            return whole.view(slab_rows, slab_columns).t()[matrix.first + start : matrix.first + stop].contiguous()
        data = self.read_bytes(info, (slab + matrix.first + start) * width, (stop - start) * width)
        return self._tensor(data, info.dtype).view(stop - start, matrix.columns)

    @staticmethod
    def _tensor(data: bytearray, dtype: str) -> Tensor:
        import torch

        kind: torch.dtype = getattr(torch, TORCH_DTYPES[dtype])
        return torch.frombuffer(data, dtype=kind) if data else torch.empty(0, dtype=kind)
