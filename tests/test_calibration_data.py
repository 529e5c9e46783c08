"""Calibration data: every source, packing that drops nothing, choices that repeat, masks, and every refusal."""

from __future__ import annotations

import importlib.util
import json
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
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BartConfig, BertConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, T5Config, ViTConfig

from quantplan.calibration import read
from quantplan.calibration.documents import read_documents
from quantplan.calibration.pack import Specials, counted, cut, join, padded, seeded_order
from quantplan.calibration.read import CalibrationSet, batches, read_calibration
from quantplan.calibration.sources import enough
from quantplan.calibration.tokens import Encoder
from quantplan.errors import QuantplanError
from quantplan.plan.calibration import length_for
from quantplan.plan.schema import Calibration

SPECIAL = ["?", "<s>", "</s>", "<u>", "<a>"]
WORDS = [f"w{i}" for i in range(55)]
TEXT = " ".join(WORDS[(i * i + 3 * i) % 55] for i in range(200))
TEMPLATE = (
    "<s>{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system turns') }}{% endif %}"
    "{{ {'user': '<u> ', 'assistant': '<a> '}[m.role] }}{{ m.content }}{{ ' ' }}{% endfor %}"
)
needs_pyarrow = pytest.mark.skipif(importlib.util.find_spec("pyarrow") is None, reason="pyarrow is not installed")
needs_datasets = pytest.mark.skipif(importlib.util.find_spec("datasets") is None, reason="datasets is not installed")


def ids_of(text: str) -> list[int]:
    return [len(SPECIAL) + WORDS.index(w) for w in text.split()]


