"""Running a model one block at a time: what every block is called with, and what the model makes of the last one's output.

The model's own forward runs with stubs in place of its blocks, so embeddings, masks, position embeddings, final norms and
heads are computed by its own code; parameters outside of the blocks are loaded when they are first used.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map

from quantplan.checkpoint.reader import TensorReader
from quantplan.errors import fail
from quantplan.live.blocks import Blocks
from quantplan.live.weights import RTN_DOES_WITHOUT, Weights

Inputs = Mapping[str, Tensor]
REMEMBERED = 8  # tensors of one shape that later ones are compared with, to keep equal ones once


@dataclass(frozen=True)
class Call:
    """What one block is called with for one batch, but for the hidden state: `None` stands in its place."""

    arguments: tuple[Any, ...]
    options: Mapping[str, Any]
    place: int | str  # of the hidden state: a position, or a name

    def __call__(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """The hidden state that `block`, loaded, makes of `hidden` `[batch, tokens, features]`."""
        arguments, options = list(self.arguments), dict(self.options)
        if isinstance(self.place, int):
            arguments[self.place] = hidden
        else:
            options[self.place] = hidden
        return hidden_of(block(*arguments, **options))


@dataclass(frozen=True)
class Captured:
    """The first hidden states of a stack, one a batch, and the calls of its blocks: `calls[block][batch]`. Tensors that are
    equal are one tensor."""

    hidden: list[Tensor]
    calls: list[list[Call]]


def hidden_of(output: Any) -> Tensor:
    """The hidden state in what a block returns: itself, or the first of a tuple."""
    return output if isinstance(output, Tensor) else output[0]


def model_inputs(model: Any, tokens: Tensor) -> dict[str, Tensor]:
    """`tokens` `[batch, tokens]` as arguments of the model. Raises QP224 for a model that reads something else."""
    parameters = inspect.signature(model.forward).parameters
    if model.main_input_name != "input_ids" or "input_ids" not in parameters:
        text = f"{type(model).__name__} reads {model.main_input_name}, not tokens"
        raise fail("QP224", text, RTN_DOES_WITHOUT)
    inputs = {"input_ids": tokens}
    if model.config.is_encoder_decoder and "decoder_input_ids" in parameters:
        inputs["decoder_input_ids"] = tokens
    return inputs


class Forward:
    """The forward pass of a skeleton, cut at its blocks. Only parameters outside of the blocks are loaded by it, and released
    when a method is done; blocks are loaded and called by whoever has this object."""

    def __init__(self, blocks: Blocks, weights: Weights, reader: TensorReader) -> None:
        self.blocks, self.weights, self.reader = blocks, weights, reader
        self.model = weights.model
        self._returned: dict[int, Any] = {}  # stack -> what its blocks return beside the hidden state
        self._outside = _outside(blocks, weights)

    def capture(self, stack: int, batches: Iterable[Inputs], finished: Sequence[Sequence[Tensor]] = ()) -> Captured:
        """What the blocks of stack number `stack` are called with. `finished`: for each stack before it, the last hidden
        states, one a batch. Raises QP224 for a model that does anything to hidden states between its blocks."""
        hidden: list[Tensor] = []
        calls: list[list[Call]] = [[] for _ in self.blocks.stacks[stack].blocks]
        same = _Same()
        with self._loading():
            for i, inputs in enumerate(batches):
                recorder = _Recorder(self, stack, same, [states[i] for states in finished])
                recorder.run(inputs)
                hidden.append(recorder.first)
                for k, call in enumerate(recorder.calls):
                    calls[k].append(call)
        return Captured(hidden, calls)

    def outputs(self, batches: Iterable[Inputs], finished: Sequence[Sequence[Tensor]]) -> Iterator[Any]:
        """What the model returns (`.logits`) for each batch, given the last hidden states of every stack."""
        with self._loading():
            for i, inputs in enumerate(batches):
                yield _Recorder(self, len(self.blocks.stacks), _Same(), [states[i] for states in finished]).run(inputs)

    @contextlib.contextmanager
    def _loading(self) -> Iterator[None]:
        mode = _LoadedOnUse(self.weights, self.reader, self._outside)
        buffers = [n for n in self.weights.under("") if n in self._outside and n not in self.weights.empty()]
        self.weights.load_parameters(buffers, self.reader)
        try:
            with mode, torch.no_grad():
                yield
        finally:
            self.weights.release_parameters(mode.loaded)


def _outside(blocks: Blocks, weights: Weights) -> frozenset[str]:
    inside = tuple(f"{stack.name}." for stack in blocks.stacks)
    return frozenset(name for name in weights.under("") if not name.startswith(inside))


class _LoadedOnUse(TorchFunctionMode):
    """Loads a parameter that is still on meta when anything computes with it: whichever way the model's code comes by it."""

    def __init__(self, weights: Weights, reader: TensorReader, names: frozenset[str]) -> None:
        super().__init__()
        self._weights, self._reader = weights, reader
        self._names = {id(p): name for name, p in weights.empty().items() if name in names}
        self.loaded: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*tree_map(self._real, args), **tree_map(self._real, kwargs or {}))

    def _real(self, value: Any) -> Any:
        name = self._names.get(id(value)) if isinstance(value, nn.Parameter) else None
        if name is None:
            return value
        if name not in self.loaded:
            self._weights.load_parameters([name], self._reader)
            self.loaded.append(name)
        return self._weights.model.get_parameter(name)


