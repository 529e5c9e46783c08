"""Limits that figures must keep, for CI."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from quantplan.errors import Place, Problem
from quantplan.evaluation.metrics import Evaluation

TITLES = {"perplexity": "perplexity", "perplexity_ratio": "perplexity ratio", "kl": "KL", "top1": "top-1", "top5": "top-5"}


@dataclass(frozen=True)
class Gate:
    """A limit: `figure` of an evaluation may be `limit` at most, or at least where `least`. `option`: what set it."""

    option: str
    figure: str
    limit: float
    least: bool = False

    @property
    def takes_reference(self) -> bool:
        """Whether the figure is measured against a reference alone."""
        return self.figure != "perplexity"

    def keeps(self, value: float) -> bool:
        """Whether a figure keeps the limit; equal to it does."""
        return value >= self.limit if self.least else value <= self.limit


def failures(gates: Iterable[Gate], evaluations: Iterable[Evaluation]) -> Iterator[Problem]:
    """QP805 for every gate that an evaluation does not pass. The figure itself is compared, not the end of its interval."""
    gates = list(gates)
    for found in evaluations:
        for gate in gates:
            value, margin = getattr(found, gate.figure), found.margin(gate.figure)
            if value is None or gate.keeps(value):
                continue
            shown = f"{value:.5g}" + ("" if margin is None else f" ± {margin:.2g}")
            text = f"{TITLES[gate.figure]} {shown} is {'less' if gate.least else 'more'} than {gate.option} {gate.limit:g}"
            yield Problem("QP805", text, place=Place(found.model))
