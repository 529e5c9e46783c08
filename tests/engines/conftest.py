"""What the engine tests share: where the model and the engines are, and outputs written once a session."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from engine_plans import Plan

from quantplan.engine.apply import Report, apply

Written = Callable[[Path, str, Plan], Report]


def _setting(name: str, what: str) -> Path:
    value = os.environ.get(name)
    if not value:
        pytest.skip(f"{name} is not set: {what} (scripts/test sets it)")
    return Path(value)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The checkpoint of SmolLM2-135M-Instruct that scripts/smollm2.py makes."""
    return _setting("QUANTPLAN_SMOLLM2", "the directory of SmolLM2")


@pytest.fixture(scope="session")
def vllm_python() -> Path:
    """The Python of an environment with vLLM's CPU build."""
    return _setting("QUANTPLAN_VLLM_PYTHON", "the Python of scripts/vllm-environment")


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    """Applies a plan to a model, once a session: the report, whose `out` nobody may change."""
    folder = tmp_path_factory.mktemp("outputs")
    reports: dict[tuple[Path, str], Report] = {}

    def apply_once(model: Path, name: str, plan: Plan) -> Report:
        if (model, name) not in reports:
            reports[model, name] = apply(model, plan, folder / f"{model.name} {name}")
        return reports[model, name]

    return apply_once