class _Stop(Exception):
    """The last block of the stack is reached; the rest of the model is not needed."""


class _Same:
    """Keeps tensors that are equal once."""

    def __init__(self) -> None:
        self._known: dict[tuple[Any, ...], list[Tensor]] = {}

    def __call__(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        known = self._known.setdefault((value.shape, value.dtype), [])
        for other in known:
            if other is value or torch.equal(other, value):
                return other
        known.append(value)
        del known[:-REMEMBERED]
        return value


@dataclass
class _Recorder:
    """One forward of the model with stubs: blocks of stacks before `stack` return what they are `finished` with, its own
    record their calls and pass the hidden state on."""

    forward: Forward
    stack: int
    same: _Same
    finished: list[Tensor]
    calls: list[Call] = field(default_factory=list)

    @property
    def first(self) -> Tensor:
        return self._first

    def run(self, inputs: Inputs) -> Any:
        model, stacks = self.forward.model, self.forward.blocks.stacks
        options: dict[str, Any] = dict(inputs)
        if "use_cache" in inspect.signature(model.forward).parameters:
            options["use_cache"] = False
        self._last: Tensor | None = None
        self._own: dict[str, Callable[..., Any]] = {}
        with contextlib.ExitStack() as undo:
            for number, stack in enumerate(stacks):
                for k, name in enumerate(stack.blocks):
                    undo.enter_context(self._replaced(number, k, name))
            try:
                output = model(**options)
            except _Stop:
                return None
        if self.stack < len(stacks):
            text = f"{type(model).__name__} never ran '{stacks[self.stack].blocks[-1]}' for these inputs"
            raise fail("QP224", text, RTN_DOES_WITHOUT)
        return output

    @contextlib.contextmanager
    def _replaced(self, number: int, k: int, name: str) -> Iterator[None]:
        """The stub is an attribute of the instance, which a module's call finds before its class's `forward`."""
        block = self.forward.model.get_submodule(name)
        own, before = block.forward, block.__dict__.get("forward")

        def stub(*arguments: Any, **options: Any) -> Any:
            if number < self.stack:
                return self._pass(number, k, arguments, options)
            return self._record(number, k, own, arguments, options)

        block.forward = stub
        try:
            yield
        finally:
            if before is None:
                del block.forward
            else:
                block.forward = before

    def _pass(self, number: int, k: int, arguments: tuple[Any, ...], options: Mapping[str, Any]) -> Any:
        """What a block of a finished stack returns: only the last one's hidden state is looked at."""
        return _with_hidden(self.forward._returned.get(number), self.finished[number])

    def _record(
        self, number: int, k: int, own: Callable[..., Any], arguments: tuple[Any, ...], options: Mapping[str, Any]
    ) -> Any:
        blocks, model = self.forward.blocks.stacks[number].blocks, self.forward.model
        if number != self.stack or k != len(self.calls):
            text = f"{type(model).__name__} does not run its blocks one after the other ('{blocks[k]}' out of turn)"
            raise fail("QP224", text, RTN_DOES_WITHOUT)
        place, hidden = _find_hidden(arguments, options, self._last)
        if place is None or hidden is None:
            text = f"{type(model).__name__} does something to the hidden state before '{blocks[k]}'"
            raise fail("QP224", text, RTN_DOES_WITHOUT)
        if k == 0:
            self._first = hidden
        left = list(arguments), dict(options)
        left[isinstance(place, str)][place] = None  # type: ignore[index]
        self.calls.append(Call(tuple(tree_map(self.same, left[0])), tree_map(self.same, left[1]), place))
        _refuse_state(self.calls[-1], blocks[k])
        returned = self._returned(number, blocks[0], k, own, arguments, options)
        self._last = hidden
        if k == len(blocks) - 1:
            raise _Stop
        return _with_hidden(returned, hidden)

    def _returned(
        self, number: int, name: str, k: int, own: Callable[..., Any], arguments: tuple[Any, ...], options: Mapping[str, Any]
    ) -> Any:
        """What a block returns beside the hidden state, learnt by running the first one. Tensors there (T5's position bias)
        go on to the other blocks, so that it then runs for every batch."""
        known = self.forward._returned
        rest = [v for v in tree_flatten(known[number])[0] if isinstance(v, Tensor)] if number in known else None
        if k == 0 and (rest is None or rest):
            self.forward.weights.load(name, self.forward.reader)
            output = own(*arguments, **options)
            self.forward.weights.release(name)
            known[number] = None if isinstance(output, Tensor) else (None, *output[1:])
        return known[number]


def _with_hidden(returned: Any, hidden: Tensor) -> Any:
    return hidden if returned is None else (hidden, *returned[1:])


def _find_hidden(
    arguments: tuple[Any, ...], options: Mapping[str, Any], last: Tensor | None
) -> tuple[int | str | None, Tensor | None]:
    """Where the hidden state is: the very tensor that the block before returned; for the first block, the first float."""
    every: list[tuple[int | str, Any]] = [*enumerate(arguments), *options.items()]
    for place, value in every:
        if isinstance(value, Tensor) and (value is last if last is not None else value.is_floating_point()):
            return place, value
    return None, None


def _refuse_state(call: Call, name: str) -> None:
    """A call that is made again and again must not depend on when it is made."""
    from transformers import Cache

    if any(isinstance(value, Cache) for value in tree_flatten((call.arguments, dict(call.options)))[0]):
        raise fail("QP224", f"'{name}' is called with a cache although none was asked for", RTN_DOES_WITHOUT)
