"""fp8 times fp8, on the CPU, where the operation is right and slow."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_kernels import _close, _inputs, _matrix, job, scheme

from quantplan.kernel import KERNELS
from quantplan.kernels.fp8_mm import misfit

FP8MM = KERNELS.get("fp8_mm")
WEIGHTS = [scheme("fp8"), scheme("fp8", granularity="tensor"), scheme("fp8", format="e5m2")]
INPUTS = [
    scheme("fp8", granularity="token"),
    scheme("fp8"),
    scheme("fp8", granularity="tensor"),
    scheme("fp8", dynamic=False),
    scheme("fp8", granularity="token", format="e5m2"),
]
PAIRS = [(w, a) for w in WEIGHTS for a in INPUTS if "e4m3" in (w.format, a.format)]


@settings(max_examples=80, deadline=None)
@given(
    st.sampled_from(PAIRS),
    *(st.integers(1, 5), st.integers(1, 6), st.integers(0, 40)),
    *(st.sampled_from([torch.bfloat16, torch.float16, torch.float32]), st.booleans(), st.integers(0, 9)),
)
def test_equals_the_product_of_what_is_rounded(pair, high, wide, tokens, dtype, strided, seed) -> None:
    wq, aq = pair
    rows, columns = 16 * high, 16 * wide
    quantized = _matrix(wq, rows, columns, seed)
    x = torch.randn(tokens, columns * (2 if strided else 1), generator=torch.Generator().manual_seed(seed)).to(dtype)
    x = x[:, ::2] if strided else x
    params, rounded = _inputs(aq, x)
    kernel = FP8MM(quantized, job(wq, aq, rows, columns, dtype), params)
    _close(kernel, x, wq.quantizer().dequantize(quantized), rounded)
    assert torch.equal(kernel.codes(), quantized.codes)


@pytest.mark.parametrize("rows, columns, wq, aq, said", [
    (32, 32, scheme("int8"), INPUTS[0], "weights are int8"),
    (32, 32, scheme("fp8", granularity="block"), INPUTS[0], "scales are for each block, not for a whole row"),
    (32, 32, WEIGHTS[0], None, "inputs are not quantized"),
    (32, 32, WEIGHTS[0], scheme("int8"), "inputs are int8"),
    (32, 32, WEIGHTS[0], scheme("fp8", group_size=32), "inputs have scales for each group"),
    (32, 32, WEIGHTS[0], scheme("fp8", rounding="stochastic"), "inputs are rounded stochastically"),
    (32, 32, WEIGHTS[2], INPUTS[4], "weights and inputs are both e5m2"),
    (40, 32, WEIGHTS[0], INPUTS[0], "40 x 32 is no multiple of 16 both ways"),
    (32, 32, WEIGHTS[0], INPUTS[0], None),
])  # fmt: skip
def test_what_it_does_not_serve(rows, columns, wq, aq, said) -> None:
    assert misfit(job(wq, aq, rows, columns)) == said
    assert FP8MM.refuse(job(wq, aq, rows, columns)) == "it runs on cuda, not on cpu"
