"""Seed 002: `RealQuantize`, `RealQuantizeLinear`, `convert_to_real_quant` and `PTQPipeline` do what the seed says of them."""

from __future__ import annotations

import copy
import io
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from quantplan import PTQPipeline, QuantplanError, RealQuantize, RealQuantizeLinear, convert_to_real_quant
from quantplan.observer import Range
from quantplan.scheme import NonFinite

WAYS = [(bits, symmetric) for bits in (4, 8, 16) for symmetric in (True, False)]
STEPS = {4: 8.0, 8: 127.0, 16: 32767.0}  # about: what the largest magnitude is divided by


def code_of(caught: pytest.ExceptionInfo[QuantplanError]) -> str:
    return caught.value.problems[0].code


def layers(model: nn.Module) -> list[RealQuantizeLinear]:
    return [m for m in model.modules() if isinstance(m, RealQuantizeLinear)]


def mlp() -> nn.Sequential:
    """The seed's model."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 10))


def digits(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Noisy pictures of ten patterns, in [0, 1], and which each is."""
    patterns = torch.rand(10, 784, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 10, (count,), generator=generator)
    noise = torch.rand(count, 784, generator=generator)
    return (0.2 * patterns[labels] + 0.8 * noise).clamp_(0, 1), labels


def batches(x: Tensor, y: Tensor, size: int = 64) -> list[tuple[Tensor, Tensor]]:
    return list(zip(x.split(size), y.split(size), strict=True))


@pytest.fixture(scope="module")
def trained() -> nn.Sequential:
    """The seed's model, trained on a thousand pictures until it knows most of them."""
    model, (x, y) = mlp(), digits(1024, seed=1)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(5):
        for inputs, labels in batches(x, y):
            optimizer.zero_grad()
            functional.cross_entropy(model(inputs), labels).backward()
            optimizer.step()
    return model.eval()


