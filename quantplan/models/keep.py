"""What is left in the source precision unless a plan says otherwise: a list to read, not a mystery.

A rule gives way to an override that names the module literally (no wildcard) or says `keep: false`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import translate
from functools import cache, lru_cache
from typing import Any

from quantplan.headers import FLOAT_DTYPES, TensorInfo


@dataclass(frozen=True)
class KeepRule:
    """A built-in rule: modules that match one of `patterns` stay as they are, because of `why`."""

    name: str
    patterns: tuple[str, ...]
    why: str


KEEP_RULES = (
    KeepRule(
        "embeddings",
        (
            *(
                "*embed_tokens*",
                "*embeddings*",
                "*tok_embeddings",
                "*token_embedding*",
                "*.embed_positions*",
                "*.wte",
                "*.wpe",
            ),
            *("wte", "wpe", "shared", "*.shared", "*.embed_in", "*.relative_attention_bias", "*.embed_tokens_per_layer"),
        ),
        "looked up, not multiplied",
    ),
    KeepRule(
        "output heads",
        (
            "lm_head",
            "*.lm_head",
            "embed_out",
            "output",
            "proj_out",
            "score",
            "classifier",
            "*.classifier",
            "qa_outputs",
        ),
        "decides every token, and is tied to the embedding in many models",
    ),
    KeepRule(
        "routers",
        ("*.gate", "*.router", "*.router.*", "*.shared_expert_gate"),
        "small, and a flipped choice of experts cannot be undone",
    ),
    KeepRule(
        "vision and audio towers",
        (
            *("visual.*", "*.visual.*", "*vision_tower.*", "*vision_model.*", "*vision_embed*", "*audio_tower.*"),
            *("*multi_modal_projector*", "*mm_projector*", "*embed_vision*", "*embed_audio*"),
        ),
        "run once per input, and engines keep them in the source precision",
    ),
    KeepRule(
        "multi-token-prediction heads",
        ("mtp.*", "*.mtp.*", "*.eh_proj"),
        "only draft tokens; engines load them as they are",
    ),
)
NOT_A_MATRIX = KeepRule("not a matrix", (), "schemes hold matrices; norms, biases and convolutions are not")
NOT_A_FLOAT = KeepRule("not a float", (), "the tensor is not float32, float16 or bfloat16")
MTP_LAYER = KEEP_RULES[-1]
_NUMBER = re.compile(r"[0-9]+")
_LAYER = re.compile(r"^model\.layers\.(\d+)\.")


@cache
def _matcher(rule: KeepRule) -> re.Pattern[str]:
    return re.compile("|".join(translate(p) for p in rule.patterns))


@lru_cache(10_000)
def _by_name(name: str) -> KeepRule | None:
    return next((rule for rule in KEEP_RULES if _matcher(rule).match(name)), None)


def keep_rule(name: str, config: Mapping[str, Any]) -> KeepRule | None:
    """The first built-in rule that keeps the module called `name`."""
    rule = _by_name(_NUMBER.sub("0", name))  # no pattern has a digit: a rule is the same for every layer and expert
    if rule is not None:
        return rule
    layers = config.get("num_hidden_layers")
    layer = _LAYER.match(name) if isinstance(layers, int) else None
    return MTP_LAYER if layer and int(layer[1]) >= int(str(layers)) else None  # DeepSeek-V3 stores its MTP head so


def structural_keep(tensor: TensorInfo) -> KeepRule | None:
    """Why a tensor cannot be quantized at all, whatever its name."""
    if tensor.dtype not in FLOAT_DTYPES or tensor.dtype == "F64":
        return NOT_A_FLOAT
    if len(tensor.shape) == 2 and 0 not in tensor.shape:
        return None
    if len(tensor.shape) == 3 and ".experts." in tensor.name:
        return None
    return NOT_A_MATRIX
