"""rotation: the residual stream, and the values of attention heads, in a basis without outliers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field, NonNegativeInt

from quantplan.assignment import Assignment
from quantplan.errors import Problem
from quantplan.headers import FLOAT_DTYPES, Checkpoint
from quantplan.models.modules import find_modules, text_config
from quantplan.transform import TRANSFORMS, Change, Residual, Transform

if TYPE_CHECKING:
    from torch import Tensor

HEAD = "lm_head.weight"
FACTOR = 64  # Hadamard matrices are applied in factors of at most this size


@TRANSFORMS.register("rotation")
class Rotation(Transform):
    """Multiplies the residual stream by an orthogonal matrix (R1 of QuaRot, arXiv 2404.00456, and SpinQuant, 2405.16406), fused
    into the weights, and the values of each head by another (R2). Needs no data. Gains of norms are folded into the matrices
    behind them first, so tied embeddings are untied. For quantized activations; weights alone can come out worse.

    The matrix is a Hadamard matrix with random signs; where the width is `k` times a power of two, the odd `k` is served by a
    discrete Hartley matrix: orthogonal and flat in any size. Norms that take the mean away keep it: their rotation leaves the
    mean's direction alone."""

    rewrites: ClassVar[bool] = True

    seed: NonNegativeInt = 0
    """which signs"""
    heads: bool = Field(default=True)
    """whether the values of attention heads are rotated too"""

    def stored(self, checkpoint: Checkpoint) -> Checkpoint:
        """With a head of its own, where it shares the embedding's bytes: gains of the last norm go into one and not the other."""
        source = tied_embedding(checkpoint)
        if not source or HEAD in checkpoint.tensors:
            return checkpoint
        head = replace(checkpoint.tensors[source], name=HEAD)
        config = {**checkpoint.config, "tie_word_embeddings": False}
        return replace(checkpoint, tensors={**checkpoint.tensors, HEAD: head}, config=config)

    def check(self, checkpoint: Checkpoint, assignments: Mapping[str, Assignment]) -> Iterator[Problem]:
        config = checkpoint.config
        unfit = ""
        if config.get("is_encoder_decoder"):
            unfit = "an encoder-decoder has two residual streams"
        elif not any(str(n).endswith(("ForCausalLM", "LMHeadModel")) for n in config.get("architectures") or ()):
            unfit = "only models that continue a text are rotated"
        elif not isinstance(text_config(config).get("hidden_size", text_config(config).get("n_embd")), int):
            unfit = "config.json names no hidden_size"
        if unfit:
            yield Problem("QP122", f"transform 'rotation' does not fit the model: {unfit}", "remove it")
            return
        yield from super().check(checkpoint, assignments)

    def rewrite(self, residual: Residual) -> Mapping[str, Change]:
        turn = orthogonal(residual.width, self.seed, any(norm.centred for norm in residual.norms))
        steps: dict[str, list[Change]] = {}
        for site in residual.sites:
            steps.setdefault(site.tensor, []).append(partial(_turned, turn=turn, axis=site.axis, gain=site.gain))
        for norm in residual.norms:
            steps.setdefault(norm.gain, []).append(partial(_filled, value=1 - norm.offset))
            if norm.bias:
                inverse = norm.values.reciprocal()
                steps.setdefault(norm.bias, []).append(partial(_turned, turn=turn, axis=-1, gain=inverse))
        for head in residual.heads if self.heads else ():
            inner = orthogonal(head.order.shape[1], self.seed, False)
            steps.setdefault(head.tensor, []).append(partial(_turned_heads, turn=inner, axis=head.axis, order=head.order))
        return {tensor: partial(_in_turn, steps=tuple(found)) for tensor, found in steps.items()}


Turn = Callable[["Tensor"], "Tensor"]  # rows `[.., size]` multiplied by an orthogonal matrix, float64


