"""The transformers model of a checkpoint without its weights: every parameter on the meta device, every buffer real."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import initialization

from quantplan.errors import fail
from quantplan.headers import FLOAT_DTYPES, Checkpoint, read_checkpoint


def model_class(config: Mapping[str, Any]) -> Any:
    """transformers' class for the first architecture a config names; an automatic one where it knows none, or where the
    checkpoint brings code of its own."""
    named = getattr(transformers, str((config.get("architectures") or [""])[0]), None)
    known = isinstance(named, type) and issubclass(named, transformers.PreTrainedModel)
    brought = config.get("auto_map") or {}
    if known and not brought:
        return named
    automatic = (getattr(transformers, str(key), None) for key in brought if str(key).startswith("AutoModelFor"))
    return next((found for found in automatic if found is not None), transformers.AutoModelForCausalLM)


def skeleton(
    path: str | os.PathLike[str], trust_remote_code: bool = False, dtype: torch.dtype | None = None
) -> transformers.PreTrainedModel:
    """The model in directory `path`, in eval mode, of the class its config names. Parameters are on the meta device, in the
    dtype that `from_pretrained(path, dtype=dtype)` gives them (None: what the checkpoint says), and not tied to each other:
    `Weights` knows which stored tensor each is made of. Buffers are real. Experts are computed one at a time.

    Raises QP222 where transformers cannot build it.
    """
    checkpoint = read_checkpoint(path)
    folder = checkpoint.require_path()
    kind = model_class(checkpoint.config)
    try:
        with _quiet():
            config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
            dtype = dtype or _stored_dtype(config, checkpoint)
            config._experts_implementation = "eager"
            for part in (config, *(getattr(config, name) for name in config.sub_configs)):
                if part is not None and hasattr(part, "use_cache"):
                    part.use_cache = False
            context = (torch.device("meta"), initialization.no_tie_weights(), initialization.meta_device_safe_creation_ops())
            with contextlib.ExitStack() as stack:
                for manager in context:
                    stack.enter_context(manager)
                model = _build(kind, config, dtype, trust_remote_code)
            _fill_buffers(model, folder)
    except (ImportError, ValueError, AttributeError, KeyError, NotImplementedError) as error:
        text = f"transformers cannot build the model: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
        raise fail("QP222", text, "calibration needs the model's code; 'rtn' does without", file=str(folder)) from error
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        if not parameter.is_meta:  # made in a way that no device context reaches
            owner, last = owner_of(model, name)
            parameter = owner._parameters[last] = nn.Parameter(parameter.to("meta"), requires_grad=False)
        parameter.requires_grad_(False)
        if parameter.is_floating_point() and _stays_float32(model, name, dtype):
            parameter.data = parameter.data.float()
    return model.eval()


def _build(kind: Any, config: Any, dtype: torch.dtype, trust_remote_code: bool) -> Any:
    if isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel):
        return kind._from_config(config, dtype=dtype)
    return kind.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """transformers reports what it finds odd in a config; the checkpoint was looked at already."""
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(before)


def _stored_dtype(config: Any, checkpoint: Checkpoint) -> torch.dtype:
    """What `dtype="auto"` means: the config's dtype, else that of the first float in the first file."""
    if getattr(config, "dtype", None) is not None:
        return config.dtype if isinstance(config.dtype, torch.dtype) else getattr(torch, config.dtype)
    ordered = sorted(checkpoint.tensors.values(), key=lambda t: (t.file, t.start))
    stored = next((FLOAT_DTYPES[t.dtype] for t in ordered if t.dtype in FLOAT_DTYPES), "float32")
    return getattr(torch, stored)


def _stays_float32(model: Any, name: str, dtype: torch.dtype) -> bool:
    import re

    kept = model._get_dtype_plan(dtype)
    return any(re.search(pattern.replace("*", ".*"), name) for pattern in kept)


def _fill_buffers(model: Any, folder: Path) -> None:
    """Buffers as transformers sets them after loading: those of no use before, then `_init_weights`, which leaves alone the
    parameters that are marked. Raises QP222 for one that is set nowhere but in a constructor that ran on meta."""
    for parameter in model.parameters():
        parameter._is_hf_initialized = True
    unset = []
    for name, buffer in list(model.named_buffers(remove_duplicate=False)):
        if buffer.device.type == "meta":
            owner, _, last = name.rpartition(".")
            nothing = torch.nan if buffer.is_floating_point() else 0
            model.get_submodule(owner)._buffers[last] = torch.full_like(buffer, nothing, device="cpu")
            unset.append(name)
    model.initialize_weights()
    persistent = model.state_dict().keys()
    for name in unset:
        buffer = model.get_buffer(name)
        if name not in persistent and buffer.is_floating_point() and buffer.numel() and torch.isnan(buffer).all():
            text = f"the model's code sets the buffer '{name}' in its constructor alone, where nothing is computed yet"
            raise fail("QP222", text, "use an algorithm without calibration, such as rtn", file=str(folder))


def owner_of(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that holds the parameter or buffer `name`, and the attribute it is."""
    parent, _, last = name.rpartition(".")
    return model.get_submodule(parent), last
