"""What calibration knows of models, over a zoo of architectures: names, blocks, what blocks are called with, inputs, scales."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import checkpoints
import pytest
import safetensors.torch
import torch
import transformers
import zoo
from torch import Tensor
from transformers.core_model_loading import Chunk, Concatenate, MergeModulelist, Transpose, WeightConverter

import quantplan.live.weights
from quantplan.checkpoint.reader import TensorReader
from quantplan.errors import QuantplanError
from quantplan.headers import Checkpoint, TensorInfo, read_checkpoint
from quantplan.live.blocks import Blocks, find_blocks
from quantplan.live.forward import Call, Forward, model_inputs
from quantplan.live.graph import Edge, Probe, Target, apply_scale, holds, linears_fed_by
from quantplan.live.skeleton import model_class, skeleton
from quantplan.live.watch import watching
from quantplan.live.weights import Weights, parameters_of
from quantplan.models.modules import find_modules

transformers.logging.set_verbosity_error()


@dataclass
class Opened:
    """A model of the zoo: whole, as transformers loads it, and as a skeleton with all that belongs to it."""

    path: Path
    checkpoint: Checkpoint
    whole: Any
    model: Any
    weights: Weights
    reader: TensorReader
    blocks: Blocks

    def batches(self, *sizes: tuple[int, int]) -> list[dict[str, Tensor]]:
        return [zoo.inputs(self.model, *size, seed=i) for i, size in enumerate(sizes)]

    def run(self, batches: list[dict[str, Tensor]], each: Each, seen: Any = None) -> list[Any]:
        """The model's outputs, block by block: `each(name, block, calls, hidden)` runs a loaded block on all batches."""
        forward, finished = Forward(self.blocks, self.weights, self.reader), []
        for number, stack in enumerate(self.blocks.stacks):
            captured = forward.capture(number, batches, finished, seen)
            hidden = captured.hidden
            for name, calls in zip(stack.blocks, captured.calls, strict=True):
                self.weights.load(name, self.reader)
                with torch.no_grad():
                    hidden = each(name, self.model.get_submodule(name), calls, hidden)
                self.weights.release(name)
            finished.append(hidden)
        return list(forward.outputs(batches, finished, seen))


Each = Callable[[str, Any, list[Call], list[Tensor]], list[Tensor]]


def plainly(name: str, block: Any, calls: list[Call], hidden: list[Tensor]) -> list[Tensor]:
    return [call(block, state) for call, state in zip(calls, hidden, strict=True)]


@pytest.fixture(scope="session")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Opened]]:
    folder, known = tmp_path_factory.mktemp("zoo"), {}

    def open_(name: str) -> Opened:
        if name not in known:
            path = zoo.build(name, folder)
            checkpoint = read_checkpoint(path)
            whole = model_class(checkpoint.config).from_pretrained(path).eval()
            model = skeleton(path)
            reader = TensorReader(path, checkpoint.tensors)
            known[name] = Opened(path, checkpoint, whole, model, Weights(model, checkpoint), reader, find_blocks(model))
        return known[name]

    yield open_
    for one in known.values():
        one.reader.close()


each_model = pytest.mark.parametrize("name", zoo.ZOO)
each_that_runs = pytest.mark.parametrize("name", [name for name in zoo.ZOO if name not in zoo.REFUSED])


@each_model
def test_a_skeleton_holds_no_weights_but_every_name_and_buffer(opened: Any, name: str) -> None:
    one = opened(name)
    assert all(p.is_meta for p in one.model.parameters())
    expected = {n: (p.shape, p.dtype) for n, p in one.whole.named_parameters(remove_duplicate=False)}
    assert {n: (p.shape, p.dtype) for n, p in one.model.named_parameters(remove_duplicate=False)} == expected
    buffers = dict(one.model.named_buffers(remove_duplicate=False))
    for n, buffer in one.whole.named_buffers(remove_duplicate=False):
        assert n in one.weights.origins or torch.equal(buffers[n], buffer), n
    assert not one.model.training


@each_model
def test_loaded_parameters_are_those_of_from_pretrained_bit_for_bit(opened: Any, name: str) -> None:
    one = opened(name)
    one.weights.load("", one.reader)
    whole = one.whole.state_dict()
    loaded = one.model.state_dict()
    one.weights.release("")
    assert loaded.keys() == whole.keys()
    for n in whole:
        assert loaded[n].dtype == whole[n].dtype and torch.equal(loaded[n], whole[n]), n
    assert all(p.is_meta for p in one.model.parameters())


