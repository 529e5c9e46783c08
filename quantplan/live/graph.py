"""What scales what inside a block: channels of a norm or a matrix that may be scaled when the matrices that read them are
scaled back, so that the block computes the same. Found by experiment, not from names.

A channel is scaled and every matrix's input looked at: a reader's columns are scaled by constants, whatever the token, and the
constants tell which channel each column reads. That finds heads that share values, fused projections and interleaved ones
alike. Edges are kept only if the block's output stays the same when their channels are scaled and unscaled.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from quantplan.live.forward import Call
from quantplan.live.watch import watching

CONSTANT = 1e-4  # relative residual of a column that is a constant times what it was
UNCHANGED = 1e-5  # relative change of a block's update that is rounding
ROUNDS = 48  # random halves of the rows of a fused matrix: a column is told in every fourth
LOWEST, HIGHEST = 1.25, 4.0  # factors of channels, all of them different and none near 1


@dataclass(frozen=True, eq=False)
class Target:
    """A matrix that reads scaled channels: `columns[j]` is the channel that its input feature j is, -1 for none."""

    name: str
    columns: Tensor
    input_axis: int = -1


@dataclass(frozen=True, eq=False)
class Edge:
    """Channels of `source` that may be scaled if `targets` are scaled back. Names are those of parameters, relative to the block.

    `rows[c]`: the element of a norm's gain, or the output feature of a matrix, that is channel c. `offset`: what the norm's code
    adds to its gain. `bias`: the parameter that is scaled along, '' for none.
    """

    kind: Literal["norm", "linear"]
    source: str
    targets: tuple[Target, ...]
    rows: Tensor
    bias: str = ""
    offset: float = 0.0
    input_axis: int = -1

    @property
    def channels(self) -> int:
        """How many factors `apply_scale` takes."""
        return len(self.rows)


@dataclass(frozen=True)
class Probe:
    """A call of a block with a hidden state `[batch, tokens, features]` to experiment with."""

    call: Call
    hidden: Tensor

    def run(self, block: nn.Module) -> Tensor:
        """The block's update of the hidden state."""
        hidden = self.hidden.float()
        arguments, options = tree_map(_float32, self.call.arguments), tree_map(_float32, dict(self.call.options))
        output = Call(arguments, options, self.call.place)(block, hidden.clone())
        return output - hidden if output.shape == hidden.shape else output


