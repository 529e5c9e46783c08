"""Where the memory of a calibration lies: what the C library keeps, where that is glibc, and hidden states on disk."""

from __future__ import annotations

import contextlib
import ctypes
import tempfile
import threading
import weakref
from pathlib import Path

import torch
from torch import Tensor

from quantplan.checkpoint import durable

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


def room() -> int:
    """Bytes that hidden states may take in memory: a quarter of what is free now. The rest is for what a block computes."""
    import psutil

    return int(psutil.virtual_memory().available // 4)


class HiddenStates:
    """Where hidden states wait: in memory until those that are alive fill the room there was at the start, then in files of
    `folder`. From any thread."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.limit = folder, room()
        self._held: list[weakref.ref[Tensor]] = []
        self._lock = threading.Lock()

    def keep(self, state: Tensor) -> Tensor:
        """`state` as float32, or a copy of it on disk. Raises QP401 where that is full."""
        state = state.float()
        with self._lock:
            held = [(reference, x) for reference in self._held if (x := reference()) is not None]
            self._held = [reference for reference, _ in held]
            if sum(x.nbytes for _, x in held) + state.nbytes <= self.limit:
                self._held.append(weakref.ref(state))
                return state
        with durable.named_errors(self.folder):
            return on_disk(state, self.folder)


def on_disk(x: Tensor, folder: Path) -> Tensor:
    """A copy of `x` in a file of `folder` that has no name any more and goes when the tensor does; its pages are in memory while
    there is room. Raises OSError where the disk is full."""
    with tempfile.NamedTemporaryFile(dir=folder, prefix="hidden-") as file:
        durable.allocate(file.fileno(), max(1, x.nbytes))  # a page that finds no place later would end the process
        made = torch.from_file(file.name, shared=True, size=x.numel(), dtype=x.dtype).view(x.shape)
        return made.copy_(x)
