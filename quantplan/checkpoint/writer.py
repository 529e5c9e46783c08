"""Writing a checkpoint directory so that it is absent, the complete old one, or the complete new one. Torch-free.

Everything is written into a hidden sibling, `.OUT.quantplan/`, under a lock. Every safetensors file is filled in place (its
layout is known), synced, renamed from `.part`, and entered in a journal with the hash of each tensor; a later run of the same
command reuses what the journal and the bytes agree on. The small files follow, config.json last; then one rename publishes the
directory, and the sibling goes. Killed at any point, OUT is whole, and the same command goes on.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from quantplan.checkpoint.layout import OutputFile, OutputLayout, json_bytes
from quantplan.errors import QuantplanError, fail
from quantplan.headers import TensorInfo

CHUNK = 8 << 20  # bytes read or copied at once
NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
NO_PERMISSION = {errno.EACCES, errno.EPERM, errno.EROFS}
RENAME_NOREPLACE, RENAME_EXCHANGE, AT_FDCWD = 1, 2, -100


class CheckpointWriter:
    """Fills one output directory. Use it in a `with`; call `publish` when every file is done.

    `fingerprint`: what determines the bytes (plan, source, versions); a staging directory of another fingerprint is refused
    with QP502. Raises QP401 (no space), QP402 (not allowed), QP501 (locked), QP503 (OUT exists).
    """

    def __init__(
        self, out: Path, layout: OutputLayout, fingerprint: Mapping[str, object], overwrite: bool = False, restart: bool = False
    ) -> None:
        self.out = Path(os.path.abspath(out))
        self.layout = layout
        self.overwrite, self.restart = overwrite, restart
        self.staging = self.out.parent / f".{self.out.name}.quantplan"
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
        with _named_errors(self.out):
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
        import filelock

        if not self.out.parent.is_dir():
            self.out.parent.mkdir(parents=True, exist_ok=True)
        path = self.out.parent / f".{self.out.name}.quantplan.lock"
        lock = filelock.FileLock(path, timeout=0)
        try:
            lock.acquire()
        except filelock.Timeout:
            holder = path.read_text("utf-8", "replace").strip() if path.exists() else ""
            by = f" ({holder})" if holder else ""
            raise fail("QP501", f"another run is writing this output{by}", "wait for it, or choose another output", file=str(self.out)) from None
        self._lock.callback(lambda: (path.unlink(missing_ok=True), lock.release()))
        path.write_text(f"pid {os.getpid()} on {os.uname().nodename}\n", "utf-8")

    def _open_staging(self) -> None:
        run = self.staging / "run.json"
        if self.restart and self.staging.exists():
            shutil.rmtree(self.staging)
        if run.exists() and self._finish_publishing():
            return
        if self.out.exists() or self.out.is_symlink():
            if not self.overwrite:
                raise fail("QP503", "the output exists", "choose another, or say --overwrite", file=str(self.out))
            if not self.out.is_dir() or self.out.is_symlink():
                raise fail("QP503", "the output exists and is not a directory", "remove it yourself", file=str(self.out))
        if run.exists():
            self._check_fingerprint(run)
        else:
            shutil.rmtree(self.staging, ignore_errors=True)  # killed before it had a fingerprint: nothing to keep
            self.folder.mkdir(parents=True)
            self._write_durably(run, json_bytes(self.fingerprint))
            _sync_folder(self.staging)
            _sync_folder(self.out.parent)
        self.folder.mkdir(exist_ok=True)
        self._read_journal()
        for path in self.folder.iterdir():
            if path.name not in self._done:
                path.unlink()

    def _check_fingerprint(self, run: Path) -> None:
        try:
            found = json.loads(run.read_text("utf-8"))
        except ValueError:
            found = {}
        if found != self.fingerprint:
            differs = sorted(k for k in self.fingerprint.keys() | found.keys() if self.fingerprint.get(k) != found.get(k))
            text = f"an interrupted run of this output had a different {', '.join(differs) or 'start'}"
            raise fail("QP502", text, "repeat that command to finish it, or say --restart to discard it", file=str(self.staging))

    def _read_journal(self) -> None:
        """Takes over the files that are journalled and whose bytes still have the journalled hashes."""
        path = self.staging / "journal.jsonl"
        lines = path.read_text("utf-8").splitlines() if path.exists() else []
        for line in lines:
            try:
                entry = json.loads(line)
                name, hashes = entry["file"], entry["tensors"]
            except (ValueError, KeyError, TypeError):
                continue  # torn by a crash: the file counts as not done
            file = self._files.get(name)
            if file is not None and file_matches(self.folder / name, file, hashes):
                self._done.add(name)
                self._left[name] = set()
                self.hashes |= hashes

    def write(self, info: TensorInfo, data: bytes | bytearray | memoryview) -> None:
        """A whole tensor's data, to its place."""
        self.write_chunks(info, iter([data]))

    def write_chunks(self, info: TensorInfo, chunks: Iterator[bytes | bytearray | memoryview]) -> None:
        """A tensor's data in consecutive pieces. The file is finished and journalled with its last tensor."""
        digest, at = hashlib.sha256(), info.start
        with _named_errors(self.folder / info.file):
            descriptor = self._descriptor(info.file)
            for chunk in chunks:
                digest.update(chunk)
                view = memoryview(chunk).cast("B")
                while view:
                    written = os.pwrite(descriptor, view, at)
                    at, view = at + written, view[written:]
            assert at == info.end, f"{info.name}: wrote {at - info.start} of {info.size} bytes"
            self.hashes[info.name] = digest.hexdigest()
            self._left[info.file].discard(info.name)
            if not self._left[info.file]:
                self._finish(self._files[info.file])

    def _descriptor(self, name: str) -> int:
        if name not in self._descriptors:
            file = self._files[name]
            descriptor = os.open(self.folder / f"{name}.part", os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
            self._descriptors[name] = descriptor
            os.posix_fallocate(descriptor, 0, file.size)  # no space is found out now, not after an hour
            os.pwrite(descriptor, file.header, 0)
        return self._descriptors[name]

    def _finish(self, file: OutputFile) -> None:
        descriptor = self._descriptors.pop(file.name)
        os.fsync(descriptor)
        os.close(descriptor)
        os.rename(self.folder / f"{file.name}.part", self.folder / file.name)
        _sync_folder(self.folder)
        tensors = {t.name: self.hashes[t.name] for u in file.units for t in u.outputs}
        with open(self.staging / "journal.jsonl", "a", encoding="utf-8") as journal:
            journal.write(json.dumps({"file": file.name, "tensors": tensors}) + "\n")
            journal.flush()
            os.fsync(journal.fileno())
        self._done.add(file.name)

    def publish(self, side_files: Mapping[str, Path], documents: Mapping[str, bytes]) -> None:
        """Adds side files (copied) and documents (written, in order; config.json belongs last), checks that every planned
        file is there, and puts the directory in place."""
        missing = [f.name for f in self.layout.files if f.name not in self._done]
        assert not missing, f"not written: {missing}"
        with _named_errors(self.out):
            for name, source in side_files.items():
                self._copy(source, self.folder / name)
            for name, data in documents.items():
                self._write_durably(self.folder / name, data)
            for folder in {self.folder, *(p.parent for p in self.folder.rglob("*"))}:
                _sync_folder(folder)
            digest = hashlib.sha256(b"".join(documents.values())).hexdigest()
            self._write_durably(self.staging / "publish.json", json_bytes({"documents": digest, "names": list(documents)}))
            _sync_folder(self.staging)
            self._swap()
            shutil.rmtree(self.staging)

    def _swap(self) -> None:
        if self.out.exists():
            if not self.overwrite:
                raise fail("QP503", "the output appeared while the run went on", "choose another, or say --overwrite", file=str(self.out))
            if not _rename(self.folder, self.out, RENAME_EXCHANGE):
                os.rename(self.out, self.staging / "old")
                os.rename(self.folder, self.out)
        elif not _rename(self.folder, self.out, RENAME_NOREPLACE):
            os.rename(self.folder, self.out)
        _sync_folder(self.out.parent)

    def _finish_publishing(self) -> bool:
        """Whether an earlier run was killed after its output was in place; then only its leftovers are removed. One killed
        between the two renames of an overwrite gets its old output back first."""
        old = self.staging / "old"
        if old.exists() and not self.out.exists():
            os.rename(old, self.out)
        try:
            marker = json.loads((self.staging / "publish.json").read_text("utf-8"))
            present = hashlib.sha256(b"".join((self.out / n).read_bytes() for n in marker["names"])).hexdigest()
            same = json.loads((self.staging / "run.json").read_text("utf-8")) == self.fingerprint
        except (OSError, ValueError, KeyError):
            return False
        if not same or present != marker["documents"]:
            return False
        shutil.rmtree(self.staging)
        self.already_published = True
        return True

    def _copy(self, source: Path, target: Path) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(source, "rb") as read, open(target, "wb") as write:
            shutil.copyfileobj(read, write, CHUNK)
            write.flush()
            os.fsync(write.fileno())

    def _write_durably(self, path: Path, data: bytes) -> None:
        with open(path, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())


def file_matches(path: Path, file: OutputFile, hashes: Mapping[str, str]) -> bool:
    """Whether a written file has the planned size and header and the given hash of every tensor."""
    try:
        with open(path, "rb", buffering=0) as read:
            if os.fstat(read.fileno()).st_size != file.size or read.read(len(file.header)) != file.header:
                return False
            tensors = [t for u in file.units for t in u.outputs]
            return all(hash_range(read.fileno(), t.start, t.size) == hashes.get(t.name) for t in tensors)
    except OSError:
        return False


def hash_range(descriptor: int, start: int, size: int) -> str:
    """sha256 of `size` bytes from `start`."""
    digest = hashlib.sha256()
    for chunk in read_range(descriptor, start, size):
        digest.update(chunk)
    return digest.hexdigest()


def read_range(descriptor: int, start: int, size: int) -> Iterator[bytes]:
    """The bytes from `start`, in chunks; fewer when the file ends before."""
    end = start + size
    while start < end:
        chunk = os.pread(descriptor, min(CHUNK, end - start), start)
        if not chunk:
            return
        start += len(chunk)
        yield chunk


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _rename(source: Path, target: Path, flag: int) -> bool:
    """`renameat2`: atomic, and never over something by accident. False where the system or file system lacks it."""
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is None:
        return False
    if call(AT_FDCWD, os.fsencode(source), AT_FDCWD, os.fsencode(target), flag) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS):
        return False
    raise OSError(code, os.strerror(code), str(target))


@contextlib.contextmanager
def _named_errors(path: Path) -> Iterator[None]:
    """The operating system's refusals as problems that name the file and what to do."""
    try:
        yield
    except QuantplanError:
        raise
    except OSError as error:
        where = str(error.filename or path)
        if error.errno in NO_SPACE:
            raise fail("QP401", f"no space left: {error.strerror}", "free space and repeat the command: it goes on from here", file=where) from error
        if error.errno in NO_PERMISSION:
            raise fail("QP402", f"not allowed: {error.strerror}", "choose an output where you may write", file=where) from error
        raise fail("QP403", f"cannot be written: {error.strerror or error}", "", file=where) from error
