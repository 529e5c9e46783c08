"""What Triton's interpreter computes: run by test_triton.py in a process of its own, as interpreting is decided when triton is
imported. Not collected by itself."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_kernels import _matrix, _weights, job, scheme

from quantplan import gpu
from quantplan.gpu.levels import levels_of
from quantplan.gpu.matmul import dequantize, matmul, pack
from quantplan.kernel import KERNELS
from quantplan.scheme import SchemeConfig

WAYS = ("gemv", "gemm", "dense")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SCHEMES_ = list({repr(s): s for s in [*_weights(), scheme("fp8", granularity="block"), scheme("int4", group_size=12)]}.values())
SCHEMES_ = [s for s in SCHEMES_ if KERNELS.get("triton").refuse(job(s)) is None]


def _inputs(tokens: int, columns: int, dtype: torch.dtype, strided: bool = False) -> torch.Tensor:
    x = torch.randn(tokens, columns * (2 if strided else 1), generator=torch.Generator().manual_seed(tokens)).to(dtype)
    return x[:, ::2] if strided else x


def _product(way, x: torch.Tensor, wq: SchemeConfig, rows: int, seed: int = 0) -> None:
    quantized = _matrix(wq, rows, x.shape[1], seed)
    packed = pack(quantized)
    y, weight = matmul(x, packed, way), wq.quantizer().dequantize(quantized).double()
    exact, bound = x.double() @ weight.T, x.double().abs() @ weight.abs().T
    info = torch.finfo(x.dtype)
    # weights rounded to the dtype, below its normals too, and the result; the interpreter cuts bfloat16 off, which is twice that
    most = info.eps * (bound + exact.abs()) + info.tiny * info.eps * x.double().abs().sum(1, keepdim=True)
    most += x.shape[1] * torch.finfo(torch.float32).eps * bound  # sums are float32, each addition rounds
    assert y.dtype == x.dtype and y.shape == exact.shape
    assert ((y.double() - exact).abs() <= most).all()


@pytest.mark.parametrize("wq", SCHEMES_, ids=repr)
def test_every_scheme(wq: SchemeConfig) -> None:
    columns = 96 if wq.group == 12 else 192 if wq.group == 64 else 160
    number = SCHEMES_.index(wq)
    for i, way in enumerate(WAYS):
        _product(way, _inputs(3, columns, DTYPES[(number + i) % 3]), wq, 20)


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(["int2", "int3", "int4", "int5", "int8", "fp4", "fp8", "nf4", "nvfp4", "mxfp4", "mxfp6"]),
    *(st.integers(1, 70), st.integers(1, 9), st.integers(0, 19)),
    *(st.sampled_from(WAYS), st.sampled_from(DTYPES), st.booleans(), st.integers(0, 9)),
)
def test_any_shape(name, rows, groups, tokens, way, dtype, strided, seed) -> None:
    wq = scheme(name)
    columns = groups * (wq.group or 7)
    _product(way, _inputs(tokens, columns, dtype, strided), wq, rows, seed)


@settings(max_examples=15, deadline=None)
@given(st.integers(2, 8), st.integers(1, 40), st.integers(1, 5), st.booleans(), st.sampled_from(WAYS), st.integers(0, 9))
def test_any_group_of_any_width(bits, size, groups, symmetric, way, seed) -> None:
    _product(way, _inputs(2, size * groups, torch.float32), scheme(f"int{bits}", group_size=size, symmetric=symmetric), 5, seed)


@pytest.mark.parametrize("dtype", DTYPES)
def test_columns_split_among_programs_are_summed(dtype) -> None:
    _product("gemm", _inputs(5, 1024, dtype), scheme("int4", group_size=64), 32)


@pytest.mark.parametrize("wq", [s for s in SCHEMES_ if s.name != "nvfp4"], ids=repr)
def test_dequantizes_to_the_very_values(wq: SchemeConfig) -> None:
    quantized = _matrix(wq, 10, 192)
    assert torch.equal(dequantize(pack(quantized), torch.float32), wq.quantizer().dequantize(quantized))


@pytest.mark.parametrize("name", ["int2", "int3", "int4", "int8", "nf4", "mxfp6"])
def test_gives_back_its_codes_and_keeps_no_more(name) -> None:
    wq = scheme(name)
    quantized = _matrix(wq, 17, 192)
    kernel = KERNELS.get("triton")(quantized, job(wq, rows=17, columns=192), {})
    assert torch.equal(kernel.codes(), quantized.codes)
    assert kernel.weight.words.numel() * 32 == 17 * 192 * wq.bits


def test_floats_and_integers_are_computed_and_tables_looked_up() -> None:
    kinds = {s.name: levels_of(s).kind for s in SCHEMES_}
    assert {n for n, k in kinds.items() if k == "table"} == {"nf4"}
    assert {n for n, k in kinds.items() if k == "integer"} == {f"int{b}" for b in range(2, 9)}


def test_serves_the_cpu_in_the_interpreter() -> None:
    assert gpu.refuse(torch.device("cpu")) is None and gpu.refuse(torch.device("meta")) == "it runs on cuda, not on meta"
    triton = KERNELS.get("triton")
    assert triton.refuse(job(scheme("nf4"), dtype=torch.float16)) is None
    assert triton.refuse(job(scheme("nf4"), dtype=torch.float64)) == "inputs are float64"


@pytest.mark.parametrize("tokens", [1, 20])
def test_torch_compile_sees_one_operation(tokens) -> None:
    wq = scheme("int4")
    quantized = _matrix(wq, 24, 96)
    kernel = KERNELS.get("triton")(quantized, job(wq, rows=24, columns=96), {})
    seen = []

    def backend(graph, _):
        seen.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph

    compiled = torch.compile(lambda x: kernel(x * 2) + 1, backend=backend, fullgraph=True)
    x = _inputs(tokens, 96, torch.float32)
    assert torch.equal(compiled(x), kernel(x * 2) + 1)
    assert sum("matmul_packed" in name for name in seen) == 1
    torch.library.opcheck(torch.ops.quantplan.matmul_packed.default, _arguments(x, kernel.weight))


def _arguments(x, w):
    kind = w.levels
    read = (w.words, w.scale, w.divisor, w.zeros, w.table)
    return (x, *read, kind.kind, kind.bits, kind.mantissa, kind.unit, w.tall, w.wide, "gemm")
