"""Inspection: every figure against a slow computation, for every scheme and format, and what cannot be inspected."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import checkpoints
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from test_evaluate import TEXT, make_model

import quantplan
from quantplan import inspect_checkpoint
from quantplan.cli import run
from quantplan.engine import verify as verifying
from quantplan.engine.difference import difference
from quantplan.engine.verify import verify
from quantplan.errors import QuantplanError
from quantplan.inspection.layers import grid_ends
from quantplan.inspection.spread import Spread, SpreadSums
from quantplan.scheme import SCHEMES

MIXED: dict[str, Any] = {
    "default": {"wq": "int4", "group_size": 32},
    "overrides": [
        {"pattern": "*.down_proj", "wq": {"scheme": "int8", "symmetric": False}},
        {"pattern": "*.self_attn.*", "wq": "fp8", "aq": "fp8"},
    ],
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("inspect")
    model = checkpoints.llama(folder / "model", shards=2)
    quantplan.apply(model, MIXED, folder / "out")
    return model, folder / "out"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A model that runs, the same in int4, and a text."""
    folder = tmp_path_factory.mktemp("activations")
    model = make_model(folder / "model", 0)
    quantplan.apply(model, {"default": {"wq": "int4", "group_size": 32}}, folder / "out")
    (folder / "text.txt").write_text(TEXT)
    return model, folder / "out", folder / "text.txt"


def spread_of(*pieces: torch.Tensor) -> Spread:
    sums = SpreadSums()
    for piece in pieces:
        sums.add(piece)
    return sums.result()


@given(st.lists(st.floats(-1e3, 1e3, width=32), min_size=2, max_size=60), st.integers(0, 60))
def test_a_spread_in_pieces_is_that_of_the_whole(numbers: list[float], cut: int) -> None:
    x = torch.tensor(numbers, dtype=torch.float64)
    found = spread_of(x[:cut], x[cut:])
    scale = float(x.abs().max()) or 1.0
    assert (found.minimum, found.maximum, found.absmax) == (x.min(), x.max(), x.abs().max())
    assert found.mean == pytest.approx(float(x.mean()), abs=1e-12 * scale)
    assert found.std == pytest.approx(float(x.std()), abs=1e-6 * scale)
    assert found.rms == pytest.approx(float(x.square().mean().sqrt()), rel=1e-9, abs=1e-30)
    json.dumps(found.as_dict(), allow_nan=False)


