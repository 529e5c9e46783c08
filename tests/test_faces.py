"""Seed 001's words: its snippets run with the imports changed, and mean what they say."""

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

import quantplan
from quantplan import (
    FP4Config,
    FP4Quantizer,
    FP8Config,
    FP8Quantizer,
    INT2Config,
    INT2Quantizer,
    INT4Config,
    INT4Quantizer,
    INT6Config,
    INT6Quantizer,
    INT8Config,
    INT8Quantizer,
    QuantplanError,
    create_quantizer_from_scheme,
)
from quantplan.scheme import SCHEMES

ALL = {
    "INT2": (INT2Quantizer, INT2Config),
    "INT4": (INT4Quantizer, INT4Config),
    "INT6": (INT6Quantizer, INT6Config),
    "INT8": (INT8Quantizer, INT8Config),
    "FP4": (FP4Quantizer, FP4Config),
    "FP8": (FP8Quantizer, FP8Config),
}


@pytest.fixture
def weights() -> Tensor:
    return torch.randn(64, 128, generator=torch.Generator().manual_seed(0)) * 0.05


@pytest.fixture
def activations() -> Tensor:
    return torch.randn(2, 7, 128, generator=torch.Generator().manual_seed(1))


def error(quantized: Tensor, x: Tensor) -> float:
    return ((quantized.float() - x).norm() / x.norm()).item()


def test_basic_usage(weights: Tensor, activations: Tensor) -> None:
    # Create INT8 quantizer
    int8_config = INT8Config(symmetric=True)
    int8_quantizer = INT8Quantizer(int8_config)

    # Quantize weights
    quantized_weights = int8_quantizer.quantize_weight(weights)

    # Quantize activations
    quantized_activations = int8_quantizer.quantize_activation(activations)

    for quantized, x in ((quantized_weights, weights), (quantized_activations, activations)):
        assert quantized.shape == x.shape and quantized.dtype == x.dtype
        assert 0 < error(quantized, x) < 0.012
        scale = x.abs().amax(-1, keepdim=True) / 127
        steps = quantized / scale.bfloat16().float()
        torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-4)
        assert steps.abs().max() <= 128


def test_using_with_quantization_plans(weights: Tensor, activations: Tensor) -> None:
    # Create quantizers through registry
    (WQ, WCfg), (AQ, ACfg) = create_quantizer_from_scheme({"wq": "int8", "aq": "fp8"}, "bfloat16")

    # Create instances
    w_quantizer = WQ(WCfg())
    a_quantizer = AQ(ACfg())

    assert WQ is INT8Quantizer and AQ is FP8Quantizer
    assert isinstance(w_quantizer.config, INT8Config) and isinstance(a_quantizer.config, FP8Config)
    quantized = w_quantizer.quantize_weight(weights)
    assert quantized.dtype == torch.bfloat16
    assert torch.equal(quantized, INT8Quantizer(INT8Config()).quantize_weight(weights).bfloat16())
    assert a_quantizer.quantize_activation(activations).dtype == torch.bfloat16
    assert error(a_quantizer.quantize_activation(activations), activations) < 0.03


def test_integer_options(weights: Tensor) -> None:
    config = INT8Config(
        symmetric=True,  # Use symmetric quantization (default: True)
        group_size=32,  # Group size for quantization
        dtype="bfloat16",  # Compute dtype after dequantization
    )
    assert config == INT8Config(group_size=32, dtype="bfloat16")
    assert config.group == 32 and config.grid(64, 128) == (64, 4)
    assert INT8Quantizer(config).quantize_weight(weights).dtype == torch.bfloat16
    assert INT8Quantizer(INT8Config()).quantize_weight(weights.half()).dtype == torch.float16


def test_floating_point_options(weights: Tensor) -> None:
    # FP4 configuration
    fp4_config = FP4Config(
        format="e2m1",  # FP4 format (only e2m1 supported)
        group_size=32,
        dtype="bfloat16",
    )

    # FP8 configuration
    fp8_config = FP8Config(
        format="e4m3",  # FP8 format: "e4m3" or "e5m2"
        group_size=32,
        dtype="bfloat16",
    )

    fp4, fp8 = FP4Quantizer(fp4_config).quantize_weight(weights), FP8Quantizer(fp8_config).quantize_weight(weights)
    wide = FP8Quantizer(FP8Config(format="e5m2", group_size=32)).quantize_weight(weights)
    assert fp4.dtype == fp8.dtype == torch.bfloat16
    assert error(fp8, weights) < error(wide, weights) < error(fp4, weights) < 0.12
    scale = weights.view(64, 4, 32).abs().amax(-1, keepdim=True).div(6).bfloat16().float()
    codes = FP4Quantizer(FP4Config(group_size=32)).quantize_weight(weights).view(64, 4, 32) / scale
    levels = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    assert (codes.abs()[..., None] - levels).abs().amin(-1).max() < 1e-5
    with pytest.raises(ValueError, match="format"):
        FP4Config(format="e3m0")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ALL)
def test_each_quantizer_keeps_shapes_and_its_range(name: str, weights: Tensor, activations: Tensor) -> None:
    quantizer, config = ALL[name]
    made = quantizer(config())
    assert made.quantize_weight(weights).shape == weights.shape
    assert made.quantize_activation(activations).shape == activations.shape
    convolution = torch.randn(8, 16, 4, 4, generator=torch.Generator().manual_seed(2))
    flat = made.quantize_weight(convolution.view(8, 256))
    assert torch.equal(made.quantize_weight(convolution), flat.view(8, 16, 4, 4))
    q = made.quantize(weights)
    assert int(q.codes.max()) < 2**made.config.bits
    # one token does not change another's numbers: ranges are each token's own
    alone = made.quantize_activation(activations[:1, 3:4])
    assert torch.equal(made.quantize_activation(activations)[:1, 3:4], alone)


