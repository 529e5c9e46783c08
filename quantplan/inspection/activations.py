"""Activations layer by layer: what their outliers are, and how far those of two models on the same tokens are apart."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from quantplan.engine.difference import Difference, DifferenceSums
from quantplan.errors import QuantplanError, fail
from quantplan.evaluation.opened import open_model
from quantplan.evaluation.text import token_windows
from quantplan.headers import Checkpoint
from quantplan.inspection.spread import Spread, SpreadSums
from quantplan.live.blocks import find_blocks
from quantplan.models.modules import natural_key

Kind = Literal["block", "linear"]


@dataclass(frozen=True)
class Activations:
    """One tensor of activations over all tokens. Kurtosis is that of each channel over the tokens; `channel`: the one with the
    largest magnitude, and `channel_peak`: its largest magnitude over the median channel's."""

    values: Spread
    channels: int
    kurtosis_median: float
    kurtosis_max: float
    channel: int
    channel_peak: float

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for `--json`."""
        own = {name: value for name, value in asdict(self).items() if name != "values"}
        return {**self.values.as_dict(), **own}


@dataclass(frozen=True)
class ActivationInspection:
    """The inputs and outputs of a block or a linear layer in the inspected model, and the error of its outputs against the
    other model's on the same tokens (None without one)."""

    name: str
    kind: Kind
    inputs: Activations
    outputs: Activations
    error: Difference | None = None

    @property
    def badness(self) -> tuple[int, float]:
        """Sorts the worst to the front: by error, or without one by how far the largest input is from the rest."""
        return (1, -self.inputs.values.peak) if self.error is None else (0, self.error.snr)

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for `--json`."""
        error = None if self.error is None else self.error.as_dict()
        sides = {"inputs": self.inputs.as_dict(), "outputs": self.outputs.as_dict()}
        return {"module": self.name, "kind": self.kind, "error": error, **sides}


class _Sums:
    """Sums over tokens, of the whole tensor and of each channel in float64 `[channels]`."""

    def __init__(self) -> None:
        self._whole = SpreadSums()
        self._count = 0
        self._powers: list[Tensor] = []
        self._largest: Tensor | None = None

    def add(self, x: Tensor) -> None:
        """Activations `[..., channels]`."""
        x = x.detach().reshape(-1, x.shape[-1]).double()
        self._whole.add(x)
        squares = x * x
        powers = [x.sum(0), squares.sum(0), (squares * x).sum(0), squares.square_().sum(0)]
        largest = x.abs().amax(0)
        self._powers = powers if not self._powers else [a.add_(b) for a, b in zip(self._powers, powers, strict=True)]
        self._largest = largest if self._largest is None else torch.maximum(self._largest, largest)
        self._count += len(x)

    def result(self) -> Activations:
        assert self._largest is not None
        m1, m2, m3, m4 = (total / self._count for total in self._powers)
        variance = (m2 - m1 * m1).clamp_(min=0)
        fourth = (m4 - 4 * m1 * m3 + 6 * m1**2 * m2 - 3 * m1**4).clamp_(min=0)
        kurtosis = torch.where(variance > 0, fourth / variance.square(), 0.0)
        middle = float(self._largest.median())
        return Activations(
            values=self._whole.result(),
            channels=len(kurtosis),
            kurtosis_median=_finite(kurtosis.median()),
            kurtosis_max=_finite(kurtosis.max()),
            channel=int(self._largest.argmax()),
            channel_peak=_finite(self._largest.max() / middle) if middle else 0.0,
        )


def _finite(value: Tensor) -> float:
    """A number for JSON: 0 for NaN and infinity, which `nonfinite` counts."""
    return float(torch.nan_to_num(value, 0.0, 0.0, 0.0))


def inspect_activations(
    checkpoint: Checkpoint,
    reference: Checkpoint | None,
    data: str | os.PathLike[str],
    length: int,
    windows: int,
    tell: Callable[[str, str, int, int], None],
) -> tuple[ActivationInspection, ...]:
    """Every block and linear layer that both models have, in the order layers come in, on `windows` windows of `length` tokens
    of `data`, made by the reference's tokenizer. Both models are in memory, and the activations of one window. Raises QP1xx for
    the data, QP222 for a model that cannot be opened, QP131 for token ids outside the vocabulary."""
    ids = token_windows(data, (reference or checkpoint).require_path(), length, windows)
    model = open_model(checkpoint)
    other = None if reference is None else open_model(reference)
    _check_ids(checkpoint, model, ids)
    points = _points(model)
    if other is not None:
        known = {name for name, _ in other.named_modules()}
        points = {name: kind for name, kind in points.items() if name in known}
    inputs, outputs = ({name: _Sums() for name in points} for _ in range(2))
    errors = {name: DifferenceSums() for name in points}
    seen: set[str] = set()
    for done, window in enumerate(ids, 1):
        expected: dict[str, Tensor] = {}
        if other is not None:
            with watched(other, points, partial(_keep, expected)), torch.no_grad():
                other(window[None])

        def note(name: str, x: Tensor, y: Tensor, kept: dict[str, Tensor] = expected) -> None:
            seen.add(name)
            inputs[name].add(x)
            outputs[name].add(y)
            if name in kept and kept[name].shape == y.shape:
                errors[name].add(kept.pop(name).float(), y.float())

        with watched(model, points, note), torch.no_grad():
            model(window[None])
        tell("activations", checkpoint.source, done, len(ids))
    return tuple(
        ActivationInspection(
            name,
            points[name],
            inputs[name].result(),
            outputs[name].result(),
            None if other is None else errors[name].result(),
        )
        for name in sorted(seen, key=natural_key)
    )


def _keep(kept: dict[str, Tensor], name: str, given: Tensor, result: Tensor) -> None:
    kept[name] = result


def _check_ids(checkpoint: Checkpoint, model: Any, ids: Tensor) -> None:
    largest, known = int(ids.max()), model.get_input_embeddings().weight.shape[0]
    if largest >= known:
        text = f"the data has token id {largest:,}, the vocabulary {known:,}"
        raise fail("QP131", text, "use data made by the tokenizer of this model", file=checkpoint.source)


def _points(model: Any) -> dict[str, Kind]:
    """The blocks and linear layers of a model, of whatever class makes it quantized: the leaves with 2-D weights that are no
    embeddings."""
    points: dict[str, Kind] = {}
    with suppress(QuantplanError):  # a model without blocks has linear layers alone
        points = dict.fromkeys(find_blocks(model).names, "block")
    for name, part in model.named_modules():
        if hasattr(part, "in_features") or type(part).__name__ == "Conv1D":
            points[name] = "linear"
    return points


@contextmanager
def watched(model: nn.Module, names: Any, note: Callable[[str, Tensor, Tensor], Any]) -> Iterator[None]:
    """While it is open, `note(name, input, output)` is called after each of the modules `names` has run, with its first input
    and its first output."""
    handles = []
    try:
        for name in names:

            def hook(module: nn.Module, args: Any, kwargs: Any, output: Any, name: str = name) -> None:
                given = args[0] if args else kwargs.get("hidden_states", kwargs.get("input"))
                result = output[0] if isinstance(output, tuple) else output
                if isinstance(given, Tensor) and isinstance(result, Tensor) and result.numel():
                    note(name, given, result.detach())

            handles.append(model.get_submodule(name).register_forward_hook(hook, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()
