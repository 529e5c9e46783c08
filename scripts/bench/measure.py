"""Measuring commands: wall and CPU time and peak memory of a whole process tree, and how figures are printed."""

import json
import os
import statistics
import subprocess
import threading
import time
from contextlib import suppress
from pathlib import Path

POLL = 0.02  # seconds between looks at a running command


class Failed(Exception):
    """A command ended with an error; the text is the end of what it said."""


def run(command, env=None, log=None):
    """Runs a command to its end: {"wall", "cpu", "rss"}, in seconds and bytes. Raises Failed.

    CPU time is that of the command and of every process it waited for. Memory is the largest of one process (the kernel's
    own maximum), or the sum over the tree where several live at once, shared pages counted once (sampled).
    """
    with open(log or os.devnull, "wb") as output:
        started = time.perf_counter()
        process = subprocess.Popen(command, env=env, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT)
        ended, together = threading.Event(), [0]
        watcher = threading.Thread(target=_watch, args=(process.pid, ended, together))
        watcher.start()
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - started
        ended.set()
        watcher.join()
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        tail = Path(log).read_text(errors="replace")[-2000:] if log else ""
        raise Failed(f"{' '.join(map(str, command))} ended with {process.returncode}\n{tail}")
    return {"wall": wall, "cpu": usage.ru_utime + usage.ru_stime, "rss": max(*together, usage.ru_maxrss * 1024)}


def _watch(pid, ended, together):
    """Adds to `together` the memory of the tree, now and then, until its root has ended."""
    while not ended.wait(POLL):
        together.append(_memory_of_tree(pid))


def _memory_of_tree(root):
    """Proportional memory of a tree of several processes, in bytes; 0 for a single one, whose maximum the kernel keeps."""
    tree = _descendants(root)
    return sum(map(_proportional, tree)) if len(tree) > 1 else 0


def _descendants(root):
    """A process and everything below it."""
    found = [root]
    for pid in found:
        with suppress(OSError):
            for task in os.listdir(f"/proc/{pid}/task"):
                found += map(int, Path(f"/proc/{pid}/task/{task}/children").read_text().split())
    return found


def _proportional(pid):
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    return 0


def median(values):
    return statistics.median(values)


def spread(values, unit="", digits=2):
    """`1.52 s (1.49 to 1.61)`: the median, the least and the most."""
    middle, low, high = (f"{v:.{digits}f}" for v in (median(values), min(values), max(values)))
    return f"{middle}{unit} ({low} to {high})"


def table(rows, headings):
    """Prints rows of text, aligned; all columns but the first to the right."""
    widths = [max(len(r[i]) for r in [headings, *rows]) for i in range(len(headings))]
    for row in [headings, *rows]:
        cells = [c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        print("  ".join(cells).rstrip())


class Targets:
    """Figures beside what they should be."""

    def __init__(self):
        self.results = []

    def check(self, what, value, most, unit=""):
        """Prints one target and notes whether it is met."""
        met = value <= most
        print(f"{'met   ' if met else 'MISSED'}  {what}: {value:.2f}{unit}, at most {most:.2f}{unit}", flush=True)
        self.results.append({"what": what, "value": value, "most": most, "met": met})

    @property
    def status(self):
        """The exit status: 1 when a target is missed."""
        return int(not all(r["met"] for r in self.results))


def machine():
    """What the figures were measured on."""
    names = {}
    with suppress(OSError):
        names = dict(line.split(":", 1) for line in Path("/proc/cpuinfo").read_text().splitlines() if ":" in line)
        names = {k.strip(): v.strip() for k, v in names.items()}
    return {"cpu": names.get("model name", "unknown"), "cores": os.cpu_count(), "load": round(os.getloadavg()[0], 2)}


def save(path, document):
    """Writes figures as JSON, where a file was asked for."""
    if path is not None:
        Path(path).write_text(json.dumps(document, indent=2) + "\n")
