"""The seeds' workflows in memory: stubs, FakeQuantize, qconfigs, fusion, rules; beside torch.ao where it has the same."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

import quantplan as qp
from quantplan import QuantplanError
from quantplan.scheme import SCHEMES

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import torch.ao.quantization as ao
    from torch.ao.quantization._learnable_fake_quantize import _LearnableFakeQuantize

STATIC = [n for n in SCHEMES.names() if not n.startswith("mx")]


@pytest.fixture(autouse=True)
def reference(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("QUANTPLAN_KERNELS", "none")  # which add up in another order
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


def batches(count: int = 3, width: int = 32) -> list[torch.Tensor]:
    return [torch.randn(8, width) * (i + 1) + 0.3 for i in range(count)]


# --- seed 000


@pytest.mark.parametrize("symmetric", [True, False])
def test_stub_in_calibration_observes_and_passes(symmetric: bool) -> None:
    stub = qp.FP4QuantStub(symmetric=symmetric).train()
    data = batches()
    for x in data:
        assert stub(x) is x
    assert stub.min_val == torch.cat(data).min() and stub.max_val == torch.cat(data).max()
    assert not stub.is_calibrated
    stub.eval()
    assert stub(data[0]) is data[0]  # not calibrated: it passes
    stub.compute_quant_params()
    assert stub.is_calibrated and stub.scale.dtype == torch.float32
    if symmetric:
        torch.testing.assert_close(stub.scale[0], torch.cat(data).abs().max() / 6)
        assert set((stub(data[0]) / stub.scale).abs().unique().round(decimals=3).tolist()) <= {0, 0.5, 1, 1.5, 2, 3, 4, 6}
    else:
        assert stub.zero_point.dtype == torch.int32
        ends = torch.tensor([-6.0, 6.0]).sub(stub.zero_point).mul(stub.scale)
        assert ends[0] <= stub.min_val + 1e-5 and ends[1] >= stub.max_val - 1e-5
    y = stub(data[2])
    assert not torch.equal(y, data[2]) and functional.mse_loss(y, data[2]) < 0.1 * data[2].var()
    stub.enabled = False
    assert stub(data[0]) is data[0]


def test_stub_in_training_rounds_with_what_it_saw_until_it_is_calibrated() -> None:
    stub = qp.FP4QuantStub(qat_mode=True).train()
    first, second, _ = batches()
    running = stub(first)
    other = qp.FP4QuantStub().train()
    other(first)
    other.compute_quant_params()
    assert torch.equal(running, other.eval()(first))
    stub(second)  # the range grows with it
    assert not torch.equal(stub(first), running)
    stub.compute_quant_params()
    held = stub(first)
    stub(first * 100)  # observed, and not used: calibrated
    assert torch.equal(stub(first), held)
    stub.compute_quant_params()
    assert not torch.equal(stub(first), held)


def test_stub_learns_scale_and_zero_point() -> None:
    stub = qp.FP4QuantStub(qat_mode=True, learnable_params=True).train()
    x = batches()[0].requires_grad_()
    assert isinstance(stub.scale, nn.Parameter) and isinstance(stub.zero_point, nn.Parameter)
    assert float(stub.scale) == 1 and float(stub.zero_point) == 0
    stub(x)
    stub.compute_quant_params()  # starts the parameters anew
    started = float(stub.scale)
    assert started != 1
    optimizer = torch.optim.SGD(stub.parameters(), lr=1e-3)
    for _ in range(5):
        optimizer.zero_grad()
        functional.mse_loss(stub(x), x.detach()).backward()
        assert stub.scale.grad is not None and stub.zero_point.grad is not None
        optimizer.step()
    assert float(stub.scale) != started
    # evaluation rounds with what was learned, and training computes the same
    training = stub(x).detach()
    assert torch.equal(stub.eval()(x), training)


def test_ste_round_rounds_and_passes_gradients() -> None:
    x = torch.tensor([0.4, 0.6, 2.5, -1.2], requires_grad=True)
    y = qp.FP4QuantStub._ste_round(x)
    y.sum().backward()
    assert y.tolist() == [0, 1, 2, -1] and x.grad is not None and (x.grad == 1).all()


def test_asymmetric_fp4_by_hand() -> None:
    x = torch.linspace(0, 12, 50)
    y = qp.quantize_to_fp4_asymmetric(x, 1.0, -6)
    grid = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    grid = torch.cat([-grid, grid]).unique() + 6
    expected = grid[(x.unsqueeze(1) - grid).abs().argmin(1)]
    off = (y - expected).abs() > 0
    assert ((x - y).abs()[off] == (x - expected).abs()[off]).all() and y[0] == 0  # but for ties the nearest


@pytest.mark.parametrize("name", SCHEMES.names())
@pytest.mark.parametrize("learnable", [False, True])
def test_stub_of_any_scheme(name: str, learnable: bool) -> None:
    if learnable and (name.startswith("mx") or name == "nvfp4"):
        with pytest.raises(QuantplanError, match="QP105"):
            qp.QuantStub(scheme=name, qat_mode=True, learnable_params=True)
        return
    stub = qp.QuantStub(scheme=name, qat_mode=True, learnable_params=learnable).train()
    x = batches()[0].requires_grad_()
    stub(x)
    stub.compute_quant_params()
    y = stub(x)
    y.sum().backward()
    assert x.grad is not None and (x.grad == 1).any() and not torch.equal(x, y)
    restored = qp.QuantStub(scheme=name, qat_mode=True, learnable_params=learnable)
    restored.load_state_dict(stub.state_dict())
    assert restored.is_calibrated and torch.equal(restored.eval()(x), stub.eval()(x))


def seed_model() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 10)
    )


@pytest.mark.parametrize("scheme", ["fp4", "int8", "nvfp4", {"scheme": "int4", "symmetric": False}])
@pytest.mark.parametrize("learnable", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_seed_000_workflows(scheme: Any, learnable: bool, training: bool) -> None:
    model, loader = seed_model(), [torch.randn(4, 3, 8, 8) for _ in range(3)]
    if scheme == "nvfp4":
        with pytest.raises(QuantplanError, match="QP114"):  # 27 columns, and nothing but groups of 16
            qp.prepare_model_for_ptq(model, scheme)
        return
    if not training:
        prepared = qp.prepare_model_for_ptq(model, scheme)
        assert torch.equal(prepared(loader[0]), model(loader[0]))  # passes until it is converted
        qp.calibrate_model(prepared, loader)
        done = qp.convert_ptq_model_to_eval(prepared)
    else:
        prepared = qp.prepare_model_for_qat(model, scheme, learnable_qat_params=learnable)
        qp.calibrate_model(prepared, loader[:1])
        optimizer = torch.optim.SGD(prepared.parameters(), lr=1e-3)
        prepared.train()
        for x in loader:
            optimizer.zero_grad()
            functional.cross_entropy(prepared(x), torch.tensor([0, 1, 2, 3])).backward()
            optimizer.step()
        done = qp.convert_qat_model_to_eval(prepared)
    assert not done.training
    y = done(loader[0])
    assert not torch.equal(y, model(loader[0])) and torch.isfinite(y).all()
    quantized = qp.convert(done)
    assert isinstance(quantized[0], qp.QuantConv) and isinstance(quantized[5], qp.QuantLinear)
    assert torch.equal(quantized(loader[0]), y)


def test_fp4_layers_are_faces() -> None:
    model = nn.Sequential(qp.FP4QuantStub(), qp.FP4Conv2d(3, 4, 3), nn.Flatten(), qp.FP4QuantStub(), qp.FP4Linear(64, 8))
    x = torch.randn(2, 3, 6, 6)
    assert model[4].weight_fake_quant.scheme.name == "fp4" and model[4].weight_fake_quant.scheme.group == 32
    assert model[1].weight_fake_quant.scheme.strategy == "channel"
    qp.prepare_model_for_ptq(model, inplace=True)
    qp.calibrate_model(model, [x])
    done = qp.convert_ptq_model_to_eval(model)
    assert isinstance(done[0], qp.FP4QuantStub) and done[0].is_calibrated
    assert torch.equal(qp.convert(done)(x), done(x))


# --- seed 003: FakeQuantize and its learnable kin, beside torch.ao

SETTINGS = [
    {"quant_min": 0, "quant_max": 255, "dtype": torch.quint8, "qscheme": torch.per_tensor_affine},
    {"quant_min": -128, "quant_max": 127, "dtype": torch.qint8, "qscheme": torch.per_tensor_symmetric},
    {"quant_min": 0, "quant_max": 255, "dtype": torch.quint8, "qscheme": torch.per_tensor_affine, "reduce_range": True},
    {"quant_min": 0, "quant_max": 255, "dtype": torch.quint8, "qscheme": torch.per_tensor_symmetric},
    {"quant_min": 0, "quant_max": 15, "dtype": torch.quint8, "qscheme": torch.per_tensor_affine},
]


def same(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("observer", ["MinMaxObserver", "MovingAverageMinMaxObserver"])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_fake_quantize_is_torchs(settings: dict[str, Any], observer: str) -> None:
    ours = qp.FakeQuantize(observer=getattr(qp, observer), **settings)
    theirs = ao.FakeQuantize(observer=getattr(ao, observer), **settings)
    for x in batches():
        mine, other = x.clone().requires_grad_(), x.clone().requires_grad_()
        y, expected = ours(mine), theirs(other)
        same(y, expected)
        gradient = torch.randn_like(y)
        y.backward(gradient)
        expected.backward(gradient)
        assert mine.grad is not None and torch.equal(mine.grad, other.grad)
        same(ours.scale, theirs.scale)
        assert torch.equal(ours.zero_point, theirs.zero_point)
    ours.disable_observer()
    before = ours.scale.clone()
    ours(batches()[0] * 100)
    assert torch.equal(ours.scale, before)
    ours.disable_fake_quant()
    assert ours(mine) is mine
    ours.enable_fake_quant()
    assert not torch.equal(ours(mine), mine)


def test_fake_quantize_by_channel_and_by_tensor_is_torchs() -> None:
    x = torch.randn(6, 5, 3)
    for ours, theirs in (
        (qp.default_per_channel_weight_fake_quant(), ao.default_per_channel_weight_fake_quant()),
        (qp.default_weight_fake_quant(), ao.default_weight_fake_quant()),
        (qp.default_fake_quant(), ao.default_fake_quant()),
    ):
        # a symmetric grid's largest magnitude lies on a tie, 127.5 steps, and torch multiplies by the step's inverse
        y, expected = ours(x), theirs(x)
        steps = ((y - expected) / ours.scale.view(-1, *(1,) * 2 if len(ours.scale) > 1 else ())).abs()
        assert (steps < 1.01).all() and (steps > 0.01).sum() <= len(ours.scale)
    dynamic = qp.default_dynamic_fake_quant()
    same(dynamic(x), ao.default_dynamic_fake_quant()(x))
    assert functional.mse_loss(dynamic(100 * x), 100 * x) < 1  # the range of each tensor


def test_levels_that_no_scheme_has_are_refused() -> None:
    with pytest.raises(QuantplanError, match="QP105 no scheme has the 255 levels"):
        qp.FakeQuantize(qp.MinMaxObserver, quant_min=-127, quant_max=127, dtype=torch.qint8)


@pytest.mark.parametrize("scaling", [False, True])
@pytest.mark.parametrize("channels", [-1, 6])
def test_learnable_fake_quantize_is_torchs_in_all_phases(channels: int, scaling: bool) -> None:
    options: dict[str, Any] = {"quant_min": 0, "quant_max": 255, "use_grad_scaling": scaling, "dtype": torch.quint8}
    by_channel = channels > 0
    observer = "PerChannelMinMaxObserver" if by_channel else "MinMaxObserver"
    if by_channel:
        options |= {"channel_len": channels, "ch_axis": 0, "qscheme": torch.per_channel_affine}
    ours = qp.LearnableFakeQuantize(observer=getattr(qp, observer), **options)
    theirs = _LearnableFakeQuantize(observer=getattr(ao, observer), **options)
    x = torch.randn(6, 40) + 0.2
    for phase in ("enable_static_observation", "enable_static_estimate", "enable_param_learning"):
        getattr(ours, phase)()
        getattr(theirs, phase)()
        mine, other = (x * 1.3).requires_grad_(), (x * 1.3).requires_grad_()
        y, expected = ours(mine), theirs(other)
        same(y, expected)
        if not y.requires_grad:
            continue
        gradient = torch.randn_like(y)
        y.backward(gradient)
        expected.backward(gradient)
        if phase == "enable_static_observation":
            assert y is mine
        same(mine.grad, other.grad)
        learning = phase == "enable_param_learning"
        assert (ours.scale.grad is not None) == learning
        if learning:
            same(ours.scale.grad, theirs.scale.grad)
            same(ours.zero_point.grad, theirs.zero_point.grad)


# --- seed 003: workflows


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.quant, self.dequant = qp.QuantStub(), qp.DeQuantStub()
        self.conv, self.bn, self.relu = nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()
        self.deep, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), nn.BatchNorm2d(8)
        self.skip = qp.FloatFunctional()
        self.pool = nn.AvgPool2d(4)
        self.fc = nn.Linear(32, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.relu(self.bn(self.conv(self.quant(x))))
        x = self.skip.add_relu(self.bn2(self.deep(x)), x)
        return self.dequant(self.fc(self.pool(x).flatten(1)))


FUSED = [["conv", "bn", "relu"], ["deep", "bn2"]]


def images(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Bars at four angles in noise."""
    generator = torch.Generator().manual_seed(seed)
    kind = torch.randint(4, (count,), generator=generator)
    x = 0.5 * torch.randn(count, 1, 8, 8, generator=generator)
    for i in range(count):
        at = int(torch.randint(1, 7, (1,), generator=generator))
        line = [(at, slice(None)), (slice(None), at), (range(8), range(8)), (range(8), range(7, -1, -1))][int(kind[i])]
        x[i, 0][line] += 1.5
    return x, kind


