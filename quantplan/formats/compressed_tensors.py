"""compressed-tensors: the layout vLLM, SGLang and transformers read.

Tensor names, shapes and config groups follow compressed-tensors 0.20 and vLLM 0.33. Integers are packed densely, lowest bits
first, as offset binary; scales are `[rows, groups]`; `ignore` lists leaves only; groups name every module, so that no two
readers can disagree on which group a module is in.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from quantplan.assignment import Assignment
from quantplan.format import FORMATS, Format
from quantplan.kv_cache import KVCache
from quantplan.models.modules import Matrix
from quantplan.scheme import BLOCK, Layout, Params, SchemeConfig

if TYPE_CHECKING:
    from torch import Tensor

    from quantplan.tensor import QuantizedTensor

_EXPERT_NAME = re.compile(r"\.experts\.\d+\.[^.]+$")
ACTIVATIONS = ("int4", "int8", "fp8")
STATIC = ("int8", "fp8", "nvfp4")


@FORMATS.register("compressed-tensors")
class CompressedTensors(Format):
    """compressed-tensors checkpoints."""

    engines: ClassVar[tuple[str, ...]] = ("transformers", "vllm")

    def refuse(self, assignment: Assignment) -> str | None:
        wq, aq = assignment.wq, assignment.aq
        assert wq is not None
        if assignment.module.kind == "embedding":
            return "embeddings cannot be quantized in it"
        if assignment.module.conv1d:  # compressed-tensors 0.20 replaces nn.Linear; vLLM transposes tensors called `weight` alone
            return "its readers find no quantized weights for a Conv1D, as GPT-2 has; output: {format: quantplan} holds them"
        element = getattr(wq, "format", "")
        if wq.name in ("fp4", "nf4"):
            return f"it has no {wq.name}; nvfp4 and mxfp4 are its 4-bit floats"
        if element in ("e5m2", "e3m2"):
            return f"it has no {element}: engines read {'e4m3' if wq.bits == 8 else 'e2m3'} only"
        if wq.strategy == "token":
            return "weights have no tokens"
        if wq.name.startswith("int") and wq.strategy == "block":
            return "it has no blocks of integers"
        if wq.name.startswith("int") and wq.strategy == "tensor" and (wq.name != "int8" or not wq.symmetric_grid):
            return "one scale for the whole tensor is held for symmetric int8 only"
        if aq is not None and not aq.dynamic and ".experts." in f"{assignment.name}.":
            return "static activations of experts, which may not be given a single token to take a range from"
        return self._refuse_activations(wq, aq) if aq is not None else None

    def _refuse_activations(self, wq: SchemeConfig, aq: SchemeConfig) -> str | None:
        if not aq.dynamic:
            return self._refuse_static(wq, aq)
        if aq.name not in ACTIVATIONS:
            others = f", and {aq.name} with dynamic: false" if aq.name in STATIC else ""
            return f"dynamic {aq.name} activations; it has {', '.join(ACTIVATIONS)}{others}"
        if getattr(aq, "format", "e4m3") != "e4m3":
            return "activations in e5m2"
        if not wq.name.startswith(("int", "fp8")) or (wq.name == "fp8" and aq.name != "fp8"):
            return f"{wq.name} weights with {aq.name} activations"
        if wq.name == "fp8" and wq.strategy == "block":
            return (
                None
                if aq.group == BLOCK
                else f"blocks of fp8 need activations in groups of {BLOCK}: aq: {{scheme: fp8, group_size: {BLOCK}}}"
            )
        return None if aq.strategy == "token" else "dynamic activations need one scale per token"

    def _refuse_static(self, wq: SchemeConfig, aq: SchemeConfig) -> str | None:
        if aq.name not in STATIC:
            return f"static {aq.name} activations; it has {', '.join(STATIC)}"
        if getattr(aq, "format", "e4m3") != "e4m3":
            return "activations in e5m2"
        if "nvfp4" in (wq.name, aq.name) and wq.name != aq.name:
            return f"{wq.name} weights with {aq.name} activations"
        if not wq.name.startswith(("int", "fp8", "nvfp4")) or (wq.name == "fp8" and aq.name != "fp8"):
            return f"{wq.name} weights with {aq.name} activations"
        if wq.name == "fp8" and wq.strategy == "block":
            return f"blocks of fp8 need dynamic activations in groups of {BLOCK}: aq: {{scheme: fp8, group_size: {BLOCK}}}"
        return None

    def layout(self, matrix: Matrix, wq: SchemeConfig, aq: SchemeConfig | None) -> Layout:
        rows, columns, name = matrix.rows, matrix.columns, matrix.name
        params = wq.param_layout(rows, columns)
        out: dict[str, tuple[str, tuple[int, ...]]] = {}
        kind = _storage(wq, aq)
        if kind == "pack-quantized":
            out[f"{name}.weight_packed"] = ("I32", (rows, _words(columns, wq.bits)))
            out[f"{name}.weight_shape"] = ("I64", (2,))
            if "zero_point" in params:
                out[f"{name}.weight_zero_point"] = ("I32", (_words(rows, wq.bits), params["zero_point"][1][1]))
        elif kind in ("nvfp4-pack-quantized", "mxfp4-pack-quantized"):
            out[f"{name}.weight_packed"] = ("U8", (rows, columns // 2))
        elif kind == "mxfp6-pack-quantized":
            out[f"{name}.weight_packed"] = ("U8", (rows, columns * 3 // 4))
        else:
            out[f"{name}.weight"] = ("I8" if wq.name.startswith("int") else "F8_E4M3", (rows, columns))
        scale_dtype, scale_shape = params["scale"]
        out[f"{name}.weight_scale"] = (scale_dtype, (1,) if wq.strategy == "tensor" else scale_shape)
        if "global_scale" in params:
            out[f"{name}.weight_global_scale"] = ("F32", (1,))
        inputs = self.layout_inputs(matrix, aq)
        return {**out, **{n: ("I8" if n.endswith("zero_point") else dtype, shape) for n, (dtype, shape) in inputs.items()}}

    def encode(self, matrix: Matrix, quantized: QuantizedTensor, aq: SchemeConfig | None) -> dict[str, Tensor]:
        import torch

        from quantplan.numerics import pack_bits

        wq, name, codes, params = quantized.scheme, matrix.name, quantized.codes, quantized.params
        kind, out = _storage(wq, aq), {}
        if kind == "pack-quantized":
            out[f"{name}.weight_packed"] = pack_bits(codes, wq.bits).view(torch.int32)
            out[f"{name}.weight_shape"] = torch.tensor([matrix.rows, matrix.columns])
            if "zero_point" in params:
                packed = pack_bits(params["zero_point"].t().contiguous(), wq.bits).view(torch.int32)
                out[f"{name}.weight_zero_point"] = packed.t().contiguous()
        elif kind.endswith("-pack-quantized"):
            width = matrix.columns * wq.bits // 8
            out[f"{name}.weight_packed"] = pack_bits(codes, wq.bits)[:, :width].contiguous()
        elif wq.name.startswith("int"):
            out[f"{name}.weight"] = (codes ^ 2 ** (wq.bits - 1)).view(torch.int8)
        else:
            out[f"{name}.weight"] = codes.view(torch.float8_e4m3fn)
        out[f"{name}.weight_scale"] = params["scale"].reshape(1) if wq.strategy == "tensor" else params["scale"]
        if "global_scale" in params:
            out[f"{name}.weight_global_scale"] = params["global_scale"]
        return out

    def decode(self, matrix: Matrix, wq: SchemeConfig, aq: SchemeConfig | None, read: Callable[[str], Tensor]) -> QuantizedTensor:
        import torch

        from quantplan.numerics import unpack_bits
        from quantplan.tensor import QuantizedTensor

        name, kind = matrix.name, _storage(wq, aq)
        grid = wq.param_layout(matrix.rows, matrix.columns)["scale"][1]
        params = {"scale": read(f"{name}.weight_scale").reshape(grid)}
        if kind.endswith("pack-quantized"):
            codes = unpack_bits(read(f"{name}.weight_packed").view(torch.uint8), wq.bits, matrix.columns)
        elif wq.name.startswith("int"):
            codes = read(f"{name}.weight").view(torch.uint8) ^ 2 ** (wq.bits - 1)
        else:
            codes = read(f"{name}.weight").view(torch.uint8)
        if not wq.symmetric_grid:
            stored = read(f"{name}.weight_zero_point")  # [words, groups]; a single word keeps a stride that `view` refuses
            packed = stored.t().reshape(-1).view(torch.uint8).view(stored.shape[1], -1)
            params["zero_point"] = unpack_bits(packed, wq.bits, matrix.rows).t().contiguous()
        if wq.needs_absmax:
            params["global_scale"] = read(f"{name}.weight_global_scale")
        return QuantizedTensor(codes, params, wq)

    def encode_inputs(self, matrix: Matrix, params: Params) -> dict[str, Tensor]:
        import torch

        signed = {n: (p ^ 128).view(torch.int8) if n == "zero_point" else p for n, p in params.items()}
        return super().encode_inputs(matrix, signed)

    def decode_inputs(self, matrix: Matrix, aq: SchemeConfig | None, read: Callable[[str], Tensor]) -> Params:
        import torch

        found = super().decode_inputs(matrix, aq, read)
        return {n: p.view(torch.uint8) ^ 128 if n == "zero_point" else p for n, p in found.items()}

    def refuse_cache(self, cache: KVCache) -> str | None:
        return None

    def config(self, assignments: Sequence[Assignment], cache: KVCache | None = None) -> Mapping[str, Any]:
        groups: dict[str, list[str]] = {}  # what readers are told -> modules: options they never see split no group
        ignored: list[str] = []
        for a in assignments:
            if a.wq is not None:
                groups.setdefault(json.dumps(_group(a.wq, a.aq)), []).extend(m.name for m in a.matrices)
            elif a.module.matrices and a.module.kind != "embedding":
                ignored += [m.name for m in a.module.matrices]
        if "lm_head" not in ignored and not any("lm_head" in names for names in groups.values()):
            ignored.append("lm_head")  # tied: not stored, but a Linear when loaded
        everything = [name for names in groups.values() for name in names] + ignored
        described = [{"targets": _targets(names, everything), **json.loads(group)} for group, names in groups.items()]
        kinds = {group["format"] for group in described} or {"dense"}
        return {
            "quant_method": "compressed-tensors",
            "format": kinds.pop() if len(kinds) == 1 else "mixed-precision",
            "quantization_status": "compressed",
            "global_compression_ratio": None,
            "kv_cache_scheme": None if cache is None else _cache_arguments(cache),
            "ignore": _targets(ignored, everything),
            "config_groups": {f"group_{i}": group for i, group in enumerate(described)},
        }


def _group(wq: SchemeConfig, aq: SchemeConfig | None) -> dict[str, Any]:
    """A config group without its targets."""
    return {
        "format": _storage(wq, aq),
        "weights": _arguments(wq),
        "input_activations": None if aq is None else _activation_arguments(aq),
        "output_activations": None,
    }


def _targets(names: Sequence[str], everything: Sequence[str]) -> list[str]:
    """Names as they are, except experts, which come in thousands: one expression a projection, where it matches these names
    and no others."""
    kinds: dict[str, list[str]] = {}
    for name in names:
        kinds.setdefault(_expert_kind(name) or name, []).append(name)
    if all(kind == name for kind, (name, *_) in kinds.items()):
        return list(names)
    totals = Counter(kind for name in everything if (kind := _expert_kind(name)))
    targets = []
    for kind, members in kinds.items():
        whole = kind != members[0] and totals[kind] == len(members)
        targets += [f"re:{kind}"] if whole else members
    return targets


def _expert_kind(name: str) -> str:
    """The expression for all experts' matrices of one kind, anchored at its end; empty for other modules. It begins loosely, for
    engines load some models under another prefix."""
    if not _EXPERT_NAME.search(name):
        return ""
    parts = name.split(".")
    first = next(i for i, part in enumerate(parts) if part.isdigit())
    tail = (r"\d+" if part.isdigit() else re.escape(part) for part in parts[max(0, first - 1) :])
    return r".*\." + r"\.".join(tail) + "$"


def _words(count: int, bits: int) -> int:
    return -(-count * bits // 32)


def _storage(wq: SchemeConfig, aq: SchemeConfig | None) -> str:
    """The name compressed-tensors gives the layout of one group."""
    if wq.name in ("nvfp4", "mxfp4", "mxfp6"):
        return f"{wq.name}-pack-quantized"
    if wq.name == "mxfp8":
        return "mxfp8-quantized"
    if wq.name == "fp8":
        return "float-quantized" if aq is not None else "naive-quantized"
    if wq.strategy == "tensor":
        return "naive-quantized" if aq is None else "int-quantized"
    # only beside int8 activations: vLLM takes any plain int8 for W8A8, whatever the activations are meant to be
    plain = wq.name == "int8" and aq is not None and aq.name == "int8" and wq.symmetric_grid and wq.strategy == "channel"
    return "int-quantized" if plain else "pack-quantized"


def _arguments(wq: SchemeConfig) -> dict[str, Any]:
    """`QuantizationArgs` of weights."""
    arguments: dict[str, Any] = {
        "num_bits": wq.bits,
        "type": "int" if wq.name.startswith("int") else "float",
        "symmetric": wq.symmetric_grid,
        "strategy": "tensor_group" if wq.name == "nvfp4" else wq.strategy,
        "group_size": wq.group,
        "dynamic": False,
    }
    if wq.strategy == "block":
        arguments["block_structure"] = [BLOCK, BLOCK]
    if wq.name == "nvfp4":
        arguments |= {"scale_dtype": "torch.float8_e4m3fn", "zp_dtype": "torch.float8_e4m3fn"}
    elif wq.name.startswith("mx"):
        arguments |= {"scale_dtype": "torch.uint8", "zp_dtype": "torch.uint8"}
    return arguments


def _cache_arguments(cache: KVCache) -> dict[str, Any]:
    """`QuantizationArgs` of keys and values."""
    return _arguments(cache.scheme) | {"strategy": "tensor" if cache.heads is None else "attn_head"}


def _activation_arguments(aq: SchemeConfig) -> dict[str, Any]:
    """`QuantizationArgs` of activations. `local`: blocks are dynamic below a static scale of the tensor."""
    return _arguments(aq) | {"dynamic": aq.dynamic or ("local" if aq.tensor_params else False)}
