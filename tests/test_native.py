"""The native format: what is promised is stored, what is stored is decoded, what is written opens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from test_nn import VARIANTS, named, scheme

from quantplan import QuantLinear, QuantplanError, load_plan, resolve
from quantplan.checkpoint.layout import output_layout
from quantplan.checkpoint.reader import TORCH_DTYPES
from quantplan.errors import errors_in
from quantplan.format import FORMATS
from quantplan.headers import read_shapes
from quantplan.hf.plugin import VERSION, QuantplanConfig
from quantplan.models.modules import Matrix
from quantplan.tensor import QuantizedTensor

NATIVE = FORMATS.get("quantplan")()


def quantized(options: dict[str, Any], rows: int = 40, columns: int = 192) -> QuantizedTensor:
    torch.manual_seed(0)
    return scheme(options).quantizer("m").quantize(torch.randn(rows, columns))


@pytest.mark.parametrize("options", VARIANTS, ids=named)
def test_encode_keeps_what_layout_promises_and_decode_undoes_it(options: dict[str, Any]) -> None:
    matrix, before = Matrix("a.m", "", 40, 192), quantized(options)
    layout, stored = NATIVE.layout(matrix, before.scheme, None), NATIVE.encode(matrix, before, None)
    assert {n: (getattr(torch, TORCH_DTYPES[d]), s) for n, (d, s) in layout.items()} == {
        n: (t.dtype, tuple(t.shape)) for n, t in stored.items()
    }
    assert all(t.is_contiguous() for t in stored.values())
    after = NATIVE.decode(matrix, before.scheme, None, stored.__getitem__)
    assert torch.equal(after.codes, before.codes) and after.scheme == before.scheme
    assert after.params.keys() == before.params.keys()
    assert all(torch.equal(p.view(torch.uint8), before.params[n].view(torch.uint8)) for n, p in after.params.items())


@pytest.mark.parametrize("columns", [1, 7, 33, 100])
@pytest.mark.parametrize("bits", range(2, 9))
def test_any_number_of_columns(bits: int, columns: int) -> None:
    options = {"scheme": f"int{bits}", "granularity": "channel", "symmetric": False}
    matrix, before = Matrix("m", "", 5, columns), quantized(options, 5, columns)
    stored = NATIVE.encode(matrix, before, None)
    assert stored["m.weight_codes"].shape == NATIVE.layout(matrix, before.scheme, None)["m.weight_codes"][1]
    assert torch.equal(NATIVE.decode(matrix, before.scheme, None, stored.__getitem__).codes, before.codes)


def test_a_module_stores_what_the_format_stores() -> None:
    before = quantized({"scheme": "nvfp4"})
    stored = NATIVE.encode(Matrix("m", "", 40, 192), before, None)
    assert {f"m.{n}" for n in QuantLinear.from_quantized(before).state_dict()} == stored.keys()


def shapes(name: str, tmp_path: Path) -> Any:
    return read_shapes(models.write(name, tmp_path))


def test_config_names_every_matrix_with_its_schemes(tmp_path: Path) -> None:
    plan = {
        "default": {"wq": {"scheme": "int4", "rounding": "stochastic", "seed": 3}},
        "overrides": [{"pattern": "*.o_proj", "wq": "int8", "aq": "int8"}, {"pattern": "*.layers.1.mlp.*", "keep": True}],
        "output": {"format": "quantplan"},
    }
    resolution = resolve(load_plan(plan), shapes("llama", tmp_path)).require()
    config = json.loads(json.dumps(NATIVE.config(list(resolution.assignments.values()))))
    assert (config["quant_method"], config["version"], len(config["groups"])) == ("quantplan", VERSION, 2)
    listed = {n for group in config["groups"] for n in group["modules"]}
    assert listed == {a.name for a in resolution.quantized} and not any("layers.1.mlp" in n for n in listed)
    assert config["groups"][0]["wq"] == {
        **{"scheme": "int4", "granularity": "group", "group_size": 32, "symmetric": True},
        "scale_dtype": "bfloat16",
    }
    read = QuantplanConfig(**config).treatments()
    for a in resolution.quantized:
        wq, aq = read[a.name]
        assert a.wq is not None and wq.param_layout(64, 192) == a.wq.param_layout(64, 192) and wq.name == a.wq.name
        assert aq == (a.aq and a.aq.model_copy(update={"granularity": a.aq.strategy}))


@pytest.mark.parametrize("options", VARIANTS, ids=named)
def test_every_scheme_survives_the_config(options: dict[str, Any], tmp_path: Path) -> None:
    plan = {"default": {"wq": options}, "output": {"format": "quantplan"}}
    resolution = resolve(load_plan(plan), shapes("untied", tmp_path)).require()
    assert not resolution.notes
    config = json.loads(json.dumps(NATIVE.config(list(resolution.assignments.values()))))
    wq, _ = QuantplanConfig(**config).treatments()["model.layers.0.mlp.up_proj"]
    stored = quantized(options)
    assert torch.equal(wq.quantizer().dequantize(stored), scheme(options).quantizer().dequantize(stored))


@pytest.mark.parametrize(
    ("model", "plan", "text"),
    [
        (
            "untied",
            {"default": {}, "overrides": [{"pattern": "model.embed_tokens", "wq": "int8"}]},
            "embeddings are not available yet",
        ),
        ("llama", {"default": {"wq": {"scheme": "int8", "granularity": "token"}}}, "weights have no tokens"),
        ("moe", {"default": {"wq": "int8", "aq": "int8"}}, "their activations cannot be quantized"),
        ("fused", {"default": {"wq": "int8", "aq": "int8"}}, "their activations cannot be quantized"),
    ],
)
def test_what_it_cannot_hold_is_refused(model: str, plan: dict[str, Any], text: str, tmp_path: Path) -> None:
    resolution = resolve(load_plan({**plan, "output": {"format": "quantplan"}}), shapes(model, tmp_path))
    problems = list(errors_in(resolution.problems))
    assert [p.code for p in problems] == ["QP115"] and text in problems[0].message


def test_limits_of_other_formats_do_not_apply(tmp_path: Path) -> None:
    plan = {"default": {"wq": "mxfp6"}, "output": {"format": "quantplan"}, "engines": ["transformers"]}
    for model in ("llama", "moe", "fused"):
        resolution = resolve(load_plan(plan), shapes(model, tmp_path)).require()
        assert not resolution.problems
        assert any(n.endswith(".weight_codes") for n in output_layout(resolution).tensors)


def test_a_config_this_version_cannot_read_is_refused() -> None:
    group = {"wq": {"scheme": "int4", "granularity": "group", "group_size": 32}, "aq": None, "modules": ["a"]}
    with pytest.raises(QuantplanError, match="QP222 the quantization_config is of version 2"):
        QuantplanConfig([group], version=2)
    with pytest.raises(QuantplanError, match="unknown key 'transforms'"):
        QuantplanConfig([group], transforms=[])
    with pytest.raises(QuantplanError, match="int4: no_such_option"):
        QuantplanConfig([{**group, "wq": {**group["wq"], "no_such_option": 1}}]).treatments()
    with pytest.raises(QuantplanError, match="QP107"):
        QuantplanConfig([{**group, "wq": {"scheme": "int1"}}]).treatments()
