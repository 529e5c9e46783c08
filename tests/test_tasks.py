"""Tasks of lm-eval: figures against a slow computation, tasks by name and by file, and every refusal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from worded import WORDS, make_model

from quantplan import cli
from quantplan.errors import QuantplanError
from quantplan.evaluation.tasks import run_tasks

ROWS = [
    {"start": " ".join(WORDS[i : i + 3]), "choices": [WORDS[i + 3], WORDS[i + 20], WORDS[i + 9]], "answer": i % 3}
    for i in range(20)
]
TASK = """task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{start}}}}"
doc_to_choice: choices
doc_to_target: answer
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models and a folder of tasks: one that runs, one whose data is missing."""
    folder = tmp_path_factory.mktemp("tasks")
    for seed, name in enumerate("ab"):
        make_model(folder / name, seed)
    (folder / "tasks").mkdir()
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (folder / "tasks/next.yaml").write_text(TASK.format(name="next_word", data=folder / "rows.jsonl"))
    (folder / "tasks/lost.yaml").write_text(TASK.format(name="lost", data=folder / "none.jsonl"))
    return folder


def slowly(model: Path) -> float:
    """Share of rows whose answer is the most probable of the choices."""
    tokenizer, opened = (
        AutoTokenizer.from_pretrained(model),
        AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval(),
    )
    right = 0
    for row in ROWS:
        with torch.no_grad():
            logits = opened(tokenizer(row["start"], return_tensors="pt").input_ids).logits[0, -1]
        scores = [logits[tokenizer(choice).input_ids[0]].item() for choice in row["choices"]]
        right += scores.index(max(scores)) == row["answer"]
    return right / len(ROWS)


def raised(code: str, *arguments: Any, **options: Any) -> str:
    with pytest.raises(QuantplanError) as caught:
        run_tasks(*arguments, **options)
    assert caught.value.problems[0].code == code and caught.value.problems[0].help, str(caught.value)
    return str(caught.value)


def test_figures_equal_a_slow_computation(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("lm_eval")
    files = [str(made / "a"), str(made / "b"), "--task", "next_word", "--include-path", str(made / "tasks")]
    assert cli.run(["eval", *files, "--json", "-q"]) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    documents = json.loads(shown.out)["evaluations"]
    assert [d["model"] for d in documents] == files[:2]
    for name, document in zip("ab", documents, strict=True):
        [figure] = document["tasks"]
        share = slowly(made / name)
        assert figure["value"] == pytest.approx(share) and 0 < share < 1
        assert figure["error"] == pytest.approx((share * (1 - share) / (len(ROWS) - 1)) ** 0.5)
        assert (figure["task"], figure["metric"], figure["documents"], figure["higher_is_better"]) == (
            "next_word",
            "acc",
            20,
            True,
        )
        low, high = figure["interval"]
        assert high - low == pytest.approx(2 * 2.09302405 * figure["error"])  # Student's t, 19 degrees of freedom


def test_a_task_may_be_a_file(made: Path) -> None:
    pytest.importorskip("lm_eval")
    steps: list[Any] = []
    [named], [short] = (
        run_tasks([made / "a"], [str(made / "tasks/next.yaml")], on_step=lambda *step: steps.append(step)),
        run_tasks([made / "a"], [str(made / "tasks/next.yaml")], limit=5, batch_size=2),
    )
    assert named[0].value == pytest.approx(slowly(made / "a")) and short[0].documents == 5
    assert steps == [(str(made / "a"), 0, 1)]


def test_tasks_that_cannot_be_run_are_named(made: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    assert "did you mean 'next_word'" in raised("QP107", [made / "a"], ["next_wrd"], [made / "tasks"])
    assert "task 'lost'" in raised("QP130", [made / "a"], [str(made / "tasks/lost.yaml")])
    assert "none.yaml" in raised("QP130", [made / "a"], [str(tmp_path / "none.yaml")])
    (tmp_path / "empty.yaml").write_text("a: !function b.c\n")
    assert "names no task" in raised("QP130", [made / "a"], [str(tmp_path / "empty.yaml")])
    (tmp_path / "bad.yaml").write_text("a: [\n")
    assert "bad.yaml" in raised("QP130", [made / "a"], [str(tmp_path / "bad.yaml")])


def test_without_lm_eval_its_extra_is_named(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert "pip install quantplan[tasks]" in raised("QP405", [made / "a"], ["next_word"])


def test_there_must_be_something_to_measure_on(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = str(made / "a")
    assert cli.run(["eval", model]) == 2
    assert cli.run(["eval", model, "--task", "x", "-r", model]) == 2
    assert cli.run(["eval", model, "--task", "x", "--max-perplexity", "3"]) == 2
    assert "--data" in capsys.readouterr().err
