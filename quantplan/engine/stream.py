"""Streaming: matrices are read row by row, quantized on all cores, and handed over in order. No model is instantiated.

Memory is bounded by a few matrices' codes, whatever the checkpoint's size: weights are read in pieces that fit the cache,
which is also several times faster than whole matrices.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING

import torch

from quantplan.algorithm import ALGORITHMS
from quantplan.checkpoint.layout import Unit
from quantplan.checkpoint.reader import TensorReader
from quantplan.engine.magnitudes import Magnitudes
from quantplan.errors import Place, QuantplanError, fail
from quantplan.models.modules import Matrix
from quantplan.scheme import BLOCK, NonFinite
from quantplan.tensor import QuantizedTensor, concatenate

if TYPE_CHECKING:
    from torch import Tensor

    from quantplan.engine.collected import CollectedStatistics
    from quantplan.engine.solved import Solved

PIECE = 1 << 19  # weights quantized at a time: their float32 copies stay in a core's cache
LOOKAHEAD = 2  # units in flight beyond one a worker


def quantized(
    units: Iterable[Unit],
    reader: TensorReader,
    workers: int,
    solved: Solved | None = None,
    collected: CollectedStatistics | None = None,
) -> Generator[tuple[Unit, QuantizedTensor], None, None]:
    """Each quantize-unit with its quantized matrix, in order; what calibration has `solved` is taken from there.
    `collected`: for algorithms that need statistics; matrices that it has none of are rounded.

    Raises QP601 for NaN or infinity in a weight, QP604 for statistics that have no factor."""
    units = list(units)
    sharing = (u.matrix for u in units if u.matrix and u.assignment and u.assignment.wq and u.assignment.wq.needs_absmax)
    magnitudes = Magnitudes(sharing, partial(_largest, reader))
    pending: deque[tuple[Unit, Future[QuantizedTensor]]] = deque()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # parallel over units: threads within an operation would only fight
    pool = ThreadPoolExecutor(workers, "quantplan", initializer=torch.set_num_threads, initargs=(1,))
    try:
        for unit in units:
            pending.append((unit, pool.submit(_quantize, unit, reader, magnitudes, solved, collected)))
            if len(pending) >= workers + LOOKAHEAD:
                first, future = pending.popleft()
                yield first, future.result()
        while pending:
            first, future = pending.popleft()
            yield first, future.result()
    finally:
        for _, future in pending:
            future.cancel()
        pool.shutdown(wait=True, cancel_futures=True)
        torch.set_num_threads(threads)


@torch.no_grad()
def _quantize(
    unit: Unit,
    reader: TensorReader,
    magnitudes: Magnitudes,
    solved: Solved | None,
    collected: CollectedStatistics | None,
) -> QuantizedTensor:
    matrix, assignment = unit.matrix, unit.assignment
    assert matrix is not None and assignment is not None and assignment.wq is not None
    if solved is not None and matrix.name in solved:
        return solved.read(matrix.name, assignment.wq)
    quantizer, algorithm = assignment.wq.quantizer(matrix.name), assignment.algorithm
    statistics = collected.of(matrix) if collected is not None and algorithm.needs else None
    if algorithm.needs and statistics is None:
        algorithm = ALGORITHMS.get("rtn")()
    try:
        absmax = magnitudes.of(matrix) if assignment.wq.needs_absmax else None
        rows = _rows_at_once(matrix) if assignment.wq.splittable else matrix.rows
        return concatenate([
            algorithm.solve(
                reader.read_rows(matrix, first, min(first + rows, matrix.rows)).float(), quantizer, absmax, statistics
            )
            for first in range(0, matrix.rows, rows)
        ])  # fmt: skip
    except NonFinite:
        raise _non_finite(matrix, reader) from None
    except QuantplanError as error:
        if collected is None or error.problems[0].code != "QP604":
            raise
        raise QuantplanError(p.at(Place(str(collected.folder), tensor=matrix.name)) for p in error.problems) from None


def _rows_at_once(matrix: Matrix) -> int:
    """Rows of one piece: a multiple of a block's side. A transposed matrix is read whole, so it is worked on whole."""
    if matrix.transposed:
        return matrix.rows
    return max(1, PIECE // matrix.columns // BLOCK) * BLOCK


def _non_finite(matrix: Matrix, reader: TensorReader) -> Exception:
    weight = reader.read_rows(matrix, 0, matrix.rows)
    bad = ~torch.isfinite(weight)
    row, column = divmod(int(bad.flatten().nonzero()[0]), matrix.columns)
    text = f"{int(bad.sum())} of {weight.numel()} weights are NaN or infinite, the first at [{row}, {column}] of {matrix.name}"
    file = reader.tensors[matrix.tensor].file
    return fail("QP601", text, "mend the checkpoint, or keep the module: keep: true", file=file, tensor=matrix.tensor)


def _largest(reader: TensorReader, matrix: Matrix) -> Tensor:
    """`max |w|`, read in pieces. Raises QP601."""
    rows = _rows_at_once(matrix)
    pieces = (reader.read_rows(matrix, r, min(r + rows, matrix.rows)) for r in range(0, matrix.rows, rows))
    largest = torch.stack([piece.abs().amax() for piece in pieces]).amax().float()
    if not torch.isfinite(largest):
        raise _non_finite(matrix, reader)
    return largest
