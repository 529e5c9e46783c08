"""What calibration knows of models, over a zoo of architectures: names, blocks, what blocks are called with, inputs, scales."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import zoo
from torch import Tensor

from quantplan.checkpoint.reader import TensorReader
from quantplan.headers import Checkpoint, read_checkpoint
from quantplan.live.blocks import Blocks, find_blocks
from quantplan.live.forward import Call, Forward
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

    @property
    def forward(self) -> Forward:
        return Forward(self.blocks, self.weights, self.reader)

    def run(self, batches: list[dict[str, Tensor]], each: Callable[[str, Any, Call, Tensor], Tensor]) -> list[Any]:
        """The model's outputs, block by block: `each(name, block, call, hidden)` runs a loaded block."""
        forward, finished = self.forward, []
        for number, stack in enumerate(self.blocks.stacks):
            captured = forward.capture(number, batches, finished)
            hidden = captured.hidden
            for name, calls in zip(stack.blocks, captured.calls, strict=True):
                self.weights.load(name, self.reader)
                block = self.model.get_submodule(name)
                with torch.no_grad():
                    hidden = [each(name, block, call, state) for call, state in zip(calls, hidden, strict=True)]
                self.weights.release(name)
            finished.append(hidden)
        return list(forward.outputs(batches, finished))


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
    assert all(made.values())
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


@each_model
def test_block_by_block_gives_the_logits_of_the_whole_model(opened: Any, name: str) -> None:
    one = opened(name)
    batches = [zoo.inputs(one.model, seed=0), zoo.inputs(one.model, seed=1)]
    outputs = one.run(batches, lambda _, block, call, hidden: call(block, hidden))
    with torch.no_grad():
        for batch, output in zip(batches, outputs, strict=True):
            assert torch.equal(output.logits, one.whole(**batch).logits)
    assert all(p.is_meta for p in one.model.parameters())


@each_model
def test_watching_sees_every_matrix_with_the_input_it_got(opened: Any, name: str) -> None:
    one = opened(name)
    seen: dict[tuple[str, int | None], list[Tensor]] = {}
    given: dict[str, list[Tensor]] = {}

    def each(name: str, block: Any, call: Call, hidden: Tensor) -> Tensor:
        hooks = [
            part.register_forward_pre_hook(
                lambda _, inputs, at=f"{name}.{path}.weight": given.setdefault(at, []).append(inputs[0])
            )
            for path, part in block.named_modules()
            if isinstance(part, torch.nn.Linear)
        ]
        with watching(block, lambda at, index, x: seen.setdefault((at, index), []).append(x), name):
            hidden = call(block, hidden)
        for hook in hooks:
            hook.remove()
        return hidden

    one.run([zoo.inputs(one.model, tokens=24)], each)
    for at, inputs in given.items():
        assert torch.equal(torch.cat(seen[at, None]), torch.cat([x.reshape(-1, x.shape[-1]) for x in inputs])), at
    inside = tuple(f"{block}." for block in one.blocks.names)
    for module in find_modules(one.checkpoint).values():
        for matrix in module.matrices if module.keep is None else ():
            for place in one.weights.place_of(matrix):
                if place.parameter.startswith(inside):
                    assert seen[place.parameter, place.index][0].shape[-1] == matrix.columns, matrix
