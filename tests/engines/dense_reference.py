"""A dense model that computes what an output's codes say, made from the float model by exchanging its weights.

A model with exchanged weights is the model saved with them and loaded again, bit for bit. One built by `.to(bfloat16)` is
not: that would round the rotary embedding's frequencies too.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from quantplan.checkpoint.reader import TensorReader
from quantplan.engine.apply import Report
from quantplan.format import FORMATS
from quantplan.headers import read_checkpoint
from quantplan.scheme import SchemeConfig


def opened(path: Path, **options: Any) -> Any:
    """A checkpoint as transformers opens it, in bfloat16."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16, **options).eval()


@torch.no_grad()
def logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """`[tokens, vocabulary]`."""
    return model(tokens).logits[0]


@contextmanager
def standing_for(dense: Any, report: Report) -> Iterator[Any]:
    """`dense` with the weights of an output, read by quantplan, and its activations rounded."""
    stored = read_checkpoint(report.out)
    output = FORMATS.get(report.resolution.plan.output.format)()
    parameters, undo, hooks = dict(dense.named_parameters()), {}, []
    with TensorReader(report.out, stored.tensors) as reader:
        for a in report.resolution.quantized:
            assert a.wq is not None
            for matrix in a.matrices:
                quantized = output.decode(matrix, a.wq, a.aq, reader.read)
                weight = a.wq.quantizer().dequantize(quantized).to(torch.bfloat16)
                name, part = place(matrix.name, weight.shape[0])
                if name not in undo:
                    undo[name] = parameters[name].data
                    parameters[name].data = undo[name].clone()
                parameters[name].data[part] = weight
            if a.aq is not None and ".experts." not in a.name:  # transformers does not round the activations of experts
                module = dense.get_submodule(a.name)
                hooks.append(module.register_forward_pre_hook(lambda _, args, aq=a.aq: (rounded(args[0], aq),)))
    try:
        yield dense
    finally:
        for name, data in undo.items():
            parameters[name].data = data
        for hook in hooks:
            hook.remove()


def place(name: str, rows: int) -> tuple[str, Any]:
    """The parameter that holds a matrix in memory, and which part of it: experts are stored one by one and held together."""
    base, experts, expert = name.rpartition(".experts.")
    if not experts:
        return f"{name}.weight", ...
    number, part = expert.split(".")
    if part == "down_proj":
        return f"{base}.experts.down_proj", int(number)
    first = rows if part == "up_proj" else 0
    return f"{base}.experts.gate_up_proj", (int(number), slice(first, first + rows))


def rounded(x: torch.Tensor, aq: SchemeConfig) -> torch.Tensor:
    """Symmetric activations as compressed-tensors rounds them while a model runs: all of it in the activations' dtype."""
    groups = x.unflatten(-1, (-1, aq.group or x.shape[-1]))
    largest = groups.abs().amax(-1, keepdim=True)
    lowest, highest = (-448.0, 448.0) if aq.name == "fp8" else (-(2.0 ** (aq.bits - 1)), 2.0 ** (aq.bits - 1) - 1)
    scale = largest / ((highest - lowest) / 2)
    scale = torch.where(scale == 0, torch.finfo(x.dtype).eps, scale)
    units = (groups / scale).clamp(lowest, highest)
    units = units.to(torch.float8_e4m3fn).to(x.dtype) if aq.name == "fp8" else units.round()
    return (units * scale).flatten(-2)
