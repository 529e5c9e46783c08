"""Calibrated apply over a zoo of architectures: what is written is what was computed with; statistics are those of plain hooks;
kills and resumes give the same bytes."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import zoo
from checkpoints import tree
from safetensors.torch import save_file
from torch import Tensor

import quantplan
from quantplan.algorithm import BlockProblem
from quantplan.algorithms.autoround import AutoRound
from quantplan.algorithms.gptq import GPTQ
from quantplan.checkpoint import durable
from quantplan.checkpoint.durable import remove
from quantplan.checkpoint.layout import output_layout
from quantplan.checkpoint.writer import staging_of
from quantplan.engine import batches, calibrated, memory, moments
from quantplan.engine.apply import apply, prepare
from quantplan.engine.progress import Step
from quantplan.engine.tuning import TunedBlock
from quantplan.errors import QuantplanError
from quantplan.estimate import Estimate, estimate
from quantplan.headers import read_checkpoint
from quantplan.live.experts import every_token_to_every_expert, routed_experts
from quantplan.live.skeleton import model_class
from quantplan.statistics import Statistics
from quantplan.tensor import QuantizedTensor

transformers.logging.set_verbosity_error()

TOKENS = (6, 24)
IDS = torch.randint(3, 120, TOKENS, generator=torch.Generator().manual_seed(0))
OUTSIDE = ["cls.*", "*pooler*", "*.embedding_hidden_mapping_in"]  # of an encoder, beside its blocks
# no text goes in, or no block follows another
REFUSED = {
    **{"whisper": "QP134 .*audio", "swin": "QP134 .*images", "vit": "QP134 .*images"},
    "albert": "QP224 .*comes out of turn",
}
ACCEPTED = [name for name in zoo.ZOO if name not in REFUSED]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("calibrated")
    save_file({"input_ids": IDS}, made / "ids.safetensors")
    return made


def plan_for(folder: Path, wq: Any = "int4", algorithm: Any = "gptq", **calibration: Any) -> dict[str, Any]:
    scheme = {"scheme": wq, "granularity": "channel"} if isinstance(wq, str) else wq
    return {
        "default": {"wq": scheme, "algorithm": algorithm},
        "overrides": [{"pattern": OUTSIDE, "algorithm": "rtn", "optional": True}],
        "calibration": {"source": str(folder / "ids.safetensors"), "samples": TOKENS[0], **calibration},
    }


@pytest.mark.parametrize("name", ACCEPTED)
def test_an_output_computes_what_was_calibrated(folder: Path, tmp_path: Path, name: str) -> None:
    path, out = zoo.build(name, folder), tmp_path / "out"
    steps: list[Step] = []
    report = apply(path, {**plan_for(folder), "output": {"format": zoo.output_format(name)}}, out, on_step=steps.append)
    assert [s.block.number for s in steps if s.block] == list(range(1, steps[0].total + 1))
    reference = zoo.fake_quantized(path, out, report)
    inputs = zoo.inputs(reference)
    with torch.no_grad():
        expected = reference(**inputs).logits
        found = quantplan.load(out, dtype=torch.float32).eval()(**inputs).logits
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))
    losses = {n: loss for s in steps if s.block for n, loss in s.block.losses.items()}
    assert losses and {n: loss for n, loss in losses.items() if not 0 <= loss < 0.5} == {}


@pytest.mark.parametrize("name", ["llama", "mixtral", "t5"])
def test_it_is_nearer_to_the_float_model_than_rounding(folder: Path, tmp_path: Path, name: str) -> None:
    path = zoo.build(name, folder)
    whole = model_class(read_checkpoint(path).config).from_pretrained(path, dtype=torch.float32).eval()
    inputs = {"input_ids": IDS, **({"decoder_input_ids": IDS.roll(1, 1)} if whole.config.is_encoder_decoder else {})}
    errors = []
    with torch.no_grad():
        expected = whole(**inputs).logits
        for algorithm in ("rtn", "gptq"):
            apply(path, plan_for(folder, "int3", algorithm), tmp_path / algorithm)
            logits = quantplan.load(tmp_path / algorithm, dtype=torch.float32).eval()(**inputs).logits
            errors.append(float((logits - expected).square().mean()))
    assert errors[1] < 0.8 * errors[0]


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_calibrated_is_refused_by_name(folder: Path, tmp_path: Path, name: str) -> None:
    path = zoo.build(name, folder)
    with pytest.raises(QuantplanError, match=REFUSED[name]):
        apply(path, plan_for(folder), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("gemma2", {"transforms": ["rotation"]}, "QP226 transform 'rotation'"),
        ("llama", {"transforms": ["bias_correction"]}, "QP226 .* finds no bias"),
        ("t5", {"transforms": ["rotation"]}, "QP(122|226) "),
        ("bert", {"overrides": []}, "QP224 .* is outside"),
        ("albert", {}, "QP224 .*comes out of turn"),
        ("llama", {"calibration": {"all_experts": True}}, "QP224 .*no experts"),
    ],
)
def test_what_does_not_fit_is_refused_before_data_are_read(
    folder: Path, tmp_path: Path, name: str, change: dict[str, Any], says: str
) -> None:
    plan = {**plan_for(folder), "output": {"format": "quantplan"}, **change}
    plan["calibration"] = {**plan["calibration"], "source": str(tmp_path / "none.txt")}  # who reads it says QP130
    steps: list[Step] = []
    with pytest.raises(QuantplanError, match=says):
        apply(zoo.build(name, folder), plan, tmp_path / "out", on_step=steps.append)
    assert not steps and not list(tmp_path.iterdir())
    plan["calibration"]["source"] = "self"
    with pytest.raises(QuantplanError, match="QP134" if name in ("t5", "bert", "albert") else says):
        apply(zoo.build(name, folder), plan, tmp_path / "out", on_step=steps.append)
    assert not steps


def test_matrices_outside_of_the_blocks_are_named(folder: Path, tmp_path: Path) -> None:
    plan = {**plan_for(folder), "overrides": []}
    with pytest.raises(QuantplanError, match=r"bert: QP224 'cls\.predictions\.transform\.dense' is outside"):
        apply(zoo.build("bert", folder), plan, tmp_path / "out")


STATIC = {"scheme": "int8", "dynamic": False, "observer": "minmax"}


def with_infinite_gain(path: Path, copy: Path) -> Path:
    """The zoo's llama, a norm of its second block being broken."""
    from safetensors.torch import load_file

    shutil.copytree(path, copy)
    tensors = load_file(copy / "model.safetensors")
    tensors["model.layers.1.input_layernorm.weight"][3] = float("inf")
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    return copy


