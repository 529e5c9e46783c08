"""Modules and matrices of a checkpoint, found from tensor names and shapes.

A module is what a plan's patterns match: a tensor name less `.weight`, or fused 3-D experts. A matrix is what a scheme
quantizes: `[rows, columns]` = `[out_features, in_features]`; fused experts hold several.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from quantplan.headers import FLOAT_DTYPES, Checkpoint, TensorInfo
from quantplan.models.keep import KeepRule, keep_rule, structural_keep

Kind = Literal["linear", "embedding", "experts", "other"]

# names transformers gives the 3-D parameters of fused experts
EXPERT_PARTS = {
    "gate_up_proj": ("gate_proj", "up_proj"),
    "gate_proj": ("gate_proj",),
    "up_proj": ("up_proj",),
    "down_proj": ("down_proj",),
    "w1": ("w1",),
    "w2": ("w2",),
    "w3": ("w3",),
}
# models whose fused experts are stored [experts, in, out], the halves of gate_up one after the other
TRANSPOSED_EXPERTS = {"llama4", "llama4_text"}
# models with transformers' Conv1D, a linear that stores [in, out], and the names it has there
CONV1D_MODELS = {"gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp", "clvp_decoder"}
CONV1D_PARTS = {"c_attn", "q_attn", "c_fc", "c_proj"}
INTERLEAVED = KeepRule(
    "interleaved experts", (), "experts stored as [expert, in, out] with gate and up interleaved, as gpt-oss does"
)
READS_INTERMEDIATE = {"down_proj", "w2"}
# layers an engine computes as one: vLLM's packed_modules_mapping and its fused experts
SIBLINGS: tuple[tuple[str, ...], ...] = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
)
_SIBLING_KEY = {name: family[0] for family in SIBLINGS for name in family}
_EXPERT = re.compile(r"^(.*\.experts)(?:\.\d+)?\.[^.]+$")


@dataclass(frozen=True)
class Matrix:
    """One `[rows, columns]` matrix of a module: rows `first` to `first + rows` of slab `index` of `tensor` (None: 2-D).
    `transposed`: the slab is stored `[in, out]`, so that rows are its columns; a 2-D one is a Conv1D's."""

    name: str
    tensor: str
    rows: int
    columns: int
    index: int | None = None
    first: int = 0
    transposed: bool = False


@dataclass(frozen=True)
class Module:
    """A module as the checkpoint stores it. `keep`: the built-in rule that leaves it alone unless the plan names it."""

    name: str
    tensor: TensorInfo
    kind: Kind
    matrices: tuple[Matrix, ...] = ()
    keep: KeepRule | None = None
    tied_to: str = ""

    @property
    def dtype(self) -> str:
        """The dtype of its weight as torch calls it, `bfloat16`; empty for one that is not a float."""
        return FLOAT_DTYPES.get(self.tensor.dtype, "")

    @property
    def conv1d(self) -> bool:
        """Whether it is transformers' Conv1D, which computes as a linear and stores `[in, out]`."""
        return self.kind == "linear" and bool(self.matrices) and self.matrices[0].transposed

    @property
    def columns(self) -> int:
        """Input features, the axis groups run along."""
        return self.matrices[0].columns if self.matrices else 0


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The language model's part of a config (multi-modal models nest it)."""
    nested = config.get("text_config")
    return nested if isinstance(nested, dict) else config


def find_modules(checkpoint: Checkpoint) -> dict[str, Module]:
    """Every module by name, in the order layers come in."""
    text = text_config(checkpoint.config)
    tied = bool(checkpoint.config.get("tie_word_embeddings", text.get("tie_word_embeddings", False)))
    found: dict[str, Module] = {}
    for tensor in sorted(checkpoint.tensors.values(), key=lambda t: natural_key(t.name)):
        module = module_of(tensor, checkpoint.config, tied)
        if module is not None:
            found[module.name] = module
    return found


