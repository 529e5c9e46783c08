"""The repeated blocks of a model, found by inspection: lists of modules that hold most of its matrices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from quantplan.errors import fail

SHARE = 0.02  # of the weights that are in blocks: a list with less is a detail, not a stack


@dataclass(frozen=True)
class Stack:
    """Blocks that run one after the other, by module name, in order: a decoder's layers, or an encoder's."""

    name: str
    blocks: tuple[str, ...]


@dataclass(frozen=True)
class Blocks:
    """The stacks of a model in the order they run, and the modules outside of them that hold parameters of their own:
    embeddings, final norms, heads."""

    stacks: tuple[Stack, ...]
    outside: tuple[str, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """Every block, in the order they run."""
        return tuple(name for stack in self.stacks for name in stack.blocks)


def find_blocks(model: Any) -> Blocks:
    """The blocks of `model`, which may be a skeleton. Raises QP224 when it has none.

    A stack is a ModuleList outside of every other one, in the part of the model that reads its first input: the language
    model of a vision-language one, both halves of an encoder-decoder.
    """
    lists = [(name, part) for name, part in model.named_modules() if _holds_blocks(part)]
    outermost = [(n, part) for n, part in lists if not any(n.startswith(f"{other}.") for other, _ in lists)]
    reads = _reading_part(model)
    sizes = {n: _matrix_weights(part) for n, part in outermost if n.startswith(reads)}
    total = sum(sizes.values())
    stacks = [Stack(n, tuple(f"{n}.{i}" for i in range(len(part)))) for n, part in outermost if sizes.get(n, 0) > SHARE * total]
    if not stacks:
        text = f"{type(model).__name__} has no list of blocks that calibration could go through one by one"
        raise fail("QP224", text, "use an algorithm without calibration, such as rtn")
    inside = tuple(f"{stack.name}." for stack in stacks)
    outside = tuple(n for n, part in model.named_modules() if part._parameters and not n.startswith(inside))
    return Blocks(tuple(stacks), outside)


def _holds_blocks(part: nn.Module) -> bool:
    """Whether it is a list of modules that are made of modules: a list of linears is a layer in pieces."""
    return isinstance(part, nn.ModuleList) and len(part) > 0 and all(any(True for _ in item.children()) for item in part)


def _matrix_weights(part: nn.Module) -> int:
    return sum(p.numel() for p in part.parameters() if p.dim() > 1)


def _reading_part(model: Any) -> str:
    """Prefix of the submodel that the model's first input goes to, '' for the whole model."""
    if model.config.is_encoder_decoder:
        return ""
    try:
        embedding = model.get_input_embeddings()
    except NotImplementedError:
        return ""
    path = next((name for name, part in model.named_modules() if part is embedding), "")
    parts = path.split(".")
    for depth in range(len(parts) - 1, 0, -1):
        prefix = ".".join(parts[:depth])
        if any(_holds_blocks(part) for part in model.get_submodule(prefix).modules()):
            return f"{prefix}."
    return ""
