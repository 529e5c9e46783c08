"""What engines can run, as data: limits a plan is checked against before anything is read. One function an engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from quantplan.assignment import Assignment
from quantplan.kv_cache import KVCache
from quantplan.models.modules import SIBLINGS
from quantplan.scheme import BLOCK, SchemeConfig

Refusal = str | None
W4AFP8_GROUP = 128  # the one group size of vLLM's int4 weights with fp8 activations


@dataclass(frozen=True)
class Engine:
    """An engine: the formats it opens, whether it fuses sibling layers, why it cannot run an assignment (or None), what to
    know about one it can, whether it reads all experts of a model with the scheme of the first, and why it cannot run a key-value
    cache."""

    name: str
    formats: tuple[str, ...]
    fuses: bool
    refuse: Callable[[Assignment, str], Refusal]
    remark: Callable[[Assignment, str], Refusal] = lambda assignment, dtype: None
    one_scheme_for_experts: bool = False
    refuse_cache: Callable[[KVCache], Refusal] = lambda cache: None


def _integer_asymmetric(a: Assignment) -> bool:
    return a.wq is not None and not a.wq.symmetric_grid


def is_expert(a: Assignment) -> bool:
    """Whether it is one of a mixture's experts, or all of them as one tensor; not a shared expert."""
    return a.module.kind == "experts" or ".experts." in a.name


def _transformers(a: Assignment, dtype: str) -> Refusal:
    wq, aq = a.wq, a.aq
    if wq is None:
        split = a.module.kind == "experts" and a.module.matrices[0].transposed
        return "beside quantized layers these experts are read one by one, not fused: quantize them too" if split else None
    if wq.name in ("nvfp4", "mxfp4", "mxfp8") and dtype != "bfloat16":
        return f"{wq.name} decompresses to bfloat16, and the model is {dtype or 'not'}"
    return _transformers_experts(wq, aq) if is_expert(a) else None


def _transformers_experts(wq: SchemeConfig, aq: SchemeConfig | None) -> Refusal:
    """Experts are read by a path of their own: some layouts stop it, and nvfp4 without its tensor scale is silently wrong."""
    if wq.name.startswith("int") and wq.symmetric_grid and wq.strategy != "tensor":
        if wq.name == "int8" and wq.strategy == "channel" and aq is not None and aq.name == "int8":
            return (
                "experts in int8 with int8 activations are stored unpacked, and it reads packed integers only (groups are packed)"
            )
        return None
    if wq.name in ("mxfp4", "mxfp6") or (wq.name == "fp8" and wq.strategy in ("tensor", "channel")):
        return None
    return "experts are read from packed symmetric integers, mxfp4, mxfp6, and fp8 with a scale per tensor or channel only"


def _transformers_remark(a: Assignment, dtype: str) -> Refusal:
    if a.wq is None or _transformers(a, dtype):
        return None
    if _integer_asymmetric(a):
        return (
            "compressed-tensors 0.18 to 0.20 loads packed integers with a zero point only when told to dequantize: "
            "from_pretrained(out, quantization_config=CompressedTensorsConfig(dequantize=True)), or quantplan.load(out)"
        )
    if a.aq is not None and is_expert(a):
        return f"activations of experts stay {dtype or 'as they are'}: {a.aq.name} is not applied"
    if a.wq.name in ("int3", "int5", "int6", "int7"):
        return "needs compressed-tensors 0.18 or later, which reads dense 3-, 5-, 6- and 7-bit packing"
    return None


def _vllm(a: Assignment, dtype: str) -> Refusal:
    """vLLM 0.32: what its config parser and its choice of a class accept."""
    wq, aq = a.wq, a.aq
    if wq is None:
        return None
    if wq.name == "mxfp6":
        return "knows no 6-bit float"
    if wq.name == "fp8" and wq.strategy == "group":
        return "fp8 weights need a scale per tensor, channel or block, not per group"
    if wq.name == "fp8" and wq.strategy == "block":
        return _fused_blocks(a)
    if not wq.name.startswith("int"):
        return None
    if wq.strategy == "tensor" and aq is None:
        return "weight-only integers need a scale per group or channel"
    return None if aq is None else _vllm_integer_activations(wq, aq)


