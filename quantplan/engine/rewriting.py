"""Transforms that rewrite stored tensors: what is read from the source is already rewritten, so that nothing after knows.

Changes are functions, applied when a tensor is read: memory stays bounded by the largest tensor, and an interrupted run makes
the same bytes again.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping

import torch
from torch import Tensor

from quantplan.checkpoint.reader import TensorReader
from quantplan.engine.changed import CHANGED_BY_ROUNDING
from quantplan.errors import fail
from quantplan.headers import TensorInfo
from quantplan.live.blocks import find_blocks
from quantplan.live.forward import Forward
from quantplan.live.probes import Probes, find_probes
from quantplan.live.residual import find_residual, signature_of
from quantplan.live.skeleton import skeleton
from quantplan.live.weights import Weights
from quantplan.models.modules import Matrix
from quantplan.plan.resolve import Resolution
from quantplan.transform import Change

HELD = 4  # rewritten tensors in memory: rows are asked for piece by piece, by several threads


class Rewriting(TensorReader):
    """A reader of tensors as transforms rewrite them, float32; the others as they are stored."""

    def __init__(self, plain: TensorReader, changes: Mapping[str, Change]) -> None:
        super().__init__(plain.folder, plain.tensors)
        self._plain, self._changes = plain, changes
        self.changed = frozenset(changes)
        self._held: OrderedDict[str, Tensor] = OrderedDict()
        self._turn = threading.Lock()

    def change(self, tensor: str) -> Change:
        """What is done to a changed tensor."""
        return self._changes[tensor]

    def read_bytes(self, info: TensorInfo, start: int = 0, size: int | None = None) -> bytearray:
        return self._plain.read_bytes(info, start, size)

    def read(self, name: str) -> Tensor:
        stored = super().read(name)
        return self._changes[name](stored.double()).float() if name in self._changes else stored

    def read_rows(self, matrix: Matrix, start: int, stop: int) -> Tensor:
        if matrix.tensor not in self._changes:
            return super().read_rows(matrix, start, stop)
        with self._turn:
            if matrix.tensor not in self._held:
                self._held[matrix.tensor] = self.read(matrix.tensor)
                while len(self._held) > HELD:
                    self._held.popitem(last=False)
            whole = self._held[matrix.tensor]
        slab = whole if matrix.index is None else whole[matrix.index]
        slab = slab.t() if matrix.transposed else slab
        return slab[matrix.first + start : matrix.first + stop].contiguous()


def rewritten(resolution: Resolution, reader: TensorReader, trust_remote_code: bool = False) -> TensorReader:
    """`reader`, or what the plan's transforms make of it. The model's structure is looked at once, every kind of block run before
    and after, and so is what stands around the blocks.

    Raises QP222 to QP225 where the model cannot be run block by block, QP226 where it would not compute the same."""
    for transform in resolution.transforms:
        if transform.rewrites:
            model = skeleton(resolution.checkpoint.require_path(), trust_remote_code, torch.float32)
            weights = Weights(model, resolution.checkpoint)
            forward = Forward(find_blocks(model), weights, reader)
            probes = find_probes(forward)
            residual = find_residual(forward, probes, reader)
            made = Rewriting(reader, transform.rewrite(residual))
            _check(forward, probes, made, residual.embedding, transform.name)
            reader = made
    return reader


@torch.no_grad()
def _check(forward: Forward, probes: Probes, made: Rewriting, embedding: str, name: str) -> None:
    """Raises QP226 unless hidden states are the old ones, rewritten as the embedding is, all the way, and outputs equal."""
    weights, blocks, model = forward.weights, forward.blocks, forward.model
    turn = made.change(embedding)

    def turned(state: Tensor) -> Tensor:
        return turn(state.reshape(-1, state.shape[-1]).double()).float().view(state.shape)

    def same(found: Tensor, expected: Tensor, where: str) -> None:
        if not bool((found.float() - expected).abs().amax() <= CHANGED_BY_ROUNDING * expected.abs().amax()):
            text = f"transform '{name}' does not fit {type(model).__name__}: {where} would not be the same"
            raise fail("QP226", text, "remove it", file=weights.checkpoint.source)

    after = Forward(blocks, weights, made)
    (hidden,) = probes.hidden
    for before, now in zip(hidden, after.capture(0, probes.batches).hidden, strict=True):
        same(now, turned(before.float()), "what goes into the blocks")
    done = set()
    for block in blocks.names:
        module = model.get_submodule(block)
        signature = signature_of(module)
        if signature in done:
            continue
        done.add(signature)
        _, probe = probes.of[block]
        results = []
        for source, state in ((forward.reader, probe.hidden.float()), (made, turned(probe.hidden.float()))):
            weights.load(block, source)
            results.append(probe.call(module, state).float())
            weights.release(block)
        same(results[1], turned(results[0]), f"what comes out of '{block}'")
    states = [[state.float() for state in hidden]]
    old = [output.logits.float() for output in forward.outputs(probes.batches, states)]
    new = [output.logits for output in after.outputs(probes.batches, [[turned(state) for state in states[0]]])]
    for first, second in zip(old, new, strict=True):
        same(second, first, "the output")