def tied_embedding(checkpoint: Checkpoint) -> str:
    """The tensor that is embedding and head in one; '' for a model with a head of its own, or none."""
    modules = find_modules(checkpoint)
    if any(m.keep is not None and m.keep.name == "output heads" for m in modules.values()):
        return ""
    text = text_config(checkpoint.config)
    if text.get("tie_word_embeddings") is False or checkpoint.config.get("tie_word_embeddings") is False:
        return ""
    sizes = (text.get("vocab_size"), text.get("hidden_size", text.get("n_embd")))
    found = [m.tensor.name for m in modules.values() if m.kind == "embedding" and m.tensor.shape == sizes]
    return found[0] if len(found) == 1 and checkpoint.tensors[found[0]].dtype in FLOAT_DTYPES else ""


def orthogonal(size: int, seed: int, keeps_mean: bool) -> Turn:
    """Multiplication by an orthogonal matrix of that size, flat and random. `keeps_mean`: the mean of a row stays as it is."""
    import torch

    inner = size - 1 if keeps_mean else size
    signs = torch.randint(2, (inner,), generator=torch.Generator().manual_seed(seed)).double() * 2 - 1
    plain = partial(_hadamard, signs=signs, factors=_factors(inner))
    return partial(_beside_mean, inner=plain) if keeps_mean else plain


def _factors(size: int) -> tuple[Tensor, ...]:
    """Orthogonal matrices whose Kronecker product has that size: Hartley's of the odd part, then Hadamard's."""
    import torch

    power = (size & -size).bit_length() - 1
    odd = size >> power
    found = []
    if odd > 1:
        steps = torch.arange(odd, dtype=torch.float64)
        angles = torch.outer(steps, steps).remainder(odd) * (2 * math.pi / odd)
        found.append((angles.cos() + angles.sin()) / math.sqrt(odd))
    while power:
        part = min(power, FACTOR.bit_length() - 1)
        matrix = torch.ones(1, 1, dtype=torch.float64)
        for _ in range(part):
            matrix = torch.kron(matrix, torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64) / math.sqrt(2))
        found.append(matrix)
        power -= part
    return tuple(found)


def _hadamard(rows: Tensor, signs: Tensor, factors: tuple[Tensor, ...]) -> Tensor:
    shape = rows.shape
    made = (rows * signs).reshape(-1, *(len(f) for f in factors))
    for axis, factor in enumerate(factors):  # both are symmetric, so it does not matter from which side
        made = (made.movedim(axis + 1, -1) @ factor).movedim(-1, axis + 1)
    return made.reshape(shape)


def _beside_mean(rows: Tensor, inner: Turn) -> Tensor:
    """`inner` on what is left when a reflection has brought the mean to the first place, and the reflection again."""
    import torch

    turned = _reflected(rows)
    turned = torch.cat([turned[..., :1], inner(turned[..., 1:])], -1)
    return _reflected(turned)


def _reflected(rows: Tensor) -> Tensor:
    """Multiplication by the reflection that swaps the first axis and the direction of the mean."""
    size = rows.shape[-1]
    mirror = rows.new_full((size,), -1 / math.sqrt(size))
    mirror[0] += 1
    return rows - 2 / mirror.square().sum() * (rows @ mirror).unsqueeze(-1) * mirror


def _turned(tensor: Tensor, turn: Turn, axis: int, gain: Tensor | None) -> Tensor:
    rows = tensor.movedim(axis, -1)
    return turn(rows if gain is None else rows * gain).movedim(-1, axis)


def _turned_heads(tensor: Tensor, turn: Turn, axis: int, order: Tensor) -> Tensor:
    rows = tensor.movedim(axis, -1).clone()
    rows[..., order] = turn(rows[..., order])
    return rows.movedim(-1, axis)


def _filled(tensor: Tensor, value: float) -> Tensor:
    return tensor.new_full(tensor.shape, value)


def _in_turn(tensor: Tensor, steps: tuple[Change, ...]) -> Tensor:
    for step in steps:
        tensor = step(tensor)
    return tensor
