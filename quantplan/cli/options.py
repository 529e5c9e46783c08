"""Options that several commands have, each said once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

AsJson = Annotated[bool, typer.Option("--json", help="One JSON document on standard output.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")]
Threads = Annotated[int | None, typer.Option(min=1, help="Cores to use; all by default.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace OUT, in one step, when the new one is complete.")]
TrustRemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Run Python code that the checkpoint brings.")]
Events = Annotated[Path | None, typer.Option("--events", metavar="FILE", help="Append progress to FILE, one JSON object a line.")]