def test_kurtosis_and_outliers_are_those_of_the_definitions() -> None:
    x = torch.randn(10_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.5
    centred = x - x.mean()
    found = spread_of(x)
    assert found.kurtosis == pytest.approx(float(centred.pow(4).mean() / centred.square().mean() ** 2), rel=1e-9)
    assert found.kurtosis == pytest.approx(3, abs=0.2)
    assert not found.outlier
    for largest in (-9.0, 9.0):  # seed 003: the largest magnitude against mean + 6 std, whatever its sign
        planted = torch.cat([x, torch.tensor([largest])])
        assert spread_of(planted).outlier == bool(planted.abs().max() > planted.mean() + 6 * planted.std()) is True


def test_nan_and_infinity_are_counted_and_left_out() -> None:
    found = spread_of(torch.tensor([1.0, math.nan, -2.0]), torch.tensor([math.inf]))
    assert (found.nonfinite, found.minimum, found.maximum) == (2, -2, 1)
    assert spread_of(torch.tensor([math.nan])).nonfinite == 1


@given(st.lists(st.tuples(st.floats(-10, 10, width=32), st.floats(-10, 10, width=32)), min_size=1, max_size=30))
def test_a_difference_is_that_of_the_definitions(numbers: list[tuple[float, float]]) -> None:
    x, y = torch.tensor(numbers).T
    found = difference([(x[:7], y[:7]), (x[7:], y[7:])])
    a, b = x.double(), y.double()
    noise, signal = float((a - b).square().sum()), float(a.square().sum())
    if noise and signal:
        assert found.snr == pytest.approx(10 * math.log10(signal / noise), abs=1e-4)
        assert found.relative == pytest.approx(math.sqrt(noise / signal), rel=1e-5)
    assert found.largest == pytest.approx(float((a - b).abs().max()), rel=1e-6)
    assert found.mean_relative == pytest.approx(float(((x - y).abs() / (x.abs() + 1e-8)).double().mean()), rel=1e-5)
    if signal and float(b.square().sum()):
        assert found.cosine == pytest.approx(float(torch.dot(a, b) / a.norm() / b.norm()), abs=1e-6)
    json.dumps(found.as_dict(), allow_nan=False)


@pytest.mark.parametrize("name", SCHEMES.names())
def test_the_ends_of_a_grid_are_its_lowest_and_highest_value(name: str) -> None:
    config = SCHEMES.get(name)()
    quantizer = config.quantizer()
    low, high = grid_ends(config)
    x = torch.linspace(-1, 1, 2 * (config.group or 64)).view(1, -1)
    stored = quantizer.quantize(x * 100)
    values = quantizer.dequantize(stored)
    assert int(stored.codes[0, values[0].argmax()]) == high or name.startswith("mx")
    saturated = quantizer.encode(torch.tensor([[[-1e9, 1e9]]]), {n: p.view(1, 1, -1)[..., :1] for n, p in stored.params.items()})
    assert saturated.flatten().tolist() == [low, high]


@pytest.mark.parametrize("pieces", [1 << 20, 100])
def test_ranges_of_a_float_checkpoint(made: tuple[Path, Path], pieces: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verifying, "ROWS", pieces)
    found = {layer.name: layer for layer in inspect_checkpoint(made[0]).layers}
    stored = {n: t for f in made[0].glob("*.safetensors") for n, t in load_file(f).items() if t.ndim == 2}
    assert {f"{name}.weight" for name in found} == stored.keys()
    for name, layer in found.items():
        weight = stored[f"{name}.weight"].double()
        assert (layer.values.minimum, layer.values.maximum) == (weight.min(), weight.max())
        assert layer.values.rms == pytest.approx(float(weight.square().mean().sqrt()))
        assert (layer.treatment, layer.bits, layer.scales, layer.saturation) == ("bfloat16", 16, None, None)


def test_errors_are_those_that_verify_finds(made: tuple[Path, Path]) -> None:
    found = {layer.name: layer for layer in inspect_checkpoint(made[1], made[0]).layers}
    checked = verify(made[1], made[0]).layers
    assert len(checked) == 14
    for layer in checked:
        error = found[layer.name].error
        assert error is not None and (error.snr, error.largest) == (layer.snr, layer.largest)
    kept = found["model.embed_tokens"].error
    assert kept is not None and kept.as_dict()["snr_db"] is None and kept.relative == 0


@pytest.mark.parametrize("output", ["compressed-tensors", "quantplan"])
@pytest.mark.parametrize("wq", ["int4", "int8", "fp8", "nvfp4", "mxfp4", {"scheme": "int8", "symmetric": False}, "nf4", "int3"])
def test_scales_and_saturation_are_those_of_the_stored_grid(output: str, wq: Any, tmp_path: Path) -> None:
    if (wq, output) == ("nf4", "compressed-tensors"):
        pytest.skip("compressed-tensors has no nf4")
    model = checkpoints.llama(tmp_path / "model", layers=1)
    quantplan.apply(model, {"default": {"wq": wq}, "output": {"format": output}}, tmp_path / "out")
    found = {layer.name: layer for layer in inspect_checkpoint(tmp_path / "out", model).layers}
    layer = found["model.layers.0.mlp.up_proj"]
    weight = load_file(model / "model.safetensors")["model.layers.0.mlp.up_proj.weight"].float()
    options = {"scheme": wq} if isinstance(wq, str) else wq
    config = SCHEMES.get(options["scheme"])(**{k: v for k, v in options.items() if k != "scheme"}, **scale_dtype(options))
    quantizer = config.quantizer()
    stored = quantizer.quantize(weight)
    values, steps = quantizer.dequantize(stored), quantizer.step(dict(stored.params)).float()
    assert layer.scales is not None and layer.saturation is not None and layer.error is not None
    fused = wq == "nvfp4"  # one tensor scale for gate and up
    near = {"rel": 0.1} if fused else {"rel": 1e-6}
    assert layer.scales.minimum == pytest.approx(float(steps.min()), **near)
    assert layer.scales.maximum == pytest.approx(float(steps.max()), **near)
    assert layer.scales.count == steps.numel()
    low, high = grid_ends(config)
    if not fused:
        assert layer.values.maximum == pytest.approx(float(values.max()))
        assert layer.saturation.low == pytest.approx(float((stored.codes == low).float().mean()))
        assert layer.saturation.high == pytest.approx(float((stored.codes == high).float().mean()))
    assert layer.error.snr > 10


def scale_dtype(options: dict[str, Any]) -> dict[str, str]:
    return {"scale_dtype": "bfloat16"} if "scale_dtype" in SCHEMES.get(options["scheme"]).model_fields else {}


def test_padded_rows_of_native_codes_are_not_taken_for_weights(tmp_path: Path) -> None:
    model = checkpoints.llama(tmp_path / "model", hidden=68, layers=1)
    plan = {"default": {"wq": {"scheme": "int6", "granularity": "channel"}}, "output": {"format": "quantplan"}}
    quantplan.apply(model, plan, tmp_path / "out")
    found = {layer.name: layer for layer in inspect_checkpoint(tmp_path / "out", model).layers}
    layer = found["model.layers.0.self_attn.q_proj"]
    assert (layer.rows, layer.columns) == (68, 68)
    assert layer.error is not None and layer.error.snr > 20


def test_worst_comes_first(made: tuple[Path, Path]) -> None:
    against = inspect_checkpoint(made[1], made[0]).worst()
    snr = [layer.error.snr for layer in against if layer.error is not None]
    assert snr == sorted(snr) and math.isinf(snr[-1])
    alone = inspect_checkpoint(made[1]).worst()
    assert [a.values.sigmas for a in alone] == sorted((a.values.sigmas for a in alone), reverse=True)


def test_an_outlier_and_a_nan_in_the_weights_are_found(made: tuple[Path, Path], tmp_path: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    weight = torch.randn(128, 64, generator=torch.Generator().manual_seed(1))
    weight[3, 4], weight[7, 7] = -20.0, 20.0
    broken = torch.ones(128, 64)
    broken[0, 0] = math.nan
    model = checkpoints.llama(tmp_path / "m", change={name: weight, "model.layers.1.mlp.up_proj.weight": broken})
    worst = inspect_checkpoint(model).worst()
    assert worst[0].name == "model.layers.1.mlp.up_proj" and worst[0].values.nonfinite == 1
    assert worst[1].name == "model.layers.0.mlp.up_proj" and worst[1].values.outlier
    assert worst[1].outliers == 2 / weight.numel()
    json.dumps(inspect_checkpoint(model, made[0]).as_dict(), allow_nan=False)


def test_what_transforms_rewrote_is_not_compared(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", 0)
    plan = {"default": {"wq": "int4", "group_size": 32}, "transforms": ["rotation"], "output": {"format": "quantplan"}}
    quantplan.apply(model, plan, tmp_path / "out")
    found = inspect_checkpoint(tmp_path / "out", model)
    quantized = [layer for layer in found.layers if layer.quantized]
    assert quantized and all(layer.rewritten and layer.error is None for layer in quantized)


def test_checkpoints_that_cannot_be_inspected_are_refused(made: tuple[Path, Path], tmp_path: Path) -> None:
    foreign = checkpoints.write(tmp_path / "foreign", {"model.safetensors": checkpoints.shard({"a.weight": ("I32", [2, 2])})})
    config = json.loads((foreign / "config.json").read_text())
    (foreign / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))
    assert raised(foreign) == "QP220"
    other = tmp_path / "other"
    other.mkdir()
    save_file({"x.weight": torch.ones(2, 2)}, other / "model.safetensors", {"format": "pt"})
    (other / "config.json").write_text("{}")
    assert raised(made[0], other) == "QP221"
    assert raised(tmp_path / "nothing") == "QP202"


def raised(*arguments: Any, **options: Any) -> str:
    with pytest.raises(QuantplanError) as caught:
        inspect_checkpoint(*arguments, **options)
    return caught.value.problems[0].code


def test_activations_against_the_same_model_are_equal(models: tuple[Path, Path, Path]) -> None:
    found = inspect_checkpoint(models[0], models[0], models[2], length=16, windows=2).activations
    assert {a.kind for a in found} == {"block", "linear"} and len(found) == 2 + 2 * 7 + 1
    for a in found:
        assert a.error is not None and a.error.largest == 0 and a.error.cosine == pytest.approx(1)


def test_activations_equal_those_of_hooks_by_hand(models: tuple[Path, Path, Path]) -> None:
    """One layer of the quantized model: seed 003's comparison, in float64, all tokens at once."""
    from quantplan.evaluation.opened import local, open_model
    from quantplan.evaluation.text import token_windows

    name = "model.layers.1.mlp.down_proj"
    kept: list[list[torch.Tensor]] = [[], [], []]
    for place, path in enumerate(models[:2]):
        model = open_model(local(path))
        part = model.get_submodule(name)
        part.register_forward_hook(lambda m, a, out, place=place: kept[place].append(out[0].double()))
        if place == 1:
            part.register_forward_hook(lambda m, a, out: kept[2].append(a[0][0].double()))
        for window in token_windows(models[2], models[0], 16, 3):
            with torch.no_grad():
                model(window[None])
    x, y, inputs = (torch.cat(each) for each in kept)
    [found] = [a for a in inspect_checkpoint(models[1], models[0], models[2], 16, 3).activations if a.name == name]
    assert found.error is not None
    assert found.error.relative == pytest.approx(float((x - y).norm() / x.norm()), rel=1e-5)
    assert found.error.mean_relative == pytest.approx(float(((x - y).abs() / (x.abs() + 1e-8)).mean()), rel=1e-3)
    assert found.error.largest == pytest.approx(float((x - y).abs().max()), rel=1e-4)
    centred = inputs - inputs.mean(0)
    kurtosis = centred.pow(4).mean(0) / centred.square().mean(0).square()
    assert found.inputs.kurtosis_max == pytest.approx(float(kurtosis.max()), rel=1e-4)
    assert found.inputs.values.peak == pytest.approx(float(inputs.abs().max() / inputs.square().mean().sqrt()), rel=1e-5)
    assert found.inputs.channel == int(inputs.abs().amax(0).argmax())


def test_a_channel_with_outliers_is_named(models: tuple[Path, Path, Path], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(models[0])
    model.model.layers[1].input_layernorm.weight.data[5] = 500.0
    make_model(tmp_path / "m", 0)
    model.save_pretrained(tmp_path / "m")
    found = inspect_checkpoint(tmp_path / "m", data=models[2], length=16, windows=2)
    [layer] = [a for a in found.activations if a.name == "model.layers.1.self_attn.q_proj"]
    assert layer.error is None and layer.inputs.channel == 5 and layer.inputs.channel_peak > 50


def test_static_ranges_of_activations_are_told(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", 0)
    ids = torch.randint(0, 60, (4, 16), generator=torch.Generator().manual_seed(0))
    save_file({"input_ids": ids}, tmp_path / "ids.safetensors")
    plan = {
        "default": {"wq": "int8", "aq": {"scheme": "int8", "dynamic": False}},
        "calibration": {"source": str(tmp_path / "ids.safetensors"), "samples": 4, "sequence_length": 16},
    }
    quantplan.apply(model, plan, tmp_path / "out")
    quantized = [layer for layer in inspect_checkpoint(tmp_path / "out").layers if layer.quantized]
    stored = load_file(tmp_path / "out" / "model.safetensors")
    for layer in quantized:
        scale = float(stored[f"{layer.name}.input_scale"])
        assert layer.inputs is not None and layer.inputs.parameters["scale"] == pytest.approx(scale)
        assert layer.inputs.high == pytest.approx(127 * scale) and layer.inputs.low == pytest.approx(-128 * scale)


def test_the_command_shows_the_worst_and_writes_everything(
    made: tuple[Path, Path], models: tuple[Path, Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["inspect", str(made[1]), "--against", str(made[0]), "--all", "-q"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("model.layers.1.mlp.down_proj") == 2 and "exact" in shown and "16 matrices, 14 quantized" in shown
    model, out, text = map(str, models)
    options = ["--activations", "--data", text, "--length", "16", "--windows", "1", "--plots", str(tmp_path / "plots")]
    assert run(["inspect", out, "-s", model, *options, "--html", str(tmp_path / "page.html"), "--json", "-q"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert len(document["activations"]) == 17 and {layer["module"] for layer in document["layers"]} >= {
        "model.layers.0.mlp.up_proj"
    }
    names = {p.name for p in (tmp_path / "plots").iterdir()}
    assert names == {f"{n}.svg" for n in ("error", "bits", "scales", "outliers", "activation-error", "activation-outliers")}
    assert "model.<wbr>layers.<wbr>0.<wbr>mlp" in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize("given", [["--activations"], ["--data", "x.txt"]])
def test_activations_and_data_go_together(made: tuple[Path, Path], given: list[str]) -> None:
    assert run(["inspect", str(made[0]), *given]) == 2


def test_terminal_markup_in_names_is_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = checkpoints.llama(tmp_path / "m", change={"a[red]b.weight": torch.ones(64, 64)})
    assert run(["inspect", str(model), "--all", "-q"]) == 0
    assert "a[red]b" in capsys.readouterr().out
