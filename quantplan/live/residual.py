"""The residual stream of a model, found by experiment: which stored tensors are looked up into it, write to it and read it.

Norms are known by their edges (see `graph`); the matrices behind them read the stream, and the others that are as wide write to
it. That is a guess, and whoever changes a model by it checks the result.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quantplan.checkpoint.reader import TensorReader
from quantplan.errors import fail
from quantplan.live.forward import Forward
from quantplan.live.graph import Edge, Probe, linears_fed_by, matrices_of, unchanged
from quantplan.live.probes import Probes
from quantplan.live.weights import Weights
from quantplan.models.modules import Matrix, find_modules
from quantplan.transform import HeadSite, NormSite, Residual, Site

Signature = tuple[Any, ...]


@dataclass(frozen=True)
class _Role:
    """What a kind of block has: names are relative to it."""

    norms: tuple[Edge, ...]
    writers: tuple[Edge, ...]
    heads: tuple[tuple[str, int, Tensor], ...]  # parameter, axis, order


def find_residual(forward: Forward, probes: Probes, reader: TensorReader) -> Residual:
    """The one residual stream of a model that continues a text. Raises QP226 where there is none, several, or one that a tensor
    meets in a way that is not known."""
    return _Search(forward, probes, reader).found()


def signature_of(block: nn.Module) -> Signature:
    """Equal for blocks that compute alike."""
    return type(block), tuple((name, parameter.shape) for name, parameter in block.named_parameters())


class _Search:
    def __init__(self, forward: Forward, probes: Probes, reader: TensorReader) -> None:
        self.forward, self.probes, self.reader = forward, probes, reader
        self.weights: Weights = forward.weights
        self.model = forward.model
        self.matrices: dict[str, list[Matrix]] = {}
        for module in find_modules(self.weights.checkpoint).values():
            for matrix in module.matrices:
                self.matrices.setdefault(matrix.tensor, []).append(matrix)

    def found(self) -> Residual:
        if len(self.forward.blocks.stacks) != 1:
            raise self.unfit("it has several stacks of blocks")
        self.width = self.probes.hidden[0][0].shape[-1]
        sites, norms, heads = [], [], []
        embedding, final, head = self.outside()
        sites += [site for parameter in embedding for site in self.sites(parameter, -1)]
        roles: dict[Signature, _Role] = {}
        for name in self.forward.blocks.names:
            if name not in self.probes.of:
                raise self.unfit(f"'{name}' does not run")
            key = signature_of(self.model.get_submodule(name))
            if key not in roles:
                roles[key] = self.role(name)
            role = roles[key]
            for edge in role.norms:
                norm = self.norm(f"{name}.{edge.source}", f"{name}.{edge.bias}" if edge.bias else "", edge.offset)
                norms.append(norm)
                gain = norm.values + norm.offset
                for target in edge.targets:
                    sites += self.sites(f"{name}.{target.name}", target.input_axis, gain)
            for edge in role.writers:
                sites += self.sites(f"{name}.{edge.source}", -3 - edge.input_axis)
                if edge.bias:
                    sites += self.sites(f"{name}.{edge.bias}", -1)
            for part, axis, order in role.heads:
                heads += [HeadSite(s.tensor, s.axis, order) for s in self.sites(f"{name}.{part}", axis, width=0)]
        last = self.norm(f"{final}.weight", f"{final}.bias" if self.has(final, "bias") else "", self.offset(final))
        norms.append(last)
        sites += self.sites(head, -1, last.values + last.offset)
        tensors = [site.tensor for site in sites] + [t for norm in norms for t in (norm.gain, norm.bias) if t]
        twice = next((t for t in tensors if tensors.count(t) > 1), "") if len(set(tensors)) < len(tensors) else ""
        if twice:
            raise self.unfit(f"'{twice}' meets the residual stream twice")
        return Residual(self.width, sites[0].tensor, tuple(sites), tuple(norms), tuple(heads))

    def unfit(self, why: str) -> Exception:
        text = f"the residual stream of {type(self.model).__name__} cannot be rotated: {why}"
        return fail("QP226", text, "remove the transform", file=self.weights.checkpoint.source)

    def outside(self) -> tuple[list[str], str, str]:
        """The embeddings' parameters, the last norm, the head's parameter. Raises QP226 for anything else outside of blocks."""
        head = self.model.get_output_embeddings()
        embeddings, norms, heads = [], [], []
        for name in self.forward.blocks.outside:
            part = self.model.get_submodule(name)
            own = {n: p for n, p in part.named_parameters(recurse=False)}
            if part is head:
                heads.append(f"{name}.weight")
            elif isinstance(part, nn.Embedding) and part.weight.shape[1] == self.width:
                embeddings.append(f"{name}.weight")
            elif set(own) in ({"weight"}, {"weight", "bias"}) and all(p.shape == (self.width,) for p in own.values()):
                norms.append(name)
            else:
                raise self.unfit(f"'{name}' stands outside of its blocks")
        if not embeddings or len(norms) != 1 or len(heads) != 1:
            raise self.unfit("its embedding, its last norm or its head is not found, or not alone")
        return embeddings, norms[0], heads[0]

    def role(self, name: str) -> _Role:
        self.weights.load(name, self.reader)
        try:
            block = self.model.get_submodule(name)
            single, several = self.probes.of[name]
            edges = linears_fed_by(block, single, several)
            norms = tuple(e for e in edges if e.kind == "norm" and self.is_whole(e))
            readers = {target.name for edge in norms for target in edge.targets}
            seen = matrices_of(block, single)
            writers = tuple(e for e in seen if e.source not in readers and e.channels == self.width)
            heads = tuple(h for e in edges if e.kind == "linear" for h in self.heads(block, e, several))
            return _Role(norms, writers, heads)
        finally:
            self.weights.release(name)

    def is_whole(self, edge: Edge) -> bool:
        """Whether a norm's channels are those of the stream, one by one."""
        channels = torch.arange(self.width)
        return torch.equal(edge.rows, channels) and all(torch.equal(t.columns, channels) for t in edge.targets)

    def heads(self, block: nn.Module, edge: Edge, probe: Probe) -> Iterator[tuple[str, int, Tensor]]:
        """Parameters that write and read heads, where the block computes the same with the values of heads rotated."""
        config = self.model.config.get_text_config()
        size = getattr(config, "v_head_dim", None) or getattr(config, "head_dim", None)
        size = size or self.width // config.num_attention_heads if hasattr(config, "num_attention_heads") else size
        if not size or edge.channels % size or len(block.get_parameter(edge.source).shape) != 2:
            return
        parts = [(edge.source, -3 - edge.input_axis, edge.rows.view(-1, size))]
        if edge.bias:
            parts.append((edge.bias, -1, edge.rows.view(-1, size)))
        for target in edge.targets:
            read = [(target.columns == channel).nonzero().flatten() for channel in range(edge.channels)]
            if len({len(features) for features in read}) != 1 or not len(read[0]):
                return
            places = torch.stack(read).view(-1, size, len(read[0])).movedim(2, 1)  # heads, then those that share their values
            parts.append((target.name, target.input_axis, places.reshape(-1, size)))
        matrix = torch.linalg.qr(torch.randn(size, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64))[0]

        def turn() -> None:
            for name, axis, order in parts:
                rows = block.get_parameter(name).data.movedim(axis, -1)
                rows[..., order] = (rows[..., order].double() @ matrix).to(rows.dtype)

        if unchanged(block, [name for name, _, _ in parts], turn, probe):
            yield from parts

    def norm(self, gain: str, bias: str, offset: float) -> NormSite:
        tensors = [self.one_tensor(name) for name in (gain, *([bias] if bias else []))]
        values = self.reader.read(tensors[0]).double()
        if bias and not (values + offset).all():
            raise self.unfit(f"'{tensors[0]}' has zeros, and a bias beside it")
        part = self.model.get_submodule(gain.rpartition(".")[0])
        return NormSite(tensors[0], tensors[1] if bias else "", values, offset, self.is_centred(part))

    def one_tensor(self, parameter: str) -> str:
        origin = self.weights.origins[parameter]
        if origin.conversion is not None:
            raise self.unfit(f"'{parameter}' is not stored as it is")
        return origin.tensors[0][0]

    def has(self, module: str, name: str) -> bool:
        return getattr(self.model.get_submodule(module), name, None) is not None

    def is_centred(self, norm: nn.Module) -> bool:
        """Whether adding a number to all of its input changes nothing."""
        first = torch.randn(1, 1, self.width, generator=torch.Generator().manual_seed(0))
        plain, moved = (self.run_norm(norm, x, 1.0) for x in (first, first + 3))
        return bool((plain - moved).abs().amax() < 1e-3)

    def offset(self, norm: str) -> float:
        """What the norm's code adds to its gain."""
        first = torch.randn(1, 1, self.width, generator=torch.Generator().manual_seed(0))
        part = self.model.get_submodule(norm)
        return next((o for o in (0.0, 1.0) if not self.run_norm(part, first, -o).any()), 0.0)

    def run_norm(self, norm: nn.Module, x: Tensor, gain: float) -> Tensor:
        own = {n: torch.zeros(p.shape) for n, p in norm.named_parameters()}
        output: Tensor = torch.func.functional_call(norm, {**own, "weight": torch.full((self.width,), gain)}, (x,))
        return output

    def sites(self, parameter: str, axis: int, gain: Tensor | None = None, width: int | None = None) -> Sequence[Site]:
        """The stored tensors of a parameter, with the axis of theirs that is `axis` of it. `width`: what it must measure; 0 for
        anything, None for the stream's."""
        origin = self.weights.origins.get(parameter)
        if origin is None or self.weights.sharing(parameter):
            raise self.unfit(f"'{parameter}' is in no file, or stored together with another")
        width = self.width if width is None else width
        found = []
        for tensor, _ in origin.tensors:
            stored = axis
            if origin.conversion is not None:
                matrices = self.matrices.get(tensor, [])
                places = [p for m in matrices for p in self.weights.places.get(m.name, ()) if p.parameter == parameter]
                if not places:
                    raise self.unfit(f"'{tensor}' is rearranged while it is loaded, in a way that is not followed")
                flipped = places[0].transposed != matrices[0].transposed
                stored = -3 - axis if flipped else axis
            if width and self.weights.checkpoint.tensors[tensor].shape[stored] != width:
                raise self.unfit(f"'{tensor}' is a part of '{parameter}' that is not as wide as the stream")
            found.append(Site(tensor, stored, gain))
        return found
