"""quantplan: the native layout, which holds every scheme. Read by transformers once quantplan is imported, and by
`quantplan.load`.

A matrix `name` is stored as `name.weight_codes`, uint8 `[rows, packed_bytes]`: each row's codes as one dense bit stream,
lowest bits first, padded to a 32-bit word; and its parameters as `name.weight_<parameter>`, in the scheme's own dtypes and
shapes. What calibration found for its inputs is stored as `name.input_<parameter>`.
Experts that the source fuses are stored one matrix each. config.json names every stored matrix literally.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from quantplan.assignment import Assignment
from quantplan.format import FORMATS, Format
from quantplan.kv_cache import KVCache
from quantplan.models.modules import Matrix
from quantplan.scheme import Layout, SchemeConfig

if TYPE_CHECKING:
    from torch import Tensor

    from quantplan.tensor import QuantizedTensor

VERSION = 1


@FORMATS.register("quantplan")
class Native(Format):
    """quantplan's own checkpoints."""

    engines: ClassVar[tuple[str, ...]] = ("transformers",)
    own_reader: ClassVar[bool] = True

    def refuse(self, assignment: Assignment) -> str | None:
        assert assignment.wq is not None
        if assignment.module.kind == "embedding":
            return "embeddings are not available yet"
        if assignment.wq.strategy == "token":
            return "weights have no tokens"
        if assignment.aq is not None and ".experts." in f"{assignment.name}.":
            return "transformers fuses experts, and their activations cannot be quantized there"
        return None

    def layout(self, matrix: Matrix, wq: SchemeConfig, aq: SchemeConfig | None) -> Layout:
        codes = ("U8", (matrix.rows, -(-matrix.columns * wq.bits // 32) * 4))
        params = wq.param_layout(matrix.rows, matrix.columns)
        weight = {f"{matrix.name}.weight_codes": codes} | {f"{matrix.name}.weight_{n}": p for n, p in params.items()}
        return {**weight, **self.layout_inputs(matrix, aq)}

    def encode(self, matrix: Matrix, quantized: QuantizedTensor, aq: SchemeConfig | None) -> dict[str, Tensor]:
        from quantplan.numerics import pack_bits

        codes = pack_bits(quantized.codes, quantized.scheme.bits).contiguous()
        return {f"{matrix.name}.weight_codes": codes} | {
            f"{matrix.name}.weight_{n}": p.contiguous() for n, p in quantized.params.items()
        }

    def decode(self, matrix: Matrix, wq: SchemeConfig, aq: SchemeConfig | None, read: Callable[[str], Tensor]) -> QuantizedTensor:
        from quantplan.numerics import unpack_bits
        from quantplan.tensor import QuantizedTensor

        codes = unpack_bits(read(f"{matrix.name}.weight_codes"), wq.bits, matrix.columns)
        params = {n: read(f"{matrix.name}.weight_{n}") for n in wq.param_layout(matrix.rows, matrix.columns)}
        return QuantizedTensor(codes, params, wq)

    def refuse_cache(self, cache: KVCache) -> str | None:
        return None

    def config(self, assignments: Sequence[Assignment], cache: KVCache | None = None) -> Mapping[str, Any]:
        groups: dict[tuple[SchemeConfig, SchemeConfig | None], list[str]] = {}
        for a in assignments:
            if a.wq is not None:
                groups.setdefault((a.wq.meaning(), a.aq), []).extend(m.name for m in a.matrices)
        return {
            "quant_method": "quantplan",
            "version": VERSION,
            "groups": [
                {
                    "wq": _options(wq, {*wq.fitting_options, "dynamic"}),
                    "aq": _options(aq) if aq is not None else None,
                    "modules": names,
                }
                for (wq, aq), names in groups.items()
            ],
            **({} if cache is None else {"kv_cache": cache.as_dict()}),
        }


def _options(scheme: SchemeConfig, left_out: set[str] | None = None) -> dict[str, Any]:
    """A scheme's name and options, defaults included: what a file means must not change with them."""
    options = {"scheme": scheme.name, **scheme.model_dump(mode="json", exclude=left_out)}
    return {**options, "granularity": scheme.strategy, "group_size": scheme.group}
