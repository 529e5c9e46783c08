"""transformers computes with an output exactly what the codes say: logits bit-equal to a dense model that holds the
dequantized weights and rounds activations as compressed-tensors does."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from engine_plans import PLANS

from quantplan.checkpoint.reader import TensorReader
from quantplan.engine.apply import Report
from quantplan.format import FORMATS
from quantplan.headers import read_checkpoint
from quantplan.scheme import SchemeConfig

if TYPE_CHECKING:
    from conftest import Written

pytestmark = [pytest.mark.engine, pytest.mark.xdist_group("transformers")]

TEXT = (
    "Quantization maps the weights of a neural network to a small set of values. The largest magnitude of a group decides "
    "its scale, and everything else is rounded to the nearest multiple. Paris is the capital of France, water boils at 100 "
    "degrees, and 17 times 3 is 51."
)
PROMPT = "The capital of Germany is Berlin. The capital of France is"
TOKENS = 64
ASYMMETRIC = "int4 asymmetric"  # compressed-tensors 0.18 to 0.20 reads it only when told to dequantize
WRITES_TEXT = {"int4", "int8", "fp8"}


@pytest.fixture(scope="module")
def tokenizer(smollm2: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(smollm2)


@pytest.fixture(scope="module")
def tokens(tokenizer: Any) -> torch.Tensor:
    ids = tokenizer(TEXT, return_tensors="pt").input_ids[:, :TOKENS]
    assert ids.shape == (1, TOKENS)
    return ids


@pytest.fixture(scope="module")
def dense(smollm2: Path) -> Any:
    """The float model, whose weights the tests exchange. Never built by `.to(bfloat16)`, which would round the rotary
    embedding's frequencies too; a model with exchanged weights is the model saved with them and loaded again."""
    return opened(smollm2)


def opened(path: Path, **options: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16, **options).eval()


@torch.no_grad()
def logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    return model(tokens).logits[0]


@contextmanager
def standing_for(dense: Any, report: Report) -> Iterator[Any]:
    """The dense model with the weights of an output, read by quantplan, and its activations rounded."""
    stored = read_checkpoint(report.out)
    output = FORMATS.get(report.resolution.plan.output.format)()
    undo = []
    with TensorReader(report.out, stored.tensors) as reader:
        for a in report.resolution.quantized:
            module, (matrix,) = dense.get_submodule(a.name), a.matrices
            assert a.wq is not None
            quantized = output.decode(matrix, a.wq, a.aq, reader.read)
            undo.append((module.weight, module.weight.data))
            module.weight.data = a.wq.quantizer().dequantize(quantized).to(torch.bfloat16)
            if a.aq is not None:
                module.register_forward_pre_hook(lambda _, inputs, aq=a.aq: (rounded(inputs[0], aq), *inputs[1:]))
    try:
        yield dense
    finally:
        for weight, data in undo:
            weight.data = data
        for module in dense.modules():
            module._forward_pre_hooks.clear()


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


@pytest.mark.parametrize("name", PLANS)
def test_logits_are_those_of_the_codes(
    name: str, smollm2: Path, written: Written, dense: Any, tokens: torch.Tensor, tokenizer: Any
) -> None:
    from transformers import CompressedTensorsConfig

    report = written(smollm2, name, PLANS[name])
    options = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if name == ASYMMETRIC else {}
    model = opened(report.out, **options)
    found = logits(model, tokens)
    with standing_for(dense, report) as reference:
        expected = logits(reference, tokens)
    assert torch.isfinite(found).all()
    assert torch.equal(found, expected), f"largest difference {(found - expected).abs().max()}"
    if name in WRITES_TEXT:
        prompt = tokenizer(PROMPT, return_tensors="pt")
        text = tokenizer.decode(model.generate(**prompt, max_new_tokens=4, do_sample=False)[0])
        assert text.removeprefix(PROMPT).startswith(" Paris"), text


def test_quantized_logits_are_not_the_float_models(
    smollm2: Path, written: Written, dense: Any, tokens: torch.Tensor
) -> None:
    """The comparison above can fail: exchanged weights, and rounded activations, change logits, and are put back."""
    before = logits(dense, tokens)
    seen = [before]
    for name in ("int8", "w8a8", "fp8 weights", "fp8"):
        with standing_for(dense, written(smollm2, name, PLANS[name])) as reference:
            now = logits(reference, tokens)
        assert not any(torch.equal(now, other) for other in seen)
        seen.append(now)
    assert torch.equal(logits(dense, tokens), before)


def test_packed_zero_points_load_by_default_or_say_so(smollm2: Path, written: Written, dense: Any, tokens: torch.Tensor) -> None:
    """Where a version of compressed-tensors cannot load packed zero points by itself it raises: no wrong numbers."""
    report = written(smollm2, ASYMMETRIC, PLANS[ASYMMETRIC])
    try:
        found = logits(opened(report.out), tokens)
    except (RuntimeError, ValueError) as error:
        assert "weight_zero_point" in str(error) or "mismatch" in str(error)  # noqa: PT017
        return
    with standing_for(dense, report) as reference:
        assert torch.equal(found, logits(reference, tokens))
