"""Running a model one block at a time: what every block is called with, and what the model makes of the last one's output.

The model's own forward runs with stubs in place of its blocks, so embeddings, masks, position embeddings, final norms and
heads are computed by its own code; parameters outside of the blocks are loaded when they are first used.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map
from transformers import Cache

from quantplan.checkpoint.reader import TensorReader
from quantplan.errors import fail
from quantplan.live.blocks import Blocks
from quantplan.live.watch import Seen, Watch
from quantplan.live.weights import RTN_DOES_WITHOUT, Weights

Inputs = Mapping[str, Tensor]
Arguments = tuple[Any, ...]
Options = dict[str, Any]
Own = Callable[..., Any]  # a block's own forward
OnBlock = Callable[[int, int, Own, Arguments, Options], Any]  # stack, block in it, and what it is called with
REMEMBERED = 8  # tensors of one shape that later ones are compared with, to keep equal ones once


@dataclass(frozen=True)
class Call:
    """What one block is called with for one batch, but for the hidden state: `None` stands in its place."""

    arguments: Arguments
    options: Options
    place: int | str  # of the hidden state: a position, or a name

    def __call__(self, block: Callable[..., Any], hidden: Tensor) -> Tensor:
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
    when a method is done; blocks are loaded and called by whoever has this object.

    Methods that take `seen` call it as `watching` does, for matrices outside of the blocks.
    """

    def __init__(self, blocks: Blocks, weights: Weights, reader: TensorReader) -> None:
        self.blocks, self.weights, self.reader = blocks, weights, reader
        self.model = weights.model
        inside = tuple(f"{stack.name}." for stack in blocks.stacks)
        self._outside = frozenset(name for name in weights.under("") if not name.startswith(inside))
        self._order: list[list[int]] = []  # for each stack, the blocks that run
        self._returned: dict[int, Any] = {}  # stack -> what its blocks return, None in place of the hidden state

    def capture(
        self,
        stack: int,
        batches: Iterable[Inputs],
        finished: Sequence[Sequence[Tensor]] = (),
        seen: Seen | None = None,
        keep: Callable[[Tensor], Tensor] = lambda hidden: hidden,
    ) -> Captured:
        """What the blocks of stack number `stack` are called with. `finished`: for each stack before it, the last hidden
        states, one a batch. A block that does not run for these inputs (cross attention without an image) has no calls.
        `keep`: what is to become of each first hidden state, once it is there.

        Raises QP224 for a model that does not hand one hidden state on from block to block, each once.
        """
        captured = Captured([], [[] for _ in self.blocks.stacks[stack].blocks])
        same, left = _Same(), iter(batches)
        for first in itertools.islice(left, 1):
            if not self._order:
                self._rehearse(first)
            with self._loading(seen) as loaded:
                for i, inputs in enumerate(itertools.chain((first,), left)):
                    recorder = _Recorder(self, stack, same, loaded, [states[i] for states in finished])
                    with contextlib.suppress(_Stop):
                        self._run(inputs, loaded, recorder.on_block)
                    captured.hidden.append(keep(recorder.first))
                    for k, call in recorder.calls.items():
                        captured.calls[k].append(call)
        return captured

    def outputs(self, batches: Iterable[Inputs], finished: Sequence[Sequence[Tensor]], seen: Seen | None = None) -> Iterator[Any]:
        """What the model returns (`.logits`) for each batch, given the last hidden states of every stack."""
        with self._loading(seen) as loaded:
            for i, inputs in enumerate(batches):
                states = [states[i] for states in finished]
                yield self._run(inputs, loaded, _Recorder(self, len(states), _Same(), loaded, states).on_block)

    def rehearse(self) -> None:
        """Runs a few tokens, unless something ran before: whether blocks can be called one by one does not depend on data.

        Raises QP224 as `capture` does."""
        if not self._order:
            self._rehearse(model_inputs(self.model, torch.arange(4)[None]))

    def _rehearse(self, inputs: Inputs) -> None:
        """Learns from one sequence which blocks run, and what they return beside the hidden state."""
        few = {name: value[:1] for name, value in inputs.items()}
        order: list[tuple[int, int]] = []

        def on_block(number: int, k: int, own: Own, arguments: Arguments, options: Options) -> Any:
            if (number, k) in order or (order and (number, k) < order[-1]):
                name = self.blocks.stacks[number].blocks[k]
                raise self.unfit(f"does not run its blocks one after the other ('{name}' comes out of turn)")
            order.append((number, k))
            if number not in self._returned:
                self._returned[number] = self.run_block(number, k, own, arguments, options)
            hidden = _find_hidden(arguments, options, None)[1]
            assert hidden is not None
            return _with_hidden(self._returned[number], hidden)

        with self._loading(None) as loaded:
            try:
                self._run(few, loaded, on_block)
            except (RuntimeError, ValueError, TypeError, IndexError, AttributeError) as error:
                raise self.unfit(f"cannot run with its blocks taken out: {str(error).splitlines()[0]}") from error
        self._order = [[k for n, k in order if n == number] for number in range(len(self.blocks.stacks))]
        for stack, ran in zip(self.blocks.stacks, self._order, strict=True):
            if not ran:
                raise self.unfit(f"never runs '{stack.blocks[0]}' for these inputs")

    def run_block(self, number: int, k: int, own: Own, arguments: Arguments, options: Options) -> Any:
        """What a block of stack `number` returns beside the hidden state, by running it."""
        name = self.blocks.stacks[number].blocks[k]
        self.weights.load(name, self.reader)
        output = own(*arguments, **options)
        self.weights.release(name)
        hidden = _find_hidden(arguments, options, None)[1]
        if hidden is None or hidden_of(output).shape != hidden.shape:
            raise self.unfit(f"has blocks that change the shape of the hidden state ('{name}')")
        return None if isinstance(output, Tensor) else (None, *output[1:])

    def unfit(self, what: str) -> Exception:
        """QP224 for this model."""
        return fail("QP224", f"{type(self.model).__name__} {what}", RTN_DOES_WITHOUT, file=self.weights.checkpoint.source)

    @contextlib.contextmanager
    def _loading(self, seen: Seen | None) -> Iterator[_LoadedOnUse]:
        buffers = [n for n in self._outside if n not in self.weights.empty()]
        self.weights.load_parameters(buffers, self.reader)
        watch = Watch({}, seen) if seen is not None else None
        loaded = _LoadedOnUse(self.weights, self.reader, self._outside, watch)
        try:
            yield loaded
        finally:
            self.weights.release_parameters(loaded.names)

    def _run(self, inputs: Inputs, loaded: _LoadedOnUse, on_block: OnBlock) -> Any:
        """The model's forward with stubs. A stub is an attribute of the instance, which a module's call finds before its
        class's `forward`; it is taken away again."""
        options: dict[str, Any] = {name: value.to(self.weights.device) for name, value in inputs.items()}
        if "use_cache" in inspect.signature(self.model.forward).parameters:
            options["use_cache"] = False
        with contextlib.ExitStack() as undo:
            for number, stack in enumerate(self.blocks.stacks):
                for k, name in enumerate(stack.blocks):
                    undo.enter_context(_replaced(self.model.get_submodule(name), partial(_stub, on_block, number, k)))
            for mode in (loaded.watch or contextlib.nullcontext(), loaded, torch.no_grad()):
                undo.enter_context(mode)
            return self.model(**options)

    def ran(self, number: int) -> list[int]:
        """The blocks of stack `number` that run."""
        return self._order[number]

    def returned(self, number: int) -> Any:
        """What the blocks of stack `number` return, None in place of the hidden state; None if that is all."""
        return self._returned[number]