def make_model(folder: Path, adds: str = "$A", template: str | None = None, **config: Any) -> Path:
    """A config and a tokenizer of words that writes a text as `adds` says."""
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    entries = {"vocab_size": 60, "max_position_embeddings": 64, "bos_token_id": None, "eos_token_id": None, **config}
    LlamaConfig(architectures=["LlamaForCausalLM"], **sizes, **entries).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*SPECIAL, *WORDS])}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.add_special_tokens(SPECIAL[1:])
    words.post_processor = processors.TemplateProcessing(single=adds, special_tokens=[("<s>", 1), ("</s>", 2)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?")
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("plain") / "model")


@pytest.fixture(scope="module")
def with_begin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose tokenizer begins a text with <s>, and that chats."""
    return make_model(tmp_path_factory.mktemp("begin") / "model", "<s> $A", TEMPLATE, bos_token_id=1)


def read_rows(model: Path, base: Path, source: str, **given: Any) -> CalibrationSet:
    return read_calibration(
        Calibration(source=source, **{"sequence_length": 16, "samples": 4, "skip_tokens": 1, **given}), model, base
    )


def raised(code: str, call: Any, *arguments: Any, **options: Any) -> str:
    with pytest.raises(QuantplanError) as caught:
        call(*arguments, **options)
    assert [p.code for p in caught.value.problems] == [code], str(caught.value)
    assert caught.value.problems[0].help
    return str(caught.value)


def rows(data: CalibrationSet) -> list[list[int]]:
    return [row[:n].tolist() for row, n in zip(data.input_ids, data.lengths, strict=True)]


def write_lines(path: Path, documents: list[Any]) -> Path:
    path.write_text("".join(json.dumps(d) + "\n" for d in documents))
    return path


# packing


@given(
    st.lists(st.lists(st.integers(10, 30), min_size=1, max_size=40), min_size=1, max_size=12),
    st.integers(4, 20),
    st.sampled_from([Specials(), Specials((1,), (), (1,)), Specials((), (2,), (2,)), Specials((1,), (2,), (2, 1))]),
)
def test_packing_drops_no_token(documents: list[list[int]], length: int, specials: Specials) -> None:
    stream = join(documents, specials)
    assert [t for t in stream if t >= 10] == [t for d in documents for t in d]
    assert len(stream) == sum(map(len, documents)) + len(specials.separator) * (len(documents) - 1)
    packed = cut(stream, length, specials)
    assert [t for row in packed for t in row if t >= 10] == [t for d in documents for t in d]
    assert all(len(row) == length for row in packed[:-1]) and 0 < len(packed[-1]) <= length
    for row in packed:
        assert tuple(row[: len(specials.prefix)]) == specials.prefix
        assert not specials.suffix or row[-1] == specials.suffix[0]
    ids, lengths = padded(packed, length, 0)
    assert [row[:n].tolist() for row, n in zip(ids, lengths, strict=True)] == packed


def test_a_sequence_that_begins_with_a_document_begins_once() -> None:
    specials = Specials((1,), (), (1,))
    assert cut(join([[10, 11, 12], [13, 14]], specials), 4, specials) == [[1, 10, 11, 12], [1, 13, 14]]


@given(st.integers(0, 300), st.integers(0, 10))
def test_a_seed_orders_all_numbers(count: int, seed: int) -> None:
    order = list(seeded_order(count, seed))
    assert sorted(order) == list(range(count)) and order == list(seeded_order(count, seed))


def test_the_order_of_a_seed_never_changes() -> None:
    assert list(seeded_order(8, 0)) == [4, 1, 6, 5, 2, 0, 7, 3]
    assert list(seeded_order(8, 1)) == [3, 1, 5, 6, 4, 2, 7, 0]


@given(st.lists(st.text("ab \n", max_size=60), min_size=1, max_size=8), st.integers(1, 100), st.one_of(st.none(), st.just(3)))
def test_enough_is_enough(documents: list[str], limit: int, seed: int | None) -> None:
    some, whole = enough(documents, limit, seed)
    assert "".join(some).replace(" ", "").replace("\n", "") or not "".join(documents).strip() or not whole
    if whole:
        assert some == [d for d in documents if d.strip()]
    elif seed is None:
        assert "".join(documents).replace(" ", "").replace("\n", "").startswith("".join(some).replace(" ", "").replace("\n", ""))


def test_a_long_text_is_chosen_from_in_pieces(model: Path, tmp_path: Path) -> None:
    lines = [" ".join(WORDS[(i * j) % 55] for j in range(50)) for i in range(3000)]
    (tmp_path / "long.txt").write_text("\n".join(lines))
    some, whole = enough(["\n".join(lines)], 40_000, 0)
    assert not whole and 40_000 < sum(map(len, some)) < 100_000 and all(piece.endswith("\n") for piece in some[:-1])
    assert {line for piece in some for line in piece.splitlines()} <= set(lines)
    data = read_rows(model, tmp_path, "long.txt", samples=8)
    assert data.samples == 8 and data.hash == read_rows(model, tmp_path, "long.txt", samples=8).hash
    first = read_rows(model, tmp_path, "long.txt", samples=8, shuffle=False)
    assert first.input_ids.flatten().tolist() == ids_of("\n".join(lines))[:128]


def test_tokens_longer_than_expected_only_cost_time(model: Path, tmp_path: Path) -> None:
    (tmp_path / "sparse.txt").write_text(TEXT.replace(" ", " " * 200))
    for shuffle in (True, False):
        assert read_rows(model, tmp_path, "sparse.txt", samples=10, shuffle=shuffle).samples == 10


# sources


def test_text_in_order_is_the_first_tokens(model: Path, tmp_path: Path) -> None:
    (tmp_path / "data.txt").write_text(TEXT)
    data = read_rows(model, tmp_path, "data.txt", shuffle=False)
    assert data.input_ids.shape == data.mask.shape == (4, 16) and data.input_ids.dtype == torch.int64
    assert data.mask.dtype == torch.bool and data.lengths.tolist() == [16] * 4
    assert data.input_ids.flatten().tolist() == ids_of(TEXT)[:64]
    assert (data.source, data.notes, data.samples, data.length, data.counted) == ("data.txt", (), 4, 16, 60)
    for name in ("data.raw", "data.md", "data.text", "DATA.TXT"):
        (tmp_path / name).write_text(TEXT)
        assert torch.equal(read_rows(model, tmp_path, name, shuffle=False).input_ids, data.input_ids)


def test_rows_of_every_kind_are_the_same_documents(model: Path, tmp_path: Path) -> None:
    halves = [" ".join(TEXT.split()[:77]), "", "  ", " ".join(TEXT.split()[77:])]
    expected = ids_of(TEXT)
    write_lines(tmp_path / "a.jsonl", [{"text": h, "n": 1} for h in halves])
    write_lines(tmp_path / "strings.jsonl", halves)
    (tmp_path / "a.json").write_text(json.dumps([{"text": h} for h in halves]))
    (tmp_path / "one.json").write_text(json.dumps({"text": TEXT}, indent=1))
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/2.txt").write_text(halves[3])
    (tmp_path / "folder/1.jsonl").write_text(json.dumps({"text": halves[0]}))
    (tmp_path / "folder/README.md").write_text("w9 w9")
    for source in ("a.jsonl", "strings.jsonl", "a.json", "one.json", "folder", str(tmp_path / "a.jsonl")):
        data = read_rows(model, tmp_path, source, samples=99, shuffle=False)
        assert [t for row in rows(data) for t in row] == expected, source
        assert data.source == Path(source).name and data.notes


def test_a_path_is_relative_to_the_plan(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "plans").mkdir()
    (tmp_path / "data.txt").write_text(TEXT)
    monkeypatch.chdir("/")
    assert read_rows(model, tmp_path / "plans", "../data.txt").source == "data.txt"


@needs_pyarrow
def test_parquet(model: Path, tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"body": TEXT.split("w7"), "n": range(len(TEXT.split("w7")))})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=3)
    data = read_rows(model, tmp_path, "a.parquet", field="body", samples=99, shuffle=False)
    assert [t for row in rows(data) for t in row] == ids_of(TEXT.replace("w7", ""))
    text = raised("QP130", read_rows, model, tmp_path, "a.parquet")
    assert "the table has no 'text'" in text and "known: body, n" in text
    assert "'n' is not a string" in raised("QP130", read_rows, model, tmp_path, "a.parquet", field="n")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 nothing")
    assert "not a readable parquet" in raised("QP130", read_rows, model, tmp_path, "bad.parquet")
    assert "No such file" in raised("QP130", read_rows, model, tmp_path, "none.parquet")
    chats = pyarrow.table({"messages": [[{"role": "user", "content": "w1"}]]})
    pyarrow.parquet.write_table(chats, tmp_path / "chat.parquet")
    assert read_documents(tmp_path / "chat.parquet") == [[{"role": "user", "content": "w1"}]]


@needs_datasets
def test_saved_data_sets(model: Path, with_begin: Path, tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    made = Dataset.from_dict({"text": TEXT.split("w7"), "n": [1] * len(TEXT.split("w7"))})
    made.save_to_disk(tmp_path / "saved")
    DatasetDict({"train": made, "test": made.select([0])}).save_to_disk(tmp_path / "splits")
    expected = ids_of(TEXT.replace("w7", ""))
    for source in ("saved", "splits"):
        data = read_rows(model, tmp_path, source, samples=99, shuffle=False)
        assert [t for row in rows(data) for t in row] == expected and data.source == source
    data = read_rows(model, tmp_path, "saved", samples=99)
    assert sorted(t for row in rows(data) for t in row) == sorted(expected)
    assert "the data set has no 'body'" in raised("QP130", read_rows, model, tmp_path, "saved", field="body")
    assert "'n' is not a string" in raised("QP130", read_rows, model, tmp_path, "saved", field="n")
    assert "has no 'validation'" in raised("QP130", read_rows, model, tmp_path, "splits", split="validation")
    assert "part of a split" in raised("QP130", read_rows, model, tmp_path, "splits", split="train[:1%]")
    chats = Dataset.from_dict({"messages": [[{"role": "user", "content": TEXT}]]})
    assert rows(read_rows(with_begin, tmp_path, _saved(chats, tmp_path / "chats"), shuffle=False))[0][:3] == [1, 3, 5]
    (tmp_path / "saved/state.json").write_text("{")
    assert "cannot be opened" in raised("QP130", read_rows, model, tmp_path, "saved")


def _saved(table: Any, folder: Path) -> str:
    table.save_to_disk(folder)
    return folder.name


@needs_datasets
def test_a_data_set_by_its_id(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked: list[Any] = []

    def load(*arguments: Any, **options: Any) -> Any:
        asked.append((arguments, options))
        return datasets.Dataset.from_dict({"text": [TEXT] if "wiki" in arguments[0] else []})

    with monkeypatch.context() as patched:
        patched.setattr(datasets, "load_dataset", load)
        assert "holds no rows" in raised("QP130", read_rows, model, tmp_path, "org/empty")
        data = read_rows(model, tmp_path, "org/wiki-2.1", subset="raw-v1", split="train[:1%]", shuffle=False)
    assert asked[1:] == [(("org/wiki-2.1", "raw-v1"), {"split": "train[:1%]"})]
    assert data.source == "org/wiki-2.1:raw-v1:train[:1%]" and rows(data)[0] == ids_of(TEXT)[:16]
    assert "cannot be fetched" in raised("QP406", read_rows, model, tmp_path, "org/none")  # tests are offline


def test_without_the_package_data_sets_are_refused(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("datasets", "pyarrow", "pyarrow.parquet"):
        monkeypatch.setitem(sys.modules, name, None)
    assert "quantplan[datasets]" in raised("QP405", read_rows, model, tmp_path, "wikitext")
    assert "quantplan[datasets]" in raised("QP405", read_rows, model, tmp_path, "a.parquet")


def test_stored_ids_are_taken_as_they_are(model: Path, tmp_path: Path) -> None:
    ids = (torch.arange(144) * 7 % 60).reshape(6, 24)
    save_file({"input_ids": ids}, tmp_path / "ids.safetensors")
    settings = Calibration(source="ids.safetensors", shuffle=False, samples=5)
    bare = make_bare(model, tmp_path / "no-tokenizer")
    assert torch.equal(read_calibration(settings, bare, tmp_path).input_ids, ids[:5])
    drawn = read_calibration(Calibration(source="ids.safetensors", samples=5), bare, tmp_path).input_ids
    assert {tuple(r) for r in drawn.tolist()} < {tuple(r) for r in ids.tolist()} and not torch.equal(drawn, ids[:5])
    assert "holds sequences of 24 tokens, sequence_length says 16" in raised(
        "QP130", read_rows, bare, tmp_path, "ids.safetensors"
    )
    save_file({"input_ids": ids.flatten()}, tmp_path / "row.safetensors")
    data = read_rows(bare, tmp_path, "row.safetensors", samples=9, shuffle=False)
    assert data.input_ids.flatten().tolist() == ids.flatten().tolist()
    save_file({"input_ids": ids + 1}, tmp_path / "high.safetensors")
    assert "token id 60, the model's vocabulary 60" in raised(
        "QP232", read_calibration, Calibration(source="high.safetensors"), bare, tmp_path
    )
    save_file({"other": ids}, tmp_path / "other.safetensors")
    assert "has no tensor 'input_ids'" in raised("QP130", read_rows, bare, tmp_path, "other.safetensors")
    save_file({"input_ids": ids.int()}, tmp_path / "int.safetensors")
    assert "is I32" in raised("QP130", read_rows, bare, tmp_path, "int.safetensors")
    raised("QP130", read_rows, bare, tmp_path, "none.safetensors")


def make_bare(model: Path, folder: Path) -> Path:
    """The model without its tokenizer."""
    folder.mkdir()
    (folder / "config.json").write_bytes((model / "config.json").read_bytes())
    return folder


# special tokens and chats


def test_what_a_tokenizer_adds_stands_between_documents(tmp_path: Path) -> None:
    documents = [{"text": "w0 w1 w2"}, {"text": "w3 w4"}, {"text": "w5"}]
    write_lines(tmp_path / "a.jsonl", documents)
    expected = {
        "<s> $A": [[1, 5, 6, 7, 1], [1, 8, 9, 1, 10]],
        "$A </s>": [[5, 6, 7, 2, 2], [8, 9, 2, 10, 2]],
        "<s> $A </s>": [[1, 5, 6, 7, 2], [1, 2, 1, 8, 2], [1, 9, 2, 1, 2], [1, 10, 2]],
        "$A": [[5, 6, 7, 8, 9], [10]],
    }
    for number, (adds, found) in enumerate(expected.items()):
        model = make_model(tmp_path / str(number), adds)
        assert rows(read_rows(model, tmp_path, "a.jsonl", sequence_length=5, shuffle=False)) == found, adds
    assert Encoder.of(tmp_path / "2").specials == Specials((1,), (2,), (2, 1))
    text = raised("QP105", read_rows, tmp_path / "2", tmp_path, "a.jsonl", sequence_length=2)
    assert "sequences of 2 tokens have no room beside the 2 special tokens" in text
    (tmp_path / "long").mkdir()
    many = make_model(tmp_path / "long" / "model", "<s> <s> <s> $A </s>")
    text = raised("QP105", read_rows, many, tmp_path, "a.jsonl", sequence_length=3)
    assert "sequences of 3 tokens have no room beside the 4 special tokens" in text


def test_chats_go_through_the_template(model: Path, with_begin: Path, tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "w0 w1"}, {"role": "assistant", "content": "w2"}]
    write_lines(tmp_path / "a.jsonl", [{"messages": chat}, {"text": "w3 w4"}, {"messages": chat}])
    # the template's own <s> is not doubled by the one that begins a sequence
    assert rows(read_rows(with_begin, tmp_path, "a.jsonl", sequence_length=15, shuffle=False)) == [
        [1, 3, 5, 6, 4, 7, 1, 8, 9, 1, 3, 5, 6, 4, 7]
    ]
    write_lines(tmp_path / "b.jsonl", [{"conversation": chat}])
    assert rows(read_rows(with_begin, tmp_path, "b.jsonl", field="conversation", sequence_length=6)) == [[1, 3, 5, 6, 4, 7]]
    assert "has no chat template" in raised("QP231", read_rows, model, tmp_path, "a.jsonl")
    write_lines(tmp_path / "c.jsonl", [{"messages": [{"role": "system", "content": "w1"}]}])
    assert "refuses a chat of system: no system turns" in raised("QP231", read_rows, with_begin, tmp_path, "c.jsonl")
    for messages, says in (([], "without turns"), (["w1"], "neither a string nor a chat"), ([{"role": "user"}], "neither")):
        write_lines(tmp_path / "d.jsonl", [{"messages": messages}])
        assert says in raised("QP130", read_rows, with_begin, tmp_path, "d.jsonl")


# choice and mask


def test_a_seed_gives_the_same_sequences(model: Path, tmp_path: Path) -> None:
    (tmp_path / "data.txt").write_text(TEXT)
    whole = rows(read_rows(model, tmp_path, "data.txt", samples=99, shuffle=False))
    drawn = {seed: read_rows(model, tmp_path, "data.txt", seed=seed) for seed in (0, 1, 2)}
    for seed, data in drawn.items():
        again = read_rows(model, tmp_path, "data.txt", seed=seed)
        assert torch.equal(data.input_ids, again.input_ids) and data.hash == again.hash
        assert all(row in whole for row in rows(data)) and len({tuple(row) for row in rows(data)}) == 4
        more = read_rows(model, tmp_path, "data.txt", seed=seed, samples=8)
        assert rows(more)[:4] == rows(data)
    assert len({data.hash for data in drawn.values()}) == 3
    assert len({str(rows(data)) for data in drawn.values()}) == 3


def test_the_hash_is_of_tokens_mask_and_settings_not_of_folders(model: Path, tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "data.txt").write_text(TEXT)
    hashes = {
        read_rows(model, tmp_path, source, **given).hash
        for source in ("a/data.txt", "b/data.txt")
        for given in ({}, {"skip_tokens": 2}, {"shuffle": False})
    }
    assert len(hashes) == 3 and all(len(h) == 64 for h in hashes)


def test_when_the_data_end_the_last_sequence_is_padded(model: Path, tmp_path: Path) -> None:
    (tmp_path / "data.txt").write_text(TEXT)  # 200 tokens: 12 sequences of 16, and 8 more
    for shuffle in (True, False):
        data = read_rows(model, tmp_path, "data.txt", samples=20, shuffle=shuffle)
        assert data.lengths.tolist() == [16] * 12 + [8]
        assert sorted(t for row in rows(data) for t in row) == sorted(ids_of(TEXT))
        assert not data.mask[12, 8:].any() and data.mask[12, 1:8].all() and not data.mask[:, 0].any()
        [note] = data.notes
        assert (note.code, note.severity) == ("QP233", "note") and note.path == ("calibration", "samples")
        assert "holds 13 sequences of 16 tokens, the last with 8; 20 are asked for" in note.message
    assert read_rows(model, tmp_path, "data.txt", samples=13).notes == ()


def test_begin_tokens_and_padding_do_not_count() -> None:
    ids = torch.tensor([[1, 10, 11, 1, 12], [13, 14, 15, 0, 0]])
    lengths = torch.tensor([5, 3])
    expected = {0: ["11111", "11100"], 1: ["01101", "01100"], 2: ["00101", "00100"]}
    for skip, mask in expected.items():
        found = counted(ids, lengths, skip, {1})
        assert ["".join(str(int(v)) for v in row) for row in found] == mask


def test_the_config_knows_begin_tokens_that_the_tokenizer_does_not_add(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", bos_token_id=5)
    (tmp_path / "data.txt").write_text(TEXT)
    data = read_rows(model, tmp_path, "data.txt")
    positions = torch.arange(16) > 0
    assert torch.equal(data.mask, positions & (data.input_ids != 5)) and (data.input_ids[:, 1:] == 5).any()
    (tmp_path / "same.txt").write_text("w0 " * 40)
    assert "no token counts" in raised("QP230", read_rows, model, tmp_path, "same.txt")
    assert read_rows(model, tmp_path, "same.txt", skip_tokens=0, samples=2).mask.all()


# the model's forward


def test_batches_are_what_a_forward_takes(model: Path, tmp_path: Path) -> None:
    (tmp_path / "data.txt").write_text(TEXT)
    data = read_rows(model, tmp_path, "data.txt", samples=13)
    found = list(batches(data, LlamaConfig(), 5))
    assert [sorted(b) for b in found] == [["input_ids"], ["input_ids"], ["attention_mask", "input_ids"]]
    assert torch.cat([b["input_ids"] for b in found]).equal(data.input_ids)
    assert found[2]["attention_mask"].sum(1).tolist() == [16, 16, 8]
    for config, start in ((T5Config(), 0), (BartConfig().to_dict(), 2)):
        [batch] = batches(data, config, 13)
        assert batch["decoder_input_ids"][:, 0].tolist() == [start] * 13
        assert torch.equal(batch["decoder_input_ids"][:, 1:], data.input_ids[:, :-1])


# the model


def test_positions_bound_the_length(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", max_position_embeddings=32)
    (tmp_path / "data.txt").write_text(TEXT)
    assert read_calibration(Calibration(source="data.txt", samples=2), model, tmp_path).length == 32
    text = raised("QP133", read_rows, model, tmp_path, "data.txt", sequence_length=33)
    assert "sequences of 33 tokens are longer than the model's 32 positions" in text
    save_file({"input_ids": torch.ones(3, 33, dtype=torch.int64)}, tmp_path / "ids.safetensors")
    text = raised("QP133", read_calibration, Calibration(source="ids.safetensors", samples=2), model, tmp_path)
    assert "ids.safetensors" in text and "holds sequences of 33 tokens, the model has 32 positions" in text
    save_file({"input_ids": torch.ones(3, 32, dtype=torch.int64)}, tmp_path / "ids.safetensors")
    assert read_calibration(Calibration(source="ids.safetensors", samples=2), model, tmp_path).length == 32
    assert length_for(Calibration(), T5Config(n_positions=16).to_dict()) == 512
    assert length_for(Calibration(), {"model_type": "roberta", "max_position_embeddings": 514, "pad_token_id": 1}) == 512
    assert length_for(Calibration(), {"model_type": "roberta", "max_position_embeddings": 66, "pad_token_id": 1}) == 64


@pytest.mark.parametrize(
    ("config", "source", "says"),
    [
        (ViTConfig(), "data.txt", "vit takes images"),
        ({"model_type": "whisper", "vocab_size": 60, "is_encoder_decoder": True}, "data.txt", "whisper takes audio"),
        ({"model_type": "clip", "text_config": {"vocab_size": 60}, "vision_config": {}}, "data.txt", "clip takes images"),
        (BertConfig(architectures=["BertForMaskedLM"]), "self", "bert (BertForMaskedLM) writes no text"),
        (T5Config(architectures=["T5ForConditionalGeneration"]), "self", "t5 (T5ForConditionalGeneration) writes no text"),
        ({"model_type": "llama", "vocab_size": 60}, "self", "no architecture named"),
    ],
)
def test_models_that_cannot_be_calibrated_are_named(config: Any, source: str, says: str, tmp_path: Path) -> None:
    data = config if isinstance(config, dict) else json.loads(config.to_json_string())
    (tmp_path / "config.json").write_text(json.dumps(data))
    (tmp_path / "data.txt").write_text(TEXT)
    assert says in raised("QP134", read_calibration, Calibration(source=source), tmp_path, tmp_path)


# refusals


@pytest.mark.parametrize(
    ("code", "name", "content", "says"),
    [
        ("QP130", "none.txt", None, "none.txt: QP130 cannot be read: No such file"),
        ("QP130", "none/there.jsonl", None, "cannot be read: No such file"),
        ("QP130", "./none", None, "not found"),
        ("QP130", "empty.txt", b" \n ", "holds no text"),
        ("QP130", "empty.json", b"[]", "holds no text"),
        ("QP130", "blank.json", b"", "holds no text"),
        ("QP130", "latin.txt", b"abc \xe9t\xe9", "byte 4: QP130 is not UTF-8"),
        ("QP130", "bad.jsonl", b'{"text": "a"}\n{"text": \n', "bad.jsonl:2:10: QP130 line is not valid JSON: Expecting value"),
        ("QP130", "bad.json", b'[{"text": "a"},\n {"text": ]', "bad.json:2:11: QP130 file is not valid JSON: Expecting value"),
        ("QP130", "deep.json", b"[" * 100_000, "deep.json:1:1: QP130 file is not valid JSON"),
        ("QP130", "number.json", b"[3]", "row 1 is not a JSON object"),
        ("QP130", "typo.jsonl", b'{"txt": "a", "title": "b"}', "did you mean 'txt'? known: title, txt"),
        ("QP130", "other.jsonl", b'{"body": "a", "title": "b"}', "line has no 'text'"),
        ("QP130", "null.jsonl", b'{"text": null}', "'text' is not a string"),
        ("QP230", "short.txt", b"w1 w2 w3", "short.txt: QP230 has 3 tokens, one sequence takes 16"),
        ("QP132", "data.csv", b"w1", "nothing reads '.csv' files"),
        ("QP132", "data.JSONLL", b"w1", "did you mean '.jsonl'?"),
        ("QP301", "data.pt", b"w1", "pickled data"),
    ],
)
def test_bad_data_is_named(model: Path, tmp_path: Path, code: str, name: str, content: bytes | None, says: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    assert says in raised(code, read_rows, model, tmp_path, name)


def test_settings_that_mean_nothing_are_refused(model: Path, tmp_path: Path) -> None:
    assert "'split' means nothing" in raised("QP105", read_rows, model, tmp_path, "a.jsonl", split="train")
    assert "'field' means nothing" in raised("QP105", read_rows, model, tmp_path, "a.txt", field="text")


def test_a_folder_without_text_and_a_model_without_tokenizer(model: Path, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/a.csv").write_text("w1")
    assert "the folder has no .txt" in raised("QP130", read_rows, model, tmp_path, "folder")
    (tmp_path / "a.txt").write_text(TEXT)
    assert "the tokenizer cannot be loaded" in raised("QP222", read_rows, make_bare(model, tmp_path / "m"), tmp_path, "a.txt")


# text the model writes


@pytest.fixture(scope="module")
def writer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama that chats."""
    folder = make_model(tmp_path_factory.mktemp("writer") / "model", "<s> $A", TEMPLATE, bos_token_id=1, eos_token_id=2)
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig.from_pretrained(folder)).save_pretrained(folder)
    return folder


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QUANTPLAN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache/self"


