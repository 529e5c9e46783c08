"""llm-compressor's data-free path: int4, symmetric, groups of 64, ranges from minimum and maximum.

usage: python llm_compressor.py MODEL OUT WORKERS, with a Python that has llmcompressor
"""

import sys

from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from llmcompressor import model_free_ptq

WEIGHTS = QuantizationArgs(
    num_bits=4,
    type="int",
    symmetric=True,
    strategy="group",
    group_size=64,
    dynamic=False,
    observer="memoryless_minmax",
)


def main(model, out, workers):
    """Quantizes every linear layer but the head, as quantplan does by default."""
    model_free_ptq(
        model_stub=model,
        save_directory=out,
        scheme=QuantizationScheme(targets=["Linear"], weights=WEIGHTS),
        ignore=["re:.*lm_head", "re:.*embed_tokens"],
        max_workers=int(workers),
        device="cpu",
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
