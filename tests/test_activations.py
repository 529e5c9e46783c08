"""Activations with static ranges, and scales of the key-value cache: found in calibration, written, read, computed with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import checkpoints
import pytest
import torch
import transformers
import zoo
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import quantplan
from quantplan.engine import moments
from quantplan.engine.apply import Report, apply
from quantplan.engine.verify import verify
from quantplan.errors import QuantplanError
from quantplan.headers import read_checkpoint
from quantplan.live.watch import watching
from quantplan.observer import OBSERVERS
from quantplan.plan.load import load_plan
from quantplan.plan.resolve import resolve
from quantplan.scheme import SCHEMES

transformers.logging.set_verbosity_error()

LENGTH, LAYERS = 24, 3
FUSED = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)


def static(scheme: str, **options: Any) -> dict[str, Any]:
    return {"scheme": scheme, "dynamic": False, **options}


PLANS: dict[str, dict[str, Any]] = {
    "int8": {"wq": "int8", "aq": static("int8", observer="minmax")},
    "asymmetric int8": {"wq": "int8", "aq": static("int8", symmetric=False, observer="minmax")},
    "fp8": {"wq": "fp8", "aq": static("fp8")},
    "nvfp4": {"wq": "nvfp4", "aq": static("nvfp4", observer="minmax")},
}
CACHES: dict[str, Any] = {
    "fp8": "fp8",
    "fp8 by head": {"scheme": "fp8", "granularity": "head"},
    "int8": "int8",
    "int8 by head": {"scheme": "int8", "granularity": "head"},
}
FORMATS = ["compressed-tensors", "quantplan"]


@pytest.fixture(scope="module", autouse=True)
def exact() -> Iterator[None]:
    """Products in float32, so that a slow reference finds the same numbers."""
    before, moments.fast_dtype = moments.fast_dtype, lambda: torch.float32
    yield
    moments.fast_dtype = before


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return zoo.build("llama", tmp_path_factory.mktemp("model"), torch.bfloat16)


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    return torch.randint(3, 120, (6, LENGTH), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def ids(tokens: Tensor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokens") / "ids.safetensors"
    save_file({"input_ids": tokens}, path)
    return path


Written = Callable[..., Report]


@pytest.fixture(scope="module")
def written(model: Path, ids: Path, tmp_path_factory: pytest.TempPathFactory) -> Written:
    """Applies a default rule and other keys of a plan, once a session."""
    folder, reports = tmp_path_factory.mktemp("outputs"), {}

    def apply_once(default: dict[str, Any], output: str = "compressed-tensors", skip: int = 0, **keys: Any) -> Report:
        key = repr((default, output, skip, keys))
        if key not in reports:
            plan = plan_of(default, ids, output, skip, **keys)
            reports[key] = apply(model, plan, folder / str(len(reports)))
        return reports[key]

    return apply_once


def plan_of(default: dict[str, Any], ids: Path, output: str = "compressed-tensors", skip: int = 0, **keys: Any) -> dict[str, Any]:
    calibration = {"source": str(ids), "samples": 6, "sequence_length": LENGTH, "skip_tokens": skip}
    return {"default": default, "calibration": calibration, "output": {"format": output}, **keys}


def stored(report: Report) -> dict[str, Tensor]:
    return load_file(report.out / "model.safetensors")


def opened(path: Path, dtype: torch.dtype = torch.bfloat16) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()


@torch.no_grad()
def logits(model: Any, tokens: Tensor) -> Tensor:
    return model(tokens).logits


# --- by hand ----------------------------------------------------------------------------------------------------------


def by_hand(x: Tensor, params: dict[str, Tensor], scheme: str, zero_first: bool = False) -> Tensor:
    """Static activations in the dtype of `x` all the way. compressed-tensors adds a zero point before it rounds."""
    if scheme == "nvfp4":
        return nvfp4_by_hand(x, params["global_scale"])
    scale = params["scale"].to(x.dtype)
    zero = params["zero_point"].to(x.dtype) if "zero_point" in params else torch.zeros((), dtype=x.dtype)
    if scheme == "fp8":
        return (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).to(x.dtype) * scale
    units = (x / scale + zero).round() if zero_first else (x / scale).round() + zero
    return (units.clamp(-128, 127) - zero) * scale


def nvfp4_by_hand(x: Tensor, global_scale: Tensor) -> Tensor:
    """Blocks of 16 with e4m3 scales below a known scale of the tensor, and the nearest of e2m1's values, ties to even codes."""
    levels = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    blocks = x.unflatten(-1, (-1, 16))
    step = (blocks.abs().amax(-1, keepdim=True) / 6).float()
    scale = (global_scale * step).clamp(-448, 448).to(torch.float8_e4m3fn).float()
    blocks = blocks.float()
    step = torch.where(scale == 0, 2.0**-9, scale) / global_scale
    distances = ((blocks / step).abs().unsqueeze(-1) - levels).abs()
    nearest = distances == distances.amin(-1, keepdim=True)
    even = nearest & (torch.arange(8) % 2 == 0)
    code = torch.where(even.any(-1), even.int().argmax(-1), nearest.int().argmax(-1))
    return (levels[code] * blocks.sign() * step).flatten(-2).to(x.dtype)


