"""The cascade and the resolution: against a slow reference, and the rules one by one."""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import models
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantplan.errors import QuantplanError
from quantplan.headers import read_checkpoint
from quantplan.plan.load import load_plan
from quantplan.plan.resolve import Resolution, resolve


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("shapes")
    return {name: read_checkpoint(models.write(name, folder)) for name in models.MODELS}


def resolved(plan: dict[str, Any], checkpoint: Any) -> Resolution:
    return resolve(load_plan({"engines": ["transformers"], **plan}), checkpoint)


def codes(plan: dict[str, Any], checkpoint: Any) -> list[str]:
    return [p.code for p in resolved(plan, checkpoint).problems]


def test_a_later_override_wins_field_by_field(shapes: dict[str, Any]) -> None:
    plan = {
        "default": {"wq": "int8", "group_size": 32},
        "overrides": [
            {"pattern": "*.self_attn.*", "wq": {"symmetric": False}},
            {"pattern": "*.q_proj", "group_size": 64},
        ],
    }
    r = resolved(plan, shapes["llama"])
    q, k = (r.assignments[f"model.layers.0.self_attn.{n}_proj"].wq for n in "qk")
    assert (q.name, q.group, q.symmetric) == ("int8", 64, False)  # type: ignore[union-attr]
    assert (k.name, k.group, k.symmetric) == ("int8", 32, False)  # type: ignore[union-attr]


def test_another_scheme_drops_the_options_of_the_one_it_replaces(shapes: dict[str, Any]) -> None:
    plan = {
        "default": {"wq": {"scheme": "int4", "symmetric": False}, "group_size": 64},
        "overrides": [{"pattern": "*.mlp.*", "wq": "int8"}, {"pattern": "*.self_attn.*", "wq": "int4"}],
    }
    r = resolved(plan, shapes["llama"])
    up, q = r.assignments["model.layers.0.mlp.up_proj"].wq, r.assignments["model.layers.0.self_attn.q_proj"].wq
    assert (up.strategy, up.symmetric) == ("channel", True)  # type: ignore[union-attr]
    assert (q.group, q.symmetric) == (64, False), "naming the same scheme again keeps its options"  # type: ignore[union-attr]


def test_every_field_knows_the_line_that_set_it(shapes: dict[str, Any]) -> None:
    plan = {
        "default": {"wq": "int4"},
        "overrides": [{"pattern": "*.q_proj", "group_size": 64, "algorithm": {"name": "rtn", "search": "mse"}}],
    }
    origin = resolved(plan, shapes["llama"]).assignments["model.layers.1.self_attn.q_proj"].origin
    assert origin["wq.scheme"].path == ("default", "wq")
    assert origin["wq.group_size"].path == ("overrides", 0, "group_size")
    assert origin["algorithm.search"].path == ("overrides", 0, "algorithm", "search")
    assert origin["wq.scale_dtype"].label == "dtype of the source"


def test_built_in_rules_keep_what_engines_keep(shapes: dict[str, Any]) -> None:
    kept = {
        a.name: a.module.keep.name
        for a in resolved({"default": {"wq": "int8"}}, shapes["moe"]).assignments.values()
        if a.wq is None and a.module.keep
    }
    assert kept["model.embed_tokens"] == "embeddings"
    assert kept["lm_head"] == "output heads"
    assert kept["model.layers.0.mlp.gate"] == "routers"
    assert len(kept) == 4


@pytest.mark.parametrize("override", [{"pattern": "lm_head", "wq": "int8"}, {"pattern": "*head", "keep": False}])
def test_a_built_in_rule_gives_way_to_a_literal_name_or_keep_false(shapes: dict[str, Any], override: dict[str, Any]) -> None:
    r = resolved({"default": {"wq": "int8"}, "overrides": [override]}, shapes["untied"])
    assert r.assignments["lm_head"].wq is not None
    assert r.require()


def test_a_broad_glob_does_not_reach_a_router(shapes: dict[str, Any]) -> None:
    r = resolved({"default": {"wq": "int8"}, "overrides": [{"pattern": "model.layers.*.mlp.*", "wq": "int4"}]}, shapes["moe"])
    assert r.assignments["model.layers.0.mlp.gate"].wq is None
    assert r.assignments["model.layers.0.mlp.experts.0.up_proj"].wq.name == "int4"  # type: ignore[union-attr]


