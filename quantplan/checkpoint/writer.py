"""Writing a checkpoint directory so that it is absent, the complete old one, or the complete new one. Torch-free.

Everything is written into a hidden sibling, `.OUT.quantplan/`, under a lock. Every safetensors file is filled in place (its
layout is known), synced, renamed from `.part`, and entered in a journal with the hash of each tensor; a later run of the same
command reuses what the journal and the bytes agree on. The small files follow, config.json last; then one rename publishes the
directory, and the sibling goes. Killed at any point, OUT is whole, and the same command goes on.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from quantplan.checkpoint import durable
from quantplan.checkpoint.layout import OutputFile, OutputLayout, json_bytes
from quantplan.errors import fail, printable
from quantplan.headers import TensorInfo

IN_THE_WAY = {errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR}
MARKER = "publish.json"  # in the staging directory, from when the output is complete until it is in place and all else is gone


class CheckpointWriter:
    """Fills one output directory. Use it in a `with`; call `publish` when every file is done.

    `fingerprint`: what determines the bytes (plan, source, versions); a staging directory of another fingerprint is refused
    with QP502. Raises QP401 (no space), QP402 (not allowed), QP501 (locked), QP503 (OUT exists).
    """

    def __init__(
        self,
        out: Path,
        layout: OutputLayout,
        fingerprint: Mapping[str, object],
        overwrite: bool = False,
        restart: bool = False,
    ) -> None:
        self.out = Path(os.path.abspath(out))
        self.layout = layout
        self.overwrite, self.restart = overwrite, restart
        self.staging = staging_of(self.out)
        self.folder = self.staging / "out"
        self.fingerprint = json.loads(json.dumps(fingerprint))
        self.hashes: dict[str, str] = {}  # tensor -> sha256 of its data
        self.already_published = False
        self._done: set[str] = set()
        self._left: dict[str, set[str]] = {f.name: {t.name for u in f.units for t in u.outputs} for f in layout.files}
        self._files: Mapping[str, OutputFile] = {f.name: f for f in layout.files}
        self._descriptors: dict[str, int] = {}
        self._lock = contextlib.ExitStack()

    def __enter__(self) -> CheckpointWriter:
        with durable.named_errors(self.out):
            try:
                self._take_lock()
                self._open_staging()
            except BaseException:
                self._lock.close()
                raise
        return self

    def __exit__(self, *exc: object) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()
        self._lock.close()

    @property
    def reused(self) -> int:
        """Files taken over from an interrupted run."""
        return len(self._done)

    def is_done(self, file: str) -> bool:
        """Whether a file is complete and journalled."""
        return file in self._done

    def _take_lock(self) -> None:
        self.out.parent.mkdir(parents=True, exist_ok=True)
        path = self.staging.with_name(f"{self.staging.name}.lock")
        descriptor, holder = durable.lock(path)
        if descriptor is None:
            by = f" ({printable(holder)})" if holder else ""
            raise fail(
                "QP501", f"another run is writing this output{by}", "wait for it, or choose another output", file=str(self.out)
            )
        self._lock.callback(durable.unlock, path, descriptor)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"pid {os.getpid()} on {os.uname().nodename}\n".encode(), 0)

    def _open_staging(self) -> None:
        run, old = self.staging / "run.json", self.staging / "old"
        if old.exists() and self.folder.exists() and not os.path.lexists(self.out):
            os.rename(old, self.out)  # killed between the two renames of an overwrite
        finished = self._published_by()
        if finished is not None or self.restart:
            self._discard_staging()
        self.already_published = finished == json_bytes(self.fingerprint) and not self.restart
        if self.already_published:
            return
        with contextlib.suppress(OSError):
            self.staging.rmdir()  # killed when nothing else was left of it
        self._check_out("exists")
        if run.exists():
            self._check_fingerprint(run)
            for leftover in (self.staging / MARKER, old):
                durable.remove(leftover)
        else:
            durable.remove(self.staging)  # killed before it had a fingerprint: nothing to keep
            self.staging.mkdir()
            durable.write_durably(run, json_bytes(self.fingerprint))
            durable.sync_folder(self.staging)
            durable.sync_folder(self.out.parent)
        self.folder.mkdir(exist_ok=True)
        self._read_journal()
        for path in self.folder.iterdir():
            if path.name not in self._done:
                durable.remove(path)

    def _check_out(self, how: str) -> None:
        """Raises QP503 unless OUT is absent, or a directory that may be replaced: empty, or a checkpoint."""
        if not os.path.lexists(self.out):
            return
        if not self.overwrite:
            raise fail("QP503", f"the output {how}", "choose another, or say --overwrite", file=str(self.out))
        if self.out.is_symlink() or not self.out.is_dir():
            raise fail("QP503", f"the output {how} and is not a directory", "remove it yourself", file=str(self.out))
        if not (self.out / "config.json").exists() and any(self.out.iterdir()):
            raise fail("QP503", f"the output {how} and is not a checkpoint", "remove it yourself", file=str(self.out))

    def _check_fingerprint(self, run: Path) -> None:
        try:
            found = dict(json.loads(run.read_text("utf-8")))
        except (ValueError, TypeError):
            found = {}
        if json_bytes(found) != json_bytes(self.fingerprint):  # as text: NaN in a config equals nothing
            differs = sorted(k for k in self.fingerprint.keys() | found.keys() if self.fingerprint.get(k) != found.get(k))
            text = f"an interrupted run of this output had a different {', '.join(differs) or 'start'}"
            raise fail(
                "QP502",
                text,
                "repeat that command to finish it, or say --restart to discard it",
                file=str(self.staging),
            )

    def _read_journal(self) -> None:
        """Takes over the files that are journalled and whose bytes still have the journalled hashes."""
        path = self.staging / "journal.jsonl"
        lines = path.read_text("utf-8", "replace").splitlines() if path.exists() else []
        for line in lines:
            try:
                entry = json.loads(line)
                name, hashes = entry["file"], entry["tensors"]
                file = self._files[name]
            except (ValueError, KeyError, TypeError):
                continue  # torn by a crash: the file counts as not done
            if file_matches(self.folder / name, file, hashes):
                self._done.add(name)
                self._left[name] = set()
                self.hashes |= hashes

    def write(self, info: TensorInfo, data: bytes | bytearray | memoryview) -> None:
        """A whole tensor's data, to its place."""
        self.write_chunks(info, iter([data]))

    def write_chunks(self, info: TensorInfo, chunks: Iterator[bytes | bytearray | memoryview]) -> None:
        """A tensor's data in consecutive pieces. The file is finished and journalled with its last tensor."""
        digest, at = hashlib.sha256(), info.start
        with durable.named_errors(self.folder / info.file):
            descriptor = self._descriptor(info.file)
            for chunk in chunks:
                digest.update(chunk)
                at = durable.write_at(descriptor, chunk, at)
            assert at == info.end, f"{info.name}: wrote {at - info.start} of {info.size} bytes"
            self.hashes[info.name] = digest.hexdigest()
            self._left[info.file].discard(info.name)
            if not self._left[info.file]:
                self._finish(self._files[info.file])

    def _descriptor(self, name: str) -> int:
        if name not in self._descriptors:
            file, path = self._files[name], self.folder / f"{name}.part"
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
            self._descriptors[name] = descriptor
            durable.allocate(descriptor, file.size)
            durable.write_at(descriptor, file.header, 0)
        return self._descriptors[name]

    def _finish(self, file: OutputFile) -> None:
        os.fsync(self._descriptors[file.name])
        os.close(self._descriptors.pop(file.name))
        os.rename(self.folder / f"{file.name}.part", self.folder / file.name)
        durable.sync_folder(self.folder)
        tensors = {t.name: self.hashes[t.name] for u in file.units for t in u.outputs}
        with open(self.staging / "journal.jsonl", "a", encoding="utf-8") as journal:
            journal.write("\n" + json.dumps({"file": file.name, "tensors": tensors}))  # the last line may be torn
            journal.flush()
            os.fsync(journal.fileno())
        self._done.add(file.name)

    def publish(self, side_files: Mapping[str, Path], documents: Mapping[str, bytes]) -> None:
        """Adds side files (copied) and documents (written, in order; config.json belongs last), checks that every planned
        file is there, and puts the directory in place."""
        missing = [f.name for f in self.layout.files if f.name not in self._done]
        assert not missing, f"not written: {missing}"
        with durable.named_errors(self.out):
            for name, source in side_files.items():
                durable.copy(source, self.folder / name)
            for name, data in documents.items():
                durable.write_durably(self.folder / name, data)
            for folder in {self.folder, *(p.parent for p in self.folder.rglob("*"))}:
                durable.sync_folder(folder)
            digest = hashlib.sha256(b"".join(documents.values())).hexdigest()
            marker = {"documents": digest, "names": list(documents), "run": self.fingerprint}
            durable.write_durably(self.staging / MARKER, json_bytes(marker))
            durable.sync_folder(self.staging)
            self._swap()
            self._discard_staging()

    def _swap(self) -> None:
        self._check_out("appeared while the run went on")
        try:
            if not os.path.lexists(self.out):
                if not durable.rename(self.folder, self.out, durable.RENAME_NOREPLACE):
                    os.rename(self.folder, self.out)
            elif not durable.rename(self.folder, self.out, durable.RENAME_EXCHANGE):
                self._swap_in_two_steps()
        except OSError as error:
            if error.errno not in IN_THE_WAY:
                raise
            text = f"the output appeared while the run went on: {error.strerror}"
            raise fail("QP503", text, "move it away and repeat the command", file=str(self.out)) from None
        durable.sync_folder(self.out.parent)

    def _swap_in_two_steps(self) -> None:
        """For file systems that cannot exchange; a later run mends what a kill in between leaves."""
        old = self.staging / "old"
        os.rename(self.out, old)
        try:
            os.rename(self.folder, self.out)
        except OSError:
            os.rename(old, self.out)
            raise

    def _published_by(self) -> bytes | None:
        """The fingerprint of an earlier run that was killed when its output was in place. Told by the documents: they are in
        OUT, and no longer (or, after an exchange, other ones) in the staging directory."""
        try:
            marker = json.loads((self.staging / MARKER).read_text("utf-8"))
            names, digest = marker["names"], marker["documents"]
            if durable.digest(self.out, names) != digest or durable.digest(self.folder, names) == digest:
                return None
            return json_bytes(marker["run"])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def forget(self) -> None:
        """Nothing worth keeping was done: what runs next may be something else."""
        durable.remove(self.staging / "run.json")

    def _discard_staging(self) -> None:
        """Removes the staging directory, the marker last: while it stands, a later run knows that the output is in place."""
        if self.staging.exists():
            for path in self.staging.iterdir():
                if path.name != MARKER:
                    durable.remove(path)
        durable.remove(self.staging)


def staging_of(out: Path) -> Path:
    """The hidden sibling that `out` is made in."""
    return out.parent / f".{out.name}.quantplan"


def staged_bytes(out: Path) -> int:
    """What an interrupted run of this output takes on the disk already."""
    taken = 0
    for folder, _, names in os.walk(staging_of(out)):
        for name in names:
            with contextlib.suppress(OSError):
                taken += os.lstat(os.path.join(folder, name)).st_blocks * 512
    return taken


def file_matches(path: Path, file: OutputFile, hashes: Mapping[str, str]) -> bool:
    """Whether a written file has the planned size and header and the given hash of every tensor."""
    try:
        with open(path, "rb", buffering=0) as read:
            if os.fstat(read.fileno()).st_size != file.size or read.read(len(file.header)) != file.header:
                return False
            tensors = [t for u in file.units for t in u.outputs]
            return all(durable.hash_range(read.fileno(), t.start, t.size) == hashes.get(t.name) for t in tensors)
    except OSError:
        return False
