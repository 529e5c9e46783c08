"""Data-free apply over the zoo: outputs open, and compute what their values in a float model compute."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import zoo
from safetensors.torch import load_file, save_file
from transformers.pytorch_utils import Conv1D

import quantplan
from quantplan.algorithm import BlockProblem
from quantplan.algorithms.autoround import AutoRound
from quantplan.checkpoint.reader import TensorReader
from quantplan.engine import moments
from quantplan.engine.apply import apply, prepare
from quantplan.engine.verify import verify
from quantplan.errors import QuantplanError
from quantplan.evaluation.layers import OutputErrors
from quantplan.headers import TensorInfo, read_checkpoint
from quantplan.live.skeleton import model_class
from quantplan.models.modules import find_modules, module_of
from quantplan.nn.linear import QuantLinear
from quantplan.plan.load import load_plan
from quantplan.plan.resolve import resolve
from quantplan.training.settings import Training
from quantplan.training.student import student_of
from quantplan.training.trained import Started

transformers.logging.set_verbosity_error()

SCHEMES: dict[str, Any] = {
    "int8": {"scheme": "int8", "granularity": "channel"},
    "int4": {"scheme": "int4", "group_size": 16, "symmetric": False},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("zoo")


def float_model(path: Path) -> Any:
    return model_class(read_checkpoint(path).config).from_pretrained(path, dtype=torch.float32).eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(**zoo.inputs(model)).logits
    return found


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", zoo.ZOO)
def test_an_output_computes_what_its_values_compute(folder: Path, tmp_path: Path, name: str, scheme: str) -> None:
    path, out = zoo.build(name, folder), tmp_path / "out"
    narrow = {"pattern": "*.dt_proj", "wq": SCHEMES["int8"], "optional": True}  # 4 columns in mamba
    plan = {"default": {"wq": SCHEMES[scheme]}, "overrides": [narrow], "output": {"format": zoo.output_format(name)}}
    report = apply(path, plan, out)
    assert len(report.resolution.quantized) >= 8
    expected = logits(zoo.fake_quantized(path, out, report))
    found = logits(quantplan.load(out, dtype=torch.float32).eval())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    assert not torch.equal(expected, logits(float_model(path)))


# Conv1D, which stores [in, out]


def native(scheme: Any = "int8", **more: Any) -> dict[str, Any]:
    return {"default": {"wq": SCHEMES[scheme], **more}, "output": {"format": "quantplan"}}


def test_conv1d_is_refused_where_no_reader_finds_it(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(QuantplanError, match=r"QP115 .*Conv1D.*output: \{format: quantplan\}.*, in 12 modules") as caught:
        apply(zoo.build("gpt2", folder), {"default": {"wq": "int8"}}, tmp_path / "out")
    assert [p.code for p in caught.value.problems] == ["QP115"]


@pytest.mark.parametrize("algorithm", ["rtn", "gptq", "autoround"])
def test_rows_of_a_conv1d_are_its_outputs(folder: Path, tmp_path: Path, algorithm: str) -> None:
    """Also of a square one: what is stored is the transposed matrix, rounded by rows of it."""
    path = zoo.build("gpt2", folder)
    save_file({"input_ids": torch.randint(3, 120, (6, 24))}, tmp_path / "ids.safetensors")
    calibration = {"source": str(tmp_path / "ids.safetensors"), "samples": 6}
    report = apply(path, {**native(algorithm=algorithm), "calibration": calibration}, tmp_path / "out")
    source = load_file(path / "model.safetensors")
    for name, value in zoo.decoded(tmp_path / "out", report).items():
        weight = source[f"{name}.weight"].t()
        assert value.shape == weight.shape
        step = weight.abs().amax(1, keepdim=True) / 127
        off = (value - weight).abs() / step
        assert float(off.max()) < (0.52 if algorithm == "rtn" else 8)
    assert source["transformer.h.0.attn.c_proj.weight"].shape == (64, 64)
    assert verify(tmp_path / "out", path).ok


def test_autoround_tunes_conv1d(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The block is run with the matrices handed to it, and those are the float model's."""
    path, seen = zoo.build("gpt2", folder), []
    source, real = load_file(path / "model.safetensors"), AutoRound.tune

    def tune(self: AutoRound, problem: BlockProblem) -> Any:
        for name, weight in problem.weights.items():
            assert torch.equal(weight, source[f"{name}.weight"].t())
        if not seen:  # what goes into later blocks has come through quantized ones
            assert problem.loss(0, problem.weights) < 1e-8
        seen.extend(problem.weights)
        return real(self, problem)

    monkeypatch.setattr(AutoRound, "tune", tune)
    monkeypatch.setattr(moments, "fast_dtype", lambda: torch.float32)
    save_file({"input_ids": torch.randint(3, 120, (6, 24))}, tmp_path / "ids.safetensors")
    plan = native(algorithm={"name": "autoround", "start": "rtn"}) | {
        "calibration": {"source": str(tmp_path / "ids.safetensors"), "samples": 6}
    }
    apply(path, plan, tmp_path / "out")
    assert len(seen) == 12


