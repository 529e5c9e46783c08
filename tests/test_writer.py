"""The writer under fire. The invariant: after any fault OUT is absent, the old tree or the reference tree, and the same
command then ends in the reference tree, byte for byte. Torch-free: every fault happens in a forked child."""

from __future__ import annotations

import builtins
import errno
import hashlib
import json
import os
import resource
import shutil
import signal
import stat
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from checkpoints import sharded, tree, write

from quantplan.checkpoint import durable
from quantplan.checkpoint import writer as module
from quantplan.checkpoint.layout import OutputLayout, output_layout
from quantplan.checkpoint.writer import CheckpointWriter, staged_bytes, staging_of
from quantplan.engine.apply import prepare
from quantplan.errors import QuantplanError

PLAN = {"default": {"wq": "int4"}, "output": {"shard_size": 4000}}
SHAPES = {
    "one.safetensors": {"a.weight": ("BF16", [64, 64]), "norm.weight": ("BF16", [64]), "empty": ("F32", [0])},
    "two.safetensors": {"b.weight": ("BF16", [32, 64]), "c.weight": ("U8", [700])},
}
SIDE = {"tokenizer.json": b"{}", "sub/deep/x.jinja": b"{{ x }}", "none.txt": b""}
DOCUMENTS = {"model.safetensors.index.json": b"{}\n", "folder/record.json": b"[1]\n", "config.json": b'{"a": 1}\n'}
FINGERPRINT = {"plan": {"default": "int4"}, "versions": {"torch": "1"}, "config": {"eps": 1e-5, "nothing": float("nan")}}


@dataclass(frozen=True)
class Setting:
    """What a command takes, and the tree it makes."""

    layout: OutputLayout
    side_files: dict[str, Path]
    reference: dict[str, str]


def content(name: str, size: int) -> bytes:
    return hashlib.shake_256(name.encode()).digest(size)


def run(setting: Setting, out: Path, overwrite: bool = False, restart: bool = False, fingerprint: Any = FINGERPRINT) -> int:
    """What `apply` does, with made-up data. Returns how many files were taken over."""
    with CheckpointWriter(out, setting.layout, fingerprint, overwrite, restart) as writer:
        reused = writer.reused
        if not writer.already_published:
            for file in setting.layout.files:
                if not writer.is_done(file.name):
                    write_file(writer, file)
            writer.publish(setting.side_files, DOCUMENTS)
        return reused


def write_file(writer: CheckpointWriter, file: Any) -> None:
    for unit in file.units:
        for info in unit.outputs:
            data = content(info.name, info.size)
            writer.write_chunks(info, iter([data[:100], memoryview(data)[100:]]))


