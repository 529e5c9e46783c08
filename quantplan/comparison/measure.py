"""What loading and running one model costs, measured in a process of its own: `python -m quantplan.comparison.measure REQUEST`.

The request is JSON on the command line, the answer one JSON document on standard output: figures, or problems.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from quantplan.comparison.machine import processor
from quantplan.comparison.timing import Spread, spread, timed, waits_for
from quantplan.engine.progress import peak_memory
from quantplan.errors import QuantplanError, fail

if TYPE_CHECKING:
    from torch import Tensor

WARM_UP = 2  # runs that are not counted
STATES = ("past_key_values", "cache_params")  # what models call the state that a next token takes


@dataclass(frozen=True)
class Settings:
    """What is run. `prompt_tokens` and `new_tokens` a run; `threads` None: as many as torch takes; `dtype`: a torch dtype's name;
    `device` None: cuda where there is one."""

    prompt_tokens: int = 128
    new_tokens: int = 32
    runs: int = 5
    threads: int | None = None
    dtype: str = "float32"
    device: str | None = None


@dataclass(frozen=True)
class Speed:
    """Latency of a phase: of the whole prompt in `prefill`, of one token in `decode`. `tokens`: in a run."""

    tokens: int
    runs: int
    median_ms: float
    p10_ms: float
    p90_ms: float
    tokens_per_second: float  # at the median


@dataclass(frozen=True)
class Cost:
    """What a model costs. Bytes of resident memory, with Python's and torch's own; on a GPU, of its memory that tensors take."""

    load_seconds: float
    memory_loaded: int
    peak_memory: int
    prefill: Speed
    decode: Speed
    machine: dict[str, Any]


def measure(model: str, settings: Settings) -> Cost:
    """Loads the model in directory `model` and runs it, greedily, `runs` times after a warm-up. The process should be a fresh
    one: its high-water mark is the peak. Loading is timed with packages imported, until the model has run on two tokens.

    Raises QuantplanError where it cannot be opened (QP2xx to QP4xx), is too short for the tokens (QP105), or has no key-value
    cache (QP240).
    """
    import torch

    from quantplan.engine.memory import return_memory
    from quantplan.evaluation.metrics import check_ids
    from quantplan.evaluation.opened import local, open_model
    from quantplan.hf.load import model_class

    if settings.threads:
        torch.set_num_threads(settings.threads)
    device = settings.device or ("cuda" if torch.cuda.is_available() else "cpu")
    wait = waits_for(device)
    checkpoint = local(model)
    model_class(checkpoint.config)
    vocabulary = int({**checkpoint.config, **(checkpoint.config.get("text_config") or {})}.get("vocab_size") or 2)
    total = settings.prompt_tokens + settings.new_tokens
    tokens = torch.randint(vocabulary, (1, total), generator=torch.Generator().manual_seed(0))
    check_ids(checkpoint, tokens)
    opened: list[Any] = []
    seconds = timed(lambda: opened.append(open_model(checkpoint, getattr(torch, settings.dtype), device, packed=True)), wait)
    return_memory()
    loaded = _memory(device)
    prompt = tokens[:, : settings.prompt_tokens].to(device)
    with torch.inference_mode():
        for _ in range(WARM_UP):
            _run(opened[0], prompt, min(2, settings.new_tokens), wait)
        runs = [_run(opened[0], prompt, settings.new_tokens, wait) for _ in range(settings.runs)]
    prefill, decode = spread([first for first, _ in runs]), spread([s for _, steps in runs for s in steps])
    return Cost(
        load_seconds=seconds,
        memory_loaded=loaded,
        peak_memory=_peak(device),
        prefill=_speed(settings.prompt_tokens, settings.prompt_tokens, settings.runs, prefill),
        decode=_speed(1, settings.new_tokens, settings.runs, decode),
        machine=_machine(device),
    )


def _run(model: Any, prompt: Tensor, new_tokens: int, wait: Any) -> tuple[float, list[float]]:
    """Seconds of a prompt `[1, tokens]`, and of each of the new tokens after it."""
    state: dict[str, Any] = {}
    newest = prompt

    def step() -> None:
        nonlocal newest
        output = model(newest, use_cache=True, **state)
        state.update({name: output[name] for name in STATES if output.get(name) is not None})
        newest = output.logits[:, -1:].argmax(-1)

    first = timed(step, wait)
    if not state:
        raise fail(
            "QP240", f"{type(model).__name__} returns no key-value cache to decode with", "compare it with 'quantplan eval'"
        )
    return first, [timed(step, wait) for _ in range(new_tokens)]


def _speed(tokens_each: int, tokens: int, runs: int, found: Spread) -> Speed:
    return Speed(tokens, runs, **asdict(found), tokens_per_second=1000 * tokens_each / found.median_ms)


def _memory(device: str) -> int:
    import psutil
    import torch

    return torch.cuda.memory_allocated(device) if device.startswith("cuda") else psutil.Process().memory_info().rss


def _peak(device: str) -> int:
    import torch

    return torch.cuda.max_memory_allocated(device) if device.startswith("cuda") else peak_memory()


def _machine(device: str) -> dict[str, Any]:
    """What the figures were measured on, and with."""
    import torch

    from quantplan.checkpoint.provenance import versions

    found = versions()
    names = ("torch", "transformers", "quantplan")
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else processor()
    return {
        "processor": name,
        "cores": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        **{name: found.get(name, "") for name in names},
    }


def main() -> int:
    """Answers the request on the command line; whatever libraries print goes to standard error."""
    answer = os.dup(1)
    os.dup2(2, 1)
    request = json.loads(sys.argv[1])
    try:
        result: dict[str, Any] = asdict(measure(request["model"], Settings(**request["settings"])))
    except QuantplanError as error:
        result = {"problems": [p.as_dict() for p in error.problems]}
    with open(answer, "w", encoding="utf-8") as out:
        json.dump(result, out, allow_nan=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
