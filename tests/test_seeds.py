"""docs/seeds.md: what it names is there, it names all that the seeds do, and the seeds' snippets run."""

from __future__ import annotations

import ast
import inspect
import os
import re
import types
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import quantplan

ROOT = Path(quantplan.__file__).parents[1]
PAGE = (ROOT / "docs/seeds.md").read_text()
SEEDS = Path(os.environ["QUANTPLAN_SHARED"]) / "seeds" if "QUANTPLAN_SHARED" in os.environ else None
SECTIONS = {part[:3]: part for part in PAGE.split("\n## Seed ")[1:]}


def rows(section: str) -> list[list[str]]:
    """The cells of every row of the tables."""
    lines = [line for line in section.splitlines() if line.startswith("|")]
    cells = [[c.replace("\0", "|").strip() for c in line.replace("\\|", "\0").strip("|").split("|")] for line in lines]
    return [row for row in cells if row[0] != "word" and set(row[0]) != {"-"}]


@pytest.mark.parametrize("seed", ["000", "001", "002", "003", "004"])
def test_every_row_has_a_place_that_is_there(seed: str) -> None:
    found = rows(SECTIONS[seed])
    assert len(found) >= 12
    for row in found:
        assert len(row) == 3 and all(row), row
        for name in re.findall(r"`quantplan\.([A-Za-z_][\w.]*)", row[2]):
            place: Any = quantplan
            for part in name.split("."):
                assert hasattr(place, part), f"quantplan.{name}"
                place = getattr(place, part)
        for page in re.findall(r"\]\((\w+\.md)", row[2]):
            assert (ROOT / "docs" / page).exists(), page
        for path in re.findall(r"`((?:quantplan|tests)/[\w/.]+)`", row[2]):
            assert (ROOT / path).exists(), path
        for command in re.findall(r"`quantplan (\w+)", row[2]):
            from quantplan.cli.app import COMMANDS

            assert command in COMMANDS, command


def seed_text(seed: str) -> str:
    if SEEDS is None:
        pytest.skip("QUANTPLAN_SHARED is not set")
    (path,) = SEEDS.glob(f"{seed}_*.txt")
    return path.read_text()


@pytest.mark.parametrize("seed", ["000", "001", "002", "003", "004"])
def test_the_page_names_what_the_seed_names(seed: str) -> None:
    """What stands in backquotes, what is defined and what is imported."""
    text = seed_text(seed)
    prose = re.sub(r"```.*?```", "", text, flags=re.S)
    words = set(re.findall(r"`([^`\n]+)`", prose))
    for block in re.findall(r"```python\n(.*?)```", text, re.S):
        words |= set(re.findall(r"^\s*(?:class|def) (\w+)", block, re.M))
        for inside, after in re.findall(r"^from [\w.]+ import (?:\(([^)]*)\)|(.+))$", block, re.M):
            words |= {w.strip() for w in re.sub(r"#.*", "", inside or after).replace("\n", ",").split(",")} - {""}
    named = set(re.findall(r"`([^`]+)`", "\n".join(row[0] for row in rows(SECTIONS[seed]))))
    assert {w for w in words if w not in named} == set()


# --- snippets


