"""What the file system is asked for: writes that last, renames that replace nothing by accident, locks that die with their
holder, hashes. Torch-free.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from quantplan.errors import QuantplanError, fail

CHUNK = 8 << 20  # bytes read or copied at once
NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
NO_PERMISSION = {errno.EACCES, errno.EPERM, errno.EROFS}
UNSUPPORTED = {errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP}
RENAME_NOREPLACE, RENAME_EXCHANGE, AT_FDCWD = 1, 2, -100


def lock(path: Path) -> tuple[int | None, str]:
    """A descriptor that holds the lock at `path`; or None, and what its holder wrote. The kernel releases it with the process."""
    import fcntl

    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                return descriptor, ""
        except BlockingIOError:
            holder = os.pread(descriptor, 200, 0)
            os.close(descriptor)
            return None, holder.decode("utf-8", "replace").strip()
        except FileNotFoundError:
            pass
        os.close(descriptor)  # its last holder has removed it since: the next one is at `path`


def unlock(path: Path, descriptor: int) -> None:
    with contextlib.suppress(OSError):
        path.unlink()  # before it is released; `lock` notices
    os.close(descriptor)


def digest(folder: Path, names: Iterable[str]) -> str:
    """sha256 over the content of files; empty when one is missing."""
    try:
        return hashlib.sha256(b"".join((folder / name).read_bytes() for name in names)).hexdigest()
    except (FileNotFoundError, NotADirectoryError):
        return ""


def remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def allocate(descriptor: int, size: int) -> None:
    """Room for a whole file: no space is found out now, not after an hour. Where that cannot be asked for, only its length."""
    try:
        os.posix_fallocate(descriptor, 0, size)
    except AttributeError:  # macOS
        os.ftruncate(descriptor, size)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        os.ftruncate(descriptor, size)


def write_at(descriptor: int, data: bytes | bytearray | memoryview, at: int) -> int:
    """Writes all of `data`, however often the system takes only a part; returns where it ends."""
    view = memoryview(data).cast("B")
    while view:
        written = os.pwrite(descriptor, view, at)
        at, view = at + written, view[written:]
    return at


def copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(source, "rb") as read, open(target, "wb") as write:
        shutil.copyfileobj(read, write, CHUNK)
        write.flush()
        os.fsync(write.fileno())


def write_durably(path: Path, data: bytes) -> None:
    """A small file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    with open(part, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.rename(part, path)


def hash_range(descriptor: int, start: int, size: int) -> str:
    """sha256 of `size` bytes from `start`."""
    digest = hashlib.sha256()
    for chunk in read_range(descriptor, start, size):
        digest.update(chunk)
    return digest.hexdigest()


def hash_file(path: Path) -> str:
    """sha256 of a file."""
    with open(path, "rb", buffering=0) as file:
        return hash_range(file.fileno(), 0, os.fstat(file.fileno()).st_size)


def read_range(descriptor: int, start: int, size: int) -> Iterator[bytes]:
    """The bytes from `start`, in chunks; fewer when the file ends before."""
    end = start + size
    while start < end:
        chunk = os.pread(descriptor, min(CHUNK, end - start), start)
        if not chunk:
            return
        start += len(chunk)
        yield chunk


def sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def rename(source: Path, target: Path, flag: int) -> bool:
    """`renameat2`: atomic, and never over something by accident. False where the system or file system lacks it."""
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is None:
        return False
    if call(AT_FDCWD, os.fsencode(source), AT_FDCWD, os.fsencode(target), flag) == 0:
        return True
    code = ctypes.get_errno()
    if code in UNSUPPORTED:
        return False
    raise OSError(code, os.strerror(code), str(target))


@contextlib.contextmanager
def named_errors(path: Path) -> Iterator[None]:
    """The operating system's refusals as problems that name the file and what to do."""
    try:
        yield
    except QuantplanError:
        raise
    except OSError as error:
        where = str(error.filename or path)
        if error.errno in NO_SPACE:
            raise fail(
                "QP401",
                f"no space left: {error.strerror}",
                "free space and repeat the command: it goes on from here",
                file=where,
            ) from error
        if error.errno in NO_PERMISSION:
            raise fail("QP402", f"not allowed: {error.strerror}", "choose an output where you may write", file=where) from error
        raise fail("QP403", f"cannot be written: {error.strerror or error}", "", file=where) from error
