"""A real language model, loaded by transformers, quantized in memory by `PTQPipeline` (seed 002)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from quantplan import PTQPipeline, RealQuantizeLinear

pytestmark = pytest.mark.engine
TEXT = "Paris is the capital and the largest city of France, on the river Seine. " * 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("bits", "most"), [(8, 0.15), (4, 1.0)])  # KL over the prompt
def test_a_language_model(smollm2: Path, dtype: torch.dtype, bits: int, most: float) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=dtype).eval()
    pipeline = PTQPipeline(model, bits=bits)
    pipeline.calibrate([dict(tokenizer(TEXT, return_tensors="pt"))])
    quantized = pipeline.convert_to_real_quant()
    layers = [m for m in quantized.modules() if isinstance(m, RealQuantizeLinear)]
    assert len(layers) == 210 and type(quantized.lm_head) is nn.Linear  # tied to the embedding
    original, now = pipeline.get_model_size()
    embedding = model.lm_head.weight.nbytes
    stored = {8: 1, 4: 0.5 + 2 / 32}[bits]  # bytes of a weight; int4 has a scale of two bytes for 32 of them
    assert (original - embedding) / (now - embedding) == pytest.approx(dtype.itemsize / stored, rel=0.02)
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    with torch.no_grad():
        expected, found = (m(**prompt).logits[0].float().log_softmax(-1) for m in (model, quantized))
    assert float((expected.exp() * (expected - found)).sum(-1).mean()) < most
    said = tokenizer.decode(quantized.generate(**prompt, max_new_tokens=8, do_sample=False)[0])
    assert "Paris" in said