def trained(model: nn.Module, steps: int, lr: float) -> nn.Module:
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    x, y = images(512, 1)
    model.train()
    for step in range(steps):
        at = slice(step * 64 % 512, step * 64 % 512 + 64)
        optimizer.zero_grad()
        functional.cross_entropy(model(x[at]), y[at]).backward()
        optimizer.step()
    return model


def accuracy(model: nn.Module) -> float:
    x, y = images(1000, 2)
    with torch.no_grad():
        return float((model(x).argmax(1) == y).float().mean())


def test_a_conv_net_goes_through_fusion_training_and_conversion() -> None:
    model = trained(Small(), 150, 1e-2).eval()
    float_accuracy = accuracy(model)
    assert float_accuracy > 0.9
    model.train()
    model.qconfig = qp.get_default_qat_qconfig("fbgemm")  # type: ignore[assignment]
    fused = qp.fuse_modules_qat(model, FUSED)
    x = images(16, 3)[0]
    with torch.no_grad():
        torch.testing.assert_close(fused(x), copy.deepcopy(model)(x))
    qat = trained(qp.prepare_qat(fused), 30, 1e-3)
    qat.apply(qp.disable_observer)
    qat.apply(qp.freeze_bn_stats)
    stats = qat.conv[0][1].running_mean.clone()
    trained(qat, 20, 1e-3)
    assert torch.equal(qat.conv[0][1].running_mean, stats)
    qat.eval()
    done = qp.convert(qat)
    assert isinstance(done.conv[0], qp.QuantConv) and isinstance(done.fc, qp.QuantLinear)
    assert done.deep.wq.strategy == "channel" and done.deep.wq.bits == 8
    seen: list[torch.Tensor] = []
    done.skip.register_forward_hook(lambda module, args, output: seen.append(output))
    done(x)
    assert len(seen[0].unique()) <= 128  # the sum is on one grid, of 7 bits
    with torch.no_grad():
        assert torch.equal(done(x), qat(x))
    assert accuracy(done) >= float_accuracy - 0.01