def test_fused_experts_are_one_module_and_many_matrices(shapes: dict[str, Any]) -> None:
    r = resolved({"default": {"wq": "int4"}}, shapes["fused"]).require()
    module = r.assignments["model.layers.0.mlp.experts.gate_up_proj"]
    assert [(m.name.partition("experts.")[2], m.index, m.first, m.rows, m.columns) for m in module.matrices[:3]] == [
        ("0.gate_proj", 0, 0, 256, 128),
        ("0.up_proj", 0, 256, 256, 128),
        ("1.gate_proj", 1, 0, 256, 128),
    ]


def test_optional_silences_no_match_and_shadowing(shapes: dict[str, Any]) -> None:
    plan = {
        "default": {"wq": "int8"},
        "overrides": [
            {"pattern": "no.such.*", "wq": "fp8", "optional": True},
            {"pattern": "*.q_proj", "wq": "fp8", "optional": True},
            {"pattern": "*.q_proj", "wq": "int4"},
        ],
    }
    assert codes(plan, shapes["llama"]) == []


def test_expect_counts_modules(shapes: dict[str, Any]) -> None:
    for expect, found in ((2, []), (3, ["QP111"])):
        plan = {"default": {"wq": "int8"}, "overrides": [{"pattern": "*.down_proj", "wq": "int4", "expect": expect}]}
        assert codes(plan, shapes["llama"]) == found


def test_a_redundant_override_is_not_shadowed(shapes: dict[str, Any]) -> None:
    plan = {
        "default": {"wq": "int8"},
        "overrides": [{"pattern": "*.q_proj", "wq": "int8"}, {"pattern": "model.embed*", "keep": True}],
    }
    assert codes(plan, shapes["llama"]) == []


def test_require_raises_every_problem(shapes: dict[str, Any]) -> None:
    plan = {"default": {"wq": "int4", "group_size": 128}, "overrides": [{"pattern": "nothing", "wq": "int8"}]}
    with pytest.raises(QuantplanError) as caught:
        resolved(plan, shapes["llama"]).require()
    assert sorted(p.code for p in caught.value.problems) == ["QP110", "QP114"]
    assert caught.value.exit_status == 3


def test_json_and_yaml_are_the_same_plan(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(
        "defaults: {wq: int4, group_size: 64}\noverrides:\n- pattern: '*.q_proj'\n  wq: {scheme: fp8}\n"
    )
    overrides = '[{"wq": {"scheme": "fp8"}, "pattern": ["*.q_proj"]}]'
    (tmp_path / "b.json").write_text(f'{{"version": 1, "default": {{"group_size": 64, "wq": "int4"}}, "overrides": {overrides}}}')
    assert load_plan(tmp_path / "a.yaml").canonical() == load_plan(tmp_path / "b.json").canonical()


SCHEMES = st.sampled_from(["int8", "int4", "fp8", None])
GLOBS = st.sampled_from(["*", "*.self_attn.*", "*.q_proj", "model.layers.1.*", "*.mlp.*", "*down*", "model.layers.0.mlp.up_proj"])
RULES = st.fixed_dictionaries({}, optional={"wq": SCHEMES, "group_size": st.sampled_from([32, 64, 96]), "keep": st.just(True)})


def slow_cascade(name: str, rules: list[dict[str, Any]]) -> tuple[str | None, int | None]:
    """(scheme, group size set) of a module, said as plainly as possible."""
    scheme: str | None = None
    group: int | None = None
    for rule in rules:
        if not any(fnmatchcase(name, p) for p in rule["pattern"]):
            continue
        if rule.get("keep"):
            scheme, group = None, (group if scheme is None else None)
        if "wq" in rule and not rule.get("keep"):
            if rule["wq"] != scheme:
                group = None
            scheme = rule["wq"]
        group = rule.get("group_size", group)
    return scheme, group


@settings(max_examples=200, deadline=None)
@given(default=RULES.filter(lambda r: "keep" not in r), overrides=st.lists(st.tuples(GLOBS, RULES), max_size=5))
def test_the_cascade_equals_a_slow_reference(
    shapes: dict[str, Any], default: dict[str, Any], overrides: list[tuple[str, dict[str, Any]]]
) -> None:
    listed = [
        {"pattern": [p], "optional": True, **{k: v for k, v in r.items() if not (r.get("keep") and k == "wq")}}
        for p, r in overrides
    ]
    r = resolved({"default": default, "overrides": listed}, shapes["llama"])
    rules = [{"pattern": ["*"], **default}, *listed]
    for a in r.assignments.values():
        if a.module.keep is not None:
            assert a.wq is None
            continue
        scheme, group = slow_cascade(a.name, rules)
        assert (a.wq.name if a.wq else None) == scheme, a.name
        if a.wq is not None and group is not None:
            assert a.wq.group == group, a.name