def test_a_model_writes_its_own(writer: Path, cache: Path, tmp_path: Path) -> None:
    steps: list[tuple[int, int]] = []
    settings = Calibration(samples=5, sequence_length=24)
    before = torch.random.get_rng_state()
    data = read_calibration(settings, writer, tmp_path, lambda done, total: steps.append((done, total)))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert data.input_ids.shape == (5, 24) and data.source == "self" and data.notes == ()
    assert data.input_ids[:, 0].tolist() == [1] * 5 and len({tuple(r) for r in rows(data)}) == 5
    assert data.input_ids[:, 1].tolist()[1::2] == [3, 3]  # a user's turn
    assert steps[-1] == (120, 120) and steps == sorted(steps)
    [file] = cache.iterdir()

    steps.clear()
    again = read_calibration(settings, writer, tmp_path, lambda done, total: steps.append((done, total)))
    assert (again.hash, steps) == (data.hash, [])
    file.write_bytes(b"damaged")
    assert read_calibration(settings, writer, tmp_path).hash == data.hash
    other = read_calibration(Calibration(samples=5, sequence_length=24, seed=1), writer, tmp_path)
    assert not torch.equal(other.input_ids, data.input_ids) and len(list(cache.iterdir())) == 2


def test_the_cache_tells_models_of_one_shape_apart(writer: Path, cache: Path, tmp_path: Path) -> None:
    settings = Calibration(samples=2, sequence_length=8)
    twin = make_model(tmp_path / "twin", "<s> $A", TEMPLATE, bos_token_id=1, eos_token_id=2)
    torch.manual_seed(1)
    LlamaForCausalLM(LlamaConfig.from_pretrained(twin)).save_pretrained(twin)
    for model in (writer, twin):
        read_calibration(settings, model, tmp_path)
    assert len(list(cache.iterdir())) == 2


