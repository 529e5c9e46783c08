"""`compare`: a reference and models made from it, each measured in a fresh process, one after the other."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from quantplan.comparison.measure import Settings
from quantplan.comparison.weights import WeightFigures, weight_figures
from quantplan.errors import Place, Problem, QuantplanError, fail, printable
from quantplan.evaluation.metrics import Evaluation, Source, evaluate
from quantplan.evaluation.opened import local
from quantplan.headers import Checkpoint

OnStep = Callable[[str, str, int, int], None]
ACCURACY = ("perplexity", "kl", "top1", "top5")


@dataclass(frozen=True)
class ModelFigures:
    """Everything measured of one model. `cost` as `Cost` of `measure`, plain; `accuracy` is None without data."""

    name: str
    path: str
    weights: WeightFigures
    cost: dict[str, Any]
    accuracy: Evaluation | None = None

    def margin(self, figure: str) -> float | None:
        """Half the 95 % confidence interval of one of ACCURACY."""
        return None if self.accuracy is None else self.accuracy.margin(figure)

    def as_dict(self) -> dict[str, Any]:
        """Plain data; None for what was not measured, and every number finite. Errors are standard errors over windows."""
        measured = {k: v for k, v in self.cost.items() if k != "machine"}
        errors = [name for figure in ACCURACY for name in (figure, f"{figure}_error")]
        accuracy = {name: getattr(self.accuracy, name, None) for name in errors}
        return {"name": self.name, "path": self.path, **asdict(self.weights), **measured, **accuracy}


@dataclass(frozen=True)
class Comparison:
    """Models side by side, the reference first. `problems`: what could not be measured, each with the model's name."""

    reference: str
    data: str | None
    windows: int | None
    machine: dict[str, Any]
    models: tuple[ModelFigures, ...]
    problems: tuple[Problem, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for `--json` and report.json."""
        return {
            "reference": self.reference,
            "data": self.data,
            "windows": self.windows,
            "machine": self.machine,
            "models": [m.as_dict() for m in self.models],
            "problems": [p.as_dict() for p in self.problems],
        }


def compare(
    reference: Source,
    models: Iterable[Source],
    data: Source | None = None,
    windows: int | None = None,
    length: int = 1024,
    settings: Settings | None = None,
    on_step: OnStep | None = None,
) -> Comparison:
    """Measures `models` beside `reference` (directories or Hub ids): size, memory and speed, each in a process of its own; with
    `data`, a text as `evaluate` reads it, also accuracy.

    A model that cannot be measured becomes a problem, and the others are measured. `on_step(phase, name, done, total)` is called
    before each piece of work of `comparing weights` and `measuring`, and after each window of `evaluating`.

    Raises QuantplanError: a model or data that is not there (QP1xx to QP4xx), before anything is measured; a reference that
    cannot be measured (QP240, or its own code).
    """
    tell: OnStep = on_step or (lambda *step: None)
    settings = settings or Settings()
    paths = [str(reference), *map(str, models)]
    checkpoints = [local(path) for path in paths]
    if data is not None and not Path(data).is_file():
        raise fail("QP130", "no such file", "give a text to measure on", file=str(data))
    names = _names(paths)
    weights, costs, problems = {}, {}, []
    for i, checkpoint in enumerate(checkpoints):
        tell("comparing weights", names[i], i, len(names))
        weights[i] = weight_figures(checkpoint, checkpoints[0])
    for i, checkpoint in enumerate(checkpoints):
        tell("measuring", names[i], i, len(names))
        try:
            costs[i] = _cost(checkpoint, settings)
        except QuantplanError as error:
            if i == 0:
                raise
            problems += _named(error, paths[i])
    accuracies: dict[int, Evaluation] = {}
    for count, i in enumerate(costs):
        if data is None:
            break

        def on_window(name: str, done: int, total: int, i: int = i, count: int = count) -> None:
            tell("evaluating", names[i], count * total + done, len(costs) * total)

        try:
            place = checkpoints[i].require_path()
            [accuracies[i]] = evaluate(
                place, data, checkpoints[0].require_path(), windows, length, device=settings.device, on_step=on_window
            )
        except QuantplanError as error:
            problems += _named(error, paths[i])
    found = [ModelFigures(names[i], paths[i], weights[i], costs[i], accuracies.get(i)) for i in costs]
    measured = next((a.windows for a in accuracies.values()), None)
    where = None if data is None else str(data)
    return Comparison(names[0], where, measured, costs[0]["machine"], tuple(found), tuple(problems))


def _names(paths: list[str]) -> list[str]:
    """What each model is called: the last part of its path, or all of it where that is another's too."""
    short = [Path(os.path.abspath(path)).name if Path(path).exists() else path for path in paths]
    return [name if short.count(name) == 1 else path for name, path in zip(short, paths, strict=True)]


def _named(error: QuantplanError, path: str) -> list[Problem]:
    """The problems, each with the model's path."""
    return [p if path in p.place.file else replace(p, place=replace(p.place, file=path)) for p in error.problems]


def _cost(checkpoint: Checkpoint, settings: Settings) -> dict[str, Any]:
    """The figures that a fresh process measures. Raises what it found; QP240 where it ended without an answer."""
    request = json.dumps({"model": str(checkpoint.require_path()), "settings": asdict(settings)})
    threads = {"OMP_NUM_THREADS": str(settings.threads)} if settings.threads else {}
    environment = {**os.environ, "TQDM_DISABLE": "1", **threads}
    command = [sys.executable, "-m", "quantplan.comparison.measure", request]
    done = subprocess.run(command, capture_output=True, env=environment, check=False)
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().splitlines()
        reason = _signal(-done.returncode) if done.returncode < 0 else printable(said[-1] if said else "no reason was given")
        advice = "is there memory for the whole model, and does transformers run it?"
        raise fail("QP240", f"the process that measured it ended: {reason}", advice, file=checkpoint.source)
    answer: dict[str, Any] = json.loads(done.stdout)
    if "problems" in answer:
        raise QuantplanError(
            Problem(p["code"], p["message"], p.get("help", ""), place=Place(**p.get("place", {}))) for p in answer["problems"]
        )
    return answer


def _signal(number: int) -> str:
    try:
        return f"killed by {signal.Signals(number).name}" + (", out of memory for one" if number == signal.SIGKILL else "")
    except ValueError:
        return f"killed by signal {number}"
