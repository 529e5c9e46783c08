"""Calibration, block by block: load a block, run it on the hidden states of the one before, solve its matrices on the way, keep
what they became, let it go. Memory is bounded by a block, its statistics and the hidden states, whatever the model's size.

Two chains run side by side: the quantized one, in which every matrix sees what the quantized model so far makes of the data,
and, where an algorithm asks for it, the float one, which the quantized one has drifted away from.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quantplan.assignment import Assignment
from quantplan.calibration.read import CalibrationSet
from quantplan.checkpoint.reader import TensorReader
from quantplan.engine import memory
from quantplan.engine.batches import Batches
from quantplan.engine.block import Block
from quantplan.engine.correcting import Correcting
from quantplan.engine.magnitudes import Magnitudes
from quantplan.engine.scaling import Scaling
from quantplan.engine.solved import SolvedBlocks
from quantplan.errors import fail
from quantplan.live.blocks import find_blocks
from quantplan.live.experts import check_all_experts
from quantplan.live.forward import Call, Forward
from quantplan.live.skeleton import skeleton
from quantplan.live.weights import Weights
from quantplan.models.modules import Matrix
from quantplan.plan.kv_cache import projections
from quantplan.plan.resolve import Resolution


@dataclass(frozen=True)
class SolvedBlock:
    """Progress: one block is done. `losses`: for each matrix, the squared error of its outputs over their squared size."""

    name: str
    number: int
    total: int
    losses: Mapping[str, float]
    seconds: float
    resumed: bool = False

    @property
    def loss(self) -> float:
        """The mean of its matrices' losses."""
        return sum(self.losses.values()) / max(1, len(self.losses))

    @property
    def summary(self) -> str:
        """For people: what it cost, and what it lost."""
        return "taken over" if self.resumed else f"loss {self.loss:.2e}, {self.seconds:.1f} s"

    def as_event(self) -> dict[str, Any]:
        """Plain data, for a log."""
        return {"losses": dict(self.losses), "seconds": round(self.seconds, 3), "resumed": self.resumed}


@dataclass(frozen=True)
class _Job:
    """A matrix to solve, and with what."""

    matrix: Matrix
    assignment: Assignment


def solve_blocks(run: Run, data: CalibrationSet, store: SolvedBlocks) -> Generator[SolvedBlock, None, None]:
    """Solves every matrix in the model's blocks into `store`, yielding after each block. Goes on after the blocks that `store`
    has. Raises QP224 and QP225 where the model cannot be run block by block on these data, QP601 for NaN or infinity in a weight
    or its inputs, QP604 where second moments of inputs have no factor, QP605 when a matrix that needs data was given none."""
    memory.keep_memory()
    yield from run.blocks(data, store)