class TestRealQuantize:
    @pytest.mark.parametrize(("bits", "symmetric"), WAYS)
    def test_integers_and_back(self, bits: int, symmetric: bool) -> None:
        quantizer, x = RealQuantize(bits, symmetric), torch.randn(4, 5, 6)
        quantizer.calibrate(x)
        q = quantizer.quantize(x)
        assert q.dtype == (torch.int16 if bits == 16 else torch.int8) and q.shape == x.shape
        assert -(2 ** (bits - 1)) <= int(q.min()) and int(q.max()) <= 2 ** (bits - 1) - 1
        back = quantizer.dequantize(q)
        assert back.dtype == torch.float32
        # half a step: the scale and zero point that were found; a half more where the zero point was rounded
        reach = quantizer.scale.item() * (0.5 if symmetric else 1.0) * (1 + 1e-3)
        assert float((back - x).detach().abs().max()) <= reach
        assert torch.equal(quantizer(x), back) and torch.equal(quantizer.quantize(back), q)

    def test_the_formula_of_symmetric_integers(self) -> None:
        quantizer = RealQuantize(bits=8, symmetric=True)
        quantizer.calibrate(torch.tensor([-2.54, 1.0]))
        assert quantizer.scale.item() == pytest.approx(0.02) and int(quantizer.zero_point) == 0
        assert quantizer.quantize(torch.tensor([-2.54, -0.031, 0.0, 0.029, 9.0, -9.0])).tolist() == [-127, -2, 0, 1, 127, -128]

    def test_the_formula_of_asymmetric_integers(self) -> None:
        quantizer = RealQuantize(bits=8, symmetric=False)
        quantizer.calibrate(torch.tensor([0.0, 2.55]))
        assert quantizer.scale.item() == pytest.approx(0.01) and int(quantizer.zero_point) == -128
        assert quantizer.quantize(torch.tensor([0.0, 0.01, 2.55, 7.0, -1.0])).tolist() == [-128, -127, 127, 127, -128]

    def test_one_sided_values_gain_from_a_zero_point(self) -> None:
        x = torch.rand(1000)
        errors = [float((RealQuantize(8, symmetric)(x) - x).detach().square().mean()) for symmetric in (True, False)]
        assert errors[1] < 0.3 * errors[0]

    @given(bits=st.sampled_from((4, 8, 16)), symmetric=st.booleans(), size=st.floats(1e-4, 1e4), offset=st.floats(-3, 3))
    @settings(max_examples=40, deadline=None)
    def test_zero_is_exact_and_errors_are_at_most_a_step(self, bits: int, symmetric: bool, size: float, offset: float) -> None:
        x = (torch.randn(64, generator=torch.Generator().manual_seed(bits)) + offset) * size
        x[0] = 0
        quantizer = RealQuantize(bits, symmetric)
        back = quantizer(x)
        assert back[0] == 0
        assert float((back - x).detach().abs().max()) <= quantizer.scale.item() * 1.01
        assert quantizer.scale.item() <= 2 * float(x.abs().max()) / STEPS[bits]

    def test_calibration_adds_up(self) -> None:
        parts, whole, x = RealQuantize(), RealQuantize(), torch.randn(3, 100)
        for row in x:
            parts.calibrate(row)
        whole.calibrate(x)
        assert parts.scale == whole.scale
        parts.calibrate(torch.zeros(0))
        assert parts.scale == whole.scale

    def test_the_first_tensor_calibrates(self) -> None:
        quantizer = RealQuantize()
        assert not quantizer.calibrated
        quantizer(torch.tensor([1.27]))
        assert quantizer.calibrated and quantizer.scale.item() == pytest.approx(0.01)
        assert quantizer(torch.tensor([100.0])).item() == pytest.approx(1.27)

    def test_before_values_were_seen_there_is_nothing_to_go_back_to(self) -> None:
        with pytest.raises(QuantplanError) as caught:
            RealQuantize().dequantize(torch.zeros(1, dtype=torch.int8))
        assert code_of(caught) == "QP603"
        assert RealQuantize()(torch.zeros(0, 4)).shape == (0, 4)

    @pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
    def test_values_that_are_not_finite_change_nothing(self, bad: float) -> None:
        quantizer = RealQuantize()
        quantizer.calibrate(torch.ones(3))
        before = quantizer.state_dict()
        with pytest.raises(NonFinite):
            quantizer.calibrate(torch.tensor([1.0, bad]))
        assert all(torch.equal(value, before[name]) for name, value in quantizer.state_dict().items())

    @pytest.mark.parametrize(("bits", "symmetric"), WAYS)
    def test_a_state_dict_goes_into_a_new_one(self, bits: int, symmetric: bool) -> None:
        first, second, x = RealQuantize(bits, symmetric), RealQuantize(bits, symmetric), torch.randn(50) + 1
        first.calibrate(x)
        second.load_state_dict(first.state_dict())
        assert second.calibrated and torch.equal(second.quantize(x), first.quantize(x))

    def test_the_scale_is_learned(self) -> None:
        """From a scale that is half too large, gradients of the rounding error lead back to a smaller error."""
        quantizer, x = RealQuantize(bits=4), torch.randn(500, generator=torch.Generator().manual_seed(0))
        quantizer.calibrate(x)
        quantizer.scale.data *= 1.5
        optimizer, losses = torch.optim.Adam(quantizer.parameters(), lr=0.01), []
        for _ in range(40):
            optimizer.zero_grad()
            loss = (quantizer(x) - x).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < 0.6 * losses[0]

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    def test_other_dtypes_come_back_as_they_were(self, dtype: torch.dtype) -> None:
        x = torch.randn(30).to(dtype)
        assert RealQuantize()(x).dtype == dtype

    @pytest.mark.parametrize("bits", [0, 3, 5, 32])
    def test_other_widths_are_refused(self, bits: int) -> None:
        for make in (RealQuantize, lambda b: RealQuantizeLinear(4, 4, bits=b), lambda b: convert_to_real_quant(mlp(), bits=b)):
            with pytest.raises(QuantplanError) as caught:
                make(bits)
            assert code_of(caught) == "QP105"


