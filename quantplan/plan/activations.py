"""What a plan may say of activations beside their scheme: `dynamic: false`, and the observer that finds the range then."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from quantplan.errors import did_you_mean
from quantplan.observer import OBSERVERS, ObserverConfig
from quantplan.scheme import SchemeConfig

OPTIONS = ("dynamic", "observer")


def default_observer(scheme: type[SchemeConfig] | SchemeConfig) -> str:
    """The observer of a scheme's static activations where the plan names none: the range of least squared error for integers,
    whose steps an outlier makes coarse for everyone; the whole range for floats; one with headroom where blocks have scales of
    their own below the static one."""
    if scheme.tensor_params:
        return "headroom"
    return "mse" if scheme.name.startswith("int") else "minmax"


def build_observer(choice: Any, scheme: SchemeConfig) -> ObserverConfig | tuple[str, str, str]:
    """The observer a plan chooses, a name or an object with `name` and its options; None: the scheme's own. Or what is wrong
    with it: the code, what to say, and what helps."""
    options = dict(choice) if isinstance(choice, Mapping) else {"name": choice or default_observer(scheme)}
    name = options.pop("name", None)
    if not isinstance(name, str):
        return "QP105", "an observer has a name", "say which: observer: {name: percentile, ...}"
    if name not in OBSERVERS:
        return "QP107", f"unknown observer '{name}'", did_you_mean(name, OBSERVERS.names())
    member = OBSERVERS.get(name)
    unknown = next((option for option in options if option not in member.options()), None)
    if unknown is not None:
        return "QP104", f"observer '{name}' has no option '{unknown}'", did_you_mean(unknown, member.options())
    try:
        made = member.model_validate(options, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        return "QP105", f"observer '{name}': {'.'.join(map(str, first['loc']))}: {first['msg']}", ""
    if made.dynamic or made.channel_axis is not None:
        what = "collects no range" if made.dynamic else "finds a range for each channel, and activations have one"
        return "QP105", f"observer '{name}' {what}", "minmax, percentile or mse find one range"
    return made
