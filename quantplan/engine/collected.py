"""Statistics of the float model, kept as a folder: collected once, used by any plan for that model.

`statistics.json` says of which model and data they are, and where each matrix's are. `block-00012.safetensors` holds, for each
input in that block, `hessian` and `absmax` (float32, second moments and largest magnitudes over the tokens that count),
`count` (int64), and what observers saw of it (`histogram.low`, ...), for static ranges. Matrices that are given the same input
share one.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from quantplan.assignment import Assignment
from quantplan.checkpoint import durable
from quantplan.checkpoint.layout import json_bytes
from quantplan.checkpoint.provenance import source_of, versions
from quantplan.checkpoint.writer import staging_of
from quantplan.errors import fail, printable
from quantplan.headers import Checkpoint
from quantplan.models.modules import Matrix
from quantplan.observer import OBSERVERS, ObserverConfig
from quantplan.plan.resolve import Resolution
from quantplan.plan.schema import Calibration
from quantplan.scheme import NonFinite, Params, SchemeConfig, check_finite
from quantplan.statistics import HELD, LATEST, Statistics

NAME = "statistics.json"
VERSION = 2
WITHOUT_RANGES = 1  # the version before it, which had nothing of observers
OBSERVERS_STORED = ("minmax", "static_range", "moving_average", "histogram", "mse", "headroom")
SAMPLES, SAMPLE = 64, 1 << 12  # places in each file of weights, and bytes, that tell fine-tuned models from one another
COLLECT = "collect them again: quantplan calibrate"


def stored_observers() -> dict[str, ObserverConfig]:
    """Observers whose statistics are collected, by the names of these."""
    configs: list[ObserverConfig] = [OBSERVERS.get(name)() for name in OBSERVERS_STORED]
    return {config.statistics_name: config for config in configs}


def model_digest(checkpoint: Checkpoint) -> str:
    """sha256 over the config, and every weight file's name, header and samples of its bytes: fine-tuned models have the same
    headers, and the same weights are not the same model where a window slides."""
    config = json.dumps(checkpoint.config, sort_keys=True)
    found = hashlib.sha256(repr((config, sorted(checkpoint.header_hashes.items()))).encode())
    for file in sorted(checkpoint.files):
        with open(checkpoint.require_path() / file, "rb", buffering=0) as weights:
            size = os.fstat(weights.fileno()).st_size
            for sample in range(SAMPLES):
                found.update(os.pread(weights.fileno(), SAMPLE, size * sample // SAMPLES))
    return found.hexdigest()


class CollectedStatistics:
    """A folder of statistics. Raises QP234 where it cannot be read, or is not what was written."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        try:
            raw = (self.folder / NAME).read_bytes()
            document = json.loads(raw)
            assert document["quantplan_statistics"] in (VERSION, WITHOUT_RANGES)
            self._observers = dict(document["observers"]) if document["quantplan_statistics"] == VERSION else {}
            self.settings = Calibration.model_validate(document["calibration"]["settings"])
            self.data: str = document["calibration"]["sha256"]
            self._model, self._digest = str(document["source"]["name"]), document["model_sha256"]
            self._files: dict[str, str] = document["files"]
            self._inputs: dict[str, tuple[str, str]] = {
                matrix: (file, name)
                for name, entry in document["inputs"].items()
                for matrix in entry["matrices"]
                for file in (entry["file"],)
            }
            assert all(file in self._files and Path(file).name == file for file, _ in self._inputs.values())
        except OSError as error:
            raise fail("QP234", f"cannot be read: {error.strerror or error}", COLLECT, file=str(self.folder / NAME)) from None
        except (ValueError, KeyError, TypeError, AttributeError, AssertionError):
            raise fail("QP234", "is not what quantplan calibrate writes", COLLECT, file=str(self.folder / NAME)) from None
        self.sha256 = hashlib.sha256(raw).hexdigest()
        self._checked: set[str] = set()
        self._held: dict[str, Statistics] = {}  # the last asked for comes last
        self._alive: weakref.WeakValueDictionary[str, Statistics] = weakref.WeakValueDictionary()
        self._lock = threading.Lock()
        self._found: dict[tuple[str, SchemeConfig, ObserverConfig], Params] = {}

    def __contains__(self, matrix: object) -> bool:
        return matrix in self._inputs

    def check(self, resolution: Resolution) -> list[str]:
        """That they are of the resolution's model and have all that its plan needs; the names of experts that no token came to.

        Raises QP235 for another model, QP236 for what statistics of single inputs cannot serve, QP605 for a matrix that was
        given no data."""
        wants = [f"transform '{t.name}'" for t in resolution.transforms]
        wants += [f"algorithm '{a.algorithm.name}'" for a in resolution.needs_data if a.algorithm.tunes]
        wants += ["a key-value cache to quantize"] if resolution.kv_cache is not None else []
        if wants:
            text = f"the plan has {wants[0]}, which takes more than statistics of single inputs of the float model"
            raise fail("QP236", text, "leave out --stats", file=resolution.loaded.source.file)
        if model_digest(resolution.checkpoint) != self._digest:
            text = f"the statistics are of another model ('{printable(self._model, 80)}'), or its weights were changed since"
            raise fail("QP235", text, COLLECT, file=str(self.folder))
        unseen = []
        for assignment in resolution.needs_data:
            if assignment.observer is not None:
                self._check_observer(assignment.observer, resolution)
            for matrix in assignment.matrices:
                if matrix.name in self:
                    continue
                if assignment.observer is not None or (matrix.index is None and ".experts." not in matrix.name):
                    text = f"'{matrix.name}' was given no input: it is outside of the blocks, or the model never used it"
                    advice = "give it algorithm: rtn, and no static activations, in an override"
                    raise fail("QP605", text, advice, file=str(self.folder))
                unseen.append(matrix.name)
        return unseen

    def _check_observer(self, observer: ObserverConfig, resolution: Resolution) -> None:
        """Raises QP236 where what was collected is not what `observer` collects."""
        stored = self._observers.get(observer.statistics_name)
        if stored == observer.collecting:
            return
        if not self._observers:
            text, advice = "the statistics are of an earlier version, which collected nothing for static activations", COLLECT
        elif stored is None:
            text = f"the statistics have nothing for observer '{observer.name}' of static activations"
            advice = f"choose another observer ({', '.join(OBSERVERS_STORED)} or percentile), or leave out --stats"
        else:
            name, value = next((n, v) for n, v in observer.collecting.items() if stored.get(n) != v)
            text = f"observer '{observer.name}' has {name}: {value}, and the statistics were collected with {stored.get(name)}"
            advice = "leave the option out, or --stats"
        raise fail("QP236", text, advice, file=resolution.loaded.source.file)

    def inputs(self, matrix: Matrix, assignment: Assignment) -> Params:
        """The parameters of a matrix's static activations, from what observers saw of the float model's; `assignment` has some,
        and `check` has passed. Raises QP601."""
        file, name = self._inputs[matrix.name]
        aq, observer = assignment.aq, assignment.observer
        assert aq is not None and observer is not None
        if (name, aq, observer) not in self._found:
            start = f"{name}.{observer.statistics_name}."
            with self._opened(file) as opened:
                state = {n.removeprefix(start): opened.get_tensor(n) for n in opened.keys() if n.startswith(start)}  # noqa: SIM118
            quantizer, observing = aq.quantizer(assignment.name), observer.observer()
            try:
                observing.load_state(state)
                self._found[name, aq, observer] = quantizer.fit_static(observing.result(quantizer))
            except NonFinite:
                raise fail("QP601", "NaN or infinity in the inputs", "keep the module: keep: true", tensor=name) from None
        return self._found[name, aq, observer]

    def of(self, matrix: Matrix) -> Statistics | None:
        """Of the matrix's input, without drift; one object for matrices that share it, while any of them uses it, and then until
        others fill what may be held. From any thread."""
        if matrix.name not in self:
            return None
        file, name = self._inputs[matrix.name]
        with self._lock:
            found = self._alive.get(name) or self._read(file, name, matrix.columns)
            self._held.pop(name, None)
            while len(self._held) >= LATEST and found.nbytes + sum(s.nbytes for s in self._held.values()) > HELD:
                del self._held[next(iter(self._held))]
            self._held[name] = self._alive[name] = found
            return found

    def _read(self, file: str, name: str, columns: int) -> Statistics:
        with self._opened(file) as opened:
            hessian, count = opened.get_tensor(f"{name}.hessian"), int(opened.get_tensor(f"{name}.count"))
        if hessian.shape != (columns, columns):
            text = f"'{name}' is of {len(hessian)} columns, not {columns}"
            raise fail("QP234", text, COLLECT, file=str(self.folder / file))
        try:
            check_finite(hessian)
        except NonFinite:
            text = "NaN or infinity in the second moments"
            raise fail("QP601", text, COLLECT, file=str(self.folder / file), tensor=name) from None
        return Statistics(hessian, count)

    @contextmanager
    def _opened(self, file: str) -> Iterator[Any]:
        path = self.folder / file
        try:
            if file not in self._checked and durable.hash_file(path) != self._files[file]:
                raise fail("QP234", "was changed since it was written", COLLECT, file=str(path))
            self._checked.add(file)
            with safe_open(path, "pt") as opened:
                yield opened
        except (OSError, SafetensorError) as error:
            raise fail("QP234", f"cannot be read: {error}", COLLECT, file=str(path)) from None


