"""`apply` on tiny checkpoints: exact predictions, exact copies, and what goes wrong: bad numbers, sources that change, kills."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import namedtuple
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from checkpoints import SIDE_FILES, llama, tree
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from quantplan.checkpoint.layout import output_layout
from quantplan.checkpoint.reader import TensorReader
from quantplan.checkpoint.writer import CheckpointWriter, staging_of
from quantplan.engine import apply as module
from quantplan.engine.apply import apply, prepare
from quantplan.engine.progress import Step
from quantplan.errors import QuantplanError, render
from quantplan.format import FORMATS
from quantplan.headers import INDEX, read_checkpoint

INT4 = {"default": {"wq": {"scheme": "int4", "group_size": 32}}}
SHARDED = {**INT4, "output": {"shard_size": 30_000}}
Q = "model.layers.1.self_attn.q_proj"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llama(tmp_path_factory.mktemp("models") / "model", shards=2)


@pytest.fixture(scope="module")
def reference(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The tree that an undisturbed run of `SHARDED` on `model` makes."""
    out = tmp_path_factory.mktemp("reference") / "out"
    apply(model, SHARDED, out)
    found = tree(out)
    assert found is not None
    assert sum(name.endswith(".safetensors") for name in found) >= 4
    return found


def refused(code: str, model: Path, plan: Any, out: Path, *shown: str, **options: Any) -> QuantplanError:
    """Applies, which must be refused with `code` and every text of `shown`."""
    with pytest.raises(QuantplanError) as caught:
        apply(model, plan, out, **options)
    text = render(caught.value.problems[0])
    assert caught.value.problems[0].code == code, text
    for part in shown:
        assert part in text
    return caught.value


