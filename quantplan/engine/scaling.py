"""Transforms that scale channels, block by block: edges are found and verified before the first block is solved, their inputs
seen in one pass of the block, and the factors applied to its loaded parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quantplan.assignment import Assignment
from quantplan.checkpoint.reader import TORCH_DTYPES, TensorReader
from quantplan.engine.changed import Stored
from quantplan.errors import fail
from quantplan.live.blocks import Blocks
from quantplan.live.forward import Forward
from quantplan.live.graph import Edge, Probe, Target, apply_scale, holds, linears_fed_by
from quantplan.live.probes import find_probes
from quantplan.live.weights import Weights
from quantplan.scheme import SAFETENSORS_DTYPES, NonFinite, check_finite
from quantplan.transform import Channels, Inputs, Reader, Transform

Saw = Callable[[str, int | None, Tensor], None]
Pass = Callable[[Saw], None]  # runs the block on all data; its matrices' inputs are seen

Signature = tuple[Any, ...]


@dataclass(frozen=True)
class Treated:
    """A stored matrix of a parameter that a plan treats: its assignment."""

    name: str
    assignment: Assignment


class Scaling:
    """The channel-scaling transforms of one run, in the order the plan lists them."""

    def __init__(
        self,
        transforms: Sequence[Transform],
        treated: Mapping[str, Assignment],
        weights: Weights,
        blocks: Blocks,
        forward: Forward,
        reader: TensorReader,
        dtype: str | None,
    ) -> None:
        """`treated`: matrix -> assignment, of those that are quantized. `dtype`: of the output's floats; None: as stored."""
        self._transforms = [t for t in transforms if t.scales]
        self._treated, self._weights, self._blocks, self._reader = treated, weights, blocks, reader
        self._stored = Stored(weights, treated)
        self._dtype = dtype
        self._edges: dict[Signature, list[Edge]] = {}
        self._probes: Mapping[str, tuple[Probe, Probe]] = {}
        self._in: dict[str, list[Treated]] = {}  # parameter -> its treated matrices
        if not self._transforms:
            return
        for (parameter, _), names in weights.matrices_at.items():
            self._in.setdefault(parameter, []).extend(Treated(n, treated[n]) for n in names if n in treated)
        self._probes = find_probes(forward).of
        self._look()

    def _look(self) -> None:
        """Finds the edges of every kind of block. Raises QP226 for a transform that has none in the whole model."""
        for name in self._blocks.names:
            signature = self._signature(name)
            if signature in self._edges or name not in self._probes:
                continue
            self._weights.load(name, self._reader)
            try:
                self._edges[signature] = linears_fed_by(self._weights.model.get_submodule(name), *self._probes[name])
            finally:
                self._weights.release(name)
        for transform in self._transforms:
            reasons: dict[str, str] = {}
            if not any(True for name in self._blocks.names for _ in self._usable(transform, name, reasons)):
                why = next((f": '{p}' {reason}" for p, reason in reasons.items()), "")
                text = f"transform '{transform.name}' finds no channels to scale in the modules it is for{why}"
                raise fail("QP226", text, "remove it", file=self._weights.checkpoint.source)

    def _signature(self, name: str) -> Signature:
        block = self._weights.model.get_submodule(name)
        treated = tuple(sorted(n.removeprefix(name) for n in self._in if n.startswith(f"{name}.") and self._in[n]))
        return type(block), treated, tuple((n, p.shape) for n, p in block.named_parameters())

    def _usable(self, transform: Transform, name: str, reasons: dict[str, str]) -> Iterator[Edge]:
        """The edges of a block that a transform is for, every parameter of which can be stored as it becomes."""
        for edge in self._edges.get(self._signature(name), ()):
            matrices = [m for t in edge.targets for m in self._in.get(f"{name}.{t.name}", ())]
            if edge.kind not in transform.kinds or not any(transform.wants(m.assignment) for m in matrices):
                continue
            if edge.kind == "linear" and self._weights.model.get_parameter(f"{name}.{edge.source}").dim() > 2:
                continue  # fused experts: each would need factors, and data, of its own
            refused = {p: reason for p in _parameters(name, edge) if (reason := self._stored.refusal(p))}
            reasons |= refused
            if not refused:
                yield edge

    def __call__(self, name: str, run: Pass) -> dict[str, Tensor | None]:
        """Scales the loaded block called `name`. Stored tensor -> what it has become, None for quantized matrices. Raises QP601
        for inputs that are not finite."""
        plans = [(t, list(self._usable(t, name, {}))) for t in self._transforms]
        wanted = [edge for _, edges in plans for edge in edges]
        if not wanted:
            return {}
        block = self._weights.model.get_submodule(name)
        _, several = self._probes[name]
        changed: dict[str, None] = {}
        for transform, edges in plans:  # the second sees what the first has made of the inputs
            if not edges:
                continue
            gathered = _gather(name, edges, run, transform.needs_hessian)
            self._check(name, gathered)
            for edge in edges:
                if any(_source_of(edge, target) not in gathered for target in edge.targets):
                    continue  # no token came there
                factors = transform.factors(self._channels(name, block, edge, gathered))
                if factors is None or not holds(block, edge, several):
                    continue
                apply_scale(block, edge, self._storable(name, block, edge, factors))
                changed |= dict.fromkeys(_parameters(name, edge))
        return dict(self._stored.of(changed))

    def _check(self, name: str, gathered: Mapping[str, Inputs]) -> None:
        for parameter, inputs in gathered.items():
            try:
                check_finite(inputs.magnitude if inputs.hessian is None else inputs.hessian)
            except NonFinite:
                text, file = "NaN or infinity in the inputs, or their squares", self._weights.checkpoint.source
                raise fail("QP601", text, "mend the checkpoint", file=file, tensor=f"{name}.{parameter}") from None

    def _channels(self, name: str, block: nn.Module, edge: Edge, gathered: Mapping[str, Inputs]) -> Channels:
        readers = []
        for target in edge.targets:
            parameter = block.get_parameter(target.name).detach()
            matrix = parameter if target.input_axis == -1 else parameter.transpose(-1, -2)
            known = self._in.get(f"{name}.{target.name}", [])
            quantizer = known[0].assignment.wq.quantizer() if known and known[0].assignment.wq is not None else None
            for slab in [matrix] if matrix.dim() == 2 else matrix:
                readers.append(Reader(slab.float(), target.columns, gathered[_source_of(edge, target)], quantizer))
        return Channels(edge.kind, edge.channels, tuple(readers))

    def _storable(self, name: str, block: nn.Module, edge: Edge, factors: Tensor) -> Tensor:
        """Factors nearest to `factors` with which a norm's gain is a number of the dtype it is stored in: what the norm and its
        readers then lose to rounding is nothing."""
        if edge.kind != "norm":
            return factors
        tensor = self._weights.checkpoint.tensors[self._weights.origins[f"{name}.{edge.source}"].tensors[0][0]]
        kind = getattr(torch, TORCH_DTYPES[SAFETENSORS_DTYPES.get(self._dtype or "", tensor.dtype)])
        gain = block.get_parameter(edge.source).detach().double()[edge.rows] + edge.offset
        rounded = ((gain * factors - edge.offset).to(kind).double() + edge.offset) / gain
        return torch.where(torch.isfinite(rounded) & (rounded > 0), rounded, factors).float()


