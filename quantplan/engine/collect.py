"""Collecting statistics of the float model: block by block, one forward, nothing solved."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quantplan.calibration.read import CalibrationSet, read_calibration
from quantplan.checkpoint.reader import TensorReader
from quantplan.engine import memory, moments
from quantplan.engine.apply import check_room, check_target, unfollowed_tokens, with_weights
from quantplan.engine.batches import Batches
from quantplan.engine.collected import StatisticsWriter, stored_observers
from quantplan.engine.progress import OnStep, Step
from quantplan.errors import Problem, QuantplanError, fail
from quantplan.estimate import LIVE
from quantplan.headers import read_checkpoint
from quantplan.live.blocks import find_blocks
from quantplan.live.experts import check_all_experts, every_token_to_every_expert
from quantplan.live.forward import Call, Forward
from quantplan.live.routed import RoutedTokens
from quantplan.live.skeleton import skeleton
from quantplan.live.watch import watching
from quantplan.live.weights import Weights
from quantplan.observer import Observer, ObserverConfig
from quantplan.plan.load import load_plan
from quantplan.plan.schema import Calibration
from quantplan.scheme import NonFinite, check_finite


@dataclass(frozen=True)
class Collected:
    """What was collected. Sizes in bytes."""

    out: Path
    blocks: int
    inputs: int
    matrices: int
    tokens: int
    size: int
    notes: tuple[Problem, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for `--json`."""
        counts = {k: v for k, v in vars(self).items() if k not in ("out", "notes")}
        return {"out": str(self.out), **counts, "notes": [p.as_dict() for p in self.notes]}


@torch.no_grad()
def collect(
    model: str | os.PathLike[str],
    plan: str | os.PathLike[str] | Mapping[str, Any],
    out: str | os.PathLike[str],
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    on_step: OnStep | None = None,
) -> Collected:
    """Statistics of the inputs of every matrix in the blocks of `model`, for the data that `plan` names, into the folder `out`,
    which is absent or whole at every moment. Nothing else of the plan matters.

    Raises QuantplanError: bad plan, data or checkpoint (QP1xx to QP3xx; QP224 for `all_experts` where there are none), output
    exists or is locked (QP5xx), inputs that are not finite (QP601).
    """
    tell: OnStep = on_step or (lambda step: None)
    loaded, target = load_plan(plan), Path(out)
    source = with_weights(read_checkpoint(model, revision))
    check_target(target, source.require_path())
    settings = loaded.plan.calibration or Calibration()
    network = skeleton(source.require_path(), trust_remote_code, torch.float32)
    if settings.all_experts:
        check_all_experts(network, find_blocks(network).names, source.source)
    with StatisticsWriter(target).opened() as writer:
        try:
            data = read_calibration(
                settings,
                source.require_path(),
                Path(loaded.source.file).parent,
                on_step=lambda done, total: tell(Step("reading", settings.source, done, total)),
                trust_remote_code=trust_remote_code,
            )
        except QuantplanError as error:
            raise QuantplanError(loaded.locate(p) for p in error.problems) from None
        with TensorReader(source.require_path(), source.tensors) as reader:
            weights, kept = Weights(network, source), memory.HiddenStates(writer.staging).keep
            run = _Collecting(weights, reader, data, settings.all_experts, kept)
            _check_environment(run, target)
            run.blocks(writer, tell)
        writer.publish(source, settings, data.hash, run.observers)
    size = sum(p.stat().st_size for p in target.iterdir())
    notes = tuple(loaded.locate(p) for p in (*data.notes, *unfollowed_tokens(run.unfollowed)))
    return Collected(target, run.total, run.inputs, run.matrices, data.counted, size, notes)


def _check_environment(run: _Collecting, out: Path) -> None:
    """Disk for all second moments, and memory for the largest block with its own, before hours are spent. Matrices of one module
    with as many columns are taken as given one input. Raises QP401, QP404."""
    parameters, disk, largest = run.weights.empty(), 0, 0
    for name in run.stacks.names:
        inputs: dict[tuple[str, int], int] = {}
        for (parameter, _), matrices in run.weights.matrices_in(name).items():
            columns = parameters[parameter].shape[-2 if run.weights.places[matrices[0]][0].transposed else -1]
            inputs[matrices[0].rpartition(".")[0], columns] = 4 * columns**2
        weights = sum(4 * parameters[n].numel() for n in run.weights.under(name) if n in parameters)
        disk, largest = disk + sum(inputs.values()), max(largest, weights + sum(inputs.values()))
    check_room(disk, LIVE + largest, out)