@pytest.mark.parametrize(
    ("algorithm", "more"),
    [
        ("gptq", {}),
        ("awq", {}),
        ({"name": "rtn", "search": "imatrix"}, {}),
        ({"name": "rtn", "search": "hessian"}, {}),
        ("rtn", {"transforms": [{"name": "smoothquant", "everywhere": True}]}),
    ],
    ids=["gptq", "awq", "rtn by mean squares", "rtn by the hessian", "smoothquant"],
)
def test_inputs_that_are_not_finite_are_named(folder: Path, tmp_path: Path, algorithm: Any, more: dict[str, Any]) -> None:
    path = with_infinite_gain(zoo.build("llama", folder), tmp_path / "broken")
    with pytest.raises(QuantplanError, match=r'broken: tensor "model\.layers\.1\.self_attn\.\S*": QP601 .*inputs'):
        apply(path, {**plan_for(folder, algorithm=algorithm), **more}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_second_moments_without_a_factor_are_named(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moments.SecondMoment, "mean", lambda self: -1e6 * torch.eye(len(self._lower)))
    with pytest.raises(QuantplanError, match=r'llama: tensor "model\.layers\.0\.self_attn\.q_proj": QP604'):
        apply(zoo.build("llama", folder), plan_for(folder), tmp_path / "out")


def test_a_matrix_that_the_model_never_uses_is_named(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.llama.modeling_llama import LlamaMLP

    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: x)
    with pytest.raises(QuantplanError, match=r"llama: QP605 'model\.layers\.0\.mlp\.down_proj' was given no input"):
        apply(zoo.build("llama", folder), plan_for(folder), tmp_path / "out")


# the calibration's own view


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[Tensor, Statistics]]:
    """Matrix -> what gptq was called with, in every run of the test."""
    seen: dict[str, tuple[Tensor, Statistics]] = {}
    real = GPTQ.solve

    def solve(self: GPTQ, weight: Tensor, quantizer: Any, absmax: Any = None, statistics: Any = None) -> Any:
        seen[quantizer._stream] = (weight.clone(), statistics)
        return real(self, weight, quantizer, absmax, statistics)

    monkeypatch.setattr(GPTQ, "solve", solve)
    monkeypatch.setattr(moments, "fast_dtype", lambda: torch.float32)
    return seen


