"""Padding and skipped tokens count for no expert: which tokens its rows are is followed, however a model's code chooses them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import zoo
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

from quantplan.algorithms.gptq import GPTQ
from quantplan.engine.apply import apply
from quantplan.engine.collect import collect
from quantplan.live.routed import RoutedTokens
from quantplan.live.watch import watching

transformers.logging.set_verbosity_error()
REAL, LENGTH = 24 * 2 + 3, 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("routed")
    ids = torch.randint(3, 120, (REAL,), generator=torch.Generator().manual_seed(0))
    save_file({"input_ids": ids}, made / "ids.safetensors")
    return made


def plan(folder: Path, **calibration: Any) -> dict[str, Any]:
    """Three sequences, of which the last is three tokens and padding."""
    source = {"source": str(folder / "ids.safetensors"), "samples": 3, "sequence_length": LENGTH}
    return {
        "default": {"wq": {"scheme": "int4", "granularity": "channel"}, "algorithm": "gptq"},
        "calibration": {**source, **calibration},
    }


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Matrix -> how many tokens counted when gptq solved it."""
    found: dict[str, int] = {}
    real = GPTQ.solve

    def solve(self: GPTQ, weight: Tensor, quantizer: Any, absmax: Any = None, statistics: Any = None) -> Any:
        found[quantizer._stream] = statistics.count
        return real(self, weight, quantizer, absmax, statistics)

    monkeypatch.setattr(GPTQ, "solve", solve)
    return found


@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe", "deepseek-v3"])
@pytest.mark.parametrize("skip", [0, 1])
def test_what_does_not_count_counts_for_no_expert(
    folder: Path, tmp_path: Path, counts: dict[str, int], name: str, skip: int
) -> None:
    report = apply(zoo.build(name, folder), plan(folder, skip_tokens=skip), tmp_path / "out")
    assert not [p for p in report.resolution.notes if p.code == "QP238"]
    real = REAL - 3 * skip
    assert {c for n, c in counts.items() if ".experts." not in n} == {real}
    chosen: dict[str, int] = {}
    for matrix, count in counts.items():
        if ".experts." in matrix:
            before, _, after = matrix.partition(".experts.")
            kind = f"{before} {after.partition('.')[2]}"
            chosen[kind] = chosen.get(kind, 0) + count
    assert len(chosen) == (6 if name == "deepseek-v3" else 9) and set(chosen.values()) == {2 * real}


def test_nor_in_statistics_collected_before(folder: Path, tmp_path: Path) -> None:
    made = collect(zoo.build("mixtral", folder), plan(folder, skip_tokens=1), tmp_path / "stats")
    inputs = json.loads((tmp_path / "stats/statistics.json").read_text())["inputs"]
    first = [e["count"] for n, e in inputs.items() if n.startswith("model.layers.0.") and n.endswith(".w1")]
    assert sum(first) == 2 * (REAL - 3) and "QP238" not in [p.code for p in made.notes]


@pytest.mark.parametrize("transforms", [[], ["smoothquant"]])
def test_an_expert_that_is_given_padding_alone_is_rounded_without_data(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, transforms: list[str]
) -> None:
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    real = MixtralExperts.forward

    def forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Any:
        if len(hidden_states) == 3 * LENGTH:
            top_k_index = torch.where(top_k_index == 1, 0, top_k_index)
            top_k_index[2 * LENGTH + 3 :, 0] = 1
        return real(self, hidden_states, top_k_index, top_k_weights)

    monkeypatch.setattr(MixtralExperts, "forward", forward)
    asked = {**plan(folder), "transforms": transforms}
    asked["default"] = {**asked["default"], "wq": {"scheme": "int8", "granularity": "channel"}, "aq": "int8"}
    report = apply(zoo.build("mixtral", folder), asked, tmp_path / "out")
    (note,) = [p for p in report.resolution.notes if p.code == "QP605"]
    assert "9 modules" in note.message and ".experts.1." in note.message


