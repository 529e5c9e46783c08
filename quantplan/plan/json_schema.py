"""The plan's JSON Schema (draft 2020-12), made from the models and the registries, for editors and CI."""

from __future__ import annotations

from typing import Any

from quantplan.algorithm import ALGORITHMS
from quantplan.engines import ENGINES
from quantplan.format import FORMATS
from quantplan.observer import OBSERVERS
from quantplan.plan.schema import Plan
from quantplan.registry import Registry
from quantplan.scheme import NOT_IN_PLANS, SCHEMES, SchemeConfig
from quantplan.transform import TRANSFORMS

ID = "https://quantplan.dev/schemas/plan-1.json"
NULL = {"type": "null"}


def plan_schema() -> dict[str, Any]:
    """The schema of a plan. It accepts what `validate` accepts as far as one can tell without a model."""
    schema = Plan.model_json_schema(by_alias=True)
    rule, override = schema["$defs"]["Rule"]["properties"], schema["$defs"]["Override"]["properties"]
    schema["$defs"] |= {
        "Weights": _choice(SCHEMES, "scheme"),
        "Activations": _choice(SCHEMES, "scheme", {"dynamic": _dynamic(), "observer": {"$ref": "#/$defs/Observer"}}),
        "Observer": _choice(OBSERVERS, "name", named=True),
        "Algorithm": _choice(ALGORITHMS, "name"),
    }
    for properties in (rule, override):
        for key, name in (("wq", "Weights"), ("aq", "Activations"), ("algorithm", "Algorithm")):
            properties[key] = {"$ref": f"#/$defs/{name}", "description": properties[key]["description"]}
    patterns = [
        {"type": "string", "minLength": 1},
        {"type": "array", "items": {"type": "string", "minLength": 1}, "minItems": 1},
    ]
    override["pattern"] = {"anyOf": patterns, "description": override["pattern"]["description"]}
    output = schema["$defs"]["Output"]["properties"]
    output["format"] |= {"enum": FORMATS.names()}
    size = r"^\s*[0-9]+(\.[0-9]+)?\s*([KkMmGgTt][Ii]?[Bb])?\s*$"
    output["shard_size"] = {
        "anyOf": [{"type": "integer", "minimum": 1}, {"type": "string", "pattern": size}],
        "default": "5GB",
        "description": output["shard_size"]["description"],
    }
    top = schema["properties"]
    top["engines"] = {
        "anyOf": [{"type": "array", "items": {"enum": sorted(ENGINES)}}, NULL],
        "description": top["engines"]["description"],
    }
    calibration = {"type": "string", "minLength": 1, "description": "the source alone"}
    top["calibration"]["anyOf"].insert(0, calibration)
    listed = {"anyOf": [{"enum": TRANSFORMS.names()}, *(_object(member, "name", {}) for member in TRANSFORMS)]}
    top["transforms"] = {"type": "array", "items": listed, "default": [], "description": top["transforms"]["description"]}
    cache = schema["$defs"]["KeyValueCache"]["properties"]
    cache["observer"] = {"anyOf": [{"$ref": "#/$defs/Observer"}, NULL], "description": cache["observer"]["description"]}
    top["kv_cache"]["anyOf"].insert(0, {"enum": cache["scheme"]["enum"], "description": "the scheme alone"})
    top["defaults"] = {**top["default"], "description": "another spelling of `default`"}
    schema["not"] = {"required": ["default", "defaults"]}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "$id": ID, **schema}


def _dynamic() -> dict[str, Any]:
    return dict(SchemeConfig.model_json_schema()["properties"]["dynamic"])


def _choice(registry: Registry[Any], key: str, extra: dict[str, Any] | None = None, named: bool = False) -> dict[str, Any]:
    """A name, an object with that name's options, an object with options only (they go to the name in effect), or null.
    `named`: there is nothing in effect that a part of it could go to."""
    objects = [_object(member, key, extra or {}) for member in registry]
    if named:
        return {"anyOf": [{"enum": registry.names()}, *objects]}
    free = {
        "type": "object",
        "minProperties": 1,
        "not": {"required": [key]},
        "properties": _all_options(registry, extra or {}),
    }
    return {"anyOf": [{"enum": registry.names()}, *objects, {**free, "additionalProperties": False}, NULL]}


def _object(member: Any, key: str, extra: dict[str, Any]) -> dict[str, Any]:
    made = member.model_json_schema()
    properties = {n: p for n, p in made.get("properties", {}).items() if n not in NOT_IN_PLANS}
    return {
        "type": "object",
        "title": member.name,
        "description": made.get("description", ""),
        "properties": {key: {"const": member.name}, **properties, **extra},
        "required": [key],
        "additionalProperties": False,
    }


def _all_options(registry: Registry[Any], extra: dict[str, Any]) -> dict[str, Any]:
    known = {name: True for member in registry for name in member.model_fields if name not in NOT_IN_PLANS}
    return known | dict.fromkeys(extra, True)
