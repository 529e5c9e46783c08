"""The structure, held: imports point one way, members are imported by nobody, checking a plan never imports torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import quantplan
from quantplan.algorithm import ALGORITHMS
from quantplan.format import FORMATS
from quantplan.scheme import NOT_IN_PLANS, SCHEMES
from quantplan.transform import TRANSFORMS

ROOT = Path(quantplan.__file__).parent
# a file imports, at module level, only from its left
ORDER = (
    *(
        "errors",
        "registry",
        "numerics",
        "import_hook",
        "headers",
        "hub",
        "models",
        "tensor",
        "scheme",
        "schemes",
        "observer",
        "observers",
        "statistics",
        "algorithm",
        "scale_search",
    ),
    *(
        "algorithms",
        "kv_cache",
        "assignment",
        "transform",
        "transforms",
        "format",
        "formats",
        "engines",
        "faces",
        "diagnostics",
        "plan",
        "checkpoint",
        "estimate",
    ),
    *("explain", "live", "calibration", "engine", "gpu", "kernel", "kernels", "nn", "hf", "evaluation", "training"),
    *("comparison", "ptq", "inspection", "report", "cli", "__main__"),
)
HEAVY = {"torch", "transformers"}
LEAVES = ("schemes", "observers", "algorithms", "transforms", "formats", "kernels")
TORCH_FREE = ORDER[: ORDER.index("explain") + 1]


def imports(path: Path, module_level: bool) -> set[str]:
    """Full names of quantplan modules a file imports; type-checking imports do not count."""
    tree = ast.parse(path.read_text())
    skipped = {
        n
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for n in ast.walk(node)
    }
    nodes = ast.iter_child_nodes(tree) if module_level else ast.walk(tree)
    found = set()
    for node in nodes:
        if node in skipped:
            continue
        if isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found |= {f"{node.module}.{a.name}" for a in node.names}
        elif isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
    return found


def layer(name: str) -> str:
    parts = name.split(".")
    return parts[1] if parts[0] == "quantplan" and len(parts) > 1 else ""


FILES = sorted(p for p in ROOT.rglob("*.py") if p != ROOT / "__init__.py")


def test_every_file_has_its_layer() -> None:
    assert {p.relative_to(ROOT).parts[0].removesuffix(".py") for p in FILES} == set(ORDER)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_one_way(path: Path) -> None:
    own = path.relative_to(ROOT).parts[0].removesuffix(".py")
    for name in imports(path, module_level=True):
        other = layer(name)
        if other in ORDER and other != own:
            assert ORDER.index(other) < ORDER.index(own), f"{own} imports {name}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_nobody_imports_a_member(path: Path) -> None:
    own = path.relative_to(ROOT).parts[0].removesuffix(".py")
    members = {n for n in imports(path, module_level=False) if layer(n) in LEAVES and n.count(".") > 1}
    assert {n for n in members if layer(n) != own or n.split(".")[2] != path.stem} == set()


@pytest.mark.parametrize(
    "path",
    [p for p in FILES if p.relative_to(ROOT).parts[0].removesuffix(".py") in TORCH_FREE],
    ids=lambda p: str(p.relative_to(ROOT)),
)
def test_torch_is_imported_when_it_computes(path: Path) -> None:
    if path.name == "numerics.py":
        return
    heavy = {"torch", "transformers", "safetensors"}
    assert {n.split(".")[0] for n in imports(path, module_level=True)} & heavy == set()


@pytest.mark.parametrize(
    "command",
    [
        "validate PLAN",
        "validate PLAN --model MODEL",
        "explain PLAN --model MODEL",
        "diff PLAN PLAN --model MODEL",
        "estimate PLAN --model MODEL",
        "schemes",
        "schemes int4",
        "algorithms",
        "transforms",
        "transforms rotation",
        "codes",
        "schema",
        "--help",
        "apply MODEL PLAN -o x --dry-run",
    ],
)
def test_commands_on_plans_never_import_torch(command: str, tmp_path: Path) -> None:
    import models

    plan = tmp_path / "plan.yaml"
    plan.write_text("default: {wq: int4, group_size: 64}\n")
    shapes = models.write("llama", tmp_path)
    arguments = [{"PLAN": str(plan), "MODEL": str(shapes)}.get(a, a) for a in command.split()]
    code = f"import sys, quantplan.cli; s = quantplan.cli.run({arguments!r}); sys.exit(99 if {HEAVY} & set(sys.modules) else s)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_importing_quantplan_is_cheap() -> None:
    code = "import sys, quantplan; assert not {'torch', 'transformers', 'pydantic', 'rich'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_public_names_are_complete_sorted_and_importable() -> None:
    assert list(quantplan._NAMES) == sorted(quantplan._NAMES)
    for name in quantplan.__all__:
        assert getattr(quantplan, name) is not None
    with pytest.raises(AttributeError):
        quantplan.no_such_name  # noqa: B018


def test_a_scheme_option_is_never_called_like_a_key_of_a_rule() -> None:
    reserved = {"pattern", "wq", "aq", "algorithm", "keep", "optional", "expect", "scheme", "name", "dynamic"}
    for registry in (SCHEMES, ALGORITHMS, TRANSFORMS):
        for member in registry:
            assert not reserved & set(member.plan_options()), member.name  # type: ignore[attr-defined]
    assert {"dtype", "dynamic"} == NOT_IN_PLANS


def test_registries_hold_what_the_documents_say() -> None:
    assert SCHEMES.names() == [
        "fp4",
        "fp8",
        "int2",
        "int3",
        "int4",
        "int5",
        "int6",
        "int7",
        "int8",
        "mxfp4",
        "mxfp6",
        "mxfp8",
        "nf4",
        "nvfp4",
    ]
    assert ALGORITHMS.names() == ["autoround", "awq", "gptq", "hqq", "rtn"]
    assert TRANSFORMS.names() == ["awq", "bias_correction", "rotation", "smoothquant"]
    assert FORMATS.names() == ["compressed-tensors", "quantplan"]
