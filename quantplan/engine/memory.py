"""How the C library keeps memory while a calibration runs. Does nothing where that is not glibc."""

from __future__ import annotations

import contextlib
import ctypes

KEPT = 1 << 30  # bytes that are freed and not given back at once: the next batch fills them again
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8  # parameters of mallopt(3)


def keep_memory() -> None:
    """Keeps freed memory for what comes next, in one place for all threads: a calibration has many threads and frees by the
    gigabyte what it takes again at once. Of the whole process, and for good. To be called before the threads are started."""
    with contextlib.suppress(OSError, AttributeError):
        for parameter, value in ((_ARENA_MAX, 1), (_MMAP_THRESHOLD, KEPT), (_TRIM_THRESHOLD, KEPT)):
            ctypes.CDLL(None).mallopt(parameter, value)


def return_memory() -> None:
    """Gives what is kept back to the operating system."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
