"""The plans people copy: each is valid, applies, is verified, and gives what its first line says."""

from __future__ import annotations

from pathlib import Path

import checkpoints
import pytest
import torch
import yaml
import zoo
from safetensors.torch import save_file

from quantplan.cli import run
from quantplan.engine.apply import apply
from quantplan.engine.verify import verify
from quantplan.explain import summary

CONFIGS = Path(__file__).parent.parent / "configs"
TREATMENTS = {
    "int4.yaml": {"int4 group 64"},
    "int8.yaml": {"int8 channel"},
    "w8a8.yaml": {"int8 channel, activations int8 token"},
    "fp8.yaml": {"fp8 channel, activations fp8 token"},
    "nvfp4.yaml": {"nvfp4 group 16"},
    "mxfp4.yaml": {"mxfp4 group 32"},
    "mixed.yaml": {"int4 group 64", "fp8 channel, activations fp8 token", "int8 channel"},
}


CALIBRATED = {"int4-gptq.yaml": {"int4 group 32, gptq"}}


def test_every_config_is_here() -> None:
    assert {p.name for p in CONFIGS.iterdir()} == {*TREATMENTS, *CALIBRATED, "seed.json", "plan.schema.json"}


@pytest.mark.parametrize("name", CALIBRATED)
def test_a_calibrated_config_applies(tmp_path: Path, name: str) -> None:
    model = zoo.build("llama", tmp_path / "model")
    assert run(["validate", str(CONFIGS / name)]) == 0
    save_file({"input_ids": torch.arange(96).view(4, 24) % 64}, tmp_path / "ids.safetensors")
    plan = yaml.safe_load((CONFIGS / name).read_text())
    plan["default"]["group_size"] = 32  # what divides so small a model
    plan["calibration"] = {"source": str(tmp_path / "ids.safetensors"), "samples": 4}
    report = apply(model, plan, tmp_path / "out")
    assert {summary(a) for a in report.resolution.quantized} == CALIBRATED[name]
    assert report.written == report.estimate.output_bytes


@pytest.mark.parametrize("name", TREATMENTS)
def test_a_config_applies(tmp_path: Path, name: str) -> None:
    model = checkpoints.llama(tmp_path / "model", tied=True)
    assert run(["validate", str(CONFIGS / name), "--model", str(model)]) == 0
    report = apply(model, CONFIGS / name, tmp_path / "out")
    assert {summary(a) for a in report.resolution.quantized} == TREATMENTS[name]
    assert verify(tmp_path / "out", model, CONFIGS / name).problems == ()
    assert report.written == report.estimate.output_bytes


def test_the_seeds_plan_applies_unchanged_to_a_model_with_its_names(tmp_path: Path) -> None:
    shapes = {f"model.layers.{i}.attention.{n}.weight": ("BF16", [64, 64]) for i in range(2) for n in ("wq", "wo")}
    shapes |= {f"model.layers.{i}.mlp.{n}.weight": ("BF16", [128, 64]) for i in range(2) for n in ("up", "gate_in")}
    shapes |= {"model.connector.weight": ("BF16", [64, 64])}
    import torch
    from safetensors.torch import save_file

    model = checkpoints.write(tmp_path / "model", {})
    save_file({name: torch.randn(shape).bfloat16() for name, (_, shape) in shapes.items()}, model / "model.safetensors")
    report = apply(model, CONFIGS / "seed.json", tmp_path / "out")
    treated = {a.name: summary(a) for a in report.resolution.quantized}
    assert treated["model.layers.0.attention.wq"] == "fp8 group 64, activations fp8 token"
    assert treated["model.layers.1.mlp.up"] == "int4 group 32, activations int8 token"
    assert treated["model.connector"] == "int8 group 32, activations int8 token"
    assert verify(tmp_path / "out", model).ok
