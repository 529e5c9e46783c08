"""`calibrate` once, `apply --stats` with any plan: what is stored, what it is used for, and what is refused."""

from __future__ import annotations

import json
import math
import os
import shutil
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import transformers
import zoo
from checkpoints import tree
from safetensors.torch import load_file, save_file
from test_calibrated import IDS, OUTSIDE, hooked, starve, with_infinite_gain
from torch import Tensor
from typer.testing import CliRunner

import quantplan
import quantplan.estimate as estimating
from quantplan import statistics
from quantplan.algorithms.gptq import GPTQ
from quantplan.checkpoint import durable
from quantplan.checkpoint.layout import output_layout
from quantplan.cli.app import app
from quantplan.engine import batches, calibrated, collect, collected, memory, moments
from quantplan.engine.apply import apply, prepare
from quantplan.engine.collected import CollectedStatistics
from quantplan.engine.progress import Step
from quantplan.errors import QuantplanError
from quantplan.estimate import estimate
from quantplan.models.modules import Matrix
from quantplan.plan.schema import Calibration
from quantplan.scheme import SCHEMES
from quantplan.statistics import Statistics

transformers.logging.set_verbosity_error()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("collected")
    save_file({"input_ids": IDS}, made / "ids.safetensors")
    return made


@pytest.fixture(scope="module")
def stats(folder: Path) -> Path:
    """Of the zoo's llama."""
    collect.collect(zoo.build("llama", folder), settings(folder), folder / "stats")
    return folder / "stats"


def settings(folder: Path, **more: Any) -> dict[str, Any]:
    return {"calibration": {"source": str(folder / "ids.safetensors"), "samples": len(IDS), "skip_tokens": 0, **more}}


def plan(wq: str = "int4", algorithm: Any = "gptq", **more: Any) -> dict[str, Any]:
    return {
        "default": {"wq": {"scheme": wq, "granularity": "channel"}, "algorithm": algorithm},
        "overrides": [{"pattern": OUTSIDE, "algorithm": "rtn", "optional": True}],
        **more,
    }


@pytest.mark.parametrize("name", ["llama", "t5", "bert", "llava"])
def test_what_is_stored_is_what_hooks_see(folder: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moments, "fast_dtype", lambda: torch.float32)
    path = zoo.build(name, folder)
    made = collect.collect(path, settings(folder), tmp_path / "stats")
    document = json.loads((tmp_path / "stats/statistics.json").read_text())
    given, compared = hooked(path), 0
    for input_, entry in document["inputs"].items():
        tensors = load_file(tmp_path / "stats" / entry["file"])
        for matrix in entry["matrices"]:
            live = matrix.replace("language_model.model", "model.language_model")
            x = given.get(matrix, given.get(live))
            if x is None:
                continue
            scale = float(x.abs().max()) ** 2
            torch.testing.assert_close(tensors[f"{input_}.hessian"].double(), x.t() @ x / len(x), rtol=1e-3, atol=1e-4 * scale)
            torch.testing.assert_close(tensors[f"{input_}.absmax"].double(), x.abs().amax(0), rtol=1e-3, atol=1e-4)
            assert int(tensors[f"{input_}.count"]) == entry["count"] == len(x)
            compared += 1
    assert compared == made.matrices and made.inputs < made.matrices and made.tokens == IDS.numel()
    assert made.size == sum(p.stat().st_size for p in (tmp_path / "stats").iterdir())


def test_siblings_share_one_input(stats: Path) -> None:
    shared = [e["matrices"] for e in json.loads((stats / "statistics.json").read_text())["inputs"].values()]
    assert [len(m) for m in shared] == [3, 1, 2, 1] * 3
    found = CollectedStatistics(stats)
    q, k, o = (found.of(Matrix(f"model.layers.1.self_attn.{n}_proj", "", 64, 64)) for n in "qko")
    assert q is k and q is not o and q is not None and q.drift is None
    assert found.of(Matrix("lm_head", "", 64, 64)) is None and "lm_head" not in found


