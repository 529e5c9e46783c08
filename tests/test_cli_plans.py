"""Commands on plans: standard output has the result, standard error everything else, and the exit status says how it went."""

from __future__ import annotations

import json
from pathlib import Path

import models
import pytest

from quantplan.cli import run
from quantplan.errors import code_pages

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("llama", "moe"):
        models.write(name, tmp_path)
    (tmp_path / "good.yaml").write_text("default: {wq: int4, group_size: 64}\n")
    (tmp_path / "other.yaml").write_text(
        "default: {wq: int4, group_size: 64}\noverrides:\n- {pattern: '*.down_proj', wq: int8}\n"
    )
    (tmp_path / "bad.yaml").write_text("default: {wq: itn4}\n")
    (tmp_path / "wrong.yaml").write_text("default: {wq: int4, group_size: 128}\n")
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        ("validate good.yaml", 0),
        ("validate good.yaml --model llama.shapes.json", 0),
        ("validate good.yaml bad.yaml", 1),
        ("validate wrong.yaml --model llama.shapes.json", 1),
        ("validate missing.yaml", 1),
        ("validate good.yaml --model nowhere", 3),
        ("validate good.yaml --output-format xml", 2),
        ("validate", 2),
        ("explain bad.yaml --model llama.shapes.json", 3),
        ("explain wrong.yaml --model llama.shapes.json", 3),
        ("explain good.yaml --model llama.shapes.json no.such.module", 3),
        ("estimate wrong.yaml --model llama.shapes.json", 3),
        ("diff good.yaml other.yaml --model llama.shapes.json", 0),
        ("schemes int9", 3),
        ("codes QP999", 2),
        ("nonsense", 2),
        ("--version", 0),
        ("apply llama.shapes.json good.yaml -o out", 3),
        ("apply llama.shapes.json good.yaml -o out --dry-run", 0),
    ],
)
def test_exit_status(here: Path, capsys: Capture, arguments: str, status: int) -> None:
    assert run(arguments.split()) == status
    shown = capsys.readouterr()
    assert "Traceback" not in shown.err
    if status > 1:
        assert shown.err
    assert not (here / "out").exists()


def test_validate_prints_problems_and_a_summary(here: Path, capsys: Capture) -> None:
    run(["validate", "bad.yaml", "good.yaml"])
    out = capsys.readouterr().out
    assert "bad.yaml:1:15: QP107 unknown scheme 'itn4'" in out
    assert out.endswith("2 plans checked, 1 problem\n")


@pytest.mark.parametrize("name", ["json", "github", "gitlab", "sarif", "junit"])
def test_validate_speaks_to_ci(here: Path, capsys: Capture, name: str) -> None:
    assert run(["validate", "bad.yaml", "--output-format", name]) == 1
    assert "QP107" in capsys.readouterr().out


def test_explain_names_the_line_of_each_field(here: Path, capsys: Capture) -> None:
    assert (
        run(
            [
                "explain",
                "other.yaml",
                "--model",
                "llama.shapes.json",
                "model.layers.0.mlp.down_proj",
                "model.embed_tokens",
            ]
        )
        == 0
    )
    out = capsys.readouterr().out
    assert "other.yaml:3:32" in out and '"int8"' in out
    assert "built-in rule: embeddings" in out


def test_explain_totals_add_up(here: Path, capsys: Capture) -> None:
    assert run(["explain", "other.yaml", "--model", "llama.shapes.json", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert sum(t["modules"] for t in document["totals"]) == len(document["modules"])
    assert {t["treatment"] for t in document["totals"]} == {
        "int4 group 64",
        "int8 channel",
        "kept (embeddings)",
        "kept (not a matrix)",
    }


def test_diff_counts_modules_and_bytes(here: Path, capsys: Capture) -> None:
    assert run(["diff", "good.yaml", "other.yaml", "--model", "llama.shapes.json", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert [c["module"] for c in document["changes"]] == [f"model.layers.{i}.mlp.down_proj" for i in range(2)]
    words, scales = 576 * 1536, 576
    int4, int8 = words // 2 + 576 * 24 * 2 + 16, words + scales * 2 + 16
    assert document["bytes"] == 2 * (int8 - int4)
    assert run(["diff", "good.yaml", "good.yaml", "--model", "llama.shapes.json"]) == 0
    assert capsys.readouterr().out == "0 of 20 modules change, +0 B\n"


def test_estimate_counts_scales_as_bits(here: Path, capsys: Capture) -> None:
    assert run(["estimate", "good.yaml", "--model", "llama.shapes.json", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["bits_per_weight"] == pytest.approx(4.25, abs=1e-3)


def test_problems_are_json_on_standard_output_when_asked(here: Path, capsys: Capture) -> None:
    assert run(["estimate", "bad.yaml", "--model", "llama.shapes.json", "--json"]) == 3
    shown = capsys.readouterr()
    assert json.loads(shown.out)["problems"][0]["code"] == "QP107"
    assert "QP107" in shown.err


def test_shapes_round_trip(here: Path, capsys: Capture) -> None:
    assert run(["shapes", "moe.shapes.json", "-o", "again.json"]) == 0
    assert json.loads((here / "again.json").read_text()) == models.mixture()
    assert run(["validate", "good.yaml", "--model", "again.json"]) == 0


@pytest.mark.parametrize("code", list(code_pages()))
def test_every_code_has_a_page_to_print(capsys: Capture, code: str) -> None:
    assert run(["codes", code]) == 0
    assert capsys.readouterr().out.startswith(f"{code} ")


def test_schemes_and_algorithms_list_their_options(capsys: Capture) -> None:
    assert run(["schemes"]) == 0 and run(["algorithms", "rtn"]) == 0 and run(["schemes", "nf4", "--json"]) == 0
    assert "nvfp4" in capsys.readouterr().out


def test_a_closed_pipe_is_no_error(here: Path) -> None:
    import subprocess
    import sys

    done = subprocess.run(
        f"{sys.executable} -m quantplan explain good.yaml --model moe.shapes.json | head -1",
        shell=True,
        capture_output=True,
        text=True,
        cwd=here,
    )
    assert done.returncode == 0 and "Traceback" not in done.stderr