class TestRealQuantizeLinear:
    def test_it_is_a_linear_until_it_is_quantized(self) -> None:
        dense = nn.Linear(96, 40)
        layer, x = RealQuantizeLinear.from_linear(dense), torch.randn(5, 96)
        assert layer.weight is dense.weight and layer.bias is dense.bias
        assert torch.equal(layer(x), dense(x)) and set(layer.state_dict()) == {"weight", "bias"}
        layer(x).sum().backward()
        assert dense.weight.grad is not None

    @pytest.mark.parametrize(("bits", "symmetric"), WAYS)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_it_computes_with_the_integers(self, bits: int, symmetric: bool, dtype: torch.dtype) -> None:
        dense = nn.Linear(96, 48, dtype=dtype)
        layer, x = RealQuantizeLinear.from_linear(dense, bits, symmetric), torch.randn(2, 3, 96).to(dtype)
        layer.quantize_weights()
        assert layer.weight.shape == (48, 96) and layer.weight.dtype == dtype
        step = dense.weight.abs().max().item() / STEPS[bits]
        if bits < 16 or dtype is torch.float32:
            assert (
                0
                < float((layer.weight.float() - dense.weight.float()).detach().abs().max())
                <= 1.1 * step + 1e-3 * (dtype != torch.float32)
            )
        seen = x.float()
        if layer.activations() is not None:
            scale = seen.abs().amax(-1, keepdim=True) / 127
            seen = (seen / scale).round().clamp(-128, 127) * scale
        with torch.no_grad():
            y, expected = layer(x), functional.linear(seen, layer.weight.float(), dense.bias.float())
        assert y.dtype == dtype and y.shape == (2, 3, 48)
        close = {"rtol": 1e-4, "atol": 1e-5} if dtype is torch.float32 else {"rtol": 0.02, "atol": 0.02}
        torch.testing.assert_close(y.float(), expected, **close)

    def test_the_integers_are_stored_and_the_floats_given_up(self) -> None:
        stored = {}
        for bits in (4, 8, 16):
            layer = RealQuantizeLinear(256, 256, bias=False, bits=bits)
            layer.quantize_weights()
            assert list(layer.parameters()) == []
            stored[bits] = sum(t.nbytes for t in layer.state_dict().values()) / 256**2
        assert stored[8] == pytest.approx(1, rel=0.02) and stored[16] == pytest.approx(2, rel=0.02)
        assert stored[4] == pytest.approx(0.5 + 2 / 32, rel=0.02)  # groups of 32, scales of two bytes

    def test_it_is_quantized_once(self) -> None:
        layer = RealQuantizeLinear(64, 32)
        layer.quantize_weights()
        before = layer.quantized
        layer.quantize_weights()
        assert layer.quantized is before

    def test_groups_follow_the_columns(self) -> None:
        for columns, group in ((96, 32), (784, 16), (24, 8), (7, None)):
            layer = RealQuantizeLinear(columns, 5, bits=4)
            layer.quantize_weights()
            assert layer.quantized is not None and layer.quantized.wq.group == group
            assert layer(torch.randn(2, columns)).shape == (2, 5)

    def test_inputs_of_layers_with_few_outputs_stay(self) -> None:
        assert RealQuantizeLinear(64, 31).activations() is None
        assert RealQuantizeLinear(64, 32).activations() is not None
        assert RealQuantizeLinear(64, 32, symmetric=False).activations() is None
        assert RealQuantizeLinear(64, 32, bits=4).activations() is None

    def test_a_known_range_of_inputs_is_one_for_all(self) -> None:
        layer = RealQuantizeLinear(64, 32, bias=False)
        layer.quantize_weights(Range(torch.tensor(-1.27), torch.tensor(0.5)))
        x = torch.tensor([[0.004] * 64, [0.006] * 64, [50.0] * 64, [1.27] * 64])
        with torch.no_grad():
            y = layer(x)
        assert float(y[0].abs().max()) == 0  # less than half a step
        torch.testing.assert_close(y[1], layer.weight.sum(1) * 0.01, rtol=1e-4, atol=1e-6)
        assert torch.equal(y[2], y[3])  # what lies outside saturates

    @pytest.mark.parametrize(("bits", "symmetric"), WAYS)
    @pytest.mark.parametrize("static", [False, True])
    def test_a_state_dict_goes_into_a_new_layer_quantized_or_not(self, bits: int, symmetric: bool, static: bool) -> None:
        first, x = RealQuantizeLinear(64, 40, bits=bits, symmetric=symmetric), torch.randn(4, 64)
        rounds = first.activations() is not None
        first.quantize_weights(Range(x.min(), x.max()) if static and rounds else None)
        file = io.BytesIO()
        torch.save(first.state_dict(), file)
        file.seek(0)
        state = torch.load(file)
        fresh, quantized = (RealQuantizeLinear(64, 40, bits=bits, symmetric=symmetric) for _ in range(2))
        quantized.quantize_weights(Range(x.min(), x.max()) if static and rounds else None)
        for layer in (fresh, quantized):
            layer.load_state_dict(state)
            assert torch.equal(layer(x), first(x)) and torch.equal(layer.weight, first.weight)
            assert layer.quantized is not None and first.quantized is not None and layer.quantized.aq == first.quantized.aq
        assert all(torch.equal(a, state[n]) for n, a in first.state_dict().items())

    def test_a_copy_computes_the_same(self) -> None:
        layer, x = RealQuantizeLinear(64, 40), torch.randn(3, 64)
        layer.quantize_weights()
        expected = layer(x)
        assert torch.equal(copy.deepcopy(layer)(x), expected)
        assert layer.half()(x.half()).dtype == torch.float16

    @pytest.mark.parametrize("bad", [torch.nan, torch.inf])
    def test_weights_that_are_not_finite(self, bad: float) -> None:
        layer = RealQuantizeLinear(64, 40)
        layer.weight.data[3, 3] = bad
        with pytest.raises(NonFinite):
            layer.quantize_weights()
        assert layer.quantized is None and "weight" in layer.state_dict()

    def test_without_weights(self) -> None:
        with pytest.raises(QuantplanError) as caught:
            RealQuantizeLinear(4, 4, device="meta").quantize_weights()
        assert code_of(caught) == "QP222"


