"""The seeds' own words for things the engine has under other names: thin, and one implementation each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from quantplan.errors import did_you_mean, fail
from quantplan.scheme import SCHEMES, Quantizer, SchemeConfig

if TYPE_CHECKING:
    from torch import Tensor

Pair = tuple[type[Quantizer], Callable[..., SchemeConfig]] | tuple[None, None]


def create_quantizer_from_scheme(scheme: Mapping[str, Any], dtype: str | None = None) -> tuple[Pair, Pair]:
    """Seed 001: `((WQ, WCfg), (AQ, ACfg))` from `{'wq': ..., 'aq': ...}`, each a scheme name, an object with `scheme` and its
    options, or null; `WQ(WCfg())` is the quantizer. `group_size` is short for the weight's. `dtype`: of dequantized values.

    Raises QuantplanError QP104 for another key or option, QP105 for a bad value, QP107 for an unknown scheme.
    """
    unknown = scheme.keys() - {"wq", "aq", "group_size"}
    if unknown:
        raise fail("QP104", f"unknown key '{min(unknown)}'", "a scheme has the keys wq, aq and group_size")
    short = {"group_size": scheme["group_size"]} if scheme.get("group_size") else {}
    return _pair(scheme.get("wq"), dtype, short), _pair(scheme.get("aq"), dtype, {})


def _pair(choice: str | Mapping[str, Any] | None, dtype: str | None, short: Mapping[str, Any]) -> Pair:
    if choice is None:
        return None, None
    options = dict(choice) if isinstance(choice, Mapping) else {"scheme": choice}
    config = SCHEMES.get(options.pop("scheme", ""))
    made = partial(config, **{**short, **options, "dtype": dtype})
    try:
        return type(made().quantizer()), made
    except ValidationError as error:
        unknown = sorted(options.keys() - config.plan_options().keys())
        if unknown:
            text = f"scheme '{config.name}' has no option '{unknown[0]}'"
            raise fail("QP104", text, did_you_mean(unknown[0], config.plan_options())) from None
        raise fail("QP105", error.errors()[0]["msg"].removeprefix("Value error, ")) from None


def symmetric_quantize(x: Tensor, bits: int = 8) -> tuple[Tensor, Tensor]:
    """Seed 002: `x` as signed integers, int8 of its shape, and the float32 scale that gives it back, `x ~ integers * scale`; one
    scale for the tensor. Raises NonFinite; QuantplanError QP107 for bits that no scheme has."""
    config = SCHEMES.get(f"int{bits}").model_validate({"granularity": "tensor", "scale_dtype": "float32"})
    found = config.quantizer().quantize(x.reshape(1, -1))
    integers = found.codes.int() - 2 ** (bits - 1)
    return integers.char().view(x.shape), found.params["scale"].reshape(())
