"""transformers' Trainer, distilling: its loss, its learning rates, its budget; what it saves is what is trained and no more."""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import ExportableState

from quantplan.nn.fake_quantizer import FakeQuantizer
from quantplan.training.divergence import kl_divergence
from quantplan.training.settings import Training
from quantplan.training.student import Student

WEIGHTS = "model.safetensors"  # where Trainer looks whether a checkpoint is one
FOREVER = 10**9  # steps, where only time ends the training
LOWEST = 0.01  # share of the learning rate that a warm-up begins with


class Distiller(Trainer):
    """Trains a student. `teacher`: the float model, not trained, in evaluation."""

    def __init__(self, student: Student, teacher: Any, settings: Training, budget: Budget, **options: Any) -> None:
        super().__init__(model=student.model, data_collator=_stacked, **options)
        self.student, self.teacher, self.settings, self.budget = student, teacher.to(self.args.device), settings, budget
        self.teacher.config.use_cache = False
        self.remove_callback(PrinterCallback)  # standard output carries the result alone
        self.model_accepts_loss_kwargs = False  # the loss is a mean: Trainer divides it by accumulated batches

    def compute_loss(  # type: ignore[override]
        self, model: Any, inputs: Any, return_outputs: bool = False, **options: Any
    ) -> Any:
        """The mean over the positions of a batch, a scalar."""
        ids = inputs["input_ids"]
        if model.training:
            set_phase(self.student.model, self.settings, self.budget.share(self.state.global_step))
        logits = model(input_ids=ids).logits
        if self.settings.loss == "cross_entropy" and model.training:
            return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
        with torch.no_grad():
            reference = self.teacher(input_ids=ids).logits
        return kl_divergence(logits, reference, self.settings.temperature if model.training else 1.0)

    def prediction_step(self, model: Any, inputs: Any, *others: Any, **options: Any) -> Any:
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            return self.compute_loss(model, inputs).detach(), None, None

    @torch.no_grad()
    def judge(self, model: Any) -> float:
        """The mean KL of the held-out sequences, of a model in evaluation; for use before training, where `evaluate` would make
        accelerate take the model for one that it need not wrap for several processes."""
        rows: Any = self.eval_dataset
        sums = 0.0
        for at in range(0, len(rows), self.args.per_device_eval_batch_size):
            inputs = self._prepare_inputs(_stacked(rows[at : at + self.args.per_device_eval_batch_size]))
            with self.accelerator.autocast():
                sums += float(self.compute_loss(model, inputs)) * len(inputs["input_ids"])
        return sums / len(rows)

    def evaluate(self, *arguments: Any, **options: Any) -> dict[str, float]:
        """The mean KL of the held-out sequences, of what would be written: floats as they are stored."""
        for module in self.student.model.modules():
            if isinstance(module, FakeQuantizer):
                module.enable_fake_quant()  # whatever the phase of training
        with as_stored(self.student):
            found: dict[str, float] = super().evaluate(*arguments, **options)
        return found

    def create_optimizer(self, model: Any = None) -> Any:
        """AdamW, with learning rates that are shares of the tensors' mean magnitudes."""
        if self.optimizer is None:
            groups = learning_groups(self.student, self.settings)
            self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999), weight_decay=self.settings.weight_decay)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The learning rate over the budget."""
        if self.lr_scheduler is None:
            rate = lambda step: learning_rate(self.settings, self.budget.share(step))  # noqa: E731
            chosen: Any = optimizer or self.optimizer
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(chosen, rate)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = Path(output_dir or self.args.output_dir or "")
        folder.mkdir(parents=True, exist_ok=True)
        save_file(self.student.state(), folder / WEIGHTS)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self.student.load_state(load_file(Path(resume_from_checkpoint) / WEIGHTS))


class Budget(TrainerCallback, ExportableState):
    """How much of the training is done, as a share, by steps or by time, whichever is further. Plans evaluations by it; all
    processes go by the first one's clock."""

    def __init__(self, settings: Training, steps_in_epoch: int) -> None:
        epochs = settings.epochs or (None if settings.minutes or settings.steps else 1)
        counts = [settings.steps] if settings.steps else []
        counts += [max(1, math.ceil(epochs * steps_in_epoch))] if epochs else []
        self.steps: int = min(counts, default=FOREVER)
        self.seconds = settings.minutes * 60 if settings.minutes else math.inf
        self.spent = 0.0  # seconds, in runs before this one too
        self._evaluations, self._since = settings.evaluations, time.monotonic()
        progressive = settings.recipe == "progressive"
        self._rounding = settings.float_share + settings.observe_share if progressive else 0.0  # nothing is judged before

    def share(self, step: int) -> float:
        """What is done when `step` steps are, from 0 to 1."""
        return min(1.0, max(step / self.steps, self.spent / self.seconds))

    def state(self) -> dict[str, Any]:
        """For the checkpoint."""
        return {"args": {}, "attributes": {"spent": self.spent}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Goes on from the checkpoint."""
        saved = state.stateful_callbacks.get(type(self).__name__) or {}
        if state.global_step:
            self.spent = saved.get("attributes", {}).get("spent", 0.0)
        self._since = time.monotonic() - self.spent

    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Evaluates and saves where the next part begins, stops at the end."""
        before = self.share(state.global_step - 1)
        self.spent = agreed(time.monotonic() - self._since)
        now = self.share(state.global_step)
        rounding = now >= self._rounding
        if rounding and math.floor(now * self._evaluations) > math.floor(before * self._evaluations):
            control.should_evaluate = control.should_save = True
        control.should_training_stop = control.should_training_stop or now >= 1


def set_phase(model: nn.Module, settings: Training, share: float) -> None:
    """In place: what of a model in training is rounded, observed and frozen at a share of the budget (seed 003's recipes)."""
    progressive = settings.recipe == "progressive"
    observing = not progressive or share >= settings.float_share
    rounding = not progressive or share >= settings.float_share + settings.observe_share
    for module in model.modules():
        if isinstance(module, FakeQuantizer):
            module.enable_fake_quant(rounding)
            module.enable_observer(observing and share < settings.freeze_observers)
        elif isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.train(share < settings.freeze_batch_norm)


class Snapshots(TrainerCallback, ExportableState):
    """Keeps the best state that an evaluation saw, in `path`. `best`: its KL; `step`: when, 0 for the start, whose KL is `start`;
    `history`: step and KL of all."""

    def __init__(self, student: Student, path: Path) -> None:
        self.student, self.path = student, path
        self.best, self.step, self.start = math.inf, 0, math.inf
        self.history: list[list[float]] = []

    def state(self) -> dict[str, Any]:
        """For the checkpoint."""
        attributes = {n: getattr(self, n) for n in ("best", "step", "start", "history")}
        return {"args": {}, "attributes": attributes}

    def on_train_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Goes on from the checkpoint."""
        saved = state.stateful_callbacks.get(type(self).__name__) or {}
        if state.global_step:
            for name, value in saved.get("attributes", {}).items():
                setattr(self, name, value)

    def begin(self, kl: float) -> None:
        """The start was judged."""
        self.start = self.best = kl
        self.step, self.history = 0, [[0, kl]]

    def on_evaluate(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Judges what was evaluated."""
        found = others["metrics"]["eval_loss"]
        self.history.append([state.global_step, found])
        if found < self.best:  # NaN is not
            self.best, self.step = found, state.global_step
            if state.is_world_process_zero:
                part = self.path.with_suffix(".part")
                save_file(self.student.state(), part)
                os.replace(part, self.path)


class Telling(TrainerCallback):
    """Tells `on_step` what Trainer logs, and asks `stopped` after each step whether to keep a checkpoint and end."""

    def __init__(self, budget: Budget, tell: Callable[[float, Mapping[str, Any]], None], stopped: Callable[[], bool]) -> None:
        self.budget, self._tell, self._stopped = budget, tell, stopped

    def on_log(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Passes on metrics."""
        self._tell(self.budget.share(state.global_step), {"step": state.global_step, **others["logs"]})

    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Stops between two steps, with a checkpoint."""
        if agreed(float(self._stopped())):
            control.should_save = control.should_training_stop = True


def agreed(value: float) -> float:
    """The first process's value, in all."""
    if not torch.distributed.is_initialized():
        return value
    shared = [value]
    torch.distributed.broadcast_object_list(shared, 0)
    return shared[0]


def learning_rate(settings: Training, share: float) -> float:
    """The factor of learning rates at a share of the budget."""
    if share < settings.warmup:
        return LOWEST + (1 - LOWEST) * share / settings.warmup
    left = (1 - share) / (1 - settings.warmup) if settings.warmup < 1 else 1.0
    return {"cosine": (1 - math.cos(math.pi * left)) / 2, "linear": left, "constant": 1.0}[settings.schedule]


def learning_groups(student: Student, settings: Training) -> list[dict[str, Any]]:
    """Parameters by the learning rates they take. Shares of steps are shares already; others' are their mean magnitude's."""
    shares = [p for name, p in student.trained() if name.endswith(".change")]
    others = [p for name, p in student.trained() if not name.endswith(".change")]
    sizes = [max(float(p.detach().abs().mean()), 1e-8) for p in others]
    groups = [{"params": [p], "lr": settings.rate * size} for p, size in zip(others, sizes, strict=True)]
    return [{"params": shares, "lr": settings.rate}, *groups] if shares else groups


@contextlib.contextmanager
def as_stored(student: Student) -> Iterator[None]:
    """Trained floats as the output holds them, while it lasts."""
    before = {name: parameter.detach().clone() for name, (parameter, _) in student.floats.items()}
    with torch.no_grad():
        for parameter, dtype in student.floats.values():
            parameter.copy_(parameter.to(dtype))
    try:
        yield
    finally:
        with torch.no_grad():
            for name, (parameter, _) in student.floats.items():
                parameter.copy_(before[name])


def arguments(settings: Training, folder: Path, steps: int) -> TrainingArguments:
    """Trainer's own settings. Evaluating and saving is planned by `Budget`."""
    # named only where it is wanted: transformers is about to rename it
    checkpointing: dict[str, Any] = {"gradient_checkpointing": True} if settings.gradient_checkpointing else {}
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation,
        learning_rate=settings.rate,
        max_grad_norm=settings.max_gradient_norm,
        bf16=settings.dtype == "bfloat16",
        seed=settings.seed,
        data_seed=settings.seed,
        logging_steps=1,
        save_strategy="no",
        eval_strategy="no",
        save_total_limit=1,
        report_to=list(settings.report_to) or "none",
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        dataloader_drop_last=True,
        ddp_broadcast_buffers=False,
        ddp_find_unused_parameters=False,
        logging_nan_inf_filter=False,
        **checkpointing,
        ddp_timeout=24 * 3600,  # the first process may calibrate while the others wait
    )


def _stacked(rows: list[Tensor]) -> dict[str, Tensor]:
    return {"input_ids": torch.stack(rows)}
