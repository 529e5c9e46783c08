"""What engines can run, as data: limits a plan is checked against before anything is read. One function an engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from quantplan.assignment import Assignment

Refusal = str | None


@dataclass(frozen=True)
class Engine:
    """An engine: the formats it opens, whether it fuses sibling layers, and why it cannot run an assignment (or None)."""

    name: str
    formats: tuple[str, ...]
    fuses: bool
    refuse: Callable[[Assignment, str], Refusal]
    remark: Callable[[Assignment, str], Refusal] = lambda assignment, dtype: None


def _integer_asymmetric(a: Assignment) -> bool:
    return a.wq is not None and not a.wq.symmetric_grid


def _transformers(a: Assignment, dtype: str) -> Refusal:
    if a.wq is None:
        split = a.module.kind == "experts" and a.module.matrices[0].transposed
        return "beside quantized layers these experts are read one by one, not fused: quantize them too" if split else None
    if a.wq.name in ("nvfp4", "mxfp4", "mxfp8") and dtype != "bfloat16":
        return f"{a.wq.name} decompresses to bfloat16, and the model is {dtype or 'not'}"
    if a.module.kind == "experts" and (_integer_asymmetric(a) or not a.wq.name.startswith(("int", "fp8"))):
        return "experts are read from symmetric integers and fp8 only"
    return None


def _transformers_remark(a: Assignment, dtype: str) -> Refusal:
    if _integer_asymmetric(a):
        return (
            "compressed-tensors 0.18 to 0.20 loads packed integers with a zero point only when told to dequantize: "
            "from_pretrained(out, quantization_config=CompressedTensorsConfig(dequantize=True)), or quantplan.load(out)"
        )
    if a.wq is not None and a.aq is None and a.wq.name in ("int3", "int5", "int6", "int7"):
        return "needs compressed-tensors 0.18 or later, which reads dense 3-, 5-, 6- and 7-bit packing"
    return None


def _vllm(a: Assignment, dtype: str) -> Refusal:
    wq, aq = a.wq, a.aq
    if wq is None:
        return None
    if wq.name == "mxfp6":
        return "knows no 6-bit float"
    if wq.name == "fp8" and wq.strategy == "group":
        return "fp8 weights need a scale per tensor, channel or block, not per group"
    if wq.name.startswith("int") and wq.strategy == "tensor" and aq is None:
        return "weight-only integers need a scale per group or channel"
    if wq.name == "int8" and aq is not None and aq.name == "int8" and _integer_asymmetric(a):
        return "W8A8 weights must be symmetric"
    return None


def _vllm_cpu(a: Assignment, dtype: str) -> Refusal:
    wq, aq = a.wq, a.aq
    if wq is None:
        return None
    general = _vllm(a, dtype)
    if general:
        return general
    rows, columns = a.matrices[0].rows, a.matrices[0].columns
    if wq.name.startswith("int") and aq is None:
        if wq.name != "int4":
            return "weight-only integers have a CPU kernel for 4 bits only"
        if rows % 32 or columns % 32:
            return f"its CPU kernel needs multiples of 32, the layer is [{rows}, {columns}]"
        return None
    if wq.name == "int8" and aq is not None and aq.name == "int8" and wq.strategy in ("channel", "tensor"):
        return None
    if wq.name == "fp8" and aq is not None and wq.strategy in ("channel", "tensor"):
        return None
    return f"has no CPU kernel for {wq.name}{' with quantized activations' if aq else ' weights'}"


ENGINES: Mapping[str, Engine] = {
    e.name: e
    for e in (
        Engine("transformers", ("compressed-tensors", "quantplan"), False, _transformers, _transformers_remark),
        Engine("vllm", ("compressed-tensors",), True, _vllm),
        Engine("vllm-cpu", ("compressed-tensors",), True, _vllm_cpu),
    )
}
