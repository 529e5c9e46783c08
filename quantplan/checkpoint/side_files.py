"""The files beside the weights: which are copied byte for byte, and the config.json of the output."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quantplan.checkpoint.layout import json_bytes
from quantplan.checkpoint.reader import reading
from quantplan.errors import fail
from quantplan.format import FORMATS
from quantplan.headers import INDEX, PICKLES, Checkpoint
from quantplan.plan.resolve import Resolution

NOT_COPIED = (*PICKLES, ".safetensors", ".gguf", ".onnx", ".lock", ".index.json")  # indexes are of weights left behind
NOT_ENTERED = {"original", "onnx", "openvino", "metal"}
WRITTEN = {"config.json", "quantplan.json", INDEX}
PRIVATE_KEYS = ("_attn_implementation_internal", "trust_remote_code")  # would run code when loaded


def side_files(checkpoint: Checkpoint) -> dict[str, Path]:
    """Relative name -> file, for everything that belongs to the model and is not a weight: tokenizer, templates, generation
    config, licences, code. Hidden files, other weights, their indexes and pickles stay behind. Raises QP303 for links to
    directories and links that lead out."""
    root = checkpoint.require_path()
    found: dict[str, Path] = {}
    folders = [root]
    while folders:
        folder = folders.pop(0)
        with reading(folder):
            paths = sorted(folder.iterdir())
        for path in paths:
            relative = path.relative_to(root).as_posix()
            if path.name.startswith(".") or relative in WRITTEN or path.name.lower().endswith(NOT_COPIED):
                continue
            if path.is_dir():
                if path.is_symlink():  # leads out, or in circles
                    raise fail("QP303", "is a link to a directory", "remove it, or copy its content", file=str(path))
                if relative not in NOT_ENTERED:
                    folders.append(path)
                continue
            found[relative] = checked_side_file(root, path)
    return found


def checked_side_file(root: Path, path: Path) -> Path:
    """A side file that is regular and, if a link, stays in the model directory or the Hub cache's blobs. Raises QP303."""
    try:
        real = path.resolve()
    except (OSError, RuntimeError) as error:
        raise fail("QP303", f"cannot be resolved ({error})", file=str(path)) from None
    home = root.resolve()
    blobs = home.parent.parent / "blobs"
    inside = home in real.parents or (home.parent.name == "snapshots" and blobs in real.parents)
    if not real.is_file() or not inside:
        raise fail(
            "QP303",
            "is not a regular file inside the model directory",
            "remove it, or copy its content",
            file=str(path),
        )
    if not os.access(real, os.R_OK):
        raise fail("QP202", "cannot be read: no permission", file=str(path))
    return path


def output_config(resolution: Resolution) -> bytes:
    """config.json of the output: the source's, with `quantization_config` set, the dtype where the plan changes it, and keys
    that would run code dropped."""
    plan, source = resolution.plan, resolution.checkpoint.config
    config: dict[str, Any] = {k: v for k, v in source.items() if k not in PRIVATE_KEYS}
    if plan.output.dtype:
        for key in ("dtype", "torch_dtype"):
            if key in config or key == "dtype":
                config[key] = plan.output.dtype
    output = FORMATS.get(plan.output.format)()
    config["quantization_config"] = dict(output.config(list(resolution.assignments.values()), resolution.kv_cache))
    return json_bytes(config)


def written_sizes(documents: Mapping[str, bytes], files: Mapping[str, Path]) -> int:
    """Bytes of everything that is not a safetensors file."""
    return sum(map(len, documents.values())) + sum(path.stat().st_size for path in files.values())