class StatisticsWriter:
    """Fills a folder of statistics beside `out` and puts it there in one step. Use it in a `with`. Raises QP501 where another
    run writes it, QP503 where it exists."""

    def __init__(self, out: Path) -> None:
        self.out = Path(os.path.abspath(out))
        self.staging = staging_of(self.out)
        self._files: dict[str, str] = {}
        self._inputs: dict[str, dict[str, Any]] = {}

    @contextmanager
    def opened(self) -> Iterator[StatisticsWriter]:
        """Holds the lock; what an interrupted run left is removed, and so is what a failed one leaves."""
        lock = self.staging.with_name(f"{self.staging.name}.lock")
        with durable.named_errors(self.out):
            self.out.parent.mkdir(parents=True, exist_ok=True)
            descriptor, holder = durable.lock(lock)
            if descriptor is None:
                text = f"another run is writing this output ({printable(holder)})"
                raise fail("QP501", text, "wait for it, or choose another output", file=str(self.out))
            try:
                if os.path.lexists(self.out):
                    raise fail("QP503", "the output exists", "choose another, or remove it", file=str(self.out))
                durable.remove(self.staging)
                self.staging.mkdir()
                yield self
            finally:
                durable.remove(self.staging)
                durable.unlock(lock, descriptor)

    def add(self, block: int, inputs: Mapping[str, Mapping[str, Tensor]], matrices: Mapping[str, list[str]]) -> None:
        """One block: for each input its tensors, and the matrices that are given it."""
        file = f"block-{block:05}.safetensors"
        path = self.staging / file
        with durable.named_errors(path):
            save_file({f"{name}.{part}": t for name, parts in inputs.items() for part, t in parts.items()}, path)
            with open(path, "rb") as written:
                os.fsync(written.fileno())
            self._files[file] = durable.hash_file(path)
        for name, parts in inputs.items():
            entry = {"file": file, "columns": len(parts["absmax"]), "count": int(parts["count"]), "matrices": matrices[name]}
            self._inputs[name] = entry

    def publish(self, checkpoint: Checkpoint, settings: Calibration, data: str, observers: Mapping[str, ObserverConfig]) -> None:
        """Writes the document and puts the folder in place. `observers`: whose statistics there are, by their names."""
        described = {**settings.model_dump(mode="json"), "source": Path(settings.source).name}
        document = {
            "quantplan_statistics": VERSION,
            "source": source_of(checkpoint),
            "model_sha256": model_digest(checkpoint),
            "calibration": {"settings": described, "sha256": data},
            "observers": {name: observer.collecting for name, observer in observers.items()},
            "versions": versions(),
            "files": self._files,
            "inputs": self._inputs,
        }
        with durable.named_errors(self.out):
            durable.write_durably(self.staging / NAME, json_bytes(document))
            durable.sync_folder(self.staging)
            if not durable.rename(self.staging, self.out, durable.RENAME_NOREPLACE):
                os.rename(self.staging, self.out)
            durable.sync_folder(self.out.parent)