def test_folding_in_evaluation_keeps_the_function() -> None:
    model = trained(Small(), 3, 1e-2).eval()
    fused = qp.fuse_modules(model, FUSED)
    assert isinstance(fused.bn, nn.Identity) and isinstance(fused.relu, nn.Identity) and isinstance(fused.deep, nn.Conv2d)
    x = images(4, 3)[0]
    torch.testing.assert_close(fused(x), model(x), rtol=1e-4, atol=1e-5)
    linear = nn.Sequential(nn.Linear(6, 5, bias=False), nn.BatchNorm1d(5), nn.ReLU()).train()
    linear(torch.randn(20, 6) * 3 + 1)
    linear.eval()
    x = torch.randn(3, 6)
    torch.testing.assert_close(qp.fuse_modules(linear, ["0", "1", "2"])(x), linear(x))
    for names in (["conv", "relu"], ["fc", "quant"], ["missing", "bn"]):
        if names == ["conv", "relu"]:
            qp.fuse_modules(model, [names])
            continue
        with pytest.raises(QuantplanError, match="QP105"):
            qp.fuse_modules(model, [names])
    with pytest.raises(QuantplanError, match="QP105 fuse_modules_qat takes a model in training"):
        qp.fuse_modules_qat(model, FUSED)


@pytest.mark.parametrize("backend", ["fbgemm", "qnnpack", "onednn", "x86"])
def test_static_quantization_by_qconfig(backend: str) -> None:
    model = trained(Small(), 100, 1e-2).eval()
    model.qconfig = qp.get_default_qconfig(backend)  # type: ignore[assignment]
    fused = qp.fuse_modules(model, FUSED)
    loader = [images(64, seed)[0] for seed in (5, 6)]
    prepared = qp.prepare(fused)
    with torch.no_grad():
        for batch in loader:
            assert torch.equal(prepared(batch), fused(batch))  # observes only
    done = qp.convert(prepared)
    assert isinstance(done.conv[0], qp.QuantConv)
    assert done.fc.wq.strategy == ("tensor" if backend == "qnnpack" else "channel")
    assert done.fc.aq.bits == (8 if backend in ("onednn", "qnnpack") else 7)
    assert accuracy(done) > accuracy(model) - 0.02

    def run(prepared: nn.Module, loader: list[torch.Tensor]) -> None:
        for batch in loader:
            prepared(batch)

    with torch.no_grad():
        at_once = qp.quantize(fused, run, (loader,))
        assert torch.equal(at_once(loader[0]), done(loader[0]))
    with pytest.raises(QuantplanError, match="QP603"):
        qp.convert(qp.prepare(fused))
    with pytest.raises(QuantplanError, match="QP105 no layer has a qconfig"):
        qp.prepare(nn.Linear(3, 3))


