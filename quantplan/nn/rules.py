"""Rules with static ranges (seed 004): a list of rules is a plan; statistics of ranges are apart from the parameters."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quantplan.errors import fail
from quantplan.nn.fake_quantizer import FakeQuantizer
from quantplan.nn.prepare import prepare_qat
from quantplan.nn.quantize import quantize
from quantplan.scheme import SCHEMES

# qwix's names of types that are no schemes' own
TYPES: dict[str, dict[str, Any]] = {
    "float8_e4m3fn": {"scheme": "fp8"},
    "float8_e4m3": {"scheme": "fp8"},
    "float8_e5m2": {"scheme": "fp8", "format": "e5m2"},
    "float4_e2m1fn": {"scheme": "fp4", "granularity": "channel"},
}


@dataclass(frozen=True)
class QuantizationRule:
    """How modules whose name matches `module_path`, a regular expression, are quantized; of several rules the first that matches
    counts. `weight_qtype` and `act_qtype` are schemes, or objects with `scheme` and its options; None: not quantized.
    `act_static_scale`: the range of activations is the mean of the largest magnitudes seen. `tile_size`: columns of a weight that
    share a scale."""

    module_path: str = ".*"
    weight_qtype: str | Mapping[str, Any] | None = None
    act_qtype: str | Mapping[str, Any] | None = None
    act_static_scale: bool = False
    tile_size: int | None = None

    def override(self) -> dict[str, Any]:
        """The rule as an override of a plan. Raises QuantplanError QP107 for an unknown type."""
        weight, inputs = _scheme(self.weight_qtype), _scheme(self.act_qtype)
        if weight is not None and self.tile_size is not None:
            weight["group_size"] = self.tile_size
        if inputs is not None and self.act_static_scale:
            inputs |= {"dynamic": False, "observer": "static_range"}
        override = {"pattern": f"re:{self.module_path}", "optional": True, "keep": weight is None}
        return override if weight is None else {**override, "wq": weight, "aq": inputs}


@dataclass(frozen=True)
class QatProvider:
    """Rules for training: `quantize_model` makes a model whose weights stay float."""

    rules: Sequence[QuantizationRule]


@dataclass(frozen=True)
class PtqProvider:
    """Rules for inference: `quantize_model` makes a model whose weights are quantized."""

    rules: Sequence[QuantizationRule]


def quantize_model(model: nn.Module, provider: QatProvider | PtqProvider, *model_inputs: Any) -> nn.Module:
    """A copy of `model` as the provider's rules say. `model_inputs` are taken because seed 004 gives them; nothing is run. Raises
    QuantplanError as `prepare_qat` and `quantize`."""
    plan = rules_plan(provider.rules)
    if isinstance(provider, QatProvider):
        return prepare_qat(model, plan)
    return quantize(copy.deepcopy(model), plan)


def rules_plan(rules: Sequence[QuantizationRule]) -> dict[str, Any]:
    """The plan that says the same: in a plan the last that matches counts."""
    return {"default": {"wq": None}, "overrides": [rule.override() for rule in reversed(rules)]}


def quant_stats(model: nn.Module) -> dict[str, dict[str, Tensor]]:
    """Layer -> the statistics of its static inputs, on the CPU: `count` and `sum_of_absmax` where these are static ranges, zero
    before anything was seen."""
    found = {}
    for name, quantizer in _static(model):
        assert quantizer.observer is not None
        state = quantizer.observer.state()
        empty = {n: torch.zeros_like(p) for n, p in quantizer.observer.config.collect(torch.zeros(1, 1)).items()}
        found[name] = state or empty
    return found


def load_quant_stats(model: nn.Module, stats: Mapping[str, Mapping[str, Tensor]]) -> nn.Module:
    """`model` with its static ranges as `quant_stats` returned them. Raises QuantplanError QP105 for layers that are not there,
    and for statistics of another observer."""
    layers = dict(_static(model))
    unknown = stats.keys() - layers.keys()
    if unknown:
        raise fail("QP105", f"no static inputs to load statistics into: {min(unknown)}", "prepare the model with the same rules")
    for name, state in stats.items():
        quantizer = layers[name]
        assert quantizer.observer is not None
        nothing = "count" in state and not state["count"].item()
        quantizer.load_range({} if nothing else state)
    return model


def _static(model: nn.Module) -> list[tuple[str, FakeQuantizer]]:
    """The layers with static inputs."""
    found = ((name, getattr(module, "input_fake_quant", None)) for name, module in model.named_modules())
    return [(name, q) for name, q in found if isinstance(q, FakeQuantizer) and q.observer is not None]


def _scheme(qtype: str | Mapping[str, Any] | None) -> dict[str, Any] | None:
    if qtype is None:
        return None
    if isinstance(qtype, str) and qtype in TYPES:
        return dict(TYPES[qtype])
    options = dict(qtype) if isinstance(qtype, Mapping) else {"scheme": qtype}
    SCHEMES.get(options["scheme"])
    return options
