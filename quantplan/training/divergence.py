"""The distance of a model's predictions from those of another, with its gradient, in pieces: logits of a large vocabulary are the
largest tensors there are, and their softmax is never held whole."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

CHUNK = 256  # positions at once


def kl_divergence(logits: Tensor, reference: Tensor, temperature: float = 1.0) -> Tensor:
    """The mean over positions of `T^2 KL(p || q)` in nats, with `p = softmax(reference / T)` and `q = softmax(logits / T)`
    (Hinton et al. 2015, arXiv 1503.02531), both `[..., vocabulary]`; float32. The gradient of `logits` is `T (q - p) / N`."""
    vocabulary = logits.shape[-1]
    found: Tensor = _Divergence.apply(logits.reshape(-1, vocabulary), reference.reshape(-1, vocabulary), temperature)
    return found


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, reference: Tensor, temperature: float) -> Tensor:
        count = len(logits)
        wanted = ctx.needs_input_grad[0]
        gradient = torch.empty_like(logits) if wanted else None
        total = torch.zeros((), dtype=torch.float64, device=logits.device)
        for at in range(0, count, CHUNK):
            piece = slice(at, at + CHUNK)
            log_q = torch.log_softmax(logits[piece].float() / temperature, -1)
            log_p = torch.log_softmax(reference[piece].float() / temperature, -1)
            p = log_p.exp()
            # a token that the reference cannot predict, at minus infinity, counts nothing
            total += torch.where(p == 0, 0, p * (log_p - log_q)).sum(-1).double().sum()
            if gradient is not None:
                gradient[piece] = (log_q.exp_() - p) * (temperature / count)
        ctx.save_for_backward(gradient)
        return (total * (temperature**2 / count)).float()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * gradients[0].to(gradient.dtype), None, None