def test_conv1d_comes_back_when_it_is_dequantized_and_saved(folder: Path, tmp_path: Path) -> None:
    path = zoo.build("gpt2", folder)
    apply(path, native("int4"), tmp_path / "out")
    model = quantplan.load(tmp_path / "out", dtype=torch.float32).eval()
    assert isinstance(model.transformer.h[0].attn.c_attn, QuantLinear)
    expected = logits(model)
    model.save_pretrained(tmp_path / "again")
    torch.testing.assert_close(logits(quantplan.load(tmp_path / "again", dtype=torch.float32).eval()), expected)
    model.dequantize()
    assert isinstance(model.transformer.h[0].attn.c_attn, Conv1D)
    model.save_pretrained(tmp_path / "dense")
    torch.testing.assert_close(logits(float_model(tmp_path / "dense")), expected, rtol=1e-4, atol=1e-5)


def test_conv1d_is_known_by_model_and_name(folder: Path) -> None:
    modules = find_modules(read_checkpoint(zoo.build("gpt2", folder)))
    assert {n.rpartition(".")[2] for n, m in modules.items() if m.conv1d} == {"c_attn", "c_proj", "c_fc"}
    wide = TensorInfo("decoder.transformer.h.0.attn.c_attn.weight", "F32", (64, 192))
    for config in ({"model_type": "gpt2"}, {"model_type": "encoder-decoder", "decoder": {"model_type": "gpt2"}}):
        module = module_of(wide, config)
        assert module is not None and (module.matrices[0].rows, module.columns) == (192, 64)
    module = module_of(wide, {"model_type": "gpt_bigcode"})  # linears of the same name
    assert module is not None and not module.conv1d and module.columns == 192


def test_conv1d_is_trained_and_measured(folder: Path, tmp_path: Path) -> None:
    path = zoo.build("gpt2", folder)
    resolution = prepare(path, native("int4"))
    apply(path, native("int4"), tmp_path / "out")
    with TensorReader(tmp_path / "out", read_checkpoint(tmp_path / "out").tensors) as reader:
        settings, teacher = Training(recipe="weights"), float_model(path)
        student = student_of(resolution, Started(resolution, reader), teacher, settings, False)
    assert len(student.layers) == 12
    opened = quantplan.load(tmp_path / "out", dtype=torch.float32).eval()
    torch.testing.assert_close(logits(student.model), logits(opened), rtol=1e-4, atol=1e-4)
    errors = OutputErrors(teacher, opened)
    with errors.watching():
        logits(teacher)
        logits(opened)
    assert sum(e.kind == "linear" and e.error > 0 for e in errors.result()) == 12


def test_a_plan_that_quantizes_nothing_names_the_rules_that_kept_everything(folder: Path) -> None:
    checkpoint = read_checkpoint(zoo.build("gpt2", folder))
    left = {n: t for n, t in checkpoint.tensors.items() if "c_" not in n}
    (problem,) = resolve(load_plan({"default": {"wq": "int8"}}), replace(checkpoint, tensors=left)).problems
    assert problem.code == "QP119" and "set default.wq" not in str(problem)
    assert "7 of them as 'not a matrix'" in problem.message and "2 of them as 'embeddings' (looked up" in problem.message
    assert "keep: false, as transformer.wpe" in problem.help
    (problem,) = resolve(load_plan({"default": {"wq": None, "aq": None}}), checkpoint).problems
    assert problem.message == "the plan quantizes nothing" and "default.wq" in problem.help
