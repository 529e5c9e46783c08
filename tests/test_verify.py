"""`verify` finds every flipped bit, every missing or extra tensor, and measures each layer's error."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import checkpoints
import pytest
import torch
from safetensors.torch import load_file, save_file

from quantplan.cli import run
from quantplan.engine.apply import apply
from quantplan.engine.verify import verify
from quantplan.errors import QuantplanError
from quantplan.headers import read_checkpoint, read_header
from quantplan.scheme import SCHEMES

ASYMMETRIC = {"scheme": "int8", "symmetric": False}
PLAN = {"default": {"wq": "int4", "group_size": 32}, "overrides": [{"pattern": "*.down_proj", "wq": ASYMMETRIC}]}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("verify")
    model = checkpoints.llama(folder / "model", shards=2)
    apply(model, PLAN, folder / "out")
    return model, folder / "out"


@pytest.fixture
def copy(made: tuple[Path, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(made[1], tmp_path / "copy"))


def codes(out: Path, *arguments: object) -> list[str]:
    return [p.code for p in verify(out, *arguments).problems]  # type: ignore[arg-type]


def test_an_output_is_as_recorded(made: tuple[Path, Path]) -> None:
    found = verify(made[1], made[0], PLAN)
    assert found.ok and found.tensors == len(read_checkpoint(made[1]).tensors)
    assert len(found.layers) == 14


def test_one_flipped_bit_is_found_in_every_tensor(copy: Path) -> None:
    path = copy / "model.safetensors"
    infos, _ = read_header(path)
    data = path.read_bytes()
    for info in infos:
        at = info.start + info.size // 2
        path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        (problem,) = verify(copy).problems
        assert (problem.code, problem.place.tensor) == ("QP801", info.name)


def test_one_flipped_bit_is_found_in_the_header_and_in_other_files(copy: Path) -> None:
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        data = bytearray((copy / name).read_bytes())
        at = data.index(b'"') + 1
        data[at] ^= 1
        (copy / name).write_bytes(data)
        assert verify(copy).problems, name
        data[at] ^= 1
        (copy / name).write_bytes(data)
    assert verify(copy).ok


def test_missing_and_extra_tensors_are_named(copy: Path, made: tuple[Path, Path]) -> None:
    tensors = load_file(copy / "model.safetensors")
    del tensors["model.norm.weight"]
    tensors["stray"] = torch.zeros(3)
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    found = {p.code: p.place.tensor for p in verify(copy, made[0]).problems if p.place.tensor}
    assert found == {"QP802": "model.norm.weight", "QP803": "stray"}


def test_another_plan_or_source_is_noticed(made: tuple[Path, Path], tmp_path: Path) -> None:
    out = made[1]
    assert codes(out, None, {"default": {"wq": "int8"}}) == ["QP804"]
    other = checkpoints.llama(tmp_path / "other", tied=True)
    assert "QP804" in codes(out, other)


def test_a_changed_copy_is_noticed_even_where_the_record_agrees(copy: Path, made: tuple[Path, Path]) -> None:
    """A run that copied wrongly would record its own hash: only the source tells."""
    import hashlib

    infos = {t.name: t for t in read_header(copy / "model.safetensors")[0]}
    info = infos["model.norm.weight"]
    data = bytearray((copy / "model.safetensors").read_bytes())
    data[info.start] ^= 1
    (copy / "model.safetensors").write_bytes(data)
    record = json.loads((copy / "quantplan.json").read_text())
    record["tensors"]["model.norm.weight"] = hashlib.sha256(data[info.start : info.end]).hexdigest()
    (copy / "quantplan.json").write_text(json.dumps(record))
    assert verify(copy).ok
    assert codes(copy, made[0]) == ["QP801"]


def test_errors_of_layers_are_those_of_the_scheme(made: tuple[Path, Path]) -> None:
    model, out = made
    layers = {e.name: e for e in verify(out, model).layers}
    weights = {k: v for p in model.glob("*.safetensors") for k, v in load_file(p).items()}
    for name in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"):
        weight = weights[f"{name}.weight"].float()
        asymmetric = name.endswith("down_proj")
        config = SCHEMES.get("int8")(symmetric=False) if asymmetric else SCHEMES.get("int4")(group_size=32)
        error = config.quantizer().fake_quantize(weight) - weight
        assert layers[name].largest == pytest.approx(error.abs().max().item(), rel=1e-5)
        assert layers[name].snr == pytest.approx((10 * (weight.square().sum() / error.square().sum()).log10()).item(), abs=1e-3)


def test_a_directory_without_a_record_is_refused(made: tuple[Path, Path]) -> None:
    with pytest.raises(QuantplanError, match="QP220"):
        verify(made[0])


def test_the_command_ends_with_one_on_a_finding(copy: Path, made: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["verify", str(copy), "--source", str(made[0])]) == 0
    assert "all as record and source say" in capsys.readouterr().out
    (copy / "tokenizer.json").write_text("{}")
    assert run(["verify", str(copy), "--json"]) == 1
    document = json.loads(capsys.readouterr().out)
    assert not document["ok"] and document["problems"][0]["place"]["file"] == "tokenizer.json"