class _Collecting:
    """One run through the model."""

    def __init__(
        self, weights: Weights, reader: TensorReader, data: CalibrationSet, all_experts: bool, keep: Callable[[Tensor], Tensor]
    ) -> None:
        self.weights, self.reader, self.all_experts, self.keep = weights, reader, all_experts, keep
        self.observers = stored_observers()
        self.stacks = find_blocks(weights.model)
        self.batches = Batches(data, weights.model.config)
        self.total, self.inputs, self.matrices = len(self.stacks.names), 0, 0
        self.unfollowed: list[str] = []

    def blocks(self, writer: StatisticsWriter, tell: Callable[[Step], None]) -> None:
        """Goes through all blocks, in order."""
        forward, number = Forward(self.stacks, self.weights, self.reader), 0
        ends: list[list[Tensor]] = []
        for s, stack in enumerate(self.stacks.stacks):
            captured = forward.capture(s, self.batches.inputs, ends, keep=self.keep)
            hidden, block_calls = captured.hidden, captured.calls
            del captured  # it would hold the first hidden states to the end of the stack
            for name, calls in zip(stack.blocks, block_calls, strict=True):
                self.weights.load(name, self.reader)
                try:
                    hidden = self._block(writer, number, name, calls, hidden)
                finally:
                    self.weights.release(name)
                number += 1
                tell(Step("calibrating", name, number, self.total))
            ends.append(hidden)

    def _block(
        self, writer: StatisticsWriter, number: int, name: str, calls: Sequence[Call], hidden: Sequence[Tensor]
    ) -> list[Tensor]:
        if not calls:  # the model skips the block
            return list(hidden)
        module = self.weights.model.get_submodule(name)
        seen = _Seen(self.weights, name, self.batches, self.observers)
        after = [
            self._forward(module, name, call, state, seen, i) for i, (call, state) in enumerate(zip(calls, hidden, strict=True))
        ]
        found, matrices = seen.finished()
        self.unfollowed.extend(seen.unfollowed)
        for matrix, parts in found.items():
            try:
                check_finite(parts["hessian"])
            except NonFinite:
                text, file = "NaN or infinity in the inputs, or their squares", self.weights.checkpoint.source
                raise fail("QP601", text, "mend the checkpoint", file=file, tensor=matrix) from None
        writer.add(number, found, matrices)
        self.inputs, self.matrices = self.inputs + len(found), self.matrices + sum(map(len, matrices.values()))
        return after

    def _forward(self, module: nn.Module, name: str, call: Call, hidden: Tensor, seen: _Seen, batch: int) -> Tensor:
        last, routed = _Last(), RoutedTokens(self.batches.count(batch))

        def see(parameter: str, index: int | None, inputs: Tensor) -> None:
            point, tokens = (parameter, index), routed.of(parameter, index, inputs)
            if not (self.all_experts and point in last.slabs):  # the call that follows those with every token counts no more
                seen(last, point, inputs, batch, tokens)
            if index is not None:
                last.slabs.add(point)

        with moments.computing(), watching(module, see, name), routed:
            if not self.all_experts:
                return self.keep(call(module, hidden))
            with every_token_to_every_expert(module):
                return self.keep(call(module, hidden))


Point = tuple[str, int | None]  # a parameter, and the slab of a 3-D one


class _Last:
    """The point before, in one forward, and its inputs: held, so that nothing else can come to lie where they do."""

    def __init__(self) -> None:
        self.inputs: Tensor | None = None
        self.leader: Point | None = None
        self.slabs: set[Point] = set()  # of experts that were given their tokens


class _Seen:
    """What comes to the points of one block."""

    def __init__(self, weights: Weights, block: str, batches: Batches, observers: Mapping[str, ObserverConfig]) -> None:
        self._inside, self._batches, self._observers = weights.matrices_in(block), batches, observers
        self._source = weights.checkpoint.source
        self._leaders: dict[Point, Point] = {}  # point -> the first that is given the same inputs
        self._hessians: dict[Point, moments.SecondMoment] = {}
        self._absmax: dict[Point, Tensor] = {}
        self.unfollowed: dict[str, None] = {}  # matrices whose rows may be padding: of which tokens is not known
        self._ranges: dict[Point, dict[str, Observer]] = {}

    def __call__(self, last: _Last, point: Point, inputs: Tensor, batch: int, tokens: Tensor | None) -> None:
        if point not in self._inside:
            return
        if not self._batches.known(inputs, batch, tokens):
            self.unfollowed |= dict.fromkeys(self._inside[point])
        same = last.inputs is not None and last.inputs.data_ptr() == inputs.data_ptr() and last.inputs.shape == inputs.shape
        leader = self._leaders.setdefault(point, last.leader if same and last.leader is not None else point)
        if not same:
            last.inputs, last.leader = inputs, leader
        x = self._batches.counted(inputs.float(), batch, tokens)
        if leader != point or not len(x):
            return
        columns = x.shape[-1]
        self._hessians.setdefault(point, moments.SecondMoment(columns)).add(x)
        absmax = self._absmax.setdefault(point, torch.zeros(columns))
        torch.maximum(absmax, x.abs().amax(0), out=absmax)
        given = x.to(moments.fast_dtype())  # what a calibrated run observes: inputs as they are multiplied
        try:
            for observer in self._ranges.setdefault(point, {n: o.observer() for n, o in self._observers.items()}).values():
                observer.update(given)
        except NonFinite:
            text, matrix = "NaN or infinity in the inputs", self._inside[point][0]
            raise fail("QP601", text, "mend the checkpoint", file=self._source, tensor=matrix) from None

    def finished(self) -> tuple[dict[str, dict[str, Tensor]], dict[str, list[str]]]:
        """Statistics by the name of an input, that of the first matrix which is given it; and the matrices of each input. Inputs
        that no token came to are left out."""
        found, matrices = {}, {}
        for point, hessian in self._hessians.items():
            name = self._inside[point][0]
            found[name] = {"hessian": hessian.mean(), "absmax": self._absmax[point], "count": torch.tensor(hessian.count)}
            for kind, observer in self._ranges[point].items():
                found[name] |= {f"{kind}.{part}": t for part, t in observer.state().items()}
            matrices[name] = [m for p, leader in self._leaders.items() if leader == point for m in self._inside[p]]
        return found, matrices
