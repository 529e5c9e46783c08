"""Tiny models of many architectures with random weights, made from transformers' configs and saved when asked for."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from quantplan.checkpoint.reader import TensorReader
from quantplan.engine.apply import Report
from quantplan.format import FORMATS
from quantplan.headers import read_checkpoint
from quantplan.live.skeleton import model_class

TEXT: dict[str, Any] = {
    **{"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "vocab_size": 128, "max_position_embeddings": 64},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16},
    **{"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
}
LATENT = {
    **{"q_lora_rank": 32, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 24},
    **{"num_key_value_heads": 4, "head_dim": None},
}
SLIDING = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}


@dataclass(frozen=True)
class Kind:
    """An architecture: transformers' class of config and of model, and what differs from `TEXT` (None: left out)."""

    config: str
    model: str
    options: dict[str, Any] = field(default_factory=dict)
    text: bool = True  # TEXT is the start


ZOO: dict[str, Kind] = {
    "llama": Kind("LlamaConfig", "LlamaForCausalLM"),
    "llama-tied": Kind("LlamaConfig", "LlamaForCausalLM", {"tie_word_embeddings": True}),
    "mistral": Kind("MistralConfig", "MistralForCausalLM", {"sliding_window": 4}),
    "qwen2": Kind("Qwen2Config", "Qwen2ForCausalLM"),
    "qwen3": Kind("Qwen3Config", "Qwen3ForCausalLM"),
    "qwen3-moe": Kind(
        "Qwen3MoeConfig", "Qwen3MoeForCausalLM", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
    ),
    "mixtral": Kind("MixtralConfig", "MixtralForCausalLM", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "deepseek-v3": Kind(
        "DeepseekV3Config",
        "DeepseekV3ForCausalLM",
        {
            **LATENT,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 1,
            "topk_group": 1,
            "moe_intermediate_size": 48,
            "first_k_dense_replace": 1,
        },
    ),
    "gpt-oss": Kind("GptOssConfig", "GptOssForCausalLM", {"num_local_experts": 4, "num_experts_per_tok": 2, **SLIDING}),
    "llama4": Kind(
        "Llama4TextConfig",
        "Llama4ForCausalLM",
        {"num_local_experts": 4, "intermediate_size_mlp": 96, "moe_layers": [1, 2], "attention_chunk_size": 4},
    ),
    "gemma2": Kind("Gemma2Config", "Gemma2ForCausalLM", SLIDING),
    "gemma3": Kind("Gemma3TextConfig", "Gemma3ForCausalLM", SLIDING),
    "phi3": Kind("Phi3Config", "Phi3ForCausalLM", {"head_dim": None}),
    "gpt2": Kind("GPT2Config", "GPT2LMHeadModel", {"num_key_value_heads": None, "head_dim": None, "intermediate_size": None}),
    "gpt-neox": Kind("GPTNeoXConfig", "GPTNeoXForCausalLM", {"num_key_value_heads": None, "head_dim": None}),
    "opt": Kind(
        "OPTConfig", "OPTForCausalLM", {"ffn_dim": 96, "word_embed_proj_dim": 64, "head_dim": None, "intermediate_size": None}
    ),
    "falcon": Kind("FalconConfig", "FalconForCausalLM", {"new_decoder_architecture": True, "num_kv_heads": 2, "head_dim": None}),
    "bloom": Kind("BloomConfig", "BloomForCausalLM", {"n_layer": 3, "n_head": 4, "head_dim": None}),
    "mamba": Kind("MambaConfig", "MambaForCausalLM", {"state_size": 8, "head_dim": None, "intermediate_size": 128}),
    "t5": Kind(
        "T5Config",
        "T5ForConditionalGeneration",
        {"d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 3, "num_heads": 4, "vocab_size": 128, "tie_word_embeddings": True},
        text=False,
    ),
    "whisper": Kind(
        "WhisperConfig",
        "WhisperForConditionalGeneration",
        {
            **{"d_model": 64, "encoder_layers": 2, "decoder_layers": 3, "encoder_attention_heads": 4, "vocab_size": 128},
            **{"decoder_attention_heads": 4, "encoder_ffn_dim": 96, "decoder_ffn_dim": 96, "num_mel_bins": 16},
            **{"max_source_positions": 24, "max_target_positions": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
            **{"decoder_start_token_id": 1, "suppress_tokens": None, "begin_suppress_tokens": None},
        },
        text=False,
    ),
    "bert": Kind("BertConfig", "BertForMaskedLM", {"head_dim": None, "num_key_value_heads": None}),
    "albert": Kind("AlbertConfig", "AlbertForMaskedLM", {"head_dim": None, "num_key_value_heads": None, "embedding_size": 32}),
    "swin": Kind(
        "SwinConfig",
        "SwinForImageClassification",
        {"embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "image_size": 16, "patch_size": 2, "window_size": 2},
        text=False,
    ),
    "marian": Kind(
        "MarianConfig",
        "MarianMTModel",
        {
            **{"d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "vocab_size": 128},
            **{"decoder_attention_heads": 4, "encoder_ffn_dim": 96, "decoder_ffn_dim": 96, "pad_token_id": 0},
            **{"decoder_start_token_id": 0},
        },
        text=False,
    ),
    "vit": Kind(
        "ViTConfig",
        "ViTForImageClassification",
        {
            **{"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4},
            **{"image_size": 16, "patch_size": 4, "num_labels": 8},
        },
        text=False,
    ),
    "llava": Kind(
        "LlavaConfig",
        "LlavaForConditionalGeneration",
        {
            "text_config": {"model_type": "llama", **TEXT},
            "vision_config": {
                **{"model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2},
                **{"num_attention_heads": 2, "image_size": 16, "patch_size": 4, "projection_dim": 32},
            },
            "image_token_index": 127,
        },
        text=False,
    ),
}

REFUSED = {"albert": "comes out of turn", "swin": "change the shape"}  # no block after block, and why


def build(name: str, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """The checkpoint directory of an architecture, made on first use. Every norm, bias and weight is random."""
    path = folder / name
    if path.exists():
        return path
    kind = ZOO[name]
    options = {**TEXT, **kind.options} if kind.text else kind.options
    config = getattr(transformers, kind.config)(**{k: v for k, v in options.items() if v is not None})
    torch.manual_seed(0)
    model = getattr(transformers, kind.model)(config)
    with torch.no_grad():
        for parameter in {id(p): p for p in model.parameters()}.values():
            if parameter.dim() < 2:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            else:
                parameter.copy_(torch.randn_like(parameter) * parameter.shape[-1] ** -0.5)
    model.to(dtype).save_pretrained(path)
    return path


def inputs(model: Any, batch: int = 2, tokens: int = 12, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random arguments for a model of the zoo."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 120, (batch, tokens), generator=generator)
    config = model.config
    if model.main_input_name == "pixel_values":
        return {"pixel_values": torch.randn(batch, 3, config.image_size, config.image_size, generator=generator)}
    if model.main_input_name == "input_features":
        length = 2 * config.max_source_positions
        features = torch.randn(batch, config.num_mel_bins, length, generator=generator)
        return {"input_features": features, "decoder_input_ids": ids}
    return {"input_ids": ids, "decoder_input_ids": ids.flip(1)} if config.is_encoder_decoder else {"input_ids": ids}


def output_format(name: str) -> str:
    """The format of an output of an architecture: the default, or, for what only quantplan's own can hold, that."""
    return "quantplan" if name == "gpt2" else "compressed-tensors"


def decoded(out: Path, report: Report) -> dict[str, Tensor]:
    """Every quantized matrix of an output by name, as the format says."""
    output, made = FORMATS.get(report.resolution.plan.output.format)(), read_checkpoint(out)
    found = {}
    with TensorReader(out, made.tensors) as reader:
        for assignment in report.resolution.quantized:
            assert assignment.wq is not None
            for matrix in assignment.matrices:
                stored = output.decode(matrix, assignment.wq, assignment.aq, reader.read)
                found[matrix.name] = assignment.wq.quantizer().dequantize(stored)
    return found


def fake_quantized(path: Path, out: Path, report: Report) -> Any:
    """The float model, with the values of the output's matrices put into the checkpoint's tensors."""
    values, tensors = decoded(out, report), load_file(path / "model.safetensors")
    for assignment in report.resolution.quantized:
        for matrix in assignment.matrices:
            tensor = tensors[matrix.tensor] if matrix.index is None else tensors[matrix.tensor][matrix.index]
            rows = (tensor.t() if matrix.transposed else tensor)[matrix.first : matrix.first + matrix.rows]
            rows.copy_(values[matrix.name])
    copy = out.with_name(f"{out.name}-fake")
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(path, copy)
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    model = model_class(read_checkpoint(path).config).from_pretrained(copy, dtype=torch.float32).eval()
    shutil.rmtree(copy)
    return model
