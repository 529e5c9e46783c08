"""`quantplan apply` on the command line: its log of events, and code that a checkpoint brings."""

from __future__ import annotations

import json
import signal
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from checkpoints import llama, tree
from safetensors.torch import save_file

from quantplan import cli
from quantplan.cli import interrupt
from quantplan.engine import apply as engine

INT4 = {"default": {"wq": {"scheme": "int4", "group_size": 32}}, "output": {"shard_size": 30_000}}
IDS = torch.randint(3, 120, (4, 16), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(INT4))
    return path


@pytest.fixture
def calibrated(tmp_path: Path) -> Path:
    """A plan that takes data, beside them."""
    save_file({"input_ids": IDS}, tmp_path / "ids.safetensors")
    path = tmp_path / "gptq.json"
    rule = {"wq": {"scheme": "int4", "granularity": "channel"}, "algorithm": "gptq"}
    path.write_text(json.dumps({"default": rule, "calibration": {"source": "ids.safetensors", "samples": 4}}))
    return path


def run(*arguments: str | Path) -> int:
    return cli.run([str(a) for a in arguments])


def events(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


# events


def test_events_are_lines_of_json(tmp_path: Path, plan: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, log = llama(tmp_path / "model"), tmp_path / "events.jsonl"
    assert run("apply", model, plan, "-o", tmp_path / "out", "--events", log, "--json", "-q") == 0
    shown = json.loads(capsys.readouterr().out)
    found = events(log)
    assert {e["phase"] for e in found} == {"quantizing"}
    assert [set(e) for e in found] == [{"time", "phase", "name", "done", "total"}] * len(found)
    assert [e["done"] for e in found] == sorted(e["done"] for e in found)
    assert found[-1]["done"] == found[-1]["total"] == shown["source_bytes"]
    assert all(0 <= a["time"] <= b["time"] for a, b in pairwise(found))
    assert "model.layers.0.self_attn.q_proj" in {e["name"] for e in found}


def test_events_of_a_calibration(tmp_path: Path, calibrated: Path) -> None:
    model, log = zoo.build("llama", tmp_path), tmp_path / "events.jsonl"
    assert run("apply", model, calibrated, "-o", tmp_path / "out", "--events", log, "-q") == 0
    found = [e for e in events(log) if e["phase"] == "calibrating"]
    assert [(e["done"], e["total"], e["name"]) for e in found] == [(i + 1, 3, f"model.layers.{i}") for i in range(3)]
    for event in found:
        assert set(event) == {"time", "phase", "name", "done", "total", "losses", "seconds", "resumed", "memory_bytes"}
        assert len(event["losses"]) == 7 and all(0 < loss < 1 for loss in event["losses"].values())
        assert event["resumed"] is False and event["seconds"] > 0 and event["memory_bytes"] > 1 << 20


def test_a_resumed_run_appends(tmp_path: Path, calibrated: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, log, out = zoo.build("llama", tmp_path), tmp_path / "events.jsonl", tmp_path / "out"
    real = interrupt.Stop.check

    def check(self: interrupt.Stop, advice: str) -> None:
        if log.exists() and len(events(log)) == 2:
            self.number = signal.SIGTERM
        real(self, advice)

    monkeypatch.setattr(interrupt.Stop, "check", check)
    assert run("apply", model, calibrated, "-o", out, "--events", log, "-q") == 128 + signal.SIGTERM
    assert tree(out) is None
    assert [e["resumed"] for e in events(log)] == [False, False]
    monkeypatch.undo()
    assert run("apply", model, calibrated, "-o", out, "--events", log, "-q") == 0
    assert [e["resumed"] for e in events(log) if "resumed" in e] == [False, False, True, True, False]
    assert {e["phase"] for e in events(log)[5:]} == {"quantizing"}


def test_a_log_that_cannot_be_written(tmp_path: Path, plan: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = llama(tmp_path / "model")
    for log in (tmp_path / "nowhere" / "events.jsonl", tmp_path):
        assert run("apply", model, plan, "-o", tmp_path / "out", "--events", log, "-q") == 4
        assert "QP402" in capsys.readouterr().err
        assert not (tmp_path / "out").exists()


def test_a_bad_plan_leaves_no_event(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan, log = tmp_path / "plan.json", tmp_path / "events.jsonl"
    plan.write_text('{"default": {"wq": "int44"}}')
    assert run("apply", llama(tmp_path / "model"), plan, "-o", tmp_path / "out", "--events", log, "-q") == 3
    assert "QP107" in capsys.readouterr().err
    assert log.read_text() == ""


def test_errors_of_the_run_keep_their_names(tmp_path: Path, plan: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An error of the system inside of the run is not one of the log."""
    model, out = llama(tmp_path / "model"), tmp_path / "out"
    with pytest.MonkeyPatch.context() as monkeypatch:

        def broken(*arguments: Any, **options: Any) -> Any:
            raise OSError(5, "Input/output error")

        monkeypatch.setattr(engine, "apply", broken)
        assert run("apply", model, plan, "-o", out, "--events", tmp_path / "events.jsonl", "-q") == 70
    assert "QP402" not in capsys.readouterr().err


# code of a checkpoint


CODE = """
import pathlib
pathlib.Path(__file__).with_name("ran").touch()
from transformers import LlamaConfig, LlamaForCausalLM


class OwnConfig(LlamaConfig):
    model_type = "own"


class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A llama whose class is the checkpoint's own code."""
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    path = zoo.build("llama", tmp_path)
    config = json.loads((path / "config.json").read_text())
    auto = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    config |= {"model_type": "own", "architectures": ["OwnForCausalLM"], "auto_map": auto}
    (path / "config.json").write_text(json.dumps(config))
    (path / "modeling_own.py").write_text(CODE)
    return path


def ran(folder: Path) -> bool:
    return any(folder.rglob("ran"))


def test_no_code_runs_unless_it_is_trusted(
    own: Path, tmp_path: Path, calibrated: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("apply", own, calibrated, "-o", tmp_path / "out", "-q") == 3
    assert "QP222" in capsys.readouterr().err
    assert not ran(tmp_path) and not (tmp_path / "out").exists()
    assert run("apply", own, calibrated, "-o", tmp_path / "out", "--restart", "--trust-remote-code", "-q") == 0
    assert ran(tmp_path) and (tmp_path / "out/modeling_own.py").read_text() == CODE  # it runs once a process


def test_without_calibration_trust_makes_no_difference(own: Path, tmp_path: Path, plan: Path) -> None:
    assert run("apply", own, plan, "-o", tmp_path / "out", "-q") == 0
    assert run("apply", own, plan, "-o", tmp_path / "trusted", "--trust-remote-code", "-q") == 0
    assert not ran(tmp_path)
    assert tree(tmp_path / "out") == tree(tmp_path / "trusted")


def test_collecting_statistics_asks_for_trust_too(own: Path, tmp_path: Path, calibrated: Path) -> None:
    assert run("calibrate", own, calibrated, "-o", tmp_path / "stats", "-q") == 3
    assert not ran(tmp_path) and not (tmp_path / "stats").exists()
    assert run("calibrate", own, calibrated, "-o", tmp_path / "stats", "--trust-remote-code", "-q") == 0
