"""Fused experts on every token, whatever the router chose: for those who look at what experts are given."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from quantplan.errors import fail

# how transformers' experts call the experts chosen for each token, and their weights
CHOICES = (("top_k_index", "top_k_weights"), ("router_indices", "routing_weights"))


def routed_experts(block: nn.Module) -> dict[str, int]:
    """Name -> number of experts of the modules in `block` that are called with tokens and the experts chosen for each."""
    found = {}
    for name, part in block.named_modules():
        slabs = {p.shape[0] for p in part._parameters.values() if p is not None and p.dim() == 3}
        if len(slabs) == 1 and _choice(inspect.signature(part.forward).parameters) is not None:
            found[name] = slabs.pop()
    return found


def check_all_experts(model: nn.Module, blocks: Iterable[str], source: str) -> None:
    """Raises QP224 where no experts in `blocks` are called as transformers calls them."""
    if not any(routed_experts(model.get_submodule(name)) for name in blocks):
        text = "the model has no experts that could be given every token"
        raise fail("QP224", text, "leave out calibration: all_experts", file=source)


def _choice(names: Iterable[str]) -> tuple[str, str] | None:
    return next((choice for choice in CHOICES if {"hidden_states", *choice} <= set(names)), None)


@contextmanager
def every_token_to_every_expert(block: nn.Module) -> Iterator[None]:
    """While it is open, each call of routed experts is preceded by calls that send every token to every expert, as many of them
    at a time as the router chooses. What they return is dropped: the block computes what it would."""
    with ExitStack() as hooks:
        for name, count in routed_experts(block).items():
            part = block.get_submodule(name)
            hooks.callback(part.register_forward_pre_hook(partial(_call_all, count), with_kwargs=True).remove)
        yield


def _call_all(count: int, part: nn.Module, arguments: Any, options: Any) -> None:
    given = inspect.signature(part.forward).bind(*arguments, **options).arguments
    choice = _choice(given)
    if choice is None:
        return
    index, weights = given[choice[0]], given[choice[1]]
    for chosen in torch.arange(count, device=index.device).to(index.dtype).split(index.shape[-1]):
        to = chosen.expand(*index.shape[:-1], len(chosen))
        part.forward(**{**given, choice[0]: to, choice[1]: torch.ones_like(to, dtype=weights.dtype)})