@each_model
def test_every_tensor_of_a_checkpoint_makes_a_parameter(opened: Any, name: str) -> None:
    one = opened(name)
    made = parameters_of(one.model, one.checkpoint)
    assert {n for n, tensors in made.items() if not tensors} == {n for n in made if name == "marian" and "embed_positions" in n}
    assert {tensor for tensors in made.values() for tensor in tensors} == set(one.checkpoint.tensors)


@each_model
def test_a_stored_matrix_is_where_its_place_says(opened: Any, name: str) -> None:
    one = opened(name)
    one.weights.load("", one.reader)
    for module in find_modules(one.checkpoint).values():
        for matrix in module.matrices:
            stored = one.reader.read_rows(matrix, 0, matrix.rows)
            places = one.weights.place_of(matrix)
            for place in places:
                assert torch.equal(place.view(one.model), stored[place.of : place.of + place.rows]), matrix
            assert {row for place in places for row in range(place.of, place.of + place.rows)} == set(range(matrix.rows))
    one.weights.release("")


@each_that_runs
def test_block_by_block_gives_the_logits_of_the_whole_model(opened: Any, name: str) -> None:
    one = opened(name)
    batches = one.batches((2, 12), (1, 9))
    outputs = one.run(batches, plainly)
    with torch.no_grad():
        for batch, output in zip(batches, outputs, strict=True):
            # Mamba computes with a cache otherwise, in another order
            torch.testing.assert_close(output.logits, one.whole(**batch).logits, rtol=0, atol=1e-5 if name == "mamba" else 0)
    assert all(p.is_meta for p in one.model.parameters())


@each_that_runs
def test_watching_sees_every_matrix_with_the_input_it_got(opened: Any, name: str) -> None:
    one = opened(name)
    seen: dict[tuple[str, int | None], list[Tensor]] = {}
    given: dict[str, list[Tensor]] = {}

    def see(name: str, index: int | None, inputs: Tensor) -> None:
        seen.setdefault((name, index), []).append(inputs.clone())

    def each(name: str, block: Any, calls: list[Call], hidden: list[Tensor]) -> list[Tensor]:
        hooks = [
            part.register_forward_pre_hook(
                lambda _, inputs, at=f"{name}.{path}.weight": given.setdefault(at, []).append(inputs[0])
            )
            for path, part in block.named_modules()
            if isinstance(part, (torch.nn.Linear, transformers.pytorch_utils.Conv1D))
        ]
        with watching(block, see, name):
            hidden = plainly(name, block, calls, hidden)
        for hook in hooks:
            hook.remove()
        return hidden

    one.run(one.batches((2, 24)), each, see)
    assert given or name == "falcon"
    for at, inputs in given.items():
        assert torch.equal(torch.cat(seen[at, None]), torch.cat([x.reshape(-1, x.shape[-1]) for x in inputs])), at
    for module in find_modules(one.checkpoint).values():
        for matrix in module.matrices if module.keep is None and not module.name.startswith("model.vision_tower") else ():
            (place,) = one.weights.place_of(matrix)
            assert seen[place.parameter, place.index][0].shape[-1] == matrix.columns, matrix


def edge(channels: int, *targets: str) -> tuple[int, set[str]]:
    return channels, {f"{target}.weight" if "experts." not in target or "shared" in target else target for target in targets}