def input_params(tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """What is stored for the static activations of a module in compressed-tensors' layout."""
    start = f"{name}.input_"
    return {key.removeprefix(start): value for key, value in tensors.items() if key.startswith(start)}


class RoundingCache:
    """Stands for a cache: rounds keys and values of the layers it has scales for, and keeps what it was given."""

    def __init__(self, scales: dict[int, tuple[Tensor, Tensor]], scheme: str) -> None:
        self.scales, self.scheme = scales, scheme
        self.given: dict[int, tuple[Tensor, Tensor]] = {}

    def update(self, keys: Tensor, values: Tensor, layer: int, *rest: Any, **others: Any) -> tuple[Tensor, ...]:
        self.given[layer] = keys, values
        if layer not in self.scales:
            return keys, values
        return tuple(by_hand(x, {"scale": s}, self.scheme) for x, s in zip((keys, values), self.scales[layer], strict=True))


@contextmanager
def caching(model: Any, cache: RoundingCache) -> Iterator[None]:
    """Attention modules are handed `cache`, whatever the model would give them."""

    def hand(module: nn.Module, arguments: Any, options: dict[str, Any]) -> Any:
        return arguments, {**options, "past_key_values": cache}

    hooks = [layer.self_attn.register_forward_pre_hook(hand, with_kwargs=True) for layer in model.model.layers]
    yield
    for hook in hooks:
        hook.remove()


# --- scales -----------------------------------------------------------------------------------------------------------


def slow_scales(path: Path, tokens: Tensor, default: dict[str, Any], skip: int) -> dict[str, dict[str, Tensor]]:
    """What every linear's inputs should be given: the whole model is run once for each group of fused linears, with those
    before it quantized."""
    model, found = opened(path, torch.float32), {}
    options = {**default["aq"], "scale_dtype": "bfloat16"}
    aq = SCHEMES.get(options.pop("scheme"))(**{k: v for k, v in options.items() if k != "observer" and k in aq_options(default)})
    observer = options.get("observer", "minmax")
    weights = SCHEMES.get(default["wq"])()
    for layer in range(LAYERS):
        for names in FUSED:
            modules = {name: model.get_submodule(f"model.layers.{layer}.{name}") for name in names}
            seen: list[Tensor] = []
            hook = next(iter(modules.values())).register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
            logits(model, tokens)
            hook.remove()
            watching_ = OBSERVERS.get(observer)().observer()
            watching_.update(seen[0][:, skip:])
            params = aq.quantizer().fit_static(watching_.result(aq.quantizer()))
            largest = torch.stack([m.weight.abs().amax() for m in modules.values()]).amax()
            for name, module in modules.items():
                found[f"model.layers.{layer}.{name}"] = params
                module.weight.data = weights.quantizer().fake_quantize(module.weight.data, largest)
                module.register_forward_pre_hook(lambda _, args, p=params: (aq.quantizer().round_static(args[0], p),))
    return found


def aq_options(default: dict[str, Any]) -> set[str]:
    known = SCHEMES.get(default["aq"]["scheme"]).model_fields
    return {name for name in (*default["aq"], "scale_dtype") if name in known}


@pytest.mark.parametrize("skip", [0, 3])
@pytest.mark.parametrize("name", PLANS)
def test_ranges_are_those_of_the_model_quantized_so_far(
    name: str, skip: int, model: Path, tokens: Tensor, written: Written
) -> None:
    tensors = stored(written(PLANS[name], skip=skip))
    for module, params in slow_scales(model, tokens, PLANS[name], skip).items():
        found = input_params(tensors, module)
        assert found.keys() == params.keys() and all(p.shape == (1,) for p in found.values())
        for part, value in params.items():
            expected = value.float() - 128 if part == "zero_point" else value.float()
            # one step of bfloat16, or of a zero point: the references' sums are in another order
            close = {"rtol": 2**-7, "atol": 1.01 if part == "zero_point" else 0}
            torch.testing.assert_close(found[part].float(), expected, **close)
    for layer in range(LAYERS):
        for names in FUSED:
            fused = [input_params(tensors, f"model.layers.{layer}.{n}") for n in names]
            assert all(torch.equal(p, fused[0][part]) for params in fused for part, p in params.items())


@pytest.mark.parametrize("observer", ["percentile", "mse", "histogram", "moving_average", "static_range"])
def test_any_observer_of_one_range(observer: str, model: Path, tokens: Tensor, written: Written) -> None:
    default = {"wq": "int8", "aq": static("int8", observer=observer)}
    tensors = stored(written(default))
    expected = slow_scales(model, tokens, default, 0)["model.layers.0.self_attn.q_proj"]["scale"]
    torch.testing.assert_close(tensors["model.layers.0.self_attn.q_proj.input_scale"], expected, rtol=0.02, atol=0)


def test_headroom_is_as_wide_as_small_blocks_allow(written: Written, model: Path, tokens: Tensor) -> None:
    wide = stored(written({"wq": "nvfp4", "aq": static("nvfp4")}))
    whole = stored(written(PLANS["nvfp4"]))
    name = "model.layers.0.self_attn.q_proj"
    assert (wide[f"{name}.input_global_scale"] < whole[f"{name}.input_global_scale"]).all()  # a divisor
    seen: list[Tensor] = []
    float_model = opened(model, torch.float32)
    float_model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    logits(float_model, tokens)
    blocks = seen[0].unflatten(-1, (-1, 16)).abs().amax(-1).flatten().sort().values
    anchor = blocks[len(blocks) // 100]
    expected = 448 * 6 / (16384 * anchor)
    torch.testing.assert_close(wide[f"{name}.input_global_scale"][0], expected, rtol=0.02, atol=0)


def slow_cache(path: Path, tokens: Tensor, scheme: str, by_head: bool, skip: int) -> dict[int, tuple[Tensor, Tensor]]:
    """Scales of keys and values, layer by layer: those before are rounded."""
    model, scales = opened(path, torch.float32), {}
    for layer in range(LAYERS):
        cache = RoundingCache(scales, scheme)
        with caching(model, cache):
            logits(model, tokens)
        axes = (0, 2, 3) if by_head else (0, 1, 2, 3)
        top = [x[:, :, skip:].abs().amax(axes, keepdim=True)[0] for x in cache.given[layer]]
        divisor = 448 if scheme == "fp8" else 127
        scales[layer] = tuple((t / divisor).bfloat16() for t in top)
    return scales


@pytest.mark.parametrize("skip", [0, 2])
@pytest.mark.parametrize("name", CACHES)
def test_cache_scales_are_of_keys_after_rotation(name: str, skip: int, model: Path, tokens: Tensor, written: Written) -> None:
    tensors = stored(written({}, skip=skip, kv_cache=CACHES[name]))
    scheme, by_head = name.split()[0], "head" in name
    for layer, scales in slow_cache(model, tokens, scheme, by_head, skip).items():
        for part, expected in zip(("k_scale", "v_scale"), scales, strict=True):
            found = tensors[f"model.layers.{layer}.self_attn.{part}"]
            assert found.shape == ((2, 1, 1) if by_head else (1,)) and found.dtype == torch.bfloat16
            torch.testing.assert_close(found, expected.reshape(found.shape), rtol=2**-7, atol=0)


# --- reading ----------------------------------------------------------------------------------------------------------


@contextmanager
def standing_for(model: Any, report: Report, rounding: torch.dtype | None) -> Iterator[Any]:
    """The float model with an output's weights, read by quantplan, and its inputs rounded by hand in `rounding`, and back."""
    tensors = stored(report)
    hooks = []
    quantized = quantplan.load(report.out)
    for a in report.resolution.quantized:
        module = model.get_submodule(a.name)
        module.weight.data = quantized.get_submodule(a.name).dequantize().to(torch.bfloat16)
        params = input_params(tensors, a.name)

        def rounded(_: Any, args: Any, params: Any = params, scheme: str = a.aq.name if a.aq else "") -> Any:
            x = args[0].to(rounding or args[0].dtype)
            return (by_hand(x, params, scheme, rounding is None).to(args[0].dtype),)

        hooks.append(module.register_forward_pre_hook(rounded))
    yield model
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("name", PLANS)
def test_logits_are_those_of_rounded_inputs(
    name: str, model: Path, tokens: Tensor, written: Written, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QUANTPLAN_KERNELS", "none")  # what kernels round is in test_kernels
    report = written(PLANS[name])
    # quantplan rounds in float32, compressed-tensors in the model's dtype
    for found, rounding in ((quantplan.load(report.out).eval(), torch.float32), (opened(report.out), None)):
        with standing_for(opened(model), report, rounding) as reference:
            assert torch.equal(logits(found, tokens), logits(reference, tokens))
    native = written(PLANS[name], "quantplan")
    ours = logits(quantplan.load(report.out).eval(), tokens)
    assert torch.equal(logits(quantplan.load(native.out).eval(), tokens), ours)
    assert torch.equal(logits(opened(native.out), tokens), ours)
    assert not torch.equal(ours, logits(opened(model), tokens))


@pytest.mark.parametrize("name", CACHES)
def test_logits_are_those_of_a_rounded_cache(name: str, model: Path, tokens: Tensor, written: Written) -> None:
    scheme = name.split()[0]
    report, native = written({}, kv_cache=CACHES[name]), written({}, "quantplan", kv_cache=CACHES[name])
    tensors = stored(report)
    parts = ("k_scale", "v_scale")
    scales = {i: tuple(tensors[f"model.layers.{i}.self_attn.{part}"] for part in parts) for i in range(LAYERS)}
    theirs = opened(model)
    with caching(theirs, RoundingCache(scales, scheme)):
        expected = logits(theirs, tokens)
    assert torch.equal(logits(opened(report.out), tokens), expected)  # in the model's dtype
    found = logits(quantplan.load(report.out).eval(), tokens)
    assert torch.equal(found, logits(quantplan.load(native.out).eval(), tokens))
    assert torch.equal(found, logits(opened(native.out), tokens))
    plain = logits(opened(model), tokens)
    assert (found - expected).abs().mean() < (expected - plain).abs().mean()
    ours = quantplan.load(report.out).eval()
    with_cache = ours.generate(tokens[:1], max_new_tokens=5, do_sample=False)
    without = ours.generate(tokens[:1], max_new_tokens=5, do_sample=False, use_cache=False)
    assert torch.equal(with_cache, without)


def test_both_at_once_and_what_is_recorded(model: Path, tokens: Tensor, written: Written) -> None:
    report = written({**PLANS["fp8"], "algorithm": "gptq"}, kv_cache="fp8")
    assert verify(report.out, model).ok
    assert report.written == report.estimate.output_bytes
    config = read_checkpoint(report.out).config["quantization_config"]
    group = config["config_groups"]["group_0"]["input_activations"]
    assert (group["dynamic"], group["strategy"], group["num_bits"], group["type"]) == (False, "tensor", 8, "float")
    cache = config["kv_cache_scheme"]
    assert (cache["dynamic"], cache["strategy"], cache["num_bits"], cache["type"]) == (False, "tensor", 8, "float")
    native = written({**PLANS["fp8"], "algorithm": "gptq"}, "quantplan", kv_cache="fp8")
    assert verify(native.out, model).ok
    assert torch.equal(logits(quantplan.load(report.out).eval(), tokens), logits(opened(native.out), tokens))
    nvfp4 = read_checkpoint(written(PLANS["nvfp4"]).out).config["quantization_config"]["config_groups"]["group_0"]
    assert nvfp4["input_activations"] == {**nvfp4["weights"], "dynamic": "local"}


class Interrupt(Exception):
    pass


def test_resumed_runs_write_the_same_bytes(model: Path, ids: Path, tmp_path: Path) -> None:
    plan = plan_of({**PLANS["asymmetric int8"], "algorithm": "gptq"}, ids, kv_cache="fp8")
    apply(model, plan, tmp_path / "whole")

    def stop(step: Any) -> None:
        if step.phase == "calibrating" and step.done == 2:
            raise Interrupt

    with pytest.raises(Interrupt):
        apply(model, plan, tmp_path / "resumed", on_step=stop)
    steps: list[Any] = []
    apply(model, plan, tmp_path / "resumed", on_step=steps.append)
    assert [s.block.resumed for s in steps if s.phase == "calibrating"] == [True, True, False]
    assert checkpoints.tree(tmp_path / "resumed") == checkpoints.tree(tmp_path / "whole")


# --- plans ------------------------------------------------------------------------------------------------------------


def test_static_ranges_take_data_wherever_they_come_from(model: Path) -> None:
    for keys in ({"default": PLANS["int8"]}, {"kv_cache": "fp8"}):
        resolution = resolve(load_plan(keys), read_checkpoint(model)).require()
        assert resolution.takes_data and resolution.calibration.source == "self"
    dynamic = resolve(load_plan({"default": {"wq": "int8", "aq": "int8"}}), read_checkpoint(model))
    assert not dynamic.takes_data


def test_an_override_can_make_activations_dynamic_again(model: Path) -> None:
    default = {"wq": "int8", "aq": static("int8", observer="mse")}
    overrides = [{"pattern": "*.mlp.*", "aq": {"dynamic": True}}, {"pattern": "*.o_proj", "aq": {"observer": "percentile"}}]
    found = resolve(load_plan({"default": default, "overrides": overrides}), read_checkpoint(model)).require().assignments
    kinds = {name: a.observer.name if a.observer else a.aq.strategy for name, a in found.items() if a.aq}
    assert {n.rpartition(".")[2]: k for n, k in kinds.items()} == {
        **dict.fromkeys(("q_proj", "k_proj", "v_proj"), "mse"),
        **dict.fromkeys(("gate_proj", "up_proj", "down_proj"), "token"),
        "o_proj": "percentile",
    }


def test_what_cannot_be_done_is_said(model: Path, ids: Path, tmp_path: Path) -> None:
    head = plan_of({}, ids, overrides=[{"pattern": "lm_head", **PLANS["int8"]}], engines=["transformers"])
    with pytest.raises(QuantplanError, match=r"QP224.*outside of the model's blocks"):
        apply(model, head, tmp_path / "out")
    for keys in ({"default": PLANS["int8"]}, {"kv_cache": "fp8", "default": {"wq": "int8"}}):
        with pytest.raises(QuantplanError, match=r"QP222.*calibration"):
            quantplan.quantize(opened(model), keys)
    experts = zoo.build("qwen3-moe", tmp_path)
    problems = resolve(load_plan({"default": PLANS["int8"]}), read_checkpoint(experts)).problems
    assert any(p.code == "QP115" and "static activations of experts" in p.message for p in problems)
    latent = zoo.build("deepseek-v3", tmp_path)
    problems = resolve(load_plan({"kv_cache": "fp8"}), read_checkpoint(latent)).problems
    assert any(p.code == "QP123" and "latent" in p.message for p in problems)


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "gpt-oss"])
def test_a_watch_can_exchange_inputs(name: str, tmp_path: Path) -> None:
    """Twice the inputs of one parameter give twice its product, whatever computes it."""
    found = transformers.AutoModelForCausalLM.from_pretrained(zoo.build(name, tmp_path)).eval()
    tokens = torch.randint(3, 120, (2, 8), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain = found(tokens).logits
        with watching(found, lambda name, index, inputs: inputs):
            assert torch.equal(found(tokens).logits, plain)
        with watching(found, lambda name, index, inputs: None):
            assert torch.equal(found(tokens).logits, plain)
        last = [n for n, p in found.named_parameters() if p.dim() > 1 and ("lm_head" in n or "wte" in n or "embed" in n)][-1:]
        with watching(found, lambda name, index, inputs: 2 * inputs if name in last else None) as watch:
            doubled = found(tokens).logits
        assert set(last) <= watch.input_axis.keys()
    torch.testing.assert_close(doubled, 2 * plain)
