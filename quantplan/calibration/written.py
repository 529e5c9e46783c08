"""The source `self`: text that the model writes, sampled from its own distribution and kept in the user's cache.

As in LLM-QAT (Liu et al., 2023) and Self-calibration (Williams et al., 2025): from the token that begins a text, every
next token is drawn from what the model predicts, at temperature 1 and from the whole vocabulary. Where the tokenizer has a
chat template, every other sequence begins where a user's turn begins, so that the model writes both sides of a chat. Nothing
stops at an end-of-sequence token: what follows one in the training data follows it here.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantplan.calibration.tokens import TOKENS, Encoder, stored_ids
from quantplan.checkpoint.durable import digest
from quantplan.errors import Problem, QuantplanError, fail, printable
from quantplan.headers import Checkpoint, read_checkpoint
from quantplan.plan.calibration import KEY
from quantplan.plan.schema import Calibration

if TYPE_CHECKING:
    from torch import Tensor

RECIPE = 1  # of this file's text; what is cached of another one is not read
BATCH = 32  # sequences written at once
BLOCKS, BLOCK = 64, 4096  # of each file of weights, what tells two models of one shape apart
SIDE_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
MARK = "xQxQx"  # stands for a user's words in a chat template

OnStep = Callable[[int, int], None]


def written(
    settings: Calibration,
    model: Path,
    length: int,
    begin: Sequence[int],
    on_step: OnStep | None = None,
    device: str | None = None,
    trust_remote_code: bool = False,
) -> list[list[int]]:
    """`settings.samples` sequences of `length` tokens that the model in the directory `model` writes: read from the cache, or
    written now and cached. `begin`: ids that may begin a text where the tokenizer adds none, best first.

    The same model, settings, versions and kind of device give the same tokens, as far as the device computes alike twice.
    Raises QP134 (nothing to begin with), QP222 (the model cannot be loaded or write), QP221 (weights missing), QP404.
    """
    import torch

    where = device or ("cuda" if torch.cuda.is_available() else "cpu")
    checkpoint = read_checkpoint(model)
    path = cache_folder() / f"{_key(settings, checkpoint, length, torch.device(where).type)}.safetensors"
    with contextlib.suppress(QuantplanError):  # not there, or damaged: written again
        cached = stored_ids(path)
        if cached.shape == (settings.samples, length):
            return _rows(cached)
    encoder = Encoder.of(model, trust_remote_code)
    starts = _starts(encoder, begin, length)
    ids = _write(settings, _opened(checkpoint, where, trust_remote_code), starts, length, on_step, checkpoint.source)
    _keep(path, ids)
    return _rows(ids)


def cache_folder() -> Path:
    """Where sequences are kept: `QUANTPLAN_CACHE`, or `quantplan` in the user's cache directory."""
    base = os.environ.get("QUANTPLAN_CACHE") or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "quantplan")
    return Path(base).expanduser() / "self"


def _rows(ids: Tensor) -> list[list[int]]:
    rows: list[list[int]] = ids.tolist()
    return rows


