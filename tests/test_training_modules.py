"""Fake quantization and the layers of training: forward as the quantized model, gradients as torch's and by differences."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers
import zoo
from test_nn import VARIANTS, named, scheme
from torch import nn
from torch.nn import functional

from quantplan import FakeQuantizedLinear, QuantLinear, QuantplanError, apply, convert, fake_quantize, prepare_qat, quantize
from quantplan.nn.fake_quantize import fake_quantize_static
from quantplan.observer import OBSERVERS
from quantplan.scheme import SCHEMES

ACTIVATIONS: list[dict[str, Any] | None] = [
    None,
    {"scheme": "int8"},
    {"scheme": "fp8", "dynamic": False},
    {"scheme": "int8", "symmetric": False, "dynamic": False, "observer": "static_range"},
    {"scheme": "nvfp4", "dynamic": False},
    {"scheme": "mxfp8"},
]


@pytest.fixture(autouse=True)
def reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """Quantized layers compute with the dequantized weight: kernels add up in another order."""
    monkeypatch.setenv("QUANTPLAN_KERNELS", "none")
    torch.manual_seed(0)


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.detach().view(torch.int32)


@pytest.mark.parametrize("options", VARIANTS, ids=named)
def test_forward_is_quantize_and_dequantize_bit_for_bit(options: dict[str, Any]) -> None:
    x = torch.randn(40, 192, requires_grad=True)
    quantizer = scheme(options).quantizer()
    expected = quantizer.dequantize(quantizer.quantize(x.detach()))
    assert torch.equal(bits(fake_quantize(x, scheme(options).quantizer())), bits(expected))
    if options.get("rounding") != "stochastic":
        q = quantizer.quantize(x.detach())
        assert torch.equal(bits(fake_quantize(x, quantizer, dict(q.params))), bits(expected))


@pytest.mark.parametrize("options", VARIANTS, ids=named)
def test_gradients_pass_but_for_clamped_values(options: dict[str, Any]) -> None:
    """With a narrow range: what is clamped stays where it is when values grow, and has no gradient; the rest has the output's."""
    config = scheme(options)
    x = torch.randn(40, 192)
    params = dict(config.quantizer().quantize(x * 0.4).params)
    x.requires_grad_()
    gradient = torch.randn(40, 192)
    (fake_quantize(x, config.quantizer(), params) * gradient).sum().backward()
    assert x.grad is not None
    far = fake_quantize(x.detach() * 1.5, config.model_copy(update={"rounding": "nearest"}).quantizer(), params)
    near = fake_quantize(x.detach() * 1.3, config.model_copy(update={"rounding": "nearest"}).quantizer(), params)
    passes = x.grad == gradient
    assert torch.equal(x.grad == 0, ~passes)
    assert 0.005 < (~passes).float().mean() < 0.7
    # clamped: moving on changes nothing; every value that still moves has its gradient
    assert torch.equal(far[~passes], near[~passes]) and passes[far != near].all()


