"""The JSON Schema and `validate` agree on what a plan is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from quantplan.errors import QuantplanError
from quantplan.plan.json_schema import plan_schema
from quantplan.plan.load import load_plan
from quantplan.plan.source import read_source

CHECKER = jsonschema.Draft202012Validator(plan_schema())
PLANS = sorted(p for p in (Path(__file__).parent / "plans").iterdir() if p.suffix in (".json", ".yaml"))
# what no JSON Schema can see: regular expressions, and settings that contradict each other
BEYOND = {"bad_pattern", "contradictions", "wrong_values", "calibration_contradictions", "calibration_extension"}


def test_the_schema_is_one() -> None:
    jsonschema.Draft202012Validator.check_schema(plan_schema())


@pytest.mark.parametrize("plan", PLANS, ids=lambda p: p.name)
def test_it_accepts_what_validate_accepts(plan: Path) -> None:
    try:
        data, _ = read_source(plan)
    except QuantplanError:
        return  # not JSON or YAML at all: a schema never sees it
    try:
        load_plan(plan)
        valid = True
    except QuantplanError:
        valid = False
    if plan.name.split(".")[0] not in BEYOND:
        assert CHECKER.is_valid(data) == valid


@pytest.mark.parametrize(
    ("plan", "valid"),
    [
        ({}, True),
        ({"default": {"wq": {"scheme": "int4", "group_size": 64, "symmetric": False}}}, True),
        ({"default": {"wq": {"scheme": "int4", "format": "e4m3"}}}, False),
        ({"default": {"wq": {"symmetric": True}}}, False),
        ({"overrides": [{"pattern": "*", "wq": {"symmetric": True}}]}, True),
        ({"default": {"wq": "int4"}, "output": {"shard_size": "5 GiB"}}, True),
        ({"default": {"wq": "int4"}, "output": {"shard_size": "5 parsecs"}}, False),
        ({"default": {"wq": "int4", "group_size": True}}, False),
        ({"version": 1, "default": {"aq": {"scheme": "fp8", "dynamic": False}}}, True),
        ({"version": 1, "default": {"wq": {"scheme": "fp8", "dynamic": False}}}, False),
        ({"version": 1, "default": {"aq": {"scheme": "fp8", "dynamic": False, "observer": "mse"}}}, True),
        ({"version": 1, "default": {"aq": {"scheme": "fp8", "observer": {"name": "mse", "grid": 50}}}}, True),
        ({"version": 1, "default": {"aq": {"scheme": "fp8", "observer": {"grid": 50}}}}, False),
        ({"version": 1, "default": {"aq": {"scheme": "fp8", "observer": "least"}}}, False),
    ],
)
def test_by_hand(plan: dict[str, Any], valid: bool) -> None:
    try:
        load_plan(plan)
        loads = True
    except QuantplanError:
        loads = False
    assert loads == valid
    if plan != {"default": {"wq": {"symmetric": True}}}:  # a default without a scheme: beyond the schema
        assert CHECKER.is_valid(plan) == valid


def test_the_committed_schema_is_current() -> None:
    committed = Path(__file__).parent.parent / "configs/plan.schema.json"
    assert json.loads(committed.read_text()) == plan_schema()
