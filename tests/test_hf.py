"""Outputs open in transformers: packed, exact, saved again; the plug-in registers in either order of imports."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers
from torch import nn

import quantplan
from quantplan import QuantLinear, QuantplanError
from quantplan.checkpoint.reader import TensorReader
from quantplan.format import FORMATS
from quantplan.headers import read_checkpoint

IDS = torch.arange(24)[None]
SIZES = {
    **{"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 128},
    **{"num_attention_heads": 4, "num_key_value_heads": 2},
}
EXPERTS = {"head_dim": 16, "moe_intermediate_size": 96, "num_experts_per_tok": 2}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", SIZES),
    "qwen3-moe": ("Qwen3MoeConfig", {**SIZES, **EXPERTS, "num_experts": 4}),
    "mixtral": ("MixtralConfig", {**SIZES, "num_local_experts": 4, "num_experts_per_tok": 2}),
    # stored fused [experts, out, in], and fused [experts, in, out]
    "qwen3.5-moe": (
        "Qwen3_5MoeTextConfig",
        {**SIZES, **EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 96, "layer_types": ["full_attention"] * 2},
    ),
    "llama4": (
        "Llama4TextConfig",
        {**SIZES, "head_dim": 16, "num_local_experts": 4, "intermediate_size_mlp": 128, "moe_layers": [0, 1]},
    ),
    # names differ between checkpoint and memory; a projection whose weight the model looks at
    "llava": (
        "LlavaConfig",
        {
            "text_config": {"model_type": "llama", **SIZES},
            "vision_config": {
                **{"model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2},
                **{"num_attention_heads": 2, "image_size": 28, "patch_size": 14, "projection_dim": 32},
            },
        },
    ),
    "t5": (
        "T5Config",
        {
            **{"vocab_size": 128, "d_model": 64, "d_ff": 128, "d_kv": 16, "num_layers": 2, "num_heads": 4},
            "feed_forward_proj": "gated-gelu",
        },
    ),
}  # fmt: skip
AUTO = {"llava": transformers.AutoModelForImageTextToText, "t5": transformers.AutoModelForSeq2SeqLM}
MIXED = {
    "default": {"wq": "int4"},
    "overrides": [
        {"pattern": ["*.v_proj", "*.SelfAttention.v"], "wq": {"scheme": "int3", "symmetric": False}},
        {"pattern": ["*.o_proj", "*.wo"], "wq": "nvfp4"},
    ],
}


def build(name: str, dtype: torch.dtype = torch.bfloat16) -> Any:
    kind, options = CONFIGS[name]
    torch.manual_seed(0)
    auto = AUTO.get(name, transformers.AutoModelForCausalLM)
    return auto.from_config(getattr(transformers, kind)(**options), dtype=dtype).eval()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("sources")

    def saved(name: str) -> Path:
        if not (folder / name).exists():
            build(name).save_pretrained(folder / name)
        return folder / name

    return saved


def plan(format: str = "quantplan", **rules: Any) -> dict[str, Any]:
    return {**(rules or MIXED), "output": {"format": format}}


def logits(model: Any) -> torch.Tensor:
    decoder = {"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(input_ids=IDS, **decoder).logits


@pytest.fixture(autouse=True)
def dequantized(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is stored is compared bit for bit, so nothing is computed in low precision."""
    monkeypatch.setenv("QUANTPLAN_KERNELS", "none")


def reference(report: Any, made_from: Path, target: Path) -> Any:
    """The source's model with every quantized matrix replaced by what its codes stand for."""
    shutil.copytree(made_from, target)
    tensors = safetensors.torch.load_file(target / "model.safetensors")
    resolution = report.resolution
    output = FORMATS.get(resolution.plan.output.format)()
    with TensorReader(report.out, read_checkpoint(report.out).tensors) as reader:
        for a in resolution.quantized:
            for m in a.matrices:
                weight = a.wq.quantizer().dequantize(output.decode(m, a.wq, a.aq, reader.read))
                place = tensors[m.tensor] if m.index is None else tensors[m.tensor][m.index]
                place = place.t() if m.transposed else place
                place[m.first : m.first + m.rows] = weight
    safetensors.torch.save_file(tensors, target / "model.safetensors", {"format": "pt"})
    return opened(target)


def opened(path: Path, **options: Any) -> Any:
    kind = json.loads((path / "config.json").read_text())["architectures"][0]
    return getattr(transformers, kind).from_pretrained(path, **options)


def count(model: nn.Module) -> tuple[int, int]:
    kinds = [type(m) for m in model.modules()]
    return kinds.count(QuantLinear), kinds.count(nn.Linear)


