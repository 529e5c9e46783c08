"""Perplexity, KL divergence from a reference and agreement with it, of models on one text.

At position t a model gives the next token the probabilities q_t; p_t are the reference's. Over all N windows of L tokens:

    perplexity = exp(-sum ln q_t[token t+1] / (N (L - 1)))      the last position of a window predicts nothing
    KL         = sum_t sum_v p_t[v] (ln p_t[v] - ln q_t[v]) / (N L)         Kullback and Leibler, 1951; nats per token
    top-1      = share of the N L positions where argmax p_t = argmax q_t
    top-5      = share of the N L positions where argmax q_t is among the five most probable tokens of p_t
    ratio      = perplexity of the model / perplexity of the reference
"""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from quantplan.errors import fail
from quantplan.evaluation.interval import margin
from quantplan.evaluation.layers import OutputError, OutputErrors
from quantplan.evaluation.opened import local, open_model
from quantplan.evaluation.text import check_sizes, token_windows
from quantplan.headers import Checkpoint

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Source = str | os.PathLike[str]
CHUNK = 256  # positions whose probabilities are held at once, in float32


FIGURES = ("perplexity", "perplexity_ratio", "kl", "top1", "top5")


@dataclass(frozen=True)
class Evaluation:
    """What was measured of one model. `kl`, `top1`, `top5` and `perplexity_ratio` are None without a reference.

    The errors are standard errors of the figures over windows (None with one window), taking windows as independent: those of
    perplexity and ratio are their own times that of the mean log-likelihood, or of its difference window by window. `kl` in
    nats per token, `seconds` from loading the model to its last window, with the reference's passes. `layers` is empty unless
    it was asked for.
    """

    model: str
    perplexity: float
    kl: float | None
    top1: float | None
    tokens: int  # in all windows
    windows: int
    dtype: str  # what it was computed in
    seconds: float
    perplexity_error: float | None = None
    kl_error: float | None = None
    top1_error: float | None = None
    top5: float | None = None
    top5_error: float | None = None
    perplexity_ratio: float | None = None
    perplexity_ratio_error: float | None = None
    layers: tuple[OutputError, ...] = ()

    def margin(self, figure: str) -> float | None:
        """Half the width of the 95 % confidence interval of one of FIGURES; None where it has no standard error."""
        return margin(getattr(self, f"{figure}_error"), self.windows)

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for `--json`, with the 95 % confidence `intervals` of what has a standard error; every number is finite."""
        margins = {figure: (getattr(self, figure), self.margin(figure)) for figure in FIGURES}
        intervals = {name: [value - m, value + m] for name, (value, m) in margins.items() if m is not None}
        return {**asdict(self), "seconds": round(self.seconds, 3), "intervals": intervals}


def evaluate(
    models: Source | Iterable[Source],
    data: Source | Tensor,
    reference: Source | None = None,
    windows: int | None = None,
    length: int = 1024,
    dtype: torch.dtype | None = None,
    device: str | None = None,
    on_step: Callable[[str, int, int], None] | None = None,
    layers: bool = False,
) -> list[Evaluation]:
    """Measures each model (a directory or Hub id) on the same text, against `reference` where it is given.

    `data` is a file as `token_windows` reads it, or token ids, int64 `[n, tokens]`, where `length` changes nothing. Text is
    tokenized by the reference's tokenizer, or without a reference by each model's own. `dtype` None: float32 where the
    format allows it, else bfloat16; `device` None: cuda where there is one. `on_step(model, windows done, windows in all)` is
    called after each window. Two models at most are in memory, the reference and one other. `layers`: also the error of every
    block's and linear's output, which holds the reference's outputs of a window in memory.

    Raises QuantplanError: `layers` without a reference (QP105), data (QP105, QP130, QP301), a model that cannot be opened
    (QP2xx to QP4xx), token ids or vocabularies that do not fit (QP131), results that are not finite (QP601).
    """
    import torch

    check_sizes(length, windows)
    if layers and reference is None:
        raise fail("QP105", "errors of layers are measured beside a reference", "give the float model as reference")
    sources = [models] if isinstance(models, str | os.PathLike) else list(models)
    if not sources:
        return []
    opened = [local(source) for source in sources]
    base = None if reference is None else local(reference)
    tokenizers = [(base or each).require_path() for each in opened]
    ids = {t: _ids(data, t, length, windows) for t in dict.fromkeys(tokenizers)}  # every mistake in the data, before models
    for each in [*opened, *([base] if base else [])]:
        check_ids(each, ids[(base or each).require_path()])
    where = device or ("cuda" if torch.cuda.is_available() else "cpu")
    judge = open_model(base, dtype, where) if base else None
    done, total = 0, sum(len(ids[t]) for t in tokenizers)
    results = []
    for each, tokenizer in zip(opened, tokenizers, strict=True):
        start = time.monotonic()
        same = base is not None and each.require_path().resolve() == base.require_path().resolve()
        model: Any = judge if same else open_model(each, dtype, where)
        outputs = OutputErrors(judge, model) if layers and not same else None
        sums = []
        for window in _measure(model, judge, ids[tokenizer].to(where), each.source, outputs):
            sums.append(window)
            done += 1
            if on_step is not None:
                on_step(each.source, done, total)
        kind = str(model.dtype).removeprefix("torch.")
        found = outputs.result() if outputs else ()
        del model, outputs  # before the next is opened
        results.append(_summary(each.source, sums, ids[tokenizer], base is not None, kind, time.monotonic() - start, found))
    return results


def _ids(data: Source | Tensor, tokenizer: Source, length: int, windows: int | None) -> Tensor:
    if isinstance(data, str | os.PathLike):
        return token_windows(data, tokenizer, length, windows)
    if data.ndim != 2 or data.shape[1] < 2 or data.shape[0] < max(1, windows or 1) or data.dtype.is_floating_point:
        message = f"data of shape {list(data.shape)} and {data.dtype} are not {windows or 'any'} windows of token ids"
        raise fail("QP130", message, "give int64 [windows, length]")
    if int(data.min()) < 0:
        raise fail("QP130", f"the data has the negative token id {int(data.min())}", "token ids count from 0")
    return data[:windows].long()


def check_ids(checkpoint: Checkpoint, ids: Tensor) -> None:
    """Raises QP131 for ids outside the vocabulary, QP105 for windows longer than the model's positions; both from config."""
    text = checkpoint.config.get("text_config")
    config = {**checkpoint.config, **(text if isinstance(text, dict) else {})}
    vocabulary, largest = config.get("vocab_size"), int(ids.max())
    if isinstance(vocabulary, int) and largest >= vocabulary:
        message = f"the data has token id {largest:,}, the vocabulary {vocabulary:,}"
        raise fail("QP131", message, "use data made by the tokenizer of this model", file=checkpoint.source)
    positions = config.get("max_position_embeddings", config.get("n_positions"))
    if isinstance(positions, int) and ids.shape[1] > positions > 0:
        message = f"a window of {ids.shape[1]:,} tokens is longer than the model's {positions:,} positions"
        raise fail("QP105", message, f"give a length of {positions} or less", file=checkpoint.source)