class TestConvert:
    def test_the_seeds_example(self) -> None:
        model = nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 5))
        quantized_model = convert_to_real_quant(model, bits=8)
        x = torch.randn(7, 10)
        assert torch.equal(quantized_model(x), model(x))
        for module in quantized_model.modules():
            if isinstance(module, RealQuantizeLinear):
                module.quantize_weights()
        assert [type(m) for m in model] == [nn.Linear, nn.ReLU, nn.Linear]
        assert [type(m) for m in quantized_model.children()] == [RealQuantizeLinear, nn.ReLU, RealQuantizeLinear]
        assert all(m.quantized is not None for m in layers(quantized_model))
        y = model(x)
        assert 0 < float((quantized_model(x) - y).detach().abs().max()) < 0.05 * float(y.detach().abs().max())

    def test_nested_shared_and_tied_layers(self) -> None:
        class Model(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.embed = nn.Embedding(20, 32)
                self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(32, 32)), nn.Sequential(nn.Linear(32, 32))])
                self.again = self.blocks[0][0]  # type: ignore[index]
                self.head = nn.Linear(32, 20, bias=False)
                self.head.weight = self.embed.weight
                self.bilinear = nn.Bilinear(3, 3, 3)

        made = convert_to_real_quant(Model(), bits=4)
        assert len(layers(made)) == 2 and made.again is made.blocks[0][0]  # type: ignore[index]
        assert type(made.head) is nn.Linear and made.head.weight is made.embed.weight  # type: ignore[union-attr]

    def test_subclasses_of_linear_stay(self) -> None:
        class Own(nn.Linear):
            pass

        assert type(convert_to_real_quant(nn.Sequential(Own(4, 4)))[0]) is Own  # type: ignore[index]

    def test_a_layer_alone(self) -> None:
        made = convert_to_real_quant(nn.Linear(8, 4).eval(), bits=16, symmetric=False)
        assert isinstance(made, RealQuantizeLinear) and (made.bits, made.symmetric, made.training) == (16, False, False)


