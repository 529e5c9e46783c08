"""Comparison: what a process of its own measures, figures of weights against slow ones, and modules in memory."""

from __future__ import annotations

import copy
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn
from worded import TEXT, make_model

import quantplan
from quantplan import QuantizationComparison, cli
from quantplan.comparison import measure
from quantplan.comparison.compare import Settings, compare
from quantplan.comparison.timing import spread
from quantplan.errors import QuantplanError
from quantplan.evaluation.metrics import evaluate
from quantplan.evaluation.opened import local, open_model

QUICK = Settings(prompt_tokens=8, new_tokens=3, runs=2, threads=1, device="cpu")
OPTIONS = ["--prompt-tokens", "8", "--new-tokens", "3", "--runs", "2", "--threads", "1", "--device", "cpu"]
KEYS = {
    *("name", "path", "size", "bits_per_weight", "bits_per_quantized_weight", "scheme", "load_seconds", "memory_loaded"),
    *("peak_memory", "prefill", "decode", "weight_mse"),
    *(f"{figure}{error}" for figure in ("perplexity", "kl", "top1", "top5") for error in ("", "_error")),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model, its int8 self, one whose half is int4 in the native format, and one that lacks a layer."""
    folder = tmp_path_factory.mktemp("comparison")
    (folder / "data.txt").write_text(TEXT)
    base = make_model(folder / "base", 0)
    quantplan.apply(base, {"default": {"wq": "int8", "aq": "int8"}}, folder / "int8")
    mixed = {
        "default": {"wq": {"scheme": "int4", "group_size": 16, "symmetric": False}},
        "overrides": [{"pattern": "*.self_attn.*", "keep": True}],
        "output": {"format": "quantplan"},
    }
    quantplan.apply(base, mixed, folder / "mixed")
    broken = shutil.copytree(base, folder / "broken")
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    return {name: folder / name for name in ("base", "int8", "mixed", "broken", "data.txt")}


def finite(data: Any) -> bool:
    if isinstance(data, dict | list):
        return all(map(finite, data.values() if isinstance(data, dict) else data))
    return not isinstance(data, float) or math.isfinite(data)


def test_models_side_by_side(made: dict[str, Path]) -> None:
    found = compare(made["base"], [made["int8"], made["mixed"]], made["data.txt"], 3, 16, QUICK)
    document = found.as_dict()
    assert (document["reference"], document["data"], document["problems"]) == ("base", str(made["data.txt"]), [])
    assert set(document["machine"]) == {"processor", "cores", "threads", "torch", "transformers", "quantplan"}
    assert document["machine"]["threads"] == 1 and document["machine"]["processor"]
    assert [m["name"] for m in document["models"]] == ["base", "int8", "mixed"]
    for each in document["models"]:
        assert set(each) == KEYS and finite(each)
        assert each["size"] == sum(p.stat().st_size for p in Path(each["path"]).glob("*.safetensors"))
        assert each["peak_memory"] >= each["memory_loaded"] > 50_000_000 and each["load_seconds"] > 0
        for phase, tokens in (("prefill", 8), ("decode", 3)):
            speed = each[phase]
            assert (speed["tokens"], speed["runs"]) == (tokens, 2)
            assert 0 < speed["p10_ms"] <= speed["median_ms"] <= speed["p90_ms"]
        assert each["prefill"]["tokens_per_second"] == pytest.approx(8000 / each["prefill"]["median_ms"])
        assert each["decode"]["tokens_per_second"] == pytest.approx(1000 / each["decode"]["median_ms"])
    base, int8, mixed = document["models"]
    assert (base["scheme"], base["bits_per_weight"], base["weight_mse"]) == ("float", 32, None)
    assert (base["kl"], base["top1"], base["top5"], base["bits_per_quantized_weight"]) == (0, 1, 1, None)
    assert int8["scheme"] == "int8 channel, activations int8 token" and mixed["scheme"] == "int4 group 16 asymmetric"
    assert 8 < int8["bits_per_quantized_weight"] < 10 and int8["bits_per_weight"] < mixed["bits_per_weight"] < 32
    [expected] = evaluate(made["mixed"], made["data.txt"], made["base"], 3, 16)
    for figure in ("perplexity", "perplexity_error", "kl", "kl_error", "top1", "top1_error", "top5", "top5_error"):
        assert mixed[figure] == getattr(expected, figure)


@pytest.mark.parametrize("name", ["int8", "mixed"])
def test_weight_mse_is_over_quantized_matrices(made: dict[str, Path], name: str) -> None:
    """Against the weights of the model that `load` makes."""
    found = compare(made["base"], [made[name]], settings=QUICK).models[1].weights.weight_mse
    source, total, count = load_file(made["base"] / "model.safetensors"), 0.0, 0
    for module, layer in quantplan.load(made[name], dtype=torch.float32).named_modules():
        if isinstance(layer, quantplan.QuantLinear):
            total += (layer.dequantize().double() - source[f"{module}.weight"].double()).square().sum().item()
            count += layer.dequantize().numel()
    assert count > 0 and found == pytest.approx(total / count, rel=1e-6)


def test_without_data_and_beside_another_reference_some_figures_are_missing(made: dict[str, Path], tmp_path: Path) -> None:
    other = make_model(tmp_path / "other", 5, vocabulary=80)
    int8 = compare(other, [made["int8"]], settings=QUICK).as_dict()["models"][1]
    nothing = {"perplexity", "kl", "top1", "top5", "weight_mse", "bits_per_quantized_weight"}
    assert all(int8[name] is None for name in nothing) and int8["scheme"].startswith("int8 channel")


def test_a_model_that_fails_does_not_take_the_others_along(
    made: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [str(made[n]) for n in ("base", "broken", "int8")]
    status = cli.run(
        ["compare", *files, *OPTIONS, "-d", str(made["data.txt"]), "--length", "16", "-o", str(tmp_path / "r"), "--json"]
    )
    shown = capsys.readouterr()
    document = json.loads(shown.out)
    assert status == 3
    assert [m["name"] for m in document["models"]] == ["base", "int8"] and document["models"][1]["kl"] > 0
    assert [p["code"] for p in document["problems"]] == ["QP221"]
    assert document["problems"][0]["place"]["file"] == str(made["broken"]) and str(made["broken"]) in shown.err
    assert json.loads((tmp_path / "r/report.json").read_text()) == document
    assert "measuring int8 (3 of 3)" in shown.err


def test_tables_have_every_model(made: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["compare", str(made["base"]), str(made["int8"]), *OPTIONS, "-q"]) == 0
    shown = capsys.readouterr()
    assert shown.out.count("int8 ") >= 3 and "ms" in shown.out and "perplexity" not in shown.out and shown.err == ""


def test_nothing_is_measured_where_something_is_not_there(made: dict[str, Path], tmp_path: Path) -> None:
    steps: list[Any] = []
    for arguments in (
        (made["base"], [tmp_path / "none"]),
        (tmp_path / "none", [made["int8"]]),
        (made["base"], [made["int8"]], tmp_path / "no.txt"),
    ):
        with pytest.raises(QuantplanError) as caught:
            compare(*arguments, settings=QUICK, on_step=lambda *step: steps.append(step))
        assert caught.value.exit_status == 3
    assert steps == []
    assert cli.run(["compare", str(made["base"])]) == 2


@pytest.mark.parametrize(
    ("settings", "code", "says"),
    [
        (Settings(prompt_tokens=8, dtype="float31"), "QP240", "has no attribute 'float31'"),
        (Settings(prompt_tokens=60, new_tokens=5), "QP105", "longer than the model's 64 positions"),
    ],
)
def test_a_reference_that_cannot_be_measured_ends_it(made: dict[str, Path], settings: Settings, code: str, says: str) -> None:
    with pytest.raises(QuantplanError) as caught:
        compare(made["base"], [made["int8"]], settings=settings)
    assert caught.value.problems[0].code == code and says in str(caught.value) and str(made["base"]) in str(caught.value)


def test_decoding_is_greedy_with_a_cache(made: dict[str, Path]) -> None:
    model = open_model(local(made["base"]))
    prompt = torch.tensor([[3, 1, 4, 1, 5]])
    seen: list[torch.Tensor] = []
    model.get_input_embeddings().register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].clone()))
    first, steps = measure._run(model, prompt, 6, None)
    assert first > 0 and len(steps) == 6
    assert [x.shape[1] for x in seen] == [5, 1, 1, 1, 1, 1, 1]
    expected = model.generate(prompt, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert torch.cat(seen[:7], 1).tolist() == expected.tolist()


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere getrusage is all there is")
def test_a_process_does_not_count_its_parents_memory() -> None:
    held = torch.ones(100 << 20)  # 400 MB
    code = "from quantplan.engine.progress import peak_memory; print(peak_memory())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 10_000_000 < int(done.stdout) < held.nbytes


@given(st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=40))
def test_spread_is_that_of_percentiles(seconds: list[float]) -> None:
    found, values = spread(seconds), torch.tensor(seconds, dtype=torch.float64)
    for share, value in ((0.1, found.p10_ms), (0.5, found.median_ms), (0.9, found.p90_ms)):
        assert value == pytest.approx(1000 * torch.quantile(values, share).item())


# in memory


def seed_models() -> tuple[nn.Module, nn.Module, nn.Module]:
    """The seed's model, the same with rounded weights, and the same quantized."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 10))
    real = quantplan.quantize(copy.deepcopy(model), {"default": {"wq": "int8"}, "output": {"format": "quantplan"}})
    fake = copy.deepcopy(model)
    for i in (0, 2):
        fake[i].weight.data = real[i].dequantize()
    return model, fake, real


def share_right(outputs: torch.Tensor, targets: torch.Tensor) -> float:
    return (outputs.argmax(-1) == targets).float().mean().item()


def test_the_seeds_workflow(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    original_model, fake_quant_model, real_quant_model = seed_models()
    test_loader = [(torch.randn(n, 784), torch.randint(10, (n,))) for n in (32, 32, 7)]
    original_model.train()

    comparison = QuantizationComparison(original_model)
    comparison.setup_models(fake_quant_model, real_quant_model)
    results = comparison.compare(test_loader, device="cpu", metric=share_right)
    comparison.print_comparison()
    comparison.save_comparison_report(str(tmp_path / "results.json"))

    assert list(results) == ["original", "fake_quant", "real_quant"]
    assert json.loads((tmp_path / "results.json").read_text()) == results
    assert "real_quant" in capsys.readouterr().out
    assert original_model.training and not torch.is_inference_mode_enabled()
    assert results["original"]["size_mb"] == results["fake_quant"]["size_mb"] == (784 * 512 + 512 + 512 * 10 + 10) * 4 / 1e6
    codes = sum(b.nbytes for b in real_quant_model.buffers()) + (512 + 10) * 4
    assert results["real_quant"]["size_mb"] == codes / 1e6 < 0.26 * (results["original"]["size_mb"] or 0)
    inputs, targets = (torch.cat(parts) for parts in zip(*test_loader, strict=True))
    with torch.no_grad():
        y, expected = real_quant_model(inputs), original_model(inputs)
    assert results["real_quant"]["mse"] == pytest.approx((y - expected).square().mean().item(), rel=1e-4)
    assert results["fake_quant"]["mse"] == pytest.approx(results["real_quant"]["mse"], rel=1e-3)
    assert results["original"]["mse"] is None
    assert results["original"]["accuracy"] == pytest.approx(share_right(expected, targets))
    for figures in results.values():
        assert 0 < (figures["latency_p10_ms"] or 0) <= (figures["latency_ms"] or 0) <= (figures["latency_p90_ms"] or 0)
        assert (figures["throughput"] or 0) > 0 and (figures["peak_memory_mb"] or 0) > 10


def test_loaders_of_every_kind(made: dict[str, Path]) -> None:
    original, fake, _ = seed_models()
    x = torch.randn(4, 784)
    found = []
    for loader in ([x], [(x,)], [[x, torch.zeros(4)]], [{"input": x}]):
        comparison = QuantizationComparison(original)
        comparison.setup_models(real_quant_model=fake)
        found.append(comparison.compare(loader)["real_quant"])
    assert len({figures["mse"] for figures in found}) == 1 and found[0]["accuracy"] is None
    language = QuantizationComparison(open_model(local(made["base"])))
    language.setup_models(real_quant_model=quantplan.load(made["mixed"], dtype=torch.float32))
    assert (language.compare([{"input_ids": torch.ones(2, 8, dtype=torch.int64)}])["real_quant"]["mse"] or 0) > 0


def test_what_cannot_be_compared_in_memory_is_refused(tmp_path: Path) -> None:
    original, fake, _ = seed_models()
    comparison = QuantizationComparison(original)
    x = torch.randn(4, 784)

    def raised(code: str, *arguments: Any, **options: Any) -> None:
        with pytest.raises(QuantplanError) as caught:
            comparison.compare(*arguments, **options)
        assert caught.value.problems[0].code == code

    with pytest.raises(QuantplanError, match="QP603"):
        comparison.print_comparison()
    raised("QP130", [])
    raised("QP130", [x], metric=share_right)
    comparison.setup_models(nn.Linear(784, 9))
    raised("QP131", [x])
    fake[0].weight.data[0, 0] = math.nan
    comparison.setup_models(fake)
    raised("QP601", [x])
