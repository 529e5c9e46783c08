"""Documents do not rot: every code, scheme, algorithm, format and command has its place, and each code is raised somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import quantplan
from quantplan.algorithm import ALGORITHMS
from quantplan.errors import EXIT_STATUS, code_pages
from quantplan.format import FORMATS
from quantplan.scheme import SCHEMES
from quantplan.transform import TRANSFORMS

PACKAGE = Path(quantplan.__file__).parent
ROOT = PACKAGE.parent
SOURCE = "".join(p.read_text() for p in PACKAGE.rglob("*.py"))


def test_codes_in_the_source_are_the_codes_with_pages() -> None:
    raised = set(re.findall(r"QP\d{3}", SOURCE))
    assert raised - set(code_pages()) == set(), "raised without a page"
    assert set(code_pages()) - raised == set(), "a page for a code that nothing raises"


@pytest.mark.parametrize("page", code_pages().values(), ids=lambda p: p.code)
def test_a_page_says_something(page: object) -> None:
    assert len(page.text) > 40 and page.code[2] in EXIT_STATUS  # type: ignore[attr-defined]


def test_every_name_is_documented() -> None:
    schemes = (ROOT / "docs/schemes.md").read_text()
    for member in (*SCHEMES, *ALGORITHMS):
        assert f"\n## {member.name}\n" in schemes
    choice = (ROOT / "docs/algorithms.md").read_text()
    for algorithm in ALGORITHMS:
        assert f"\n| `{algorithm.name}` |" in choice
    pages = (ROOT / "docs/transforms.md").read_text()
    for transform in TRANSFORMS:
        assert f"\n## transform {transform.name}\n" in schemes and f"| `{transform.name}` |" in pages
    everything = "".join(p.read_text() for p in (ROOT / "docs").glob("*.md")) + (ROOT / "README.md").read_text()
    for name in FORMATS.names():
        assert f"`{name}`" in everything


def test_every_command_is_documented() -> None:
    from quantplan.cli.app import COMMANDS

    commands = (ROOT / "docs/commands.md").read_text()
    for name in COMMANDS:
        assert f"\n## quantplan {name}\n" in commands


def test_the_readme_names_every_file_of_the_package_top_level() -> None:
    readme = (ROOT / "README.md").read_text()
    for path in PACKAGE.iterdir():
        if (path.suffix == ".py" and not path.name.startswith("__")) or (path.is_dir() and (path / "__init__.py").exists()):
            assert path.stem in readme, path.name
