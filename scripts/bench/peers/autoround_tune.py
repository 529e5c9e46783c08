"""auto-round's SignRound on the same token ids.

usage: python autoround_tune.py MODEL OUT IDS BITS GROUP SYMMETRIC ITERATIONS, with a Python that has auto-round

IDS: safetensors with `input_ids` [sequences, length]. The output holds the dequantized weights, which any loader opens.
"""

import json
import sys
import tempfile
from pathlib import Path

from auto_round import AutoRound
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer


def main(model, out, ids, bits, group, symmetric, iterations):
    """Quantizes every linear layer but the head, as quantplan does by default."""
    rows = load_file(ids)["input_ids"]
    tuned = AutoRound(
        AutoModelForCausalLM.from_pretrained(model, dtype="auto"),
        AutoTokenizer.from_pretrained(model),
        bits=int(bits),
        group_size=int(group),
        sym=symmetric == "true",
        iters=int(iterations),
        dataset=[{"input_ids": row[None], "attention_mask": row[None] * 0 + 1} for row in rows],
        nsamples=len(rows),
        seqlen=rows.shape[1],
        batch_size=4,
        device_map="cpu",
        enable_torch_compile=False,
    )
    with tempfile.TemporaryDirectory(dir=Path(out).parent) as folder:
        tuned.quantize_and_save(folder, format="fake")
        made = next(Path(folder).rglob("config.json")).parent
        config = json.loads((made / "config.json").read_text())
        config.pop("quantization_config", None)
        (made / "config.json").write_text(json.dumps(config))
        made.rename(out)


if __name__ == "__main__":
    main(*sys.argv[1:])
