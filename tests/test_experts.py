"""Mixtures of experts in every layout on disk: 2-D per expert, fused, fused and transposed; loaded by transformers, exactly."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers

import quantplan
from quantplan.checkpoint.reader import TensorReader
from quantplan.format import FORMATS
from quantplan.headers import read_checkpoint

pytest.importorskip("compressed_tensors")
BASE: dict[str, Any] = {
    **{"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 128},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "num_experts_per_tok": 2},
}
MANY = {"moe_intermediate_size": 96, "num_experts": 4}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3-moe": ("Qwen3MoeConfig", MANY),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4}),
    "llama4": (
        "Llama4TextConfig",
        {"num_local_experts": 4, "intermediate_size": 96, "intermediate_size_mlp": 128, "moe_layers": [0, 1]},
    ),
    "gpt-oss": ("GptOssConfig", {"num_local_experts": 4, "intermediate_size": 96}),
    "deepseek-v3": (
        "DeepseekV3Config",
        {
            **{
                "n_routed_experts": 4,
                "n_group": 1,
                "topk_group": 1,
                "moe_intermediate_size": 96,
                "first_k_dense_replace": 1,
            },
            **{"q_lora_rank": 32, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 32},
            **{"num_key_value_heads": 4, "head_dim": None},
        },
    ),
}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("experts")

    def build(name: str) -> Path:
        path = folder / name
        if not path.exists():
            torch.manual_seed(0)
            kind, options = CONFIGS[name]
            config = getattr(transformers, kind)(**{k: v for k, v in {**BASE, **options}.items() if v is not None})
            transformers.AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(path)
        return path

    return build


def logits(path: Path) -> torch.Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(path).eval()
    with torch.no_grad():
        return model(torch.arange(24)[None]).logits


def dense_reference(source: Path, out: Path, resolution: Any, target: Path) -> Path:
    """The source with every quantized matrix replaced by what its codes stand for."""
    shutil.copytree(source, target)
    tensors = safetensors.torch.load_file(target / "model.safetensors")
    output = FORMATS.get(resolution.plan.output.format)()
    written = read_checkpoint(out)
    with TensorReader(out, written.tensors) as reader:
        for a in resolution.quantized:
            for m in a.matrices:
                restored = a.wq.quantizer().dequantize(output.decode(m, a.wq, a.aq, reader.read)).bfloat16()
                rows = slice(m.first, m.first + m.rows)
                if m.index is None:
                    tensors[m.tensor] = restored
                elif m.transposed:
                    tensors[m.tensor][m.index, :, rows] = restored.t()
                else:
                    tensors[m.tensor][m.index, rows] = restored
    safetensors.torch.save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


@pytest.mark.parametrize("name", CONFIGS)
def test_transformers_computes_with_exactly_these_experts(built: Any, tmp_path: Path, name: str) -> None:
    source = built(name)
    report = quantplan.apply(source, {"default": {"wq": "int4", "group_size": 32}}, tmp_path / "out")
    experts = [a for a in report.resolution.assignments.values() if ".experts" in a.name and a.module.kind != "other"]
    assert all(a.wq is not None for a in experts)
    assert bool(experts) == (name != "gpt-oss"), "gpt-oss interleaves gate and up: kept"
    reference = dense_reference(source, tmp_path / "out", report.resolution, tmp_path / "reference")
    assert torch.equal(logits(tmp_path / "out"), logits(reference))
    assert not torch.equal(logits(reference), logits(source))


def test_targets_of_experts_are_a_few_expressions_that_match_nothing_else(built: Any, tmp_path: Path) -> None:
    import json
    import re

    plan = {
        "default": {"wq": "int4", "group_size": 32},
        "overrides": [{"pattern": "model.layers.1.mlp.experts.*", "wq": "int8"}],
    }
    report = quantplan.apply(built("qwen3-moe"), plan, tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    for a in report.resolution.quantized:
        for m in a.matrices:
            hits = [
                group["weights"]["num_bits"]
                for group in config["config_groups"].values()
                for target in group["targets"]
                if (re.match(target[3:], m.name) if target.startswith("re:") else target == m.name)
            ]
            assert hits == [a.wq.bits], m.name  # type: ignore[union-attr]


def test_keeping_experts_that_are_read_one_by_one_is_refused_for_transformers(built: Any) -> None:
    plan = {
        "default": {"wq": "int4", "group_size": 32},
        "overrides": [{"pattern": "*.experts.*", "keep": True}],
        "engines": ["transformers"],
    }
    found = quantplan.resolve(quantplan.load_plan(plan), quantplan.read_checkpoint(built("llama4"))).problems
    assert [p.code for p in found] == ["QP116"]
