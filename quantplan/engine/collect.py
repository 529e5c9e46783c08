"""Collecting statistics of the float model: block by block, one forward, nothing solved."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quantplan.calibration.read import CalibrationSet, batches, read_calibration
from quantplan.checkpoint.reader import TensorReader
from quantplan.engine.apply import OnStep, Step, check_target, with_weights
from quantplan.engine.calibrated import BATCH, Point, add_products, fast_dtype
from quantplan.engine.collected import StatisticsWriter, empty_moments
from quantplan.errors import Problem, QuantplanError
from quantplan.headers import read_checkpoint
from quantplan.live.blocks import find_blocks
from quantplan.live.experts import every_token_to_every_expert
from quantplan.live.forward import Call, Forward
from quantplan.live.skeleton import skeleton
from quantplan.live.watch import watching
from quantplan.live.weights import Weights
from quantplan.plan.load import load_plan
from quantplan.plan.schema import Calibration


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

    Raises QuantplanError: bad plan, data or checkpoint (QP1xx to QP3xx), output exists or is locked (QP5xx).
    """
    tell: OnStep = on_step or (lambda step: None)
    loaded, target = load_plan(plan), Path(out)
    source = with_weights(read_checkpoint(model, revision))
    check_target(target, source.require_path())
    settings = loaded.plan.calibration or Calibration()
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
            weights = Weights(skeleton(source.require_path(), trust_remote_code, torch.float32), source)
            run = _Collecting(weights, reader, data, settings.all_experts)
            run.blocks(writer, tell)
        writer.publish(source, settings, data.hash)
    size = sum(p.stat().st_size for p in target.iterdir())
    notes = tuple(loaded.locate(p) for p in data.notes)
    return Collected(target, run.total, run.inputs, run.matrices, data.counted, size, notes)


class _Collecting:
    """One run through the model."""

    def __init__(self, weights: Weights, reader: TensorReader, data: CalibrationSet, all_experts: bool) -> None:
        self.weights, self.reader, self.all_experts = weights, reader, all_experts
        self.stacks = find_blocks(weights.model)
        size = max(1, BATCH // data.length)
        self.batches = list(batches(data, weights.model.config, size))
        self.masks = [mask.reshape(-1) for mask in data.mask.split(size)]
        self.total, self.inputs, self.matrices = len(self.stacks.names), 0, 0

    def blocks(self, writer: StatisticsWriter, tell: Callable[[Step], None]) -> None:
        """Goes through all blocks, in order."""
        forward, number = Forward(self.stacks, self.weights, self.reader), 0
        ends: list[list[Tensor]] = []
        for s, stack in enumerate(self.stacks.stacks):
            captured = forward.capture(s, self.batches, ends)
            hidden = [h.float() for h in captured.hidden]
            for name, calls in zip(stack.blocks, captured.calls, strict=True):
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
        inside = {k: v for k, v in self.weights.matrices_at().items() if k[0].startswith(f"{name}.")}
        seen = _Seen(inside)
        after = [
            self._forward(module, name, call, state, seen, mask)
            for call, state, mask in zip(calls, hidden, self.masks, strict=True)
        ]
        moments, matrices = seen.finished()
        writer.add(number, moments, matrices)
        self.inputs, self.matrices = self.inputs + len(moments), self.matrices + sum(map(len, matrices.values()))
        return after

    def _forward(self, module: nn.Module, name: str, call: Call, hidden: Tensor, seen: _Seen, mask: Tensor) -> Tensor:
        fast, last = fast_dtype(), _Last()

        def see(parameter: str, index: int | None, inputs: Tensor) -> None:
            point = (parameter, index)
            if not (self.all_experts and point in last.slabs):  # the call that follows those with every token counts no more
                seen(last, point, inputs, mask)
            if index is not None:
                last.slabs.add(point)

        with torch.autocast("cpu", fast, enabled=fast != torch.float32), watching(module, see, name):
            if not self.all_experts:
                return call(module, hidden).float()
            with every_token_to_every_expert(module):
                return call(module, hidden).float()


class _Last:
    """The point before, in one forward, and its inputs: held, so that nothing else can come to lie where they do."""

    def __init__(self) -> None:
        self.inputs: Tensor | None = None
        self.leader: Point | None = None
        self.slabs: set[Point] = set()  # of experts that were given their tokens


class _Seen:
    """What comes to the points of one block."""

    def __init__(self, inside: Mapping[Point, list[str]]) -> None:
        self._inside = inside
        self._leaders: dict[Point, Point] = {}  # point -> the first that is given the same inputs
        self._moments: dict[Point, dict[str, Tensor]] = {}

    def __call__(self, last: _Last, point: Point, inputs: Tensor, mask: Tensor) -> None:
        if point not in self._inside:
            return
        same = last.inputs is not None and last.inputs.data_ptr() == inputs.data_ptr() and last.inputs.shape == inputs.shape
        leader = self._leaders.setdefault(point, last.leader if same and last.leader is not None else point)
        if not same:
            last.inputs, last.leader = inputs, leader
        if leader != point:
            return
        x = inputs.float()
        x = x[mask] if len(mask) == len(x) and not mask.all() else x
        moments = self._moments.setdefault(point, empty_moments(x.shape[-1]))
        if len(x):
            add_products(moments["hessian"], x)
            torch.maximum(moments["absmax"], x.abs().amax(0), out=moments["absmax"])
            moments["count"] += len(x)

    def finished(self) -> tuple[dict[str, dict[str, Tensor]], dict[str, list[str]]]:
        """Moments by the name of an input, that of the first matrix which is given it; and the matrices of each input. Inputs
        that no token came to are left out."""
        names = {point: self._inside[point][0] for point in self._moments}
        moments, matrices = {}, {}
        for point, found in self._moments.items():
            count = int(found["count"])
            if count:
                hessian = found["hessian"]
                found["hessian"] = (hessian.tril() + hessian.tril(-1).t()).div_(count)
                moments[names[point]] = found
                matrices[names[point]] = [m for p, leader in self._leaders.items() if leader == point for m in self._inside[p]]
        return moments, matrices
