"""quantplan.json: what was done, from what, with what, and the hash of every tensor, so that a run can be repeated and an
output checked. Torch-free; no paths, times or host names, so that the same run gives the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from quantplan.assignment import Assignment
from quantplan.checkpoint.durable import hash_file
from quantplan.checkpoint.layout import OutputLayout, json_bytes
from quantplan.headers import Checkpoint
from quantplan.plan.resolve import Resolution

NAME = "quantplan.json"
UNKNOWN = "0" * 64
VERSIONED = ("quantplan", "torch", "safetensors", "transformers", "compressed-tensors")


def versions() -> dict[str, str]:
    """Versions of what determines the bytes or how they load; packages that are absent are left out."""
    found = {}
    for package in VERSIONED:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def source_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """The source's name (never a path), revision, and its files with sizes and header hashes."""
    name = (
        Path(checkpoint.source).resolve().name if checkpoint.path is not None and not checkpoint.revision else checkpoint.source
    )
    sizes: dict[str, int] = {}
    for tensor in checkpoint.tensors.values():
        sizes[tensor.file] = max(sizes.get(tensor.file, 0), tensor.end)
    files = {f: {"size": sizes[f], "header_sha256": checkpoint.header_hashes.get(f, "")} for f in sorted(sizes)}
    return {"name": name, "revision": checkpoint.revision or None, "files": files}


def fingerprint(resolution: Resolution, layout: OutputLayout) -> dict[str, Any]:
    """What determines the output's bytes; a run is resumed only by one with the same."""
    return {
        "plan": json.loads(resolution.loaded.canonical()),
        "source": source_of(resolution.checkpoint),
        "config": dict(resolution.checkpoint.config),
        "times": {f: _changed(resolution.checkpoint, f) for f in resolution.checkpoint.files},
        "output": [layout.size, [f.name for f in layout.files]],
        "versions": versions(),
    }


def _changed(checkpoint: Checkpoint, file: str) -> int:
    """When a source file was changed last, in ns: a source edited in between must not be half taken over."""
    return (checkpoint.path / file).stat().st_mtime_ns if checkpoint.path else 0


def treatments(assignments: Mapping[str, Assignment]) -> list[dict[str, Any]]:
    """How modules were treated, grouped: schemes with every option, the algorithm, and the modules."""
    groups: dict[str, dict[str, Any]] = {}
    for a in assignments.values():
        if a.wq is None:
            continue
        treatment = {
            "wq": {"scheme": a.wq.name, **a.wq.model_dump(mode="json", exclude={"dynamic"})},
            "aq": None if a.aq is None else {"scheme": a.aq.name, **a.aq.model_dump(mode="json")},
            "algorithm": {"name": a.algorithm.name, **a.algorithm.model_dump(mode="json")},
        }
        if a.observer is not None:
            treatment["observer"] = {"name": a.observer.name, **a.observer.model_dump(mode="json")}
        groups.setdefault(json.dumps(treatment), {**treatment, "modules": []})["modules"].append(a.name)
    return list(groups.values())


def provenance(
    resolution: Resolution,
    layout: OutputLayout,
    hashes: Mapping[str, str],
    others: Mapping[str, str] | Iterable[str],
    threads: int,
    data: str = UNKNOWN,
    changed: Iterable[str] = (),
    training: Mapping[str, Any] | None = None,
) -> bytes:
    """The document. `hashes`: sha256 of each tensor; `others`: of each other file, or the names alone; `threads`: that
    calibration computes with; `data`: sha256 of its data, where the plan takes any; `training`: how the output was trained. Its
    length does not depend on the hashes, so that the estimate can be exact."""
    named = dict(others) if isinstance(others, Mapping) else dict.fromkeys(others, UNKNOWN)
    header = {f.name: _sha256(f.header) for f in layout.files}
    calibration = {"calibration": {**_settings(resolution, threads), "sha256": data}} if resolution.takes_data else {}
    cache = {} if resolution.kv_cache is None else {"kv_cache": resolution.kv_cache.as_dict()}
    return json_bytes({
        "quantplan": 1,
        "plan": json.loads(resolution.loaded.canonical()),
        "format": resolution.plan.output.format,
        "source": source_of(resolution.checkpoint),
        "versions": versions(),
        "treatments": treatments(resolution.assignments),
        **cache,
        **calibration,
        **_transforms(resolution, layout, frozenset(changed), training is not None),
        **({} if training is None else {"training": dict(training)}),
        "files": {f.name: {"size": f.size, "header_sha256": header[f.name]} for f in layout.files},
        "other_files": {name: named[name] for name in sorted(named)},
        "tensors": {name: hashes.get(name, UNKNOWN) for name in layout.tensors},
    })  # fmt: skip


def _settings(resolution: Resolution, threads: int) -> dict[str, Any]:
    """The calibration settings, a file's name without its folder, and the threads, on which rounding errors depend: but for
    statistics that were collected before."""
    settings = resolution.calibration.model_dump(mode="json")
    settings["source"] = Path(settings["source"]).name
    return settings if resolution.collected is not None else {**settings, "threads": threads}


def _transforms(resolution: Resolution, layout: OutputLayout, changed: frozenset[str], trained: bool) -> dict[str, Any]:
    """The transforms with every option, and which tensors they, or training, changed: a digit for each of `tensors`, so that the
    length is known beforehand."""
    if not resolution.transforms and not trained:
        return {}
    listed = [{"name": t.name, **t.model_dump(mode="json")} for t in resolution.transforms]
    sources = {t.name: u.source.name for f in layout.files for u in f.units for t in u.outputs}
    digits = "".join("1" if sources[name] in changed else "0" for name in layout.tensors)
    return {"transforms": {"applied": listed, "changed": digits}}


def other_hashes(documents: Mapping[str, bytes], files: Mapping[str, Path]) -> dict[str, str]:
    """sha256 of the documents and side files that stand beside the weights."""
    return {n: _sha256(d) for n, d in documents.items()} | {n: hash_file(p) for n, p in files.items()}


def _sha256(data: bytes) -> str:
    import hashlib

    return hashlib.sha256(data).hexdigest()