def make_setting(folder: Path) -> Setting:
    model, out = sharded(folder / "model", SHAPES, SIDE), folder / "reference"
    layout = output_layout(prepare(model, PLAN))
    assert len(layout.files) == 2
    side_files = {name: model / name for name in SIDE}
    run(Setting(layout, side_files, {}), out)
    reference = tree(out)
    assert reference is not None
    assert reference.keys() == {f.name for f in layout.files} | SIDE.keys() | DOCUMENTS.keys() | {"sub", "sub/deep", "folder"}
    return Setting(layout, side_files, reference)


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    return make_setting(tmp_path_factory.mktemp("setting"))


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here loses power: syncing would only take time. (What is synced when, one test checks.)"""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def test_a_quiet_run_leaves_nothing_but_the_output(setting: Setting, tmp_path: Path) -> None:
    run(setting, tmp_path / "new" / "parents" / "out")
    assert tree(tmp_path / "new/parents/out") == setting.reference
    assert os.listdir(tmp_path / "new/parents") == ["out"]


def test_what_is_written_is_where_the_layout_says(setting: Setting, tmp_path: Path) -> None:
    run(setting, tmp_path / "out")
    for file in setting.layout.files:
        data = (tmp_path / "out" / file.name).read_bytes()
        assert len(data) == file.size
        assert data.startswith(file.header)
        for unit in file.units:
            for info in unit.outputs:
                assert data[info.start : info.end] == content(info.name, info.size)


# faults

CALLS = [(os, name) for name in ("open", "pwrite", "fsync", "rename", "mkdir", "unlink", "rmdir", "posix_fallocate", "ftruncate")]
CALLS += [(durable, "rename"), (durable.shutil, "copyfileobj")]
DIED = 200


def in_a_child(action: Callable[[], object]) -> str:
    """How a forked child ended: `done` (or the text `action` returned), `killed`, or the code of its QuantplanError, or of a
    traceback, which no test expects."""
    read, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        ended = ""
        try:
            before = len(os.listdir("/proc/self/fd"))
            try:
                returned = action()
                ended = returned if isinstance(returned, str) else "done"
            except QuantplanError as error:
                ended = error.problems[0].code
            if len(os.listdir("/proc/self/fd")) != before:
                ended += " and left a file open"
        except BaseException:  # noqa: BLE001 - it must not reach pytest's copy in the child
            ended = traceback.format_exc()
        finally:
            os.write(write_end, ended.encode()[-4000:])
            os._exit(0)
    os.close(write_end)
    with open(read, "rb") as pipe:
        ended = pipe.read().decode()
    status = os.waitpid(child, 0)[1]
    return "killed" if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL else ended


def here(action: Callable[[], object]) -> str:
    """As `in_a_child`, in this process."""
    try:
        action()
        return "done"
    except QuantplanError as error:
        return error.problems[0].code


def at_call(number: int, strike: Callable[[], object], half: bool = False) -> Callable[[], bool]:
    """From now on in this process: `strike` instead of the `number`-th call that changes a file system. `half`: a write is
    half done by then. Returns what tells whether it came to that."""
    calls = 0

    def wrap(real: Callable[..., Any], halved: bool) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **keywords: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == number:
                if halved:
                    descriptor, data, at = arguments
                    real(descriptor, memoryview(data)[: len(data) // 2], at)
                strike()
            return real(*arguments, **keywords)

        return wrapped

    for owner, name in CALLS:
        setattr(owner, name, wrap(getattr(owner, name), half and name == "pwrite"))
    module.open = durable.open = wrap(builtins.open, False)  # type: ignore[attr-defined]
    return lambda: calls >= number


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def fault(number: int) -> Callable[[], object]:
    def strike() -> None:
        raise OSError(number, os.strerror(number))

    return strike


def no_exchange() -> None:
    """A file system without `renameat2`."""
    durable.rename = lambda *arguments: False  # type: ignore[assignment]


def nothing() -> None:
    pass


Prepare = Callable[[Path, Setting], None]


def absent(out: Path, setting: Setting) -> None:
    pass


def another(out: Path, setting: Setting) -> None:
    write(out, {"model.safetensors": b"old", "old/file": b"old"}, {"old": True})


def damaged(out: Path, setting: Setting) -> None:
    """The reference tree with one bit wrong: its documents are those of the new tree."""
    run(setting, out)
    path = out / setting.layout.files[0].name
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def identical(out: Path, setting: Setting) -> None:
    run(setting, out)


def sweep(
    setting: Setting,
    folder: Path,
    before: Prepare,
    strike: Callable[[], object],
    expected: set[str],
    system: Any = nothing,
    half: bool = False,
) -> int:
    """Strikes at every call in turn, checks the invariant, repeats the command. Returns how many calls there were."""
    overwrite = before is not absent
    for number in range(1, 1000):
        out = folder / str(number) / "out"
        out.parent.mkdir()
        before(out, setting)
        old = tree(out)

        def struck(out: Path = out, number: int = number) -> str:
            system()
            reached = at_call(number, strike, half)
            run(setting, out, overwrite)
            return "done" if reached() else "undisturbed"

        def again(out: Path = out) -> None:
            system()
            run(setting, out, overwrite)

        ended = in_a_child(struck)
        found = tree(out)
        assert found in (old, setting.reference) or (system is no_exchange and found is None and tree_of_old(out) == old), number
        if ended == "undisturbed":
            assert found == setting.reference
            assert os.listdir(out.parent) == ["out"]
            return number - 1
        assert ended in expected or (ended == "done" and found == setting.reference), (number, ended)
        ended = in_a_child(again) if system is not nothing else here(again)  # a fork takes most of the time
        if ended == "QP503":  # it was over but for an empty folder: as after a run that was not disturbed
            assert found == setting.reference
            assert not overwrite
        else:
            assert ended == "done", (number, ended)
        assert tree(out) == setting.reference, number
        assert os.listdir(out.parent) == ["out"], number
        shutil.rmtree(out.parent)
    raise AssertionError("no end")


def tree_of_old(out: Path) -> dict[str, str] | None:
    return tree(staging_of(out) / "old")


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("before", "system"),
    [
        (absent, nothing),
        (another, nothing),
        (another, no_exchange),
        pytest.param(absent, no_exchange, marks=SLOW),
        *(pytest.param(before, system, marks=SLOW) for before in (damaged, identical) for system in (nothing, no_exchange)),
    ],
)
def test_killed_at_every_call(setting: Setting, tmp_path: Path, before: Prepare, system: Any) -> None:
    assert sweep(setting, tmp_path, before, kill, {"killed"}, system) > 80


def test_killed_with_every_write_half_done(setting: Setting, tmp_path: Path) -> None:
    assert sweep(setting, tmp_path, absent, kill, {"killed"}, half=True) > 80


RARE = [pytest.param(number, marks=SLOW) for number in (errno.EDQUOT, errno.EIO, errno.EROFS)]


@pytest.mark.parametrize("number", [errno.ENOSPC, *RARE], ids=errno.errorcode.get)
@pytest.mark.parametrize("before", [pytest.param(absent, marks=SLOW), another])
def test_an_error_at_every_call(setting: Setting, tmp_path: Path, before: Prepare, number: int) -> None:
    code = {errno.EIO: "QP403", errno.EROFS: "QP402"}.get(number, "QP401")
    assert sweep(setting, tmp_path, before, fault(number), {code}) > 80


@pytest.mark.slow
def test_an_error_at_every_call_without_exchange(setting: Setting, tmp_path: Path) -> None:
    assert sweep(setting, tmp_path, another, fault(errno.EIO), {"QP403"}, no_exchange) > 80


def test_killed_again_and_again(setting: Setting, tmp_path: Path) -> None:
    """Each attempt gets a little further, and what is done is never lost."""
    out = tmp_path / "out"
    for number in range(10, 200, 10):

        def struck(number: int = number) -> None:
            at_call(number, kill)
            run(setting, out)

        ended = in_a_child(struck)
        assert ended in ("killed", "done", "QP503")
        if ended != "killed":
            break
    assert tree(out) == setting.reference
    assert os.listdir(tmp_path) == ["out"]


def test_partial_writes_are_continued(setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda descriptor, data, at: real(descriptor, memoryview(data)[:61], at))
    run(setting, tmp_path / "out")
    assert tree(tmp_path / "out") == setting.reference


@pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS, None], ids=str)
def test_a_file_system_without_allocation(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int | None
) -> None:
    if number is None:
        monkeypatch.delattr(os, "posix_fallocate")  # macOS
    else:
        strike = fault(number)
        monkeypatch.setattr(os, "posix_fallocate", lambda *arguments: strike())
    run(setting, tmp_path / "out")
    assert tree(tmp_path / "out") == setting.reference


# order of syncs: what a power cut would leave


def test_everything_is_synced_before_it_counts(setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dirty: set[str] = set()
    out = tmp_path / "out"
    staging = str(staging_of(out))

    def path_of(descriptor: int) -> str:
        return os.readlink(f"/proc/self/fd/{descriptor}")

    def opened(path: Any, mode: str = "r", *arguments: Any, **keywords: Any) -> Any:
        if mode[0] in "wa":
            dirty.update((str(path), str(Path(path).parent)))
        return builtins.open(path, mode, *arguments, **keywords)

    real = {name: getattr(os, name) for name in ("open", "pwrite", "rename", "mkdir")}

    def os_open(path: Any, flags: int, *arguments: Any, **keywords: Any) -> int:
        if flags & os.O_CREAT:
            dirty.update((str(path), str(Path(path).parent)))
        return int(real["open"](path, flags, *arguments, **keywords))

    def pwrite(descriptor: int, data: Any, at: int) -> int:
        dirty.add(path_of(descriptor))
        return int(real["pwrite"](descriptor, data, at))

    def mkdir(path: Any, *arguments: Any) -> None:
        real["mkdir"](path, *arguments)
        dirty.update((str(path), str(Path(path).parent)))

    def rename(source: Any, target: Any) -> None:
        assert str(source) not in dirty, f"{source} is renamed before its data is safe"
        real["rename"](source, target)
        dirty.add(str(Path(target).parent))

    swapped = []

    def swap(source: Any, target: Any, flag: int) -> bool:
        assert {path for path in dirty if f"{path}/".startswith(f"{staging}/")} == set()
        real["rename"](source, target)
        dirty.add(str(tmp_path))
        swapped.append(target)
        return True

    monkeypatch.setattr(os, "fsync", lambda descriptor: dirty.discard(path_of(descriptor)))
    for name, replacement in {"open": os_open, "pwrite": pwrite, "mkdir": mkdir, "rename": rename}.items():
        monkeypatch.setattr(os, name, replacement)
    monkeypatch.setattr(module, "open", opened, raising=False)
    monkeypatch.setattr(durable, "open", opened, raising=False)
    monkeypatch.setattr(durable, "rename", swap)
    monkeypatch.setattr(CheckpointWriter, "_discard_staging", lambda self: removed.append(str(tmp_path) in dirty))
    removed: list[bool] = []
    run(setting, out)
    assert swapped == [out]
    assert removed == [False], "the old tree goes when the new one is safe"


# the journal and the staging directory


def stopped_before_publishing(setting: Setting, out: Path) -> Path:
    """The staging directory of a run that was killed when every file was journalled."""

    def publish(*arguments: object) -> None:
        kill()

    def struck() -> None:
        CheckpointWriter.publish = publish  # type: ignore[method-assign, assignment]
        run(setting, out)

    assert in_a_child(struck) == "killed"
    return staging_of(out)


@pytest.mark.parametrize("step", [pytest.param(1, marks=SLOW), 16])
def test_a_journal_torn_at_every_byte(setting: Setting, tmp_path: Path, step: int) -> None:
    staging = stopped_before_publishing(setting, tmp_path / "out")
    kept = tmp_path / "kept"
    staging.rename(kept)
    journal = (kept / "journal.jsonl").read_bytes()
    ends = [i for i in range(len(journal) + 1) if journal[i : i + 1] in (b"\n", b"") and i]
    assert len(ends) == 2
    for length in sorted({*range(0, len(journal), step), *ends, *(end - 1 for end in ends)}):
        shutil.copytree(kept, staging)
        (staging / "journal.jsonl").write_bytes(journal[:length])
        assert run(setting, tmp_path / "out") == sum(length >= end for end in ends)
        assert tree(tmp_path / "out") == setting.reference
        shutil.rmtree(tmp_path / "out")


def test_what_follows_a_torn_line_counts(setting: Setting, tmp_path: Path) -> None:
    out = tmp_path / "out"
    staging = stopped_before_publishing(setting, out)
    journal = (staging / "journal.jsonl").read_bytes()
    (staging / "journal.jsonl").write_bytes(journal[: len(journal) // 3])
    stopped_before_publishing(setting, out)
    assert run(setting, out) == 2


@pytest.mark.parametrize(
    "journal",
    [b"\xff\xfe\x00", b"[]\n", b"null\n", b'{"file": [], "tensors": {}}', b'{"file": "../x", "tensors": {}}', bytes(5000)],
    ids=ascii,
)
def test_a_journal_of_rubbish(setting: Setting, tmp_path: Path, journal: bytes) -> None:
    staging = stopped_before_publishing(setting, tmp_path / "out")
    (staging / "journal.jsonl").write_bytes(journal)
    assert run(setting, tmp_path / "out") == 0
    assert tree(tmp_path / "out") == setting.reference


def test_journalled_files_are_checked(setting: Setting, tmp_path: Path) -> None:
    for number, change in enumerate([flip, shorten, lengthen, os.unlink]):
        out = tmp_path / f"out{number}"
        staging = stopped_before_publishing(setting, out)
        change(staging / "out" / setting.layout.files[1].name)
        assert run(setting, out) == 1
        assert tree(out) == setting.reference


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def shorten(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def test_leftovers_are_swept(setting: Setting, tmp_path: Path) -> None:
    staging = stopped_before_publishing(setting, tmp_path / "out")
    outside = write(tmp_path / "outside", {"precious": b"x"}, None)
    write(
        staging / "out",
        {"foreign": b"x", "model-00002-of-00002.safetensors.part": b"x", "sub/deep/y": b"x", ".hidden/z": b""},
        None,
    )
    (staging / "out/link").symlink_to(outside)
    (staging / "out/dangling").symlink_to("nowhere")
    write(staging, {"foreign": b"x", "run.json.tmp": b"x", "publish.json": b'{"names": 1}'}, None)
    assert run(setting, tmp_path / "out") == 2
    assert tree(tmp_path / "out") == setting.reference
    assert (outside / "precious").exists()
    assert sorted(os.listdir(tmp_path)) == ["out", "outside"]


@pytest.mark.parametrize("kind", ["empty folder", "folder of rubbish", "file", "link"])
def test_a_staging_directory_that_is_none(setting: Setting, tmp_path: Path, kind: str) -> None:
    staging, outside = staging_of(tmp_path / "out"), write(tmp_path / "outside", {"precious": b"x"}, None)
    if kind == "file":
        staging.write_bytes(b"x")
    elif kind == "link":
        staging.symlink_to(outside)
    else:
        write(staging, {"out/x": b"x"} if kind != "empty folder" else {}, None)
    run(setting, tmp_path / "out")
    assert tree(tmp_path / "out") == setting.reference
    assert (outside / "precious").exists()


def test_another_fingerprint_is_refused_and_restart_discards(setting: Setting, tmp_path: Path) -> None:
    out = tmp_path / "out"
    staging = stopped_before_publishing(setting, out)
    kept = tree(staging)
    other = {**FINGERPRINT, "plan": {"default": "int8"}, "more": 1}
    with pytest.raises(QuantplanError, match=r"\.out\.quantplan: QP502 an interrupted run .* different more, plan\n.*--restart"):
        run(setting, out, fingerprint=other)
    assert tree(staging) == kept
    assert run(setting, out, restart=True, fingerprint=other) == 0
    assert tree(out) == setting.reference


@pytest.mark.parametrize("data", [b"", b"[]", b"1", b'{"plan"', b"\xff"], ids=ascii)
def test_a_fingerprint_of_rubbish_is_refused(setting: Setting, tmp_path: Path, data: bytes) -> None:
    staging = stopped_before_publishing(setting, tmp_path / "out")
    (staging / "run.json").write_bytes(data)
    with pytest.raises(QuantplanError, match="QP502"):
        run(setting, tmp_path / "out")
    run(setting, tmp_path / "out", restart=True)
    assert tree(tmp_path / "out") == setting.reference


def killed_at(setting: Setting, out: Path, function: str, after: bool = False, system: Any = nothing) -> None:
    """An overwriting run killed before, or after, its call of a method of the writer."""
    real = getattr(CheckpointWriter, function)

    def replacement(self: CheckpointWriter) -> None:
        if after:
            real(self)
        kill()

    def struck() -> None:
        system()
        setattr(CheckpointWriter, function, replacement)
        run(setting, out, overwrite=True)

    assert in_a_child(struck) == "killed"


def test_restart_gives_the_old_output_back_first(setting: Setting, tmp_path: Path) -> None:
    """Killed between the two renames of an overwrite, with the only copy of the old output in the staging directory."""
    out = tmp_path / "out"
    another(out, setting)
    old = tree(out)

    def struck() -> None:
        no_exchange()
        real, calls = os.rename, []

        def rename(source: Any, target: Any) -> None:
            real(source, target)
            if Path(target).name == "old":
                calls.append(target)
                kill()

        os.rename = rename  # type: ignore[assignment]
        run(setting, out, overwrite=True)

    assert in_a_child(struck) == "killed"
    assert tree(out) is None
    with pytest.raises(QuantplanError, match="QP503"):
        run(setting, out, restart=True)
    assert tree(out) == old


def test_a_finished_run_is_recognised_whoever_comes_next(setting: Setting, tmp_path: Path) -> None:
    out = tmp_path / "out"
    killed_at(setting, out, "_discard_staging")
    assert tree(out) == setting.reference
    assert staging_of(out).exists()
    with pytest.raises(QuantplanError, match="QP503"):  # not QP502: that run is over
        run(setting, out, fingerprint={"other": 1})
    assert os.listdir(tmp_path) == ["out"]


def test_an_output_moved_away_is_not_brought_back(setting: Setting, tmp_path: Path) -> None:
    out = tmp_path / "out"
    another(out, setting)
    killed_at(setting, out, "_swap", after=True, system=no_exchange)
    out.rename(tmp_path / "moved")
    run(setting, out)
    assert tree(out) == setting.reference == tree(tmp_path / "moved")


def test_staged_bytes(setting: Setting, tmp_path: Path) -> None:
    assert staged_bytes(tmp_path / "out") == 0
    stopped_before_publishing(setting, tmp_path / "out")
    assert staged_bytes(tmp_path / "out") >= setting.layout.size


# two runs at once


class Held:
    """A run in another process that stands still in the middle until it is let go, or killed."""

    def __init__(self, setting: Setting, out: Path) -> None:
        ready, told = os.pipe()
        hold, self.release = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            with CheckpointWriter(out, setting.layout, FINGERPRINT) as writer:
                write_file(writer, setting.layout.files[0])
                os.write(told, b"x")
                os.read(hold, 1)
                write_file(writer, setting.layout.files[1])
                writer.publish(setting.side_files, DOCUMENTS)
            os._exit(0)
        os.read(ready, 1)
        for descriptor in (ready, told, hold):
            os.close(descriptor)

    def end(self, kill_it: bool = False) -> int:
        if kill_it:
            os.kill(self.pid, signal.SIGKILL)
        else:
            os.write(self.release, b"x")
        os.close(self.release)
        return os.waitpid(self.pid, 0)[1]


def test_two_runs_at_once(setting: Setting, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = Held(setting, out)
    for _ in range(2):  # the first refusal does not disturb what the second tells
        with pytest.raises(QuantplanError) as caught:
            run(setting, out, restart=True, overwrite=True)
        assert caught.value.exit_status == 5
        assert f"QP501 another run is writing this output (pid {first.pid} on {os.uname().nodename})" in str(caught.value)
    assert first.end() == 0
    assert tree(out) == setting.reference
    assert os.listdir(tmp_path) == ["out"]


def test_the_lock_of_a_killed_run_does_not_block(setting: Setting, tmp_path: Path) -> None:
    out = tmp_path / "out"
    Held(setting, out).end(kill_it=True)
    assert (tmp_path / ".out.quantplan.lock").exists()
    started = time.monotonic()
    assert run(setting, out) == 1
    assert time.monotonic() - started < 2
    assert tree(out) == setting.reference
    assert os.listdir(tmp_path) == ["out"]


def test_a_lock_is_held_by_one_at_a_time(tmp_path: Path) -> None:
    """Lock files come and go; a process that opened one just before it was removed must not take it for the lock."""
    lock, inside = tmp_path / "lock", tmp_path / "inside"

    def contend() -> None:
        taken, end = 0, time.monotonic() + 1.0
        while time.monotonic() < end:
            descriptor, _ = durable.lock(lock)
            if descriptor is None:
                continue
            os.close(os.open(inside, os.O_CREAT | os.O_EXCL))
            os.unlink(inside)
            durable.unlock(lock, descriptor)
            taken += 1
        assert taken

    children = []
    for _ in range(4):
        child = os.fork()
        if child == 0:
            try:
                contend()
                os._exit(0)
            except BaseException:  # noqa: BLE001 - as above
                traceback.print_exc()
                os._exit(1)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0, 0]


def test_runs_side_by_side_into_other_outputs(setting: Setting, tmp_path: Path) -> None:
    held = [Held(setting, tmp_path / f"out{i}") for i in range(4)]
    assert [each.end() for each in held] == [0] * 4
    assert all(tree(tmp_path / f"out{i}") == setting.reference for i in range(4))
    assert len(os.listdir(tmp_path)) == 4


# OUT in the way


@pytest.mark.parametrize("system", [nothing, no_exchange])
@pytest.mark.parametrize("kind", ["folder", "file", "link"])
@pytest.mark.parametrize("late", [False, True], ids=["before the check", "after the check"])
def test_an_output_that_appears_is_not_touched(setting: Setting, tmp_path: Path, kind: str, late: bool, system: Any) -> None:
    out = tmp_path / "out"

    def appear() -> None:
        if kind == "folder":
            write(out, {"theirs": b"x"})
        elif kind == "file":
            out.write_bytes(b"theirs")
        else:
            out.symlink_to("theirs")

    def struck() -> None:
        system()
        if late:
            real, done = durable.rename, []

            def rename(*arguments: Any) -> bool:
                if not done:
                    done.append(appear())
                return real(*arguments)

            durable.rename = rename  # type: ignore[assignment]
            run(setting, out)
        else:
            with CheckpointWriter(out, setting.layout, FINGERPRINT) as writer:
                for file in setting.layout.files:
                    write_file(writer, file)
                appear()
                writer.publish(setting.side_files, DOCUMENTS)

    expected = "QP503"
    if system is no_exchange and late and kind == "link":
        expected = "QP503"  # rename refuses to put a directory over a link
    assert in_a_child(struck) == expected
    theirs = tree(out)
    assert theirs is not None
    assert "config.json" not in theirs or "theirs" in theirs
    shutil.rmtree(out) if kind == "folder" else out.unlink()
    assert run(setting, out) == 2
    assert tree(out) == setting.reference


@pytest.mark.parametrize("kind", ["file", "link to a folder", "dangling link", "folder", "home"])
def test_an_output_that_is_there(setting: Setting, tmp_path: Path, kind: str) -> None:
    out = tmp_path / "out"
    other = write(tmp_path / "other", {"precious": b"x"})
    if kind == "file":
        out.write_bytes(b"x")
    elif kind == "folder":
        write(out, {"x": b"x"})
    elif kind == "home":
        write(out, {"x": b"x"}, None)  # not a checkpoint
    else:
        out.symlink_to(other if kind == "link to a folder" else "nowhere")
    before = tree(tmp_path)
    with pytest.raises(QuantplanError, match="QP503 the output exists") as caught:
        run(setting, out)
    assert caught.value.exit_status == 5
    assert tree(tmp_path) == before
    if kind == "folder":
        run(setting, out, overwrite=True)
        assert tree(out) == setting.reference
    else:
        with pytest.raises(QuantplanError, match=r"QP503 the output exists and is not a (directory|checkpoint)"):
            run(setting, out, overwrite=True)
        assert tree(tmp_path) == before


def test_an_empty_folder_may_be_overwritten(setting: Setting, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(QuantplanError, match="QP503"):
        run(setting, tmp_path / "out")
    run(setting, tmp_path / "out", overwrite=True)
    assert tree(tmp_path / "out") == setting.reference


# permissions and limits


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o007, 0o660)], ids=oct)
def test_modes_follow_the_umask(setting: Setting, tmp_path: Path, mask: int, mode: int) -> None:
    before = os.umask(mask)
    try:
        run(setting, tmp_path / "out")
    finally:
        os.umask(before)
    paths = [tmp_path / "out", *(tmp_path / "out").rglob("*")]
    assert {stat.S_IMODE(p.stat().st_mode) for p in paths if p.is_file()} == {mode}
    assert {stat.S_IMODE(p.stat().st_mode) for p in paths if p.is_dir()} == {0o777 & ~mask}


def test_a_limit_on_file_sizes(setting: Setting, tmp_path: Path) -> None:
    def struck() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
        run(setting, tmp_path / "out")

    assert in_a_child(struck) == "QP401"
    assert tree(tmp_path / "out") is None
    run(setting, tmp_path / "out")
    assert tree(tmp_path / "out") == setting.reference


FULL_DISK = """
import subprocess, sys
from pathlib import Path
from test_writer import QuantplanError, make_setting, run, tree