def test_static_linear_is_torchs_quantized_linear() -> None:
    """The same scales and zero points, and so the same codes; outputs stay float here and are rounded there."""
    model = nn.Sequential(nn.Linear(32, 8)).eval()
    data = batches()
    ours, theirs = copy.deepcopy(model), nn.Sequential(ao.QuantStub(), copy.deepcopy(model[0]), ao.DeQuantStub()).eval()
    ours.qconfig = qp.get_default_qconfig("fbgemm")  # type: ignore[assignment]
    theirs.qconfig = ao.get_default_qconfig("fbgemm")  # type: ignore[assignment]
    ours, theirs = qp.prepare(ours), ao.prepare(theirs)
    for x in data:
        ours(x)
        theirs(x)
    ours, theirs = qp.convert(ours), ao.convert(theirs)
    weight = theirs[1].weight()
    off = (ours[0].quantized().codes.int() - 128 - weight.int_repr().int()).abs()
    assert off.max() <= 1 and off.sum() <= 8  # ties at the ends of a row, see above
    same(ours[0].weight_scale[:, 0].double(), weight.q_per_channel_scales())
    same(ours[0].input_scale[0], theirs[0].scale[0])
    assert int(ours[0].input_zero_point) == int(theirs[0].zero_point)


def test_own_qconfigs_go_before_those_above() -> None:
    model = nn.ModuleDict({"attention": nn.Sequential(nn.Linear(8, 8)), "mlp": nn.Linear(8, 8), "head": nn.Linear(8, 8)})
    model.qconfig = qp.default_qconfig  # type: ignore[assignment]
    model["attention"].qconfig = qp.QConfig(  # type: ignore[assignment]
        activation=qp.HistogramObserver.with_args(dtype=torch.quint8, bins=2048), weight=qp.default_per_channel_weight_observer
    )
    model["head"].qconfig = None  # type: ignore[assignment]
    prepared = qp.prepare(model)
    assert isinstance(prepared["attention"][0].input_fake_quant.activation_post_process, qp.HistogramObserver)
    assert isinstance(prepared["mlp"].input_fake_quant.activation_post_process, qp.MinMaxObserver)
    assert type(prepared["head"]) is nn.Linear


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(16, 12, num_layers=2, bidirectional=True, batch_first=True)
        self.gru = nn.GRU(24, 8, batch_first=True)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.gru(self.lstm(x)[0])[0])


