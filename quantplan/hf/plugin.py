"""The native format as a quantization method of transformers: its config, and the quantizer that swaps modules on load.
Importing this file registers both.
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import ValidationError
from torch import nn
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from quantplan.checkpoint.stored import ASK_TO_UPGRADE, scheme_of
from quantplan.errors import fail
from quantplan.kv_cache import SCALES, KVCache
from quantplan.live.cache import round_cache
from quantplan.nn.linear import QuantLinear
from quantplan.scheme import SchemeConfig

VERSION = 1


Treatment = tuple[SchemeConfig, SchemeConfig | None]


class Treatments(dict[str, Treatment]):
    """How each stored matrix is quantized, by its name in the checkpoint: weights, activations. Never changed, and shared by
    copies: transformers copies what converts weights once for every tensor."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Treatments:
        return self


class QuantplanConfig(QuantizationConfigMixin):
    """The `quantization_config` of a native checkpoint. Raises QP222 for one of a later version."""

    def __init__(
        self,
        groups: list[dict[str, Any]] | None = None,
        version: int = VERSION,
        kv_cache: dict[str, Any] | None = None,
        **others: Any,
    ) -> None:
        unknown = others.keys() - {"quant_method"}
        if version != VERSION or unknown:
            what = f"has the unknown key '{min(unknown)}'" if unknown else f"is of version {version}"
            raise fail("QP222", f"the quantization_config {what}", ASK_TO_UPGRADE)
        self.quant_method = "quantplan"  # type: ignore[assignment]  # transformers' own methods are an enum
        self.version = version
        self.groups = groups or []
        if kv_cache is not None:
            self.kv_cache = kv_cache

    def cache(self) -> KVCache | None:
        """The quantized key-value cache. Raises QP107 for an unknown scheme, QP222 for unknown options."""
        if not hasattr(self, "kv_cache"):
            return None
        try:
            return KVCache.from_dict(self.kv_cache)
        except (ValidationError, KeyError) as error:
            text = f"the quantization_config has a kv_cache this quantplan cannot read ({type(error).__name__})"
            raise fail("QP222", text, ASK_TO_UPGRADE) from None

    def treatments(self) -> Treatments:
        """Every stored matrix with its schemes. Raises QP107 for an unknown scheme, QP222 for unknown options."""
        found = Treatments()
        for group in self.groups:
            schemes = scheme_of(group["wq"]), scheme_of(group["aq"]) if group.get("aq") else None
            found.update(dict.fromkeys(group["modules"], schemes))
        return found

    def without(self, names: set[str]) -> list[dict[str, Any]]:
        """The groups less some matrices."""
        left = [{**g, "modules": [n for n in g["modules"] if n not in names]} for g in self.groups]
        return [group for group in left if group["modules"]]


class QuantplanQuantizer(HfQuantizer):
    """Loads native checkpoints: linears become `QuantLinear` and stay packed, whatever transformers rearranges while loading
    (fused experts first of all) is dequantized on the way."""

    requires_calibration = False
    quantization_config: QuantplanConfig

    def __init__(self, quantization_config: QuantplanConfig, **options: Any) -> None:
        super().__init__(quantization_config, **options)
        self._treatments = quantization_config.treatments()
        self._cache = quantization_config.cache()
        self._conv1d: set[str] = set()  # modules that were transformers' Conv1D, whose weight is [in, out]
        self._dense: set[str] = set()  # stored matrices that are dequantized while they are loaded

    def validate_environment(self, *arguments: Any, **options: Any) -> None:
        if not self.pre_quantized:
            advice = "quantize it with quantplan.apply, or in memory with quantplan.quantize"
            raise fail("QP222", "the checkpoint is not quantized, and quantplan does not quantize while loading", advice)

    def _process_model_before_weight_loading(self, model: Any, **options: Any) -> Any:
        """Replaces modules, in place; `model` is on the meta device."""
        from quantplan.hf.convert import find_attentions, find_places

        self._dense = set(self._treatments)
        for stored, module_name in find_places(model, self._treatments).items():
            wq, aq = self._treatments[stored]
            linear = model.get_submodule(module_name)
            columns, rows = linear.weight.shape if type(linear) is Conv1D else reversed(linear.weight.shape)
            made = QuantLinear(columns, rows, wq, aq, linear.bias is not None, device="meta", dtype=linear.weight.dtype)
            if type(linear) is Conv1D:
                self._conv1d.add(module_name)
            model.set_submodule(module_name, made)
            self._dense.discard(stored)
        if self._cache is not None:
            for module in find_attentions(model, self._cache.modules).values():
                round_cache(model.get_submodule(module), self._cache, "meta")
        return model

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any) -> list[Any]:
        """The model's conversions, with those that stored matrices pass through made to decode them first."""
        from quantplan.hf.convert import decoding_conversions

        dense = Treatments((name, self._treatments[name]) for name in self._dense)
        return decoding_conversions(weight_conversions, model, dense) if dense else weight_conversions

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        """What is stored for a quantized matrix is loaded as it is; other tensors follow the model's dtype."""
        from quantplan.hf.convert import StoredMatrices

        module, _, part = converter.source_patterns[0].rpartition(".")
        as_it_is = isinstance(converter, StoredMatrices) or (module in self._treatments and part not in ("weight", "bias"))
        as_it_is = as_it_is or (self._cache is not None and module in self._cache.modules and part in SCALES)
        return None if as_it_is else super().get_new_dtype(converter, param, dtype)

    def _process_model_after_weight_loading(self, model: Any, **options: Any) -> Any:
        # saved again, these are dense
        self.quantization_config.groups = self.quantization_config.without(self._dense)
        return model

    def _dequantize(self, model: Any, dtype: torch.dtype | str | None = None) -> Any:
        """In place: every `QuantLinear` becomes the `nn.Linear` or `Conv1D` that it was."""
        dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype  # a model that was saved says it in its config so
        for name, module in list(model.named_modules()):
            if isinstance(module, QuantLinear):
                linear: nn.Module = module.to_linear()
                linear = _conv1d(linear) if name in self._conv1d else linear
                model.set_submodule(name, linear.to(dtype) if dtype is not None else linear)
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False


def _conv1d(linear: Any) -> Conv1D:
    """A linear as transformers' Conv1D."""
    made = Conv1D(0, 0)
    made.nf, made.nx = linear.out_features, linear.in_features
    made.weight, made.bias = nn.Parameter(linear.weight.t().contiguous()), linear.bias
    return made.train(linear.training)


if "quantplan" not in AUTO_QUANTIZATION_CONFIG_MAPPING:  # a second import of this file would raise otherwise
    register_quantization_config("quantplan")(QuantplanConfig)
    register_quantizer("quantplan")(QuantplanQuantizer)
