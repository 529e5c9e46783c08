"""The plans the engine tests write with: those of `configs/` where there is one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from quantplan.headers import read_checkpoint
from quantplan.plan.load import load_plan
from quantplan.plan.resolve import resolve

Plan = Path | Mapping[str, Any]

CONFIGS = Path(__file__).resolve().parent.parent.parent / "configs"
INT4_CHANNEL = {"scheme": "int4", "granularity": "channel"}
INT4_ASYMMETRIC = {"scheme": "int4", "symmetric": False}
INT8_TENSOR = {"scheme": "int8", "granularity": "tensor"}
INT8_ASYMMETRIC = {"scheme": "int8", "symmetric": False}
INT8_STATIC = {"scheme": "int8", "dynamic": False}
FP8_STATIC = {"scheme": "fp8", "dynamic": False}
NVFP4_STATIC = {"scheme": "nvfp4", "dynamic": False}
FP8_TENSOR = {"scheme": "fp8", "granularity": "tensor"}
FP8_BLOCK = {"scheme": "fp8", "granularity": "block"}
BLOCK_ACTIVATIONS = {"scheme": "fp8", "group_size": 128}


def plan(wq: Any, aq: Any = None, **rules: Any) -> Plan:
    """A plan that gives every layer the same."""
    return {"version": 1, "default": {"wq": wq, "aq": aq, **rules}}


def only(wq: Any, aq: Any, *patterns: str) -> Plan:
    """A plan for the layers that match."""
    return {"version": 1, "overrides": [{"pattern": list(patterns), "wq": wq, "aq": aq}]}


PLANS: dict[str, Plan] = {
    "int8": CONFIGS / "int8.yaml",
    "w8a8": CONFIGS / "w8a8.yaml",
    "int4": CONFIGS / "int4.yaml",
    "int4 asymmetric": plan({"scheme": "int4", "symmetric": False}, group_size=64),
    "int6": plan("int6"),
    "int3": plan("int3"),
    "int2": plan("int2"),
    "w4a8": plan("int4", "int8", group_size=64),
    "fp8": CONFIGS / "fp8.yaml",
    "fp8 weights": plan("fp8"),
    # 576 columns have no groups of 128, so the activations of down_proj (1536) alone are quantized
    "fp8 blocks": {
        **plan(FP8_BLOCK),
        "overrides": [{"pattern": "*.down_proj", "aq": BLOCK_ACTIVATIONS}],
    },
    "nvfp4": CONFIGS / "nvfp4.yaml",
    "mxfp4": CONFIGS / "mxfp4.yaml",
    "mxfp6": plan("mxfp6"),
    "mxfp8": plan("mxfp8"),
    "mixed": CONFIGS / "mixed.yaml",
}


def refusal(engine: str, model: Path, plan: Plan) -> str | None:
    """Why `quantplan.engines` says the engine cannot run a plan's output; None when it can."""
    written = yaml.safe_load(plan.read_text()) if isinstance(plan, Path) else plan
    resolution = resolve(load_plan({**written, "engines": [engine]}), read_checkpoint(model))
    problems = [p for p in resolution.problems if p.severity == "error"]
    assert {p.code for p in problems} <= {"QP116"}, problems
    return problems[0].message if problems else None