def test_a_cache_that_cannot_be_written_is_no_reason_to_stop(
    writer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("QUANTPLAN_CACHE", str(tmp_path / "file"))
    assert read_calibration(Calibration(samples=2, sequence_length=8), writer, tmp_path).samples == 2


def test_a_model_that_cannot_write_is_named(writer: Path, cache: Path, tmp_path: Path) -> None:
    settings = Calibration(samples=2, sequence_length=8)
    silent = make_model(tmp_path / "silent")
    LlamaForCausalLM(LlamaConfig.from_pretrained(silent)).save_pretrained(silent)
    assert "which token begins a text" in raised("QP134", read_calibration, settings, silent, tmp_path)
    config = json.loads((writer / "config.json").read_text())
    broken = make_model(tmp_path / "broken", "<s> $A")
    (broken / "model.safetensors").write_bytes((writer / "model.safetensors").read_bytes())
    (broken / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 2}))
    assert "tensors are missing" in raised("QP221", read_calibration, settings, broken, tmp_path)
    (broken / "config.json").write_text(json.dumps(config))
    model = LlamaForCausalLM.from_pretrained(broken)
    model.model.norm.weight.data[:] = float("nan")
    model.save_pretrained(broken)
    assert "writes no text" in raised("QP222", read_calibration, settings, broken, tmp_path)
    assert list(cache.iterdir() if cache.exists() else []) == []


