"""CONTRACT: a format is a layout on disk. It says what it can hold, names and shapes every tensor before any weight is read,
and turns quantized matrices into those tensors and back. Members live in `formats/`, one file each.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from quantplan.assignment import Assignment
from quantplan.kv_cache import KVCache
from quantplan.models.modules import Matrix
from quantplan.registry import Registry
from quantplan.scheme import Layout, Params, SchemeConfig

if TYPE_CHECKING:
    from torch import Tensor

    from quantplan.tensor import QuantizedTensor


class Format(ABC):
    """A layout on disk. Stateless."""

    name: ClassVar[str]
    engines: ClassVar[tuple[str, ...]] = ()  # what it is for, where a plan names no engines
    own_reader: ClassVar[bool] = False  # quantplan's code opens it in engines: their own limits do not apply

    @abstractmethod
    def refuse(self, assignment: Assignment) -> str | None:
        """Why the format cannot hold a module treated so; None when it can. Asked before work starts."""

    @abstractmethod
    def layout(self, matrix: Matrix, wq: SchemeConfig, aq: SchemeConfig | None) -> Layout:
        """Full tensor name -> (safetensors dtype, shape) of everything stored for one quantized matrix and its static
        activations."""

    @abstractmethod
    def encode(self, matrix: Matrix, quantized: QuantizedTensor, aq: SchemeConfig | None) -> dict[str, Tensor]:
        """The tensors `layout` promised, but for those of static activations."""

    @abstractmethod
    def decode(self, matrix: Matrix, wq: SchemeConfig, aq: SchemeConfig | None, read: Callable[[str], Tensor]) -> QuantizedTensor:
        """The quantized matrix, from tensors read by full name: the inverse of `encode`."""

    def layout_inputs(self, matrix: Matrix, aq: SchemeConfig | None) -> Layout:
        """What `layout` says of static activations: nothing for dynamic ones."""
        return {} if aq is None else {f"{matrix.name}.input_{n}": kind for n, kind in aq.static_layout().items()}

    def encode_inputs(self, matrix: Matrix, params: Params) -> dict[str, Tensor]:
        """The tensors `layout_inputs` promised, from parameters as `Quantizer.fit_static` makes them."""
        return {f"{matrix.name}.input_{n}": p for n, p in params.items()}

    def decode_inputs(self, matrix: Matrix, aq: SchemeConfig | None, read: Callable[[str], Tensor]) -> Params:
        """The inverse of `encode_inputs`; empty for dynamic activations."""
        return {} if aq is None else {n: read(f"{matrix.name}.input_{n}") for n in aq.static_layout()}

    def refuse_cache(self, cache: KVCache) -> str | None:
        """Why the format cannot hold the scales of a key-value cache; None when it can."""
        return "it has no scales of a key-value cache"

    @abstractmethod
    def config(self, assignments: Sequence[Assignment], cache: KVCache | None = None) -> Mapping[str, Any]:
        """The `quantization_config` of config.json. `cache`: the key-value cache, where it is quantized."""


FORMATS: Registry[Format] = Registry("format", "formats")
