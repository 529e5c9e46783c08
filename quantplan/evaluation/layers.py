"""How far every block's and linear's output is from the reference's, both models run on the same tokens."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from quantplan.errors import QuantplanError

if TYPE_CHECKING:
    from torch import Tensor

Kind = Literal["block", "linear"]


@dataclass(frozen=True)
class OutputError:
    """The relative error `sum (y_q - y)^2 / sum y^2` of a module's output over all tokens, `y` the reference's. What came in
    differs as well: it holds what the layers before it did."""

    name: str
    kind: Kind
    error: float


class OutputErrors:
    """Watches a model beside its reference: every decoder block, and every `nn.Linear` or `Conv1D` of the reference that is in
    one, by name.

    A module counts where it gives outputs of the same shape in both; experts that were given other tokens do not.
    """

    def __init__(self, reference: Any, model: Any) -> None:
        self._models = reference, model
        self._kinds = _watched(reference, dict(model.named_modules()))
        self._sums: dict[str, tuple[float, float]] = {}  # noise, signal

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """While it is open, the reference is to run once, then the model. The reference's outputs are held meanwhile."""
        held: dict[str, list[Tensor]] = {}

        def hold(name: str, y: Tensor) -> None:
            held.setdefault(name, []).append(y)

        def compare(name: str, y: Tensor) -> None:
            if not held.get(name) or held[name][0].shape != y.shape:
                self._kinds.pop(name, None)
                return
            before = held[name].pop(0).float()
            noise, signal = self._sums.get(name, (0.0, 0.0))
            noise += float((y.float() - before).square().sum())
            self._sums[name] = noise, signal + float(before.square().sum())

        hooks = [
            _hook(model, name, seen) for model, seen in zip(self._models, (hold, compare), strict=True) for name in self._kinds
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def result(self) -> tuple[OutputError, ...]:
        """The errors, in the order of the model."""
        sums = {name: self._sums.get(name, (0.0, 0.0)) for name in self._kinds}
        return tuple(OutputError(n, self._kinds[n], noise / signal) for n, (noise, signal) in sums.items() if signal)


def _watched(reference: Any, modules: dict[str, Any]) -> dict[str, Kind]:
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    from quantplan.live.blocks import find_blocks

    try:
        blocks = find_blocks(reference).names
    except QuantplanError:  # no blocks, but there are linears
        blocks = ()
    inside = tuple(f"{name}." for name in blocks) or ("",)
    kinds: dict[str, Kind] = {}
    for name, module in reference.named_modules():
        if name in modules and name in blocks:
            kinds[name] = "block"
        elif name in modules and type(module) in (nn.Linear, Conv1D) and name.startswith(inside):
            kinds[name] = "linear"
    return kinds


def _hook(model: Any, name: str, seen: Any) -> Any:
    from quantplan.live.forward import hidden_of

    return model.get_submodule(name).register_forward_hook(lambda module, inputs, output: seen(name, hidden_of(output).detach()))
