"""Rounding and packing in Triton's interpreter beside the quantizers' own: bit for bit. Run by test_triton.py."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_kernels import _weights, scheme

from quantplan.gpu import rounding
from quantplan.gpu.levels import level_table
from quantplan.numerics import pack_bits
from quantplan.observer import Range
from quantplan.scheme import SCHEMES, NonFinite, SchemeConfig

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SCHEMES_ = [
    *_weights(),
    *(scheme("fp8", granularity="block"), scheme("int8", granularity="block", symmetric=False)),
    *(scheme("int8", granularity="token"), scheme("fp8", granularity="token"), scheme("int4", scale_rule="qmin")),
    *(scheme("int4", scale_dtype="float32"), scheme("int4", scale_dtype="float16", symmetric=False)),
    *(scheme("int4", quotient_dtype="bfloat16"), scheme("int4", quotient_dtype="float16", symmetric=False)),
    *(scheme("nf4", dtype="bfloat16"), scheme("nf4", scale_dtype="float32"), scheme("fp4", scale_dtype="float16")),
]
SCHEMES_ = list({repr(s): s for s in SCHEMES_ if rounding.refuse(s) is None}.values())


def _matrix(rows: int, columns: int, dtype: torch.dtype, seed: int = 0, binades: int = 8) -> torch.Tensor:
    """Rows of very different size, one of zeros, with values that lie between two levels."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=generator)
    x = torch.where(torch.rand(rows, columns, generator=generator) < 0.2, (x * 4).round() / 4, x)
    x *= torch.exp2(torch.randint(-binades, 4, (rows, 1), generator=generator))
    x[rows // 2] = 0
    return x.to(dtype)


def _same(x: torch.Tensor, wq: SchemeConfig, absmax: torch.Tensor | None = None) -> None:
    quantizer = wq.quantizer()
    expected, found = quantizer.quantize(x, absmax), rounding.quantize(x, wq, absmax)
    assert torch.equal(found.codes, expected.codes)
    for name, param in expected.params.items():
        assert found.params[name].dtype == param.dtype and torch.equal(found.params[name].float(), param.float())
    values, rounded = quantizer.fake_quantize(x, absmax), rounding.fake_quantize(x, wq, absmax)
    assert rounded.dtype == values.dtype and torch.equal(rounded, values)


@pytest.mark.parametrize("wq", SCHEMES_, ids=repr)
def test_every_scheme(wq: SchemeConfig) -> None:
    assert rounding.refuse(wq) is None
    for dtype in DTYPES:
        _same(_matrix(9, 192, dtype), wq)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(SCHEMES_),
    *(st.integers(1, 140), st.integers(1, 5), st.sampled_from(DTYPES), st.integers(0, 60), st.integers(0, 99)),
)
def test_any_shape_and_size(wq, rows, groups, dtype, binades, seed) -> None:
    x = _matrix(rows, groups * (wq.group or 31), dtype, seed, binades)
    _same(x, wq, x.abs().amax().float() * 1.5 if wq.needs_absmax and seed % 2 else None)


def test_a_group_longer_than_a_tile_and_more_than_two_axes() -> None:
    for wq in (scheme("int8"), scheme("int8", symmetric=False, granularity="channel"), scheme("fp8", granularity="token")):
        x = _matrix(2, rounding.LONGEST + 100, torch.bfloat16)
        x[1, -1] = 99.0  # the extremes of each row lie in its last part
        x[0, -2] = -99.0
        _same(x, wq)
        x = _matrix(6, 64, torch.float32).view(2, 3, 64)[:, :2]
        assert torch.equal(rounding.fake_quantize(x, wq), wq.quantizer().fake_quantize(x))


@pytest.mark.parametrize("aq", [
    scheme("int8", dynamic=False), scheme("int8", dynamic=False, symmetric=False), scheme("fp8", dynamic=False),
    scheme("nvfp4", dynamic=False),
], ids=repr)  # fmt: skip
def test_static_ranges(aq) -> None:
    quantizer = aq.quantizer()
    params = quantizer.fit_static(Range(torch.tensor(-2.0), torch.tensor(1.5)))
    x = _matrix(5, 96, torch.bfloat16).view(5, 1, 96) * 4  # some of it outside
    assert torch.equal(rounding.round_static(x, aq, params), quantizer.round_static(x, params))


@pytest.mark.parametrize("fault", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("wq", [scheme("int4"), scheme("int8", granularity="tensor"), scheme("mxfp4"), scheme("fp8")], ids=repr)
def test_what_is_not_finite_is_found(wq, fault) -> None:
    x = _matrix(4, 64, torch.bfloat16)
    x[1, 37] = fault
    with pytest.raises(NonFinite):
        rounding.fake_quantize(x, wq)


def test_no_values_are_no_work() -> None:
    assert rounding.fake_quantize(torch.empty(0, 64), scheme("int4")).shape == (0, 64)
    assert rounding.pack(torch.empty(0, 64, dtype=torch.uint8), 4).shape == (0, 32)


def test_stochastic_rounding_is_left_to_the_quantizer() -> None:
    assert rounding.refuse(scheme("int4", rounding="stochastic")) == "rounding is stochastic"


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 8), st.integers(1, 9), st.integers(1, 200), st.booleans(), st.integers(0, 99))
def test_packs_the_same_bits(bits, rows, count, strided, seed) -> None:
    codes = torch.randint(0, 2**bits, (rows, count * 2), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    codes = codes[:, ::2] if strided else codes
    assert torch.equal(rounding.pack(codes, bits), pack_bits(codes, bits))


@pytest.mark.parametrize("name", SCHEMES.names())
def test_values_halfway_between_levels_go_where_the_quantizer_sends_them(name) -> None:
    wq = scheme(name, group_size=32) if name.startswith("int") else scheme(name)
    levels = level_table(wq)
    levels = levels[torch.isfinite(levels)].unique()
    most = levels[-1]
    middles = torch.cat([(levels[1:] + levels[:-1]) / 2, levels])
    middles = middles[middles.abs() <= most]
    size = (wq.group or 32) - 1
    rows = torch.nn.functional.pad(middles, (0, -len(middles) % size)).view(-1, size)
    x = torch.cat([rows, most.expand(len(rows), 1)], 1)  # with the largest in every group, steps are 1
    if not wq.tensor_params:
        assert (wq.quantizer().step(wq.quantizer().fit(x)) == 1).all()
    _same(x.view(len(rows), -1), wq, most * 448 if wq.needs_absmax else None)
