"""llm-compressor's GPTQ on the same token ids.

usage: python llm_compressor_calibrated.py MODEL OUT IDS SCHEME, with a Python that has llmcompressor

IDS: safetensors with `input_ids` [sequences, length]. SCHEME: JSON, the weights and input_activations of a compressed-tensors
scheme, or its name; with `smoothquant`, a strength, SmoothQuant goes before.
"""

import json
import sys

from compressed_tensors.quantization import QuantizationScheme, preset_name_to_scheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import GPTQModifier
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer


def main(model, out, ids, wanted):
    """Quantizes every linear layer but the head, as quantplan does by default."""
    rows = load_file(ids)["input_ids"].tolist()
    wanted = json.loads(wanted)
    strength = wanted.pop("smoothquant", None)
    name = wanted.pop("preset", None)
    scheme = preset_name_to_scheme(name, ["Linear"]) if name else QuantizationScheme(targets=["Linear"], **wanted)
    recipe = [GPTQModifier(config_groups={"all": scheme}, ignore=["lm_head"])]
    if strength is not None:
        from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier

        recipe.insert(0, SmoothQuantModifier(smoothing_strength=strength))
    oneshot(
        model=AutoModelForCausalLM.from_pretrained(model, dtype="auto"),
        tokenizer=AutoTokenizer.from_pretrained(model),
        dataset=Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]}),
        recipe=recipe,
        max_seq_length=len(rows[0]),
        num_calibration_samples=len(rows),
        output_dir=out,
        save_compressed=True,
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