def hooked(path: Path) -> dict[str, Tensor]:
    """Module -> the inputs of every linear of the float model, `[tokens, features]`, float64."""
    model = model_class(read_checkpoint(path).config).from_pretrained(path, dtype=torch.float32).eval()
    found: dict[str, list[Tensor]] = {}
    for name, part in model.named_modules():
        if isinstance(part, torch.nn.Linear):
            part.register_forward_pre_hook(
                lambda _, given, name=name: found.setdefault(name, []).append(given[0].reshape(-1, given[0].shape[-1]).double())
            )
    with torch.no_grad():
        inputs = {"input_ids": IDS, **({"decoder_input_ids": shifted()} if model.config.is_encoder_decoder else {})}
        model(**inputs)
    return {name: torch.cat(parts) for name, parts in found.items()}


def shifted() -> Tensor:
    ids = IDS.roll(1, 1)
    ids[:, 0] = 0
    return ids


@pytest.mark.parametrize("name", ["llama", "phi3", "opt", "gemma2", "qwen3-moe", "t5", "llava", "bert"])
@pytest.mark.parametrize("skip", [0, 1])
def test_the_first_blocks_statistics_are_those_of_hooks(
    folder: Path, tmp_path: Path, recorded: dict[str, Any], name: str, skip: int
) -> None:
    """Of the matrices that are given the block's input alone: those after them see what the quantized ones made of it."""
    path = zoo.build(name, folder)
    apply(path, plan_for(folder, skip_tokens=skip), tmp_path / "out")
    given, first = hooked(path), next(iter(recorded))
    block = first[: first.index(".0.") + 3]
    mask = torch.ones(TOKENS, dtype=torch.bool)
    if skip:
        mask[:, 0] = False
        mask &= IDS != 1
    compared = 0
    for matrix, (_, statistics) in recorded.items():
        if not matrix.startswith(block) or matrix.rpartition(".")[2] not in (
            "q_proj",
            "k_proj",
            "v_proj",
            "qkv_proj",
            "q",
            "query",
        ):
            continue
        live = matrix.replace("language_model.model", "model.language_model")
        x = given.get(matrix, given.get(live, torch.empty(0)))[mask.flatten()]
        assert statistics.count == len(x) == int(mask.sum()), matrix
        torch.testing.assert_close(statistics.hessian.double(), x.t() @ x / len(x), rtol=1e-3, atol=1e-4)
        assert statistics.drift is not None and not statistics.drift.any()  # nothing before it is quantized
        compared += 1
    assert compared