class Run:
    """One calibration from start to end. It is made before there are data, which may take long to read: whether the model can be
    run block by block and transforms fit it shows without."""

    store: SolvedBlocks
    batches: Batches

    def __init__(self, resolution: Resolution, reader: TensorReader, trust_remote_code: bool = False) -> None:
        """Raises QP222 to QP224 where the model cannot be run block by block, QP226 where a transform does not fit it."""
        checkpoint = resolution.checkpoint
        self.reader, self.source = reader, checkpoint.source
        self.model = skeleton(checkpoint.require_path(), trust_remote_code, torch.float32)
        self.weights = Weights(self.model, checkpoint)
        self.stacks = find_blocks(self.model)
        self.forward = Forward(self.stacks, self.weights, reader)
        self.jobs = {m.name: _Job(m, a) for a in resolution.quantized for m in a.matrices}
        self.magnitudes = Magnitudes((job.matrix for job in self.jobs.values()), self._largest)
        self.all_experts = resolution.calibration.all_experts
        self.has_float = any("drift" in a.algorithm.needs or a.algorithm.tunes for a in resolution.quantized)
        self.forward.rehearse()
        self._check_places(resolution)
        self._check_products()
        if self.all_experts:
            check_all_experts(self.model, self.stacks.names, checkpoint.source)
        treated, dtype = {name: job.assignment for name, job in self.jobs.items()}, resolution.plan.output.dtype
        self.correcting = Correcting(resolution.transforms, (job.matrix for job in self.jobs.values()), self.weights)
        self.scaling = Scaling(resolution.transforms, treated, self.weights, self.stacks, self.forward, reader, dtype)
        self.cache, self.attentions = resolution.kv_cache, self._attentions(resolution)

    def _attentions(self, resolution: Resolution) -> dict[str, str]:
        """Attention modules that fill the key-value cache, as the model calls them -> as the checkpoint does."""
        modules = {a.name: a.module for a in resolution.assignments.values()} if resolution.kv_cache is not None else {}
        found = {}
        for name, module, _ in projections(modules):
            for place in self.weights.place_of(module.matrices[0]):
                found[place.module.rpartition(".")[0]] = name
        return found

    def _check_places(self, resolution: Resolution) -> None:
        """Raises QP224 for an assignment that needs data and lies outside of the blocks."""
        inside = tuple(f"{name}." for name in self.stacks.names)
        for assignment in resolution.needs_data:
            for matrix in assignment.matrices:
                if not all(p.parameter.startswith(inside) for p in self.weights.place_of(matrix)):
                    taker = f"'{assignment.algorithm.name}'" if assignment.algorithm.takes_data else "its static activations"
                    advice = "give it algorithm: rtn in an override" if assignment.algorithm.takes_data else "give it aq: null"
                    text = f"'{assignment.name}' is outside of the model's blocks, where no data come to {taker}"
                    raise fail("QP224", text, advice, file=self.source)

    def _check_products(self) -> None:
        """Raises QP113 for matrices that the model's code multiplies as one, whose inputs would be rounded in several ways."""
        inside = (names for block in self.stacks.names for names in self.weights.matrices_in(block).values())
        for names in inside:
            treated = {n: (job.assignment.aq, job.assignment.observer) for n in names if (job := self.jobs.get(n)) is not None}
            ways = {n: treated.get(n, (None, None)) for n in names}
            other = next((n for n in names if ways[n] != ways[names[0]]), None)
            if other is not None:
                text = f"the model multiplies '{names[0]}' and '{other}' as one, and their activations are treated differently"
                raise fail("QP113", text, "give them one aq, or algorithms without calibration to all matrices", file=self.source)

    def _largest(self, matrix: Matrix) -> Tensor:
        """`max |w|` of a matrix in the loaded block, as transforms left it."""
        return torch.stack([p.view(self.model).abs().amax() for p in self.weights.place_of(matrix)]).amax()

    def blocks(self, data: CalibrationSet, store: SolvedBlocks) -> Iterator[SolvedBlock]:
        self.batches, self.store = Batches(data, self.model.config), store
        self.kept = memory.HiddenStates(store.folder).keep
        total, done = len(self.stacks.names), self.store.done
        resumed = self.store.states(self.kept) if 0 < len(done) < total else {}
        if resumed is None:
            self.store.forget()
        for number, line in enumerate(done):
            yield SolvedBlock(line["name"], number + 1, total, line["losses"], line["seconds"], resumed=True)
        if len(done) == total:
            return
        number, start = len(done), 0
        ends, exact_ends = _unpacked_all(resumed or {}, "end"), _unpacked_all(resumed or {}, "exact_end")
        for s, stack in enumerate(self.stacks.stacks):
            skip, start = max(0, number - start), start + len(stack.blocks)
            if s < len(ends):
                continue
            first = _nothing if skip else self.kept  # a resumed run has what comes after them
            hidden, calls = self._captured(s, ends, first)
            exact, exact_calls = (hidden if self.has_float else []), calls
            if self.has_float and ends:
                exact, exact_calls = self._captured(s, exact_ends, first)
            if skip:
                hidden, exact = _unpacked(resumed or {}, "hidden"), _unpacked(resumed or {}, "exact")
            resumed = {}  # what is held from here on is held by these lists alone
            for k, name in list(enumerate(stack.blocks))[skip:]:
                started = time.monotonic()
                block = Block(self, name, calls[k], exact_calls[k])
                hidden, exact = block.solve(hidden, exact)
                following = {"hidden": hidden, "exact": exact}
                if k == len(stack.blocks) - 1:
                    ends, exact_ends, following = [*ends, hidden], [*exact_ends, exact], {}
                following |= {f"end.{i}": e for i, e in enumerate(ends)} | {f"exact_end.{i}": e for i, e in enumerate(exact_ends)}
                states = {key: t for part, ts in following.items() for key, t in _packed(ts, part).items()}
                seconds = time.monotonic() - started
                facts = {"name": name, "losses": block.losses, "seconds": round(seconds, 3)}
                facts |= {"unseen": block.unseen, "unfollowed": block.unfollowed, "untuned": block.untuned}
                number += 1
                self.store.add(block.solved, states if number < total else {}, facts, block.ranges, block.changed)
                yield SolvedBlock(name, number, total, block.losses, seconds)

    def _captured(
        self, stack: int, ends: Sequence[Sequence[Tensor]], keep: Callable[[Tensor], Tensor]
    ) -> tuple[list[Tensor], list[list[Call]]]:
        """The first hidden states of a stack, and the calls of its blocks."""
        captured = self.forward.capture(stack, self.batches.inputs, ends, keep=keep)
        return captured.hidden, captured.calls


def _nothing(state: Tensor) -> Tensor:
    return state.new_empty(0)


def _packed(states: Sequence[Tensor], name: str) -> dict[str, Tensor]:
    return {f"{name}.{i:05}": t for i, t in enumerate(states)}


def _unpacked(saved: Mapping[str, Tensor], name: str) -> list[Tensor]:
    return [saved[key] for key in sorted(saved) if key.startswith(f"{name}.")]


def _unpacked_all(saved: Mapping[str, Tensor], name: str) -> list[list[Tensor]]:
    """Of every stack that was finished."""
    count = len({key.split(".")[1] for key in saved if key.startswith(f"{name}.")})
    return [_unpacked(saved, f"{name}.{stack}") for stack in range(count)]