LLAMA = {
    "input_layernorm.weight": edge(64, "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm.weight": edge(64, "mlp.gate_proj", "mlp.up_proj"),
    "self_attn.v_proj.weight": edge(32, "self_attn.o_proj"),
    "mlp.up_proj.weight": edge(96, "mlp.down_proj"),
}
GEMMA = {("pre_feedforward" if "post_attention" in n else "") + n.removeprefix("post_attention"): e for n, e in LLAMA.items()}
EXPERTS = {
    **{n: e for n, e in LLAMA.items() if "mlp" not in n},
    "post_attention_layernorm.weight": edge(64, "mlp.gate", "mlp.experts.gate_up_proj"),
}
EDGES: dict[str, dict[str, tuple[int, set[str]]]] = {
    **dict.fromkeys(("llama", "llama-tied", "mistral", "qwen2", "qwen3", "llava"), LLAMA),
    **dict.fromkeys(("gemma2", "gemma3"), GEMMA),
    "qwen3-moe": {**EXPERTS, "mlp.experts.gate_up_proj": edge(48, "mlp.experts.down_proj")},
    "mixtral": {**EXPERTS, "mlp.experts.gate_up_proj": edge(96, "mlp.experts.down_proj")},
    "gpt-oss": {
        "input_layernorm.weight": LLAMA["input_layernorm.weight"],
        "post_attention_layernorm.weight": edge(64, "mlp.router", "mlp.experts.gate_up_proj"),
        "self_attn.v_proj.weight": edge(32, "self_attn.o_proj"),
    },
    "deepseek-v3": {
        "input_layernorm.weight": edge(64, "self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa"),
        "self_attn.q_a_layernorm.weight": edge(32, "self_attn.q_b_proj"),
        "self_attn.kv_a_layernorm.weight": edge(32, "self_attn.kv_b_proj"),
        "post_attention_layernorm.weight": edge(
            64, "mlp.gate", "mlp.experts.gate_up_proj", "mlp.shared_experts.gate_proj", "mlp.shared_experts.up_proj"
        ),
        "self_attn.kv_b_proj.weight": edge(96, "self_attn.o_proj"),
        "mlp.experts.gate_up_proj": edge(48, "mlp.experts.down_proj"),
        "mlp.shared_experts.up_proj.weight": edge(48, "mlp.shared_experts.down_proj"),
    },
    "llama4": {
        "input_layernorm.weight": LLAMA["input_layernorm.weight"],
        "self_attn.v_proj.weight": edge(32, "self_attn.o_proj"),
        "post_attention_layernorm.weight": edge(
            64,
            *("feed_forward.router", "feed_forward.experts.gate_up_proj"),
            *("feed_forward.shared_expert.gate_proj", "feed_forward.shared_expert.up_proj"),
        ),
        "feed_forward.experts.gate_up_proj": edge(96, "feed_forward.experts.down_proj"),
        "feed_forward.shared_expert.up_proj.weight": edge(96, "feed_forward.shared_expert.down_proj"),
    },
    "phi3": {
        "input_layernorm.weight": edge(64, "self_attn.qkv_proj"),
        "post_attention_layernorm.weight": edge(64, "mlp.gate_up_proj"),
        "self_attn.qkv_proj.weight": edge(32, "self_attn.o_proj"),
        "mlp.gate_up_proj.weight": edge(96, "mlp.down_proj"),
    },
    "gpt2": {
        "ln_1.weight": edge(64, "attn.c_attn"),
        "ln_2.weight": edge(64, "mlp.c_fc"),
        "attn.c_attn.weight": edge(64, "attn.c_proj"),
    },
    "gpt-neox": {
        "input_layernorm.weight": edge(64, "attention.query_key_value"),
        "post_attention_layernorm.weight": edge(64, "mlp.dense_h_to_4h"),
        "attention.query_key_value.weight": edge(64, "attention.dense"),
    },
    "falcon": {
        "ln_attn.weight": edge(64, "self_attention.query_key_value"),
        "ln_mlp.weight": edge(64, "mlp.dense_h_to_4h"),
        "self_attention.query_key_value.weight": edge(32, "self_attention.dense"),
    },
    "bloom": {
        "input_layernorm.weight": edge(64, "self_attention.query_key_value"),
        "post_attention_layernorm.weight": edge(64, "mlp.dense_h_to_4h"),
        "self_attention.query_key_value.weight": edge(64, "self_attention.dense"),
    },
    "mamba": {"norm.weight": edge(64, "mixer.in_proj"), "mixer.x_proj.weight": edge(4, "mixer.dt_proj")},
    "bert": {"attention.self.value.weight": edge(64, "attention.output.dense")},
    "vit": {
        "layernorm_before.weight": edge(64, "attention.q_proj", "attention.k_proj", "attention.v_proj"),
        "layernorm_after.weight": edge(64, "mlp.fc1"),
        "attention.v_proj.weight": edge(64, "attention.o_proj"),
    },
}


@each_that_runs
def test_edges_keep_the_function_whatever_the_factors(opened: Any, name: str) -> None:
    one = opened(name)
    found: dict[str, dict[str, tuple[int, set[str]]]] = {}

    def each(at: str, block: Any, calls: list[Call], hidden: list[Tensor]) -> list[Tensor]:
        single, several = (Probe(call, state) for call, state in zip(calls, hidden, strict=True))
        before = {n: p.clone() for n, p in block.named_parameters()}
        edges = linears_fed_by(block, single, several)
        assert all(torch.equal(p, before[n]) for n, p in block.named_parameters())
        found[at] = {e.source: (e.channels, {target.name for target in e.targets}) for e in edges}
        update = several.run(block)
        for number, e in enumerate(edges):
            torch.manual_seed(number)
            shape = before[e.source].shape[:-2] if e.kind == "linear" else ()
            factors = torch.rand(*shape, e.channels) * 3 + 0.3  # each expert has its own
            apply_scale(block, e, factors)
            assert {n for n, p in block.named_parameters() if not torch.equal(p, before[n])} == {
                *(e.source, *(target.name for target in e.targets)),
                *({e.bias} - {""}),
            }
            torch.testing.assert_close(several.run(block), update, rtol=1e-4, atol=1e-4 * float(update.abs().amax()))
            for n, p in block.named_parameters():
                p.data.copy_(before[n])
        return plainly(at, block, calls, hidden)

    one.run(one.batches((64, 1), (2, 10)), each)
    if name in EDGES:
        assert found[one.blocks.names[-1]] == EDGES[name]
    assert all(found.values())


def test_an_edge_that_changes_the_function_does_not_hold(opened: Any) -> None:
    one = opened("llama")

    def each(at: str, block: Any, calls: list[Call], hidden: list[Tensor]) -> list[Tensor]:
        single, several = (Probe(call, state) for call, state in zip(calls, hidden, strict=True))
        for right in linears_fed_by(block, single, several):
            assert holds(block, right, several)
            fewer = right.targets[1:] or (Target(right.targets[0].name, right.targets[0].columns.flip(0)),)
            assert not holds(block, replace(right, targets=fewer), several), right.source
        gate = Target("mlp.down_proj.weight", torch.arange(96))
        assert not holds(block, Edge("linear", "mlp.gate_proj.weight", (gate,), torch.arange(96)), several)
        return plainly(at, block, calls, hidden)

    one.run(one.batches((64, 1), (2, 10)), each)


def test_no_norm_edge_where_a_matrix_did_not_run(opened: Any) -> None:
    """An expert of its own that no token went to reads the norm too, and nothing would show it."""
    one = opened("llama")
    name = one.blocks.names[0]
    captured = Forward(one.blocks, one.weights, one.reader).capture(0, one.batches((64, 1), (2, 10)))
    single, several = (Probe(call, state) for call, state in zip(captured.calls[0], captured.hidden, strict=True))
    one.weights.load(name, one.reader)
    block = one.model.get_submodule(name)
    block.mlp.idle = torch.nn.Linear(64, 8)
    sources = {e.source for e in linears_fed_by(block, single, several)}
    del block.mlp.idle
    one.weights.release(name)
    assert sources == {"mlp.up_proj.weight"}


def test_calls_are_kept_once_and_differ_by_layer(opened: Any) -> None:
    one = opened("gemma3")
    captured = Forward(one.blocks, one.weights, one.reader).capture(0, one.batches((2, 12), (2, 12), (2, 12)))
    sliding, full, again = captured.calls
    assert all(call.options["attention_mask"] is sliding[0].options["attention_mask"] for call in (*sliding, *again))
    assert sliding[0].options["attention_mask"] is not None
    assert full[0].options["attention_mask"] is None, "causal, which needs no mask"
    rotations = {id(part) for calls in captured.calls for call in calls for part in call.options["position_embeddings"]}
    assert len(rotations) == 4, "cosines and sines of two kinds, whatever the batch"


@pytest.mark.parametrize("name", ["llama", "gemma2", "bert", "t5"])
def test_padding_is_masked_as_the_model_does(opened: Any, name: str) -> None:
    one = opened(name)
    (batch,) = one.batches((2, 12))
    batch["attention_mask"] = torch.ones(2, 12, dtype=torch.long)
    batch["attention_mask"][1, 8:] = 0
    (output,) = one.run([batch], plainly)
    with torch.no_grad():
        assert torch.equal(output.logits, one.whole(**batch).logits)


@pytest.mark.parametrize("name", ["llama", "qwen3-moe", "whisper"])
def test_one_block_is_loaded_at_a_time(opened: Any, name: str) -> None:
    one = opened(name)
    stacks = tuple(f"{stack.name}." for stack in one.blocks.stacks)

    def each(at: str, block: Any, calls: list[Call], hidden: list[Tensor]) -> list[Tensor]:
        loaded = {n for n, p in one.model.named_parameters() if not p.is_meta}
        assert loaded == {n for n, _ in one.model.named_parameters() if n.startswith(f"{at}.")}
        return plainly(at, block, calls, hidden)

    def see(at: str, index: int | None, inputs: Tensor) -> None:
        assert all(p.is_meta for n, p in one.model.named_parameters() if n.startswith(stacks))

    one.run(one.batches((2, 12)), each, see)
    assert all(p.is_meta for p in one.model.parameters())
    assert not any("forward" in part.__dict__ for part in one.model.modules()), "stubs are gone"


def test_outputs_one_after_the_other_leave_nothing_switched_on_between(opened: Any) -> None:
    one = opened("llama")
    batches = one.batches((1, 4), (1, 4))
    forward = Forward(one.blocks, one.weights, one.reader)
    hidden = forward.capture(0, batches).hidden
    outputs = forward.outputs(batches, [hidden])
    next(outputs)
    assert torch.is_grad_enabled() and not torch.overrides._get_current_function_mode_stack()
    outputs.close()
    assert all(p.is_meta for p in one.model.parameters())


def test_tokens_become_the_arguments_of_the_model(opened: Any) -> None:
    tokens = torch.arange(12)[None]
    assert model_inputs(opened("llama").model, tokens).keys() == {"input_ids"}
    assert model_inputs(opened("t5").model, tokens).keys() == {"input_ids", "decoder_input_ids"}
    with pytest.raises(QuantplanError, match="QP224 ViTForImageClassification reads pixel_values, not tokens"):
        model_inputs(opened("vit").model, tokens)


@pytest.mark.parametrize("name", zoo.REFUSED)
def test_a_model_without_one_block_after_the_other_is_refused(opened: Any, name: str) -> None:
    one = opened(name)
    with pytest.raises(QuantplanError, match=f"QP224 {zoo.ZOO[name].model} .*{zoo.REFUSED[name]}"):
        one.run(one.batches((2, 12)), plainly)
    assert all(p.is_meta for p in one.model.parameters())


def test_a_model_without_blocks_is_refused() -> None:
    with torch.device("meta"):
        model = transformers.ResNetModel(transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1]))
    model.encoder.stages = torch.nn.Sequential(*model.encoder.stages)
    with pytest.raises(QuantplanError, match="QP224 ResNetModel has no list of blocks"):
        find_blocks(model)