@pytest.mark.parametrize("dtype", [torch.qint8, torch.float16])
def test_dynamic_quantization(dtype: torch.dtype) -> None:
    model = Recurrent().eval()
    done = qp.quantize_dynamic(model, qconfig_spec={nn.Linear, nn.LSTM}, dtype=dtype)
    x = torch.randn(3, 5, 16)
    assert type(done.gru) is nn.GRU and type(model.fc) is nn.Linear
    assert functional.mse_loss(done(x), model(x)) < 1e-4
    if dtype == torch.qint8:
        assert isinstance(done.lstm, qp.QuantRecurrent) and isinstance(done.fc, qp.QuantLinear)
        theirs = ao.quantize_dynamic(nn.Sequential(model.fc), {nn.Linear}, dtype)[0]
        x = torch.randn(3, 8)
        torch.testing.assert_close(done.fc(x), theirs(x), rtol=0.02, atol=0.02)
        assert not torch.equal(done.fc(x), model.fc(x))
        copied = copy.deepcopy(done)
        copied.load_state_dict(done.state_dict())
        assert torch.equal(copied(torch.ones(1, 2, 16)), done(torch.ones(1, 2, 16)))
    with pytest.raises(QuantplanError, match="QP105"):
        qp.quantize_dynamic(model, dtype=torch.int16)


def test_fake_quantization_in_two_lines() -> None:
    model = nn.Sequential(nn.Linear(20, 6), nn.ReLU(), nn.Linear(6, 3))
    fake = qp.apply_fake_quant_to_model(model, bits=4)
    assert isinstance(fake[0], qp.FakeQuantizeLinear) and fake[2].weight_fake_quant.scheme.name == "int4"
    integers, scale = qp.symmetric_quantize(model[0].weight.detach(), bits=8)
    assert integers.dtype == torch.int8 and integers.shape == (6, 20)
    assert ((integers * scale) - model[0].weight.detach()).abs().max() <= scale / 2 * 1.001


