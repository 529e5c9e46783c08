"""The key-value cache of a plan, bound to a checkpoint: which modules fill it, and who cannot hold or run it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from quantplan.errors import Path, Problem, Severity, listing
from quantplan.format import FORMATS
from quantplan.headers import Checkpoint
from quantplan.kv_cache import KVCache
from quantplan.models.modules import Module, text_config
from quantplan.observer import ObserverConfig
from quantplan.plan.activations import build_observer
from quantplan.plan.lint import engines_of
from quantplan.plan.schema import Plan
from quantplan.scheme import SCHEMES

KEY = "kv_cache"
# what is projected to keys and values, and which of the two; latent attention caches neither
PROJECTIONS = {"k_proj": ("k_scale",), "v_proj": ("v_scale",), "qkv_proj": ("k_scale", "v_scale")}
LATENT = ("kv_a_proj_with_mqa", "kv_b_proj")
AWAY = ("vision and audio towers", "multi-token-prediction heads")


def bind_cache(
    plan: Plan, checkpoint: Checkpoint, modules: Mapping[str, Module], problems: list[Problem], in_memory: bool = False
) -> KVCache | None:
    """The plan's key-value cache for a checkpoint; None where it has none. Adds what is wrong with it to `problems`."""
    if plan.kv_cache is None:
        return None
    text, path = text_config(checkpoint.config), (KEY,)
    attentions = list(dict.fromkeys(name for name, _, _ in projections(modules)))
    reason = _unfit(checkpoint, modules, attentions)
    heads = text.get("num_key_value_heads") or text.get("num_attention_heads")
    if reason is None and plan.kv_cache.granularity == "head" and not isinstance(heads, int):
        reason = "config.json does not say how many heads its keys have"
    if reason is not None:
        problems.append(Problem("QP123", f"the key-value cache cannot be quantized: {reason}", "leave kv_cache out", path, True))
        return None
    first = next(module for name, module, _ in projections(modules) if name == attentions[0])
    dtype = plan.output.dtype or first.dtype
    scheme = SCHEMES.get(plan.kv_cache.scheme).model_validate(
        {"granularity": "tensor", "dynamic": False, "scale_dtype": dtype if dtype in ("bfloat16", "float16") else "bfloat16"}
    )
    observer = build_observer(plan.kv_cache.observer or "minmax", scheme)
    if not isinstance(observer, ObserverConfig):
        return None  # said where the plan was read
    by_head = heads if plan.kv_cache.granularity == "head" else None
    cache = KVCache(scheme, by_head, tuple(attentions), observer)
    if not in_memory:
        problems += _held(plan, cache, path)
    return cache


def projections(modules: Mapping[str, Module]) -> Iterator[tuple[str, Module, tuple[str, ...]]]:
    """(attention module, a projection in it, which scales belong to that) for the language model's attentions."""
    for name, module in modules.items():
        parent, _, part = name.rpartition(".")
        if part in PROJECTIONS and not (module.keep and module.keep.name in AWAY):
            yield parent, module, PROJECTIONS[part]


def _unfit(checkpoint: Checkpoint, modules: Mapping[str, Module], attentions: list[str]) -> str | None:
    latent = [name for name in modules if name.rpartition(".")[2] in LATENT]
    if checkpoint.config.get("is_encoder_decoder"):
        return "models with an encoder keep two of them"
    if latent:
        return f"{listing(latent)} make latent attention, which caches neither keys nor values"
    if not attentions:
        return f"no module has {', '.join(PROJECTIONS)}"
    found = {name: {s for a, _, scales in projections(modules) if a == name for s in scales} for name in attentions}
    odd = [name for name in attentions if len(found[name]) < 2]
    return f"{listing(odd)} have no values of their own" if odd else None


def _held(plan: Plan, cache: KVCache, path: Path) -> Iterator[Problem]:
    output = FORMATS.get(plan.output.format)
    reason = output().refuse_cache(cache)
    if reason:
        yield Problem("QP115", f"format '{output.name}' cannot hold this: {reason}", path=path)
    severity: Severity = "note" if plan.engines is None else "error"
    for engine in engines_of(plan):
        refusal = engine.refuse_cache(cache) if output.name in engine.formats and not output.own_reader else None
        if refusal:
            yield Problem("QP116", f"{engine.name} cannot run this: {refusal}", path=path, severity=severity)