def test_a_model_that_changes_hidden_states_between_blocks_is_refused(tmp_path: Path) -> None:
    path = zoo.build("llama", tmp_path)
    checkpoint, model = read_checkpoint(path), skeleton(path)
    blocks = find_blocks(model)
    inner = model.model

    def forward(input_ids: Tensor, **options: Any) -> Any:
        hidden = inner.embed_tokens(input_ids)
        for block in inner.layers:
            hidden = block(hidden * 2, position_embeddings=inner.rotary_emb(hidden, torch.arange(4)[None]))
        return hidden

    model.forward = forward  # type: ignore[method-assign]
    with TensorReader(path, checkpoint.tensors) as reader, pytest.raises(QuantplanError, match=r"before 'model\.layers\.1'"):
        Forward(blocks, Weights(model, checkpoint), reader).capture(0, [{"input_ids": torch.arange(4)[None]}])


def refused(path: Path, code: str) -> str:
    """The message of loading all of a checkpoint's weights."""
    checkpoint, model = read_checkpoint(path), skeleton(path)
    with TensorReader(path, checkpoint.tensors) as reader, pytest.raises(QuantplanError, match=code) as caught:
        Weights(model, checkpoint).load("", reader)
    return str(caught.value)


def test_parameters_without_tensors_and_of_other_shapes_are_named(tmp_path: Path) -> None:
    lost = checkpoints.llama(tmp_path / "lost", change={"model.layers.1.mlp.up_proj.weight": None})
    heads = {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "attention_bias": True,
        "intermediate_size": 128,
        "vocab_size": 256,
    }
    configure(lost, heads)
    assert "model.layers.1.mlp.up_proj.weight" in refused(lost, "QP221")
    other = checkpoints.llama(tmp_path / "other")
    configure(other, {**heads, "intermediate_size": 64})
    assert "is [64, 64], the stored one [128, 64]" in refused(other, "QP223")


