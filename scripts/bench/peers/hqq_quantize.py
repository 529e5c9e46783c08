"""HQQ: float zero points fitted to weights, no data.

usage: python hqq_quantize.py MODEL OUT BITS GROUP, with a Python that has hqq

The output holds the dequantized weights, which any loader opens.
"""

import sys

import torch
from hqq.core.quantize import Quantizer
from transformers import AutoModelForCausalLM, AutoTokenizer


def main(out_of, out, bits, group):
    """Quantizes every linear layer but the head, along rows as engines want it."""
    model = AutoModelForCausalLM.from_pretrained(out_of, dtype="auto")
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            weight = module.weight.data
            codes, meta = Quantizer.quantize(weight, int(bits), group_size=int(group), axis=1, device="cpu", bitpack=False)
            module.weight.data = Quantizer.dequantize(codes, {**meta, "compute_dtype": torch.float32}).to(weight.dtype)
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(out_of).save_pretrained(out)


if __name__ == "__main__":
    main(*sys.argv[1:])
