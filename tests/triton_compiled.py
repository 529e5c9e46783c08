"""Kernels compiled for a GPU that need not be there, as quantplan launches them: launches are caught on their way."""

from __future__ import annotations

import torch
import triton
from test_kernels import _matrix
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from quantplan.gpu import matmul
from quantplan.gpu import rounding as rounds
from quantplan.scheme import SchemeConfig

TYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.int32: "i32",
    torch.uint8: "u8",
}
OPTIONS = ("num_warps", "num_stages")


class Caught:
    """Stands in for a kernel: launches are noted, nothing is computed."""

    def __init__(self, kernel, launches: list) -> None:
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid):
        return lambda *arguments, **options: self.launches.append((self.kernel, arguments, options))


def catch(module, call) -> list:
    """(kernel, arguments, options) of every launch that `call` makes with kernels of `module`."""
    launches: list = []
    kernels = {n: k for n, k in vars(module).items() if isinstance(k, triton.JITFunction)}
    try:
        for name, kernel in kernels.items():
            setattr(module, name, Caught(kernel, launches))
        call()
    finally:
        for name, kernel in kernels.items():
            setattr(module, name, kernel)
    return launches


def compiled(kernel, arguments, options, capability: int):
    """One launch, as Triton would specialize it: integers of 1 and constants are compiled in, addresses are multiples of 16."""
    values = dict(zip(kernel.arg_names, arguments, strict=False)) | {n: v for n, v in options.items() if n not in OPTIONS}
    constants = [p.name for p in kernel.params if p.is_constexpr]
    signature, fixed, aligned = {}, {}, {}
    for at, name in enumerate(kernel.arg_names):
        value = values[name]
        if name in constants or value is None or (isinstance(value, int) and value == 1):
            signature[name], fixed[(at,)] = "constexpr", value
            continue
        is_tensor = isinstance(value, torch.Tensor)
        signature[name] = f"*{TYPES[value.dtype]}" if is_tensor else "i32" if isinstance(value, int) else "fp32"
        if is_tensor or (isinstance(value, int) and value % 16 == 0):
            aligned[(at,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=fixed, attrs=aligned)
    chosen = {n: v for n, v in options.items() if n in OPTIONS}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=chosen)


def matmul_kernels(wq: SchemeConfig, capability: int):
    """Every kernel behind a product of this scheme, compiled."""
    packed = matmul.pack(_matrix(wq, 64, 1024))
    for dtype, tokens, way in (
        (torch.bfloat16, 1, "gemv"),
        (torch.bfloat16, 16, "gemm"),
        (torch.float32, 100, "gemm"),
    ):
        x = torch.zeros(tokens, 1024, dtype=dtype)
        for launch in catch(matmul, lambda x=x, way=way: matmul.matmul(x, packed, way)):
            yield compiled(*launch, capability)
    for launch in catch(matmul, lambda: matmul.dequantize(packed, torch.bfloat16)):
        yield compiled(*launch, capability)


def rounding(wq: SchemeConfig, capability: int):
    """The kernels that round to this scheme's grid and pack its codes, compiled."""
    x = torch.ones(8, 1024, dtype=torch.bfloat16)
    launches = catch(rounds, lambda: rounds.pack(_matrix(wq, 64, 1024).codes, wq.bits))
    checked = rounds.check_finite
    try:
        rounds.check_finite = lambda faults: None  # nothing was computed
        launches += catch(rounds, lambda: rounds.fake_quantize(x, wq))
        launches += catch(rounds, lambda: rounds.quantize(x, wq))
    finally:
        rounds.check_finite = checked
    for launch in launches:
        yield compiled(*launch, capability)
