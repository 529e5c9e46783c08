"""One model in one system: how long prefill and each decoded token take, and what it holds in memory. Prints one JSON document.

python inference.py SYSTEM MODEL --threads 2 --prompt 128 --tokens 32 --rounds 3

SYSTEM: `float32`, `bfloat16`, or of a peer `torchao-int4`, `torchao-w8a8`, `quanto-int4`, `quanto-w8a8`; MODEL is a float
checkpoint, whose output head stays as it is. `quantplan-float32`, `quantplan-bfloat16`: MODEL is an output of `quantplan apply`.
"""

import argparse
import json
import os
import time

parser = argparse.ArgumentParser()
parser.add_argument("system")
parser.add_argument("model")
parser.add_argument("--threads", type=int, default=2)
parser.add_argument("--prompt", type=int, default=128)
parser.add_argument("--tokens", type=int, default=32)
parser.add_argument("--rounds", type=int, default=3)
options = parser.parse_args()
os.environ.update(OMP_NUM_THREADS=str(options.threads), TQDM_DISABLE="1", HF_HUB_OFFLINE="1")

import torch  # noqa: E402 - reads the number of threads
from transformers import AutoModelForCausalLM  # noqa: E402


def open_model():
    name, _, scheme = options.system.partition("-")
    if name == "quantplan":
        import quantplan

        return quantplan.load(options.model, dtype=getattr(torch, scheme))
    dtype = torch.float32 if options.system in ("float32", "torchao-w8a8", "quanto-w8a8") else torch.bfloat16
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype)
    if name == "torchao":
        from torchao.quantization import quantize_

        quantize_(model, torchao_config(scheme), lambda m, name: isinstance(m, torch.nn.Linear) and name != "lm_head")
    elif name == "quanto":
        from optimum import quanto

        if scheme == "int4":
            quanto.quantize(model, weights=quanto.qint4, exclude="lm_head")
        else:
            quanto.quantize(model, weights=quanto.qint8, activations=quanto.qint8, exclude="lm_head")
        quanto.freeze(model)
    return model


def torchao_config(scheme):
    if scheme == "w8a8":
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig

        return Int8DynamicActivationInt8WeightConfig()
    from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig  # the one with an operation for CPUs

    return PrototypeInt4WeightOnlyConfig(group_size=64)


def memory(key):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(f"{key}:"))


@torch.no_grad()
def main():
    started = time.perf_counter()
    model = open_model().eval()
    loading = time.perf_counter() - started
    ids = torch.randint(100, 1000, (1, options.prompt), generator=torch.Generator().manual_seed(0))
    prefill, decode = [], []
    for number in range(options.rounds + 1):
        at = time.perf_counter()
        out = model(ids, use_cache=True, logits_to_keep=1)
        took, cache, token = time.perf_counter() - at, out.past_key_values, out.logits[:, -1].argmax(-1, keepdim=True)
        each = []
        for _ in range(options.tokens):
            at = time.perf_counter()
            out = model(token, past_key_values=cache, use_cache=True)
            token = out.logits[:, -1].argmax(-1, keepdim=True)
            each.append(time.perf_counter() - at)
        if number:  # the first warms up
            prefill.append(took)
            decode += each
    print(
        json.dumps(
            {
                "load": loading,
                "prefill": prefill,
                "decode": decode,
                "memory": memory("VmRSS"),
                "peak": memory("VmHWM"),
            }
        )
    )


main()
