"""`train`: what it writes is what it measured, never worse than its start, the same after a stop and with two processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from test_nn import VARIANTS, named, scheme
from transformers import AutoModelForCausalLM
from worded import make_model

from quantplan import apply, cli, evaluate
from quantplan.engine.verify import verify
from quantplan.errors import QuantplanError
from quantplan.training import train as training
from quantplan.training.divergence import kl_divergence
from quantplan.training.settings import Training, training_settings
from quantplan.training.started import StartedQuantizer, inside
from quantplan.training.train import TrainReport, train
from quantplan.training.trainer import learning_rate, set_phase

INT3: dict[str, Any] = {"default": {"wq": {"scheme": "int3", "group_size": 16}}, "output": {"format": "quantplan"}}
PLANS: dict[str, dict[str, Any]] = {
    "int3": INT3,
    "int2 asymmetric": {**INT3, "default": {"wq": {"scheme": "int2", "group_size": 16, "symmetric": False}}},
    "nvfp4 W4A4": {**INT3, "default": {"wq": "nvfp4", "aq": "nvfp4"}},
    "mxfp4": {**INT3, "default": {"wq": "mxfp4"}},
    "int4 compressed-tensors": {"default": {"wq": {"scheme": "int4", "group_size": 16}}},
    "fp8 static": {
        "default": {"wq": "fp8", "aq": {"scheme": "fp8", "dynamic": False}},
        "calibration": {"source": "DATA", "samples": 8},
    },
}
HELD = 4
FAST: dict[str, Any] = {"steps": 8, "held_out": HELD, "samples": 40, "dtype": "float32", "evaluations": 4, "norms": True}


@pytest.fixture(autouse=True)
def reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """Quantized layers compute with the dequantized weight: kernels add up in another order."""
    monkeypatch.setenv("QUANTPLAN_KERNELS", "none")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("train") / "model", 0)


@pytest.fixture(scope="module")
def data(model: Path) -> Path:
    path = model.parent / "ids.safetensors"
    save_file({"input_ids": torch.randint(0, 64, (40, 16), generator=torch.Generator().manual_seed(0))}, path)
    return path


def tensors(out: Path) -> dict[str, torch.Tensor]:
    return {name: t.view(torch.uint8) for file in out.glob("*.safetensors") for name, t in load_file(file).items()}


def same(first: Path, second: Path) -> bool:
    a, b = tensors(first), tensors(second)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def trained(model: Path, plan: Any, out: Path, data: Path, **options: Any) -> TrainReport:
    named = {k: options.pop(k) for k in ("start", "resume", "restart", "overwrite") if k in options}
    done = train(model, plan, out, Training(**{**FAST, **options}), data=data, **named)
    assert done is not None
    return done


def held_out(data: Path) -> torch.Tensor:
    """The sequences that are judged: the last ones of the order in which they are read."""
    from quantplan.engine.apply import prepare

    resolution = prepare(data.parent / "model", INT3)
    found = training.read_data(resolution, Training(**FAST), data, False, lambda step: None)
    return found.input_ids[-HELD:]


@pytest.mark.parametrize("recipe", ["scales", "weights", "lsq", "standard", "progressive"])
@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_what_is_written_is_what_was_measured(plan: dict[str, Any], recipe: Any, model: Path, data: Path, tmp_path: Path) -> None:
    """The KL reported is that of the output, opened anew; and nothing else about it is unlike what `apply` writes."""
    plan = json.loads(json.dumps(plan).replace("DATA", str(data)))
    apply(model, plan, tmp_path / "start")
    # one sequence at a time, as `evaluate` has them: the scale that nvfp4 gives whole inputs is that of the batch
    options: dict[str, Any] = {"recipe": recipe, "learning_rate": 0.02, "batch_size": 1}
    done = trained(model, plan, tmp_path / "out", data, start=tmp_path / "start", **options)
    [before, after] = evaluate([tmp_path / "start", tmp_path / "out"], held_out(data), model)
    assert done.kl_start == pytest.approx(before.kl, rel=1e-4)
    assert done.kl == pytest.approx(after.kl, rel=1e-4)
    assert done.kl <= done.kl_start
    assert verify(tmp_path / "out", model, plan).ok
    assert tensors(tmp_path / "out").keys() == tensors(tmp_path / "start").keys()
    record = json.loads((tmp_path / "out" / "quantplan.json").read_text())
    assert record["training"]["settings"]["recipe"] == recipe and record["training"]["kl"]["step"] == done.best_step
    assert not (tmp_path / "out.training").exists()


@pytest.mark.parametrize("recipe", ["scales", "weights", "lsq"])
def test_training_helps(recipe: Any, model: Path, data: Path, tmp_path: Path) -> None:
    done = trained(model, INT3, tmp_path / "out", data, recipe=recipe, learning_rate=0.01, steps=40)
    assert done.kl < 0.9 * done.kl_start and done.best_step > 0 and len(done.history) == 5


def test_scales_leaves_the_codes(model: Path, data: Path, tmp_path: Path) -> None:
    apply(model, INT3, tmp_path / "start")
    done = trained(model, INT3, tmp_path / "out", data, start=tmp_path / "start", learning_rate=0.01, norms=False)
    before, after = tensors(tmp_path / "start"), tensors(tmp_path / "out")
    changed = {name.rpartition(".")[2] for name in before if not torch.equal(before[name], after[name])}
    assert done.best_step and changed == {"weight_scale"}


def test_output_of_the_standard_recipe_is_what_apply_makes_of_the_trained_weights(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "_tidy", lambda *_: None)
    done = trained(model, INT3, tmp_path / "out", data, recipe="standard", learning_rate=0.01, steps=40)
    assert done.best_step
    float_model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    state = load_file(tmp_path / "out.training" / "best.safetensors")
    assert not float_model.load_state_dict(state, strict=False).unexpected_keys
    float_model.save_pretrained(tmp_path / "trained")
    apply(tmp_path / "trained", INT3, tmp_path / "applied")
    assert same(tmp_path / "out", tmp_path / "applied")


@pytest.mark.parametrize("recipe", ["scales", "weights", "standard"])
def test_an_absurd_learning_rate_leaves_the_start(recipe: Any, model: Path, data: Path, tmp_path: Path) -> None:
    apply(model, INT3, tmp_path / "start")
    done = trained(model, INT3, tmp_path / "out", data, start=tmp_path / "start", recipe=recipe, learning_rate=1e6)
    assert done.best_step == 0 and done.kl == done.kl_start
    assert same(tmp_path / "start", tmp_path / "out")


@pytest.mark.parametrize("recipe", ["scales", "progressive"])
def test_resumed_is_uninterrupted(recipe: Any, model: Path, data: Path, tmp_path: Path) -> None:
    settings = Training(**{**FAST, "recipe": recipe, "learning_rate": 0.01})
    whole = train(model, INT3, tmp_path / "whole", settings, data=data)
    seen: list[int] = []

    def after_three() -> bool:
        seen.append(1)
        return len(seen) == 3

    assert train(model, INT3, tmp_path / "out", settings, data=data, stopped=after_three) is None
    assert not (tmp_path / "out").exists() and (tmp_path / "out.training" / "checkpoint-3").exists()
    with pytest.raises(QuantplanError, match=r"QP502.*interrupted training") as refused:
        train(model, INT3, tmp_path / "out", settings, data=data)
    assert "--resume" in str(refused.value)
    with pytest.raises(QuantplanError, match=r"QP502.*another plan"):
        train(model, INT3, tmp_path / "out", settings.model_copy(update={"seed": 1}), data=data, resume=True)
    resumed = train(model, INT3, tmp_path / "out", settings, data=data, resume=True)
    assert whole is not None and resumed is not None
    assert [list(h) for h in resumed.history] == [list(h) for h in whole.history]
    assert same(tmp_path / "whole", tmp_path / "out")


def test_two_processes_give_the_losses_of_one(model: Path, data: Path, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(json.dumps(INT3))
    options = {**{k: v for k, v in FAST.items() if k != "batch_size"}, "learning_rate": 0.01}
    (tmp_path / "config.json").write_text(json.dumps(options))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "QUANTPLAN_KERNELS": "none"}
    found = []
    for processes in (1, 2):
        out, log = tmp_path / f"out{processes}", tmp_path / f"log{processes}"
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m"]
        command = [*(launcher if processes > 1 else [sys.executable, "-m"]), "quantplan", "train", str(model)]
        command += [str(tmp_path / "plan.json"), "-o", str(out), "--data", str(data), "--config", str(tmp_path / "config.json")]
        command += ["--batch-size", str(4 // processes), "--events", str(log), "--json", "-q"]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        events = [json.loads(line).get("metrics", {}) for line in log.read_text().splitlines()]
        losses = [e["loss"] for e in events if "loss" in e]
        found.append((losses, json.loads(done.stdout)))
    (alone, one), (together, two) = found
    assert len(alone) == len(together) == 8
    assert together == pytest.approx(alone, rel=1e-4)
    assert [h["kl"] for h in two["history"]] == pytest.approx([h["kl"] for h in one["history"]], rel=1e-4)
    record = json.loads((tmp_path / "out2" / "quantplan.json").read_text())
    assert record["training"]["processes"] == 2
    assert verify(tmp_path / "out2", model).ok


def test_gradient_checkpointing_and_accumulation_change_nothing(model: Path, data: Path, tmp_path: Path) -> None:
    plain = trained(model, INT3, tmp_path / "a", data, learning_rate=0.01)
    again = trained(model, INT3, tmp_path / "b", data, learning_rate=0.01, gradient_checkpointing=True)
    parts = trained(model, INT3, tmp_path / "c", data, learning_rate=0.01, batch_size=2, gradient_accumulation=2)
    assert [k for _, k in again.history] == pytest.approx([k for _, k in plain.history], rel=1e-5)
    assert [k for _, k in parts.history] == pytest.approx([k for _, k in plain.history], rel=1e-3)


def test_the_command(model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "plan.json").write_text(json.dumps(INT3))
    (tmp_path / "config.yaml").write_text("dtype: float32\nheld_out: 4\nsamples: 40\n")
    command = ["train", str(model), str(tmp_path / "plan.json"), "-o", str(tmp_path / "out"), "--data", str(data)]
    assert cli.run([*command, "--steps", "2", "--config", str(tmp_path / "config.yaml"), "-q"]) == 0
    assert "held-out KL" in capsys.readouterr().out
    assert cli.run([*command, "--steps", "2", "-q"]) == 5
    assert "QP503" in capsys.readouterr().err
    (tmp_path / "bad.yaml").write_text("recipe: scales\nwarm_up: 0.1\nbatch_size: 0\n")
    assert cli.run([*command, "--config", str(tmp_path / "bad.yaml"), "--overwrite"]) == 3
    said = capsys.readouterr().err
    assert "bad.yaml:2:1: QP104" in said and "'warmup'" in said and "bad.yaml:3:13: QP105" in said
    assert cli.run([*command, "--recipe", "magic", "--overwrite"]) == 3
    assert "QP105" in capsys.readouterr().err
    assert cli.run([*command, "--report-to", "magic", "--overwrite"]) == 3
    assert "QP107" in capsys.readouterr().err


def test_interrupted_and_resumed_by_the_command(model: Path, data: Path, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(json.dumps(INT3))
    (tmp_path / "config.json").write_text(json.dumps({**FAST, "steps": 100}))
    command = [sys.executable, "-m", "quantplan", "train", str(model), str(tmp_path / "plan.json"), "-o", str(tmp_path / "out")]
    command += ["--data", str(data), "--config", str(tmp_path / "config.json"), "-q", "--events", str(tmp_path / "log")]
    running = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    while running.poll() is None and "loss" not in ((tmp_path / "log").read_text() if (tmp_path / "log").exists() else ""):
        time.sleep(0.1)
    running.send_signal(signal.SIGINT)
    assert "--resume" in running.communicate()[1] and running.returncode == 130
    assert not (tmp_path / "out").exists() and next((tmp_path / "out.training").glob("checkpoint-*"))
    assert subprocess.run([*command, "--resume"], capture_output=True, cwd=tmp_path).returncode == 0
    assert verify(tmp_path / "out", model).ok and not (tmp_path / "out.training").exists()


def test_refusals(model: Path, data: Path, tmp_path: Path) -> None:
    apply(model, INT3, tmp_path / "start")

    def refused(code: str, plan: Any = INT3, **options: Any) -> None:
        with pytest.raises(QuantplanError) as caught:
            trained(model, plan, tmp_path / "out", data, **options)
        assert caught.value.problems[0].code == code and not (tmp_path / "out").exists()

    refused("QP804", {"default": {"wq": "int4"}}, start=tmp_path / "start")
    refused("QP220", start=model)
    refused("QP230", held_out=39, samples=60, batch_size=4)
    refused("QP230", held_out=50, samples=60)
    refused("QP105", {**INT3, "transforms": ["rotation"]}, recipe="standard")
    with pytest.raises(ValueError, match="held_out"):
        Training(held_out=8, samples=8)


def test_without_accelerate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(QuantplanError, match=r"QP405.*accelerate") as refused:
        training.require_training(Training())
    assert "quantplan[train]" in str(refused.value)


@given(st.integers(1, 600), st.integers(2, 40), st.sampled_from([0.5, 1.0, 2.0]))
def test_divergence_is_torchs(count: int, vocabulary: int, temperature: float) -> None:
    generator = torch.Generator().manual_seed(count)
    logits, reference = torch.randn(2, count, vocabulary, generator=generator) * 3
    mine, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    found = kl_divergence(mine[None], reference[None], temperature)
    p, q = (torch.log_softmax(x / temperature, -1) for x in (reference, theirs))
    expected = torch.nn.functional.kl_div(q, p, log_target=True, reduction="batchmean") * temperature**2
    torch.testing.assert_close(found, expected)
    found.backward(), expected.backward()
    torch.testing.assert_close(mine.grad, theirs.grad)


@pytest.mark.parametrize("options", VARIANTS, ids=named)
def test_weights_inside_their_cells_round_to_the_start(options: dict[str, Any]) -> None:
    """Of codes that are not the nearest, too: those of another weight."""
    config = scheme(options)
    torch.manual_seed(0)
    weight = torch.randn(40, 192)
    start = config.quantizer().quantize(weight + 0.3 * torch.randn(40, 192))
    if options.get("rounding") == "stochastic":
        return
    latent = inside(weight, start)
    values = config.quantizer().dequantize(start)
    quantizer = StartedQuantizer(start, frozen=False, learnable=False)
    assert torch.equal(quantizer(latent), values)
    assert (latent - weight).abs().sum() <= (values - weight).abs().sum()  # nearer to the weight than the codes are
    frozen = StartedQuantizer(start, frozen=True, learnable=True)
    assert torch.equal(frozen(weight), values)
    solved = frozen.solve(weight)
    assert torch.equal(solved.codes, start.codes) and torch.equal(config.quantizer().dequantize(solved), values)


def test_gradient_of_a_learned_step_is_by_differences() -> None:
    config = scheme({"scheme": "int4", "group_size": 32, "scale_dtype": "float32"})
    torch.manual_seed(0)
    start = config.quantizer().quantize(torch.randn(8, 64))
    weight, counted = torch.randn(8, 64), torch.randn(8, 64)
    quantizer = StartedQuantizer(start, frozen=True, learnable=True)
    assert quantizer.change is not None
    (quantizer(weight) * counted).sum().backward()
    found = quantizer.change.grad
    assert found is not None
    for row, group in ((0, 0), (3, 1), (7, 0)):
        ends = []
        for move in (-1e-3, 1e-3):
            with torch.no_grad():
                quantizer.change[row, group] = move
                ends.append(float((quantizer(weight) * counted).sum()))
                quantizer.change[row, group] = 0.0
        assert float(found[row, group]) == pytest.approx((ends[1] - ends[0]) / 2e-3, rel=1e-2, abs=1e-2)


def test_phases_and_learning_rates() -> None:
    layers = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4))
    from quantplan.nn.fake_quantizer import FakeQuantizer

    fake = FakeQuantizer(scheme({"scheme": "int8"}))
    layers.append(fake)
    settings = Training(recipe="progressive", freeze_observers=0.9, freeze_batch_norm=0.8)
    seen = []
    for share in (0.0, 0.3, 0.5, 0.85, 0.95):
        set_phase(layers.train(), settings, share)
        seen.append((fake.fake_quant_enabled, fake.observer_enabled, layers[1].training))
    expected = [(False, False, True), (False, True, True), (True, True, True), (True, True, False), (True, False, False)]
    assert seen == expected
    rates = [learning_rate(Training(warmup=0.1), share) for share in (0, 0.05, 0.1, 0.55, 1)]
    assert rates == pytest.approx([0.01, 0.505, 1, 0.5, 0], abs=1e-9)
    assert learning_rate(Training(warmup=0, schedule="linear"), 0.25) == 0.75
    assert learning_rate(Training(warmup=0, schedule="constant"), 1.0) == 1


def test_settings_from_a_file_and_options_over_it(tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text('{"recipe": "lsq", "learning_rate": 0.5}')
    found = training_settings({"learning_rate": 0.25}, tmp_path / "t.json")
    assert (found.recipe, found.rate) == ("lsq", 0.25)
    (tmp_path / "t.json").write_text("[1]")
    with pytest.raises(QuantplanError, match="QP105"):
        training_settings({}, tmp_path / "t.json")


def test_metrics_go_to_tensorboard(model: Path, data: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trained(model, INT3, tmp_path / "out", data, report_to=["tensorboard"])
    assert [path.name for path in (tmp_path / "out.training").iterdir()] == ["runs"]
    events = EventAccumulator(str(next((tmp_path / "out.training" / "runs").iterdir())))
    events.Reload()
    assert len(events.Scalars("train/loss")) == 8 and len(events.Scalars("eval/loss")) == 4
