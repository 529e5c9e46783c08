"""What transforms do to the loaded parameters of a block: which may be changed, and what to store in their place."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from quantplan.live.weights import Weights
from quantplan.models.modules import Matrix, find_modules

CHANGED_BY_ROUNDING = 1e-4  # of the largest value: what an equivalent rewrite may move a float32 function


class Stored:
    """The way back from parameters of a live model to the tensors they are stored as."""

    def __init__(self, weights: Weights, quantized: Iterable[str]) -> None:
        self._weights = weights
        self._quantized = frozenset(quantized)  # matrices, which are solved and stored anyway
        self._matrices: dict[str, list[Matrix]] = {}  # tensor -> its matrices
        for module in find_modules(weights.checkpoint).values():
            for matrix in module.matrices:
                self._matrices.setdefault(matrix.tensor, []).append(matrix)

    def refusal(self, parameter: str) -> str:
        """Why a parameter cannot be changed: what it is stored as would not follow, or others would. Empty when it can."""
        origin = self._weights.origins.get(parameter)
        if origin is None:
            return "is in no file"
        shared = self._weights.sharing(parameter)
        if shared:
            return f"is stored together with '{shared[0]}'"
        if origin.conversion is None:
            return ""
        for tensor, _ in origin.tensors:
            if not self._is_quantized(tensor) and not self._is_one_matrix(tensor):
                return f"is made of '{tensor}' in a way that is not undone here"
        return ""

    def of(self, parameters: Iterable[str]) -> Iterator[tuple[str, Tensor | None]]:
        """Each stored tensor of these loaded parameters, as it is now, float32; None for quantized ones."""
        done: set[str] = set()
        for parameter in parameters:
            origin = self._weights.origins[parameter]
            for tensor, _ in origin.tensors:
                if tensor in done:
                    continue
                done.add(tensor)
                if self._is_quantized(tensor):
                    yield tensor, None
                elif origin.conversion is None:
                    yield tensor, self._weights.model.get_parameter(parameter).detach().float().clone()
                else:
                    (matrix,) = self._matrices[tensor]
                    rows = [p.view(self._weights.model).float() for p in self._weights.place_of(matrix)]
                    yield tensor, torch.cat(rows)

    def _is_quantized(self, tensor: str) -> bool:
        return any(matrix.name in self._quantized for matrix in self._matrices.get(tensor, ()))

    def _is_one_matrix(self, tensor: str) -> bool:
        found = self._matrices.get(tensor, [])
        return len(found) == 1 and found[0].index is None and found[0].name in self._weights.places
