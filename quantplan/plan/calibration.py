"""Calibration settings, as far as they can be judged without data: the source's name, and what the model's config says."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import PurePath
from typing import Any

from quantplan.errors import Problem, did_you_mean, printable
from quantplan.headers import PICKLES
from quantplan.models.modules import text_config
from quantplan.plan.schema import SELF, Calibration

TEXTS = (".txt", ".text", ".raw", ".md")
ROWS = (".jsonl", ".json", ".parquet")
TOKEN_IDS = ".safetensors"
EXTENSIONS = (*TEXTS, *ROWS, TOKEN_IDS)
KEY = "calibration"
# a word whose ending is all letters is meant as a file; a version such as `.1` or `-v1` ends a data set's name
_ENDING = re.compile(r"\.[A-Za-z]+$")
# models whose config has a vocabulary, and whose first input is something else
OTHER_INPUTS = {
    **dict.fromkeys(("whisper", "speech_to_text", "speecht5", "wav2vec2", "wav2vec2-bert", "wav2vec2-conformer"), "audio"),
    **dict.fromkeys(
        ("hubert", "wavlm", "unispeech", "unispeech-sat", "sew", "sew-d", "moonshine", "moonshine_streaming"), "audio"
    ),
    **dict.fromkeys(("mctct", "data2vec-audio", "seamless_m4t", "seamless_m4t_v2", "parakeet_ctc", "encodec", "clap"), "audio"),
    **dict.fromkeys(("clip", "siglip", "siglip2", "align", "altclip", "chinese_clip", "groupvit", "xclip"), "images"),
    **dict.fromkeys(
        (
            "blip",
            "blip-2",
            "instructblip",
            "flava",
            "owlvit",
            "owlv2",
            "vision-encoder-decoder",
            "trocr",
            "pix2struct",
            "donut-swin",
        ),
        "images",
    ),
}
# how transformers' architectures that write text are called
GENERATES = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration", "WithLMHeadModel")
# position embeddings of these begin behind the padding token's own
PADDED_POSITIONS = {
    "roberta",
    "xlm-roberta",
    "xlm-roberta-xl",
    "roberta-prelayernorm",
    "camembert",
    "data2vec-text",
    "longformer",
}


def extension(source: str) -> str:
    """The ending of a source that is meant as a file, in lower case; empty for a folder, a data set's name or `self`."""
    name = PurePath(source).name
    found = _ENDING.search(name)
    return found[0].lower() if found else ""


def check_source(settings: Calibration) -> Iterator[Problem]:
    """What is wrong with a source whatever is in it: an ending nobody reads (QP132), pickles (QP301), and settings that the
    source has no use for (QP105)."""
    ending, path = extension(settings.source), (KEY, "source")
    if ending in PICKLES:
        yield Problem("QP301", "pickled data, which can run code when opened", "save it as .jsonl or .safetensors", path)
    elif ending and ending not in EXTENSIONS:
        yield Problem("QP132", f"nothing reads '{printable(ending)}' files", did_you_mean(ending, EXTENSIONS), path)
        return
    for key, used in (
        ("subset", not ending and settings.source != SELF),
        ("split", not ending and settings.source != SELF),
        ("field", ending in ROWS or (not ending and settings.source != SELF)),
    ):
        if key in settings.model_fields_set and not used:
            yield Problem("QP105", f"'{key}' means nothing for this source", "leave it out", (KEY, key), True)


def check_fit(settings: Calibration, config: Mapping[str, Any]) -> Iterator[Problem]:
    """What a model's config.json has against the settings: it reads no text, or cannot write any (QP134), or has fewer
    positions than a sequence has tokens (QP133)."""
    kind, path = printable(str(config.get("model_type", "?")), 60), (KEY, "source")
    inputs = OTHER_INPUTS.get(kind)
    if inputs is None and not {"text_config", "vocab_size"} & config.keys() and {"image_size", "num_channels"} & config.keys():
        inputs = "images"
    if inputs:
        message = f"{kind} takes {inputs}: models that do not read text alone cannot be calibrated yet"
        yield Problem("QP134", message, "leave calibration out", (KEY,))
        return
    if settings.source == SELF and not writes_text(config):
        names = ", ".join(printable(str(name), 60) for name in config.get("architectures") or ())
        message = f"{kind} ({names or 'no architecture named'}) writes no text of its own"
        yield Problem("QP134", message, "name a source of text", path)
    most = positions(config)
    if most and settings.sequence_length > most and "sequence_length" in settings.model_fields_set:
        message = f"sequences of {settings.sequence_length:,} tokens are longer than the model's {most:,} positions"
        yield Problem("QP133", message, f"give {most} or less", (KEY, "sequence_length"))


def check_default(settings: Calibration | None, config: Mapping[str, Any]) -> Iterator[Problem]:
    """Notes on a plan that takes calibration and names no source: the model writes the text itself (QP237), or cannot (QP134).
    Statistics that were collected before do without either."""
    if settings is None and config.get("architectures"):  # shapes alone name none
        refused = [replace(p, severity="note") for p in check_fit(Calibration(), config)]
        if refused:
            yield from refused
            return
    if settings is None or "source" not in settings.model_fields_set:
        text = "the plan names no calibration data, so the model writes some itself, which takes longer and fits less well"
        yield Problem("QP237", text, "say calibration: FILE to use yours", (KEY,) if settings else (), severity="note")


def writes_text(config: Mapping[str, Any]) -> bool:
    """Whether transformers' class for the checkpoint continues a text."""
    names = [str(name) for name in config.get("architectures") or ()]
    return any(name.endswith(GENERATES) for name in names) and not config.get("is_encoder_decoder")


def positions(config: Mapping[str, Any]) -> int | None:
    """The longest sequence the model has positions for; None where nothing limits it."""
    text = text_config(config)
    if "relative_attention_num_buckets" in text:  # T5 keeps an `n_positions` that it does not use
        return None
    for key in ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length"):
        most = text.get(key)
        if isinstance(most, int) and most > 0:
            padding = text.get("pad_token_id")
            offset = (padding if isinstance(padding, int) else 1) + 1 if text.get("model_type") in PADDED_POSITIONS else 0
            return most - offset
    return None


def length_for(settings: Calibration, config: Mapping[str, Any]) -> int:
    """Tokens in a sequence: what the plan says, or the default as far as the model's positions reach."""
    most = positions(config)
    if most is None or "sequence_length" in settings.model_fields_set:
        return settings.sequence_length
    return max(2, min(settings.sequence_length, most))
