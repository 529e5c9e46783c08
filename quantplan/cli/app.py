"""The application: every command by name."""

from __future__ import annotations

from typing import Annotated

import typer

from quantplan import __version__
from quantplan.cli import plans, registries, runs

app = typer.Typer(
    name="quantplan",
    help="One checked plan turns any Hugging Face checkpoint into a quantized one that engines load.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"quantplan {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")] = False,
) -> None:
    """Options of every command."""


for command in (runs.apply, plans.validate, plans.explain, plans.diff, plans.estimate, runs.verify, runs.evaluate_command):
    app.command(name="eval" if command is runs.evaluate_command else None)(command)
for command in (registries.schemes, registries.algorithms, registries.codes, registries.schema, plans.shapes):
    app.command()(command)
