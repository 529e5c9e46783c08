"""Tiny checkpoints on disk, byte by byte where a test needs a wrong one. Torch-free, but for `llama`."""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quantplan.headers import DTYPE_BITS, INDEX

Shapes = Mapping[str, tuple[str, list[int]]]
CONFIG = {"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "tie_word_embeddings": False}
SIDE_FILES = {
    "tokenizer.json": b'{"version": "1.0"}\r\n',
    "generation_config.json": b'{"do_sample": false, "temperature": 0.9}',  # strict loaders refuse it; copied all the same
    "chat_template.jinja": "{{ ''.__class__ }} \u00e9 {% for i in range(10**12) %}{% endfor %}".encode(),
    "modeling_x.py": b"raise SystemExit('code of a checkpoint ran')\n",
    "LICENSE": b"\x00\xff\xfe not text",
    "empty.txt": b"",
    "additional_chat_templates/tool.jinja": b"{{ tools }}\n",
}


def entry(dtype: str, shape: list[int], start: int) -> dict[str, Any]:
    """A header's entry for a tensor whose data begins at `start`."""
    size = DTYPE_BITS[dtype]
    for n in shape:
        size *= n
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, start + size // 8]}


def shard_bytes(header: Any, data: bytes = b"") -> bytes:
    """A safetensors file: `header` as JSON (or as given, when bytes or str), its length before it, `data` after it."""
    raw = header if isinstance(header, bytes) else (header if isinstance(header, str) else json.dumps(header)).encode()
    return len(raw).to_bytes(8, "little") + raw + data


def shard(tensors: Shapes, seed: int = 0) -> bytes:
    """A well-formed file of tensors with random bytes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, (dtype, shape) in tensors.items():
        header[name] = entry(dtype, shape, at)
        at = header[name]["data_offsets"][1]
    return shard_bytes(header, random.Random(seed).randbytes(at))


def index(weight_map: Mapping[str, str]) -> bytes:
    """An index file."""
    return json.dumps({"metadata": {"total_size": 0}, "weight_map": dict(weight_map)}).encode()


def write(folder: Path, files: Mapping[str, bytes], config: Any = CONFIG) -> Path:
    """A directory of files, with a config.json unless `config` is None."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def sharded(
    folder: Path, shards: Mapping[str, Shapes], side_files: Mapping[str, bytes] | None = None, config: Any = CONFIG
) -> Path:
    """A well-formed checkpoint of several shards, with an index."""
    files = {name: shard(tensors, seed) for seed, (name, tensors) in enumerate(shards.items())}
    listed = {tensor: name for name, tensors in shards.items() for tensor in tensors}
    return write(folder, {**files, INDEX: index(listed), **(side_files or {})}, config)


def hub_cache(folder: Path, files: Mapping[str, bytes], commit: str = "c0ffee") -> Path:
    """A snapshot as the Hub's cache lays it out: links into `blobs`, named by hash."""
    repo = folder / "models--org--name"
    snapshot = repo / "snapshots" / commit
    for name, data in files.items():
        blob = repo / "blobs" / hashlib.sha256(data).hexdigest()
        blob.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(data)
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).symlink_to(os.path.relpath(blob, (snapshot / name).parent))
    return snapshot


def llama(
    folder: Path,
    tied: bool = False,
    shards: int = 1,
    hidden: int = 64,
    layers: int = 2,
    vocabulary: int = 256,
    dtype: str = "bfloat16",
    change: Mapping[str, Any] | None = None,
) -> Path:
    """A Llama with random weights, norms, biases and side files. `change`: tensors to set (None: to leave out)."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)
    kind = getattr(torch, dtype)

    def weight(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) * 0.05).to(kind)

    tensors = {"model.embed_tokens.weight": weight(vocabulary, hidden), "model.norm.weight": weight(hidden)}
    for i in range(layers):
        at = f"model.layers.{i}"
        tensors[f"{at}.input_layernorm.weight"] = weight(hidden)
        tensors[f"{at}.post_attention_layernorm.weight"] = weight(hidden)
        for name, rows in (("q_proj", hidden), ("k_proj", hidden // 2), ("v_proj", hidden // 2), ("o_proj", hidden)):
            tensors[f"{at}.self_attn.{name}.weight"] = weight(rows, hidden)
            tensors[f"{at}.self_attn.{name}.bias"] = weight(rows)
        tensors[f"{at}.mlp.gate_proj.weight"] = weight(2 * hidden, hidden)
        tensors[f"{at}.mlp.up_proj.weight"] = weight(2 * hidden, hidden)
        tensors[f"{at}.mlp.down_proj.weight"] = weight(hidden, 2 * hidden)
    if not tied:
        tensors["lm_head.weight"] = weight(vocabulary, hidden)
    for name, value in (change or {}).items():
        if value is None:
            del tensors[name]
        else:
            tensors[name] = value
    config = {**CONFIG, "hidden_size": hidden, "num_hidden_layers": layers, "tie_word_embeddings": tied, "dtype": dtype}
    write(folder, SIDE_FILES, {**config, "architectures": ["LlamaForCausalLM"], "name": "Zo\u00eb"})
    names = list(tensors)
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return folder
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        part = {name: tensors[name] for name in names[i::shards]}
        save_file(part, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (folder / INDEX).write_bytes(index(weight_map))
    return folder


def tree(folder: Path) -> dict[str, str] | None:
    """sha256 of every file below `folder`, and its empty folders; None when there is nothing there."""
    if not os.path.lexists(folder):
        return None
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            found[name] = f"link to {os.readlink(path)}"
        else:
            found[name] = "folder" if path.is_dir() else hashlib.sha256(path.read_bytes()).hexdigest()
    return found