@pytest.mark.parametrize("name", ["int8", "int4", "int2"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_learned_steps_have_the_gradients_of_torchs_kernels(name: str, symmetric: bool, granularity: str) -> None:
    config = SCHEMES.get(name)(symmetric=symmetric, granularity=granularity, scale_dtype="float32")
    x, gradient = torch.randn(7, 192), torch.randn(7, 192)
    params = dict(config.quantizer().quantize(x).params)
    step = params["scale"] * (0.5 + torch.rand_like(params["scale"]))
    zero = params["zero_point"].float() + 0.3 if not symmetric else None
    ours = [t.clone().requires_grad_() if t is not None else None for t in (x, step, zero)]
    y = fake_quantize(ours[0], config.quantizer(), params, step=ours[1], zero_point=ours[2], gradient_scale=0.37)
    (y * gradient).sum().backward()
    half = 2 ** (config.bits - 1)
    low, high = (-half, half - 1) if symmetric else (0, 2 * half - 1)
    theirs = [t.clone().requires_grad_() for t in (x, step.reshape(-1), (zero if zero is not None else 0 * step).reshape(-1))]
    if granularity == "tensor":
        expected = torch._fake_quantize_learnable_per_tensor_affine(*theirs, low, high, 0.37)
    else:
        expected = torch._fake_quantize_learnable_per_channel_affine(*theirs, 0, low, high, 0.37)
    (expected * gradient).sum().backward()
    torch.testing.assert_close(y, expected)
    for own, their in zip(ours, theirs, strict=True):
        if own is not None:
            torch.testing.assert_close(own.grad.reshape(their.grad.shape), their.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", [o for o in VARIANTS if o.get("rounding") != "stochastic"], ids=named)
def test_a_learned_step_of_any_scheme_has_the_gradient_of_its_definition(options: dict[str, Any]) -> None:
    """Levels held fast, `x + step * (q - y)` is the function that LSQ differentiates: central differences in float64."""
    config = scheme(options)
    quantizer, x, gradient = config.quantizer(), torch.randn(40, 192), torch.randn(40, 192).double()
    params = dict(quantizer.quantize(x * 0.7).params)
    step = quantizer.step(params).clone().requires_grad_()
    y = fake_quantize(x.requires_grad_(), quantizer, params, step=step)
    (y * gradient).sum().backward()
    rows = quantizer.groups(torch.arange(40.0).unsqueeze(1).expand(40, 192))  # which group each value is in
    wide = {n: p if n in config.tensor_params else p.unsqueeze(-1) for n, p in params.items()}
    unit = quantizer.step(wide).double()
    groups, values = quantizer.groups(x.detach()).double(), quantizer.groups(y.detach()).double()
    passed = quantizer.groups((x.grad != 0).float()).bool()
    level = values / unit

    def surrogate(s: torch.Tensor) -> torch.Tensor:
        rounding = level - torch.where(passed, groups / unit, 0)  # held fast
        return (torch.where(passed, groups, 0) + s * rounding) * quantizer.groups(gradient)

    h = 1e-3 * unit
    expected = (surrogate(unit + h) - surrogate(unit - h)).sum(-1, keepdim=True) / (2 * h)
    assert step.grad is not None and rows.shape == groups.shape
    torch.testing.assert_close(step.grad.double().reshape(expected.shape), expected, rtol=1e-3, atol=1e-3)


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(192, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))


@pytest.mark.parametrize("aq", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("options", VARIANTS, ids=named)
def test_qat_computes_what_the_converted_model_computes(options: dict[str, Any], aq: dict[str, Any] | None) -> None:
    model = net()
    plan = {"default": {"wq": options, "aq": aq}, "overrides": [{"pattern": "4", "keep": True}]}
    if options.get("group_size", 0) == 64:
        plan["default"]["wq"] = {**options, "group_size": 32}
    prepared = prepare_qat(model, plan)
    assert prepared.state_dict().keys() == model.state_dict().keys()
    optimizer = torch.optim.SGD(prepared.parameters(), lr=0.01)
    for _ in range(2):
        loss = functional.cross_entropy(prepared(torch.randn(16, 192)), torch.randint(8, (16,)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert not torch.equal(prepared[0].weight, model[0].weight)
    prepared.eval()
    done = convert(prepared)
    assert isinstance(done[0], QuantLinear) and isinstance(prepared[0], FakeQuantizedLinear)
    x = torch.randn(5, 192)
    assert torch.equal(prepared(x), done(x))
    if aq is None or aq.get("dynamic", True):
        trained = net()
        trained.load_state_dict(prepared.state_dict())
        applied = quantize(trained, plan).state_dict()
        assert applied.keys() == done.state_dict().keys()
        for name, tensor in done.state_dict().items():
            assert torch.equal(tensor.view(torch.uint8), applied[name].view(torch.uint8)), name


@pytest.mark.parametrize("name", OBSERVERS.names())
def test_static_rounding_of_activations_is_that_of_the_quantizer(name: str) -> None:
    observer = OBSERVERS.get(name)()
    if observer.dynamic or observer.channel_axis is not None:
        return
    config = SCHEMES.get("int8")(dynamic=False, symmetric=False)
    quantizer, seen = config.quantizer(), observer.observer()
    seen.update(torch.randn(3, 5, 32))
    found = quantizer.fit_static(seen.result(quantizer))
    x = (torch.randn(2, 3, 32) * 2).requires_grad_()
    y = fake_quantize_static(x, quantizer, found)
    assert torch.equal(y, quantizer.round_static(x.detach(), found))
    y.sum().backward()
    ends = y.detach() == y.detach().amax()
    assert x.grad is not None and set(x.grad.unique().tolist()) <= {0.0, 1.0} and ends.any()


def test_prepare_leaves_the_model_alone_unless_in_place() -> None:
    model = net()
    before = copy.deepcopy(model.state_dict())
    prepared = prepare_qat(model, {"default": {"wq": "int8"}})
    with torch.no_grad():
        prepared[0].weight.zero_()
    assert type(model[0]) is nn.Linear and all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    same = prepare_qat(model, {"default": {"wq": "int8"}}, inplace=True)
    assert same is model and isinstance(model[0], FakeQuantizedLinear)
    assert convert(model, inplace=True) is model and isinstance(model[0], QuantLinear)


@pytest.mark.parametrize(
    "wq", ["int4", {"scheme": "int4", "symmetric": False}, "nvfp4", "fp8", "mxfp4", {"scheme": "nf4", "group_size": 32}]
)
def test_conversion_is_what_apply_writes_from_the_trained_weights(wq: Any, tmp_path: Path) -> None:
    folder = zoo.build("llama", tmp_path / "model", torch.bfloat16)
    plan = {"default": {"wq": wq, "aq": "int8"}, "output": {"format": "quantplan"}}
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    qat = prepare_qat(model, plan).train()
    optimizer = torch.optim.SGD(qat.parameters(), lr=0.1)
    for _ in range(2):
        ids = torch.randint(100, (2, 12))
        optimizer.zero_grad()
        qat(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    trained = tmp_path / "trained"
    model.load_state_dict(qat.state_dict())  # the checkpoint of training is the float model's
    model.save_pretrained(trained)
    written = apply(trained, plan, tmp_path / "out").out
    convert(qat.eval()).save_pretrained(tmp_path / "converted")
    expected, found = (safetensors.torch.load_file(Path(f) / "model.safetensors") for f in (written, tmp_path / "converted"))
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert tensor.dtype == found[name].dtype and torch.equal(tensor.view(torch.uint8), found[name].view(torch.uint8)), name
    reloaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "converted")
    ids = torch.randint(100, (2, 12))
    with torch.no_grad():
        assert torch.equal(reloaded(ids).logits, qat(ids).logits)


def test_a_trained_embedding_saves_and_loads(tmp_path: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(zoo.build("llama", tmp_path / "model", torch.float32))
    plan = {"default": {"wq": "int4"}, "overrides": [{"pattern": "model.embed_tokens", "wq": "int8"}]}
    qat = prepare_qat(model, plan)
    ids = torch.randint(100, (2, 12))
    qat(input_ids=ids, labels=ids).loss.backward()
    done = convert(qat.eval())
    done.save_pretrained(tmp_path / "out")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, done(ids).logits) and torch.equal(done(ids).logits, qat(ids).logits)


def test_nan_is_laid_at_its_layer() -> None:
    qat = prepare_qat(net(), {"default": {"wq": "int8", "aq": "int8"}})
    with pytest.raises(QuantplanError, match='tensor "0": QP601'):
        qat(torch.full((2, 192), torch.nan))
    with torch.no_grad():
        qat[2].weight[0, 0] = torch.inf
    for broken in (lambda: qat(torch.zeros(2, 192)), lambda: convert(qat)):
        with pytest.raises(QuantplanError, match='tensor "2": QP601'):
            broken()


@pytest.mark.parametrize("wq", ["int4", {"scheme": "int4", "symmetric": False}])
def test_a_float_checkpoint_goes_into_a_model_with_learned_steps(wq: Any) -> None:
    model = net()
    qat = prepare_qat(model, {"default": {"wq": wq}, "overrides": [{"pattern": "4", "keep": True}]}, learnable=True)
    assert "0.weight_fake_quant.step" in qat.state_dict()
    qat.load_state_dict(model.state_dict())
    other = prepare_qat(model, {"default": {"wq": wq}, "overrides": [{"pattern": "4", "keep": True}]}, learnable=True)
    with torch.no_grad():
        qat[0].weight_fake_quant.step.mul_(1.1)
    other.load_state_dict(qat.state_dict())
    assert torch.equal(other[0].weight_fake_quant.step, qat[0].weight_fake_quant.step)
    state = model.state_dict()
    state.pop("0.weight")
    with pytest.raises(RuntimeError, match="Missing key"):
        qat.load_state_dict(state)


def test_dtypes_and_autocast() -> None:
    plan = {"default": {"wq": "int8", "aq": "int8"}}
    qat = prepare_qat(net().bfloat16(), plan).eval()
    x = torch.randn(4, 192, dtype=torch.bfloat16)
    done = convert(qat)
    assert qat(x).dtype == torch.bfloat16 and torch.equal(qat(x), done(x))
    qat = prepare_qat(net(), plan).eval()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = qat(x.float())
        assert y.dtype == torch.bfloat16 and torch.equal(y, convert(qat)(x.float()))
    y.float().sum().backward()
    assert qat[0].weight.grad is not None and qat[0].weight.grad.dtype == torch.float32


def test_fused_siblings_share_their_tensor_scale_in_training_too() -> None:
    model = nn.ModuleDict({n: nn.Linear(64, 64, bias=False) for n in ("q_proj", "k_proj", "v_proj", "o_proj")})
    with torch.no_grad():
        model["k_proj"].weight *= 10
    plan = {"default": {"wq": "nvfp4"}}
    qat = prepare_qat(model, plan)
    x = torch.randn(3, 64)
    done = convert(qat)
    scales = {n: float(done[n].weight_global_scale) for n in model}
    assert scales["q_proj"] == scales["k_proj"] == scales["v_proj"] != scales["o_proj"]
    for name in model:
        assert torch.equal(qat[name](x), done[name](x))
    copied = copy.deepcopy(qat)
    assert all(copied["q_proj"] in copied[n].weight_fake_quant.fused for n in ("q_proj", "k_proj", "v_proj"))


def test_data_algorithms_give_way_and_others_are_asked() -> None:
    searched = {
        "default": {"wq": "int4", "algorithm": {"name": "rtn", "search": "mse"}},
        "overrides": [{"pattern": "4", "keep": True}],
    }
    model = net()
    qat = prepare_qat(model, searched).eval()
    x = torch.randn(4, 192)
    applied = quantize(copy.deepcopy(model), searched)
    assert torch.equal(qat(x), applied(x)) and torch.equal(convert(qat)(x), applied(x))
    plain = {**searched, "default": {"wq": "int4"}}
    assert not torch.equal(prepare_qat(model, plain).eval()(x), qat(x))
    by_data = prepare_qat(model, {**searched, "default": {"wq": "int4", "algorithm": "gptq"}}).eval()
    assert torch.equal(by_data(x), prepare_qat(model, plain).eval()(x))
