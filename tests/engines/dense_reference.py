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
    undo, hooks = [], []
    with TensorReader(report.out, stored.tensors) as reader:
        for a in report.resolution.quantized:
            module, (matrix,) = dense.get_submodule(a.name), a.matrices
            assert a.wq is not None
            quantized = output.decode(matrix, a.wq, a.aq, reader.read)
            undo.append((module.weight, module.weight.data))
            module.weight.data = a.wq.quantizer().dequantize(quantized).to(torch.bfloat16)
            if a.aq is not None:
                hooks.append(module.register_forward_pre_hook(lambda _, args, aq=a.aq: (rounded(args[0], aq),)))
    try:
        yield dense
    finally:
        for weight, data in undo:
            weight.data = data
        for hook in hooks:
            hook.remove()


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