# what a run writes


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("plan", [INT4, SHARDED], ids=["one file", "shards"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_predictions_and_copies_are_exact(tmp_path: Path, tied: bool, shards: int, plan: dict[str, Any], dtype: str) -> None:
    model, out = llama(tmp_path / "model", tied, shards, dtype=dtype), tmp_path / "out"
    before = tree(model)
    report = apply(model, plan, out)
    assert tree(model) == before
    assert os.listdir(tmp_path) in (["model", "out"], ["out", "model"])
    assert report.written == report.estimate.output_bytes == sum(p.stat().st_size for p in out.rglob("*") if p.is_file())
    source, made = read_checkpoint(model), read_checkpoint(out)
    assert sum((out / name).stat().st_size for name in made.files) == report.estimate.tensor_bytes
    assert len(made.files) == report.estimate.files
    quantized = {a.module.tensor.name for a in report.resolution.quantized}
    assert len(quantized) == 14
    kept = source.tensors.keys() - quantized
    assert made.tensors.keys() >= kept
    assert not made.tensors.keys() & quantized
    with TensorReader(model, source.tensors) as old, TensorReader(out, made.tensors) as new:
        for name in kept:
            assert (made.tensors[name].dtype, made.tensors[name].shape) == (
                source.tensors[name].dtype,
                source.tensors[name].shape,
            )
            assert new.read_bytes(made.tensors[name]) == old.read_bytes(source.tensors[name])
    for name, data in SIDE_FILES.items():
        assert (out / name).read_bytes() == data
    written = json.loads((out / "config.json").read_text("utf-8"))
    assert {k: v for k, v in written.items() if k != "quantization_config"} == json.loads(
        (model / "config.json").read_text("utf-8")
    )


def test_every_byte_of_every_file_can_be_read_elsewhere(model: Path, tmp_path: Path) -> None:
    apply(model, SHARDED, tmp_path / "out")
    made = read_checkpoint(tmp_path / "out")
    listed = json.loads((tmp_path / "out" / INDEX).read_text())
    assert listed["weight_map"] == {name: info.file for name, info in made.tensors.items()}
    assert listed["metadata"]["total_size"] == made.size
    for file in made.files:
        with safe_open(tmp_path / "out" / file, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}
            assert set(opened.keys()) == {n for n, t in made.tensors.items() if t.file == file}
            for name in opened.keys():  # noqa: SIM118 - it is no dict
                assert tuple(opened.get_tensor(name).shape) == made.tensors[name].shape


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_the_bytes_do_not_depend_on_workers(model: Path, tmp_path: Path, reference: dict[str, str], workers: int) -> None:
    apply(model, SHARDED, tmp_path / "out", workers=workers)
    assert tree(tmp_path / "out") == reference


SCRIPT = """
import sys, time
from quantplan.engine.apply import apply
model, plan, out, pause = sys.argv[1:]
apply(model, plan, out, on_step=lambda step: time.sleep(float(pause)))
"""


def start(model: Path, plan: Path, out: Path, pause: float = 0, **environment: str) -> subprocess.Popen[str]:
    """A real run in a process of its own, which waits a little after each tensor."""
    command = [sys.executable, "-c", SCRIPT, str(model), str(plan), str(out), str(pause)]
    return subprocess.Popen(command, env={**os.environ, **environment}, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_the_bytes_do_not_depend_on_the_process(model: Path, tmp_path: Path, reference: dict[str, str]) -> None:
    plan = tmp_path / "plan.yaml"
    plan.write_text(json.dumps(SHARDED))
    settings: list[dict[str, str]] = [
        {"PYTHONHASHSEED": "0", "TZ": "Asia/Tokyo", "OMP_NUM_THREADS": "1"},
        {"PYTHONHASHSEED": "1", "LC_ALL": "C", "OMP_NUM_THREADS": "3"},
    ]
    running = [start(model, plan, tmp_path / f"out{i}", **environment) for i, environment in enumerate(settings)]
    for i, process in enumerate(running):
        assert process.communicate(timeout=120)[1] == ""
        assert tree(tmp_path / f"out{i}") == reference


def test_a_hub_snapshot_gives_the_same_weights(model: Path, tmp_path: Path, reference: dict[str, str]) -> None:
    import checkpoints

    files = {p.relative_to(model).as_posix(): p.read_bytes() for p in model.rglob("*") if p.is_file()}
    snapshot = checkpoints.hub_cache(tmp_path / "cache", files)
    before = tree(tmp_path / "cache")
    apply(snapshot, SHARDED, tmp_path / "out")
    found = tree(tmp_path / "out") or {}
    assert {n for n in reference if found.get(n) != reference[n]} == {"quantplan.json"}  # where the source's name is
    assert not any(p.is_symlink() for p in (tmp_path / "out").rglob("*"))
    assert tree(tmp_path / "cache") == before


# numbers


BAD = {"nan": float("nan"), "inf": float("inf"), "minus inf": float("-inf")}
SCHEMES = [
    "int4",
    "int8",
    "fp8",
    "nvfp4",
    "mxfp4",
    {"scheme": "int4", "symmetric": False},
    {"scheme": "int8", "granularity": "tensor"},
]


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("value", BAD)
def test_nan_and_infinity_are_refused(tmp_path: Path, scheme: Any, value: str) -> None:
    weight = torch.randn(64, 64).to(torch.bfloat16)
    weight[63, 5], weight[63, 63] = BAD[value], BAD[value]
    model, out = llama(tmp_path / "model", change={f"{Q}.weight": weight}), tmp_path / "out"
    shown = ["model.safetensors", f'tensor "{Q}.weight"', "2 of 4096 weights", "first at [63, 5]", "keep: true"]
    error = refused("QP601", model, {"default": {"wq": scheme}}, out, *shown)
    assert error.exit_status == 6
    assert tree(out) is None
    rest = {"default": {"wq": scheme}, "overrides": [{"pattern": "*.layers.1.self_attn.[qkv]_proj", "keep": True}]}
    refused("QP502", model, rest, out, "plan", "--restart")
    apply(model, rest, out, restart=True)
    copied = load_file(out / "model.safetensors")[f"{Q}.weight"]
    assert torch.equal(copied.view(torch.int16), weight.view(torch.int16))


def test_numbers_too_large_for_the_output(tmp_path: Path) -> None:
    norm = torch.ones(64, dtype=torch.bfloat16)
    norm[7] = 1e38
    model = llama(tmp_path / "model", change={"model.norm.weight": norm})
    plan = {**INT4, "output": {"dtype": "float16"}}
    refused("QP601", model, plan, tmp_path / "out", 'tensor "model.norm.weight"', "1 of 64 values are too large for float16")
    assert tree(tmp_path / "out") is None
    norm[7] = float("inf")  # it is infinite in the source: copied as it is
    save_file(
        {**load_file(model / "model.safetensors"), "model.norm.weight": norm}, model / "model.safetensors", {"format": "pt"}
    )
    apply(model, plan, tmp_path / "out", restart=True)
    assert load_file(tmp_path / "out/model.safetensors")["model.norm.weight"][7] == float("inf")


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_odd_numbers(tmp_path: Path, scheme: Any) -> None:
    """Zero groups, rows and matrices, denormals, negative zero, outliers: finite parameters, and zeros stay zero."""
    odd = torch.randn(64, 64)
    odd[0], odd[1, :32], odd[2], odd[3], odd[4, 0], odd[5] = 0, 0, 1e-40, -0.0, 3e38, 2.0**-130
    change = {f"{Q}.weight": odd.to(torch.bfloat16), f"{Q.replace('q_', 'o_')}.weight": torch.zeros(64, 64, dtype=torch.bfloat16)}
    model = llama(tmp_path / "model", change=change)
    report = apply(model, {"default": {"wq": scheme}}, tmp_path / "out")
    made = read_checkpoint(tmp_path / "out")
    output = FORMATS.get("compressed-tensors")()
    with TensorReader(tmp_path / "out", made.tensors) as reader:
        for assignment in report.resolution.quantized:
            for matrix in assignment.matrices:
                assert assignment.wq is not None
                stored = output.decode(matrix, assignment.wq, assignment.aq, reader.read)
                assert all(torch.isfinite(p.float()).all() for p in stored.params.values()), matrix.name
                restored = assignment.wq.quantizer().dequantize(stored)
                assert torch.isfinite(restored).all()
                if matrix.name == Q:
                    assert not restored[0].any()
                    assert not restored[3].any()
                if matrix.name == Q.replace("q_", "o_"):
                    assert not restored.any()


# a source that changes or cannot be taken


def at_step(number: int, action: Any) -> Any:
    """`on_step` that acts once."""
    steps: list[Step] = []

    def on_step(step: Step) -> None:
        steps.append(step)
        if len(steps) == number:
            action()

    return on_step


def test_a_source_cut_short_while_it_is_read(tmp_path: Path) -> None:
    model, out = llama(tmp_path / "model", shards=3), tmp_path / "out"
    victim = model / "model-00003-of-00003.safetensors"
    cut = at_step(1, lambda: os.truncate(victim, victim.stat().st_size // 2))
    error = refused("QP210", model, INT4, out, victim.name, 'tensor "', workers=1, on_step=cut)
    assert error.exit_status == 3
    assert tree(out) is None


def test_a_source_rewritten_while_it_is_read(tmp_path: Path) -> None:
    model, out = llama(tmp_path / "model", shards=3), tmp_path / "out"
    victim = model / "model-00002-of-00003.safetensors"

    def replace() -> None:
        data = victim.read_bytes()
        victim.unlink()
        victim.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))

    refused("QP210", model, INT4, out, victim.name, "--restart", on_step=at_step(5, replace))
    assert tree(out) is None
    refused("QP502", model, INT4, out)
    apply(model, INT4, out, restart=True)
    assert tree(out) is not None


def test_a_source_removed_while_it_is_read(tmp_path: Path) -> None:
    model, out = llama(tmp_path / "model", shards=3), tmp_path / "out"
    victim = model / "model-00003-of-00003.safetensors"
    refused("QP202", model, INT4, out, victim.name, workers=1, on_step=at_step(1, victim.unlink))
    assert tree(out) is None


def test_a_disk_that_cannot_read(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = os.preadv, []

    def preadv(*arguments: Any) -> int:
        calls.append(arguments)
        if len(calls) == 9:
            raise OSError(5, "Input/output error")
        return real(*arguments)

    monkeypatch.setattr(os, "preadv", preadv)
    refused("QP202", model, INT4, tmp_path / "out", "safetensors", 'tensor "', "Input/output error")
    monkeypatch.undo()
    apply(model, INT4, tmp_path / "out")


@pytest.mark.parametrize("where", ["model", "model/out", "model/sub/out", ".", "alias", "alias/out"])
def test_an_output_in_or_around_the_model(tmp_path: Path, where: str) -> None:
    model = llama(tmp_path / "around" / "model")
    (tmp_path / "around" / "alias").symlink_to("model")
    before = tree(tmp_path)
    for overwrite in (False, True):
        error = refused("QP503", model, INT4, tmp_path / "around" / where, "lie in one another", overwrite=overwrite)
        assert error.exit_status == 5
    assert tree(tmp_path) == before


def test_side_files_that_stay_behind(tmp_path: Path) -> None:
    model, out = llama(tmp_path / "model"), tmp_path / "out"
    behind = ["pytorch_model.bin", "x.gguf", "old.pth", ".git/config", "original/params.json", "pytorch_model.bin.index.json"]
    behind += ["consolidated.safetensors", "consolidated.safetensors.index.json", "sub/model-00001-of-00001.safetensors"]
    for name in behind:
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).write_bytes(b"x")
    (model / "linked.txt").symlink_to("LICENSE")
    apply(model, INT4, out)
    found = {n for n, kind in (tree(out) or {}).items() if kind != "folder"}
    assert found == {*SIDE_FILES, "linked.txt", "model.safetensors", "config.json", "quantplan.json"}
    assert not (out / "linked.txt").is_symlink()


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", ["pipe", "link out", "dangling", "loop", "link to a folder", "link to its own folder"])
def test_side_files_that_are_refused(tmp_path: Path, kind: str) -> None:
    model = llama(tmp_path / "model")
    victim = model / "sub" / "victim"
    victim.parent.mkdir()
    (tmp_path / "outside").write_bytes(b"secret")
    if kind == "pipe":
        os.mkfifo(victim)
    else:
        target = {
            "link out": "../../outside",
            "dangling": "nothing",
            "loop": "victim",
            "link to a folder": "../additional_chat_templates",
        }
        victim.symlink_to(target.get(kind, "."))
    refused("QP303", model, INT4, tmp_path / "out", "victim")
    assert sorted(os.listdir(tmp_path)) == ["model", "outside"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_side_file_without_permission(tmp_path: Path) -> None:
    model = llama(tmp_path / "model")
    (model / "tokenizer.json").chmod(0)
    refused("QP202", model, INT4, tmp_path / "out", "tokenizer.json")
    assert os.listdir(tmp_path) == ["model"]


def test_odd_configs_are_kept_and_private_keys_dropped(tmp_path: Path) -> None:
    model = llama(tmp_path / "model")
    config = json.loads((model / "config.json").read_text("utf-8"))
    odd = {"text": "\u4e2d\U0001f600", "half": "\ud800", "limits": [0.0, float("inf")], "none": None, "none?": float("nan")}
    code = {"auto_map": {"AutoModel": "modeling_x.X"}, "trust_remote_code": True, "_attn_implementation_internal": "org/kernel"}
    (model / "config.json").write_text(json.dumps({**config, **odd, **code}))
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        apply(model, SHARDED, out, on_step=at_step(25, interrupt))
    assert apply(model, SHARDED, out).reused_files > 0
    written = json.loads((out / "config.json").read_text("utf-8"))
    assert written.pop("none?") != 0
    del odd["none?"]
    assert {k: written[k] for k in odd} == odd
    assert written["auto_map"] == code["auto_map"]
    assert not written.keys() & {"trust_remote_code", "_attn_implementation_internal"}


def test_a_tensor_the_source_has_already(tmp_path: Path) -> None:
    taken = f"{Q}.weight_scale"
    model = llama(tmp_path / "model", change={taken: torch.ones(64, 2)})
    refused("QP207", model, INT4, tmp_path / "out", "model.safetensors", f'tensor "{taken}"', f"quantizing {Q} makes it too")
    assert os.listdir(tmp_path) == ["model"]


# the environment


def test_too_little_disk_is_seen_before_anything_is_written(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, 1000))
    error = refused("QP401", model, INT4, tmp_path / "new" / "out", str(tmp_path), "1,000 are free")
    assert error.exit_status == 4
    assert os.listdir(tmp_path) == []


def test_what_an_interrupted_run_wrote_is_not_needed_again(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        apply(model, SHARDED, out, on_step=at_step(28, interrupt))
    needed = module.prepare(model, SHARDED)
    from quantplan.checkpoint.layout import output_layout
    from quantplan.estimate import estimate

    free = estimate(needed, output_layout(needed), 1).output_bytes // 2
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, free))
    refused("QP401", model, SHARDED, tmp_path / "another")
    assert apply(model, SHARDED, out).reused_files > 0


def test_too_little_memory_is_seen_before_anything_is_written(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = namedtuple("memory", "available")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory(1 << 20))
    refused("QP404", model, INT4, tmp_path / "out", "1,048,576 are available")
    assert os.listdir(tmp_path) == []


# interruption


def interrupt() -> None:
    raise KeyboardInterrupt


def steps_of(model: Path, plan: Any, out: Path) -> int:
    count: list[Step] = []
    apply(model, plan, out, on_step=count.append)
    return len(count)


def test_interrupted_after_every_step(model: Path, tmp_path: Path, reference: dict[str, str]) -> None:
    total, reused = steps_of(model, SHARDED, tmp_path / "count"), []
    for number in range(1, total + 1, 3):
        out = tmp_path / str(number) / "out"
        with pytest.raises(KeyboardInterrupt):
            apply(model, SHARDED, out, on_step=at_step(number, interrupt))
        assert tree(out) is None
        assert not [t for t in threading.enumerate() if t.name.startswith("quantplan")], "workers outlive the run"
        reused.append(apply(model, SHARDED, out).reused_files)
        assert tree(out) == reference
        assert os.listdir(out.parent) == ["out"]
    assert reused == sorted(reused)
    assert reused[0] < 2 < reused[-1]


def test_progress_of_a_resumed_run_goes_on(model: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        apply(model, SHARDED, tmp_path / "out", on_step=at_step(25, interrupt))
    steps: list[Step] = []
    apply(model, SHARDED, tmp_path / "out", on_step=steps.append)
    first = output_layout(prepare(model, SHARDED)).files[0].units[0]
    assert steps[0].done > first.source.size
    assert steps[-1].done == steps[-1].total
    assert [s.done for s in steps] == sorted(s.done for s in steps)


def test_errors_of_the_caller_stay_what_they_are(model: Path, tmp_path: Path) -> None:
    def broken() -> None:
        raise BrokenPipeError(32, "Broken pipe")

    with pytest.raises(BrokenPipeError):
        apply(model, INT4, tmp_path / "out", on_step=at_step(2, broken))
    assert tree(tmp_path / "out") is None


def test_overwriting(model: Path, tmp_path: Path, reference: dict[str, str]) -> None:
    out = tmp_path / "out"
    apply(model, INT4, out)
    before = tree(out)
    refused("QP503", model, SHARDED, out, "the output exists", "--overwrite")
    with pytest.raises(KeyboardInterrupt):
        apply(model, SHARDED, out, overwrite=True, on_step=at_step(20, interrupt))
    assert tree(out) == before
    report = apply(model, SHARDED, out, overwrite=True)
    assert tree(out) == reference
    assert report.written == report.estimate.output_bytes
    assert os.listdir(tmp_path) == ["out"]


def test_a_run_killed_when_it_was_over_is_taken_as_done(
    model: Path, tmp_path: Path, reference: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CheckpointWriter, "_discard_staging", lambda self: interrupt())
    with pytest.raises(KeyboardInterrupt):
        apply(model, SHARDED, tmp_path / "out")
    monkeypatch.undo()
    assert staging_of(tmp_path / "out").exists()
    steps: list[Step] = []
    report = apply(model, SHARDED, tmp_path / "out", on_step=steps.append)
    assert steps == []
    assert report.written == report.estimate.output_bytes
    assert tree(tmp_path / "out") == reference
    assert os.listdir(tmp_path) == ["out"]


# processes


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, str]]:
    """A checkpoint of 100 MB, a plan for it, and the reference tree."""
    folder = tmp_path_factory.mktemp("large")
    model = llama(folder / "model", hidden=768, layers=7, vocabulary=8192, shards=2)
    assert 90e6 < read_checkpoint(model).size < 120e6
    plan = folder / "plan.json"
    plan.write_text(json.dumps({**INT4, "output": {"shard_size": "4MB"}}))
    apply(model, plan, folder / "out")
    found = tree(folder / "out")
    assert found is not None
    return model, plan, found


def wait_for(process: subprocess.Popen[str], out: Path, made: str = "*") -> None:
    """Until the run in `process` has the lock and there is a file `made` in its staging directory, or it has ended."""
    lock, end = staging_of(out).with_name(f"{staging_of(out).name}.lock"), time.monotonic() + 120
    while process.poll() is None:
        try:
            if f"pid {process.pid} " in lock.read_text() and any(staging_of(out).glob(made)):
                return
        except FileNotFoundError:
            pass
        assert time.monotonic() < end
        time.sleep(0.002)


@pytest.mark.slow
def test_killed_twenty_times(large: tuple[Path, Path, dict[str, str]], tmp_path: Path) -> None:
    model, plan, reference = large
    out, chance = tmp_path / "out", random.Random(0)
    kills = reused = 0
    while kills < 20:
        process = start(model, plan, out, pause=0.01)
        wait_for(process, out, "*" if kills % 5 == 0 else "out/*.part")
        time.sleep(chance.random() * 0.8)
        process.kill()
        errors = process.communicate(timeout=120)[1]
        assert process.returncode in (0, -signal.SIGKILL), errors
        kills += process.returncode != 0
        found = tree(out)
        assert found in (None, reference)
        reused += (staging_of(out) / "journal.jsonl").exists()
        if found is not None:
            shutil.rmtree(out)
            shutil.rmtree(staging_of(out), ignore_errors=True)
    assert reused > 5
    apply(model, plan, out)  # whatever the last one left
    assert tree(out) == reference
    assert os.listdir(tmp_path) == ["out"]


def cli(*arguments: str | Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", "from quantplan.cli import main; main()", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_cleanly(large: tuple[Path, Path, dict[str, str]], tmp_path: Path, number: signal.Signals) -> None:
    model, plan, reference = large
    out = tmp_path / "out"
    process = cli("apply", model, plan, "-o", out, "--threads", "1")
    wait_for(process, out, "out/*00002-of-*")
    process.send_signal(number)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 128 + number, errors
    assert "interrupted" in errors
    assert "repeat the same command" in errors
    assert "Traceback" not in errors
    assert tree(out) is None
    assert not (tmp_path / ".out.quantplan.lock").exists()
    process = cli("apply", model, plan, "-o", out, "--json")
    shown, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert json.loads(shown)["reused_files"] > 0
    assert tree(out) == reference
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.slow
def test_two_commands_at_once(large: tuple[Path, Path, dict[str, str]], tmp_path: Path) -> None:
    model, plan, reference = large
    out = tmp_path / "out"
    first = start(model, plan, out, pause=0.1)
    wait_for(first, out)
    second = cli("apply", model, plan, "-o", out)
    _, errors = second.communicate(timeout=120)
    assert first.poll() is None, "the first has ended too early for this test"
    assert second.returncode == 5
    assert f"QP501 another run is writing this output (pid {first.pid} on " in errors
    first.send_signal(signal.SIGKILL)
    first.communicate(timeout=60)
    third = cli("apply", model, plan, "-o", out)
    assert third.communicate(timeout=120)[1].count("QP") == 0
    assert third.returncode == 0
    assert tree(out) == reference