@pytest.mark.parametrize(("name", "low", "high"), [("INT8", -128, 127), ("INT6", -32, 31), ("INT4", -8, 7), ("INT2", -2, 1)])
def test_the_ranges_the_seed_gives(name: str, low: int, high: int) -> None:
    """Symmetric [-2^(n-1), 2^(n-1)-1], asymmetric [0, 2^n-1]: the bounds hold for values `fit` never saw."""
    quantizer, config = ALL[name]
    for options, first, last in (({}, low, high), ({"symmetric": False}, 0, high - low)):
        made = quantizer(config(granularity="channel", **options))
        params = made.fit(torch.linspace(-1, 1, 8)[None, None])
        codes = made.encode(torch.tensor([[[-1e9, 1e9]]]), params).int().flatten()
        offset = -low if not options else 0
        assert (codes - offset).tolist() == [first, last]


def test_stochastic_rounding_for_training(weights: Tensor) -> None:
    """The seed promises it for all quantizers; the mean of many draws is the weight."""
    for quantizer, config in ALL.values():
        made = quantizer(config(rounding="stochastic", seed=1))
        mean = torch.stack([made.quantize_weight(weights) for _ in range(32)]).mean(0)
        nearest = quantizer(config()).quantize_weight(weights)
        inside = mean.abs() < 0.6 * weights.abs().amax()  # what saturates is not unbiased
        assert error(mean[inside], weights[inside]) < 0.45 * error(nearest[inside], weights[inside])
        again = quantizer(config(rounding="stochastic", seed=1)).quantize_weight(weights)
        assert torch.equal(again, quantizer(config(rounding="stochastic", seed=1)).quantize_weight(weights))
        assert not torch.equal(again, quantizer(config(rounding="stochastic", seed=2)).quantize_weight(weights))


class TestCreateQuantizerFromScheme:
    @pytest.mark.parametrize(
        ("rule", "w", "a"),
        [
            ({"wq": "int8", "aq": "int8", "group_size": 32}, (INT8Quantizer, INT8Config), (INT8Quantizer, INT8Config)),
            ({"wq": "fp8", "aq": "fp8", "group_size": 64}, (FP8Quantizer, FP8Config), (FP8Quantizer, FP8Config)),
            ({"wq": "int4", "aq": "int8"}, (INT4Quantizer, INT4Config), (INT8Quantizer, INT8Config)),
        ],
    )
    def test_the_rules_of_the_seeds_plan(self, rule: dict[str, Any], w: Any, a: Any) -> None:
        (weight, weight_config), (activation, activation_config) = create_quantizer_from_scheme(rule)
        assert (weight, activation) == (w[0], a[0])
        assert isinstance(weight_config(), w[1]) and isinstance(activation_config(), a[1])
        assert weight_config().group_size == rule.get("group_size")
        assert activation_config().group_size is None

    def test_every_scheme_of_the_registry_can_be_made(self, weights: Tensor) -> None:
        for name in SCHEMES.names():
            (quantizer, config), (nothing, none) = create_quantizer_from_scheme({"wq": name}, "float16")
            assert quantizer is not None and config is not None and nothing is none is None
            dense = quantizer(config()).quantize_weight(weights)
            assert dense.dtype == torch.float16
            assert torch.equal(dense, SCHEMES.get(name)().quantizer().fake_quantize(weights).half())

    def test_null_leaves_it_out(self) -> None:
        assert create_quantizer_from_scheme({"wq": None, "aq": None}) == ((None, None), (None, None))
        assert create_quantizer_from_scheme({}) == ((None, None), (None, None))

    def test_options_beside_the_scheme(self) -> None:
        rule = {"wq": {"scheme": "int4", "symmetric": False, "granularity": "channel"}, "aq": {"scheme": "fp8"}}
        (_, config), _ = create_quantizer_from_scheme(rule)
        assert config is not None
        made = config()
        assert isinstance(made, INT4Config) and (made.symmetric, made.strategy) == (False, "channel")
        assert rule["wq"] == {"scheme": "int4", "symmetric": False, "granularity": "channel"}
        assert config(symmetric=True).symmetric  # type: ignore[attr-defined]

    @pytest.mark.parametrize(
        ("rule", "code", "says"),
        [
            ({"wq": "int8", "bits": 4}, "QP104", "unknown key 'bits'"),
            ({"wq": "int88"}, "QP107", "unknown scheme 'int88'"),
            ({"wq": "int8", "aq": "floaty"}, "QP107", "unknown scheme 'floaty'"),
        ],
    )
    def test_mistakes_are_named(self, rule: dict[str, Any], code: str, says: str) -> None:
        with pytest.raises(QuantplanError) as caught:
            create_quantizer_from_scheme(rule)
        (problem,) = caught.value.problems
        assert (problem.code, problem.message) == (code, says) and problem.help

    @pytest.mark.parametrize(
        ("rule", "says"),
        [
            ({"wq": {"scheme": "int8", "colour": 1}}, "QP104 scheme 'int8' has no option 'colour'"),
            ({"wq": "nvfp4", "group_size": 32}, "QP105 group_size: nvfp4 has groups of 16, always"),
        ],
    )
    def test_options_a_scheme_does_not_take_are_refused_at_once(self, rule: dict[str, Any], says: str) -> None:
        with pytest.raises(QuantplanError, match=says):
            create_quantizer_from_scheme(rule)


def test_the_seeds_names_are_public_and_cost_nothing_until_used() -> None:
    for name in ALL:
        assert {f"{name}Quantizer", f"{name}Config"} <= set(quantplan.__all__)
    code = "import sys, quantplan; assert 'torch' not in sys.modules; quantplan.INT8Config(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