@dataclass(frozen=True)
class _Sums:
    """Sums over the positions of one window; all but `nll` are 0 without a reference."""

    nll: float
    reference_nll: float
    kl: float
    agree: float
    among_five: float


def _measure(model: Any, judge: Any, ids: Tensor, name: str, outputs: OutputErrors | None) -> Iterator[_Sums]:
    """The sums of each window of `ids` `[windows, length]`. Raises QP131, QP601."""
    import torch

    for number, window in enumerate(ids, 1):
        with torch.no_grad(), outputs.watching() if outputs else contextlib.nullcontext():
            p: Any = None if judge is None else judge(window[None]).logits[0]
            q: Any = p if judge is model else model(window[None]).logits[0]
        if p is not None and p.shape != q.shape:
            message = f"a vocabulary of {q.shape[-1]:,}, the reference has {p.shape[-1]:,}"
            raise fail("QP131", message, "compare a model with the one it was made from", file=name)
        sums = window_sums(q, window, p)
        if not all(map(math.isfinite, vars(sums).values())):
            message = f"window {number} gives a log-likelihood or KL that is not finite"
            raise fail("QP601", message, "look for NaN and infinity with 'quantplan verify', or try another dtype", file=name)
        yield sums


def window_sums(q: Tensor, window: Tensor, p: Tensor | None) -> _Sums:
    """Negative log-likelihood, KL and agreements of a window `[length]`, from logits `q` and the reference's `p`, both
    `[length, vocabulary]`. Probabilities in float32, sums in float64. A token is among the five most probable where fewer than
    five are more probable."""
    import torch

    nll = reference_nll = kl = agree = among_five = 0.0
    for at in range(0, len(window), CHUNK):
        log_q = torch.log_softmax(q[at : at + CHUNK].float(), -1)
        target = window[at + 1 : at + CHUNK + 1, None]
        nll -= log_q[: len(target)].gather(1, target).double().sum().item()
        if p is None:
            continue
        log_p = torch.log_softmax(p[at : at + CHUNK].float(), -1)
        reference_nll -= log_p[: len(target)].gather(1, target).double().sum().item()
        share = log_p.exp()
        terms = torch.where(share == 0, 0, share * (log_p - log_q))  # the limit of x ln x, where both are minus infinity
        kl += terms.sum(-1).double().sum().item()
        best = log_q.argmax(-1, keepdim=True)
        agree += (log_p.argmax(-1, keepdim=True) == best).sum().item()
        among_five += ((log_p > log_p.gather(1, best)).sum(-1) < 5).sum().item()
    return _Sums(nll, reference_nll, kl, agree, among_five)