# --- seed 004


class Dense(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear1, self.linear2 = nn.Linear(32, 16), nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear2(torch.relu(self.linear1(x)))


def test_rules_with_static_ranges() -> None:
    rules = [qp.QuantizationRule(weight_qtype="int8", act_qtype="int8", act_static_scale=True)]
    model = Dense()
    qat = qp.quantize_model(model, qp.QatProvider(rules), torch.zeros(1, 32))
    stats = qp.quant_stats(qat)
    assert stats.keys() == {"linear1", "linear2"}
    assert all(s.keys() == {"count", "sum_of_absmax"} and s["count"] == 0 and s["sum_of_absmax"] == 0 for s in stats.values())
    # weights stay float, checkpoints go both ways
    assert qat.state_dict().keys() == model.state_dict().keys()
    qat.load_state_dict(model.state_dict())
    with pytest.raises(QuantplanError, match="QP603"):
        qat.eval()(torch.zeros(1, 32))
    data = batches()
    qp.calibrate_model(qat, data)  # standalone: forward passes, and nothing is trained
    stats = qp.quant_stats(qat)
    assert stats["linear1"]["count"] == 3
    torch.testing.assert_close(float(stats["linear1"]["sum_of_absmax"]), float(sum(x.abs().max() for x in data)))
    y = qat(data[0])
    assert qp.quant_stats(qat)["linear1"]["count"] == 3  # evaluation changes nothing
    done = qp.convert(qat)
    torch.testing.assert_close(
        float(done.linear1.input_scale), float(stats["linear1"]["sum_of_absmax"]) / 3 / 127, rtol=0.01, atol=0
    )
    assert torch.equal(done(data[0]), y)
    other = qp.load_quant_stats(qp.quantize_model(model, qp.QatProvider(rules)), stats).eval()
    assert torch.equal(other(data[0]), y)
    with pytest.raises(QuantplanError, match="QP105"):
        qp.load_quant_stats(other, {"linear9": {}})


def test_static_range_gradients_are_those_of_a_fixed_range() -> None:
    """By differences: inside the range the mean gradient over a step is 1, outside nothing moves."""
    rules = [qp.QuantizationRule(weight_qtype="int8", act_qtype="int8", act_static_scale=True)]
    qat = qp.calibrate_model(qp.quantize_model(Dense(), qp.QatProvider(rules)), batches()).eval()
    quantizer = qat.linear1.input_fake_quant
    scale = float(quantizer.found()["scale"])
    x = torch.linspace(-200 * scale, 200 * scale, 32 * 8).reshape(8, 32).requires_grad_()
    quantizer(x).sum().backward()
    with torch.no_grad():
        wide = 64 * scale
        slope = (quantizer(x + wide) - quantizer(x - wide)) / (2 * wide)
    inside, outside = (x.abs() + wide < 127 * scale), (x.abs() - wide > 128 * scale)
    assert x.grad is not None and inside.any() and outside.any()
    torch.testing.assert_close(x.grad[inside], slope[inside], rtol=0.02, atol=0.02)
    assert torch.equal(x.grad[outside], slope[outside]) and (x.grad[outside] == 0).all()


def test_of_rules_the_first_that_matches_counts() -> None:
    rules = [
        qp.QuantizationRule(module_path="linear2", weight_qtype=None),
        qp.QuantizationRule(module_path=".*", weight_qtype="int4", act_qtype="float8_e4m3fn", tile_size=16),
    ]
    done = qp.quantize_model(Dense(), qp.PtqProvider(rules))
    assert isinstance(done.linear1, qp.QuantLinear) and type(done.linear2) is nn.Linear
    assert done.linear1.wq.group == 16 and done.linear1.aq.name == "fp8" and done.linear1.aq.dynamic
    with pytest.raises(QuantplanError, match="QP107"):
        qp.QuantizationRule(weight_qtype="int9").override()


# --- plans in memory beyond linear layers


@pytest.mark.parametrize(
    "wq",
    [
        "int8",
        "fp8",
        {"scheme": "int4", "granularity": "channel", "symmetric": False},
        {"scheme": "nf4", "granularity": "channel"},
    ],
)
def test_plans_on_convolutions_and_embeddings(wq: Any) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(20, 16)
            self.conv = nn.Conv1d(16, 12, 3, padding=1, padding_mode="circular")
            self.deep = nn.Conv1d(12, 12, 3, groups=12, padding="same")
            self.fc = nn.Linear(12, 5)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.fc(self.deep(self.conv(self.words(ids).transpose(1, 2))).mean(-1))

    if isinstance(wq, dict) and wq["scheme"] == "nf4" and "channel" not in SCHEMES.get("nf4").granularities:
        return
    plan = {"default": {"wq": wq}, "overrides": [{"pattern": ["words", "conv", "deep"], "keep": False, "aq": None}]}
    model, ids = Net(), torch.randint(20, (3, 7))
    assert type(qp.quantize(copy.deepcopy(model), {"default": {"wq": wq}}).conv) is nn.Conv1d  # kept unless named
    qat = qp.prepare_qat(model, plan)
    assert qat.state_dict().keys() == model.state_dict().keys()
    optimizer = torch.optim.SGD(qat.parameters(), lr=0.1)
    functional.cross_entropy(qat(ids), torch.tensor([0, 1, 2])).backward()
    optimizer.step()
    done = qp.convert(qat)
    assert isinstance(done.words, qp.QuantEmbedding) and isinstance(done.deep, qp.QuantConv)
    assert torch.equal(done(ids), qat(ids))
    restored = model
    restored.load_state_dict(qat.state_dict())
    applied = qp.quantize(restored, plan)
    assert torch.equal(applied(ids), done(ids))
    assert torch.equal(done.words(ids), functional.embedding(ids, done.words.weight))


@pytest.mark.parametrize("wq", ["int4", "nvfp4", "fp4", "mxfp4", {"scheme": "int4", "symmetric": False}, "nf4"])
def test_plans_with_learned_steps(wq: Any) -> None:
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 4))
    plan = {
        "default": {"wq": wq, "aq": {"scheme": "int8", "dynamic": False, "observer": "minmax"}},
        "overrides": [{"pattern": "2", "wq": "int8"}, {"pattern": "4", "aq": None}],
    }
    qat = qp.prepare_qat(model, plan, learnable=True)
    qp.learn_inputs(qp.calibrate_model(qat, batches(width=64)))
    assert qat[0].weight_fake_quant.step is not None and qat[2].input_fake_quant.step is not None
    optimizer = torch.optim.Adam(qat.parameters(), lr=1e-3)
    before = qat[0].weight_fake_quant.step.detach().clone()
    qat.train()
    for x in batches(width=64):
        optimizer.zero_grad()
        functional.cross_entropy(qat(x), torch.randint(4, (8,))).backward()
        optimizer.step()
    assert not torch.equal(before, qat[0].weight_fake_quant.step)
    qat.eval()
    x = batches(width=64)[0]
    assert torch.equal(qp.convert(qat)(x), qat(x))


