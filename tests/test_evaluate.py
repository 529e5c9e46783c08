"""Evaluation: the figures against a slow computation, windows of every kind of data file, and every refusal."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM
from worded import TEXT, WORDS, make_model

import quantplan
from quantplan import cli
from quantplan.errors import QuantplanError
from quantplan.evaluation import metrics
from quantplan.evaluation.gates import Gate, failures
from quantplan.evaluation.interval import student_t
from quantplan.evaluation.metrics import Evaluation, evaluate, window_sums
from quantplan.evaluation.text import read_text, token_windows


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("evaluate")
    (folder / "data.txt").write_text(TEXT)
    found = {name: make_model(folder / name, seed) for seed, name in enumerate("ab")}
    return {**found, "wide": make_model(folder / "wide", 2, 80), "data": folder / "data.txt"}


def raised(code: str, *arguments: Any, call: Any = evaluate, **options: Any) -> str:
    with pytest.raises(QuantplanError) as caught:
        call(*arguments, **options)
    assert [p.code for p in caught.value.problems] == [code], str(caught.value)
    assert caught.value.problems[0].help
    return str(caught.value)


def slowly(model: Path, reference: Path, ids: torch.Tensor) -> tuple[float, float, float, float, float]:
    """Perplexity, its ratio, KL and agreements, token by token and word by word, in float64."""
    q_model, p_model = (AutoModelForCausalLM.from_pretrained(m, dtype=torch.float64).eval() for m in (model, reference))
    nll = other = kl = agree = five = 0.0
    for row in ids:
        with torch.no_grad():
            q, p = (torch.softmax(m(row[None]).logits[0], -1).tolist() for m in (q_model, p_model))
        nll -= sum(math.log(q[t][row[t + 1]]) for t in range(len(row) - 1))
        other -= sum(math.log(p[t][row[t + 1]]) for t in range(len(row) - 1))
        kl += sum(pv * math.log(pv / qv) for t in range(len(row)) for pv, qv in zip(p[t], q[t], strict=True))
        agree += sum(p[t].index(max(p[t])) == q[t].index(max(q[t])) for t in range(len(row)))
        five += sum(q[t].index(max(q[t])) in sorted(range(len(p[t])), key=lambda v, t=t: -p[t][v])[:5] for t in range(len(row)))
    predictions = ids.numel() - len(ids)
    ratio = math.exp((nll - other) / predictions)
    return math.exp(nll / predictions), ratio, kl / ids.numel(), agree / ids.numel(), five / ids.numel()


@pytest.mark.parametrize("chunk", [3, 256])
def test_figures_equal_a_slow_computation(made: dict[str, Path], chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "CHUNK", chunk)
    [found] = evaluate([made["b"]], made["data"], made["a"], length=16)
    ids = token_windows(made["data"], made["a"], 16)
    perplexity, ratio, kl, top1, top5 = slowly(made["b"], made["a"], ids)
    assert found.perplexity == pytest.approx(perplexity, rel=1e-5)
    assert found.kl == pytest.approx(kl, rel=1e-5)
    assert found.perplexity_ratio == pytest.approx(ratio, rel=1e-5)
    assert found.top1 == pytest.approx(top1)
    assert found.top5 == pytest.approx(top5) and found.top1 < found.top5 < 1
    assert (found.tokens, found.windows, found.dtype, found.model) == (192, 12, "float32", str(made["b"]))


def test_standard_errors_are_of_the_windows(made: dict[str, Path]) -> None:
    ids = token_windows(made["data"], made["a"], 16)
    each = [evaluate(made["b"], ids[i : i + 1], made["a"])[0] for i in range(len(ids))]
    [found] = evaluate(made["b"], ids, made["a"])
    for name in ("kl", "top1", "top5"):
        values = torch.tensor([getattr(e, name) for e in each], dtype=torch.float64)
        assert getattr(found, f"{name}_error") == pytest.approx((values.std() / len(ids) ** 0.5).item())
    logs = torch.tensor([math.log(e.perplexity) for e in each], dtype=torch.float64)
    assert found.perplexity_error == pytest.approx(found.perplexity * (logs.std() / len(ids) ** 0.5).item())
    ratios = torch.tensor([math.log(e.perplexity_ratio or 0) for e in each], dtype=torch.float64)
    assert found.perplexity_ratio_error == pytest.approx((found.perplexity_ratio or 0) * (ratios.std() / len(ids) ** 0.5).item())
    assert each[0].perplexity_error is each[0].kl_error is each[0].top1_error is each[0].top5_error is None
    assert [each[0].margin(name) for name in metrics.FIGURES] == [None] * 5 and each[0].as_dict()["intervals"] == {}
    low, high = found.as_dict()["intervals"]["kl"]  # twelve windows: Student's t with eleven degrees of freedom
    assert (high + low) / 2 == pytest.approx(found.kl)
    assert high - low == pytest.approx(2 * 2.20098516 * (found.kl_error or 0))


@pytest.mark.parametrize(
    ("freedom", "t"), [(1, 12.7062047), (2, 4.30265273), (5, 2.57058184), (10, 2.22813885), (99, 1.98421695)]
)
def test_students_t_is_that_of_the_tables(freedom: int, t: float) -> None:
    assert student_t(freedom) == pytest.approx(t, rel=1e-8)


def test_errors_of_layers_are_of_their_outputs(made: dict[str, Path]) -> None:
    """Against outputs caught by hand, over two windows."""
    ids = token_windows(made["data"], made["a"], 16, 2)
    [found] = evaluate(made["b"], ids, made["a"], layers=True)
    models = [AutoModelForCausalLM.from_pretrained(made[name], dtype=torch.float32).eval() for name in "ab"]
    names = [n for n, m in models[0].named_modules() if isinstance(m, torch.nn.Linear) and ".layers." in n]
    assert {e.name for e in found.layers if e.kind == "linear"} == set(names) and len(names) == 14
    assert [e.name for e in found.layers if e.kind == "block"] == ["model.layers.0", "model.layers.1"]
    for name in ("model.layers.1", "model.layers.0.mlp.down_proj"):
        caught: list[torch.Tensor] = []
        for model in models:
            model.get_submodule(name).register_forward_hook(lambda module, inputs, y, caught=caught: caught.append(y))
            with torch.no_grad():
                model(ids)
        expected = (caught[1] - caught[0]).square().sum() / caught[0].square().sum()
        assert next(e.error for e in found.layers if e.name == name) == pytest.approx(expected.item(), rel=1e-4)
    assert evaluate(made["b"], ids, made["a"])[0].layers == ()
    assert evaluate(made["a"], ids, made["a"], layers=True)[0].layers == ()  # one model, not two
    assert "beside a reference" in raised("QP105", made["b"], ids, layers=True)


def test_the_error_of_the_first_quantized_linear_is_its_own(made: dict[str, Path], tmp_path: Path) -> None:
    """Nothing before the quantized layer differs, and all after it does."""
    plan = {"default": {"keep": True}, "overrides": [{"pattern": "*.layers.1.mlp.down_proj", "wq": "int8"}]}
    quantplan.apply(made["a"], plan, tmp_path / "out")
    [found] = evaluate(tmp_path / "out", made["data"], made["a"], 2, 16, layers=True)
    errors = {e.name: e.error for e in found.layers}
    assert {n for n in errors if errors[n] == 0} >= {"model.layers.0", "model.layers.1.mlp.up_proj"}
    assert 0 < errors["model.layers.1.mlp.down_proj"] < 1e-3 and errors["model.layers.1"] > 0


@pytest.mark.parametrize(
    ("options", "status", "says"),
    [
        (["--max-kl", "100"], 0, []),
        (["--max-kl", "0.001", "--min-top1", "1", "--min-top5", "0"], 1, ["KL ", "--max-kl 0.001", "top-1 ", "--min-top1 1"]),
        (["--max-perplexity", "1"], 1, ["perplexity "]),
        (["--max-perplexity-ratio", "0.01"], 1, ["perplexity ratio "]),
        (["--max-kl", "nan"], 2, ["--max-kl"]),
        (["--min-top1", "1.5"], 2, ["--min-top1"]),
    ],
)
def test_gates(
    made: dict[str, Path], capsys: pytest.CaptureFixture[str], options: list[str], status: int, says: list[str]
) -> None:
    files = [str(made["b"]), "-d", str(made["data"]), "--length", "16", "-r", str(made["a"]), "-q", "--json"]
    assert cli.run(["eval", *files, *options]) == status
    shown = capsys.readouterr()
    assert all(text in shown.err for text in says)
    if status < 2:
        document = json.loads(shown.out)
        assert len(document["evaluations"]) == 1 and len(document["failed_gates"]) == len(says) - (len(says) > 1) * 2
        assert {p["code"] for p in document["failed_gates"]} <= {"QP805"}


def test_a_gate_on_what_is_not_measured_is_a_mistake(made: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    files = [str(made["b"]), "-d", str(made["data"]), "--length", "16", "-q"]
    for option in ("--max-kl", "--min-top1", "--min-top5", "--max-perplexity-ratio"):
        assert cli.run(["eval", *files, option, "0.5"]) == 2
        assert "--reference" in capsys.readouterr().err
    assert cli.run(["eval", *files, "--layers"]) == 2
    assert cli.run(["eval", *files, "--max-perplexity", "1e9"]) == 0


@given(st.floats(0, 1), st.floats(0, 1), st.booleans())
def test_a_limit_that_is_reached_is_kept(value: float, limit: float, least: bool) -> None:
    found = Evaluation("m", 2.0, value, value, 8, 1, "float32", 0.0)
    failed = list(failures([Gate("--max-kl", "kl", limit, least)], [found]))
    assert bool(failed) == (value < limit if least else value > limit)


def test_a_model_is_no_distance_from_itself(made: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "twin").symlink_to(made["a"])
    copy = make_model(tmp_path / "copy", 0)
    for twin in (made["a"], tmp_path / "twin", copy):
        [found] = evaluate([twin], made["data"], made["a"], length=16, windows=2)
        assert (found.kl, found.top1, found.top5, found.perplexity_ratio) == (0, 1, 1, 1)


def test_without_a_reference_there_is_perplexity_alone(made: dict[str, Path]) -> None:
    steps: list[tuple[str, int, int]] = []
    names = [str(made["a"]), str(made["b"])]
    found = evaluate(names, made["data"], windows=2, length=16, on_step=lambda *step: steps.append(step))
    assert [e.kl for e in found] == [e.top1 for e in found] == [None, None]
    assert found[0].perplexity != found[1].perplexity
    assert steps == [(names[0], 1, 4), (names[0], 2, 4), (names[1], 3, 4), (names[1], 4, 4)]
    assert json.loads(json.dumps(found[0].as_dict(), allow_nan=False))["windows"] == 2
    assert evaluate([], made["data"], made["a"]) == []


def test_a_dtype_is_kept_and_bfloat16_is_the_fallback(made: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    assert evaluate(made["a"], made["data"], length=16, dtype=torch.bfloat16)[0].dtype == "bfloat16"
    forward = LlamaForCausalLM.forward

    def only_bfloat16(self: Any, *arguments: Any, **options: Any) -> Any:
        if self.dtype != torch.bfloat16:
            raise RuntimeError("expected m1 and m2 to have the same dtype")
        return forward(self, *arguments, **options)

    monkeypatch.setattr(LlamaForCausalLM, "forward", only_bfloat16)
    assert evaluate(made["a"], made["data"], length=16)[0].dtype == "bfloat16"
    assert "cannot be loaded: expected m1" in raised("QP222", made["a"], made["data"], length=16, dtype=torch.float32)


def test_impossible_tokens_add_nothing_where_both_models_exclude_them() -> None:
    q, p = torch.randn(2, 4, 8)
    q[:, 5], p[:, 5] = -math.inf, -math.inf
    window = torch.tensor([1, 2, 3, 4])
    kept = [0, 1, 2, 3, 4, 6, 7]
    assert window_sums(q, window, p).kl == pytest.approx(window_sums(q[:, kept], window, p[:, kept]).kl, rel=1e-6)


def test_text_is_one_stream(made: dict[str, Path], tmp_path: Path) -> None:
    ids = token_windows(made["data"], made["a"], 16)
    assert ids.shape == (12, 16) and ids.dtype == torch.int64
    assert ids.flatten().tolist() == [WORDS.index(w) + 1 for w in TEXT.split()][:192]
    assert torch.equal(token_windows(made["data"], made["a"], 16, 3), ids[:3])
    lines = tmp_path / "data.jsonl"
    half = TEXT.split()[:77], TEXT.split()[77:]
    documents = [json.dumps({"text": " ".join(h), "body": " ".join(reversed(h))}) for h in half]
    lines.write_text(f"\ufeff{documents[0]}\r\n\n{documents[1]}\n")
    assert torch.equal(token_windows(lines, made["a"], 16), ids)
    assert not torch.equal(token_windows(lines, made["a"], 16, field="body"), ids)
    lines.write_text('{"text": "a\u2028b"}\n{"text": "c"}')
    assert read_text(lines) == "a\u2028b\nc"


def test_stored_ids_are_windows_as_they_are(made: dict[str, Path], tmp_path: Path) -> None:
    ids = token_windows(made["data"], made["a"], 16)
    save_file({"input_ids": ids}, tmp_path / "ids.safetensors")
    assert torch.equal(token_windows(tmp_path / "ids.safetensors", "no-tokenizer"), ids)
    assert torch.equal(token_windows(tmp_path / "ids.safetensors", "no-tokenizer", windows=5), ids[:5])
    stored, text = (evaluate(made["a"], d, windows=2, length=16)[0] for d in (tmp_path / "ids.safetensors", made["data"]))
    assert stored.perplexity == text.perplexity


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("none.txt", None, "none.txt: QP130 cannot be read: No such file"),
        ("none.safetensors", None, "file not found"),
        ("empty.txt", b" \n ", "holds no text"),
        ("latin.txt", b"abc \xe9t\xe9", "byte 4: QP130 is not UTF-8"),
        ("bad.jsonl", b'{"text": "a"}\n{"text": \n', "bad.jsonl:2:10: QP130 line is not valid JSON: Expecting value"),
        ("deep.jsonl", b"[" * 100_000, "deep.jsonl:1:1: QP130 line is not valid JSON"),
        ("list.jsonl", b'["text"]', "list.jsonl:1:1: QP130 line is not a JSON object"),
        ("typo.jsonl", b'{"txt": "a"}', "did you mean 'txt'?"),
        ("null.jsonl", b'{"text": null}', "'text' is not a string"),
        ("short.txt", b"w1 w2 w3", "has 3 tokens, one window takes 16"),
    ],
)
def test_bad_data_is_named(made: dict[str, Path], tmp_path: Path, name: str, content: bytes | None, says: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    text = raised("QP130", tmp_path / name, made["a"], 16, call=token_windows)
    assert name in text and says in text


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        ({"ids": torch.zeros(2, 4, dtype=torch.int64)}, "has no tensor 'input_ids'"),
        ({"input_ids": torch.zeros(2, 4, dtype=torch.int32)}, "is I32 [2, 4]"),
        ({"input_ids": torch.zeros(8, dtype=torch.int64)}, "is I64 [8]"),
        ({"input_ids": torch.zeros(2, 4, dtype=torch.int64)}, "holds 2 windows, 3 asked for"),
        ({"input_ids": torch.full((3, 4), -1)}, "negative token id -1"),
    ],
)
def test_bad_stored_ids_are_named(tmp_path: Path, tensors: dict[str, torch.Tensor], says: str) -> None:
    save_file(tensors, tmp_path / "ids.safetensors")
    assert says in raised("QP130", tmp_path / "ids.safetensors", "no-tokenizer", windows=3, call=token_windows)


def test_what_cannot_be_measured_is_refused(made: dict[str, Path], tmp_path: Path) -> None:
    a, data = made["a"], made["data"]
    raised("QP301", a, tmp_path / "eval.pt")
    raised("QP105", a, data, length=1)
    raised("QP105", a, data, windows=0)
    assert "13 windows of 16 take 208" in raised("QP130", a, data, length=16, windows=13)
    assert "longer than the model's 64 positions" in raised("QP105", a, data, length=100)
    raised("QP202", tmp_path / "no-model", data)
    raised("QP130", a, torch.zeros(4, dtype=torch.int64))
    raised("QP130", a, torch.full((1, 4), -5))
    assert "token id 70, the vocabulary 64" in raised("QP131", a, torch.full((1, 4), 70)).replace("the data has ", "")
    text = raised("QP131", [a, made["wide"]], data, a, length=16)
    assert "wide" in text and "a vocabulary of 80, the reference has 64" in text


def test_a_model_that_cannot_be_opened_is_named(made: dict[str, Path], tmp_path: Path) -> None:
    bare = make_model(tmp_path / "bare", 0)
    for path in bare.glob("token*"):
        path.unlink()
    assert "bare: QP222 the tokenizer cannot be loaded" in raised("QP222", bare, made["data"], length=16)
    assert evaluate(bare, made["data"], made["a"], length=16)[0].kl == 0  # the reference's tokenizer is enough

    config = json.loads((bare / "config.json").read_text())
    (bare / "config.json").write_text(json.dumps({**config, "model_type": "no-such-model", "architectures": ["No"]}))
    assert "bare: QP222 cannot be loaded" in raised("QP222", bare, made["data"], made["a"], length=16)
    (bare / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    assert 'tensor "model.layers.2.' in raised("QP221", bare, made["data"], made["a"], length=16)


def test_a_model_that_computes_nonsense_is_refused(made: dict[str, Path], tmp_path: Path) -> None:
    broken = make_model(tmp_path / "broken", 0)
    model = AutoModelForCausalLM.from_pretrained(broken)
    model.model.norm.weight.data[0] = math.nan
    model.save_pretrained(broken)
    assert "window 1 gives" in raised("QP601", broken, made["data"], length=16)
    model.model.norm.weight.data[:] = 1e7
    model.save_pretrained(broken)
    assert "too large for a number" in raised("QP601", broken, made["data"], length=16)


@pytest.mark.parametrize("first", ["", "import quantplan.evaluation.text; ", "from quantplan import Evaluation; "])
def test_the_public_name_can_be_called_whatever_was_imported_first(first: str) -> None:
    code = f"{first}import sys, quantplan; from quantplan import evaluate; assert 'torch' not in sys.modules; "
    code += "assert evaluate([], 'x') == [] == quantplan.evaluate([], 'x')"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert quantplan.Evaluation is Evaluation


@pytest.mark.engine
def test_figures_equal_the_shared_tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On SmolLM2 and its int8 self, one window."""
    smollm2, shared = os.environ.get("QUANTPLAN_SMOLLM2"), os.environ.get("QUANTPLAN_SHARED")
    if not smollm2 or not shared:
        pytest.skip("set QUANTPLAN_SMOLLM2 and QUANTPLAN_SHARED")
    monkeypatch.syspath_prepend(f"{shared}/tools")
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    spec = importlib.util.spec_from_file_location("kl", f"{shared}/tools/kl.py")
    assert spec and spec.loader
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    quantplan.apply(smollm2, {"default": {"wq": "int4", "group_size": 64}}, tmp_path / "out")
    wiki = Path(shared) / "data/wikitext-2-raw/wiki.test.raw"
    ids = token_windows(wiki, smollm2, 1024, 1)
    assert torch.equal(ids, tool.slices(smollm2)[1][:1])
    expected = tool.compare(tool.load(smollm2), tool.load(tmp_path / "out"), ids)
    [found] = evaluate(tmp_path / "out", wiki, smollm2, windows=1, device="cpu")
    assert found.perplexity == pytest.approx(expected["ppl"], rel=1e-6)
    assert found.kl == pytest.approx(expected["kl"], abs=1e-6)
    assert found.top1 == pytest.approx(expected["top1"], abs=1e-9)