def module_of(tensor: TensorInfo, config: Mapping[str, Any], tied: bool = False) -> Module | None:
    """The module a tensor is the weight of; None for biases and other parameters."""
    name = tensor.name.removesuffix(".weight")
    part = name.rpartition(".")[2]
    if len(tensor.shape) == 3 and ".experts." in tensor.name and part in EXPERT_PARTS:
        return _experts(name, part, tensor, config)
    if name == tensor.name:
        return None
    keep = structural_keep(tensor) or keep_rule(name, config)
    if len(tensor.shape) != 2:
        return Module(name, tensor, "other", keep=keep)
    kind: Kind = "embedding" if keep is not None and keep.name == "embeddings" else "linear"
    head = tied and keep is not None and keep.name == "output heads"
    transposed = _is_conv1d(part, config)
    rows, columns = reversed(tensor.shape) if transposed else tensor.shape
    matrix = Matrix(name, tensor.name, rows, columns, transposed=transposed)
    return Module(name, tensor, kind, (matrix,), keep, tied_to="the input embedding" if head else "")


def _is_conv1d(part: str, config: Mapping[str, Any]) -> bool:
    """Whether a matrix called `part` is transformers' Conv1D, `[in, out]`. Shapes cannot tell: some of them are square."""
    if part not in CONV1D_PARTS:
        return False
    nested = (c.get("model_type") for c in config.values() if isinstance(c, Mapping))  # the decoder of an encoder-decoder
    return not CONV1D_MODELS.isdisjoint(str(kind) for kind in (config.get("model_type"), *nested))


def _experts(name: str, part: str, tensor: TensorInfo, config: Mapping[str, Any]) -> Module:
    text = text_config(config)
    hidden, model_type = text.get("hidden_size"), str(text.get("model_type", config.get("model_type")))
    experts, second, third = tensor.shape
    # [experts, out, in] has the hidden size in one place, [experts, in, out] in the other
    transposed = hidden is not None and (second if part in READS_INTERMEDIATE else third) != hidden
    if transposed and model_type not in TRANSPOSED_EXPERTS:
        return Module(name, tensor, "other", keep=INTERLEAVED)
    keep = structural_keep(tensor) or keep_rule(name, config)
    out, columns = (third, second) if transposed else (second, third)
    parts = EXPERT_PARTS[part]
    rows = out // len(parts)
    parent = name.rpartition(".")[0]
    matrices = tuple(
        Matrix(f"{parent}.{index}.{sub}", tensor.name, rows, columns, index, place * rows, transposed)
        for index in range(experts)
        for place, sub in enumerate(parts)
    )
    return Module(name, tensor, "experts", matrices, keep)


def natural_key(name: str) -> list[str]:
    """Sorts `layers.2` before `layers.10`, and numbers before words."""
    return [part.rjust(20, "0") if part.isdigit() else part for part in name.split(".")]


def fused_with(name: str) -> str:
    """What an engine fuses shares this key: q/k/v, gate/up, the experts of a block. Empty for a layer computed alone."""
    expert = _EXPERT.match(name)
    if expert:
        return expert[1]
    parent, _, last = name.rpartition(".")
    family = _SIBLING_KEY.get(last)
    return f"{parent}.{family}" if family else ""


def scale_group(name: str) -> str:
    """What must share one nvfp4 tensor scale: q/k/v, and gate/up of one expert (vLLM takes one for the fused layer)."""
    parent, _, last = name.rpartition(".")
    return f"{parent}.{_SIBLING_KEY.get(last, last)}"


def fused_groups(names: Iterable[str]) -> dict[str, list[str]]:
    """Fused key -> its modules, only where there are several."""
    groups: dict[str, list[str]] = {}
    for name in names:
        key = fused_with(name)
        if key:
            groups.setdefault(key, []).append(name)
    return {key: members for key, members in groups.items() if len(members) > 1}