def _vllm_integer_activations(wq: SchemeConfig, aq: SchemeConfig) -> Refusal:
    if not aq.dynamic:
        held = wq.name == aq.name == "int8" and wq.symmetric_grid and wq.strategy in ("channel", "tensor")
        return None if held else "static activations beside integers need int8, and symmetric int8 weights per channel or tensor"
    if aq.name == "fp8":
        held = wq.name == "int4" and wq.symmetric_grid and wq.group == W4AFP8_GROUP
        return None if held else f"fp8 activations need symmetric int4 weights in groups of {W4AFP8_GROUP}"
    if wq.strategy == "tensor" and aq.name != "int8":
        return "one scale for the whole tensor needs int8 activations"
    plain = wq.name == aq.name == "int8" and wq.symmetric_grid and wq.strategy in ("channel", "tensor")
    return None if plain or aq.symmetric_grid else "activations with a zero point need symmetric int8 weights per channel"


def _vllm_cache(cache: KVCache) -> Refusal:
    return None if cache.scheme.name == "fp8" else f"key-value caches are fp8 there, not {cache.scheme.name}"


def _fused_blocks(a: Assignment) -> Refusal:
    """Blocks must not straddle the matrices of a fused layer. The last of them may end anywhere, but not in experts."""
    part, rows = a.matrices[0].name.rpartition(".")[2], a.matrices[0].rows
    family = next((family for family in SIBLINGS if part in family), None)
    if family is None or rows % BLOCK == 0 or (part == family[-1] and not is_expert(a)):
        return None
    return f"blocks in a layer it fuses with others need multiples of {BLOCK} rows, this one has {rows}"


def _vllm_remark(a: Assignment, dtype: str) -> Refusal:
    if a.wq is not None and a.aq is not None and a.wq.name == "int4" and a.aq.name == "fp8" and not _vllm(a, dtype):
        return "int4 weights with fp8 activations run on Hopper GPUs only (sm_90)"
    return None


def _vllm_cpu(a: Assignment, dtype: str) -> Refusal:
    """vLLM 0.32 on an x86 CPU without AMX, which is what was tried."""
    wq, aq = a.wq, a.aq
    if wq is None:
        return None
    general = _vllm(a, dtype)
    if general:
        return general
    if is_expert(a):
        return "quantized experts need a CPU with AMX, or a GPU"
    if wq.name == "int8" and aq is not None and aq.name == "int8" and wq.symmetric_grid and wq.strategy != "group":
        return None
    if wq.name.startswith("int") and (aq is None or aq.name != "fp8"):
        return _vllm_cpu_packed(a)
    if wq.name == "fp8" and aq is not None and (wq.strategy == "tensor" or not aq.dynamic):
        return "its CPU build lacks what fp8 with one scale for the whole tensor needs, of weights or of activations"
    if wq.name == "fp8" and aq is not None:
        return "fp8 blocks need a CPU with AMX, or a GPU" if wq.strategy == "block" else None
    return f"has no CPU kernel for {wq.name} weights with {aq.name if aq else 'unquantized'} activations"


def _vllm_cpu_packed(a: Assignment) -> Refusal:
    """Packed integers: one kernel, which leaves activations as they are."""
    assert a.wq is not None
    if a.wq.name != "int4":
        return "packed integers (all but W8A8 with a scale per channel or tensor) have a CPU kernel for 4 bits only"
    rows, columns = a.matrices[0].rows, a.matrices[0].columns
    if rows % 32 or columns % 32:
        return f"its CPU kernel for 4 bits needs multiples of 32, the layer is [{rows}, {columns}]"
    if a.wq.group is not None and a.wq.group % 2:
        return f"its CPU kernel for 4 bits needs even groups, not {a.wq.group}"
    return None


def _vllm_cpu_remark(a: Assignment, dtype: str) -> Refusal:
    if a.wq is not None and a.aq is not None and a.wq.name == "int4" and not _vllm_cpu(a, dtype):
        return f"on a CPU, activations beside int4 weights stay {dtype or 'as they are'}: {a.aq.name} is not applied"
    return None


ENGINES: Mapping[str, Engine] = {
    e.name: e
    for e in (
        Engine("transformers", ("compressed-tensors", "quantplan"), False, _transformers, _transformers_remark, True),
        Engine("vllm", ("compressed-tensors",), True, _vllm, _vllm_remark, refuse_cache=_vllm_cache),
        Engine("vllm-cpu", ("compressed-tensors",), True, _vllm_cpu, _vllm_cpu_remark, refuse_cache=_vllm_cache),
    )
}