def configure(path: Path, change: dict[str, Any]) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **change}))


def test_a_matrix_that_the_model_does_not_hold_is_named(tmp_path: Path) -> None:
    path = zoo.build("llama", tmp_path)
    checkpoint = read_checkpoint(path)
    more = {**checkpoint.tensors, "extra.weight": TensorInfo("extra.weight", "F32", (8, 8))}
    weights = Weights(skeleton(path), replace(checkpoint, tensors=more))
    (matrix,) = find_modules(weights.checkpoint)["extra"].matrices
    with pytest.raises(QuantplanError, match=r"QP223 .*no matrix that is extra"):
        weights.place_of(matrix)


def test_parts_of_a_matrix_are_refused() -> None:
    linear = torch.nn.Linear(8, 8)
    with watching(linear, lambda *_: None) as watch, pytest.raises(QuantplanError, match=r"QP225 .*part of 'weight' only"):
        torch.nn.functional.linear(torch.ones(2, 4), linear.weight[:, :4])
    assert not watch.input_axis


def test_every_way_to_multiply_is_seen() -> None:
    x, seen = torch.randn(3, 8), []
    module = torch.nn.Module()
    module.w = torch.nn.Parameter(torch.randn(8, 5))
    module.e = torch.nn.Parameter(torch.randn(2, 8, 5))
    expected = x.mm(module.w)
    with watching(module, lambda name, index, inputs: seen.append((name, index, inputs))) as watch:
        for product in (x @ module.w, x.matmul(module.w), torch.mm(x, module.w), torch.addmm(torch.zeros(5), x, module.w)):
            assert torch.allclose(product, expected)
        torch.nn.functional.linear(x, weight=module.w.t())
        _ = module.w.T @ x.T
        torch.bmm(x.expand(2, 3, 8), module.e)
        _ = x @ module.e[torch.tensor(1)]
    assert [(name, index) for name, index, _ in seen] == [("w", None)] * 6 + [("e", 0), ("e", 1), ("e", 1)]
    assert all(torch.equal(inputs, x) for _, _, inputs in seen)
    assert watch.input_axis == {"w": -2, "e": -2}


