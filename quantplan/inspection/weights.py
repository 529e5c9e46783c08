"""The matrices of a checkpoint by name, float or quantized, read one at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from quantplan.checkpoint.provenance import NAME as RECORD
from quantplan.checkpoint.reader import TensorReader
from quantplan.checkpoint.stored import StoredMatrix, stored_matrices
from quantplan.engine.verify import ROWS, changed_tensors, read_record, row_pieces
from quantplan.format import FORMATS, Format
from quantplan.headers import Checkpoint
from quantplan.models.modules import Matrix, find_modules, natural_key

if TYPE_CHECKING:
    from torch import Tensor

    from quantplan.scheme import Params
    from quantplan.tensor import QuantizedTensor


@dataclass(frozen=True)
class Stored:
    """A matrix on disk. `dtype`: of a float one, as torch calls it; `size`: bytes of all that is stored for it;
    `rewritten`: a transform changed it before it was quantized, so that it is not the source's."""

    matrix: Matrix
    size: int
    dtype: str = ""
    quantized: StoredMatrix | None = None
    rewritten: bool = False

    @property
    def name(self) -> str:
        return self.matrix.name


class CheckpointWeights:
    """Every 2-D matrix of a checkpoint, and every expert of fused ones, in the order layers come in; vectors and convolutions
    are not among them. Use it in a `with`; what is in memory is one matrix.

    Raises QP220 for a quantized checkpoint that quantplan did not write, QP221 where tensors are missing, QP222 for schemes
    this quantplan cannot read.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self._reader = TensorReader(checkpoint.require_path(), checkpoint.tensors)
        self._format: Format | None = None
        try:
            self.matrices: Mapping[str, Stored] = self._find()
        except BaseException:
            self._reader.close()
            raise

    def __enter__(self) -> CheckpointWeights:
        return self

    def __exit__(self, *exc: object) -> None:
        self._reader.close()

    def _find(self) -> dict[str, Stored]:
        tensors, folder = self.checkpoint.tensors, self.checkpoint.require_path()
        found: list[Stored] = []
        used: set[str] = set()
        changed: frozenset[str] = frozenset()
        if self.checkpoint.config.get("quantization_config") or (folder / RECORD).exists():
            record = read_record(folder)
            changed = changed_tensors(record)
            self._format = FORMATS.get(record["format"])()
            for treatment in record["treatments"]:
                for stored in stored_matrices(treatment, self._reader):
                    names = self._format.layout(stored.matrix, stored.wq, stored.aq).keys()
                    size = sum(tensors[n].size for n in names if n in tensors)
                    found.append(Stored(stored.matrix, size, quantized=stored, rewritten=bool(changed & names)))
                    used |= names
        rest = replace(self.checkpoint, tensors={n: t for n, t in tensors.items() if n not in used})
        for module in find_modules(rest).values():
            for matrix in module.matrices if module.dtype else ():
                size = module.tensor.size // len(module.matrices)
                found.append(Stored(matrix, size, module.dtype, rewritten=module.tensor.name in changed))
        return {s.name: s for s in sorted(found, key=lambda s: natural_key(s.name))}

    def codes(self, stored: Stored) -> QuantizedTensor:
        """A quantized matrix as it lies there."""
        assert stored.quantized is not None and self._format is not None
        return self._format.decode(stored.matrix, stored.quantized.wq, stored.quantized.aq, self._reader.read)

    def inputs(self, stored: Stored) -> Params:
        """The parameters of its static activations; empty for dynamic ones."""
        if stored.quantized is None or self._format is None:
            return {}
        return self._format.decode_inputs(stored.matrix, stored.quantized.aq, self._reader.read)

    def pieces(self, stored: Stored, codes: QuantizedTensor | None = None) -> Iterator[tuple[int, Tensor]]:
        """The values of a matrix piece by piece: the first row, and rows from there, float32. `codes`, where they have been
        read already."""
        if stored.quantized is None:
            yield from row_pieces(stored.matrix, self._reader)
            return
        values = stored.quantized.wq.quantizer().dequantize(codes or self.codes(stored))
        rows = max(1, ROWS // stored.matrix.columns)
        for first in range(0, stored.matrix.rows, rows):
            yield first, values[first : first + rows]
