"""What SmolLM2 writes with each kernel is what it writes with its weights dequantized."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from engine_plans import Plan, plan
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoTokenizer

import quantplan
from quantplan.nn.linear import QuantLinear

if TYPE_CHECKING:
    from conftest import Written

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

COUNT = 200
PLANS: dict[str, Plan] = {name: plan(name, algorithm={"name": "rtn", "search": "mse"}) for name in ("int4", "int8")}
PROSE, ONES = "The capital of France is", "x = [1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1,"
# (scheme, kernel, dtype, prompt). Logits in bfloat16 often tie, and ties fall either way: there the text has to be a sure one
TEXTS = [
    ("int4", "int4pack", torch.bfloat16, ONES),
    ("int8", "int8pack", torch.bfloat16, ONES),
    ("int4", "lookup", torch.float32, PROSE),
]


class Dequantized(nn.Module):
    """A linear with the weight a layer stands for, summed in float32 and rounded once."""

    def __init__(self, layer: QuantLinear) -> None:
        super().__init__()
        self.weight, self.bias = layer.dequantize(), layer.bias

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x.float(), self.weight, self.bias).to(x.dtype)


def layers(model: nn.Module) -> Iterator[tuple[str, QuantLinear]]:
    return ((name, m) for name, m in list(model.named_modules()) if isinstance(m, QuantLinear))


def dequantized(out: Path, dtype: torch.dtype) -> Any:
    model = quantplan.load(out, dtype=dtype).eval()
    for name, layer in layers(model):
        model.set_submodule(name, Dequantized(layer))
    return model


def generate(model: Any, prompt: Tensor) -> list[int]:
    return model.generate(prompt, max_new_tokens=COUNT, min_new_tokens=COUNT, do_sample=False)[0].tolist()


@torch.no_grad()
def step_by_step(model: Any, tokens: Tensor) -> Tensor:
    """Logits `[tokens, vocabulary]`, float32, one token at a time, as they are when text is written."""
    cache, rows = None, []
    for token in tokens[0]:
        found = model(token[None, None], past_key_values=cache, use_cache=True)
        cache = found.past_key_values
        rows.append(found.logits[0].float())
    return torch.cat(rows)


def divergence(reference: Tensor, found: Tensor) -> float:
    """KL of `found` from `reference`, nats, the mean over tokens."""
    return functional.kl_div(found.log_softmax(-1), reference.log_softmax(-1), log_target=True, reduction="batchmean").item()


@pytest.mark.parametrize("scheme, kernel, dtype, text", TEXTS, ids=lambda x: str(x).removeprefix("torch.").split()[0])
def test_text_is_the_dequantized_models(
    scheme: str, kernel: str, dtype: torch.dtype, text: str, smollm2: Path, written: Written, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QUANTPLAN_KERNELS", kernel)
    out = written(smollm2, f"kernel {scheme}", PLANS[scheme]).out
    prompt = AutoTokenizer.from_pretrained(smollm2)(text, return_tensors="pt").input_ids
    model = quantplan.load(out, dtype=dtype).eval()
    found = generate(model, prompt)
    assert {layer._kernel.name if layer._kernel else None for _, layer in layers(model)} == {kernel}
    assert len(found) == prompt.shape[1] + COUNT
    # what the dequantized model would write: its first choice after every prefix, computed at once
    with torch.no_grad():
        scores = dequantized(out, dtype)(torch.tensor([found[:-1]])).logits[0]
    scores[:, model.generation_config.eos_token_id] = -torch.inf  # as `min_new_tokens` has it
    assert found[prompt.shape[1] :] == scores[prompt.shape[1] - 1 :].argmax(-1).tolist()


@pytest.mark.parametrize("scheme, kernel", [("int4", "int4pack"), ("int8", "int8pack")])
def test_bfloat16_kernels_are_as_near_as_bfloat16_weights(
    scheme: str, kernel: str, smollm2: Path, written: Written, tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QUANTPLAN_KERNELS", kernel)
    out = written(smollm2, f"kernel {scheme}", PLANS[scheme]).out
    exact = step_by_step(dequantized(out, torch.float32), tokens)
    plain = dequantized(out, torch.bfloat16)
    for name, layer in list(plain.named_modules()):
        if isinstance(layer, Dequantized):
            plain.set_submodule(name, nn.Linear(1, 1, bias=False))
            plain.get_submodule(name).weight = nn.Parameter(layer.weight.to(torch.bfloat16))
    found = step_by_step(quantplan.load(out, dtype=torch.bfloat16).eval(), tokens)
    assert 0 < divergence(exact, found) < 2 * divergence(exact, step_by_step(plain, tokens))