def test_half_precision_models_are_as_from_pretrained_gives_them(tmp_path: Path) -> None:
    def named(model: Any) -> list[tuple[str, torch.nn.Parameter]]:
        return list(model.named_parameters(remove_duplicate=False))

    path = zoo.build("t5", tmp_path, torch.bfloat16)
    whole, model = model_class({"architectures": ["T5ForConditionalGeneration"]}).from_pretrained(path), skeleton(path)
    assert {n: p.dtype for n, p in named(model)} == {n: p.dtype for n, p in named(whole)}
    half, full = skeleton(path, dtype=torch.float16), skeleton(path, dtype=torch.float32)
    whole = type(model).from_pretrained(path, dtype=torch.float16)
    assert {n: p.dtype for n, p in named(half)} == {n: p.dtype for n, p in named(whole)}
    assert len({p.dtype for p in half.parameters()}) == 2, "some stay in float32"
    assert {p.dtype for p in full.parameters()} == {torch.float32}


def test_tied_weights_are_known(opened: Any) -> None:
    weights = opened("llama-tied").weights
    assert weights.sharing("lm_head.weight") == ["model.embed_tokens.weight"]
    assert weights.sharing("model.layers.0.mlp.up_proj.weight") == []
    assert opened("qwen3-moe").weights.sharing("model.layers.0.mlp.experts.gate_up_proj") == []
    assert [p.parameter for p in weights.places["model.embed_tokens"]] == ["lm_head.weight", "model.embed_tokens.weight"]


