"""Transforms: the float function stays the same wherever they fit, and what they change is written, read and recorded."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import zoo
from safetensors.torch import load_file, save_file
from torch import Tensor

import quantplan
from quantplan.algorithm import ALGORITHMS
from quantplan.checkpoint.reader import TensorReader
from quantplan.engine.apply import apply, prepare
from quantplan.engine.progress import Step
from quantplan.engine.rewriting import Rewriting, rewritten
from quantplan.engine.scaling import Saw, Scaling
from quantplan.engine.verify import verify
from quantplan.errors import QuantplanError, render
from quantplan.headers import read_checkpoint
from quantplan.live.blocks import find_blocks
from quantplan.live.forward import Forward
from quantplan.live.probes import find_probes
from quantplan.live.skeleton import model_class, skeleton
from quantplan.live.watch import watching
from quantplan.live.weights import Weights
from quantplan.plan.resolve import Resolution
from quantplan.scheme import SCHEMES
from quantplan.statistics import Statistics
from quantplan.transform import TRANSFORMS, Channels, Inputs, Reader

transformers.logging.set_verbosity_error()

ALL = {"smoothquant": {"name": "smoothquant", "everywhere": True, "linear": True}}
TEXT = [n for n in zoo.ZOO if n not in ("whisper", "swin", "vit", "albert")]
NOT_ROTATED = {
    **{"gemma2": "what comes out of 'model.layers.0'", "gemma3": "what comes out of 'model.layers.0'"},
    **{"bloom": "its embedding", "t5": "an encoder-decoder", "marian": "an encoder-decoder"},
    **{"bert": "only models that continue a text", "llava": "only models that continue a text"},
}
WITH_BIASES = {"qwen2", "gpt-oss", "gpt-neox", "opt", "bloom", "mamba", "bert", "marian", "gpt2"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("transforms")
    generator = torch.Generator().manual_seed(0)
    save_file({"input_ids": torch.randint(3, 120, (8, 16), generator=generator)}, path / "ids.safetensors")
    return path


def plan_of(folder: Path, *transforms: Any, **more: Any) -> dict[str, Any]:
    return {
        "default": {"wq": "int8"},
        "transforms": list(transforms),
        "calibration": {"source": str(folder / "ids.safetensors"), "samples": 8, "sequence_length": 16},
        "output": {"format": "quantplan"},
        **more,
    }


def logits(path: Path, kind: Any) -> Tensor:
    model = kind.from_pretrained(path, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(**zoo.inputs(model)).logits


def kind_of(path: Path) -> Any:
    return model_class(read_checkpoint(path).config)


def off(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().amax() / expected.abs().amax())


@contextmanager
def opened(resolution: Resolution) -> Iterator[tuple[Forward, TensorReader, Weights]]:
    checkpoint = resolution.checkpoint
    with TensorReader(checkpoint.require_path(), checkpoint.tensors) as reader:
        model = skeleton(checkpoint.require_path(), dtype=torch.float32)
        weights = Weights(model, checkpoint)
        yield Forward(find_blocks(model), weights, reader), reader, weights


@pytest.mark.parametrize("name", TEXT)
@pytest.mark.parametrize("transform", [t.name for t in TRANSFORMS if t.scales])
def test_scaled_blocks_compute_the_same(folder: Path, name: str, transform: str) -> None:
    plan = plan_of(folder, ALL.get(transform, transform))
    resolution = prepare(zoo.build(name, folder), plan)
    treated = {m.name: a for a in resolution.quantized for m in a.matrices}
    scaled = 0
    with opened(resolution) as (forward, reader, weights):
        scaling = Scaling(resolution.transforms, treated, weights, forward.blocks, forward, reader, None)
        probes = find_probes(forward).of
        for at in forward.blocks.names:
            weights.load(at, reader)
            block = weights.model.get_submodule(at)
            _, several = probes[at]
            before = {n: p.clone() for n, p in block.named_parameters()}
            update = several.run(block)

            def run(seen: Saw, block: Any = block, several: Any = several, at: str = at) -> None:
                with watching(block, seen, at):
                    several.run(block)

            with torch.no_grad():
                changed = scaling(at, run)
            assert off(several.run(block), update) < 1e-4
            moved = {f"{at}.{n}" for n, p in block.named_parameters() if not torch.equal(p, before[n])}
            assert {t for n in moved for t, _ in weights.origins[n].tensors} <= changed.keys()
            for tensor, value in changed.items():  # what is stored and loaded again is what the block computes with
                if value is not None:
                    assert value.shape == resolution.checkpoint.tensors[tensor].shape
            scaled += len(moved)
            weights.release(at)
    assert scaled


@pytest.mark.parametrize("name", [n for n in TEXT if n not in NOT_ROTATED])
def test_a_rotated_model_computes_the_same(folder: Path, tmp_path: Path, name: str) -> None:
    path = zoo.build(name, folder)
    plan = plan_of(folder, "rotation")
    resolution = prepare(path, plan)
    with TensorReader(path, resolution.checkpoint.tensors) as plain:
        reader = rewritten(resolution, plain)
        made = {tensor: reader.read(tensor).contiguous() for tensor in resolution.checkpoint.tensors}
        matrix = next(m for a in resolution.quantized for m in a.matrices if m.tensor in reader.changed)
        whole = reader.read_rows(matrix, 0, matrix.rows)
        assert torch.equal(torch.cat([reader.read_rows(matrix, 0, 5), reader.read_rows(matrix, 5, matrix.rows)]), whole)
    save_file(made, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(dict(resolution.checkpoint.config)))
    kind = kind_of(path)
    assert off(logits(tmp_path, kind), logits(path, kind)) < 1e-4
    assert all(not torch.equal(made[t].float(), plain_tensor(path, t).float()) for t in reader.changed if "norm" not in t)


def plain_tensor(path: Path, name: str) -> Tensor:
    checkpoint = read_checkpoint(path)
    stored = {t: v for file in checkpoint.files for t, v in load_file(path / file).items()}
    return stored[name] if name in stored else torch.zeros(1)


@pytest.mark.parametrize("name", NOT_ROTATED)
def test_rotation_is_refused_before_anything_is_quantized(folder: Path, name: str) -> None:
    path = zoo.build(name, folder)
    steps: list[Step] = []
    with pytest.raises(QuantplanError, match=f"QP(122|226) .*{NOT_ROTATED[name]}"):
        apply(path, plan_of(folder, "rotation"), folder / f"{name}-refused", on_step=steps.append)
    assert not steps


@pytest.mark.parametrize("name", TEXT)
@pytest.mark.parametrize("transform", TRANSFORMS.names())
def test_the_output_computes_nearly_the_same(folder: Path, tmp_path: Path, name: str, transform: str) -> None:
    path = zoo.build(name, folder)
    plan = plan_of(folder, ALL.get(transform, transform))
    if transform == "rotation" and name in NOT_ROTATED:
        pytest.skip("refused")
    if transform == "bias_correction" and name not in WITH_BIASES:
        with pytest.raises(QuantplanError, match=r"QP226 .* finds no bias"):
            apply(path, plan, tmp_path / "out")
        return
    report = apply(path, plan, tmp_path / "out")
    assert report.written == report.estimate.output_bytes
    kind = kind_of(path)
    loaded = logits(tmp_path / "out", kind)
    flips = 0.3 if name in ("mixtral", "gpt-oss") else 0.0  # a token near the border goes to another expert
    assert off(loaded, logits(path, kind)) < (0.15 if name == "t5" else 0.06) + flips
    checked = verify(tmp_path / "out", path)
    assert checked.ok and checked.source_checked
    record = json.loads((tmp_path / "out" / "quantplan.json").read_text())["transforms"]
    assert [t["name"] for t in record["applied"]] == [transform] and "1" in record["changed"]
    assert len(record["changed"]) == checked.tensors


@pytest.mark.parametrize("transforms", [["smoothquant"], ["rotation", "awq"], ["bias_correction", "smoothquant"]])
def test_what_is_loaded_is_the_fake_quantized_reference(folder: Path, tmp_path: Path, transforms: list[str]) -> None:
    """An output's tensors, decoded one by one into a plain model, against transformers' own way of loading it."""
    path = zoo.build("qwen2", folder)
    plan = plan_of(folder, *transforms, default={"wq": "int4", "group_size": 32, "aq": "int8"})
    report = apply(path, plan, tmp_path / "out")
    kind = kind_of(path)
    whole = kind.from_pretrained(path, dtype=torch.float32).eval()
    if "rotation" in transforms:
        assert not whole.config.tie_word_embeddings
    stored = load_file(tmp_path / "out" / "model.safetensors")
    from quantplan.format import FORMATS

    native = FORMATS.get("quantplan")()
    with torch.no_grad():
        for name, value in stored.items():
            if name in dict(whole.named_parameters()):
                whole.get_parameter(name).copy_(value)
        for a in report.resolution.quantized:
            assert a.wq is not None and a.aq is not None
            decoded = native.decode(a.matrices[0], a.wq, a.aq, stored.__getitem__)
            module = whole.get_submodule(a.name)
            module.weight.copy_(a.wq.quantizer().dequantize(decoded))
            quantizer = a.aq.quantizer()
            module.register_forward_pre_hook(lambda _, x, quantizer=quantizer: (quantizer.fake_quantize(x[0]),))
        expected = whole(**zoo.inputs(whole)).logits
    assert off(logits(tmp_path / "out", kind), expected) < 1e-4


def test_smoothquant_factors_are_the_papers() -> None:
    torch.manual_seed(0)
    inputs = [torch.randn(50, 6) * torch.tensor([1, 10, 0.1, 3, 1, 0]) for _ in range(2)]
    weights = [torch.randn(4, 6), torch.randn(8, 6)]
    weights[0][:, 4] = weights[1][:, 4] = 0
    columns = torch.arange(6)
    readers = tuple(
        Reader(w, columns, Inputs(x.abs().amax(0), x.abs().mean(0)), None) for w, x in zip(weights, inputs, strict=True)
    )
    for alpha in (0.0, 0.5, 0.8, 1.0):
        found = TRANSFORMS.get("smoothquant").model_validate({"alpha": alpha}).factors(Channels("norm", 6, readers))
        assert found is not None
        for j in range(6):
            x = max(float(i[:, j].abs().max()) for i in inputs)
            w = max(float(v[:, j].abs().max()) for v in weights)
            expected = 1.0 if x == 0 or w == 0 else w ** (1 - alpha) / x**alpha
            assert float(found[j]) == pytest.approx(expected, rel=1e-5)


def test_channels_that_several_features_read_have_one_factor() -> None:
    weight, x = torch.tensor([[1.0, 2.0, 3.0, 4.0]]), torch.tensor([8.0, 1.0, 2.0, 16.0])
    reader = Reader(weight, torch.tensor([0, 1, 0, -1]), Inputs(x, x), None)
    found = TRANSFORMS.get("smoothquant")().factors(Channels("linear", 3, (reader,)))
    torch.testing.assert_close(found, torch.tensor([(3 / 8) ** 0.5, (2 / 1) ** 0.5, 1.0]))
    torch.testing.assert_close(reader.spread(torch.tensor([2.0, 3.0, 5.0])), torch.tensor([2.0, 3.0, 2.0, 1.0]))


def outliers(rows: int = 64, columns: int = 128) -> tuple[Tensor, Statistics]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(500, columns, generator=generator) * torch.rand(columns, generator=generator).mul(8).exp2()
    weight = torch.randn(rows, columns, generator=generator)
    return weight, Statistics(x.t() @ x / len(x), len(x))


def outputs_error(weight: Tensor, values: Tensor, statistics: Statistics) -> float:
    error = values - weight
    return float((error * (error @ statistics.hessian)).sum())


@pytest.mark.parametrize("scheme", [s.name for s in SCHEMES])
def test_awq_is_never_worse_than_rtn_on_its_own_objective(scheme: str) -> None:
    weight, statistics = outliers()
    quantizer = SCHEMES.get(scheme)().quantizer()
    rtn = quantizer.dequantize(ALGORITHMS.get("rtn")().solve(weight, quantizer))
    plain = quantizer.dequantize(ALGORITHMS.get("awq")().solve(weight, quantizer, None, statistics))
    assert outputs_error(weight, plain, statistics) <= outputs_error(weight, rtn, statistics)
    magnitude = statistics.hessian.diagonal().sqrt()
    reader = Reader(weight, torch.arange(128), Inputs(magnitude * 3, magnitude, statistics.hessian), quantizer)
    factors = TRANSFORMS.get("awq")().factors(Channels("norm", 128, (reader,)))
    if factors is None:
        return
    scaled = quantizer.fake_quantize(weight / factors) * factors
    assert outputs_error(weight, scaled, statistics) < outputs_error(weight, rtn, statistics)


def test_awq_scales_where_inputs_differ_and_not_where_they_are_alike() -> None:
    weight, _ = outliers()
    quantizer = SCHEMES.get("int4")().quantizer()
    even = Inputs(torch.ones(128), torch.ones(128), torch.eye(128))
    silent = Inputs(torch.zeros(128), torch.zeros(128), torch.zeros(128, 128))
    awq = TRANSFORMS.get("awq")()
    for inputs in (even, silent):
        assert awq.factors(Channels("norm", 128, (Reader(weight, torch.arange(128), inputs, quantizer),))) is None


def test_the_awq_algorithm_brings_its_transform_along(folder: Path) -> None:
    path = zoo.build("llama", folder)
    alone = prepare(path, plan_of(folder, default={"wq": "int4", "group_size": 32, "algorithm": "awq"}))
    assert [(t.name, t.where) for t in alone.transforms] == [("awq", "awq")]  # type: ignore[attr-defined]
    named = {"name": "awq", "steps": 4}
    listed = prepare(path, plan_of(folder, named, default={"wq": "int4", "group_size": 32, "algorithm": "awq"}))
    assert [(t.name, t.steps) for t in listed.transforms] == [("awq", 4)]  # type: ignore[attr-defined]
    assert not prepare(path, plan_of(folder)).transforms


@pytest.mark.parametrize("size", [64, 576, 1536, 9, 4096, 3584, 767])
@pytest.mark.parametrize("keeps_mean", [False, True])
def test_rotations_are_orthogonal_flat_and_seeded(size: int, keeps_mean: bool) -> None:
    if size > 1024 and keeps_mean:
        return
    from quantplan.transforms.rotation import orthogonal

    matrix = orthogonal(size, 3, keeps_mean)(torch.eye(size, dtype=torch.float64))
    torch.testing.assert_close(matrix @ matrix.t(), torch.eye(size, dtype=torch.float64), atol=1e-10, rtol=0)
    if keeps_mean:
        torch.testing.assert_close(matrix.sum(1), torch.ones(size, dtype=torch.float64), atol=1e-10, rtol=0)
    else:
        assert float(matrix.abs().amax()) <= 1.5 / size**0.5  # Hadamard's are 1, Hartley's at most the root of 2
    assert torch.equal(matrix, orthogonal(size, 3, keeps_mean)(torch.eye(size, dtype=torch.float64)))
    assert not torch.equal(matrix, orthogonal(size, 4, keeps_mean)(torch.eye(size, dtype=torch.float64)))


def test_a_rotated_model_has_a_head_of_its_own(folder: Path, tmp_path: Path) -> None:
    path = zoo.build("llama-tied", folder)
    apply(path, plan_of(folder, "rotation"), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert stored["lm_head.weight"].shape == stored["model.embed_tokens.weight"].shape
    assert not torch.equal(stored["lm_head.weight"], stored["model.embed_tokens.weight"])
    assert torch.equal(stored["model.norm.weight"], torch.ones(64))


def test_rotation_needs_no_data(folder: Path, tmp_path: Path) -> None:
    path = zoo.build("llama", folder)
    plan = {k: v for k, v in plan_of(folder, "rotation").items() if k != "calibration"}
    assert not prepare(path, plan).takes_data
    steps: list[Step] = []
    apply(path, plan, tmp_path / "out", on_step=steps.append)
    assert {s.phase for s in steps} == {"quantizing"}


def test_norms_keep_the_function_in_the_dtype_they_are_stored_in(folder: Path, tmp_path: Path) -> None:
    """Factors are such that gains are bfloat16 numbers: the norm's rounding is no error of the model's."""
    path = zoo.build("llama", tmp_path, torch.bfloat16)
    plan = plan_of(folder, {"name": "smoothquant", "everywhere": True}, default={"wq": "int8"})
    apply(path, plan, tmp_path / "out")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    source = load_file(path / "model.safetensors")
    name = "model.layers.0.input_layernorm.weight"
    assert stored[name].dtype == torch.bfloat16 and not torch.equal(stored[name], source[name])
    assert off(logits(tmp_path / "out", kind_of(path)), logits(path, kind_of(path))) < 0.06


def test_an_interrupted_run_ends_in_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    path = zoo.build("qwen2", folder)
    plan = plan_of(folder, "rotation", "smoothquant", "bias_correction", default={"wq": "int8", "aq": "int8"})
    apply(path, plan, tmp_path / "whole")

    class Stopped(Exception):
        pass

    def stop(step: Step) -> None:
        if (step.phase, step.done) == ("calibrating", 2):
            raise Stopped

    with pytest.raises(Stopped):
        apply(path, plan, tmp_path / "out", on_step=stop)
    again: list[Step] = []
    apply(path, plan, tmp_path / "out", on_step=again.append)
    assert any(s.block is not None and s.block.resumed for s in again)
    for name in ("model.safetensors", "config.json", "quantplan.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_bias_correction_restores_the_mean_of_outputs() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(100, 16) + 1, torch.randn(4, 16)
    quantized = weight.mul(2).round().div(2)
    gained = TRANSFORMS.get("bias_correction")().bias(weight, quantized, x.mean(0))
    torch.testing.assert_close((x @ quantized.t()).mean(0) + gained, (x @ weight.t()).mean(0), rtol=1e-4, atol=1e-4)


def test_what_a_transform_changed_is_not_called_corrupt_and_what_rots_is(folder: Path, tmp_path: Path) -> None:
    path, out = zoo.build("llama", folder), tmp_path / "out"
    apply(path, plan_of(folder, ALL["smoothquant"]), out)
    assert verify(out, path).ok
    info = read_checkpoint(out).tensors["model.layers.1.input_layernorm.weight"]
    with open(out / info.file, "r+b") as file:
        file.seek(info.start)
        byte = file.read(1)
        file.seek(info.start)
        file.write(bytes([byte[0] ^ 1]))
    assert [p.code for p in verify(out, path).problems] == ["QP801"]


def test_a_model_in_memory_takes_no_transforms(folder: Path) -> None:
    path = zoo.build("llama", folder)
    model = kind_of(path).from_pretrained(path)
    with pytest.raises(QuantplanError, match=r"QP122 .*'rotation'"):
        quantplan.quantize(model, plan_of(folder, "rotation"))


def test_a_norm_with_zeros_beside_a_bias_is_refused(folder: Path, tmp_path: Path) -> None:
    path = zoo.build("opt", tmp_path)
    stored = load_file(path / "model.safetensors")
    name = next(n for n in stored if n.endswith("0.final_layer_norm.weight"))
    stored[name][3] = 0
    save_file(stored, path / "model.safetensors", {"format": "pt"})
    resolution = prepare(path, plan_of(folder, "rotation"))
    with TensorReader(path, resolution.checkpoint.tensors) as reader, pytest.raises(QuantplanError, match=r"QP226 .*has zeros"):
        rewritten(resolution, reader)


def test_a_plan_without_rewriting_reads_as_it_is(folder: Path) -> None:
    resolution = prepare(zoo.build("llama", folder), plan_of(folder, ALL["smoothquant"]))
    with TensorReader(resolution.checkpoint.require_path(), resolution.checkpoint.tensors) as reader:
        assert rewritten(resolution, reader) is reader and not isinstance(reader, Rewriting)


@pytest.mark.parametrize("member", list(TRANSFORMS), ids=lambda m: m.name)
def test_members_say_what_they_do(member: Any) -> None:
    assert member.__doc__ and TRANSFORMS.get(member.name) is member
    assert sum((bool(member.scales), member.rewrites, member.corrects)) == 1
    assert all(f.description for f in member.plan_options().values())


def test_nothing_to_do_is_said(folder: Path) -> None:
    path = zoo.build("llama", folder)
    with pytest.raises(QuantplanError) as caught:
        prepare(path, plan_of(folder, {"name": "awq", "where": "awq"}))
    assert "QP122 transform 'awq' has nothing to do" in render(caught.value.problems[0])


def test_a_refusal_leaves_nothing_in_the_way_of_another_plan(folder: Path, tmp_path: Path) -> None:
    path = zoo.build("llama", folder)
    for transform in ("bias_correction", "smoothquant"):
        plan = plan_of(folder, transform, default={"wq": "int8", "aq": "int8"})
        if transform == "smoothquant":
            apply(path, plan, tmp_path / "out")
        else:
            with pytest.raises(QuantplanError, match="QP226"):
                apply(path, plan, tmp_path / "out")


def test_commands_tell_of_transforms(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from quantplan.cli import run

    path = str(zoo.build("llama-tied", folder))
    first, second = tmp_path / "a.yaml", tmp_path / "b.yaml"
    first.write_text("default: {wq: int4, group_size: 32, algorithm: awq}\n")
    second.write_text("default: {wq: int4, group_size: 32, algorithm: awq}\ntransforms: [{name: rotation, seed: 5}]\n")
    assert run(["explain", str(second), "--model", path]) == 0
    shown = capsys.readouterr().out
    assert "transform rotation (seed: 5), from the plan" in shown and "transform awq (where: awq), from an algorithm" in shown
    assert run(["diff", str(first), str(second), "--model", path]) == 0
    brought = "awq (where: awq), from an algorithm"
    assert f"transforms: {brought} → rotation (seed: 5), from the plan, {brought}" in capsys.readouterr().out
    assert run(["diff", str(second), str(first), "--model", path, "--json"]) == 0
    (change,) = json.loads(capsys.readouterr().out)["changes"]
    assert (change["module"], change["before"], change["after"]) == ("lm_head", "kept (output heads)", "tied")
    assert run(["transforms"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in TRANSFORMS.names())
    assert run(["transforms", "smoothquant", "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)["options"]) == {"alpha", "linear", "everywhere"}
