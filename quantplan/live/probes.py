"""Calls of every block with hidden states to experiment with, from a handful of random tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from quantplan.live.forward import Forward, model_inputs
from quantplan.live.graph import Probe

SEVERAL, SINGLE = (2, 12), (64, 1)  # sequences and tokens; see `linears_fed_by`


@dataclass(frozen=True)
class Probes:
    """`batches`: what the model was given. `hidden`: for each stack the first hidden states, one a batch. `of`: block -> what
    `linears_fed_by` experiments with, one token and several; blocks that do not run for tokens have none."""

    batches: list[dict[str, Tensor]]
    hidden: list[list[Tensor]]
    of: Mapping[str, tuple[Probe, Probe]]


def find_probes(forward: Forward) -> Probes:
    """Probes of every block that runs. Hidden states are those before the first block: experiments need no others.
    Raises QP224 as `Forward.capture` does."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = int(forward.model.config.get_text_config().vocab_size)
    batches = [model_inputs(forward.model, torch.randint(vocabulary, size, generator=generator)) for size in (SEVERAL, SINGLE)]
    hidden: list[list[Tensor]] = []
    found = {}
    for number, stack in enumerate(forward.blocks.stacks):
        captured = forward.capture(number, batches, hidden)
        hidden.append(captured.hidden)
        for name, calls in zip(stack.blocks, captured.calls, strict=True):
            if calls:
                several, single = (Probe(call, state) for call, state in zip(calls, captured.hidden, strict=True))
                found[name] = single, several
    return Probes(batches, hidden, found)