setting, disk, ended = make_setting(Path(sys.argv[1]) / "setting"), Path(sys.argv[1]) / "disk", []
disk.mkdir()
for option in [f"size={4 * k}k" for k in range(1, 16)] + [f"nr_inodes={k}" for k in range(2, 22)]:
    if subprocess.run(["mount", "-t", "tmpfs", "-o", option, "none", disk]).returncode:
        sys.exit(77)
    try:
        run(setting, disk / "out")
        ended.append("done")
    except QuantplanError as error:
        ended.append(error.problems[0].code)
        assert tree(disk / "out") in (None, setting.reference), option
        subprocess.run(["mount", "-o", "remount,size=1m,nr_inodes=1000", disk], check=True)
        run(setting, disk / "out")
    assert tree(disk / "out") == setting.reference, option
    assert [p.name for p in disk.iterdir()] == ["out"], option
    subprocess.run(["umount", disk], check=True)
print(*ended)
"""


@pytest.mark.skipif(sys.platform != "linux" or not shutil.which("unshare"), reason="needs Linux namespaces")
def test_a_disk_that_is_full(tmp_path: Path) -> None:
    """Every size and every number of inodes of a real file system, which then grows."""
    folders = os.pathsep.join([str(Path(__file__).parent), str(Path(module.__file__).parents[2])])
    command = ["unshare", "-Urm", sys.executable, "-c", FULL_DISK, str(tmp_path)]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": folders}, capture_output=True, text=True, timeout=100)
    if done.returncode == 77 or done.stderr.startswith("unshare:"):
        pytest.skip("namespaces are not allowed here")
    assert done.returncode == 0, done.stderr
    ended = done.stdout.split()
    assert set(ended) == {"QP401", "done"}
    assert ended.count("QP401") > 10


def test_too_few_descriptors(setting: Setting, tmp_path: Path) -> None:
    def struck() -> None:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        lowest = os.open("/dev/null", os.O_RDONLY)
        os.close(lowest)
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest + 2, hard))
        try:
            run(setting, tmp_path / "out")
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

    assert in_a_child(struck) == "QP403"
    run(setting, tmp_path / "out")
    assert tree(tmp_path / "out") == setting.reference


def test_a_message_names_file_cause_and_cure(setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    strike = fault(errno.ENOSPC)
    monkeypatch.setattr(os, "posix_fallocate", lambda *arguments: strike())
    with pytest.raises(QuantplanError) as caught:
        run(setting, tmp_path / "out")
    first = setting.layout.files[0].name
    assert first in str(caught.value)
    assert "QP401 no space left: No space left on device" in str(caught.value)
    assert "repeat the command: it goes on from here" in str(caught.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_parent_that_may_not_be_written(setting: Setting, tmp_path: Path) -> None:
    (tmp_path / "parent").mkdir(mode=0o500)
    with pytest.raises(QuantplanError, match="QP402"):
        run(setting, tmp_path / "parent" / "out")


@pytest.fixture(scope="module", autouse=True)
def no_zombies() -> Iterator[None]:
    yield
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


def test_the_sweep_notices_a_broken_writer(setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A writer that puts the output in place before it is complete does not get through."""
    real = CheckpointWriter.publish

    def hasty(self: CheckpointWriter, side_files: Any, documents: Any) -> None:
        self._swap()
        os.makedirs(self.folder)
        for name in self._done:
            shutil.copyfile(self.out / name, self.folder / name)
        shutil.rmtree(self.out)
        real(self, side_files, documents)

    monkeypatch.setattr(CheckpointWriter, "publish", hasty)
    with pytest.raises(AssertionError):
        sweep(setting, tmp_path, absent, kill, {"killed"})


def test_nothing_here_needs_torch() -> None:
    code = "import sys; import quantplan.checkpoint.writer; assert 'torch' not in sys.modules"
    assert os.spawnv(os.P_WAIT, sys.executable, [sys.executable, "-c", code]) == 0
    assert json.loads(json.dumps(DOCUMENTS["config.json"].decode()))