def test_custom_modules_and_lists_of_prepare() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(x)

    class Observed(Own):
        @classmethod
        def from_float(cls, own: Own) -> Observed:
            made = cls()
            made.fc = own.fc
            return made

    class Done(Own):
        @classmethod
        def from_observed(cls, observed: Observed) -> Done:
            return cls()

    model = nn.Sequential(nn.Linear(4, 4), Own(), nn.Sequential(nn.ReLU()))
    model.qconfig = qp.default_qconfig  # type: ignore[assignment]
    own = {"float_to_observed_custom_module_class": {Own: Observed}}
    prepared = qp.prepare(model, observer_non_leaf_module_list=[Observed], prepare_custom_config_dict=own)
    prepared(torch.randn(3, 4))
    assert (
        type(prepared[1]) is Observed
        and prepared[1].activation_post_process.max_val > prepared[1].activation_post_process.min_val
    )
    done = qp.convert(prepared, convert_custom_config_dict={"observed_to_quantized_custom_module_class": {Observed: Done}})
    assert type(done[1]) is Done and isinstance(done[0], qp.QuantLinear)
    both = nn.Sequential(nn.Conv1d(4, 4, 1), nn.Linear(4, 4))
    both.qconfig = qp.default_qconfig  # type: ignore[assignment]
    some = qp.prepare(both, allow_list={nn.Conv1d})
    assert isinstance(some[0], qp.FakeQuantizedConv1d) and type(some[1]) is nn.Linear


# --- seed 003: debugging


def test_models_side_by_side_layer_by_layer() -> None:
    model = trained(Small(), 5, 1e-2).eval()
    quantized = qp.quantize(
        copy.deepcopy(model), {"default": {"wq": "int4", "aq": None}, "overrides": [{"pattern": "conv", "wq": "int8"}]}
    )
    x = images(8, 4)[0]
    found = qp.compare_quantized_float(model, quantized, x)
    with torch.no_grad():
        expected = (model.conv(x) - quantized.conv(x)).abs()
    assert found["conv"]["max"] == pytest.approx(float(expected.max())) and found["conv"]["mean"] == pytest.approx(
        float(expected.mean())
    )
    assert found["conv"]["relative"] == pytest.approx(float((expected / (model.conv(x).abs() + 1e-8)).mean()), rel=1e-4)
    assert found["quant"]["max"] == 0 < found["fc"]["max"]
    assert qp.compare_layers(model, quantized, x)["fc"].snr > 10
    assert not any(m._forward_hooks for m in (*model.modules(), *quantized.modules()))