@pytest.mark.parametrize("name", CONFIGS)
def test_native_opens_exactly_and_saves_again(name: str, source: Any, tmp_path: Path) -> None:
    report = quantplan.apply(source(name), plan(), tmp_path / "out")
    expected = logits(reference(report, source(name), tmp_path / "reference"))
    model = opened(tmp_path / "out")
    packed, dense = count(model)
    assert torch.equal(logits(model), expected)
    assert packed == sum(a.module.kind == "linear" and ".experts." not in a.name for a in report.resolution.quantized)
    assert dense == count(build(name))[1] - packed
    model.save_pretrained(tmp_path / "again")
    again = quantplan.load(tmp_path / "again")
    assert count(again) == (packed, dense) and torch.equal(logits(again), expected)
    listed = {
        n for g in json.loads((tmp_path / "again/config.json").read_text())["quantization_config"]["groups"] for n in g["modules"]
    }
    stored = {n.removesuffix(".weight_codes") for n in read_checkpoint(tmp_path / "again").tensors if n.endswith(".weight_codes")}
    assert listed == stored  # fused experts are dense in memory, and saved so


@pytest.mark.parametrize("scheme", ["int4", "int8", "fp8", "nvfp4"])
@pytest.mark.parametrize("format", ["quantplan", "compressed-tensors"])
def test_loaded_models_compute_with_kernels(format: str, scheme: str, source: Any, tmp_path: Path, monkeypatch: Any) -> None:
    quantplan.apply(source("llama"), plan(format, default={"wq": scheme}), tmp_path / "out")
    exact = logits(quantplan.load(tmp_path / "out"))
    monkeypatch.delenv("QUANTPLAN_KERNELS")
    model = quantplan.load(tmp_path / "out")
    assert torch.nn.functional.cosine_similarity(logits(model).float(), exact.float(), -1).min() > 0.999
    kernels = {m._kernel.name if m._kernel else None for m in model.modules() if isinstance(m, QuantLinear)}
    assert kernels == {{"int4": "int4pack", "int8": "int8pack", "fp8": "lookup", "nvfp4": "int4pack"}[scheme]}
    model.save_pretrained(tmp_path / "again")
    monkeypatch.setenv("QUANTPLAN_KERNELS", "none")
    assert torch.equal(logits(quantplan.load(tmp_path / "again")), exact)


@pytest.mark.parametrize("name", CONFIGS)
def test_in_memory_as_on_disk(name: str, source: Any, tmp_path: Path) -> None:
    report = quantplan.apply(source(name), plan(), tmp_path / "out")
    model = quantplan.quantize(opened(source(name)), plan())
    expected = logits(opened(report.out))
    assert torch.equal(logits(model), expected)
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(quantplan.load(tmp_path / "saved")), expected)
    with pytest.raises(QuantplanError, match="QP212"):
        quantplan.quantize(model, plan())


@pytest.mark.parametrize("name", ["llama", "qwen3-moe", "llama4"])
def test_compressed_tensors_opens_exactly_whatever_the_mixture(name: str, source: Any, tmp_path: Path) -> None:
    rules = {**plan("compressed-tensors"), "engines": ["transformers"]}
    report = quantplan.apply(source(name), rules, tmp_path / "out")
    model = quantplan.load(tmp_path / "out", device_map="cpu")
    assert torch.equal(logits(model), logits(reference(report, source(name), tmp_path / "reference")))
    assert count(model)[0] > 0 and model.generation_config.to_dict().keys() >= {"eos_token_id"}
    wide = quantplan.load(tmp_path / "out", dtype="float32")  # transformers' own reader makes nvfp4 bfloat16 and fails
    assert logits(wide).dtype == torch.float32


@pytest.mark.parametrize("format", ["quantplan", "compressed-tensors"])
def test_activations_are_quantized_after_loading(format: str, source: Any, tmp_path: Path) -> None:
    rules = plan(format, default={"wq": "int8", "aq": "int8"})
    quantplan.apply(source("llama"), rules, tmp_path / "out")
    model = quantplan.load(tmp_path / "out")
    layer = model.model.layers[0].mlp.up_proj
    assert layer.aq is not None and layer.aq.strategy == "token"
    assert torch.equal(logits(model), logits(quantplan.quantize(opened(source("llama")), rules)))


def test_dtype_device_map_generate_copy_and_dequantize(source: Any, tmp_path: Path) -> None:
    quantplan.apply(source("llama"), plan(), tmp_path / "out")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", device_map="cpu", dtype=torch.float32)
    layer = model.model.layers[0].self_attn.o_proj
    assert (layer.weight_scale.dtype, layer.dtype, model.dtype) == (torch.float8_e4m3fn, torch.float32, torch.float32)
    assert model.generate(IDS, max_new_tokens=4, do_sample=False).shape == (1, 28)
    expected, copied = logits(model), copy.deepcopy(model)
    assert torch.equal(logits(copied), expected)
    assert torch.equal(copied.to(torch.bfloat16).model.layers[0].self_attn.o_proj.dequantize(), layer.dequantize())
    dense = model.dequantize()
    assert count(dense)[0] == 0 and torch.equal(logits(dense), expected)
    dense.save_pretrained(tmp_path / "dense")
    assert torch.equal(logits(quantplan.load(tmp_path / "dense", dtype="float32")), expected)


