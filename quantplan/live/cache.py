"""Key-value caches that hold rounded states: what stands in for a model's own cache while one attention module runs."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from quantplan.checkpoint.reader import TORCH_DTYPES
from quantplan.kv_cache import SCALES, KVCache

CACHE = "past_key_values"  # transformers' name for a cache, wherever one is handed on


class SeenCache:
    """A cache, or none, whose keys and values go through `change(name, states)` first, `name` being `k_scale` or `v_scale`.

    Attention modules hand over keys and values `[batch, heads, tokens, features]` as they are to be cached, and compute with what
    they get back; everything else a model asks of a cache is the own cache's affair.
    """

    def __init__(self, own: Any, change: Callable[[str, Tensor], Tensor]) -> None:
        self._own, self._change = own, change

    def update(self, keys: Tensor, values: Tensor, *arguments: Any, **options: Any) -> Any:
        """What `Cache.update` of transformers returns: all keys and values up to now."""
        keys, values = (self._change(name, states) for name, states in zip(SCALES, (keys, values), strict=True))
        return (keys, values) if self._own is None else self._own.update(keys, values, *arguments, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._own, name)


def takes_cache(module: nn.Module) -> bool:
    """Whether a module is handed a cache by name."""
    return CACHE in inspect.signature(module.forward).parameters


def round_cache(module: nn.Module, cache: KVCache, device: torch.device | str | None = None) -> None:
    """Makes an attention module compute with keys and values as `cache` rounds them. Its buffers `k_scale` and `v_scale`, here
    uninitialised, are for a state dict to be loaded into."""
    for name, (dtype, shape) in cache.layout("").items():
        module.register_buffer(name[1:], torch.empty(shape, dtype=getattr(torch, TORCH_DTYPES[dtype]), device=device))

    changing_cache(module, lambda name, states: cache.rounded(states, getattr(module, name)))


def changing_cache(module: nn.Module, change: Callable[[str, Tensor], Tensor]) -> RemovableHandle:
    """Makes an attention module compute with what `change` makes of its keys and values: see `SeenCache`."""

    def hand_over(module: nn.Module, arguments: Any, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return arguments, {**options, CACHE: SeenCache(options.get(CACHE), change)}

    return module.register_forward_pre_hook(hand_over, with_kwargs=True)