def test_outliers_are_found() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Identity(), nn.Linear(64, 64))
    with torch.no_grad():
        model[0].weight[3] *= 100
    names = {name for name, *_ in qp.check_activation_outliers(model, [torch.randn(16, 64)])}
    assert {"0", "1"} <= names
    calm = qp.check_activation_outliers(nn.Sequential(nn.Identity()), [torch.rand(16, 64)])
    assert calm == []


def test_steps_and_their_plot(tmp_path: Any) -> None:
    pytest.importorskip("matplotlib")
    model = nn.Sequential(nn.Linear(32, 8), nn.ReLU(), nn.Linear(8, 4))
    model.qconfig = qp.default_qconfig  # type: ignore[assignment]
    prepared = qp.prepare(model)
    prepared(batches()[0])
    before = {(s.name, s.kind): s for s in qp.quantization_steps(prepared)}
    done = qp.convert(prepared)
    after = {(s.name, s.kind): s for s in qp.quantization_steps(done)}
    assert before == after and after.keys() == {("0", "weight"), ("0", "input"), ("2", "weight"), ("2", "input")}
    figure = qp.plot_quantization_stats(done, tmp_path / "steps.png")
    assert (tmp_path / "steps.png").stat().st_size > 1000 and len(figure.axes[0].patches) == 4


# --- the graph route


class Functional(nn.Module):
    """No module is called: only functions."""

    def __init__(self) -> None:
        super().__init__()
        self.w1, self.b1 = nn.Parameter(torch.randn(8, 1, 3, 3) / 3), nn.Parameter(torch.randn(8) / 9)
        self.norm = nn.BatchNorm2d(8)
        self.block = nn.Module()
        self.block.fc = nn.Linear(32, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm(functional.conv2d(x, self.w1, self.b1, padding=1)))
        x = functional.avg_pool2d(x, 4).flatten(1)
        return functional.linear(x, self.block.fc.weight, self.block.fc.bias)


def test_the_graph_route_finds_layers_that_are_calls() -> None:
    model = trained(Functional(), 100, 1e-2).eval()
    x, _ = images(32, 5)
    captured = qp.capture(model, (x[:2],))
    names = {n: type(m) for n, m in captured.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    assert names == {"w1_layer": nn.Conv2d, "block.fc": nn.Linear} or names == {"w1": nn.Conv2d, "block.fc": nn.Linear}
    assert not any(n.target is torch.ops.aten.batch_norm.default for n in captured.graph.nodes)
    torch.testing.assert_close(captured(x), model(x), rtol=1e-4, atol=1e-4)
    prepared = qp.prepare_fx(model, qp.get_default_qconfig_mapping("fbgemm"), (x[:2],))
    with torch.no_grad():
        prepared(x)
    done = qp.convert_fx(prepared)
    assert isinstance(done.block.fc, qp.QuantLinear)
    assert accuracy(done) > accuracy(model) - 0.02
    by_plan = qp.quantize(captured, {"default": {"wq": "int8"}})
    assert isinstance(by_plan.block.fc, qp.QuantLinear)
    torch.testing.assert_close(by_plan(x), model(x), rtol=0.1, atol=0.1)
    only = qp.prepare_fx(model, {"block": qp.default_qconfig}, (x[:2],))
    assert sum(isinstance(m, qp.FakeQuantizer) for m in only.modules()) == 2


def test_a_graph_trains() -> None:
    model = trained(Functional(), 60, 1e-2).eval()
    x, y = images(64, 5)
    qat = qp.prepare_qat_fx(model, qp.get_default_qat_qconfig_mapping("fbgemm"), (x[:2],))
    optimizer = torch.optim.Adam(qat.parameters(), lr=1e-3)
    start = float(functional.cross_entropy(qat(x), y))
    for _ in range(20):
        optimizer.zero_grad()
        functional.cross_entropy(qat(x), y).backward()
        optimizer.step()
    assert float(functional.cross_entropy(qat(x), y)) < start
    qat.apply(qp.disable_observer)
    done = qp.convert(qat)
    with torch.no_grad():
        assert torch.equal(done(x), qat(x))


def test_what_cannot_be_captured_is_said() -> None:
    class Branch(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(QuantplanError, match=r"QP222 torch\.export cannot capture"):
        qp.capture(Branch(), (torch.randn(2, 3),))
