"""Triton's kernels: right in Triton's interpreter, and compiled for GPUs, which takes none."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_kernels import job, scheme

from quantplan import gpu
from quantplan.kernel import KERNELS, serving

HERE = Path(__file__).parent


@pytest.mark.parametrize("file", ["triton_kernels.py", "triton_rounding.py"])
def test_in_the_interpreter(file) -> None:
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", str(HERE / file)]
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=HERE.parent)
    assert done.returncode == 0, done.stdout[-20000:] + done.stderr[-2000:]


def test_the_cpu_is_not_served_without_the_interpreter() -> None:
    assert not gpu.interpreted()
    assert gpu.refuse(torch.device("cpu")) == "it runs on cuda, not on cpu"
    found = serving(job(scheme("nf4")))
    assert found is None or found.name != "triton"
    assert KERNELS.get("triton").refuse(job(scheme("nf4"))) == "it runs on cuda, not on cpu"


def test_a_missing_triton_is_said(monkeypatch) -> None:
    monkeypatch.setattr(gpu, "_installed", lambda: False)
    assert gpu.refuse(torch.device("cuda")) == "the package triton is not installed (pip install quantplan[gpu])"


@pytest.mark.parametrize(
    "name, capability",
    [("int4", 80), ("int3", 80), ("int4", 90), ("int3", 90), ("fp8", 90), ("nf4", 90), ("nvfp4", 90), ("mxfp4", 90)],
)
def test_kernels_compile_for_gpus(name, capability, tmp_path, monkeypatch) -> None:
    """To machine code, within the shared memory of the smallest GPU of its generation (8.6: 99 KiB)."""
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    import triton_compiled

    for kernel in (
        *triton_compiled.matmul_kernels(scheme(name), capability),
        *triton_compiled.rounding(scheme(name), capability),
    ):
        assert kernel.asm["cubin"]
        assert kernel.metadata.shared <= 99 * 1024


@pytest.mark.skipif(torch.cuda.is_available(), reason="it would measure")
def test_the_benchmark_says_that_there_is_no_gpu() -> None:
    done = subprocess.run([sys.executable, str(HERE.parent / "scripts/bench/gpu")], capture_output=True, text=True)
    assert done.returncode == 4 and done.stdout == "" and "no GPU" in done.stderr