def _key(settings: Calibration, checkpoint: Checkpoint, length: int, device: str) -> str:
    """A name for everything the text depends on. Of the weights, headers and some blocks: fine-tuned models share headers."""
    import torch
    import transformers

    folder, found = checkpoint.require_path(), hashlib.sha256()
    said = (RECIPE, torch.__version__, transformers.__version__, device, settings.samples, settings.seed, length)
    found.update(repr((*said, sorted(checkpoint.header_hashes.items()))).encode())
    found.update("".join(digest(folder, [name]) or "-" for name in SIDE_FILES).encode())
    for file in checkpoint.files:
        with open(folder / file, "rb", buffering=0) as weights:
            size = os.fstat(weights.fileno()).st_size
            for block in range(BLOCKS):
                found.update(os.pread(weights.fileno(), BLOCK, size * block // BLOCKS))
    return found.hexdigest()


def _keep(path: Path, ids: Tensor) -> None:
    """Writes the cache's file, whole or not at all. A cache that cannot be written costs time, and is no reason to stop."""
    from safetensors.torch import save

    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        part = tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.stem[:16]}.", delete=False)  # noqa: SIM115
        try:
            with part:
                part.write(save({TOKENS: ids}))
            os.replace(part.name, path)
        except BaseException:
            os.unlink(part.name)
            raise


def _starts(encoder: Encoder, begin: Sequence[int], length: int) -> list[list[int]]:
    """What sequences begin with, by turns: a text, and a user's turn of a chat. Raises QP134 where there is nothing."""
    text = list(encoder.specials.prefix) or list(begin[:1])
    starts = [start for start in (text, _user_turn(encoder)) if start and len(start) < length]
    if not starts:
        message = "neither tokenizer nor config says which token begins a text"
        raise QuantplanError(Problem("QP134", message, "name a source of text", (KEY, "source")))
    return starts


def _write(
    settings: Calibration, model: Any, starts: Sequence[Sequence[int]], length: int, on_step: OnStep | None, name: str
) -> Tensor:
    import torch

    counts = [len(range(place, settings.samples, len(starts))) for place in range(len(starts))]
    total, done, kinds = settings.samples * length, 0, []
    for kind, (start, count) in enumerate(zip(starts, counts, strict=True)):
        parts = []
        for first in range(0, count, BATCH):
            size = min(BATCH, count - first)
            with torch.random.fork_rng():
                torch.manual_seed(_seed(settings.seed, kind, first))
                try:
                    parts.append(_sampled(model, start, size, length, _told(on_step, done, size, total)))
                except (RuntimeError, ValueError, TypeError, AttributeError, LookupError) as error:  # a model's own code
                    raise _failed("writes no text", error, name) from error
            done += size * length
        kinds.append(torch.cat(parts) if parts else torch.empty(0, length, dtype=torch.int64))
    made = torch.empty(settings.samples, length, dtype=torch.int64)
    for place, ids in enumerate(kinds):  # text and chat by turns, so that the first few are of both kinds
        made[place :: len(kinds)] = ids
    return made


def _seed(*parts: int) -> int:
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=7).digest(), "big")


def _told(on_step: OnStep | None, done: int, size: int, total: int) -> OnStep | None:
    """Progress of one batch as progress of the whole."""
    return None if on_step is None else lambda tokens, _: on_step(done + size * tokens, total)


def _user_turn(encoder: Encoder) -> list[int]:
    """The ids of a chat up to where the user's first words begin; empty without a chat template that takes a user's words."""
    tokenizer = encoder.tokenizer
    if not getattr(tokenizer, "chat_template", None):
        return []
    try:
        text = tokenizer.apply_chat_template([{"role": "user", "content": MARK}], tokenize=False)
    except Exception:  # noqa: BLE001 - templates raise whatever they like
        return []
    head, found, _ = text.partition(MARK)
    return list(tokenizer(head, add_special_tokens=False).input_ids) if found and head else []


def _opened(checkpoint: Checkpoint, device: str, trust_remote_code: bool) -> Any:
    """The model in bfloat16, in eval mode on `device`."""
    import torch
    import transformers

    from quantplan.live.skeleton import model_class

    try:
        opened: Any = model_class(checkpoint.config).from_pretrained(
            checkpoint.require_path(), dtype=torch.bfloat16, trust_remote_code=trust_remote_code, output_loading_info=True
        )
        model, found = opened[0].eval().to(device), opened[1]
        # its own would cut the distribution (top_k), bend it (repetition_penalty) and stop at eos
        model.generation_config = transformers.GenerationConfig(
            do_sample=True, temperature=1.0, top_k=0, top_p=1.0, pad_token_id=0
        )
    except Exception as error:
        raise _failed("cannot be loaded", error, checkpoint.source) from error
    missing = sorted(found["missing_keys"])
    if missing:
        text = f"{len(missing)} of the model's tensors are missing"
        raise fail("QP221", text, "is the checkpoint complete?", file=checkpoint.source, tensor=missing[0])
    return model


def _sampled(model: Any, start: Sequence[int], size: int, length: int, on_step: OnStep | None) -> Tensor:
    """Sequences int64 `[size, length]` that begin with `start`."""
    import torch
    from transformers import StoppingCriteria, StoppingCriteriaList

    class Told(StoppingCriteria):
        """Stops nothing, and says how far it is."""

        def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
            if on_step is not None:
                on_step(input_ids.shape[1], length)
            return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    ids = torch.tensor([list(start)] * size, device=model.device)
    with torch.no_grad():
        made: Tensor = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=length - len(start),
            stopping_criteria=StoppingCriteriaList([Told()]),
        )
    return made.cpu()


def _failed(what: str, error: Exception, name: str) -> QuantplanError:
    import torch

    reason = printable(str(error).strip().split("\n")[0] or type(error).__name__)
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return fail("QP404", f"no memory for the whole model: {reason}", "name a source of text", file=name)
    return fail("QP222", f"{what}: {reason}", "name a source of text", file=name)
