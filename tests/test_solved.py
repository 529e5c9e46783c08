"""What calibration keeps of a run that may be killed: whole or not done, whatever is torn, altered or lost."""

from __future__ import annotations

import builtins
import contextlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_algorithms import ALL, label
from torch import Tensor

from quantplan.engine import solved as module
from quantplan.engine.solved import JOURNAL, SolvedBlocks
from quantplan.errors import QuantplanError
from quantplan.scheme import SCHEMES, SchemeConfig
from quantplan.tensor import QuantizedTensor

INT4 = SCHEMES.get("int4")(symmetric=False)


def matrix(number: int, config: SchemeConfig = INT4) -> QuantizedTensor:
    generator = torch.Generator().manual_seed(number)
    return config.quantizer().quantize(torch.randn(130, 64, generator=generator))


def states(number: int) -> dict[str, Tensor]:
    """What block `number` is given."""
    generator = torch.Generator().manual_seed(100 + number)
    return {f"hidden.{i:05}": torch.randn(2, 3, 4, generator=generator) for i in range(2)}


def add(store: SolvedBlocks, number: int) -> None:
    store.add(
        {f"layers.{number}.{part}": matrix(2 * number + i) for i, part in enumerate(("q", "k"))},
        states(number + 1),
        {"name": f"layers.{number}", "losses": {}, "seconds": 1.5},
    )


