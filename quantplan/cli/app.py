"""The application: every command by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import typer

from quantplan import __version__
from quantplan.cli import inspecting, measures, plans, registries, runs, training

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


COMMANDS: dict[str, Callable[..., int]] = {
    "apply": runs.apply,
    "train": training.train,
    "calibrate": runs.calibrate,
    "validate": plans.validate,
    "explain": plans.explain,
    "diff": plans.diff,
    "estimate": plans.estimate,
    "verify": runs.verify,
    "inspect": inspecting.inspect,
    "eval": measures.evaluate,
    "compare": measures.compare,
    "schemes": registries.schemes,
    "algorithms": registries.algorithms,
    "transforms": registries.transforms,
    "kernels": registries.kernels,
    "codes": registries.codes,
    "schema": registries.schema,
    "shapes": plans.shapes,
}
for name, command in COMMANDS.items():
    app.command(name)(command)
