"""QuantLinear behaves as an nn.Linear with the dequantized weight; `quantize` carries a plan out on a model in memory."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from quantplan import QuantLinear, QuantplanError, load_plan, quantize
from quantplan.scheme import SCHEMES, SchemeConfig

VARIANTS: list[dict[str, Any]] = [
    *({"scheme": name} for name in SCHEMES.names()),
    *({"scheme": name, "symmetric": False} for name in SCHEMES.names() if name.startswith("int")),
    *({"scheme": "int4", "granularity": g} for g in ("channel", "tensor", "block")),
    *({"scheme": "fp8", "granularity": g} for g in ("tensor", "block")),
    {"scheme": "int4", "group_size": 64, "scale_dtype": "float32", "symmetric": False},
    {"scheme": "int5", "group_size": 16, "rounding": "stochastic"},
    {"scheme": "fp8", "format": "e5m2", "scale_dtype": "float16"},
    {"scheme": "mxfp6", "format": "e3m2"},
    {"scheme": "mxfp8", "format": "e5m2"},
]


def scheme(options: dict[str, Any]) -> SchemeConfig:
    return SCHEMES.get(options["scheme"])(**{k: v for k, v in options.items() if k != "scheme"})


def named(options: dict[str, Any]) -> str:
    return "-".join(map(str, options.values()))


def linear(columns: int = 192, rows: int = 40, bias: bool = True, dtype: torch.dtype = torch.float32) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(columns, rows, bias=bias, dtype=dtype)


def made(wq: dict[str, Any], aq: dict[str, Any] | None = None, **options: Any) -> QuantLinear:
    return QuantLinear.from_linear(linear(**options), scheme(wq), None if aq is None else scheme(aq))


@pytest.mark.parametrize("options", VARIANTS, ids=named)
def test_forward_is_a_linear_with_the_dequantized_weight(options: dict[str, Any]) -> None:
    dense, layer = linear(), made(options)
    x = torch.randn(3, 192)
    torch.testing.assert_close(layer(x), functional.linear(x, layer.dequantize(), dense.bias), rtol=1e-5, atol=1e-6)
    config = scheme(options)
    expected = config.quantizer().quantize(dense.weight.detach())
    assert torch.equal(layer.dequantize(), config.quantizer().dequantize(expected))
    assert torch.equal(layer.quantized().codes, expected.codes)
    assert all(torch.equal(layer.quantized().params[n].float(), p.float()) for n, p in expected.params.items())


@pytest.mark.parametrize("options", VARIANTS, ids=named)
def test_a_state_dict_goes_into_an_empty_layer(options: dict[str, Any]) -> None:
    layer = made(options)
    empty = QuantLinear(192, 40, scheme(options), device="meta")
    state = layer.state_dict()
    assert {n: (t.dtype, t.shape) for n, t in empty.state_dict().items()} == {n: (t.dtype, t.shape) for n, t in state.items()}
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    for target, assign in ((QuantLinear(192, 40, scheme(options)), False), (empty, True)):
        target.load_state_dict(torch.load(buffer), assign=assign)
        buffer.seek(0)
        assert torch.equal(target.dequantize(), layer.dequantize())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    "options", [{"scheme": "int4", "scale_dtype": "float32"}, {"scheme": "nvfp4"}, {"scheme": "fp8"}], ids=named
)
def test_a_change_of_dtype_leaves_the_weight_as_it_is(options: dict[str, Any], dtype: torch.dtype) -> None:
    layer = made(options)
    before, stored = layer.dequantize(), {n: b.dtype for n, b in layer.named_buffers()}
    layer.to(dtype)
    assert torch.equal(layer.dequantize(), before)
    assert {n: b.dtype for n, b in layer.named_buffers()} == stored
    assert layer.bias.dtype == layer.dtype == layer.weight.dtype == dtype
    assert layer(torch.randn(2, 192, dtype=dtype)).dtype == dtype
    layer.float().half().type(torch.float32)
    assert torch.equal(layer.dequantize(), before)
    assert layer.to("meta").weight_scale.is_meta


def test_dtypes_of_inputs_and_autocast_are_those_of_a_linear() -> None:
    layer, dense = made({"scheme": "int4"}), linear()
    dense.weight.data = layer.dequantize()
    x = torch.randn(3, 192)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == dense(x).dtype == torch.bfloat16
        torch.testing.assert_close(layer(x), dense(x), rtol=2e-2, atol=1e-2)
        torch.testing.assert_close(layer(x.bfloat16()), dense(x.bfloat16()), rtol=2e-2, atol=1e-2)
    assert layer(x.bfloat16()).dtype == torch.bfloat16
    assert torch.equal(layer(x.double()), dense.double()(x.double()))


@pytest.mark.parametrize("aq", [None, {"scheme": "int8", "granularity": "token"}, {"scheme": "nvfp4"}])
@pytest.mark.parametrize("shape", [(192,), (0, 192), (1, 192), (2, 3, 192), (2, 0, 5, 192), (2, 1, 3, 192)])
def test_leading_dimensions(aq: dict[str, Any] | None, shape: tuple[int, ...]) -> None:
    layer = made({"scheme": "int4"}, aq)
    x = torch.randn(shape)
    y = layer(x)
    assert y.shape == (*shape[:-1], 40)
    rounded = x if aq is None else scheme(aq).quantizer().quantize_activation(x)
    assert torch.equal(y, functional.linear(rounded, layer.dequantize(), layer.bias))


def test_activations_are_rounded_and_their_gradient_passes_through() -> None:
    layer = made({"scheme": "int8"}, {"scheme": "int4", "granularity": "token"})
    x = torch.randn(3, 192, requires_grad=True)
    y = layer(x)
    assert not torch.equal(y, functional.linear(x, layer.dequantize(), layer.bias))
    y.sum().backward()
    assert x.grad is not None and torch.allclose(x.grad, layer.dequantize().sum(0).expand_as(x))
    assert layer.bias.grad is not None


def test_copies_and_pickles_are_whole_and_apart() -> None:
    layer = made({"scheme": "nvfp4"}, {"scheme": "int8", "rounding": "stochastic", "granularity": "token"})
    x = torch.randn(2, 192)
    expected = layer(x)
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    copied = copy.deepcopy(layer)
    assert torch.equal(copied(x), expected) and torch.equal(torch.load(buffer, weights_only=False)(x), expected)
    copied.weight_codes.zero_()
    assert torch.equal(layer(x), expected)


def test_bias_mode_and_conversion_back() -> None:
    dense = linear(dtype=torch.bfloat16).eval()
    layer = QuantLinear.from_linear(dense, scheme({"scheme": "int4"}))
    assert layer.bias is dense.bias and not layer.training and layer.dtype == torch.bfloat16
    back = layer.to_linear()
    assert torch.equal(back.weight, layer.dequantize().bfloat16()) and back.bias is dense.bias and not back.training
    bare = made({"scheme": "int4"}, bias=False)
    assert bare.bias is None and "bias" not in bare.state_dict()
    assert {n for n, _ in layer.named_parameters()} == {"bias"}


def test_repr_says_how() -> None:
    layer = made({"scheme": "int4", "symmetric": False}, {"scheme": "fp8", "granularity": "token"}, bias=False)
    shown = "QuantLinear(in_features=192, out_features=40, bias=False, wq=int4 asymmetric group 32, aq=fp8 e4m3 token)"
    assert repr(layer) == shown


def test_groups_that_do_not_divide_are_refused() -> None:
    with pytest.raises(QuantplanError, match="QP114 groups of 128 do not divide 192 columns"):
        QuantLinear(192, 40, scheme({"scheme": "int4", "group_size": 128}))


def sequential() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 32, bias=False), nn.LayerNorm(32))


def test_a_plan_on_a_plain_model() -> None:
    model, original = sequential(), sequential()
    plan = {
        "default": {"wq": "int4"},
        "overrides": [{"pattern": "2", "wq": {"scheme": "int8", "granularity": "block"}, "aq": "int8"}],
        "output": {"format": "compressed-tensors"},  # has no blocks of integers: no matter in memory
        "engines": ["vllm"],
    }
    assert quantize(model, plan) is model
    first, second = model[0], model[2]
    assert isinstance(first, QuantLinear) and isinstance(second, QuantLinear)
    assert (first.wq.name, first.aq, second.wq.strategy) == ("int4", None, "block")
    assert second.aq is not None and second.aq.strategy == "token"
    assert first.bias is not None and torch.equal(first.bias, original[0].bias)
    assert torch.equal(first.dequantize(), first.wq.quantizer().quantize_weight(original[0].weight.detach()))
    x = torch.randn(5, 64)
    assert functional.mse_loss(model(x), original(x)) < 0.1


def test_problems_are_raised_before_anything_changes() -> None:
    model = sequential()
    with pytest.raises(QuantplanError, match="QP110"):
        quantize(model, {"default": {"wq": "int4"}, "overrides": [{"pattern": "fc1", "wq": "int8"}]})
    with pytest.raises(QuantplanError, match="QP114"):
        quantize(model, {"default": {"wq": "int4", "group_size": 64}})
    model[2].weight.data[3, 5] = torch.nan
    with pytest.raises(QuantplanError, match='tensor "2": QP601'):
        quantize(model, {"default": {"wq": "int4"}})
    with pytest.raises(QuantplanError, match="QP222"):
        quantize(sequential().to("meta"), {"default": {"wq": "int4"}})
    with pytest.raises(QuantplanError, match="QP222 algorithm 'gptq' takes calibration"):
        quantize(sequential(), {"default": {"wq": "int4", "algorithm": "gptq"}})
    assert type(model[0]) is nn.Linear
    once = quantize(sequential(), {"default": {"wq": "int4"}})
    with pytest.raises(QuantplanError, match="QP119"):
        quantize(once, {"default": {"wq": "int4"}})


class Toy(nn.Module):
    """A shared layer, an embedding under an unusual name, a tied head and q/k/v."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(50, 64)
        self.attn = nn.ModuleDict({n: nn.Linear(64, 64, bias=False) for n in ("q_proj", "k_proj", "v_proj", "o_proj")})
        self.again = self.attn["o_proj"]
        self.head = nn.Linear(64, 50, bias=False)
        self.head.weight = self.words.weight