def fill(store: SolvedBlocks, count: int = 4) -> None:
    """Goes on after what is done, as calibration does: from the states, or from the start where they are lost."""
    if store.done and store.states() is None:
        store.forget()
    for number in range(len(store.done), count):
        if number:
            assert equal(store.states() or {}, states(number))
        add(store, number)


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def check(folder: Path, count: int = 4) -> None:
    """That the first `count` blocks are done, and are what they should be."""
    store = SolvedBlocks(folder)
    assert [line["name"] for line in store.done] == [f"layers.{i}" for i in range(count)]
    assert equal(store.states() or {}, states(count))
    for number in range(count):
        for i, part in enumerate(("q", "k")):
            name, expected = f"layers.{number}.{part}", matrix(2 * number + i)
            found = store.read(name, INT4)
            assert name in store
            assert torch.equal(found.codes, expected.codes)
            assert equal(dict(found.params), dict(expected.params))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four blocks that are done."""
    fill(SolvedBlocks(tmp_path / "calibration"))
    return tmp_path / "calibration"


def test_what_is_added_is_there_and_again_when_opened_again(folder: Path) -> None:
    check(folder)
    store = SolvedBlocks(folder)
    assert "layers.4.q" not in store and "layers" not in store
    assert sorted(os.listdir(folder)) == [*(f"block-{i:05}.safetensors" for i in range(4)), JOURNAL, "states-00004.safetensors"]
    fill(store, 6)
    check(folder, 6)


@pytest.mark.parametrize("config", ALL, ids=label)
def test_every_scheme_comes_back(tmp_path: Path, config: SchemeConfig) -> None:
    store = SolvedBlocks(tmp_path)
    expected = matrix(1, config)
    store.add({"m": expected}, {}, {})
    found = SolvedBlocks(tmp_path).read("m", config)
    assert torch.equal(found.codes, expected.codes) and found.params.keys() == expected.params.keys()
    for name, param in expected.params.items():
        assert found.params[name].dtype == param.dtype and found.params[name].shape == param.shape
        assert torch.equal(found.params[name].view(torch.uint8), param.view(torch.uint8))
    assert torch.equal(config.quantizer().dequantize(found), config.quantizer().dequantize(expected))


def test_names_that_begin_alike_are_kept_apart(tmp_path: Path) -> None:
    store = SolvedBlocks(tmp_path)
    parts = {name: matrix(i) for i, name in enumerate(("a", "a.b", "a/b", "b"))}
    store.add(parts, {}, {})
    for name, expected in parts.items():
        assert torch.equal(SolvedBlocks(tmp_path).read(name, INT4).codes, expected.codes)


def test_nothing_is_done_in_a_new_folder(tmp_path: Path) -> None:
    store = SolvedBlocks(tmp_path / "a" / "b")
    assert store.done == [] and store.states() is None and "x" not in store


def test_a_journal_torn_at_every_byte(folder: Path, tmp_path: Path) -> None:
    journal = (folder / JOURNAL).read_bytes()
    ends = [i + 1 for i, c in enumerate(journal) if c == ord("\n")]
    for cut in [*range(0, len(journal), 101), *(end + d for end in ends for d in (-2, -1, 0))]:
        copy = tmp_path / "copy"
        shutil.copytree(folder, copy)
        (copy / JOURNAL).write_bytes(journal[:cut])
        store = SolvedBlocks(copy)
        whole = sum(end - 1 <= cut for end in ends)  # a line is whole without its newline
        assert len(store.done) == whole
        assert (store.states() is not None) == (whole == 4)  # those of earlier blocks are gone
        fill(store)
        check(copy)
        shutil.rmtree(copy)


@pytest.mark.parametrize("rubbish", [b"\xff\xfe", b"[]\n", b"null\n", b"{}\n", b'{"file": 7}\n', b'{"file": "../x"}\n', b"\n\n"])
def test_a_journal_of_rubbish(folder: Path, rubbish: bytes) -> None:
    for text in (rubbish, (folder / JOURNAL).read_bytes() + rubbish, rubbish + (folder / JOURNAL).read_bytes()):
        (folder / JOURNAL).write_bytes(text)
        store = SolvedBlocks(folder)
        assert len(store.done) in (0, 4)
        fill(store)
        check(folder)


@pytest.mark.parametrize("number", range(4))
@pytest.mark.parametrize("harm", ["bit", "cut", "gone", "folder"])
def test_a_file_that_was_altered_is_not_done_nor_what_follows(folder: Path, number: int, harm: str) -> None:
    alter(folder / f"block-{number:05}.safetensors", harm)
    store = SolvedBlocks(folder)
    assert len(store.done) == number
    assert f"layers.{number}.q" not in store and "layers.3.k" not in store
    assert store.states() is None
    if harm != "folder":
        fill(store)
        check(folder)
        fill(SolvedBlocks(folder), 5)
        check(folder, 5)


@pytest.mark.parametrize("harm", ["bit", "cut", "gone"])
def test_states_that_were_altered_start_over(folder: Path, harm: str) -> None:
    alter(folder / "states-00004.safetensors", harm)
    store = SolvedBlocks(folder)
    assert len(store.done) == 4 and store.states() is None
    store.forget()
    assert store.done == [] and "layers.0.q" not in store and os.listdir(folder) == []
    fill(store)
    check(folder)


def alter(path: Path, harm: str) -> None:
    data = path.read_bytes()
    if harm == "bit":
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif harm == "cut":
        path.write_bytes(data[: len(data) // 2])
    else:
        path.unlink()
        if harm == "folder":
            path.mkdir()


def test_another_blocks_file_does_not_pass(folder: Path) -> None:
    """A journal whose lines were put together otherwise."""
    lines = (folder / JOURNAL).read_text().splitlines()
    (folder / JOURNAL).write_text("\n".join([lines[0], lines[2], lines[1], lines[3], ""]))
    assert len(SolvedBlocks(folder).done) == 1
    shutil.rmtree(folder)
    fill(SolvedBlocks(folder))
    (folder / JOURNAL).write_text("\n".join([*lines, *lines, ""]))  # lines that outlived a restart of the blocks
    check(folder)


# kills


class Killed(BaseException):
    """The process ends here: nothing after it runs."""


CALLS = {
    module.__name__: ("save_file",),
    "os": ("fsync", "rename", "unlink"),
    "builtins": ("open",),
}


def killing(monkeypatch: pytest.MonkeyPatch, at: int, after: bool, folder: Path) -> list[str]:
    """Patches every file operation so that the one with the number `at` is the last; lists those that ran."""
    ran: list[str] = []

    def patched(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            concerned = name in ("fsync", "save_file") or str(folder) in " ".join(map(str, arguments))
            if not concerned:
                return real(*arguments, **options)
            ran.append(name)
            if len(ran) > at:
                raise Killed
            if len(ran) == at:
                if after:
                    real(*arguments, **options)
                raise Killed
            return real(*arguments, **options)

        return call

    owners: dict[str, Any] = {module.__name__: module, "os": os, "builtins": builtins}
    for owner, names in CALLS.items():
        for name in names:
            monkeypatch.setattr(owners[owner], name, patched(name, getattr(owners[owner], name)))
    return ran


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_killed_at_every_file_operation(tmp_path: Path, after: bool) -> None:
    at = 0
    while True:
        at += 1
        folder = tmp_path / str(at)
        with pytest.MonkeyPatch.context() as monkeypatch:
            ran = killing(monkeypatch, at, after, folder)
            with contextlib.suppress(Killed):
                fill(SolvedBlocks(folder), 3)
        if len(ran) < at:
            break
        store = SolvedBlocks(folder)
        assert len(store.done) <= 3
        fill(store, 3)
        check(folder, 3)
        if len(store.done):
            assert sorted(n for n in os.listdir(folder) if n.endswith(".part")) == []
    assert at > 20


def test_killed_again_and_again(tmp_path: Path) -> None:
    """Each time after a few operations more: a run that is killed while it mends what a kill left."""
    folder, tries = tmp_path / "calibration", 0
    for at in [*range(1, 25), *range(1, 25)]:
        with pytest.MonkeyPatch.context() as monkeypatch:
            killing(monkeypatch, at, at % 2 == 0, folder)
            try:
                fill(SolvedBlocks(folder), 3)
            except Killed:
                tries += 1
    fill(SolvedBlocks(folder), 3)
    check(folder, 3)
    assert tries > 15


def test_killed_with_a_write_half_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = module.save_file
    for at in range(1, 7):
        calls: list[int] = []

        def half(tensors: Any, path: Path, calls: list[int] = calls, at: int = at) -> None:
            calls.append(1)
            real(tensors, path)
            if len(calls) == at:
                os.truncate(path, path.stat().st_size // 2)
                raise Killed

        folder = tmp_path / str(at)
        monkeypatch.setattr(module, "save_file", half)
        with pytest.raises(Killed):
            fill(SolvedBlocks(folder), 3)
        monkeypatch.undo()
        store = SolvedBlocks(folder)
        assert len(store.done) == (at - 1) // 2
        fill(store, 3)
        check(folder, 3)


def test_a_power_cut_may_lose_states_and_nothing_else(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """States are not synced; blocks are, before the journal names them."""
    synced: list[str] = []
    real = os.fsync

    def fsync(descriptor: int) -> None:
        synced.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    add(SolvedBlocks(folder), 4)
    assert synced == ["block-00004.safetensors.part", JOURNAL]


def test_the_systems_refusals_are_coded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "rename", full)
    with pytest.raises(QuantplanError, match="QP401"):
        add(SolvedBlocks(folder), 4)
    monkeypatch.undo()
    check(folder)
