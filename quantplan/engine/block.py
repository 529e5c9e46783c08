"""One block of a calibration: run on all batches of both chains, its matrices solved where the batches meet, then tuned."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from quantplan.algorithm import ALGORITHMS, Algorithm
from quantplan.engine import memory, moments
from quantplan.engine.arrived import Arrived, round_inputs
from quantplan.engine.lockstep import Wait, lockstep
from quantplan.engine.scaling import Saw
from quantplan.engine.tuning import TunedBlock
from quantplan.errors import Place as Origin
from quantplan.errors import QuantplanError, fail
from quantplan.kv_cache import SCALES, KVCache
from quantplan.live.cache import CACHE, SeenCache, changing_cache, takes_cache
from quantplan.live.experts import every_token_to_every_expert
from quantplan.live.forward import Call
from quantplan.live.routed import RoutedTokens
from quantplan.live.watch import watching
from quantplan.live.weights import Place
from quantplan.scheme import NonFinite, Params
from quantplan.statistics import Statistics
from quantplan.tensor import QuantizedTensor

if TYPE_CHECKING:
    from quantplan.engine.calibrated import Run

WIDE = 2048  # columns from which on what statistics and solvers leave behind is worth giving back at once


@dataclass
class Block:
    """One block while it is solved."""

    run: Run
    name: str
    calls: Sequence[Call]
    exact_calls: Sequence[Call]
    solved: dict[str, QuantizedTensor] = field(default_factory=dict)
    losses: dict[str, float] = field(default_factory=dict)
    changed: dict[str, Tensor | None] = field(default_factory=dict)  # stored tensor -> what a transform made of it
    ranges: dict[str, Params] = field(default_factory=dict)  # matrix -> what was found for its static activations
    unseen: list[str] = field(default_factory=list)  # experts that no token came to, rounded without data
    unfollowed: list[str] = field(default_factory=list)  # matrices whose rows may be padding: of which tokens is not known
    untuned: list[str] = field(default_factory=list)  # matrices whose algorithm tunes, that stay as they were solved
    _tokens: dict[int, Tensor | None] = field(default_factory=dict)  # run -> which tokens the rows are that it brought last
    _places: dict[str, int] = field(default_factory=dict)  # module -> when it was first reached
    _last: Arrived | None = None

    def solve(self, hidden: Sequence[Tensor], exact: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """The hidden states after the block, of both chains; its matrices are in `solved`."""
        run = self.run
        run.weights.load(self.name, run.reader)
        try:
            self.module = run.model.get_submodule(self.name)
            self.inside = run.weights.matrices_in(self.name)
            self.changed = run.scaling(self.name, partial(self._watch, hidden))
            original = copy.deepcopy(self.module) if exact else self.module
            self.attentions = {k: v for k, v in run.attentions.items() if k.startswith(f"{self.name}.")}
            if len(self.attentions) > 1:
                text = f"'{self.name}' has several attentions, whose keys and values cannot be told apart"
                raise fail("QP224", text, "leave kv_cache out", file=run.source)
            self.first = min(len(self.exact_calls), len(exact))
            runs = [self._forward(i, original, c, h) for i, (c, h) in enumerate(zip(self.exact_calls, exact, strict=False))]
            both = zip(self.calls, hidden, strict=bool(self.calls))
            runs += [self._forward(i, self.module, c, h) for i, (c, h) in enumerate(both, self.first)]
            outputs = self._lockstep(runs, [self.module, original])
            self._solve_unseen()
            if not runs:  # the model skips the block
                return list(hidden), list(exact)
            ends, exact_ends = outputs[self.first :], outputs[: self.first]
            return self._tune(hidden, exact_ends, original) or ends, exact_ends
        finally:
            self._last = None
            run.weights.release(self.name)

    def _watch(self, hidden: Sequence[Tensor], seen: Saw) -> None:
        """Runs the block, not quantized yet, on all batches; `seen` is given the tokens that count."""
        for i, (call, state) in enumerate(zip(self.calls, hidden, strict=True)):
            routed = RoutedTokens(self.run.batches.count(i))

            def see(name: str, index: int | None, inputs: Tensor, batch: int = i, routed: RoutedTokens = routed) -> None:
                tokens = routed.of(name, index, inputs)
                self._follow((name, index), inputs, batch, tokens)
                rows = self.run.batches.counted(inputs, batch, tokens)
                if len(rows):  # an expert that is given padding alone was given nothing
                    seen(name, index, rows)

            with torch.no_grad(), moments.computing(), watching(self.module, see, self.name), routed:
                call(self.module, state)

    def _follow(self, point: tuple[str, int | None], inputs: Tensor, batch: int, tokens: Tensor | None) -> None:
        """Keeps the names of the matrices at `point` where what does not count cannot be told from what does."""
        if not self.run.batches.known(inputs, batch, tokens):
            names = (n for n in self.inside.get(point, ()) if n in self.run.jobs and n not in self.unfollowed)
            self.unfollowed.extend(names)

    def _forward(self, number: int, module: nn.Module, call: Call, hidden: Tensor) -> Callable[[Wait[Tensor]], Tensor]:
        batch = number if number < self.first else number - self.first

        def forward(wait: Wait[Tensor]) -> Tensor:
            asked = call
            for attention in self.attentions if takes_cache(module) else ():

                def cached(scale: str, states: Tensor, at: str = attention) -> Tensor:
                    return wait((f"{at}.{scale}", None), states)

                asked = replace(call, options={**call.options, CACHE: SeenCache(None, cached)})

            def seen(name: str, index: int | None, inputs: Tensor) -> Tensor | None:
                tokens = routed.of(name, index, inputs)
                if (name, index) not in self.inside:
                    return None
                given, self._tokens[number] = cast(inputs), tokens
                answer = wait((name, index), given)
                return None if answer is given else answer

            cast, routed = _Cast(moments.fast_dtype()), RoutedTokens(self.run.batches.count(batch))
            torch.set_num_threads(1)  # of this thread: as many of them run as there are cores
            with torch.no_grad(), moments.computing(), watching(module, seen, self.name), routed:
                return self.run.kept(asked(module, hidden))

        return forward

    def _lockstep(self, runs: Sequence[Callable[[Wait[Tensor]], Tensor]], modules: Iterable[nn.Module]) -> list[Tensor]:
        """What `runs` of `modules` return. Between points a core has a run to itself: nothing waits for another core, as it would
        within every operation. At a point, all cores work for it."""
        threads = torch.get_num_threads()

        def meet(point: Any, inputs: Mapping[int, Tensor]) -> Mapping[int, Tensor]:
            torch.set_num_threads(threads)
            answers = self._meet(point, inputs)
            torch.set_num_threads(1)
            return answers

        with contextlib.ExitStack() as undo:
            undo.callback(torch.set_num_threads, threads)
            torch.set_num_threads(1)
            for module in {id(m): m for m in modules if self.run.all_experts}.values():
                undo.enter_context(every_token_to_every_expert(module))
            return lockstep(runs, meet, self._rank, threads)

    def _rank(self, point: Any) -> tuple[int, int, int]:
        """Modules in the order they are reached; the slabs of one in theirs, and for each its parameters as they come."""
        name, index = point
        module = name.rpartition(".")[0]
        place = self._places.setdefault(module, len(self._places))
        return place, -1 if index is None else index, self._places.setdefault(name, len(self._places))

    def _meet(self, point: Any, inputs: Mapping[int, Tensor]) -> Mapping[int, Tensor]:
        module, _, scale = point[0].rpartition(".")
        if module in self.attentions and scale in SCALES:
            return self._cached(self.attentions[module], scale, inputs)
        names = [n for n in self.inside[point] if n in self.run.jobs]
        arrived = self._arrived(inputs, names[0]) if names else None
        if arrived is None:
            return inputs
        unsolved = [n for n in names if n not in self.solved]
        if unsolved and not arrived.counts:
            for name in unsolved:
                self._solve(name, None)
            return inputs
        needs = any(self.run.jobs[n].assignment.algorithm.needs for n in unsolved)
        for i, x in arrived.quantized.items() if unsolved and (needs or arrived.params) else ():
            self._follow(point, x, i, arrived.tokens[i])
        try:
            statistics = arrived.statistics if needs else None
        except NonFinite:
            raise self._not_finite("the inputs, or their squares", "keep the module: keep: true", names[0]) from None
        for name in unsolved:
            solve = partial(self._solve, name, statistics)
            self.changed |= self.run.correcting.around(self.run.jobs[name].matrix, arrived.mean, solve)
            if arrived.params:
                self.ranges[name] = arrived.params
        self._give_back(arrived.rounded)
        return {**inputs, **{i + self.first: x for i, x in arrived.rounded.items()}}

    def _cached(self, module: str, scale: str, states: Mapping[int, Tensor]) -> Mapping[int, Tensor]:
        """Keys or values of all batches `[batch, heads, tokens, features]`, as they come out of the cache."""
        cache = self.run.cache
        assert cache is not None
        quantized = {i: x for i, x in states.items() if i >= self.first}
        try:
            found = cache.find_scale([
                self.run.batches.counted(x.transpose(1, 2).flatten(0, 1), i - self.first) for i, x in quantized.items()
            ])  # fmt: skip
        except NonFinite:
            raise self._not_finite("keys or values", "leave kv_cache out", f"{module}.{scale}") from None
        self.ranges.setdefault(module, {})[scale] = found
        return {**states, **{i: cache.rounded(x, found) for i, x in quantized.items()}}

    def _arrived(self, inputs: Mapping[int, Tensor], name: str) -> Arrived | None:
        """What came to a point from the runs of both chains, for the matrix there; the same as before where that serves. None
        where the quantized chain brought nothing."""
        quantized = {i - self.first: x for i, x in inputs.items() if i >= self.first}
        assignment, last = self.run.jobs[name].assignment, self._last
        if not quantized or (last is not None and last.serves(quantized, assignment)):
            return last if quantized else None
        self._last = last = None  # its statistics are not held while the next ones are made
        self._give_back(quantized)
        batches, tokens = self.run.batches, {i: self._tokens[i + self.first] for i in quantized}
        exact = {i: x for i, x in inputs.items() if i < self.first and batches.whole(x, i, self._tokens[i])}
        made = Arrived(quantized, exact, assignment, batches, tokens, self.ranges.get(name))
        try:
            if made.counts or made.known is not None:
                made.rounded  # noqa: B018  computed once, here, where the name is known
        except NonFinite:
            raise self._not_finite("the inputs", "keep the module: keep: true", name) from None
        self._last = made
        return made

    def _give_back(self, inputs: Mapping[int, Tensor]) -> None:
        """Before and after what takes much memory: between the two, runs of batches would fill other memory."""
        if next(iter(inputs.values())).shape[-1] >= WIDE:
            memory.return_memory()

    def _not_finite(self, where: str, advice: str, tensor: str) -> QuantplanError:
        return fail("QP601", f"NaN or infinity in {where}", advice, file=self.run.source, tensor=tensor)

    def _solve(self, name: str, statistics: Statistics | None) -> None:
        job = self.run.jobs[name]
        wq, algorithm = job.assignment.wq, job.assignment.algorithm
        assert wq is not None
        if statistics is None and algorithm.needs:
            algorithm = ALGORITHMS.get("rtn")()
            self.unseen.append(name)
        places = self.run.weights.place_of(job.matrix)
        weight = torch.cat([p.view(self.run.model) for p in places]).float()
        try:
            absmax = self.run.magnitudes.of(job.matrix) if wq.needs_absmax else None
            made = algorithm.solve(weight, wq.quantizer(name), absmax, statistics)
        except NonFinite:
            advice = "mend the checkpoint, or keep the module: keep: true"
            raise self._not_finite("the weight or its inputs", advice, job.matrix.tensor) from None
        except QuantplanError as failed:  # QP604
            raise QuantplanError(p.at(Origin(self.run.source, tensor=name)) for p in failed.problems) from None
        values = wq.quantizer().dequantize(made)
        at = 0
        for place in places:
            place.view(self.run.model).copy_(values[at : at + place.rows])
            at += place.rows
        self.solved[name] = made
        if statistics is not None:
            error, hessian = values - weight, statistics.hessian
            size = float((weight * (weight @ hessian)).sum())
            self.losses[name] = float((error * (error @ hessian)).sum()) / size if size > 0 else 0.0

    def _tune(self, hidden: Sequence[Tensor], targets: Sequence[Tensor], original: nn.Module) -> list[Tensor]:
        """Hands the solved block to the algorithm that tunes, for its matrices; the hidden states after it, or nothing where
        nothing was changed. Parts of fused parameters stay as they were solved: the gradient of each would be as large as all."""
        run = self.run
        chosen: dict[Algorithm, dict[str, Place]] = {}
        for name in self.solved:
            place, *others = run.weights.place_of(run.jobs[name].matrix)
            algorithm, parameter = run.jobs[name].assignment.algorithm, run.model.get_parameter(place.parameter)
            if not algorithm.tunes:
                continue
            if not others and place.index is None and place.view(run.model).numel() == parameter.numel():
                inside = replace(place, parameter=place.parameter.removeprefix(f"{self.name}."))
                chosen.setdefault(algorithm, {})[name] = inside
            else:
                self.untuned.append(name)
        changed: dict[str, QuantizedTensor] = {}
        with self._rounding():
            for algorithm, places in chosen.items():
                weights = {n: p.view(original).float() for n, p in places.items()}
                started = {n: self.solved[n] for n in places}
                data = (self.calls, hidden, targets)
                how = (moments.computing, run.batches.counted)
                problem = TunedBlock(self.module, *data, places, weights, started, *how)
                tuned = algorithm.tune(problem)
                for name, made in tuned.items():
                    places[name].view(self.module).copy_(made.scheme.quantizer().dequantize(made))
                changed |= tuned
            self.solved |= changed
            if not changed:
                return []
            with torch.no_grad(), moments.computing():
                return [self.run.kept(call(self.module, state)) for call, state in zip(self.calls, hidden, strict=True)]

    @contextlib.contextmanager
    def _rounding(self) -> Iterator[None]:
        """While it is open, the solved block rounds the inputs of its linears and its key-value cache as the quantized model
        will. Gradients pass straight through. Fused experts are given theirs as they are."""
        with contextlib.ExitStack() as undo:
            for (parameter, _), names in self.inside.items():
                module = self.run.model.get_submodule(parameter.rpartition(".")[0])
                treated = next((n for n in names if n in self.run.jobs and self.run.jobs[n].assignment.aq is not None), None)
                if treated is None or not isinstance(module, nn.Linear | Conv1D):
                    continue
                rounding = partial(
                    round_inputs, assignment=self.run.jobs[treated].assignment, params=self.ranges.get(treated, {})
                )
                undo.callback(module.register_forward_pre_hook(partial(_round_straight, rounding)).remove)
            for name, stored in self.attentions.items():
                assert self.run.cache is not None
                change = partial(_through_cache, self.run.cache, self.ranges[stored])
                undo.callback(changing_cache(self.run.model.get_submodule(name), change).remove)
            yield

    def _solve_unseen(self) -> None:
        """What no token came to. Raises QP605 for a matrix, or a cache, that every token should have come to."""
        for name in self.attentions.values():
            if len(self.ranges.get(name, ())) < len(SCALES):
                text = f"'{name}' puts no keys and values into a cache when it runs"
                raise fail("QP605", text, "leave kv_cache out", file=self.run.source)
        for (parameter, index), names in self.inside.items():
            for name in names:
                job = self.run.jobs.get(name)
                if job is None or name in self.solved:
                    continue
                takes = job.assignment.algorithm.takes_data or job.assignment.observer is not None
                if takes and index is None and ".experts." not in parameter:
                    text = f"'{name}' was given no input: the model never used it for these data"
                    advice = "give it algorithm: rtn, and no static activations, in an override"
                    raise fail("QP605", text, advice, file=self.run.source)
                self._solve(name, None)


class _Cast:
    """Inputs of matrices in the dtype they are multiplied in, one tensor for those that share an input."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._last = self._made = torch.empty(0)

    def __call__(self, inputs: Tensor) -> Tensor:
        last = self._last  # held: nothing else can come to lie where it does
        if last.data_ptr() != inputs.data_ptr() or last.shape != inputs.shape:
            self._last, self._made = inputs, inputs.to(self._dtype)
        return self._made


def _round_straight(rounding: Callable[[Tensor], Tensor], module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """A hook before a module: its inputs rounded, with the gradients of those that were not."""
    x, *others = inputs
    with torch.no_grad():
        moved = rounding(x.reshape(-1, x.shape[-1]).float()).reshape(x.shape).to(x.dtype) - x
    return (x + moved, *others)


def _through_cache(cache: KVCache, scales: Params, name: str, states: Tensor) -> Tensor:
    """Keys or values as they come out of the cache, with the gradients of those that were not rounded."""
    with torch.no_grad():
        moved = cache.rounded(states, scales[name]) - states
    return states + moved