class MyModel(nn.Module):
    """The seeds' model: a convolution with BatchNorm, an LSTM's worth of linear layers."""

    def __init__(self) -> None:
        super().__init__()
        for index in ("", "1"):
            setattr(self, f"conv{index}", nn.Conv2d(3, 3, 3, padding=1))
            setattr(self, f"bn{index}", nn.BatchNorm2d(3))
            setattr(self, f"relu{index}", nn.ReLU())
        self.depthwise_conv = nn.Conv2d(3, 3, 3, padding=1, groups=3)
        self.attention = nn.Sequential(nn.Linear(48, 48))
        self.fc = nn.Linear(48, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.relu(self.bn(self.conv(x)))
        x = self.depthwise_conv(self.relu1(self.bn1(self.conv1(x))))
        return self.fc(self.attention(x.flatten(1)))


def loader(shape: tuple[int, ...]) -> list[Any]:
    return [torch.randn(8, *shape) for _ in range(2)]


def blocks(seed: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", seed_text(seed), re.S)


REPLACED = (
    (
        r"from (?:alphaquant|qat_llm|ignitefp4_lib|torch\.ao\.quantization)[\w.]* import quantize_fx",
        "import quantplan.nn.graph as quantize_fx",
    ),
    (r"from (?:alphaquant|qat_llm|ignitefp4_lib|torch\.ao\.quantization)[\w.]* import", "from quantplan import"),
    (r"import torch\.ao\.quantization as quant\b", "import quantplan as quant"),
    (r"torch\.ao\.quantization\.", "quantplan."),
    (r"torch\.nn\.intrinsic\.qat\.", "quantplan."),
    (r"nn\.quantized\.FloatFunctional", "quantplan.FloatFunctional"),
    (r"import torch\.nn\.quantized as nnq\n", ""),
    (r"import torch\.nn\.quantized\.dynamic as nnqd\n", ""),
    (r"\n +\.\.\.$", "\n    pass"),
)
nnq = types.SimpleNamespace(
    Linear=quantplan.QuantLinear, Conv1d=quantplan.QuantConv, Conv2d=quantplan.QuantConv, Conv3d=quantplan.QuantConv,
    BatchNorm2d=nn.BatchNorm2d, ReLU=nn.ReLU, Embedding=quantplan.QuantEmbedding,
)  # fmt: skip
nnqd = types.SimpleNamespace(Linear=quantplan.QuantLinear, LSTM=quantplan.QuantRecurrent, GRU=quantplan.QuantRecurrent)


def run(code: str, **names: Any) -> dict[str, Any]:
    """A snippet, its imports changed."""
    for pattern, replacement in REPLACED:
        code = re.sub(pattern, replacement, code)
    space = {"torch": torch, "nn": nn, "quantplan": quantplan, "nnq": nnq, "nnqd": nnqd, **names}
    exec(compile(code, "snippet", "exec"), space)
    return space


@pytest.fixture(autouse=True)
def quiet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    torch.manual_seed(0)
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def matrices() -> dict[str, Any]:
    data = loader((64,))
    return {
        "weights": torch.randn(32, 64),
        "activations": data[0],
        "calibration_data": data,
        "new_data": data[1],
        **dict_of_configs(),
    }


def dict_of_configs() -> dict[str, Any]:
    return {n: getattr(quantplan, n) for n in ("INT8Config", "FP4Config", "FP8Config")}


@pytest.mark.parametrize("index", range(5))
def test_snippets_of_seed_001(index: int) -> None:
    found = run(blocks("001")[index], **matrices())
    assert "quantized" not in found or not torch.equal(found["quantized"], found["new_data"])


def test_the_plan_of_seed_001_loads() -> None:
    (plan,) = re.findall(r"```json\n(.*?)```", seed_text("001"), re.S)
    Path("plan.json").write_text(plan)
    assert (
        quantplan.load_plan("plan.json").plan.default.wq == {"scheme": "int8"} or quantplan.load_plan("plan.json").plan.default.wq
    )


def labelled(width: int) -> list[Any]:
    return [(x, torch.randint(5, (8,))) for x in loader((width,))]


@pytest.mark.parametrize("index", [0, 1, 3, 4])
def test_snippets_of_seed_002(index: int) -> None:
    code = blocks("002")[index]
    cut = "ONNX"  # not there yet: lines of the exporter are left out
    lines = [line for line in code.splitlines() if cut not in line and "exporter" not in line]
    model = nn.Sequential(nn.Linear(784, 32), nn.ReLU(), nn.Linear(32, 10))
    names: dict[str, Any] = {
        "trained_model": model,
        "original_model": model,
        "fake_quant_model": quantplan.apply_fake_quant_to_model(model),
        "real_quant_model": quantplan.convert_to_real_quant(model, bits=8),
        "calibration_loader": labelled(784),
        "test_loader": labelled(784),
    }
    run("\n".join(lines), **names)


def names_003() -> dict[str, Any]:
    """What the snippets take for granted."""
    images = loader((3, 4, 4))
    qconfigs = ("QConfig", "MinMaxObserver", "PerChannelMinMaxObserver", "HistogramObserver", "get_default_qconfig_mapping")
    model = MyModel()
    model(images[0])
    quantized = quantplan.quantize(MyModel().eval(), {"default": {"wq": "int8"}})
    prepared = MyModel()
    prepared.qconfig = quantplan.default_qat_qconfig  # type: ignore[assignment]
    return {
        **{n: getattr(quantplan, n) for n in qconfigs},
        "MyModel": MyModel,
        "model": prepared,
        "calibration_data": images,
        "calibration_loader": images,
        "train_loader": [(x, torch.randint(10, (8,))) for x in images],
        "warmup_data": images,
        "num_epochs": 1, "warmup_epochs": 1, "finetune_epochs": 1,
        "num_float_epochs": 1, "num_observer_epochs": 1, "num_qat_epochs": 3,
        "epoch": 1, "freeze_bn_epoch": 0, "float_lr": 1e-2,
        "criterion": nn.CrossEntropyLoss(),
        "optimizer": torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1),
        "float_model": model.eval(), "quantized_model": quantized, "input": images[0],
        "train_epochs": lambda model, epochs: model(images[0]),
        "train_one_epoch": lambda model: model(images[0]),
        "default_per_channel_weight_observer": quantplan.default_per_channel_weight_observer,
    }  # fmt: skip


USED = [3, 5, 7, 8, 9, 15, 16, 18, 19, 23, 24, 25, 26, 28, 29, 30, 31, 34, 35, 36, 37, 40, 41, 42]


def change(code: str, index: int) -> str:
    """What a snippet's placeholders stand for."""
    if index == 15:  # its input is of another size than ours
        return code.replace("torch.randn(1, 3, 224, 224)", "torch.randn(2, 3, 4, 4)")
    if index == 18:
        return code.replace(
            "model = fuse_modules(model, [['fc', 'relu']])", "model = fuse_modules(model.eval(), [['fc', 'relu1']])"
        )
    if index in (31, 32):
        return code.replace("weight=...", "weight=PerChannelMinMaxObserver").replace(
            "activation=...", "activation=MinMaxObserver"
        )
    if index == 25:  # the class itself is ours, its listing is checked below
        return code.split("class ")[0]
    if index == 26:
        return (
            code.replace("lfq = ", "from quantplan import _LearnableFakeQuantize\nlfq = ")
            .replace("model(batch)", "lfq(batch)")
            .replace("train_one_epoch(model)", "train_one_epoch(lfq)")
        )
    return code


@pytest.mark.parametrize("index", USED)
def test_snippets_of_seed_003(index: int) -> None:
    code, names = change(blocks("003")[index], index), names_003()
    found = run(code, **names)
    if index == 3:
        assert found["scale"].numel() == 1
    if index == 19:
        model = found["QuantizedModel"]()
        assert model(torch.randn(2, 10)).shape == (2, 10)
    if index in (40, 41, 42):
        pytest.importorskip("matplotlib")
        import matplotlib

        matplotlib.use("Agg")
        prepared = quantplan.prepare(names["model"].eval())
        for x in names["calibration_loader"]:
            prepared(x)
        if index == 40:
            found["plot_quantization_stats"](prepared)
        elif index == 41:
            assert isinstance(found["check_activation_outliers"](prepared, names["calibration_loader"]), list)
        else:
            theirs = found["compare_quantized_float"](names["float_model"], names["quantized_model"], names["input"])
            ours = quantplan.compare_quantized_float(names["float_model"], names["quantized_model"], names["input"])
            assert theirs.keys() == ours.keys()
            for name, figures in theirs.items():
                assert ours[name] == pytest.approx(figures, rel=1e-3, abs=1e-6), name


@pytest.mark.parametrize("index", [10, 11])
def test_whole_workflows_of_seed_003(index: int) -> None:
    model = MyModel()
    names = {**names_003(), "MyModel": lambda: model, "optimizer": None}
    found = run(blocks("003")[index], **names)
    assert isinstance(found["model"].fc, quantplan.QuantLinear) and isinstance(found["model"].conv, quantplan.QuantConv)
    found["model"](torch.randn(2, 3, 4, 4))


def test_residual_block_of_seed_003() -> None:
    code = blocks("003")[36].replace(
        "def __init__(self):", "def __init__(self):\n        super().__init__()"
    )  # the seed forgets it
    block = run(code)["QuantizableResidualBlock"]()
    block.conv1, block.conv2 = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1)
    block.bn1, block.bn2, block.relu = nn.BatchNorm2d(3), nn.BatchNorm2d(3), nn.ReLU()
    block.eval().qconfig = quantplan.default_qconfig
    x = torch.randn(2, 3, 4, 4)
    expected = block(x)
    prepared = quantplan.prepare(quantplan.fuse_modules(block, [["conv1", "bn1"], ["conv2", "bn2"]]))
    prepared(x)
    done = quantplan.convert(prepared)
    assert done.add_relu.output_fake_quant is not None
    assert nn.functional.mse_loss(done(x), expected) < 0.01 * expected.var()