def _parameters(name: str, edge: Edge) -> list[str]:
    parts = [edge.source, *(t.name for t in edge.targets), *([edge.bias] if edge.bias else [])]
    return [f"{name}.{part}" for part in parts]


def _source_of(edge: Edge, target: Target) -> str:
    """Whose inputs count for a target. What reads a norm reads all of it, or (experts) the tokens it is given: the first
    reader's are as good for all. Fused experts are last, so that it is rarely one of them."""
    return min(edge.targets, key=lambda t: ".experts." in t.name).name if edge.kind == "norm" else target.name


@dataclass
class _Sums:
    absmax: Tensor
    magnitude: Tensor
    hessian: Tensor | None
    count: int = 0

    def add(self, x: Tensor) -> None:
        x = x.float()
        if not len(x):
            return
        size = x.abs()
        self.absmax = torch.maximum(self.absmax, size.amax(0))
        self.magnitude += size.sum(0)
        self.count += len(x)
        if self.hessian is not None:
            self.hessian.addmm_(x.t(), x)

    def means(self) -> Inputs:
        count = max(1, self.count)
        return Inputs(self.absmax, self.magnitude / count, None if self.hessian is None else self.hessian / count)


def _gather(name: str, edges: Sequence[Edge], run: Pass, hessian: bool) -> dict[str, Inputs]:
    """Target -> what is known of its inputs, of one pass over all data."""
    needed = {f"{name}.{_source_of(edge, t)}" for edge in edges for t in edge.targets}
    sums: dict[str, _Sums] = {}

    def see(parameter: str, index: int | None, inputs: Tensor) -> None:
        if parameter in needed:
            width = inputs.shape[-1]
            if parameter not in sums:
                square = torch.zeros(width, width) if hessian else None
                sums[parameter] = _Sums(torch.zeros(width), torch.zeros(width), square)
            sums[parameter].add(inputs)

    run(see)
    return {parameter.removeprefix(f"{name}."): s.means() for parameter, s in sums.items()}
