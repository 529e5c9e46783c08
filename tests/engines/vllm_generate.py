"""Opens checkpoints with vLLM and writes down what came of it. Run by the Python of vLLM's environment, not by the tests' own.

usage: vllm_generate.py generate|schemes REQUEST.json ANSWER.json

generate  loads each model on this machine and generates. Request: {name: {path, prompt, tokens}}; a model with no prompt
          needs no tokenizer. Answer: {name: {text, log_probs of the tokens after the first} or {error}}.
schemes   asks vLLM's own code which class it would run each layer with on a GPU; no weights are read. Request:
          {name: {path, modules}}. Answer: {name: {module: {class, options} or null} or {error}}.
"""

import gc
import inspect
import json
import logging
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # a model that cannot be run raises here
os.environ["HF_HUB_OFFLINE"] = "1"


collect, gc.collect = gc.collect, lambda generation=2: 0  # vLLM collects nine times a model, half a second each


def generate(path, prompt, tokens):
    """The text after `prompt`, and the log probability of each token given those before it."""
    from vllm import LLM, SamplingParams

    llm = LLM(
        path,
        max_model_len=128,
        max_num_batched_tokens=128,
        max_num_seqs=2,
        enforce_eager=True,
        kv_cache_memory_bytes=1 << 26,
        dtype="bfloat16",
        skip_tokenizer_init=prompt is None,
    )
    scoring = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False)
    scored = llm.generate([{"prompt_token_ids": tokens}], scoring, use_tqdm=False)[0].prompt_logprobs
    answer = {"log_probs": [next(iter(position.values())).logprob for position in scored[1:]]}
    if prompt is not None:
        writing = SamplingParams(temperature=0, max_tokens=4)
        answer["text"] = llm.generate([prompt], writing, use_tqdm=False)[0].outputs[0].text
    return answer


def clean_up():
    """Forgets the last model, and the process groups that were made for its kind."""
    from vllm.distributed import cleanup_dist_env_and_memory

    cleanup_dist_env_and_memory()
    collect()


def recorder(scheme):
    """A stand-in for one of vLLM's classes that remembers what it was made with. Most of the real ones look for a GPU's
    kernels when they are made; those of packed integers only check what they are given, and do."""
    signature = inspect.signature(scheme.__init__)
    packed = scheme.__name__.startswith(("CompressedTensorsWNA", "CompressedTensorsW4A8Fp8"))

    def init(self, *arguments, **options):
        self.recorded = signature.bind(self, *arguments, **options).arguments
        if packed:
            scheme.__init__(self, *arguments, **options)

    return type(scheme.__name__, (scheme,), {"__init__": init, "recorded": {}})


def schemes(path, modules):
    """The class vLLM's config parser and selection choose for each module on an H100, with its plain options."""
    import torch
    from vllm.model_executor.layers.quantization.compressed_tensors import compressed_tensors as module
    from vllm.platforms.interface import DeviceCapability

    module.current_platform = SimpleNamespace(
        get_device_capability=lambda: DeviceCapability(9, 0), is_xpu=lambda: False, is_cpu=lambda: False
    )
    for name, value in list(vars(module).items()):
        if name.startswith("CompressedTensorsW") and not hasattr(value, "recorded"):
            setattr(module, name, recorder(value))
    config = json.loads((Path(path) / "config.json").read_text())["quantization_config"]
    parsed = module.CompressedTensorsConfig.from_config(config)
    parsed.packed_modules_mapping = {
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }
    answer = {}
    for name in modules:
        chosen = parsed.get_scheme(torch.nn.Linear(1, 1), name)
        plain = {} if chosen is None else {k: v for k, v in chosen.recorded.items() if isinstance(v, int | bool)}
        answer[name] = None if chosen is None else {"class": type(chosen).__name__, **plain}
    return answer


def main():
    what, request, out = sys.argv[1:]
    run = {"generate": generate, "schemes": schemes}[what]
    answer = {}
    for name, arguments in json.loads(Path(request).read_text()).items():
        started = time.monotonic()
        try:
            answer[name] = run(**arguments)
        except Exception as error:  # whatever it is, it is the answer
            logging.exception("%s", name)
            answer[name] = {"error": f"{type(error).__name__}: {error}"}
        if what == "generate":
            clean_up()
            answer[name]["seconds"] = time.monotonic() - started
        Path(out).write_text(json.dumps(answer))


if __name__ == "__main__":
    main()
