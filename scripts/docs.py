"""Writes the documents that are made from code; with --check, ends with 1 when one of them is not current."""

import json
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

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
        if name == "train":
            from quantplan.training.settings import Training

            parts.append("What `--config FILE` may say; options of the command line come first.\n" + table(Training.model_fields))
    return "\n".join(parts)


def schemes() -> str:
    """Every scheme, algorithm and transform with its options."""
    from quantplan.algorithm import ALGORITHMS
    from quantplan.scheme import SCHEMES
    from quantplan.transform import TRANSFORMS

    what = "What a plan may write for `wq`, `aq`, `algorithm` and `transforms`, and their options."
    parts = [NOTE + f"# Schemes, algorithms and transforms\n\n{what}\n"]
    for registry in (SCHEMES, ALGORITHMS):
        parts += [section(member, member.plan_options()) for member in registry]
    parts += [section(member, member.plan_options(), "transform ") for member in TRANSFORMS]
    return "\n".join(parts)


def section(member: Any, options: Mapping[str, Any], kind: str = "") -> str:
    """One member of a registry: what its class says of itself, and a table of its options."""
    text = f"## {kind}{member.name}\n\n{' '.join((member.__doc__ or '').split())}\n"
    return text + table(options) if options else text


def table(options: Mapping[str, Any]) -> str:
    """Options with their defaults and meanings."""
    text = "\n| option | default | meaning |\n|---|---|---|\n"
    for name, field in options.items():
        default = "" if field.default is None else f"`{json.dumps(field.default)}`"
        text += f"| `{name}` | {default} | {' '.join((field.description or '').split())} |\n"
    return text


OBSERVERS = """# Observers

An observer turns a stream of tensors into a range, from which a scheme makes static quantization parameters.

```python
from quantplan import INT8Config, INT8Quantizer, MinMaxObserver
from quantplan.observer import OBSERVERS

quantizer = INT8Quantizer(INT8Config(symmetric=True))
observer = OBSERVERS.get("percentile")(percentile=99.9).observer()  # or MinMaxObserver()
quantizer.attach_observer(observer)
for batch, mask in data:
    observer.update(batch, mask)  # mask: which tokens count; NaN and infinity raise NonFinite
quantizer.calibrate_finish()  # quantize_activation now uses the range found

observer.merge(other)  # what another observer of the same options saw, on another device or process
tensors = observer.state()  # for safetensors; load_state takes them back
found = observer.result()  # Range: low, high
```

Under the names of torch.ao.quantization the same observers are modules with `dtype`, `qscheme`, `quant_min`, `quant_max` and
`reduce_range`: `observer(x)` returns `x`, `calculate_qparams()` gives torch's scale and zero point, `with_args` makes a factory.
They are {modules}.

| observer | for | order of batches, merging |
|---|---|---|
{rows}
"""


def observers() -> str:
    """Every observer with its options."""
    import quantplan
    from quantplan.observer import OBSERVERS as REGISTRY

    modules = ", ".join(f"`{name}`" for name in quantplan.__all__ if name.endswith("Observer"))
    rows = "\n".join(
        f"| [`{member.name}`](#{member.name}) | {member.use} | {'matters' if member.order_matters else 'the same, exactly'} |"
        for member in REGISTRY
    )
    parts = [NOTE + OBSERVERS.replace("{modules}", modules).replace("{rows}", rows)]
    return "\n".join([*parts, *(section(member, member.options()) for member in REGISTRY)])


def documents() -> dict[str, str]:
    """Path -> content of every generated document."""
    from quantplan.plan.json_schema import plan_schema

    return {
        "docs/commands.md": commands(),
        "docs/schemes.md": schemes(),
        "docs/observers.md": observers(),
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