def _summary(
    name: str, sums: Sequence[_Sums], ids: Tensor, judged: bool, dtype: str, seconds: float, layers: tuple[OutputError, ...]
) -> Evaluation:
    windows, length = ids.shape
    perplexity, perplexity_error = _exponential(_mean([s.nll / (length - 1) for s in sums]), "perplexity", name)
    found: dict[str, float | None] = {"kl": None, "top1": None}
    if judged:
        found["kl"], found["kl_error"] = _mean([s.kl / length for s in sums])
        found["top1"], found["top1_error"] = _mean([s.agree / length for s in sums])
        found["top5"], found["top5_error"] = _mean([s.among_five / length for s in sums])
        difference = _mean([(s.nll - s.reference_nll) / (length - 1) for s in sums])
        found["perplexity_ratio"], found["perplexity_ratio_error"] = _exponential(difference, "the perplexity's ratio", name)
    return Evaluation(
        model=name, perplexity=perplexity, perplexity_error=perplexity_error, tokens=ids.numel(), windows=windows, dtype=dtype,
        seconds=seconds, layers=layers, **found,
    )  # fmt: skip


def _exponential(mean: tuple[float, float | None], what: str, name: str) -> tuple[float, float | None]:
    """exp(mean) and its standard error, from a mean and its own. Raises QP601 where it is no number any more."""
    log, error = mean
    if log > 700:
        raise fail("QP601", f"{what} is exp({log:,.0f}), too large for a number", "the model is broken", file=name)
    return math.exp(log), None if error is None else math.exp(log) * error


def _mean(values: Sequence[float]) -> tuple[float, float | None]:
    """The mean, and its standard error: None for one value."""
    mean = math.fsum(values) / len(values)
    if len(values) < 2:
        return mean, None
    variance = math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1)
    return mean, math.sqrt(variance / len(values))