def test_any_plan_may_use_them(folder: Path, tmp_path: Path, stats: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrated, "solve_blocks", None)  # no model is run
    path, seen = zoo.build("llama", folder), []
    real = GPTQ.solve

    def solve(self: GPTQ, weight: Any, quantizer: Any, absmax: Any = None, statistics: Any = None) -> Any:
        seen.append(statistics)
        return real(self, weight, quantizer, absmax, statistics)

    monkeypatch.setattr(GPTQ, "solve", solve)
    for wq, algorithm in (
        ("int4", "gptq"),
        ("int3", {"name": "gptq", "damping": 0.1}),
        ("int4", {"name": "rtn", "search": "imatrix"}),
        ("int4", {"name": "rtn", "search": "hessian"}),
    ):
        seen.clear()
        out = tmp_path / f"out{len(os.listdir(tmp_path))}"
        report = apply(path, plan(wq, algorithm), out, statistics=stats)
        assert all(s is not None and s.drift is None for s in seen) and len(seen) == (0 if "rtn" in str(algorithm) else 21)
        assert report.written == report.estimate.output_bytes
        recorded = json.loads((out / "quantplan.json").read_text())["calibration"]
        assert recorded["source"] == "ids.safetensors" and recorded["sha256"] == CollectedStatistics(stats).data
        whole, loaded = zoo.fake_quantized(path, out, report), quantplan.load(out, dtype=torch.float32).eval()
        with torch.no_grad():
            torch.testing.assert_close(loaded(IDS).logits, whole(IDS).logits, rtol=1e-3, atol=1e-3)


