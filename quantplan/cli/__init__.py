"""The command line. Commands parse, call one function, and print; heavy imports are theirs, so that checking stays quick."""

from __future__ import annotations

import gc
import json
import os
import sys
from collections.abc import Sequence
from typing import Any

from quantplan.errors import QuantplanError, render

BUG = 70


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs a command and ends the process with its exit status (the README lists them)."""
    gc.set_threshold(100_000, 50, 100)  # imports and headers make many objects, and all stay: looking through them is in vain
    status = run(sys.argv[1:] if arguments is None else list(arguments))
    gc.freeze()  # nor on leaving
    sys.exit(status)


def run(arguments: list[str]) -> int:
    """Runs a command and returns its exit status. Standard output has the result, standard error everything else."""
    import typer

    from quantplan.cli.app import app
    from quantplan.cli.interrupt import Interrupted

    try:
        status = app(arguments, prog_name="quantplan", standalone_mode=False)
        sys.stdout.flush()
        return status if isinstance(status, int) else 0
    except QuantplanError as error:
        return _report(error, "--json" in arguments)
    except Interrupted as interrupted:
        print(f"interrupted; {interrupted.advice}", file=sys.stderr)
        return interrupted.exit_status
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except typer.Exit as stop:
        return stop.exit_code
    except typer.Abort:
        return 130
    except _usage_error() as error:
        error.show()
        return error.exit_code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # the reader is gone: nothing more to say, and no noise at exit
        return 0
    except MemoryError:
        print(
            "QP404 out of memory\n = help: use fewer --threads or samples, or a larger machine; the same command goes on",
            file=sys.stderr,
        )
        return 4
    except Exception:  # noqa: BLE001 - the last resort: a bug, said so
        import traceback

        traceback.print_exc()
        print("quantplan: this is a bug in quantplan; please report it with the lines above", file=sys.stderr)
        return BUG


def _usage_error() -> Any:
    """The base of click's errors: click's own, or that of the copy that recent typers carry."""
    import typer

    return typer.BadParameter.__mro__[2]


def _report(error: QuantplanError, as_json: bool) -> int:
    if as_json:
        print(json.dumps({"problems": [p.as_dict() for p in error.problems]}, indent=2))
    for problem in error.problems:
        print(render(problem), file=sys.stderr)
    return error.exit_status