def test_later_matrices_see_the_quantized_model_and_know_the_drift(
    folder: Path, tmp_path: Path, recorded: dict[str, Any]
) -> None:
    path = zoo.build("llama", folder)
    report = apply(path, plan_for(folder, "int3", skip_tokens=0), tmp_path / "out")
    quantized = zoo.fake_quantized(path, tmp_path / "out", report)
    quantized.save_pretrained(tmp_path / "quantized")
    float_inputs, inputs = hooked(path), hooked(tmp_path / "quantized")
    for matrix, (_, statistics) in recorded.items():
        x, y = inputs[matrix], float_inputs[matrix]
        scale = float(statistics.hessian.abs().max())
        torch.testing.assert_close(statistics.hessian.double(), x.t() @ x / len(x), rtol=1e-2, atol=1e-3 * scale)
        torch.testing.assert_close(statistics.drift.double(), (y - x).t() @ x / len(x), rtol=1e-2, atol=1e-3 * scale)
    assert len(recorded) == 21


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_siblings_share_statistics_and_others_do_not(
    folder: Path, tmp_path: Path, recorded: dict[str, Any], monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    """`o_proj` is kept: nothing comes between what the norms before and after it make, which lie in the same memory."""
    monkeypatch.setattr(moments, "fast_dtype", lambda: dtype)
    plan = plan_for(folder)
    plan["overrides"].append({"pattern": "*.o_proj", "keep": True})
    path = zoo.build("llama", folder)
    apply(path, plan, tmp_path / "out")
    for layer in range(3):
        at = f"model.layers.{layer}"
        q, k, gate, up, down = (
            recorded[f"{at}.{n}"][1]
            for n in ("self_attn.q_proj", "self_attn.k_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
        )
        assert q is k and gate is up
        assert len({id(s) for s in (q, gate, down)}) == 3
        assert not torch.allclose(q.hessian, gate.hessian)


# experts


def routed(path: Path) -> dict[int, Tensor]:
    """Expert -> the tokens it is given in the first block with experts, float64."""
    model = model_class(read_checkpoint(path).config).from_pretrained(path, dtype=torch.float32, experts_implementation="eager")
    experts = next(part for name, part in model.named_modules() if name.endswith(".experts"))
    found: dict[int, Tensor] = {}

    def keep(_: Any, arguments: Any, options: Any) -> None:
        hidden, index = (list(arguments) + list(options.values()))[:2]
        for expert in range(4):
            found[expert] = hidden[(index == expert).any(-1)].double()

    experts.register_forward_pre_hook(keep, with_kwargs=True)
    with torch.no_grad():
        model.eval()(IDS)
    return found


@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe", "deepseek-v3"])
def test_each_expert_has_statistics_of_its_own_tokens(folder: Path, tmp_path: Path, recorded: dict[str, Any], name: str) -> None:
    path = zoo.build(name, folder)
    apply(path, plan_for(folder, wq={"scheme": "int8", "granularity": "channel"}), tmp_path / "out")
    expected = routed(path)
    first = next(n for n in recorded if ".experts." in n)
    block, last = first[: first.index(".experts.")], first.rpartition(".")[2]
    counts = set()
    for expert, x in expected.items():
        statistics = recorded[f"{block}.experts.{expert}.{last}"][1]
        assert abs(statistics.count - len(x)) <= 2  # int8 attention moves a token at most
        if statistics.count == len(x):
            torch.testing.assert_close(statistics.hessian.double(), x.t() @ x / len(x), rtol=0.05, atol=0.02)
        counts.add(statistics.count)
    assert len(counts) > 1


def test_experts_that_no_token_comes_to_are_rounded_and_named(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = zoo.build("mixtral", folder)
    starve(monkeypatch, 1)
    report = apply(path, plan_for(folder), tmp_path / "out")
    (note,) = [p for p in report.resolution.notes if p.code == "QP605"]
    assert "9 modules: model.layers.0" in note.message and ".experts.1." in note.message
    assert "all_experts" in note.help and note.as_dict() in report.as_dict()["notes"]
    rounded = zoo.decoded(tmp_path / "out", report)
    plain = apply(path, plan_for(folder, algorithm="rtn"), tmp_path / "rtn")
    for name, values in zoo.decoded(tmp_path / "rtn", plain).items():
        assert torch.equal(values, rounded[name]) == (".experts.1." in name), name


def starve(monkeypatch: pytest.MonkeyPatch, expert: int) -> None:
    """Routers send what they would send to `expert` to the next one."""
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    real = MixtralExperts.forward

    def forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Any:
        if top_k_index.shape[-1] == 2 and not (top_k_index == top_k_index[:1]).all():
            top_k_index = torch.where(top_k_index == expert, expert + 1, top_k_index)
        return real(self, hidden_states, top_k_index, top_k_weights)

    monkeypatch.setattr(MixtralExperts, "forward", forward)


def test_all_experts_see_all_tokens(
    folder: Path, tmp_path: Path, recorded: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = zoo.build("mixtral", folder)
    starve(monkeypatch, 1)
    report = apply(path, plan_for(folder, all_experts=True, skip_tokens=0), tmp_path / "out")
    assert not [p for p in report.resolution.notes if p.code == "QP605"]
    counts = {s.count for n, (_, s) in recorded.items() if ".experts." in n}
    assert counts == {TOKENS[0] * TOKENS[1]}
    first = [s for n, (_, s) in recorded.items() if n.startswith("model.layers.0.") and n.endswith("w1")]
    assert len(first) == 4 and all(torch.equal(s.hessian, first[0].hessian) for s in first)
    reference = zoo.fake_quantized(path, tmp_path / "out", report)
    with torch.no_grad():
        expected = reference(IDS).logits
        found = quantplan.load(tmp_path / "out", dtype=torch.float32).eval()(IDS).logits
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe", "deepseek-v3", "gpt-oss"])
def test_extra_calls_of_experts_do_not_change_what_a_block_computes(folder: Path, name: str) -> None:
    path = zoo.build(name, folder)
    model = model_class(read_checkpoint(path).config).from_pretrained(path, experts_implementation="eager").eval()
    assert set(routed_experts(model).values()) == {4}
    with torch.no_grad():
        plain = model(IDS).logits
        with every_token_to_every_expert(model):
            assert torch.equal(model(IDS).logits, plain)


def test_all_experts_of_a_dense_model_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(QuantplanError, match=r"QP224 .*no experts"):
        apply(zoo.build("llama", folder), plan_for(folder, all_experts=True), tmp_path / "out")


@pytest.mark.parametrize("treated", [{"aq": "int8"}, {"keep": True}])
@pytest.mark.parametrize("part", ["w1", "w3"])
def test_one_product_takes_activations_in_one_way(folder: Path, tmp_path: Path, part: str, treated: dict[str, Any]) -> None:
    """`w1` and `w3` are one parameter in transformers' code, whatever engine is to run what is written."""
    plan = plan_for(folder, "int8")
    plan |= {"engines": []}
    plan["overrides"].append({"pattern": f"*.{part}", **treated})
    if "keep" in treated:
        apply(zoo.build("mixtral", folder), plan, tmp_path / "kept")  # inputs are rounded for neither
        plan["default"]["aq"] = "int8"
    with pytest.raises(QuantplanError, match=r"QP113 .*0\.w1' and '.*0\.w3' as one"):
        apply(zoo.build("mixtral", folder), plan, tmp_path / "out")
    plan["calibration"], plan["default"]["algorithm"] = None, "rtn"
    assert apply(zoo.build("mixtral", folder), plan, tmp_path / "out").written  # nothing is run


# encoder-decoders


@pytest.mark.parametrize("name", ["t5", "marian"])
def test_a_decoder_reads_what_the_quantized_encoder_writes(
    folder: Path, tmp_path: Path, recorded: dict[str, Any], name: str
) -> None:
    path = zoo.build(name, folder)
    report = apply(path, plan_for(folder, "int3", skip_tokens=0), tmp_path / "out")
    zoo.fake_quantized(path, tmp_path / "out", report).save_pretrained(tmp_path / "quantized")
    quantized, plain = hooked(tmp_path / "quantized"), hooked(path)
    crossed = [n for n in recorded if "EncDecAttention.k" in n or "encoder_attn.k_proj" in n]
    assert crossed
    for matrix in crossed:
        x = quantized[matrix]
        hessian = recorded[matrix][1].hessian.double()
        scale = float(hessian.abs().max())
        torch.testing.assert_close(hessian, x.t() @ x / len(x), rtol=1e-2, atol=1e-3 * scale)
        assert not torch.allclose(hessian, plain[matrix].t() @ plain[matrix] / len(x), rtol=1e-2, atol=1e-3 * scale)


# interruption


def at_step(number: int, phase: str = "calibrating") -> Callable[[Step], None]:
    """`on_step` that stops the run after so many steps of a phase."""
    steps: list[Step] = []

    def on_step(step: Step) -> None:
        steps.extend([step] if step.phase == phase else [])
        if len(steps) == number:
            raise KeyboardInterrupt

    return on_step


@pytest.mark.parametrize("name", ["llama", "t5", "mixtral"])
def test_interrupted_after_every_block(folder: Path, tmp_path: Path, name: str) -> None:
    path, plan = zoo.build(name, folder), plan_for(folder)
    steps: list[Step] = []
    apply(path, plan, tmp_path / "reference", on_step=steps.append)
    reference, total = tree(tmp_path / "reference"), sum(s.phase == "calibrating" for s in steps)
    for number in range(1, total + 1, 1 if name == "llama" else 2):
        out = tmp_path / f"out{number}"
        with pytest.raises(KeyboardInterrupt):
            apply(path, plan, out, on_step=at_step(number))
        again: list[Step] = []
        apply(path, plan, out, on_step=again.append)
        assert tree(out) == reference
        blocks = [s.block for s in again if s.block]
        assert [b.resumed for b in blocks] == [True] * number + [False] * (total - number)
        assert [b.number for b in blocks] == list(range(1, total + 1))


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_hidden_states_on_disk(folder: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where memory is short they lie in files: the same bytes, after an interruption too, and nothing is left."""
    path, plan, kept = zoo.build(name, folder), plan_for(folder), []
    apply(path, plan, tmp_path / "reference")
    real = memory.on_disk
    monkeypatch.setattr(memory, "room", lambda: 0)
    monkeypatch.setattr(memory, "on_disk", lambda x, at: kept.append(x.shape) or real(x, at))
    for number in (1, 2):
        with pytest.raises(KeyboardInterrupt):
            apply(path, plan, tmp_path / "out", on_step=at_step(number))
        assert not list(staging_of(tmp_path / "out").rglob("hidden-*"))
    apply(path, plan, tmp_path / "out")
    assert tree(tmp_path / "out") == tree(tmp_path / "reference")
    blocks = {"llama": 3, "t5": 6}[name]
    assert len(kept) >= 2 * blocks  # of both chains


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_nothing_that_was_spilled_is_held_in_memory(
    folder: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither what was captured, nor what was computed, nor what a resumed run has loaded: only what lies on disk."""
    path, plan, real = zoo.build(name, folder), plan_for(folder), memory.on_disk
    spilled: list[weakref.ref[Tensor]] = []
    alive: list[int] = []

    def on_disk(x: Tensor, at: Path) -> torch.Tensor:
        alive.append(sum(r() is not None for r in spilled))  # what was captured before is gone when the next batch is
        spilled.append(weakref.ref(x))
        return real(x, at)

    def stop(step: Step) -> None:
        if step.phase == "calibrating" and not (step.block and step.block.resumed):
            assert spilled and not any(r() is not None for r in spilled)
            raise KeyboardInterrupt

    monkeypatch.setattr(memory, "room", lambda: 0)
    monkeypatch.setattr(memory, "on_disk", on_disk)
    monkeypatch.setattr(batches, "TOKENS", 1)  # a sequence a batch
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            apply(path, plan, tmp_path / "out", on_step=stop)
    assert max(alive) <= torch.get_num_threads()  # those that other cores are at


def test_hidden_states_fill_the_room_and_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "room", lambda: 100)
    where = memory.HiddenStates(tmp_path)
    made = [where.keep(torch.full((10,), float(i))) for i in range(4)]
    in_memory = [not x.is_shared() for x in made]
    assert in_memory == [True, True, False, False] and [x[9].item() for x in made] == [0, 1, 2, 3]
    del made[0]  # its room is free again
    state = torch.ones(10)
    assert where.keep(state) is state and where.keep(torch.ones(10)).is_shared() and not list(tmp_path.iterdir())


def test_no_room_on_disk_for_hidden_states(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, plan = zoo.build("llama", folder), plan_for(folder)
    apply(path, plan, tmp_path / "reference")
    with monkeypatch.context() as patch:

        def full(*arguments: Any) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        patch.setattr(memory, "room", lambda: 0)
        patch.setattr(durable, "allocate", full)
        with pytest.raises(QuantplanError, match="QP401"):
            apply(path, plan, tmp_path / "out")
    apply(path, plan, tmp_path / "out")
    assert tree(tmp_path / "out") == tree(tmp_path / "reference")


def test_interrupted_again_and_again(folder: Path, tmp_path: Path) -> None:
    """Every run solves one block and is stopped."""
    path, plan = zoo.build("t5", folder), plan_for(folder)
    apply(path, plan, tmp_path / "reference")
    for number in range(1, 7):
        with pytest.raises(KeyboardInterrupt):
            apply(path, plan, tmp_path / "out", on_step=at_step(number))
    apply(path, plan, tmp_path / "out")
    assert tree(tmp_path / "out") == tree(tmp_path / "reference")


def test_a_run_stopped_while_it_writes_does_not_calibrate_again(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, plan = zoo.build("llama", folder), {**plan_for(folder), "output": {"shard_size": 40_000}}
    apply(path, plan, tmp_path / "reference")
    with pytest.raises(KeyboardInterrupt):
        apply(path, plan, tmp_path / "out", on_step=at_step(9, "quantizing"))
    for states in (staging_of(tmp_path / "out") / "calibration").glob("states-*"):
        states.unlink()  # no use any more

    def never(*arguments: Any, **options: Any) -> Any:
        raise AssertionError("calibrates again")

    monkeypatch.setattr(calibrated.Forward, "capture", never)
    monkeypatch.setattr(GPTQ, "solve", never)
    report = apply(path, plan, tmp_path / "out")
    assert report.reused_files > 0
    assert tree(tmp_path / "out") == tree(tmp_path / "reference")


def test_lost_states_cost_time_and_nothing_else(folder: Path, tmp_path: Path) -> None:
    path, plan = zoo.build("llama", folder), plan_for(folder)
    apply(path, plan, tmp_path / "reference")
    with pytest.raises(KeyboardInterrupt):
        apply(path, plan, tmp_path / "out", on_step=at_step(2))
    for states in (staging_of(tmp_path / "out") / "calibration").glob("states-*"):
        states.unlink()
    steps: list[Step] = []
    apply(path, plan, tmp_path / "out", on_step=steps.append)
    assert not any(s.block.resumed for s in steps if s.block)
    assert tree(tmp_path / "out") == tree(tmp_path / "reference")


def test_another_plan_or_other_data_are_not_mixed_in(folder: Path, tmp_path: Path) -> None:
    path, plan, out = zoo.build("llama", folder), plan_for(folder), tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        apply(path, plan, out, on_step=at_step(1))
    for other in (
        plan_for(folder, "int8"),
        plan_for(folder, algorithm={"name": "gptq", "damping": 0.1}),
        plan_for(folder, seed=1),
    ):
        with pytest.raises(QuantplanError, match=r"QP502 .*plan"):
            apply(path, other, out)
    kept = (folder / "ids.safetensors").read_bytes()
    try:
        save_file({"input_ids": IDS.flip(0)}, folder / "ids.safetensors")
        with pytest.raises(QuantplanError, match=r"QP502 .*calibration"):
            apply(path, plan, out)
        apply(path, plan, out, restart=True)
    finally:
        (folder / "ids.safetensors").write_bytes(kept)


class Killed(BaseException):
    """Nothing after it runs."""


def kill_at(monkeypatch: pytest.MonkeyPatch, at: int) -> list[str]:
    """The file operation with that number, and any after it, does not happen. The lock's end does: the system sees to that."""
    calls: list[str] = []

    def patched(name: str, real: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            if str(arguments[0]).endswith(".lock"):
                return real(*arguments, **options)
            calls.append(name)
            if len(calls) >= at:
                raise Killed
            return real(*arguments, **options)

        return call

    for name in ("fsync", "rename", "unlink"):
        monkeypatch.setattr(os, name, patched(name, getattr(os, name)))
    return calls


def test_killed_at_every_file_operation_of_the_store(folder: Path, tmp_path: Path) -> None:
    path, plan, out = zoo.build("llama", folder), plan_for(folder), tmp_path / "out"
    apply(path, plan, tmp_path / "reference")
    reference = tree(tmp_path / "reference")
    for at in range(1, 100):
        with pytest.MonkeyPatch.context() as monkeypatch:
            calls = kill_at(monkeypatch, at)
            with contextlib.suppress(Killed):
                apply(path, plan, out)
        if len(calls) < at:
            break
        if at % 3 and at < 20:  # every third time the next one is killed in what this one left
            apply(path, plan, out)
            assert tree(out) == reference
            remove(out)
    assert tree(out) == reference
    assert 15 < at < 99


SCRIPT = """
import sys, time, torch
torch.set_num_threads(1)
from quantplan.engine.apply import apply
model, plan, out, pause = sys.argv[1:]
apply(model, plan, out, on_step=lambda step: time.sleep(float(pause)))
"""


@pytest.mark.slow
def test_killed_at_random_moments(folder: Path, tmp_path: Path) -> None:
    path, plan, out = zoo.build("qwen3-moe", folder), tmp_path / "plan.json", tmp_path / "out"
    plan.write_text(json.dumps(plan_for(folder)))
    apply(path, plan, tmp_path / "reference")
    reference, chance, kills = tree(tmp_path / "reference"), random.Random(0), 0
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for _ in range(12):
        command = [sys.executable, "-c", SCRIPT, str(path), str(plan), str(out), "0.05"]
        process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
        journal = staging_of(out) / "calibration"
        while process.poll() is None and not journal.exists():
            time.sleep(0.01)
        time.sleep(chance.random() * 1.2)
        process.kill()
        errors = process.communicate(timeout=120)[1]
        assert process.returncode in (0, -signal.SIGKILL), errors
        kills += process.returncode != 0
        assert tree(out) in (None, reference)
        if process.returncode == 0:
            break
    if tree(out) is None:
        apply(path, plan, out)
    assert tree(out) == reference and kills
    assert sorted(os.listdir(tmp_path)) == ["out", "plan.json", "reference"]


@pytest.mark.parametrize("aq", [None, "int8", STATIC])
def test_a_tuned_block_computes_as_the_lockstep_did(
    folder: Path, tmp_path: Path, aq: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tuner that gives back what it was given changes nothing, in this block or those after it: activations and the key-value
    cache are rounded when a tuned block is run again."""
    monkeypatch.setattr(moments, "fast_dtype", lambda: torch.float32)
    monkeypatch.setattr(AutoRound, "tune", lambda self, problem: dict(problem.started))
    path, made = zoo.build("llama", folder), {}
    for algorithm in ("gptq", "autoround"):
        plan = plan_for(folder, algorithm=algorithm)
        plan["default"]["aq"], plan["kv_cache"] = aq, "fp8"
        made[algorithm] = zoo.decoded(tmp_path / algorithm, apply(path, plan, tmp_path / algorithm))
    assert made["gptq"].keys() == made["autoround"].keys()
    for name, values in made["gptq"].items():
        assert torch.equal(values, made["autoround"][name]), name


def test_tuning_lowers_the_blocks_error_with_rounded_activations(folder: Path, tmp_path: Path) -> None:
    """Two sets of options in one block, each for its own matrices, and gradients that pass through rounded inputs."""
    path, losses = zoo.build("llama", folder), []
    real = AutoRound.tune

    def tune(self: AutoRound, problem: BlockProblem) -> Mapping[str, QuantizedTensor]:
        found = real(self, problem)
        values = {n: q.scheme.quantizer().dequantize(q) for n, q in {**problem.started, **found}.items()}
        start = {n: q.scheme.quantizer().dequantize(q) for n, q in problem.started.items()}
        with torch.no_grad():
            losses.append([float(sum(problem.loss(i, w) for i in range(problem.batches))) for w in (start, values)])
        return found

    plan = plan_for(folder, algorithm={"name": "autoround", "start": "rtn", "iterations": 20})
    plan["default"]["aq"] = "int8"
    plan["overrides"].append({"pattern": "*.mlp.*", "algorithm": {"name": "autoround", "start": "rtn", "iterations": 10}})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AutoRound, "tune", tune)
        apply(path, plan, tmp_path / "out")
    assert len(losses) == 2 * read_checkpoint(path).config["num_hidden_layers"]
    assert all(after <= before for before, after in losses) and any(after < 0.98 * before for before, after in losses)


def test_what_a_block_makes_of_padding_is_not_in_its_error(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three sequences in one batch, the last of three tokens: targets moved at padding change no loss, and one elsewhere does."""
    save_file({"input_ids": IDS.flatten()[: 2 * 24 + 3].contiguous()}, tmp_path / "ids.safetensors")
    found = []

    def tune(self: AutoRound, problem: TunedBlock) -> Mapping[str, QuantizedTensor]:
        weights = {n: q.scheme.quantizer().dequantize(q) for n, q in problem.started.items()}
        targets = [problem.targets[0].clone() for _ in range(3)]
        targets[1][2, 3:] += 10
        targets[2][2, 2] += 10
        found.append([float(replace(problem, targets=[t]).loss(0, weights)) for t in targets])
        return {}

    monkeypatch.setattr(AutoRound, "tune", tune)
    source = {"source": str(tmp_path / "ids.safetensors"), "samples": 3, "sequence_length": 24}
    apply(zoo.build("llama", folder), {**plan_for(folder, algorithm="autoround"), "calibration": source}, tmp_path / "out")
    assert len(found) == 3
    for plain, padding, moved in found:
        assert padding == plain
        assert moved == pytest.approx(plain + 100 / 51, rel=0.2)


def test_fused_experts_that_are_not_tuned_are_named(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when the run was interrupted."""
    tuned: set[str] = set()
    monkeypatch.setattr(AutoRound, "tune", lambda self, problem: tuned.update(problem.weights) or {})
    path, plan = zoo.build("mixtral", folder), plan_for(folder, algorithm={"name": "autoround", "iterations": 1})
    with pytest.raises(KeyboardInterrupt):
        apply(path, plan, tmp_path / "out", on_step=at_step(2))
    report = apply(path, plan, tmp_path / "out")
    experts = {m.name for a in report.resolution.quantized for m in a.matrices if ".experts." in m.name}
    assert len(experts) == 36 and tuned and not tuned & experts
    (note,) = [p for p in report.resolution.notes if p.code == "QP239"]
    assert "36 modules: model.layers.0.block_sparse_moe.experts.0.w1" in note.message
    dense = apply(zoo.build("llama", folder), plan, tmp_path / "dense")
    assert "QP239" not in [p.code for p in dense.resolution.notes]


# no data named


def test_a_plan_that_names_no_data_is_told_what_happens(folder: Path) -> None:
    def notes(name: str, algorithm: str = "gptq", **calibration: Any) -> list[str]:
        plan = {**plan_for(folder, algorithm=algorithm), "calibration": calibration or None}
        return [p.code for p in prepare(zoo.build(name, folder), plan).notes]

    assert notes("llama") == notes("llama", samples=5) == ["QP237"]
    assert notes("bert") == ["QP134"]  # it writes no text; statistics collected before would do
    assert notes("llama", source="self") == notes("llama", "rtn") == []


# the estimate


def test_the_estimate_counts_calibration(folder: Path) -> None:
    path = zoo.build("llama", folder)

    def predicted(samples: int, algorithm: str = "gptq") -> Estimate:
        resolution = prepare(path, plan_for(folder, algorithm=algorithm, samples=samples))
        return estimate(resolution, output_layout(resolution), 2)

    few, many, none = predicted(6), predicted(100_000), predicted(6, "rtn")
    assert none.peak_memory < few.peak_memory < many.peak_memory
    assert few.seconds < many.seconds
