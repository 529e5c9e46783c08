"""Checkpoints opened as models that compute logits."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from quantplan.checkpoint.provenance import NAME as RECORD
from quantplan.engine.apply import with_weights
from quantplan.errors import QuantplanError, fail, printable
from quantplan.headers import Checkpoint, read_checkpoint

if TYPE_CHECKING:
    import torch


def local(model: str | os.PathLike[str]) -> Checkpoint:
    """The checkpoint's headers, checked, and its weights on this machine (a Hub id is fetched). Raises QP2xx to QP4xx."""
    return with_weights(read_checkpoint(model))


def open_model(checkpoint: Checkpoint, dtype: torch.dtype | None = None, device: str = "cpu", packed: bool = False) -> Any:
    """The causal language model of a checkpoint, in eval mode on `device`, having run once on two tokens.

    Without a `dtype`: float32 where the format allows it, else bfloat16. `packed`: what quantplan wrote is opened by
    `quantplan.load`, with weights as narrow in memory as they are stored, and not by its format's own reader. No code of the
    checkpoint runs.
    Raises QuantplanError: QP222 (it cannot be loaded or run), QP221 (weights missing: they would be random), QP405 (a
    package is missing).
    """
    import torch

    refused: Exception | None = None
    for chosen in (torch.float32, torch.bfloat16) if dtype is None else (dtype,):
        try:
            with contextlib.redirect_stderr(io.StringIO()):  # bars of compressed-tensors, which no setting switches off
                return _run_once(_load(checkpoint, chosen, packed).eval().to(device))
        except QuantplanError:
            raise
        except Exception as error:  # noqa: BLE001 - a format's refusal of float32 has no type of its own
            refused = error if refused is None else refused
    assert refused is not None
    reason = printable(str(refused).strip().split("\n")[0] or type(refused).__name__)
    if isinstance(refused, ImportError):
        advice = "install what is missing; quantplan[compressed-tensors] reads compressed-tensors checkpoints"
        raise fail("QP405", reason, advice, file=checkpoint.source) from refused
    advice = "does transformers know this model, as a causal language model in this format?"
    raise fail("QP222", f"cannot be loaded: {reason}", advice, file=checkpoint.source) from refused


def _load(checkpoint: Checkpoint, dtype: torch.dtype, packed: bool) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    path = checkpoint.require_path()
    options: dict[str, Any] = {}
    method, zero_points = _quantization(checkpoint.config)
    if method == "quantplan" or ((zero_points or (packed and method)) and (path / RECORD).exists()):
        from quantplan import load

        return load(path, dtype=dtype)
    if zero_points:  # the compressed-tensors package opens packed zero points only when told to dequantize
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        config.quantization_config["dequantize"] = True
        options["config"] = config
    opened: Any = AutoModelForCausalLM.from_pretrained(
        path, dtype=dtype, trust_remote_code=False, output_loading_info=True, **options
    )
    model, found = opened
    missing = sorted(found["missing_keys"])
    if missing:
        text = f"{len(missing)} of the model's tensors are missing"
        raise fail("QP221", text, "is the checkpoint complete?", file=checkpoint.source, tensor=missing[0])
    return model


def _quantization(config: Mapping[str, Any]) -> tuple[str, bool]:
    """The quantization method a config names ("" for none), and whether it is compressed-tensors with zero points."""
    quantization = config.get("quantization_config")
    if not isinstance(quantization, Mapping):
        return "", False
    method, groups = str(quantization.get("quant_method", "")), quantization.get("config_groups")
    weights = [g.get("weights") for g in groups.values() if isinstance(g, Mapping)] if isinstance(groups, Mapping) else []
    zero_points = any(isinstance(w, Mapping) and w.get("type") == "int" and w.get("symmetric") is False for w in weights)
    return method, method == "compressed-tensors" and zero_points


def _run_once(model: Any) -> Any:
    """The model, after two tokens: some formats load in a dtype in which they do not compute."""
    import torch

    with torch.no_grad():
        model(torch.zeros(1, 2, dtype=torch.int64, device=model.device))
    return model
