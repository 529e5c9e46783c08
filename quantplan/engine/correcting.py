"""Transforms that correct biases, right after a matrix was solved and before anything computes with it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from quantplan.engine.changed import Stored
from quantplan.errors import fail
from quantplan.live.weights import Weights
from quantplan.models.modules import Matrix
from quantplan.transform import Transform


class Correcting:
    """The correcting transforms of one run."""

    def __init__(self, transforms: Sequence[Transform], matrices: Iterable[Matrix], weights: Weights) -> None:
        """`matrices`: those that are quantized. Raises QP226 when none of them has a bias."""
        self._transforms = [t for t in transforms if t.corrects]
        self._weights = weights
        self._biases: dict[str, str] = {}  # matrix -> parameter
        if not self._transforms:
            return
        matrices = list(matrices)
        self._stored = Stored(weights, ())
        for matrix in matrices:
            bias = self._bias_of(matrix)
            if bias:
                self._biases[matrix.name] = bias
        if not self._biases:
            text = f"transform '{self._transforms[0].name}' finds no bias beside the matrices that are quantized"
            raise fail("QP226", text, "remove it", file=weights.checkpoint.source)

    def _bias_of(self, matrix: Matrix) -> str:
        """The bias beside a matrix that is a parameter as it is; '' where there is none that can be stored."""
        places = self._weights.places.get(matrix.name, ())
        if len(places) != 1 or places[0].index is not None:
            return ""
        bias = f"{places[0].module}.bias"
        known = self._weights.empty()
        whole = bias in known and known[bias].shape == (places[0].rows,)
        return bias if whole and bias in self._weights.origins and not self._stored.refusal(bias) else ""

    @torch.no_grad()
    def around(self, matrix: Matrix, mean: Callable[[], Tensor], solve: Callable[[], None]) -> dict[str, Tensor | None]:
        """Solves a loaded matrix and corrects its bias; `mean`: of its inputs, `[columns]`. The stored tensors that changed."""
        bias = self._biases.get(matrix.name)
        if bias is None:
            solve()
            return {}
        (place,) = self._weights.place_of(matrix)
        before = place.view(self._weights.model).float().clone()
        solve()
        after = place.view(self._weights.model).float()
        for transform in self._transforms:
            self._weights.model.get_parameter(bias).add_(transform.bias(before, after, mean()))
        return dict(self._stored.of([bias]))
