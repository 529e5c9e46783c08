"""Tasks of lm-eval (EleutherAI's evaluation harness): questions with right answers, asked of a model."""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from quantplan.errors import QuantplanError, did_you_mean, fail, printable
from quantplan.evaluation.interval import LARGE, margin
from quantplan.evaluation.metrics import Source
from quantplan.evaluation.opened import local, open_model

RESAMPLES = 1000  # of the bootstrap, for figures whose standard error has no formula
NOT_FIGURES = {"alias", "name", "sample_len", "samples"}


@dataclass(frozen=True)
class TaskFigure:
    """One figure of one task, as lm-eval gives it: `metric` with the filter in brackets where there is one, `error` its standard
    error over documents, None where it has none. `documents` is None for a group of tasks."""

    task: str
    metric: str
    value: float
    error: float | None
    documents: int | None
    higher_is_better: bool | None

    @property
    def margin(self) -> float | None:
        """Half the width of the 95 % confidence interval."""
        return margin(self.error, self.documents or LARGE)

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for `--json`."""
        m = self.margin
        return {**asdict(self), "interval": None if m is None else [self.value - m, self.value + m]}


def run_tasks(
    models: Iterable[Source],
    tasks: Sequence[str],
    include_path: Iterable[Source] = (),
    limit: int | None = None,
    batch_size: int = 1,
    device: str | None = None,
    on_step: Callable[[str, int, int], None] | None = None,
    bars: bool = False,
) -> list[tuple[TaskFigure, ...]]:
    """Every figure of `tasks` for each model (a directory or Hub id), opened as `evaluate` opens it.

    A task is a name that lm-eval knows, or that a YAML file in a folder of `include_path` gives; or the path of such a file.
    `limit`: the first documents of each task alone. `on_step(model, done, total)` is called before each model; `bars`: lm-eval's
    own, on standard error. Task files may name Python functions, which then run.

    Raises QuantplanError: lm-eval is not installed (QP405), a task that is not known (QP107), or whose file or data cannot be
    read (QP130), a model that cannot be opened (QP2xx to QP4xx). Tasks are loaded before models.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise fail("QP405", f"tasks take the package lm-eval ({error})", "pip install quantplan[tasks]") from None
    opened = [local(model) for model in models]
    folders, names = [Path(folder) for folder in include_path], []
    for folder in folders:
        if not folder.is_dir():
            raise fail("QP130", "no such folder of tasks", file=str(folder))
    for task in tasks:
        path = Path(task)
        names.append(_name_in(path) if path.suffix in (".yaml", ".yml") else task)
        folders += [path.parent] if path.suffix in (".yaml", ".yml") else []
    with _quietly():
        builtin = any(Path(task).suffix not in (".yaml", ".yml") for task in tasks)
        known = TaskManager(include_path=[str(f.resolve()) for f in dict.fromkeys(folders)], include_defaults=builtin)
    for name in names:
        if not known.match_tasks([name]):
            raise fail("QP107", f"no task '{printable(name)}' is known", did_you_mean(name, known.all_tasks))
        with _named(name), _quietly():
            known.load([name])
    found = []
    for i, checkpoint in enumerate(opened):
        if on_step is not None:
            on_step(checkpoint.source, i, len(opened))
        model = open_model(checkpoint, device=device or _device())
        with _named(", ".join(names)):
            found.append(tuple(_figures(_results(model, checkpoint.require_path(), names, known, limit, batch_size, bars))))
        del model  # before the next is opened
    return found


def _results(
    model: Any, folder: Path, names: list[str], known: Any, limit: int | None, batch_size: int, bars: bool
) -> Mapping[str, Any]:
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    from quantplan.calibration.tokens import open_tokenizer

    tokenizer: Any = open_tokenizer(folder)
    with _quietly(bars):
        results: Mapping[str, Any] = simple_evaluate(
            HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
            tasks=names,
            task_manager=known,
            limit=limit,
            log_samples=False,
            bootstrap_iters=RESAMPLES,
        )
    return results


def _figures(results: Mapping[str, Any]) -> Iterator[TaskFigure]:
    """The numbers among lm-eval's results: keys are `metric,filter`, and `metric_stderr,filter` beside them."""
    for task, values in results["results"].items():
        for key, value in values.items():
            metric, _, chosen = key.partition(",")
            if key in NOT_FIGURES or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = values.get(f"{metric}_stderr,{chosen}")
            better = results.get("higher_is_better", {}).get(task, {}).get(metric)
            documents = results.get("n-samples", {}).get(task, {}).get("effective")
            shown = metric if chosen in ("", "none") else f"{metric} ({chosen})"
            yield TaskFigure(
                task, shown, float(value), float(error) if isinstance(error, int | float) else None, documents, better
            )


def _name_in(path: Path) -> str:
    """The name that a task file gives its task or group. Raises QP130."""
    import yaml

    class Loader(yaml.SafeLoader):
        """Reads what a task is called; tags such as `!function` are lm-eval's to follow."""

    Loader.add_multi_constructor("!", lambda loader, tag, node: None)
    try:
        config = yaml.load(path.read_text("utf-8"), Loader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = (error.strerror or "") if isinstance(error, OSError) else str(error).splitlines()[0]
        raise fail("QP130", f"cannot be read: {reason}", "give a task file of lm-eval", file=str(path)) from None
    names = [config.get(key) for key in ("task", "group")] if isinstance(config, dict) else []
    name = next((n for n in names if isinstance(n, str)), None)
    if name is None:
        raise fail("QP130", "names no task", "give a task file of lm-eval, with a key 'task'", file=str(path))
    return name


@contextlib.contextmanager
def _named(task: str) -> Iterator[None]:
    """Whatever goes wrong in a task, data that cannot be fetched first of all, as a problem that names it."""
    try:
        yield
    except QuantplanError:
        raise
    except Exception as error:  # tasks are others' code and data
        reason = printable(f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}")
        advice = "is its data on this machine? paths in a task file are relative to where the command runs"
        raise fail("QP130", f"task '{printable(task)}' cannot be run: {reason}", advice) from error


@contextlib.contextmanager
def _quietly(bars: bool = False) -> Iterator[None]:
    """Without lm-eval's warnings, and without its bars unless they are wanted."""
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.nullcontext() if bars else contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(before)


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