class TestPipeline:
    def test_the_seeds_example(self, trained: nn.Sequential) -> None:
        calibration_loader = batches(*digits(640, seed=2))
        before = copy.deepcopy(trained.state_dict())
        pipeline = PTQPipeline(trained, bits=8)
        pipeline.calibrate(calibration_loader, num_batches=10)
        quantized_model = pipeline.convert_to_real_quant()
        original_size, quantized_size = pipeline.get_model_size()
        assert original_size == 4 * sum(p.numel() for p in trained.parameters())
        assert 3.9 < original_size / quantized_size <= 4
        assert [type(m) for m in trained] == [nn.Linear, nn.ReLU, nn.Linear]
        assert all(torch.equal(p, before[n]) for n, p in trained.state_dict().items())
        assert all(m.quantized is not None and not m.training for m in layers(quantized_model))

    @pytest.mark.parametrize(("bits", "symmetric"), WAYS)
    def test_accuracy_stays(self, trained: nn.Sequential, bits: int, symmetric: bool) -> None:
        test_loader = batches(*digits(512, seed=3))
        pipeline = PTQPipeline(trained, bits, symmetric)
        float_accuracy = pipeline.evaluate_accuracy(test_loader)
        right = [float((trained(x).argmax(-1) == y).float().sum()) for x, y in test_loader]
        assert float_accuracy == pytest.approx(sum(right) / 512) and float_accuracy > 0.8
        pipeline.calibrate(batches(*digits(256, seed=2)))
        quantized = pipeline.convert_to_real_quant()
        assert pipeline.evaluate_accuracy(test_loader) > float_accuracy - (0.03 if bits == 4 else 0.01)
        x = test_loader[0][0]
        with torch.no_grad():
            error = float((quantized(x) - trained(x)).norm() / trained(x).norm())
        assert 0 < error < {4: 0.2, 8: 0.02, 16: 1e-3}[bits]

    def test_sizes_fall_with_bits(self, trained: nn.Sequential) -> None:
        ratios = []
        for bits in (16, 8, 4):
            pipeline = PTQPipeline(trained, bits)
            assert len(set(pipeline.get_model_size())) == 1
            pipeline.quantize_weights()
            original, now = pipeline.get_model_size()
            ratios.append(original / now)
        assert ratios[0] == pytest.approx(2, rel=0.02) and ratios[1] == pytest.approx(4, rel=0.02) and 6 < ratios[2] < 8

    def test_step_3_of_the_seeds_workflow(self, trained: nn.Sequential) -> None:
        """A model converted before is quantized itself, as it was converted."""
        real_quant_model = convert_to_real_quant(trained, bits=8)
        pipeline = PTQPipeline(real_quant_model, bits=4)
        pipeline.calibrate(batches(*digits(640, seed=2)))
        assert pipeline.quantize_weights() is real_quant_model is pipeline.convert_to_real_quant()
        other = PTQPipeline(trained, bits=8)
        other.calibrate(batches(*digits(640, seed=2)))
        x = digits(9, seed=5)[0]
        assert torch.equal(real_quant_model(x), other.convert_to_real_quant()(x))
        original, now = pipeline.get_model_size()
        assert 3.9 < original / now <= 4

    def test_ranges_that_serve_all_tokens_become_static(self, trained: nn.Sequential) -> None:
        """Pictures have one range; tokens of very different sizes need their own."""
        pipeline = PTQPipeline(trained)
        pipeline.calibrate(batches(*digits(256, seed=2)))
        first, last = layers(pipeline.convert_to_real_quant())
        assert first.quantized is not None and first.quantized.aq is not None and not first.quantized.aq.dynamic
        assert last.quantized is not None and last.quantized.aq is None
        sizes = torch.logspace(-3, 3, 64)[:, None]
        uneven = PTQPipeline(nn.Sequential(nn.Linear(32, 32)))
        uneven.calibrate([torch.randn(64, 32) * sizes])
        (layer,) = layers(uneven.convert_to_real_quant())
        assert layer.quantized is not None and layer.quantized.aq is not None and layer.quantized.aq.dynamic

    @pytest.mark.parametrize("symmetric", [True, False])
    def test_four_bits_are_spent_where_inputs_are_large(self, symmetric: bool) -> None:
        torch.manual_seed(0)
        model, sizes = nn.Sequential(nn.Linear(256, 64)), torch.logspace(-2, 0, 256)[torch.randperm(256)]
        inputs = torch.randn(3, 200, 256) * sizes
        found = []
        for data in ([], [inputs[0]], [torch.zeros(200, 256)]):
            pipeline = PTQPipeline(model, bits=4, symmetric=symmetric)
            if data:
                pipeline.calibrate(data)
            with torch.no_grad():
                found.append(float((pipeline.convert_to_real_quant()(inputs[1]) - model(inputs[1])).square().mean()))
        plain, calibrated, of_zeros = found
        assert calibrated < 0.75 * plain and of_zeros < 1.5 * plain

    def test_loaders(self, trained: nn.Sequential) -> None:
        class Named(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.inner = trained

            def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
                return self.inner(x)  # type: ignore[no-any-return]

        data = batches(*digits(128, seed=2))
        found = []
        for loader in ([x for x, _ in data], iter(data), [{"x": x, "labels": y} for x, y in data]):
            model = Named()
            model.train()
            pipeline = PTQPipeline(model)
            pipeline.calibrate(loader)
            assert model.training
            found.append(pipeline.convert_to_real_quant().state_dict())
        assert all(torch.equal(a, b[n]) for b in found[1:] for n, a in found[0].items())
        assert PTQPipeline(Named()).evaluate_accuracy([{"x": x, "labels": y} for x, y in data]) > 0.8

    def test_only_so_many_batches_are_taken(self, trained: nn.Sequential) -> None:
        taken = []

        def loader() -> Any:
            for batch in batches(*digits(256, seed=2), size=16):
                taken.append(batch)
                yield batch

        PTQPipeline(trained).calibrate(loader(), num_batches=3)
        assert len(taken) == 3

    def test_a_second_calibration_adds_to_the_first(self, trained: nn.Sequential) -> None:
        data = batches(*digits(256, seed=2))
        once, twice = PTQPipeline(trained), PTQPipeline(trained)
        once.calibrate(data)
        twice.calibrate(data[:2])
        twice.calibrate(data[2:])
        states = [p.convert_to_real_quant().state_dict() for p in (once, twice)]
        assert all(torch.equal(a, states[1][n]) for n, a in states[0].items())

    def test_figures(self, trained: nn.Sequential) -> None:
        pipeline = PTQPipeline(trained)
        figures = pipeline.benchmark_inference(batches(*digits(128, seed=2)), repeats=3)
        assert set(figures) == {"latency_ms", "latency_p10_ms", "latency_p90_ms", "throughput"}
        assert 0 < figures["latency_p10_ms"] <= figures["latency_ms"] <= figures["latency_p90_ms"]
        assert figures["throughput"] > 0

    def test_a_metric_of_ones_own(self, trained: nn.Sequential) -> None:
        data = batches(*digits(100, seed=3))
        found = PTQPipeline(trained).evaluate_accuracy(data, lambda y, wanted: float(len(wanted)))
        assert found == pytest.approx((64 * 64 + 36 * 36) / 100)  # by samples

    def test_no_batches(self, trained: nn.Sequential) -> None:
        pipeline = PTQPipeline(trained)
        for act in (pipeline.calibrate, pipeline.benchmark_inference, pipeline.evaluate_accuracy):
            with pytest.raises(QuantplanError) as caught:
                act([])
            assert code_of(caught) == "QP130"
        with pytest.raises(QuantplanError) as caught:
            pipeline.evaluate_accuracy([torch.zeros(1, 784)])
        assert code_of(caught) == "QP130"

    def test_calibrating_too_late(self, trained: nn.Sequential) -> None:
        pipeline = PTQPipeline(trained)
        pipeline.convert_to_real_quant()
        with pytest.raises(QuantplanError) as caught:
            pipeline.calibrate(batches(*digits(64, seed=2)))
        assert code_of(caught) == "QP105"

    @pytest.mark.parametrize("bits", [4, 8])
    def test_inputs_that_are_not_finite_are_named(self, trained: nn.Sequential, bits: int) -> None:
        with pytest.raises(QuantplanError, match="inputs of '0'") as caught:
            PTQPipeline(trained, bits).calibrate([torch.full((1, 784), torch.nan)])
        assert code_of(caught) == "QP601"
        assert not any(m._forward_pre_hooks for m in trained.modules())

    def test_weights_that_are_not_finite_are_named(self) -> None:
        model = mlp()
        model[2].weight.data[0, 0] = torch.nan
        with pytest.raises(QuantplanError) as caught:
            PTQPipeline(model).quantize_weights()
        assert code_of(caught) == "QP601" and caught.value.problems[0].place.tensor == "2.weight"
        assert [type(m) for m in model] == [nn.Linear, nn.ReLU, nn.Linear]


def test_the_examples_of_the_documentation() -> None:
    """All but the one that needs a language model, one after the other."""
    text = (Path(__file__).parent.parent / "docs/ptq.md").read_text()
    names: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        if "transformers" not in block:
            exec(block, names)
    x = torch.randn(3, 10)
    assert torch.equal(names["fresh"](x), names["real_quant_model"](x))
    assert names["original_size"] / names["quantized_size"] > 3.9
