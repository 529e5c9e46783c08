"""Names and shapes of small models, as shapes files: enough to resolve plans, without weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

Shapes = dict[str, list[Any]]


def llama(layers: int = 2, hidden: int = 576, intermediate: int = 1536, tied: bool = True) -> dict[str, Any]:
    """SmolLM2's layer shapes, with fewer layers."""
    tensors: Shapes = {"model.embed_tokens.weight": ["BF16", 1000, hidden], "model.norm.weight": ["BF16", hidden]}
    for i in range(layers):
        at = f"model.layers.{i}"
        tensors[f"{at}.input_layernorm.weight"] = ["BF16", hidden]
        tensors[f"{at}.post_attention_layernorm.weight"] = ["BF16", hidden]
        for name, rows in (("q_proj", hidden), ("k_proj", hidden // 3), ("v_proj", hidden // 3), ("o_proj", hidden)):
            tensors[f"{at}.self_attn.{name}.weight"] = ["BF16", rows, hidden]
        tensors[f"{at}.mlp.gate_proj.weight"] = ["BF16", intermediate, hidden]
        tensors[f"{at}.mlp.up_proj.weight"] = ["BF16", intermediate, hidden]
        tensors[f"{at}.mlp.down_proj.weight"] = ["BF16", hidden, intermediate]
    if not tied:
        tensors["lm_head.weight"] = ["BF16", 1000, hidden]
    config = {"model_type": "llama", "hidden_size": hidden, "num_hidden_layers": layers, "tie_word_embeddings": tied}
    config |= {"max_position_embeddings": 2048, "vocab_size": 1000}
    return document(config, tensors)


def mixture(layers: int = 2, experts: int = 4, fused: bool = False) -> dict[str, Any]:
    """A small mixture of experts: one 2-D matrix an expert and projection, or fused 3-D ones."""
    tensors: Shapes = {"model.embed_tokens.weight": ["BF16", 1000, 128], "lm_head.weight": ["BF16", 1000, 128]}
    for i in range(layers):
        at = f"model.layers.{i}"
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            tensors[f"{at}.self_attn.{name}.weight"] = ["BF16", 128, 128]
        tensors[f"{at}.mlp.gate.weight"] = ["BF16", experts, 128]
        if fused:
            tensors[f"{at}.mlp.experts.gate_up_proj"] = ["BF16", experts, 512, 128]
            tensors[f"{at}.mlp.experts.down_proj"] = ["BF16", experts, 128, 256]
            continue
        for e in range(experts):
            for name, shape in (("gate_proj", [256, 128]), ("up_proj", [256, 128]), ("down_proj", [128, 256])):
                tensors[f"{at}.mlp.experts.{e}.{name}.weight"] = ["BF16", *shape]
    config = {"model_type": "qwen3_moe", "hidden_size": 128, "num_hidden_layers": layers, "tie_word_embeddings": False}
    return document(config, tensors)


def document(config: dict[str, Any], tensors: Shapes) -> dict[str, Any]:
    """A shapes file."""
    return {"format": "quantplan-shapes", "version": 1, "config": config, "tensors": tensors}


def quantized() -> dict[str, Any]:
    """A model that is quantized already."""
    made = llama()
    made["config"]["quantization_config"] = {"quant_method": "gptq"}
    return made


def encoder(model_type: str, **config: Any) -> dict[str, Any]:
    """One attention matrix of a model that writes no text."""
    tensors: Shapes = {f"{model_type}.encoder.layer.0.attention.self.query.weight": ["F32", 64, 64]}
    return document({"model_type": model_type, "hidden_size": 64, "num_hidden_layers": 1, **config}, tensors)


MODELS = {
    "llama": llama,
    "untied": lambda: llama(tied=False),
    "tied_head": lambda: {**llama(tied=False), "config": {**llama()["config"], "tie_word_embeddings": True}},
    "moe": mixture,
    "fused": lambda: mixture(fused=True),
    "quantized": quantized,
    "bert": lambda: encoder("bert", vocab_size=100, max_position_embeddings=512, architectures=["BertForMaskedLM"]),
    "vit": lambda: encoder("vit", image_size=224, num_channels=3, architectures=["ViTForImageClassification"]),
    "remote_code": lambda: {**llama(), "config": {**llama()["config"], "auto_map": {"AutoModel": "modeling_x.X"}}},
}


def write(name: str, folder: Path) -> Path:
    """The shapes file of a model."""
    path = folder / f"{name}.shapes.json"
    path.write_text(json.dumps(MODELS[name]()))
    return path