def test_a_body_without_its_head_opens(source: Any, tmp_path: Path) -> None:
    quantplan.apply(source("qwen3-moe"), plan(default={"wq": "int4"}), tmp_path / "out")
    body, whole = transformers.AutoModel.from_pretrained(tmp_path / "out"), opened(tmp_path / "out")
    assert torch.equal(body(IDS).last_hidden_state, whole.model(IDS).last_hidden_state)


def test_experts_of_one_block_may_differ(source: Any, tmp_path: Path) -> None:
    rules = [
        {"pattern": "*.experts.1.*", "keep": True},
        {"pattern": "*.experts.2.*", "wq": {"scheme": "int3", "symmetric": False}},
        {"pattern": "*.experts.3.*", "wq": "nvfp4"},
    ]
    report = quantplan.apply(source("qwen3-moe"), plan(default={"wq": "int4"}, overrides=rules), tmp_path / "out")
    expected = logits(reference(report, source("qwen3-moe"), tmp_path / "reference"))
    assert torch.equal(logits(opened(tmp_path / "out")), expected)


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    config = json.loads((path / "config.json").read_text())
    change(config)
    (path / "config.json").write_text(json.dumps(config))


def test_what_cannot_be_opened_says_why(source: Any, tmp_path: Path) -> None:
    quantplan.apply(source("qwen3-moe"), plan(default={"wq": "int8"}), tmp_path / "moe")

    def quantize_activations(config: dict[str, Any]) -> None:
        config["quantization_config"]["groups"][0]["aq"] = {"scheme": "int8", "granularity": "token"}

    edit(tmp_path / "moe", quantize_activations)
    with pytest.raises(QuantplanError, match="QP222 transformers rearranges"):
        opened(tmp_path / "moe")
    edit(tmp_path / "moe", lambda config: config["quantization_config"].update(version=9))
    with pytest.raises(QuantplanError, match="QP222 the quantization_config is of version 9"):
        opened(tmp_path / "moe")
    edit(tmp_path / "moe", lambda config: config["quantization_config"].update(quant_method="gptq"))
    with pytest.raises(QuantplanError, match="QP222 quantized by 'gptq'"):
        quantplan.load(tmp_path / "moe")


@pytest.mark.parametrize("name", ["llama", "qwen3-moe"])
def test_a_missing_tensor_is_no_silent_random_weight(name: str, source: Any, tmp_path: Path) -> None:
    quantplan.apply(source(name), plan(default={"wq": "int4"}), tmp_path / "out")
    tensors = safetensors.torch.load_file(tmp_path / "out/model.safetensors")
    lost = next(n for n in tensors if n.endswith(".weight_scale") and ("experts" in n) == (name != "llama"))
    del tensors[lost]
    safetensors.torch.save_file(tensors, tmp_path / "out/model.safetensors", {"format": "pt"})
    with pytest.raises(QuantplanError, match="QP221"):
        quantplan.load(tmp_path / "out")


def test_an_unquantized_checkpoint_is_not_quantized_while_loading(source: Any) -> None:
    from quantplan.hf.plugin import QuantplanConfig

    with pytest.raises(QuantplanError, match="QP222 the checkpoint is not quantized"):
        opened(source("llama"), quantization_config=QuantplanConfig())


def test_the_memory_taken_is_that_of_the_codes(source: Any, tmp_path: Path) -> None:
    quantplan.apply(source("llama"), plan(default={"wq": "int4"}), tmp_path / "out")
    layer = opened(tmp_path / "out").model.layers[0].mlp.up_proj
    assert sum(b.nbytes for b in layer.buffers()) == 128 * 64 // 2 + 2 * 128 * 64 // 32 and not list(layer.parameters())


ORDERS = [
    "import quantplan, transformers",
    "import transformers, quantplan",
    "import transformers.modeling_utils, quantplan",
    "import quantplan; from transformers import AutoModelForCausalLM",
    "import quantplan.hf.plugin",
    "import quantplan.hf.load, transformers; import quantplan.hf; quantplan.hf.register()",
]


@pytest.mark.parametrize("order", ORDERS)
def test_registered_in_any_order_of_imports(order: str) -> None:
    known = "from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as a, AUTO_QUANTIZATION_CONFIG_MAPPING as b"
    code = f"{order}\n{known}\nassert 'quantplan' in a and 'quantplan' in b"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_importing_quantplan_imports_neither_torch_nor_transformers() -> None:
    code = "import sys, quantplan; assert not {'torch', 'transformers', 'pydantic'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_hook_finds_nothing_where_there_is_nothing() -> None:
    from quantplan.import_hook import after_import

    called: list[int] = []
    after_import("quantplan_no_such_module", lambda: called.append(1))
    with pytest.raises(ModuleNotFoundError):
        import quantplan_no_such_module  # noqa: F401
    after_import("json", lambda: called.append(2))
    assert called == [2]
    del sys.meta_path[:2]