def test_what_is_held_is_bounded_in_bytes(stats: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = CollectedStatistics(stats)
    asked = [Matrix(f"model.layers.{k}.{n}", "", 64, 64) for k in range(3) for n in ("self_attn.q_proj", "self_attn.o_proj")]
    size = 3 * 4 * 64**2

    def ask(matrix: Matrix) -> weakref.ref[Statistics]:
        given = found.of(matrix)
        assert given is not None
        given.factor(0.01, torch.arange(64))
        assert given.nbytes == size
        return weakref.ref(given)

    monkeypatch.setattr(collected, "HELD", 4 * size)
    alive = [r() is not None for r in [ask(m) for m in asked]]
    assert alive == [False, False, True, True, True, True]
    monkeypatch.setattr(collected, "HELD", 0)
    first = found.of(asked[0])
    references = [ask(m) for m in asked[1:]]
    assert [r() is not None for r in references] == [False, False, False, True, True]
    assert found.of(asked[0]) is first  # whatever is held, what somebody uses is not read again


def test_each_input_is_factorized_once(folder: Path, tmp_path: Path, stats: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, computed = statistics._inverse_factor, []
    monkeypatch.setattr(statistics, "_inverse_factor", lambda matrix: computed.append(len(matrix)) or real(matrix))
    for workers in (1, 4):
        computed.clear()
        apply(zoo.build("llama", folder), plan(), tmp_path / f"out{workers}", statistics=stats, workers=workers)
        assert len(computed) == 4 * 3


def test_the_estimate_counts_statistics(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def predicted(algorithm: str, workers: int) -> int:
        resolution = prepare(zoo.build("llama", folder), plan(algorithm=algorithm))
        resolution = replace(resolution, collected=Calibration())
        return estimate(resolution, output_layout(resolution), workers).peak_memory

    sizes = [3 * 4 * columns**2 for columns in (64, 64, 96, 64)]  # of q, o, down and gate, 3 blocks
    monkeypatch.setattr(estimating, "HELD", 1)
    least = predicted("gptq", 1) - predicted("rtn", 1)
    assert least == 3 * sizes[2]  # the two widest, and one that is computed
    assert predicted("gptq", 4) - predicted("rtn", 4) > least
    monkeypatch.setattr(estimating, "HELD", 1 << 40)
    everything = 3 * (sum(sizes) - sizes[1])  # o's columns are q's
    assert predicted("gptq", 1) - predicted("rtn", 1) == everything + sizes[2]


def test_matrices_are_solved_with_their_own_statistics(folder: Path, tmp_path: Path, stats: Path) -> None:
    path, out = zoo.build("llama", folder), tmp_path / "out"
    values = zoo.decoded(out, apply(path, plan("int3"), out, statistics=stats))
    weights, found = load_file(path / "model.safetensors"), CollectedStatistics(stats)
    quantizer = SCHEMES.get("int3")(granularity="channel").quantizer()
    for name in ("model.layers.2.mlp.down_proj", "model.layers.0.self_attn.v_proj"):
        weight = weights[f"{name}.weight"]
        statistics = found.of(Matrix(name, "", *weight.shape))
        assert torch.equal(values[name], quantizer.dequantize(GPTQ().solve(weight, quantizer, None, statistics)))


def test_the_bytes_do_not_depend_on_workers_and_runs_resume(folder: Path, tmp_path: Path, stats: Path) -> None:
    path = zoo.build("llama", folder)
    sharded = plan(output={"shard_size": 40_000})
    for workers in (1, 4):
        apply(path, sharded, tmp_path / f"out{workers}", statistics=stats, workers=workers)
    reference = tree(tmp_path / "out1")
    assert tree(tmp_path / "out4") == reference
    steps: list[Step] = []

    def stop(step: Step) -> None:
        steps.append(step)
        if len(steps) == 12:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        apply(path, sharded, tmp_path / "out", statistics=stats, on_step=stop)
    with pytest.raises(QuantplanError, match=r"QP502 .*calibration"):
        other = tmp_path / "other"
        collect.collect(path, settings(folder, samples=2), other)
        apply(path, sharded, tmp_path / "out", statistics=other)
    assert apply(path, sharded, tmp_path / "out", statistics=stats).reused_files
    assert tree(tmp_path / "out") == reference


def test_a_plan_that_needs_no_data_ignores_them(folder: Path, tmp_path: Path) -> None:
    apply(zoo.build("llama", folder), plan(algorithm="rtn"), tmp_path / "out", statistics=tmp_path / "nothing")
    assert (tmp_path / "out").exists()


def test_experts(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    starve(monkeypatch, 1)
    path = zoo.build("mixtral", folder)
    made = collect.collect(path, settings(folder), tmp_path / "stats")
    report = apply(path, plan(), tmp_path / "out", statistics=tmp_path / "stats")
    (note,) = [p for p in report.resolution.notes if p.code == "QP605"]
    assert "9 modules" in note.message and ".experts.1." in note.message
    every = collect.collect(path, settings(folder, all_experts=True), tmp_path / "every")
    assert every.matrices == made.matrices + 9
    document = json.loads((tmp_path / "every/statistics.json").read_text())
    assert {e["count"] for n, e in document["inputs"].items() if ".experts." in n} == {IDS.numel()}
    assert not apply(path, plan(), tmp_path / "out2", statistics=tmp_path / "every").resolution.notes


# static activations


def static(observer: Any, scheme: str = "int8", **more: Any) -> dict[str, Any]:
    made = plan("int8", "rtn", **more)
    made["default"]["aq"] = {"scheme": scheme, "dynamic": False, "observer": observer}
    made["overrides"][0]["aq"] = None
    return made


def scales(out: Path) -> dict[str, Tensor]:
    tensors = load_file(out / "model.safetensors")
    return {n: t for n, t in tensors.items() if n.endswith((".input_scale", ".input_global_scale"))}


@pytest.mark.parametrize("skip", [0, 1])
def test_static_ranges_are_those_of_the_observers(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, skip: int
) -> None:
    """In the first block's first matrices, which nothing quantized precedes, a run without statistics finds the same, bit for
    bit, whatever the observer; everywhere, the float model's hooks do."""
    monkeypatch.setattr(batches, "TOKENS", 48)
    if not skip:  # else in the processor's fast dtype
        monkeypatch.setattr(moments, "fast_dtype", lambda: torch.float32)
    path = zoo.build("llama", folder)
    collect.collect(path, settings(folder, skip_tokens=skip), tmp_path / "stats")
    given = hooked(path)
    observers: list[Any] = ["minmax", "static_range", "moving_average", "histogram", "mse", "percentile"]
    observers += [{"name": "percentile", "percentile": 99.0}, {"name": "histogram", "bits": 4}, {"name": "mse", "grid": 7}]
    for k, observer in enumerate(observers):
        chosen = static(observer, "fp8" if k % 3 == 2 else "int8")
        apply(path, chosen, tmp_path / f"with{k}", statistics=tmp_path / "stats")
        found = scales(tmp_path / f"with{k}")
        assert len(found) == 21 and all(t.numel() == 1 and t > 0 for t in found.values())
        live = {**chosen, **settings(folder, skip_tokens=skip)}
        live["overrides"] = [*chosen["overrides"], {"pattern": "model.layers.[12].*", "keep": True}]
        apply(path, live, tmp_path / f"live{k}")
        expected = scales(tmp_path / f"live{k}")
        for name in "qkv":
            at = f"model.layers.0.self_attn.{name}_proj.input_scale"
            assert torch.equal(found[at], expected[at]), (observer, at)
        if observer == "minmax" and not skip:
            for name, scale in found.items():
                absmax = given[name.removesuffix(".input_scale")].abs().max()
                torch.testing.assert_close(scale.double().reshape(()), absmax / 127.5, rtol=1e-2, atol=0)


def test_nvfp4_with_static_activations(folder: Path, tmp_path: Path, stats: Path) -> None:
    """Its observer, headroom, counts blocks; weights are fitted to the same statistics."""
    chosen = plan("nvfp4", "gptq")
    chosen["default"] = {"wq": "nvfp4", "aq": {"scheme": "nvfp4", "dynamic": False}, "algorithm": "gptq"}
    chosen["overrides"][0]["keep"] = True
    path = zoo.build("llama", folder)
    report = apply(path, chosen, tmp_path / "out", statistics=stats)
    live = apply(path, {**chosen, **settings(folder)}, tmp_path / "live")
    at = "model.layers.0.self_attn.q_proj.input_global_scale"
    assert torch.equal(scales(report.out)[at], scales(live.out)[at]) and report.written == report.estimate.output_bytes


def test_statistics_of_the_version_before(folder: Path, tmp_path: Path, stats: Path) -> None:
    """They serve what they have: second moments."""
    copy = Path(shutil.copytree(stats, tmp_path / "stats"))
    document = json.loads((copy / "statistics.json").read_text())
    for file in document["files"]:
        tensors = {n: t for n, t in load_file(copy / file).items() if n.rpartition(".")[2] in ("hessian", "absmax", "count")}
        tensors = {n: t for n, t in tensors.items() if not n.endswith("static_range.count")}
        save_file(tensors, copy / file)
        document["files"][file] = durable.hash_file(copy / file)
    del document["observers"]
    (copy / "statistics.json").write_text(json.dumps({**document, "quantplan_statistics": 1}))
    path = zoo.build("llama", folder)
    assert "earlier version" in refused("QP236", path, static("minmax"), tmp_path / "out", copy)
    for name, given in (("old", copy), ("new", stats)):
        apply(path, plan(), tmp_path / name, statistics=given)
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("old", "new")]
    assert all(torch.equal(t, weights[1][n]) for n, t in weights[0].items())


def test_infinite_inputs_are_refused(folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(zoo.build("llama", folder), tmp_path / "broken"))
    tensors = load_file(copy / "model.safetensors")
    tensors["model.layers.1.input_layernorm.weight"][3] = math.inf
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(QuantplanError, match=r"layers\.1\.self_attn.*QP601"):
        collect.collect(copy, settings(folder), tmp_path / "stats")
    assert not (tmp_path / "stats").exists()


# refusals


def test_all_experts_of_a_dense_model_is_refused_before_data_are_read(folder: Path, tmp_path: Path) -> None:
    nowhere = {"calibration": {"source": str(tmp_path / "none.safetensors"), "all_experts": True}}
    with pytest.raises(QuantplanError, match=r"QP224 .*no experts"):
        collect.collect(zoo.build("llama", folder), nowhere, tmp_path / "stats")
    assert not list(tmp_path.iterdir())


def refused(code: str, path: Path, plan: Any, out: Path, stats: Path) -> str:
    with pytest.raises(QuantplanError, match=code) as caught:
        apply(path, plan, out, statistics=stats)
    assert caught.value.problems[0].help and not out.exists()
    return str(caught.value)


def test_statistics_of_another_model(folder: Path, tmp_path: Path, stats: Path) -> None:
    assert "'llama'" in refused("QP235", zoo.build("mistral", folder), plan(), tmp_path / "out", stats)
    copy = tmp_path / "tuned"  # the same headers
    shutil.copytree(zoo.build("llama", folder), copy)
    tensors = load_file(copy / "model.safetensors")
    save_file({n: t * 1.001 for n, t in tensors.items()}, copy / "model.safetensors", {"format": "pt"})
    refused("QP235", copy, plan(), tmp_path / "out", stats)
    copied = shutil.copytree(zoo.build("llama", folder), tmp_path / "elsewhere")
    apply(copied, plan(), tmp_path / "out", statistics=stats)


@pytest.mark.parametrize("harm", ["gone", "rubbish", "other", "bit", "block gone", "a path"])
def test_statistics_that_cannot_be_read(folder: Path, tmp_path: Path, stats: Path, harm: str) -> None:
    copy = Path(shutil.copytree(stats, tmp_path / "stats"))
    document, block = copy / "statistics.json", copy / "block-00001.safetensors"
    if harm == "gone":
        document.unlink()
    elif harm == "rubbish":
        document.write_text("{")
    elif harm == "other":
        document.write_text(json.dumps({"quantplan_statistics": 3}))
    elif harm == "bit":
        data = block.read_bytes()
        block.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif harm == "block gone":
        block.unlink()
    else:
        document.write_text(document.read_text().replace("block-00001.safetensors", "../x.safetensors"))
    refused("QP234", zoo.build("llama", folder), plan(), tmp_path / "out", copy)


@pytest.mark.parametrize(("value", "code"), [(float("inf"), "QP601"), (-1e6, "QP604")])
def test_statistics_that_no_weight_can_be_fitted_to(folder: Path, tmp_path: Path, stats: Path, value: float, code: str) -> None:
    copy = Path(shutil.copytree(stats, tmp_path / "stats"))
    document = json.loads((copy / "statistics.json").read_text())
    name = "model.layers.1.mlp.down_proj"
    file = copy / document["inputs"][name]["file"]
    tensors = load_file(file)
    tensors[f"{name}.hessian"].fill_(0).fill_diagonal_(value)
    save_file(tensors, file)
    document["files"][file.name] = durable.hash_file(file)
    (copy / "statistics.json").write_text(json.dumps(document))
    shown = refused(code, zoo.build("llama", folder), plan(), tmp_path / "out", copy)
    assert f'tensor "{name}"' in shown and shown.startswith(str(copy))


def test_inputs_that_are_not_finite_are_not_collected(folder: Path, tmp_path: Path) -> None:
    path = with_infinite_gain(zoo.build("llama", folder), tmp_path / "broken")
    with pytest.raises(QuantplanError, match=r'broken: tensor "model\.layers\.1\.self_attn\.q_proj": QP601'):
        collect.collect(path, settings(folder), tmp_path / "stats")
    assert not (tmp_path / "stats").exists()


def test_what_statistics_cannot_serve(folder: Path, tmp_path: Path, stats: Path) -> None:
    path = zoo.build("llama", folder)
    smooth = plan("int8", transforms=["smoothquant"])
    smooth["default"]["aq"] = "int8"
    assert "smoothquant" in refused("QP236", path, smooth, tmp_path / "out", stats)
    for name in ("rotation", "awq", "bias_correction"):
        assert name in refused("QP236", path, plan("int4", "gptq", transforms=[name]), tmp_path / "out", stats)
    cached = plan(kv_cache="fp8")
    assert "key-value cache" in refused("QP236", path, cached, tmp_path / "out", stats)
    tuned = plan(algorithm={"name": "autoround", "iterations": 1})
    assert "autoround" in refused("QP236", path, tuned, tmp_path / "out", stats)
    coarse = static({"name": "histogram", "bins": 512})
    assert "bins: 512" in refused("QP236", path, coarse, tmp_path / "out", stats)
    slow = static({"name": "moving_average", "averaging_constant": 0.5})
    assert "averaging_constant: 0.5" in refused("QP236", path, slow, tmp_path / "out", stats)


def test_a_matrix_outside_of_the_blocks(folder: Path, tmp_path: Path) -> None:
    path = zoo.build("bert", folder)
    collect.collect(path, settings(folder), tmp_path / "stats")
    assert "cls.predictions" in refused("QP605", path, {**plan(), "overrides": []}, tmp_path / "out", tmp_path / "stats")


def test_the_folder_is_absent_or_whole(folder: Path, tmp_path: Path, stats: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, out = zoo.build("llama", folder), tmp_path / "made" / "stats"

    def stop(step: Step) -> None:
        if step.done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        collect.collect(path, settings(folder), out, on_step=stop)
    assert os.listdir(out.parent) == []
    (out.parent / ".stats.quantplan").mkdir()  # left by a kill
    (out.parent / ".stats.quantplan/block-00007.safetensors").write_text("old")
    collect.collect(path, settings(folder), out)
    assert os.listdir(out.parent) == ["stats"]
    assert tree(out) == tree(stats)
    with pytest.raises(QuantplanError, match="QP503"):
        collect.collect(path, settings(folder), out)
    with pytest.raises(QuantplanError, match="QP503"):
        collect.collect(path, settings(folder), path / "stats")
    assert tree(out) == tree(stats)


def test_hidden_states_on_disk(folder: Path, tmp_path: Path, stats: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where memory is short: the same statistics, and nothing that lies on disk is held in memory too."""
    spilled, real = [], memory.on_disk

    def on_disk(x: Tensor, at: Path) -> Tensor:
        assert not any(r() is not None for r in spilled)
        spilled.append(weakref.ref(x))
        return real(x, at)

    monkeypatch.setattr(memory, "room", lambda: 0)
    monkeypatch.setattr(memory, "on_disk", on_disk)
    collect.collect(zoo.build("llama", folder), settings(folder), tmp_path / "stats")
    assert len(spilled) == 4 and tree(tmp_path / "stats") == tree(stats)  # what goes into three blocks, and comes out


@pytest.mark.parametrize(("code", "disk", "memory"), [("QP401", 0, 1 << 40), ("QP404", 1 << 40, 0)])
def test_too_little_room(
    folder: Path, tmp_path: Path, stats: Path, monkeypatch: pytest.MonkeyPatch, code: str, disk: int, memory: int
) -> None:
    """Said before a block is run, of what is then written within 1 %."""
    free, available = shutil.disk_usage(tmp_path), psutil.virtual_memory()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free._replace(free=disk))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: available._replace(available=memory))
    steps: list[Step] = []
    with pytest.raises(QuantplanError, match=code) as caught:
        collect.collect(zoo.build("llama", folder), settings(folder), tmp_path / "stats", on_step=steps.append)
    assert not any(s.phase == "calibrating" for s in steps) and os.listdir(tmp_path) == []
    if code == "QP401":
        hessians = [4 * e["columns"] ** 2 for e in json.loads((stats / "statistics.json").read_text())["inputs"].values()]
        assert f" {sum(hessians) - 3 * min(hessians):,} bytes" in str(
            caught.value
        )  # o_proj's, with q_proj's columns, is not known


# the command line


def run(*arguments: str | Path) -> Any:
    return CliRunner().invoke(app, [str(a) for a in arguments])


def test_commands(folder: Path, tmp_path: Path, stats: Path) -> None:
    path, file = zoo.build("llama", folder), tmp_path / "plan.json"
    file.write_text(json.dumps({**plan(), **settings(folder)}))
    made = run("calibrate", path, file, "-o", tmp_path / "stats", "--json", "-q")
    assert made.exit_code == 0, made.output
    shown = json.loads(made.stdout)
    assert (shown["blocks"], shown["inputs"], shown["matrices"], shown["tokens"]) == (3, 12, 21, IDS.numel())
    assert tree(tmp_path / "stats") == tree(stats)
    applied = run("apply", path, file, "-o", tmp_path / "out", "--stats", tmp_path / "stats", "-q")
    assert applied.exit_code == 0, applied.output
    apply(path, file, tmp_path / "direct", statistics=stats)
    assert tree(tmp_path / "out") == tree(tmp_path / "direct")
    costs = [
        json.loads(run("apply", path, file, "-o", tmp_path / "x", "-n", "--json", *more).stdout)["peak_memory"]
        for more in ((), ("--stats", stats))
    ]
    assert costs[1] < costs[0]  # no model is run
    log = tmp_path / "events.jsonl"
    text = run("calibrate", path, file, "-o", tmp_path / "again", "-q", "--events", log)
    assert "144 tokens, 12 inputs of 21 matrices in 3 blocks" in text.stdout
    events = [json.loads(line) for line in log.read_text().splitlines()]
    blocks = [(e["name"], e["done"], e["total"]) for e in events if e["phase"] == "calibrating"]
    assert blocks == [(f"model.layers.{k}", k + 1, 3) for k in range(3)]
    assert [e["time"] for e in events] == sorted(e["time"] for e in events)