LISTED = [1, 2, 4, 12, 13, 14, 25, 33, 38]


@pytest.mark.parametrize("index", LISTED)
def test_listings_of_seed_003_are_ours(index: int) -> None:
    """A class or function that the seed prints has these methods and takes these arguments here."""
    code = re.sub(r"^(\s+)\*\*", r"\1**", blocks("003")[index], flags=re.M)
    if index in (12, 13, 14):
        code += "    ..."
        code = code.replace("-> nn.Module\n    ...", "-> nn.Module: ...")
    for node in ast.parse(code).body:
        if isinstance(node, ast.ClassDef):
            ours = getattr(quantplan, node.name)
            for method in (n for n in node.body if isinstance(n, ast.FunctionDef)):
                if method.name == "_compute_quantization_error":  # in the registry's observer
                    continue
                assert hasattr(ours, method.name), method.name
                if method.name == "__init__":
                    assert_takes(ours.__init__, method)
        elif isinstance(node, ast.FunctionDef):
            assert_takes(getattr(quantplan, node.name), node)


def assert_takes(function: Callable[..., Any], listed: ast.FunctionDef) -> None:
    known = inspect.signature(function).parameters
    if any(p.kind is p.VAR_KEYWORD for p in known.values()):
        return
    arguments = {a.arg for a in listed.args.args} - {"self"}
    assert arguments - known.keys() <= {"model", "module"}, listed.name


