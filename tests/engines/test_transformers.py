"""transformers computes with an output exactly what the codes say: logits bit-equal to a dense model that holds the
dequantized weights and rounds activations as compressed-tensors does."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from dense_reference import logits, opened, standing_for
from engine_plans import (
    BLOCK_ACTIVATIONS,
    FP8_BLOCK,
    FP8_TENSOR,
    INT4_ASYMMETRIC,
    INT4_CHANNEL,
    INT8_TENSOR,
    PLANS,
    only,
    refusal,
)

if TYPE_CHECKING:
    from conftest import Written

pytestmark = pytest.mark.engine

PROMPT = "The capital of Germany is Berlin. The capital of France is"
ASYMMETRIC = "int4 asymmetric"
WRITES_TEXT = {"int4", "int8", "fp8"}


@pytest.mark.parametrize("name", PLANS)
def test_logits_are_those_of_the_codes(
    name: str, smollm2: Path, written: Written, dense: Any, tokens: torch.Tensor, tokenizer: Any
) -> None:
    from transformers import CompressedTensorsConfig

    report = written(smollm2, name, PLANS[name])
    # compressed-tensors 0.18 to 0.20 reads packed zero points only when told to dequantize
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


def test_the_comparison_can_fail(smollm2: Path, written: Written, dense: Any, tokens: torch.Tensor) -> None:
    """Other weights and rounded activations change logits, and are put back."""
    before = logits(dense, tokens)
    seen = [before]
    for name in ("int8", "w8a8", "fp8 weights", "fp8"):
        with standing_for(dense, written(smollm2, name, PLANS[name])) as reference:
            now = logits(reference, tokens)
        assert not any(torch.equal(now, other) for other in seen)
        seen.append(now)
    assert torch.equal(logits(dense, tokens), before)


def test_packed_zero_points_load_by_default_or_raise(smollm2: Path, written: Written, dense: Any, tokens: torch.Tensor) -> None:
    """A version of compressed-tensors that cannot read them says so: no wrong numbers."""
    report = written(smollm2, ASYMMETRIC, PLANS[ASYMMETRIC])
    try:
        model = opened(report.out)
    except RuntimeError as error:
        assert "mismatched_sizes" in str(error)
        return
    with standing_for(dense, report) as reference:
        assert torch.equal(logits(model, tokens), logits(reference, tokens))


# weights and activations of experts, and what comes of them: the codes' own numbers, an error, or wrong numbers
EXPERTS: dict[str, tuple[Any, Any, str]] = {
    "int8": ("int8", None, "right"),
    "int4": ("int4", None, "right"),
    "int4 channel": (INT4_CHANNEL, None, "right"),
    "int3": ("int3", None, "right"),
    "int4 for int8": ("int4", "int8", "right"),
    "int8 group for int8": ({"scheme": "int8", "group_size": 64}, "int8", "right"),
    "int8 for int8": ("int8", "int8", "error"),
    "int8 tensor": (INT8_TENSOR, None, "error"),
    "int4 asymmetric": (INT4_ASYMMETRIC, None, "error"),
    "fp8": ("fp8", "fp8", "right"),
    "fp8 tensor": (FP8_TENSOR, None, "right"),
    "fp8 blocks": (FP8_BLOCK, BLOCK_ACTIVATIONS, "error"),
    "fp8 group": ({"scheme": "fp8", "group_size": 64}, None, "error"),
    "mxfp4": ("mxfp4", None, "right"),
    "mxfp6": ("mxfp6", None, "right"),
    "mxfp8": ("mxfp8", None, "error"),
    "nvfp4": ("nvfp4", None, "wrong"),
}


@pytest.mark.parametrize("name", EXPERTS)
def test_experts_are_read_as_engines_say(name: str, small: dict[str, Path], written: Written) -> None:
    """Read right, or refused beforehand: also where transformers itself says nothing and computes with wrong weights."""
    wq, aq, truth = EXPERTS[name]
    plan = only(wq, aq, "*.experts.*")
    assert (refusal("transformers", small["experts"], plan) is None) == (truth == "right")
    report = written(small["experts"], f"only {name}", plan)
    ids = torch.arange(5, 69)[None]
    if truth == "error":
        with pytest.raises(RuntimeError):
            opened(report.out)
        return
    found = logits(opened(report.out), ids)
    with standing_for(opened(small["experts"]), report) as reference:
        assert torch.equal(found, logits(reference, ids)) == (truth == "right")


# overrides for experts that are not all alike, and what comes of them
MIXED_EXPERTS: dict[str, tuple[list[tuple[str, Any]], str]] = {
    "alike, attention not": ([("*.experts.*", "int4"), ("*.self_attn.*", "fp8")], "right"),
    "kept beside fp8": ([("*.self_attn.*", "fp8")], "right"),
    "kept beside int4": ([("*.self_attn.*", "int4")], "error"),
    "kept beside int4, fp8 first": ([("*.self_attn.*", "fp8"), ("*.o_proj", "int4")], "right"),
    "kept beside fp8, int4 first": ([("*.self_attn.*", "int4"), ("*.o_proj", "fp8")], "error"),
    "by projection": ([("*.experts.*", "int4"), ("*.experts.*.down_proj", "int8")], "error"),
    "by projection, silently": ([("*.experts.*", "int8"), ("*.experts.*.down_proj", "int4")], "wrong"),
    "by layer": ([("*.experts.*", "int4"), ("*.layers.0.*.experts.*", {"group_size": 64})], "error"),
    "by layer, silently": ([("*.experts.*", "int4"), ("*.layers.1.*.experts.*", "int8")], "wrong"),
    "a layer kept": ([("*.layers.1.*.experts.*", "int4")], "error"),
}


@pytest.mark.parametrize("name", MIXED_EXPERTS)
def test_experts_that_are_not_alike_are_refused(name: str, small: dict[str, Path], written: Written) -> None:
    """transformers reads all experts of a model with the scheme of one group, and may say nothing of it."""
    overrides, truth = MIXED_EXPERTS[name]
    plan = {"version": 1, "overrides": [{"pattern": pattern, "wq": wq} for pattern, wq in overrides], "engines": ["transformers"]}
    assert (refusal("transformers", small["experts"], plan) is None) == (truth == "right")
    report = written(small["experts"], name, {**plan, "engines": []})
    ids = torch.arange(5, 69)[None]
    if truth == "error":
        with pytest.raises(RuntimeError):
            opened(report.out)
        return
    found = logits(opened(report.out), ids)
    with standing_for(opened(small["experts"]), report) as reference:
        assert torch.equal(found, logits(reference, ids)) == (truth == "right")
