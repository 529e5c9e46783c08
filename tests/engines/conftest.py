"""What the engine tests share: where the model and the engines are, and outputs written once a session."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from dense_reference import opened
from engine_plans import Plan
from safetensors.torch import save_file

from quantplan.engine.apply import Report, apply

Written = Callable[[Path, str, Plan], Report]

TEXT = (
    "Quantization maps the weights of a neural network to a small set of values. The largest magnitude of a group decides "
    "its scale, and everything else is rounded to the nearest multiple. Paris is the capital of France, water boils at 100 "
    "degrees, and 17 times 3 is 51."
)
TOKENS = 64


def _setting(name: str, what: str) -> Path:
    value = os.environ.get(name)
    if not value:
        pytest.skip(f"{name} is not set: {what} (scripts/test sets it)")
    return Path(value)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The checkpoint of SmolLM2-135M-Instruct that scripts/smollm2.py makes."""
    return _setting("QUANTPLAN_SMOLLM2", "the directory of SmolLM2")


@pytest.fixture(scope="session")
def vllm_python() -> Path:
    """The Python of an environment with vLLM's CPU build."""
    return _setting("QUANTPLAN_VLLM_PYTHON", "the Python of scripts/vllm-environment")


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    """Applies a plan to a model, once a session: the report, whose `out` nobody may change."""
    folder = tmp_path_factory.mktemp("outputs")
    tokens = torch.randint(5, 300, (4, 32), generator=torch.Generator().manual_seed(0))
    save_file({"input_ids": tokens}, folder / "ids.safetensors")
    reports: dict[tuple[Path, str], Report] = {}
    plans: dict[tuple[Path, str], Plan] = {}

    def apply_once(model: Path, name: str, plan: Plan) -> Report:
        assert plans.setdefault((model, name), plan) == plan, f"two plans are called '{name}'"
        if (model, name) not in reports:
            if isinstance(plan, Mapping) and not (model / "tokenizer.json").exists():
                source = {"source": str(folder / "ids.safetensors"), "samples": 4, "sequence_length": 32}
                plan = {"calibration": source, **plan}
            reports[model, name] = apply(model, plan, folder / f"{model.name} {name}")
        return reports[model, name]

    return apply_once


@pytest.fixture(scope="session")
def tokenizer(smollm2: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(smollm2)


@pytest.fixture(scope="session")
def tokens(tokenizer: Any) -> torch.Tensor:
    """The text models are compared on, `[1, TOKENS]`."""
    return tokenizer(TEXT, return_tensors="pt").input_ids[:, :TOKENS]


@pytest.fixture(scope="session")
def dense(smollm2: Path) -> Any:
    """The float model, whose weights the tests exchange and put back."""
    return opened(smollm2)


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Random models of two layers: of sizes every kernel takes, of sizes few take, and with experts."""
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

    shape = {"num_hidden_layers": 2, "vocab_size": 320, "num_attention_heads": 2, "head_dim": 64}
    llama = LlamaConfig(hidden_size=128, intermediate_size=256, num_key_value_heads=2, **shape)
    narrow = LlamaConfig(hidden_size=48, intermediate_size=80, num_key_value_heads=1, **shape)
    experts = Qwen3MoeConfig(
        hidden_size=256, moe_intermediate_size=128, num_experts=4, num_experts_per_tok=2, num_key_value_heads=2, **shape
    )
    folder = tmp_path_factory.mktemp("small")
    torch.manual_seed(0)
    models = {
        "llama": LlamaForCausalLM(llama),
        "narrow": LlamaForCausalLM(narrow),
        "experts": Qwen3MoeForCausalLM(experts),
    }
    for name, model in models.items():
        model.to(torch.bfloat16).save_pretrained(folder / name)
    return {name: folder / name for name in models}
