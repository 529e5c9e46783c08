"""Golden pairs: a plan and the exact diagnostics for it. `NAME.MODEL.yaml` is checked against MODEL of tests/models.py.

After a change that is meant: QUANTPLAN_UPDATE_GOLDEN=1 pytest tests/test_golden_plans.py, and read the difference.
"""

from __future__ import annotations

import os
from pathlib import Path

import models
import pytest

from quantplan.cli.plans import problems_of
from quantplan.errors import code_pages, render

PLANS = sorted(p for p in (Path(__file__).parent / "plans").iterdir() if p.suffix in (".json", ".yaml"))


@pytest.mark.parametrize("plan", PLANS, ids=lambda p: p.name)
def test_diagnostics_are_as_committed(plan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = plan.name.split(".")[1]
    shapes = None if model == "none" else str(models.write(model, tmp_path).relative_to(tmp_path))
    monkeypatch.chdir(tmp_path)
    Path(plan.name).write_bytes(plan.read_bytes())
    shown = "\n".join(render(p) for p in problems_of(Path(plan.name), shapes, None)) or "no problem"
    golden = plan.with_name(f"{plan.name}.out")
    if os.environ.get("QUANTPLAN_UPDATE_GOLDEN"):
        golden.write_text(shown + "\n")
    assert shown + "\n" == golden.read_text()


def test_every_plan_code_has_a_golden_plan() -> None:
    seen = "".join(p.read_text() for p in (Path(__file__).parent / "plans").glob("*.out"))
    elsewhere = {"QP100", "QP130", "QP131"}  # no plan to show: a missing file, evaluation data, two models
    missing = [c for c in code_pages() if c.startswith("QP1") and c not in elsewhere and c not in seen]
    assert missing == []
