"""What a plan costs on a model, before anything runs: bytes out (exact), bits per weight, peak memory, disk."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from quantplan.checkpoint.layout import OutputLayout, Unit
from quantplan.checkpoint.provenance import provenance
from quantplan.checkpoint.side_files import output_config, side_files, written_sizes
from quantplan.plan.resolve import Resolution
from quantplan.statistics import HELD, LATEST

INTERPRETER = 420 << 20  # resident size of Python with torch and the plan, seen on Linux x86-64
PIECES = 24 << 20  # float copies of the piece a worker quantizes
BYTES_PER_SECOND = 0.8e9  # source bytes a core quantizes by rounding, order of magnitude
LIVE = 560 << 20  # the same as INTERPRETER with transformers and a model without weights
IN_MEMORY = 2 << 30  # hidden states beyond this lie on disk where memory is short
FLOPS = 1.5e11  # that a core does in a block's products, order of magnitude


@dataclass(frozen=True)
class Estimate:
    """Predictions. Sizes in bytes; `bits_per_weight` is over quantized modules with scales and zero points counted,
    `bits_per_weight_whole` over the whole model."""

    source_bytes: int
    tensor_bytes: int  # the safetensors files
    output_bytes: int  # the whole directory; the side files only when the source is a directory
    bits_per_weight: float
    bits_per_weight_whole: float
    peak_memory: int
    seconds: float
    files: int

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for `--json`."""
        return dict(vars(self))


def cores() -> int:
    """How many threads compute where nothing else is said: OMP_NUM_THREADS, as in torch, or all cores."""
    asked = os.environ.get("OMP_NUM_THREADS", "")
    return int(asked) if asked.isdecimal() and int(asked) > 0 else os.cpu_count() or 1


def estimate(resolution: Resolution, layout: OutputLayout, workers: int) -> Estimate:
    """The cost of a resolved plan, with so many threads at work."""
    units = [u for f in layout.files for u in f.units]
    treated = [u for u in units if u.kind == "quantize"]
    weights = sum(u.elements for u in treated)
    everything = sum(_elements(t.shape) for t in resolution.checkpoint.tensors.values())
    files: Mapping[str, Any] = side_files(resolution.checkpoint) if resolution.checkpoint.path is not None else {}
    documents = {**layout.side_documents(), "config.json": output_config(resolution)}
    documents["quantplan.json"] = provenance(resolution, layout, {}, [*documents, *files], workers)
    tensor_bits = 8 * sum(t.size for t in layout.tensors.values())
    work = sum(u.source.size * (u.assignment.algorithm.passes if u.assignment else 0.3) for u in _once(units))
    memory, seconds = _calibration(resolution, workers)
    statistics = _statistics(treated, workers) if resolution.collected is not None else 0
    return Estimate(
        source_bytes=resolution.checkpoint.size,
        tensor_bytes=layout.size,
        output_bytes=layout.size + written_sizes(documents, files),
        bits_per_weight=8 * sum(u.size for u in treated) / weights if weights else 0.0,
        bits_per_weight_whole=tensor_bits / everything if everything else 0.0,
        peak_memory=max(memory, _peak(units, workers) + statistics),
        seconds=round(2 + seconds + work / BYTES_PER_SECOND / workers, 1),
        files=len(layout.files),
    )


def _peak(units: list[Unit], workers: int) -> int:
    """Codes of the largest matrices in flight and their encoded form, the pieces being worked on, and the interpreter.
    A matrix whose one scale needs the whole of it is held in float32, several times."""
    held = [
        u.elements * (24 if u.assignment and u.assignment.wq and not u.assignment.wq.splittable else 3) for u in units if u.matrix
    ]
    casts = [2 * u.source.size for u in units if u.kind == "cast"]
    in_flight = sum(sorted(held, reverse=True)[: workers + 3])
    return INTERPRETER + workers * PIECES + in_flight + max(casts, default=0)


def _statistics(treated: list[Unit], workers: int) -> int:
    """Second moments that were collected before, with what is kept of them (damped, and a factor of the inverse) and, for those
    in use, what computing it takes. Matrices of one module with as many columns are taken as given one input."""
    matrices = [u.matrix for u in treated if u.matrix and u.assignment and u.assignment.algorithm.needs]
    inputs = {m.name: (m.name.rpartition(".")[0], m.columns) for m in matrices}
    sizes = {chosen: 3 * 4 * chosen[1] ** 2 for chosen in inputs.values()}
    order = list(inputs.values())
    in_use = max((sum(sizes[i] for i in set(order[at : at + workers])) for at in range(len(order))), default=0)
    latest = sum(sorted(sizes.values(), reverse=True)[:LATEST])
    return max(in_use, latest, min(HELD, sum(sizes.values()))) + in_use


def _calibration(resolution: Resolution, workers: int) -> tuple[int, float]:
    """Peak memory and seconds of running the model on calibration data, beside what algorithms do with it; nothing where the
    plan takes none, or its statistics were collected before. A block, the widest input's second moments and their factors, and
    what each token leaves in memory while all batches wait at one matrix: orders of magnitude."""
    if not resolution.takes_data or resolution.collected is not None:
        return 0, 0.0
    chosen = [a.algorithm for a in resolution.quantized]
    chains = 2 if any("drift" in a.needs or a.tunes for a in chosen) else 1
    matrices = [m for a in resolution.quantized or resolution.assignments.values() for m in a.matrices]
    if not matrices:
        return LIVE, 0.0
    weights, columns = sum(m.rows * m.columns for m in matrices), sorted(m.columns for m in matrices)
    blocks = len({number.group() for m in matrices if (number := re.search(r"^.*?\.\d+\.", m.name))})
    width, widest = columns[len(columns) // 2], columns[-1]
    tokens = resolution.calibration.samples * resolution.calibration.sequence_length
    moments = 6 * 4 * widest**2 if any(a.needs for a in chosen) else 0
    hidden = min(16 * width * tokens * chains, IN_MEMORY)
    waiting = 8 * (width + widest) * tokens * chains
    memory = LIVE + chains * 4 * weights // max(1, blocks) + moments + hidden + waiting
    return memory, 2 * weights * tokens * chains * (2 if moments else 1) / FLOPS / workers


def _once(units: list[Unit]) -> list[Unit]:
    """One unit for each source tensor."""
    return list({u.source.name: u for u in units}.values())


def _elements(shape: tuple[int, ...]) -> int:
    count = 1
    for n in shape:
        count *= n
    return count
