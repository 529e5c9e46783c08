"""nvfp4: blocks of 16 e2m1 values with an e4m3 scale each and one float32 scale for the tensor.

`w = value(code) * (scale / global_scale)` with `global_scale = 448 * 6 / absmax(tensor)`, a divisor, as compressed-tensors and
vLLM store it. Source: NVIDIA, "Pretraining Large Language Models with NVFP4" (arXiv 2509.25149), appendix on the format.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from quantplan.scheme import SCHEMES, Granularity, Layout, Params, Quantizer, SchemeConfig, largest_magnitude

if TYPE_CHECKING:
    from torch import Tensor


@SCHEMES.register("nvfp4")
class NVFP4Config(SchemeConfig):
    """4-bit floats e2m1 in blocks of 16, e4m3 block scales, a float32 tensor scale."""

    bits: ClassVar[int] = 4
    granularities: ClassVar[tuple[Granularity, ...]] = ("group",)
    fixed_group_size: ClassVar[int | None] = 16
    fine_steps: ClassVar[bool] = False
    tensor_params: ClassVar[frozenset[str]] = frozenset({"global_scale"})

    def param_layout(self, rows: int, columns: int) -> Layout:
        return {"scale": ("F8_E4M3", self.grid(rows, columns)), "global_scale": ("F32", (1,))}

    def quantizer(self, stream: str = "") -> NVFP4Quantizer:
        return NVFP4Quantizer(self, stream)


class NVFP4Quantizer(Quantizer):
    """Arithmetic of nvfp4; layers an engine fuses must be given the largest magnitude of them all as `absmax`."""

    config: NVFP4Config

    def fit(self, x: Tensor, shrink: float = 1.0, absmax: Tensor | None = None) -> Params:
        import torch

        from quantplan.numerics import E2M1, E4M3

        top = largest_magnitude(x)
        whole = (top.amax() if absmax is None else absmax).float().reshape(1)
        share = E4M3.maximum * E2M1.maximum / whole
        global_scale = torch.where(torch.isfinite(share), share, 1.0)
        return self.with_step({"global_scale": global_scale}, top * (shrink / E2M1.maximum))

    def static_params(self, groups: Tensor, found: Params) -> Params:
        from quantplan.numerics import E2M1

        return self.with_step(found, largest_magnitude(groups) / E2M1.maximum)

    def encode(self, x: Tensor, params: Params) -> Tensor:
        from quantplan.numerics import E2M1, encode_float

        return encode_float(x / self.step(params), E2M1, self.generator)

    def decode(self, codes: Tensor, params: Params) -> Tensor:
        from quantplan.numerics import E2M1, decode_float

        return decode_float(codes, E2M1).mul_(self.step(params))

    def step(self, params: Params) -> Tensor:
        return params["scale"].float() / params["global_scale"]

    def with_step(self, params: Params, step: Tensor) -> Params:
        import torch

        from quantplan.numerics import E4M3, encode_float

        codes = encode_float(step * params["global_scale"], E4M3).clamp_(min=1)  # a scale of zero could not be divided by
        return params | {"scale": codes.view(torch.float8_e4m3fn)}
