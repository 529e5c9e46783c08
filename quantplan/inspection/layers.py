"""What is seen of one stored matrix: its range, and, where it is quantized, its scales and how its grid is used."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from quantplan.engine.difference import Difference, DifferenceSums
from quantplan.explain import scheme_text
from quantplan.inspection.spread import THRESHOLD, Spread, SpreadSums
from quantplan.inspection.weights import CheckpointWeights, Stored
from quantplan.scheme import Params, SchemeConfig

if TYPE_CHECKING:
    from quantplan.tensor import QuantizedTensor


@dataclass(frozen=True)
class Scales:
    """The steps of a grid, by magnitude (a scale may be negative): what one unit is worth. `spread = maximum / minimum`."""

    count: int
    minimum: float
    median: float
    maximum: float
    spread: float


@dataclass(frozen=True)
class Saturation:
    """Share of codes at the lowest and the highest value of the grid. Where ranges are taken from the largest weight, one code
    of each group is near an end; more are there where the range was shrunk."""

    low: float
    high: float

    @property
    def total(self) -> float:
        return self.low + self.high


@dataclass(frozen=True)
class InputRange:
    """What static activations are rounded with: the stored parameters, and the lowest and highest value they can hold (None
    where blocks have scales of their own below a stored one)."""

    parameters: dict[str, float]
    low: float | None
    high: float | None


@dataclass(frozen=True)
class LayerInspection:
    """One matrix. `treatment`: its scheme as plans say it, or the dtype of a float one; `bits`: stored bits per weight, scales
    and zero points counted; `outliers`: share of weights of a magnitude over `mean + 6 std`; `error`: against the other
    checkpoint, None without one, where it lacks the matrix, or where a transform rewrote it."""

    name: str
    treatment: str
    quantized: bool
    rows: int
    columns: int
    size: int
    bits: float
    values: Spread
    outliers: float
    scales: Scales | None = None
    saturation: Saturation | None = None
    inputs: InputRange | None = None
    error: Difference | None = None
    rewritten: bool = False

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for `--json`."""
        return {
            "module": self.name,
            "treatment": self.treatment,
            "quantized": self.quantized,
            "shape": [self.rows, self.columns],
            "bytes": self.size,
            "bits_per_weight": self.bits,
            **self.values.as_dict(),
            "outlier_share": self.outliers,
            "scales": None if self.scales is None else asdict(self.scales),
            "saturation": None if self.saturation is None else {**asdict(self.saturation), "total": self.saturation.total},
            "inputs": None if self.inputs is None else asdict(self.inputs),
            "rewritten": self.rewritten,
            "error": None if self.error is None else self.error.as_dict(),
        }


def inspect_layer(
    weights: CheckpointWeights, stored: Stored, other: CheckpointWeights | None = None, match: Stored | None = None
) -> LayerInspection:
    """The figures of one matrix; with `match`, the matrix of the same name in `other`, also its error against that."""
    matrix, quantized = stored.matrix, stored.quantized
    codes = None if quantized is None else weights.codes(stored)
    sums, error = SpreadSums(), DifferenceSums()
    against = None if other is None or match is None else other.pieces(match)
    for _, piece in weights.pieces(stored, codes):
        sums.add(piece)
        if against is not None:
            error.add(next(against)[1], piece)  # shapes are equal, so pieces are
    spread = sums.result()
    return LayerInspection(
        name=stored.name,
        treatment=stored.dtype if quantized is None else _treatment(quantized.wq, quantized.aq),
        quantized=quantized is not None,
        rows=matrix.rows,
        columns=matrix.columns,
        size=stored.size,
        bits=8 * stored.size / max(1, matrix.rows * matrix.columns),
        values=spread,
        outliers=_outliers(weights, stored, spread, codes),
        scales=None if codes is None else _scales(codes),
        saturation=None if codes is None else _saturation(codes),
        inputs=None if quantized is None or quantized.aq is None else _inputs(quantized.aq, weights.inputs(stored)),
        error=None if against is None else error.result(),
        rewritten=stored.rewritten,
    )


def _treatment(wq: SchemeConfig, aq: SchemeConfig | None) -> str:
    return scheme_text(wq) + ("" if aq is None else f", activations {scheme_text(aq)}")


def _outliers(weights: CheckpointWeights, stored: Stored, spread: Spread, codes: QuantizedTensor | None) -> float:
    """The share of weights beyond the check's bound: counted in a second reading, where there are any."""
    if not spread.outlier:
        return 0.0
    bound = spread.mean + THRESHOLD * spread.std
    found = sum(int((piece.abs() > bound).sum()) for _, piece in weights.pieces(stored, codes))
    return found / (stored.matrix.rows * stored.matrix.columns)


def _scales(codes: QuantizedTensor) -> Scales:
    steps = codes.scheme.quantizer().step(dict(codes.params)).float().abs().flatten()
    low, middle, high = float(steps.min()), float(steps.median()), float(steps.max())
    return Scales(steps.numel(), low, middle, high, high / low if low else 0.0)


def _saturation(codes: QuantizedTensor) -> Saturation:
    low, high = grid_ends(codes.scheme.meaning())
    return Saturation(*(float((codes.codes == end).sum()) / codes.codes.numel() for end in (low, high)))


@cache
def grid_ends(scheme: SchemeConfig) -> tuple[int, int]:
    """The codes of the lowest and the highest value of a scheme's grid."""
    import torch

    quantizer = scheme.quantizer()
    params = quantizer.fit(torch.ones(1, 1, scheme.group or 1), absmax=torch.ones(()) if scheme.needs_absmax else None)
    values = quantizer.decode(torch.arange(2**scheme.bits, dtype=torch.uint8).view(1, 1, -1), params).flatten()
    known = values.isfinite()  # small floats have codes for NaN and infinity
    low = int(torch.where(known, values, torch.inf).argmin())
    return low, int(torch.where(known, values, -torch.inf).argmax())


def _inputs(aq: SchemeConfig, params: Params) -> InputRange | None:
    import torch

    if not params:
        return None
    shown = {name: float(p.float().flatten()[0]) for name, p in params.items()}
    if aq.tensor_params:
        return InputRange(shown, None, None)
    ends = torch.tensor(grid_ends(aq.meaning()), dtype=torch.uint8)
    low, high = aq.quantizer().decode(ends, params).tolist()
    return InputRange(shown, low, high)