@contextlib.contextmanager
def _replaced(block: nn.Module, stub: Callable[..., Any]) -> Iterator[None]:
    own, before = block.forward, block.__dict__.get("forward")
    block.forward = partial(stub, own)
    try:
        yield
    finally:
        if before is None:
            del block.forward
        else:
            block.forward = before


def _stub(on_block: OnBlock, number: int, k: int, own: Own, *arguments: Any, **options: Any) -> Any:
    return on_block(number, k, own, arguments, options)


class _LoadedOnUse(TorchFunctionMode):
    """Loads a parameter that is still on meta when anything computes with it: whichever way the model's code comes by it."""

    def __init__(self, weights: Weights, reader: TensorReader, names: frozenset[str], watch: Watch | None) -> None:
        super().__init__()
        self._weights, self._reader, self.watch = weights, reader, watch
        self._known = {id(p): name for name, p in weights.empty().items() if name in names}
        self.names: set[str] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*tree_map(self.real, args), **tree_map(self.real, kwargs or {}))

    def real(self, value: Any) -> Any:
        """`value`, or the parameter that it stands for."""
        name = self._known.get(id(value)) if isinstance(value, nn.Parameter) else None
        if name is None:
            return value
        if name not in self.names:
            self._weights.load_parameters([name], self._reader)
            self.names.add(name)
            if self.watch is not None:
                self.watch.add(name, self._weights.model.get_parameter(name))
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


