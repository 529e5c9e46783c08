"""Kernels: each equals the dequantized product within its dtype's rounding, gives back its codes, says what it does not serve."""

from __future__ import annotations

import copy
import io
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantplan import QuantLinear, QuantplanError
from quantplan.cli import run
from quantplan.kernel import Job, Kernel, ranked, refusals, serving
from quantplan.scheme import SCHEMES, SchemeConfig

CPU = torch.device("cpu")


def job(wq: SchemeConfig, aq: SchemeConfig | None = None, rows: int = 32, columns: int = 256, dtype=torch.bfloat16) -> Job:
    return Job(wq, aq, rows, columns, CPU, dtype)


def scheme(name: str, **options) -> SchemeConfig:
    return SCHEMES.get(name)(**options)


def _weights() -> list[SchemeConfig]:
    """Every scheme with every kind of options that it takes."""
    kinds = (
        *({}, {"group_size": 32}, {"group_size": 16}, {"group_size": 64, "symmetric": False}, {"granularity": "channel"}),
        *({"granularity": "channel", "symmetric": False}, {"granularity": "tensor"}, {"format": "e5m2"}, {"format": "e3m2"}),
    )
    found = []
    for name in SCHEMES.names():
        for options in kinds:
            try:
                found.append(scheme(name, **options))
            except ValueError:  # not an option of this scheme
                continue
    return list(dict.fromkeys(found))


INPUTS = [
    scheme("int8"),
    scheme("int8", granularity="token"),
    scheme("int8", granularity="token", symmetric=False),
    scheme("int6", granularity="token"),
    scheme("int8", dynamic=False),
    scheme("int8", dynamic=False, symmetric=False),
]
SERVED = [
    (kernel, wq, aq, dtype)
    for kernel in ranked()
    for wq in _weights()
    for aq in (INPUTS if kernel.rounds else [None])
    for dtype in (torch.bfloat16, torch.float32)
    if kernel.refuse(job(wq, aq, dtype=dtype)) is None
]


def _name(case) -> str:
    kernel, wq, aq, dtype = case
    return f"{kernel.name}-{wq!r}-{aq!r}-{dtype}"


def _matrix(wq: SchemeConfig, rows: int, columns: int, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator) * torch.rand(rows, 1, generator=generator)
    quantized = wq.quantizer().quantize(weight)
    if wq.lopsided:  # negative steps, as algorithms choose them
        quantized.params["scale"].mul_(torch.where(torch.rand(quantized.params["scale"].shape, generator=generator) < 0.3, -1, 1))
    return quantized


def _close(kernel: Kernel, x: torch.Tensor, weight: torch.Tensor, rounded: torch.Tensor) -> None:
    """Each output is as far from the exact product as rounding weights, inputs and outputs to the dtype can take it."""
    y = kernel(x)
    exact = rounded.double() @ weight.double().T
    bound = rounded.double().abs() @ weight.double().abs().amax(1, keepdim=True).expand_as(weight).T
    eps = torch.finfo(x.dtype).eps * (4 if x.dtype is torch.float32 else 1)  # sums are float32, too
    assert y.dtype == x.dtype and y.shape == exact.shape
    assert torch.isfinite(y).all()
    assert ((y.double() - exact).abs() <= eps * (bound + exact.abs()) + 1e-30).all()
    if len(x):
        error = (y.double() - exact).norm() / exact.norm().clamp(min=1e-30)
        assert error <= 2 * eps, f"relative error {error}"


def _inputs(aq: SchemeConfig | None, x: torch.Tensor):
    """What static activations are found to need, and `x` on the grid."""
    if aq is None:
        return {}, x
    quantizer = aq.quantizer()
    if aq.dynamic:
        return {}, quantizer.quantize_activation(x.float())
    from quantplan.observer import Range

    params = quantizer.fit_static(Range(torch.tensor(-2.0), torch.tensor(1.5)))
    return params, quantizer.round_static(x.float(), params)


@pytest.mark.parametrize("case", SERVED, ids=_name)
def test_equals_the_dequantized_product(case) -> None:
    cls, wq, aq, dtype = case
    quantized = _matrix(wq, 32, 256)
    kernel = cls(quantized, job(wq, aq, dtype=dtype), _inputs(aq, torch.zeros(1, 256))[0])
    for tokens in (0, 1, 5, 64, 130):
        x = torch.randn(tokens, 256, generator=torch.Generator().manual_seed(tokens)).to(dtype)
        _close(kernel, x, wq.quantizer().dequantize(quantized), _inputs(aq, x)[1])


@pytest.mark.parametrize("case", SERVED, ids=_name)
def test_gives_back_the_codes_it_was_made_from(case) -> None:
    cls, wq, aq, dtype = case
    quantized = _matrix(wq, 48, 256)
    made = cls(quantized, job(wq, aq, rows=48, dtype=dtype), _inputs(aq, torch.zeros(1, 256))[0])
    assert made.holds_codes or not (wq.lopsided or not wq.symmetric_grid), "integers can always be given back"
    if made.holds_codes:
        assert torch.equal(made.codes(), quantized.codes)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(SERVED), st.integers(1, 6), st.integers(1, 5), st.integers(0, 140), st.booleans(), st.integers(0, 9))
