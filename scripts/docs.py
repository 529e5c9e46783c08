"""Writes the documents that are made from code; with --check, ends with 1 when one of them is not current."""

import json
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NOTE = "<!-- made by scripts/docs.py; do not edit -->\n\n"


def commands() -> str:
    """The help of every command, as the terminal shows it."""
    from quantplan.cli.app import COMMANDS

    names = list(COMMANDS)
    parts = [NOTE + "# Commands\n"]
    for name in ["", *names]:
        arguments = [name] if name else []
        done = subprocess.run(
            [sys.executable, "-m", "quantplan", *arguments, "--help"],
            capture_output=True,
            text=True,
            check=True,
            env={"PATH": "/usr/bin:/bin", "COLUMNS": "100", "TERM": "dumb"},
            cwd=ROOT,
        )
        text = "\n".join(line.rstrip() for line in done.stdout.strip().splitlines())
        parts.append(f"## quantplan {name}".rstrip() + f"\n\n```text\n{text}\n```\n")
    return "\n".join(parts)


def schemes() -> str:
    """Every scheme and algorithm with its options."""
    from quantplan.algorithm import ALGORITHMS
    from quantplan.scheme import SCHEMES

    parts = [NOTE + "# Schemes and algorithms\n\nWhat a plan may write for `wq`, `aq` and `algorithm`, and their options.\n"]
    for registry in (SCHEMES, ALGORITHMS):
        for member in registry:
            text = " ".join((member.__doc__ or "").split())
            parts.append(f"## {member.name}\n\n{text}\n\n| option | default | meaning |\n|---|---|---|")
            for name, field in member.plan_options().items():
                default = "" if field.default is None else f"`{json.dumps(field.default)}`"
                parts[-1] += f"\n| `{name}` | {default} | {' '.join((field.description or '').split())} |"
            parts[-1] += "\n"
    return "\n".join(parts)


def documents() -> dict[str, str]:
    """Path -> content of every generated document."""
    from quantplan.plan.json_schema import plan_schema

    return {
        "docs/commands.md": commands(),
        "docs/schemes.md": schemes(),
        "docs/codes.md": NOTE + (ROOT / "quantplan/codes.md").read_text(),
        "configs/plan.schema.json": json.dumps(plan_schema(), indent=1) + "\n",
    }


def main() -> int:
    """Writes or checks."""
    check = "--check" in sys.argv[1:]
    stale = []
    for name, text in documents().items():
        path = ROOT / name
        if not path.exists() or path.read_text() != text:
            stale.append(name)
            if not check:
                path.parent.mkdir(exist_ok=True)
                path.write_text(text)
    for name in stale:
        print(f"{name} {'is not current: run scripts/docs.py' if check else 'written'}")
    links = broken_links()
    for link in links:
        print(f"broken link: {link}")
    return 1 if (check and stale) or links else 0


def broken_links() -> list[str]:
    """Relative links in the documents that lead nowhere."""
    found = []
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()) if page.exists() else ():
            if not (page.parent / target).exists():
                found.append(f"{page.relative_to(ROOT)} -> {target}")
    return found


if __name__ == "__main__":
    sys.exit(main())