class _Recorder:
    """What stubs do for one batch: blocks of stacks before `stack` return what they are `finished` with, its own record their
    calls and pass the hidden state on."""

    def __init__(self, forward: Forward, stack: int, same: _Same, loaded: _LoadedOnUse, finished: Sequence[Tensor]) -> None:
        self._forward, self._stack, self._same, self._loaded, self._finished = forward, stack, same, loaded, finished
        self.calls: dict[int, Call] = {}
        self.first: Tensor = torch.empty(0)
        self._last: Tensor | None = None
        self._returned: Any = None

    def on_block(self, number: int, k: int, own: Own, arguments: Arguments, options: Options) -> Any:
        """One stub. A finished stack's hidden state is the same from its first block on: only what its last one returns is
        looked at."""
        forward = self._forward
        if number < self._stack:
            return _with_hidden(forward.returned(number), self._finished[number])
        name, order = forward.blocks.stacks[number].blocks[k], forward.ran(number)
        if len(self.calls) == len(order) or order[len(self.calls)] != k:
            raise forward.unfit(f"runs '{name}' for one sequence and not for another")
        place, hidden = _find_hidden(arguments, options, self._last)
        if place is None or hidden is None:
            raise forward.unfit(f"does something to the hidden state before '{name}'")
        call = self._call(arguments, options, place)
        if any(isinstance(value, Cache) for value in tree_flatten((call.arguments, call.options))[0]):
            raise forward.unfit(f"calls '{name}' with a cache although none was asked for")
        if not self.calls:
            self.first, self._returned = hidden, forward.returned(number)
            # tensors beside the hidden state (T5's position bias) are made by the first block and go on to the others
            if any(isinstance(value, Tensor) for value in tree_flatten(self._returned)[0]):
                self._returned = forward.run_block(number, k, own, arguments, options)
        self.calls[k], self._last = call, hidden
        if len(self.calls) == len(order):
            raise _Stop
        return _with_hidden(self._returned, hidden)

    def _call(self, arguments: Arguments, options: Options, place: int | str) -> Call:
        plain = [None if at == place else value for at, value in enumerate(arguments)]
        named = {name: None if name == place else value for name, value in options.items()}
        return Call(tuple(tree_map(self._kept, plain)), tree_map(self._kept, named), place)

    def _kept(self, value: Any) -> Any:
        """A parameter is handed on as its values, which stay when the parameter is released."""
        value = self._loaded.real(value)
        return self._same(value.detach() if isinstance(value, nn.Parameter) else value)


def _with_hidden(returned: Any, hidden: Tensor) -> Any:
    return hidden if returned is None else (hidden, *returned[1:])


def _find_hidden(arguments: Arguments, options: Options, last: Tensor | None) -> tuple[int | str | None, Tensor | None]:
    """Where the hidden state is: the very tensor that the block before returned; for the first block, the first float."""
    every: list[tuple[int | str, Any]] = [*enumerate(arguments), *options.items()]
    for place, value in every:
        if isinstance(value, Tensor) and (value is last if last is not None else value.is_floating_point()):
            return place, value
    return None, None
