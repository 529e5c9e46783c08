"""What calibration has solved, block by block, kept beside the output until that is written: the memory of an interrupted run.

`blocks.jsonl` names the blocks that are done, one a line; `block-00012.safetensors` holds their matrices, codes and parameters,
and other tensors that transforms changed; `states-00012.safetensors` the hidden states that block 12 is given, verbatim, so that
a resumed run makes the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, Protocol

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from quantplan.checkpoint import durable
from quantplan.scheme import Params, SchemeConfig
from quantplan.tensor import QuantizedTensor

JOURNAL = "blocks.jsonl"
_CHANGED = "changed"


class Solved(Protocol):
    """What outputs are written from, beside the source."""

    @property
    def changed(self) -> frozenset[str]:
        """The stored tensors that are not as the source has them, quantized ones too."""

    def __contains__(self, matrix: object) -> bool: ...

    def read(self, matrix: str, scheme: SchemeConfig) -> QuantizedTensor:
        """One solved matrix."""

    def inputs(self, matrix: str) -> Params:
        """What was found for the static activations of one matrix, or for the cache of one attention module."""

    def replacement(self, tensor: str) -> Tensor | None:
        """What became of a stored tensor that is not quantized; None: it is as it was."""


class SolvedBlocks:
    """The folder of an interrupted or finished calibration. One process at a time: the output's lock covers it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._files: dict[str, str] = {}  # matrix -> file
        self._changed: dict[str, str] = {}  # stored tensor that a transform changed -> file, '' for a quantized one
        self.done: list[dict[str, Any]] = []  # what the journal says of each block, in order
        for line in self._lines():
            if line.get("file") != _block(len(self.done)) or not self._matches(line):
                break
            self._know(line)
        self._cut_journal()

    def _cut_journal(self) -> None:
        """Leaves the lines of what is done, so that the next one follows them whole."""
        path = self.folder / JOURNAL
        text = "".join(json.dumps(line) + "\n" for line in self.done).encode()
        if path.exists() and path.read_bytes() != text:
            with durable.named_errors(path):
                durable.write_durably(path, text)

    def _lines(self) -> list[dict[str, Any]]:
        path = self.folder / JOURNAL
        found = []
        for line in path.read_text("utf-8", "replace").splitlines() if path.exists() else []:
            try:
                found.append(dict(json.loads(line)))
            except (ValueError, TypeError):
                break  # torn by a crash: it and what follows is not done
        return found

    def _matches(self, line: Mapping[str, Any]) -> bool:
        """Whether a block's file is what the journal says."""
        try:
            return _sha256(self.folder / line["file"]) == line["sha256"]
        except (OSError, KeyError, TypeError):
            return False

    def named(self, fact: Literal["unseen", "unfollowed", "untuned"]) -> list[str]:
        """The matrices of which a block says so: experts that no token came to; what may have been given padding that counted;
        what an algorithm that tunes left as it was solved."""
        return [name for line in self.done for name in line.get(fact, ())]

    def __contains__(self, matrix: object) -> bool:
        return matrix in self._files

    def read(self, matrix: str, scheme: SchemeConfig) -> QuantizedTensor:
        """One solved matrix."""
        with safe_open(self.folder / self._files[matrix], "pt") as file:
            names = [n for n in file.keys() if n.rpartition("/")[0] == matrix]  # noqa: SIM118
            parts = {n.rpartition("/")[2]: file.get_tensor(n) for n in names}
        return QuantizedTensor(parts.pop("codes"), parts, scheme)

    def inputs(self, matrix: str) -> Params:
        """What was found for the static activations of one solved matrix, or for the cache of one attention module; empty where
        they are dynamic or none."""
        with safe_open(self.folder / self._files[matrix], "pt") as file:
            names = [n for n in file.keys() if n.rpartition("/")[0] == f"{matrix}/input"]  # noqa: SIM118
            return {n.rpartition("/")[2]: file.get_tensor(n) for n in names}

    def states(self, keep: Callable[[Tensor], Tensor] = lambda state: state) -> dict[str, Tensor] | None:
        """The hidden states the first block that is not done is given, each as `keep` returns it; None when they are lost."""
        path = self.folder / _states(len(self.done))
        try:
            if not self.done or _sha256(path) != self.done[-1]["states"]:
                return None
        except OSError:
            return None
        with safe_open(path, "pt") as file:
            return {name: keep(file.get_tensor(name).clone()) for name in file.keys()}  # noqa: SIM118  a view holds the file

    def forget(self) -> None:
        """Nothing is done."""
        for path in self.folder.iterdir():
            durable.remove(path)
        self.done.clear()
        self._files.clear()
        self._changed.clear()

    def add(
        self,
        solved: Mapping[str, QuantizedTensor],
        states: Mapping[str, Tensor],
        facts: Mapping[str, Any],
        inputs: Mapping[str, Params] = MappingProxyType({}),
        changed: Mapping[str, Tensor | None] = MappingProxyType({}),
    ) -> None:
        """One more block is done: its matrices, the hidden states after it, what to say about it, for matrices with static
        activations what was found for these, and what transforms made of stored tensors (None: of one that is quantized)."""
        number = len(self.done)
        file = _block(number)
        tensors = {f"{name}/{part}": t for name, q in solved.items() for part, t in {"codes": q.codes, **q.params}.items()}
        tensors |= {f"{name}/input/{part}": t.clone() for name, params in inputs.items() for part, t in params.items()}
        tensors |= {f"{name}/{_CHANGED}": t for name, t in changed.items() if t is not None}
        facts = {**facts, "changed": {name: t is not None for name, t in changed.items()}}
        with durable.named_errors(self.folder):
            digest = self._save(file, tensors, sync=True)
            following = self._save(_states(number + 1), states, sync=False)
            line = {**facts, "file": file, "sha256": digest, "states": following}
            line |= {"matrices": sorted(solved), "inputs": sorted(inputs)}
            with open(self.folder / JOURNAL, "a", encoding="utf-8") as journal:
                journal.write(json.dumps(line) + "\n")
                journal.flush()
                os.fsync(journal.fileno())
            durable.remove(self.folder / _states(number))
        self._know(line)

    def _know(self, line: dict[str, Any]) -> None:
        self.done.append(line)
        self._files |= dict.fromkeys([*line["matrices"], *line.get("inputs", ())], line["file"])
        for name, kept in line["changed"].items():
            self._changed[name] = line["file"] if kept else ""

    @property
    def changed(self) -> frozenset[str]:
        """The stored tensors that transforms changed, quantized ones too."""
        return frozenset(self._changed)

    def replacement(self, tensor: str) -> Tensor | None:
        """What a transform made of a stored tensor that is not quantized, float32; None when it left it alone."""
        file = self._changed.get(tensor)
        if not file:
            return None
        with safe_open(self.folder / file, "pt") as opened:
            found: Tensor = opened.get_tensor(f"{tensor}/{_CHANGED}")
        return found

    def _save(self, name: str, tensors: Mapping[str, Tensor], sync: bool) -> str:
        """Writes a file whole, under its name only when it is; its sha256. States are not synced: a power cut that loses them
        is seen by the hash."""
        part = self.folder / f"{name}.part"
        save_file({n: t.contiguous() for n, t in tensors.items()}, part)
        digest = _sha256(part)
        if sync:
            with open(part, "rb") as written:
                os.fsync(written.fileno())
        os.rename(part, self.folder / name)
        return digest


def _block(number: int) -> str:
    return f"block-{number:05}.safetensors"


def _states(block: int) -> str:
    return f"states-{block:05}.safetensors"


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