def test_fake_quantize_of_seed_003_is_ours() -> None:
    """Forward as the seed's function, backward as its straight-through estimator."""
    theirs = run(blocks("003")[38])["fake_quantize_per_tensor_affine"]
    x = (torch.randn(50) * 3).requires_grad_()
    scale, zero = 0.05, 10
    ours = quantplan.fake_quantize_per_tensor_affine(x, scale, zero, 0, 255)
    torch.testing.assert_close(ours, theirs(x, scale, zero, 0, 255))
    ours.sum().backward()
    level = torch.round(x / scale) + zero
    assert x.grad is not None and torch.equal(x.grad, ((level >= 0) & (level <= 255)).float())
    estimator = run(
        blocks("003")[39],
        quantize=lambda x, scale, zero: torch.round(x / scale) + zero,
        dequantize=lambda x, scale, zero: (x - zero) * scale,
        clamp=torch.clamp,
    )["FakeQuantizeSTE"]
    y = x.detach().clone().requires_grad_()
    out = estimator.apply(y, torch.tensor(scale), 0, -128, 127)
    mine = quantplan.fake_quantize_per_tensor_affine(x2 := x.detach().clone().requires_grad_(), scale, 0, -128, 127)
    torch.testing.assert_close(mine, out)
    out.sum().backward()
    mine.sum().backward()
    assert torch.equal(x2.grad, y.grad)


def test_rules_of_seed_004() -> None:
    """The NNX snippets, with a torch model for the JAX one."""
    text = seed_text("004")
    assert "act_static_scale=True" in text and "sum_of_absmax" in text
    model = nn.Sequential()
    model.linear1, model.linear2 = nn.Linear(8, 8), nn.Linear(8, 2)
    rule = re.findall(r"rules = \[\n.*?\n +\]\n", text, re.S)[-1]
    space = run(re.sub(r"^ +", "", rule.replace("qwix.", "quantplan."), flags=re.M))
    qat = quantplan.quantize_model(model, quantplan.QatProvider(space["rules"]), torch.zeros(1, 8))
    assert {n: float(v) for n, v in quantplan.quant_stats(qat)["linear1"].items()} == {"count": 0, "sum_of_absmax": 0}
    qat.train()(torch.ones(1, 8))
    assert {n: float(v) for n, v in quantplan.quant_stats(qat)["linear1"].items()} == {"count": 1, "sum_of_absmax": 1}
