"""How the key-value cache is quantized: one scheme for every layer, and for each a scale of its keys and one of its values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from quantplan.observer import ObserverConfig
from quantplan.scheme import SCHEMES, Layout, SchemeConfig

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

SCALES = ("k_scale", "v_scale")


@dataclass(frozen=True)
class KVCache:
    """Keys and values on a symmetric grid with a scale that calibration found. Keys are those that are cached: after rotary
    embedding, which no scale of `k_proj`'s outputs could know.

    `modules`: attention modules as the checkpoint names them; `heads`: of keys, where each has a scale of its own, or None.
    """

    scheme: SchemeConfig
    heads: int | None
    modules: tuple[str, ...]
    observer: ObserverConfig | None = None  # None: the scales are known

    def layout(self, module: str) -> Layout:
        """Tensor name -> (safetensors dtype, shape) of the scales of one attention module."""
        dtype, _ = self.scheme.param_layout(1, 1)["scale"]
        shape = (1,) if self.heads is None else (self.heads, 1, 1)
        return {f"{module}.{scale}": (dtype, shape) for scale in SCALES}

    def as_dict(self) -> dict[str, Any]:
        """Plain data, from which `from_dict` makes it again, without its observer."""
        scheme = {"scheme": self.scheme.name, **self.scheme.model_dump(mode="json")}
        return {**scheme, "heads": self.heads, "modules": list(self.modules)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> KVCache:
        """The inverse of `as_dict`. Raises QP107 for an unknown scheme, pydantic's error for options it has not."""
        options = {name: value for name, value in data.items() if name not in ("scheme", "heads", "modules")}
        return cls(SCHEMES.get(data["scheme"])(**options), data["heads"], tuple(data["modules"]))

    def find_scale(self, states: list[Tensor]) -> Tensor:
        """The scale for states `[tokens, heads, features]` of several batches, in the shape and dtype of `layout`. Raises
        NonFinite, and QP603 when there are none."""
        import torch

        assert self.observer is not None
        quantizer = self.scheme.quantizer()
        found = []
        for head in [slice(None)] if self.heads is None else [slice(h, h + 1) for h in range(self.heads)]:
            observer = self.observer.observer()
            for state in states:
                observer.update(state[:, head])
            found.append(quantizer.fit_static(observer.result(quantizer))["scale"])
        return torch.cat(found).reshape(-1, 1, 1) if self.heads is not None else found[0]

    def rounded(self, states: Tensor, scale: Tensor) -> Tensor:
        """States `[batch, heads, tokens, features]` as they come out of the cache, in their own dtype."""
        return self.scheme.quantizer().nearest(states.float(), {"scale": scale}).to(states.dtype)
