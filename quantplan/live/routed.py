"""Which tokens the rows are that an expert is given, whatever code chooses them: routers differ, but all of them index rows."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_CHOICES = {
    *(torch.Tensor.__getitem__, torch.Tensor.index_select, torch.Tensor.gather),
    *(torch.index_select, torch.gather, torch.take_along_dim),
}


class RoutedTokens(TorchFunctionMode):
    """While it is open, for one batch of `count` tokens, follows rows that are chosen by index from all tokens. Open it
    after `watching`: what that calls is then not followed."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self._count = count
        self._chosen: tuple[Tensor, Tensor] | None = None  # the last rows chosen, held; the tokens they are
        self._last: tuple[object, Tensor] | None = None  # the expert that was given rows last; the tokens they are

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if func in _CHOICES and args and self._chooses(args[0], (*args[1:], *(kwargs or {}).values())):
            of_all = torch.arange(self._count).reshape(*args[0].shape[:-1], 1).expand(args[0].shape)
            tokens = func(of_all, *args[1:], **(kwargs or {}))
            if made.dim() and made.shape[-1] == args[0].shape[-1]:
                self._chosen = made, tokens[..., 0].reshape(-1)
        return made

    def _chooses(self, of: Any, others: tuple[Any, ...]) -> bool:
        """Whether a tensor with a row for each token is indexed by others."""
        if not isinstance(of, Tensor) or isinstance(of, nn.Parameter) or of.dim() < 2:
            return False
        parts = [p for other in others for p in (other if isinstance(other, tuple) else (other,))]
        return math.prod(of.shape[:-1]) == self._count and any(isinstance(p, Tensor) and p.dim() > 0 for p in parts)

    def of(self, parameter: str, index: int | None, inputs: Tensor) -> Tensor | None:
        """The tokens int64 `[rows]` that `inputs` `[rows, columns]` of slab `index` of `parameter` are. None: all, in order; or,
        where there are not as many, it is not known."""
        module = parameter.rpartition(".")[0]
        expert = (module.rpartition(".")[0] if index is None else module, index)
        tokens = self._where(inputs)
        if tokens is None and self._last is not None and self._last[0] == expert and len(self._last[1]) == len(inputs):
            tokens = self._last[1]  # its second matrix is given what the first has made of the same tokens
        self._last = None if tokens is None else (expert, tokens)
        whole = tokens is None or (len(tokens) == self._count and torch.equal(tokens, torch.arange(self._count)))
        return None if whole else tokens

    def _where(self, inputs: Tensor) -> Tensor | None:
        """The tokens of rows that are those chosen last, or some of them."""
        if self._chosen is None:
            return None
        rows, tokens = self._chosen
        same = inputs.untyped_storage().data_ptr() == rows.untyped_storage().data_ptr()
        if same and inputs.shape[-1] == rows.shape[-1] and inputs.is_contiguous() and rows.is_contiguous():
            first = (inputs.storage_offset() - rows.storage_offset()) // rows.shape[-1]
            return tokens[first : first + len(inputs)]
        if len(inputs) != len(tokens):
            return None
        rows = rows.reshape(-1, rows.shape[-1])  # cast, most likely; of all tokens there may be both, the chosen ones and others
        cast = len(tokens) != self._count or (inputs.shape == rows.shape and torch.equal(inputs, rows.to(inputs.dtype)))
        return tokens if cast else None