def test_code_of_a_checkpoint_runs_only_when_it_may(tmp_path: Path) -> None:
    path = zoo.build("llama", tmp_path)
    configure(path, {"model_type": "unheard", "auto_map": {"AutoConfig": "x.Config", "AutoModelForCausalLM": "x.Model"}})
    (path / "x.py").write_text("raise SystemExit('code of a checkpoint ran')\n")
    with pytest.raises(QuantplanError, match="QP222 transformers cannot build the model"):
        skeleton(path)


def test_stored_matrices_that_are_split_merged_and_turned_on_loading_are_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Conversions of no model of the zoo, with transformers' own operations."""
    source, path = zoo.build("llama4", tmp_path), tmp_path / "other"
    configure(source, {"num_key_value_heads": 4, "head_dim": 16})
    shutil.copytree(source, path)
    tensors = safetensors.torch.load_file(source / "model.safetensors")
    torch.manual_seed(0)
    for i in range(3):
        at = f"model.layers.{i}.self_attn"
        for part in ("q", "k", "v"):
            tensors.pop(f"{at}.{part}_proj.weight")
        tensors[f"{at}.qkv.weight"] = torch.randn(192, 64)
        if i:
            experts = f"model.layers.{i}.feed_forward.experts"
            both = tensors.pop(f"{experts}.gate_up_proj").transpose(1, 2).contiguous()
            for e in range(4):
                tensors[f"{experts}.{e}.gate_proj.weight"] = both[e, :96].contiguous()
                tensors[f"{experts}.{e}.up_proj.weight"] = both[e, 96:].contiguous()
    safetensors.torch.save_file(tensors, path / "model.safetensors", {"format": "pt"})

    def conversions(model: Any) -> list[Any]:
        return [
            WeightConverter("self_attn.qkv.weight", [f"self_attn.{part}_proj.weight" for part in "qkv"], [Chunk(dim=0)]),
            WeightConverter(
                ["experts.*.gate_proj.weight", "experts.*.up_proj.weight"],
                "experts.gate_up_proj",
                [MergeModulelist(dim=0), Concatenate(dim=1), Transpose(1, 2)],
            ),
        ]

    monkeypatch.setattr(quantplan.live.weights, "get_model_conversion_mapping", conversions)
    checkpoint, model = read_checkpoint(path), skeleton(path)
    weights = Weights(model, checkpoint)
    modules = find_modules(checkpoint)
    with TensorReader(path, checkpoint.tensors) as reader:
        for prefix in ("model.layers.0", "model.layers.2"):
            weights.load(prefix, reader)
        loaded = [
            m for module in modules.values() for m in module.matrices if m.name.startswith(("model.layers.0", "model.layers.2"))
        ]
        for matrix in loaded:
            stored = reader.read_rows(matrix, 0, matrix.rows)
            places = weights.place_of(matrix)
            assert len(places) == (3 if "qkv" in matrix.name else 1)
            for place in places:
                assert torch.equal(place.view(model), stored[place.of : place.of + place.rows]), place
    assert {m.name.rpartition(".")[2] for m in loaded} >= {"qkv", "gate_proj", "up_proj", "down_proj"}


def test_what_cannot_be_followed_has_no_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = zoo.build("llama", tmp_path)
    columns = WeightConverter(["mlp.gate_proj.weight", "mlp.up_proj.weight"], "mlp.both.weight", [Concatenate(dim=1)])
    monkeypatch.setattr(quantplan.live.weights, "get_model_conversion_mapping", lambda model: [columns])
    checkpoint, model = read_checkpoint(path), skeleton(path)
    for block in model.model.layers:
        block.mlp.both = torch.nn.Linear(128, 96, bias=False, device="meta")
    weights = Weights(model, checkpoint)
    for matrix in find_modules(checkpoint)["model.layers.0.mlp.up_proj"].matrices:
        with pytest.raises(QuantplanError, match="QP223"):
            weights.place_of(matrix)
    with TensorReader(path, checkpoint.tensors) as reader:
        weights.load("model.layers.0.mlp.both", reader)
        whole = torch.cat([reader.read(f"model.layers.0.mlp.{part}_proj.weight") for part in ("gate", "up")], 1)
    assert torch.equal(model.model.layers[0].mlp.both.weight, whole)