def test_equals_it_for_any_shape(case, high, wide, tokens, strided, seed) -> None:
    cls, wq, aq, dtype = case
    rows, columns = 16 * high, 64 * wide
    if wq.misfit(columns) or cls.refuse(job(wq, aq, rows, columns, dtype)):
        return
    quantized = _matrix(wq, rows, columns, seed)
    x = torch.randn(tokens, columns * (2 if strided else 1), generator=torch.Generator().manual_seed(seed)).to(dtype)
    x = x[:, ::2] if strided else x
    params, rounded = _inputs(aq, x)
    _close(cls(quantized, job(wq, aq, rows, columns, dtype), params), x, wq.quantizer().dequantize(quantized), rounded)


def test_the_first_that_does_not_refuse_serves() -> None:
    found = job(scheme("int4", group_size=32))
    names = dict(refusals(found))
    assert names["int4pack"] is None and names["int8_mm"] == "inputs are not quantized"
    kernel = serving(found)
    assert kernel is not None and kernel.name == "int4pack"
    assert serving(job(scheme("int3"), dtype=torch.float32)) is None


def test_every_kernel_of_the_cpu_serves_something() -> None:
    served = {kernel.name for kernel, *_ in SERVED}
    assert served >= {"int8_mm", "int8pack", "int4pack", "lookup"}


def test_quantplan_kernels_names_what_serves_and_why_not(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["kernels", "--device", "cpu", "--json"]) == 0
    found = {(k["weights"], k["activations"]): k["kernel"] for k in json.loads(capsys.readouterr().out)["kernels"]}
    assert found["int4", None] == "int4pack" and found["int8", "int8"] == "int8_mm" and found["nf4", None] == "lookup"
    assert run(["kernels", "int3", "--device", "cpu", "--dtype", "float32", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["kernel"] == "reference" and "float32" in told["refusals"]["int4pack"]
    assert run(["kernels", "int8", "--device", "cpu", "-a", "int8"]) == 0
    assert "serves" in capsys.readouterr().out
    assert run(["kernels", "int5", "--device", "nowhere"]) == 2


def test_a_setting_leaves_kernels_out(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = job(scheme("int4", group_size=32))
    monkeypatch.setenv("QUANTPLAN_KERNELS", "none")
    assert serving(asked) is None
    monkeypatch.setenv("QUANTPLAN_KERNELS", "int8_mm, int4pack")
    found = serving(asked)
    assert found is not None and found.name == "int4pack"
    monkeypatch.setenv("QUANTPLAN_KERNELS", "int4")
    with pytest.raises(QuantplanError, match="QP107"):
        serving(asked)


def layer(wq: SchemeConfig, aq: SchemeConfig | None = None) -> QuantLinear:
    torch.manual_seed(0)
    return QuantLinear.from_linear(torch.nn.Linear(256, 64, dtype=torch.bfloat16), wq, aq).eval()


@pytest.mark.parametrize(("wq", "aq"), [("int4", None), ("int8", None), ("int8", "int8"), ("fp8", "fp8"), ("nvfp4", None)])
def test_a_layer_is_the_same_before_and_after_it_computed(wq: str, aq: str | None) -> None:
    made = layer(scheme(wq), None if aq is None else scheme(aq))
    before = {name: tensor.clone() for name, tensor in made.state_dict().items()}
    x = torch.randn(2, 3, 256, dtype=torch.bfloat16)
    y = made(x)
    twin = copy.deepcopy(made)
    torch.save(made, saved := io.BytesIO())
    saved.seek(0)
    again = torch.load(saved, weights_only=False)
    assert torch.equal(twin(x), y) and torch.equal(again(x), y)
    after = made.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[n].view(torch.uint8), after[n].view(torch.uint8)) for n in before if n != "bias")
    made.load_state_dict(layer(scheme(wq), None if aq is None else scheme(aq)).state_dict())
    assert torch.equal(made(x), y)
    assert torch.equal(made.float().dequantize(), twin.dequantize())


def test_codes_lie_in_memory_once() -> None:
    made = layer(scheme("int4"))
    made(torch.zeros(1, 256, dtype=torch.bfloat16))
    assert made._kernel is not None and made._buffers["weight_codes"] is None
    assert made.weight_codes.dtype == torch.uint8 and made._kernel is None  # what is asked for may be changed
    made.weight_codes.zero_()
    y = made(torch.ones(1, 256, dtype=torch.bfloat16))
    torch.testing.assert_close(y, made.to_linear()(torch.ones(1, 256, dtype=torch.bfloat16)), rtol=2e-2, atol=1e-2)


def test_gradients_reach_the_inputs() -> None:
    made = layer(scheme("int4"))
    x = torch.randn(2, 256, dtype=torch.bfloat16, requires_grad=True)
    y = made(x)
    y.sum().backward()
    torch.testing.assert_close(x.grad[0].float(), made.dequantize().bfloat16().float().sum(0), rtol=2e-2, atol=2e-2)
    with torch.no_grad():
        torch.testing.assert_close(made(x), y, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(("wq", "aq"), [("int4", None), ("int8", "int8"), ("fp8", None)])
def test_compiled_layers_compute_the_same(wq: str, aq: str | None) -> None:
    made = layer(scheme(wq), None if aq is None else scheme(aq))
    x = torch.randn(3, 256, dtype=torch.bfloat16)
    with torch.no_grad():
        expected = made(x)
        compiled = torch.compile(made, backend="eager", fullgraph=True)
        assert torch.equal(compiled(x), expected)
