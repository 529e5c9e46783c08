"""Largest magnitudes that matrices share: those of layers an engine fuses, for schemes with a scale of the whole tensor."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from quantplan.models.modules import Matrix, scale_group


class Magnitudes:
    """`largest`: `max |w|` of one matrix, 0-d. Each group's is computed once, by whoever needs it first; any thread may."""

    def __init__(self, matrices: Iterable[Matrix], largest: Callable[[Matrix], Tensor]) -> None:
        self._largest = largest
        self._members: dict[str, list[Matrix]] = {}
        self._known: dict[str, Tensor] = {}
        self._lock = threading.Lock()
        for matrix in matrices:
            self._members.setdefault(scale_group(matrix.name), []).append(matrix)

    def of(self, matrix: Matrix) -> Tensor:
        """`max |w|` over the matrix and those fused with it, float32 0-d. Raises what `largest` does."""
        key = scale_group(matrix.name)
        with self._lock:
            if key not in self._known:
                self._known[key] = torch.stack([self._largest(m) for m in self._members[key]]).amax().float()
            return self._known[key]