# the whole


def test_importing_is_cheap() -> None:
    code = "import sys, quantplan.calibration.read, quantplan.calibration.written; "
    code += "assert not {'torch', 'transformers', 'datasets', 'pyarrow'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.engine
def test_on_smollm2(tmp_path: Path) -> None:
    """The first sequences are those that `eval` cuts, and a choice of 64 takes about a second."""
    from quantplan.evaluation.text import token_windows

    smollm2, shared = os.environ.get("QUANTPLAN_SMOLLM2"), os.environ.get("QUANTPLAN_SHARED")
    if not smollm2 or not shared:
        pytest.skip("set QUANTPLAN_SMOLLM2 and QUANTPLAN_SHARED")
    wiki = Path(shared) / "data/wikitext-2-raw/wiki.test.raw"
    windows = token_windows(wiki, smollm2, 512, 64)
    first = read_calibration(Calibration(source=wiki.name, samples=64, shuffle=False), Path(smollm2), wiki.parent)
    assert torch.equal(first.input_ids, windows)
    write_lines(tmp_path / "wiki.jsonl", [{"text": line} for line in wiki.read_text().split("\n") if line.strip()])
    data = read_calibration(Calibration(source="wiki.jsonl", samples=64), Path(smollm2), tmp_path)
    assert data.input_ids.shape == (64, 512) and data.counted > 32_000
    assert read.ENOUGH < read.CHOICE