def _float32(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value


@torch.no_grad()
def apply_scale(block: nn.Module, edge: Edge, factors: Tensor) -> None:
    """Scales the channels of an edge, in place, and its targets back: `factors` `[channels]`, positive, or `[experts, channels]`
    when the source is fused experts. Parameters are loaded."""
    _scale_source(block, edge, factors)
    for target in edge.targets:
        _unscale(block, target, factors)


def _scale_source(block: nn.Module, edge: Edge, factors: Tensor) -> None:
    source = block.get_parameter(edge.source)
    factors = factors.to(source)
    size = source.shape[0] if edge.kind == "norm" else source.shape[-3 - edge.input_axis]
    full = factors.new_ones(*factors.shape[:-1], size)
    full[..., edge.rows.to(source.device)] = factors
    if edge.kind == "norm":
        source.add_(edge.offset).mul_(full).sub_(edge.offset)
    else:
        source.mul_(full.unsqueeze(edge.input_axis))
    if edge.bias:
        block.get_parameter(edge.bias).mul_(full)


def _unscale(block: nn.Module, target: Target, factors: Tensor) -> None:
    matrix = block.get_parameter(target.name)
    factors, columns = factors.to(matrix), target.columns.to(matrix.device)
    full = torch.where(columns >= 0, factors[..., columns], 1.0)
    matrix.div_(full.unsqueeze(-3 - target.input_axis))


@torch.no_grad()
def holds(block: nn.Module, edge: Edge, probe: Probe, seed: int = 0) -> bool:
    """Whether the block, loaded in float32, computes the same with random channels of `edge` scaled by 1/4 to 4. The factors
    are powers of two, so that nearly all of the arithmetic is exact."""
    generator = torch.Generator().manual_seed(seed)
    factors = 2.0 ** torch.randint(-2, 3, (edge.channels,), generator=generator)
    return unchanged(block, _touched_by(edge), lambda: apply_scale(block, edge, factors), probe)


@torch.no_grad()
def unchanged(
    block: nn.Module, names: Iterable[str], change: Callable[[], None], probe: Probe, tolerance: float = UNCHANGED
) -> bool:
    """Whether the block, loaded in float32, computes the same after `change`, which changes the parameters `names`; they are put
    back."""
    before = probe.run(block)
    with _restored(block, names):
        change()
        after = probe.run(block)
    return bool((after - before).abs().amax() <= tolerance * before.abs().amax())


def matrices_of(block: nn.Module, probe: Probe) -> list[Edge]:
    """Every matrix that the block computes with, as an edge without targets: its outputs, its bias, where its inputs are."""
    return list(_Search(block, probe).matrices())


def _touched_by(edge: Edge) -> list[str]:
    return [edge.source, *(t.name for t in edge.targets), *([edge.bias] if edge.bias else [])]


@contextlib.contextmanager
def _restored(block: nn.Module, names: Iterable[str]) -> Iterator[None]:
    kept = {name: block.get_parameter(name).detach().clone() for name in names}
    try:
        yield
    finally:
        for name, value in kept.items():
            block.get_parameter(name).data.copy_(value)


@torch.no_grad()
def linears_fed_by(block: nn.Module, single: Probe, several: Probe) -> list[Edge]:
    """Every edge of `block`, which is loaded in float32 and left as it was: norms first, in the order they run.

    `single`: many sequences (64 or so) of one token, so that attention is the identity on values and a fused query-key-value
    matrix shows which of its rows are values. `several`: a few sequences of several tokens, on which edges are verified.
    """
    search = _Search(block, single)
    found = []
    for edge in (*search.norms(), *search.matrices()):
        targets = search.readers(edge)
        rows = sorted({row for columns in targets.values() for row in columns.tolist() if row >= 0})
        if not rows or search.may_have_missed(targets):
            continue
        channel = torch.full((edge.channels,), -1)
        channel[rows] = torch.arange(len(rows))
        made = tuple(Target(n, torch.where(c >= 0, channel[c], -1), search.input_axis[n]) for n, c in targets.items())
        whole = Edge(edge.kind, edge.source, made, torch.tensor(rows), edge.bias, edge.offset, edge.input_axis)
        if holds(block, whole, several) and holds(block, whole, single, seed=1):
            found.append(whole)
    return found


class _Touched(TorchFunctionMode):
    """Which parameters anything was done with."""

    def __init__(self) -> None:
        super().__init__()
        self.parameters: set[int] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.parameters.update(id(value) for value in (*args, *(kwargs or {}).values()) if isinstance(value, nn.Parameter))
        return func(*args, **(kwargs or {}))


class _Search:
    """Experiments on one block: what its matrices are given, before and after channels are scaled."""

    def __init__(self, block: nn.Module, probe: Probe) -> None:
        self.block, self.probe = block, probe
        self.input_axis: dict[str, int] = {}
        self._norms: dict[str, tuple[Any, Any]] = {}
        self._parameters = dict(block.named_parameters())
        touched = _Touched()
        self.before = self._watch(self._hooks(), touched)
        self._unseen = [p for p in self._parameters.values() if p.dim() > 1 and id(p) not in touched.parameters]

    def _hooks(self) -> list[Any]:
        def keep(name: str) -> Any:
            def hook(module: nn.Module, arguments: Any, options: Any, output: Any) -> None:
                self._norms.setdefault(name, (arguments, options))

            return hook

        return [
            part.register_forward_hook(keep(name), with_kwargs=True)
            for name, part in self.block.named_modules()
            if _is_norm(part)
        ]

    def _watch(self, hooks: Sequence[Any] = (), also: Any = None) -> dict[str, dict[int | None, Tensor]]:
        """Parameter -> slab -> its inputs `[tokens, features]`."""
        seen: dict[str, dict[int | None, list[Tensor]]] = {}

        def see(name: str, index: int | None, inputs: Tensor) -> None:
            seen.setdefault(name, {}).setdefault(index, []).append(inputs.clone())

        with watching(self.block, see) as watch, also or contextlib.nullcontext():
            self.probe.run(self.block)
        self.input_axis |= watch.input_axis
        for hook in hooks:
            hook.remove()
        return {n: {i: torch.cat(x) for i, x in slabs.items()} for n, slabs in seen.items()}

    def norms(self) -> Iterator[Edge]:
        """The gains of the block that could be sources, in the order they run."""
        for name, (arguments, options) in self._norms.items():
            part = self.block.get_submodule(name)
            start = f"{name}." if name else ""
            gain = part.get_parameter("weight")
            others = {"bias": torch.zeros_like(part.get_parameter("bias"))} if _has(part, "bias") else {}
            for offset in (0.0, 1.0):
                silent = {"weight": torch.full_like(gain, -offset), **others}
                output = functional_call(part, silent, arguments, options)
                if isinstance(output, Tensor) and not output.any():
                    bias = f"{start}bias" if others else ""
                    yield Edge("norm", f"{start}weight", (), torch.arange(gain.numel()), bias, offset)
                    break

    def matrices(self) -> Iterator[Edge]:
        """The matrices of the block, in the order they run."""
        for name in self.before:
            parent, _, last = name.rpartition(".")
            bias = ".".join(filter(None, (parent, "bias" if last == "weight" else f"{last}_bias")))
            axis = self.input_axis[name]
            rows = torch.arange(self._parameters[name].shape[-3 - axis])
            yield Edge("linear", name, (), rows, bias if bias in self._parameters else "", 0.0, axis)

    def may_have_missed(self, targets: Mapping[str, Tensor]) -> bool:
        """Whether a matrix that did not run, such as an expert of its own that no token went to, could read as many features; or
        a feature that was zero for every token be one of several that read the same channel."""
        widths = {len(columns) for columns in targets.values()}
        silent = any(
            (columns < 0).any() and len(columns[columns >= 0].unique()) < (columns >= 0).sum() for columns in targets.values()
        )
        return silent or any(widths.intersection(p.shape) for p in self._unseen)

    def readers(self, edge: Edge) -> dict[str, Tensor]:
        """Matrix -> for each input feature the row of `edge` that it is, or -1. Readers are scaled back once they are known,
        because those of a router hide the rest: experts are given other tokens."""
        found: dict[str, Tensor] = {}
        generator = torch.Generator().manual_seed(0)
        while True:
            changed = self._try(edge, found, _distinct(edge.channels, generator))
            new = {n: c for n, c in changed.items() if n not in found and (c >= 0).any()}
            if edge.kind == "linear" and not new and not found:
                return self._by_halves(edge, changed, generator)
            if not new:
                return found
            found |= new
            if edge.kind == "linear":
                return found

    def _by_halves(self, edge: Edge, changed: Mapping[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
        """As `readers`, for matrices of which only some rows may be scaled, a gate and what it gates in one: random halves of
        the rows leave some gates as they are."""
        wide = {n: torch.full_like(c, -1) for n, c in changed.items() if edge.channels > len(c)}
        for number in range(ROUNDS if wide else 0):
            half = torch.rand(edge.channels, generator=generator) < 0.5
            factors = torch.where(half, _distinct(edge.channels, generator), 1.0)
            for name, columns in self._try(edge, {}, factors).items():
                if name in wide:
                    wide[name] = torch.where(wide[name] < 0, columns, wide[name])
            told = [(c >= 0).any() for c in wide.values()]
            if (number == 3 and not any(told)) or all((c >= 0).all() for c in wide.values()):
                break
        return {n: c for n, c in wide.items() if (c >= 0).any()}

    def _try(self, edge: Edge, known: Mapping[str, Tensor], factors: Tensor) -> dict[str, Tensor]:
        """Matrices whose inputs change when the rows of `edge` are scaled by `factors`: for each input feature, the row that
        it follows, or -1. `known` readers are scaled back."""
        targets = tuple(Target(n, columns, self.input_axis[n]) for n, columns in known.items())
        tried = Edge(edge.kind, edge.source, targets, edge.rows, edge.bias, edge.offset, edge.input_axis)
        with _restored(self.block, _touched_by(tried)):
            apply_scale(self.block, tried, factors)
            after = self._watch()
        changed = {}
        for name, slabs in self.before.items():
            now = after.get(name, {})
            if name == edge.source or any(now[i].shape != x.shape for i, x in slabs.items() if i in now) or not now:
                continue
            if slabs.keys() != now.keys():
                continue
            old, new = torch.cat(list(slabs.values())), torch.cat([now[i] for i in slabs])
            if not torch.equal(old, new):
                changed[name] = _followed(old, new, factors)
        return changed


def _is_norm(part: nn.Module) -> bool:
    own = dict(part.named_parameters())
    return set(own) in ({"weight"}, {"weight", "bias"}) and all(p.dim() == 1 for p in own.values())


def _has(part: nn.Module, name: str) -> bool:
    return getattr(part, name, None) is not None


def _distinct(count: int, generator: torch.Generator) -> Tensor:
    """Factors that tell channels apart, in random order."""
    steps = torch.linspace(0, 1, count)[torch.randperm(count, generator=generator)]
    return LOWEST * (HIGHEST / LOWEST) ** steps


def _followed(old: Tensor, new: Tensor, factors: Tensor) -> Tensor:
    """For each column of `[tokens, features]`, the index of the factor that it was scaled by, whatever the token, or -1."""
    old, new = old.double(), new.double()
    energy = old.square().sum(0)
    ratio = (old * new).sum(0) / energy.clamp_min(1e-30)
    constant = (new - ratio * old).norm(dim=0) <= CONSTANT * energy.sqrt()
    ordered, place = factors.to(old).sort()
    above = torch.searchsorted(ordered, ratio).clamp(1, len(ordered) - 1) if len(ordered) > 1 else torch.zeros_like(ratio).long()
    below = (above - 1).clamp_min(0)
    nearest = torch.where((ratio - ordered[below]).abs() <= (ordered[above] - ratio).abs(), below, above)
    step = (HIGHEST / LOWEST) ** (1 / max(1, len(factors) - 1)) - 1
    near = (ratio / ordered[nearest] - 1).abs() <= min(CONSTANT, step / 4)
    return torch.where(constant & near & (energy > 0) & (ordered[nearest] > 1), place[nearest], -1).cpu()
