"""Seeing the inputs of matrices while a block runs, whatever computes with them: linears, Conv1D, slabs of fused experts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from quantplan.errors import fail

Seen = Callable[[str, int | None, Tensor], Tensor | None]

# function -> positions of what is multiplied: the weight is one of the two
_LINEARS = {functional.linear}
_PRODUCTS: dict[Any, tuple[int, int]] = {
    **dict.fromkeys((torch.matmul, torch.mm, torch.bmm, torch.Tensor.matmul, torch.Tensor.mm, torch.Tensor.bmm), (0, 1)),
    **dict.fromkeys((torch.Tensor.__matmul__, torch.Tensor.__rmatmul__), (0, 1)),
    **dict.fromkeys((torch.addmm, torch.baddbmm, torch.Tensor.addmm, torch.Tensor.baddbmm), (1, 2)),
}


@contextmanager
def watching(block: nn.Module, seen: Seen, prefix: str = "") -> Iterator[Watch]:
    """While it is open, `seen(name, index, inputs)` is called before each product with a loaded parameter of `block`: its
    name (after `prefix` and a dot), the slab of a 3-D one, and what it is multiplied with, `[tokens, features]`. What it returns
    is multiplied instead; None: the inputs as they are."""
    start = f"{prefix}." if prefix else ""
    with Watch({f"{start}{name}": p for name, p in block.named_parameters() if p.dim() > 1}, seen) as watch:
        yield watch


class Watch(TorchFunctionMode):
    """Knows a parameter by its memory, so that views of it (a transpose, a slab, a reshape) are known too.

    `input_axis`: for each parameter seen, -1 if its rows are outputs (`[out, in]`, as linears have it), -2 if they are inputs.
    """

    def __init__(self, parameters: dict[str, Tensor], seen: Seen) -> None:
        super().__init__()
        self._parameters: dict[int, tuple[str, Tensor]] = {}
        self._seen = seen
        self.input_axis: dict[str, int] = {}
        for name, parameter in parameters.items():
            self.add(name, parameter)

    def add(self, name: str, parameter: Tensor) -> None:
        """Looks out for one more parameter, unless it is on meta."""
        if not parameter.is_meta:
            self._parameters[parameter.untyped_storage().data_ptr()] = name, parameter

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _LINEARS:
            inputs, weight = (*args, kwargs.get("weight"))[:2] if args else (kwargs["input"], kwargs["weight"])
            _, other = self._look(inputs, weight, -1)
            if other is not None:
                args, kwargs = ((other, *args[1:]), kwargs) if args else (args, {**kwargs, "input": other})
        elif func in _PRODUCTS:
            first, second = _PRODUCTS[func]
            left, right = (args[i] if i < len(args) else None for i in (first, second))
            if func is torch.Tensor.__rmatmul__:
                first, second, left, right = second, first, right, left
            at = first
            known, other = self._look(left, right, -2)
            if not known:
                at, (_, other) = second, self._look(right, left, -1, turned=True)
            if other is not None:
                args = (*args[:at], other, *args[at + 1 :])
        return func(*args, **kwargs)

    def _look(self, inputs: Any, weight: Any, axis: int, turned: bool = False) -> tuple[bool, Tensor | None]:
        """Whether the weight is known, and what to multiply it with, if not `inputs`. `axis`: of `weight`, along which features
        run. `turned`: the weight is on the left, and the features of `inputs` run along the axis before the last."""
        if not isinstance(weight, Tensor) or not isinstance(inputs, Tensor) or weight.is_meta:
            return False, None
        known = self._parameters.get(weight.untyped_storage().data_ptr())
        if known is None or known[1].dim() < 2:
            return False, None
        name, parameter = known
        inputs = inputs.transpose(-1, -2) if turned and inputs.dim() > 1 else inputs
        if parameter.dim() == 2:
            if weight.numel() != parameter.numel():
                text = f"the model multiplies with a part of '{name}' only, so its inputs are not seen whole"
                raise fail("QP225", text, "keep it, or use an algorithm without calibration, such as rtn", tensor=name)
            self.input_axis[name] = _axis(weight, parameter, axis)
            other = self._seen(name, None, inputs.detach().reshape(-1, inputs.shape[-1]))
            return True, _back(other, inputs, turned)
        self.input_axis[name] = _axis(weight, parameter, axis)
        slab = parameter.stride(0)
        first, count = weight.storage_offset() // slab, max(1, weight.numel() // slab)
        parts = inputs.detach().reshape(count, -1, inputs.shape[-1])
        others = [self._seen(name, first + i, parts[i]) for i in range(count)]
        if all(other is None for other in others):
            return True, None
        whole = torch.stack([part if other is None else other for part, other in zip(parts, others, strict=True)])
        return True, _back(whole, inputs, turned)


def _back(other: Tensor | None, inputs: Tensor, turned: bool) -> Tensor | None:
    """A replacement `[tokens, features]` in the shape and dtype of what it replaces."""
    if other is None:
        return None
    shaped = other.reshape(inputs.shape).to(inputs.dtype)
    return shaped.transpose(-1, -2) if turned and inputs.dim() > 1 else shaped


def _axis(weight: Tensor, parameter: Tensor, axis: int) -> int:
    """Which axis of `parameter` is `axis` of its view `weight`."""
    return -1 if weight.stride(axis) == parameter.stride(-1) else -2