def test_types_sharing_and_ties_are_seen() -> None:
    model = Toy()
    with pytest.raises(QuantplanError, match="QP118 'head' is tied to words"):
        quantize(model, {"default": {"wq": "int4"}})
    with pytest.raises(QuantplanError, match="QP118 'words' is tied to head"):
        quantize(model, {"default": {}, "overrides": [{"pattern": "words", "wq": "int4"}]})
    quantize(model, {"default": {"wq": "nvfp4"}, "overrides": [{"pattern": "head", "keep": True}]})
    assert type(model.words) is nn.Embedding and type(model.head) is nn.Linear
    assert model.again is model.attn["o_proj"] and isinstance(model.again, QuantLinear)


def test_nvfp4_siblings_share_their_tensor_scale() -> None:
    model = Toy()
    largest = max(float(model.attn[n].weight.detach().abs().max()) for n in ("q_proj", "k_proj", "v_proj"))
    quantize(model, {"default": {"wq": "nvfp4"}, "overrides": [{"pattern": "head", "keep": True}]})
    scales = {float(model.attn[n].weight_global_scale) for n in ("q_proj", "k_proj", "v_proj")}
    assert len(scales) == 1 and scales.pop() == pytest.approx(448 * 6 / largest)
    assert float(model.attn["o_proj"].weight_global_scale) != float(model.attn["q_proj"].weight_global_scale)


def test_a_loaded_plan_and_a_file_are_plans_too(tmp_path: Any) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text("default: {wq: int8}\n")
    assert isinstance(quantize(sequential(), path)[0], QuantLinear)  # type: ignore[index]
    assert load_plan(path).plan.default.wq == "int8"
