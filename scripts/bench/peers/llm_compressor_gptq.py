"""llm-compressor's GPTQ on the same token ids.

usage: python llm_compressor_gptq.py MODEL OUT IDS BITS GROUP SYMMETRIC, with a Python that has llmcompressor

IDS: safetensors with `input_ids` [sequences, length].
"""

import sys

from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import GPTQModifier
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer


def main(model, out, ids, bits, group, symmetric):
    """Quantizes every linear layer but the head, as quantplan does by default."""
    rows = load_file(ids)["input_ids"].tolist()
    weights = QuantizationArgs(
        num_bits=int(bits), type="int", symmetric=symmetric == "true", strategy="group", group_size=int(group)
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    oneshot(
        model=AutoModelForCausalLM.from_pretrained(model, dtype="auto"),
        tokenizer=AutoTokenizer.from_pretrained(model),
        dataset=Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]}),
        recipe=GPTQModifier(config_groups={"all": scheme}, ignore=["lm_head"]),
        max_seq_length=len(rows[0]),
        num_calibration_samples=len(rows),
        output_dir=out,
        save_compressed=True,
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