def test_rows_that_cannot_be_followed_are_named(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, counts: dict[str, int]
) -> None:
    """Experts that are sent their tokens by a product, as some are on accelerators."""
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    def forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        made = torch.zeros_like(hidden_states)
        for expert in range(self.num_experts):
            place, tokens = torch.where((top_k_index == expert).t())
            send = nn.functional.one_hot(tokens, len(hidden_states)).to(hidden_states.dtype)
            gate, up = nn.functional.linear(send @ hidden_states, self.gate_up_proj[expert]).chunk(2, -1)
            out = nn.functional.linear(self.act_fn(gate) * up, self.down_proj[expert])
            made += send.t().to(out.dtype) @ (out * top_k_weights[tokens, place, None])
        return made

    monkeypatch.setattr(MixtralExperts, "forward", forward)
    path = zoo.build("mixtral", folder)
    report = apply(path, plan(folder), tmp_path / "out")
    (note,) = [p for p in report.resolution.notes if p.code == "QP238"]
    assert "36 modules: model.layers.0.block_sparse_moe.experts.0.w1" in note.message
    assert sum(c for n, c in counts.items() if n.endswith("w1")) > 3 * 2 * REAL
    made = collect(path, plan(folder), tmp_path / "stats")
    assert [p.code for p in made.notes if p.code != "QP233"] == ["QP238"]
    whole = {"sequence_length": LENGTH, "samples": 2}
    report = apply(path, plan(folder, **whole), tmp_path / "whole")
    assert not [p for p in report.resolution.notes if p.code == "QP238"], "nothing is left out of these data"


class Mixture(nn.Module):
    """Unfused experts of two linears, sent their tokens in one of the ways that models' code has."""

    def __init__(self, way: str, chosen: Tensor) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 8)) for _ in range(4))
        self.shared_experts = nn.Sequential(nn.Linear(8, 8))
        self.way, self.chosen = way, chosen  # int64 [tokens, top k]

    def forward(self, hidden: Tensor) -> None:
        flat = hidden.reshape(-1, hidden.shape[-1])
        if self.way == "sorted":
            order = self.chosen.flatten().argsort()
            rows, sizes = flat[order // self.chosen.shape[1]], self.chosen.flatten().bincount(minlength=4)
            for expert, part in zip(self.experts, rows.split(sizes.tolist()), strict=True):
                expert(part)
        for number, expert in enumerate(self.experts if self.way != "sorted" else ()):
            _, tokens = torch.where((self.chosen == number).t())
            if self.way == "index":
                expert(flat[None, tokens].reshape(-1, flat.shape[-1]))
            elif self.way == "mask":
                expert(hidden[(self.chosen == number).any(-1).view(hidden.shape[:-1])])
            elif self.way == "select":
                expert(flat.index_select(0, tokens).double().float())
            else:
                expert(torch.gather(flat, 0, tokens[:, None].expand(-1, flat.shape[-1])))
        self.shared_experts(flat)


@settings(max_examples=25, deadline=None)
@given(st.data(), st.sampled_from(["index", "sorted", "mask", "select", "gather"]))
def test_rows_are_followed_however_they_are_chosen(data: st.DataObject, way: str) -> None:
    """Also where one expert is given all tokens in another order."""
    tokens, hidden = 12, torch.randn(3, 4, 8)
    pairs = st.permutations(range(4)).map(lambda order: order[:2])
    chosen = torch.tensor(data.draw(st.lists(pairs, min_size=tokens, max_size=tokens)))
    if data.draw(st.booleans()):
        chosen = torch.stack([chosen[:, 0], torch.zeros(tokens, dtype=torch.long)], 1)
        chosen[:, 0].clamp_(min=1)
        chosen = torch.where(torch.arange(tokens)[:, None] % 2 == 0, chosen, chosen.flip(1))
    module, flat = Mixture(way, chosen), hidden.reshape(-1, 8)
    routed = RoutedTokens(tokens)
    second: dict[str, Tensor] = {}
    seen = set()

    def see(name: str, index: int | None, inputs: Tensor) -> None:
        found = routed.of(name, index, inputs)
        found = torch.arange(tokens) if found is None else found
        rows = flat[found]
        expert, _, layer = name.removesuffix(".weight").rpartition(".")
        if layer == "0":
            assert torch.equal(inputs, rows), name
            second[expert] = found
        else:
            assert torch.equal(found, second[expert])
        seen.add(name)

    with torch.no_grad(), watching(module, see), routed:
        module(hidden)
    assert "shared_experts.0.weight" in seen and len(seen) >= 5
