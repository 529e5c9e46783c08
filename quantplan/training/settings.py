"""How a quantized model is trained: a recipe and its options. Torch-free."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, PositiveFloat, PositiveInt, ValidationError, model_validator

from quantplan.errors import QuantplanError, fail
from quantplan.plan.load import schema_problems
from quantplan.plan.source import Source, read_source

Recipe = Literal["scales", "weights", "lsq", "standard", "progressive"]

# the recipe's own learning rate, where none is given
LEARNING_RATES: dict[str, float] = {"scales": 3e-3, "weights": 1e-3, "lsq": 2e-3, "standard": 1e-3, "progressive": 1e-3}
FROM_FLOAT = ("standard", "progressive")  # recipes that train the float model, and not what a plan made of it


class Training(BaseModel):
    """Options of `train`, recorded in the output. Shares are of the whole budget. Frozen: unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    recipe: Recipe = "scales"
    """`scales`: codes stay, their steps are learned; `weights`: weights are, on the grids of the start; `lsq`: both;
    `standard`: weights of the float model, on grids that follow them; `progressive`: likewise, after a time in which inputs are
    only observed and nothing is rounded"""
    norms: bool = True
    """whether gains of norms and biases are learned too"""
    loss: Literal["kl", "cross_entropy"] = "kl"
    """`kl`: distance from what the float model predicts; `cross_entropy`: from the text itself"""
    temperature: PositiveFloat = 1.0
    """what logits are divided by in the distance"""
    learning_rate: PositiveFloat | None = None
    """how far AdamW moves a number in a step, as a share of its tensor's mean magnitude (of a step: of itself)"""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """how the learning rate falls"""
    warmup: float = Field(default=0.05, ge=0, le=1)
    """share in which the learning rate rises from a hundredth"""
    weight_decay: NonNegativeFloat = 0.0
    """of AdamW"""
    max_gradient_norm: PositiveFloat = 1.0
    """gradients are shortened to this length"""
    batch_size: PositiveInt = 4
    """sequences that a process computes at once"""
    gradient_accumulation: PositiveInt = 1
    """batches that make a step"""
    gradient_checkpointing: bool = False
    """whether blocks are computed again on the way back, instead of kept in memory"""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """what matrices are multiplied in; parameters stay float32"""
    minutes: PositiveFloat | None = None
    """the budget in time, with the evaluations"""
    steps: PositiveInt | None = None
    """the budget in steps"""
    epochs: PositiveFloat | None = None
    """the budget in passes over the data; 1 where no budget is given"""
    samples: PositiveInt = 512
    """how many sequences, those held out among them"""
    sequence_length: int | None = Field(default=None, ge=2)
    """tokens in a sequence; by default as the plan's calibration says"""
    held_out: PositiveInt = 8
    """sequences that are never trained on, and judge snapshots"""
    evaluations: PositiveInt = 8
    """how often snapshots are judged and kept, evenly over the budget"""
    freeze_observers: float = Field(default=1.0, ge=0, le=1)
    """share after which the ranges of static activations stay as they are"""
    freeze_batch_norm: float = Field(default=1.0, ge=0, le=1)
    """share after which batch norms stay as they are"""
    float_share: float = Field(default=0.2, ge=0, le=1)
    """(progressive) share in which nothing is rounded nor observed"""
    observe_share: float = Field(default=0.2, ge=0, le=1)
    """(progressive) share after it in which inputs are observed and nothing is rounded"""
    seed: int = 0
    """the order of the data"""
    report_to: list[str] = []
    """where transformers' Trainer sends metrics: tensorboard, wandb, mlflow and its other integrations"""

    @model_validator(mode="after")
    def _consistent(self) -> Training:
        if self.held_out >= self.samples:
            raise ValueError(f"held_out: nothing of {self.samples} samples is left to train on")
        if self.recipe == "progressive" and self.float_share + self.observe_share >= 1:
            raise ValueError("float_share: nothing is left in which values are rounded")
        return self

    @property
    def rate(self) -> float:
        """The learning rate in effect."""
        return self.learning_rate if self.learning_rate is not None else LEARNING_RATES[self.recipe]

    @property
    def from_float(self) -> bool:
        """Whether the float model is trained, and not what the plan made of it."""
        return self.recipe in FROM_FLOAT


def training_settings(options: Mapping[str, Any], config: str | os.PathLike[str] | None = None) -> Training:
    """Settings from a file (JSON or YAML), and `options` over it. Raises QuantplanError: QP100 to QP103 for the file, QP104 and
    QP105 for what is said, all of it at once."""
    written: object = {}
    source = Source("", (), {}, {})
    if config is not None:
        written, source = read_source(config)
    if not isinstance(written, dict):
        raise fail("QP105", "the options of training are an object", file=str(config))
    data = {**written, **options}
    try:
        return Training(**data)
    except ValidationError as error:
        problems = list(schema_problems(error, Training, data))
        known = (p if p.path is None or p.path[0] in options else p.at(source.locate(p.path, p.at_key)) for p in problems)
        raise QuantplanError(known) from None
