"""Algorithms: round-to-nearest is the quantizer's own rounding; the search is never worse, and equals a slow reference."""

import math
from itertools import product
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from quantplan.algorithm import ALGORITHMS
from quantplan.algorithms.rtn import RoundToNearest
from quantplan.scheme import SCHEMES, NonFinite, Params, Quantizer, SchemeConfig
from quantplan.statistics import Statistics
from quantplan.tensor import QuantizedTensor

RESERVED = {"pattern", "wq", "aq", "algorithm", "keep", "optional", "expect", "group_size", "name"}


def configs() -> list[SchemeConfig]:
    """Every scheme in every granularity, without and with zero points, and every other format it has."""
    found: dict[SchemeConfig, None] = {}
    for member in SCHEMES:
        for granularity in member.granularities:
            size = {"group_size": member.fixed_group_size or 32} if granularity == "group" else {}
            found[member(granularity=granularity, **size)] = None
            if "symmetric" in member.model_fields:
                found[member(granularity=granularity, symmetric=False, **size)] = None
    for name in ("int4", "int8"):
        for rule in ("midpoint", "qmin"):
            found[SCHEMES.get(name)(group_size=32, scale_rule=rule)] = None
    for name, element in (("fp8", "e5m2"), ("mxfp6", "e3m2"), ("mxfp8", "e5m2")):
        found[SCHEMES.get(name)(format=element)] = None
    found[SCHEMES.get("int4")(scale_dtype="float16")] = None
    found[SCHEMES.get("int4")(scale_dtype="float32")] = None
    return list(found)


ALL = configs()


def label(config: SchemeConfig) -> str:
    given = {k: v for k, v in config.model_dump(exclude_defaults=True).items() if v is not None}
    return " ".join([config.name, *(f"{k}={v}" for k, v in given.items())])


def heavy(rows: int, columns: int, seed: int = 0) -> Tensor:
    """Student's t with three degrees of freedom: a few weights far out, which is what a shrunken range is for."""
    generator = torch.Generator().manual_seed(seed)
    chi = sum(torch.randn(rows, columns, generator=generator).square() for _ in range(3))
    x = torch.randn(rows, columns, generator=generator) / (chi / 3).sqrt() * 0.02  # type: ignore[operator]
    x[1] = 0
    x[2] = x[2].abs() + 0.05
    return x


def errors(q: QuantizedTensor, x: Tensor) -> Tensor:
    """The squared error of each group, float64."""
    quantizer = q.scheme.quantizer()
    return quantizer.groups((quantizer.dequantize(q).double() - x.double()).square()).sum(-1)


def same(a: QuantizedTensor, b: QuantizedTensor) -> bool:
    return torch.equal(a.codes, b.codes) and all(
        torch.equal(a.params[n].view(torch.uint8), b.params[n].view(torch.uint8)) for n in a.params | b.params
    )


@pytest.mark.parametrize("config", ALL, ids=label)
class TestRoundToNearest:
    def test_minmax_is_the_quantizers_own(self, config: SchemeConfig) -> None:
        for x, factor in product((heavy(130, 192), -heavy(130, 192)), (None, 1.5)):
            absmax = None if factor is None else x.abs().amax() * factor
            solved = RoundToNearest().solve(x, config.quantizer(), absmax)
            assert same(solved, config.quantizer().quantize(x, absmax)) and solved.scheme == config

    def test_a_search_is_never_worse_and_strictly_better_somewhere(self, config: SchemeConfig) -> None:
        x = heavy(130, 192)
        before = x.clone()
        plain = errors(RoundToNearest().solve(x, config.quantizer()), x)
        gains = []
        for options in ({}, {"grid": 20, "lowest": 0.96}):
            searched = RoundToNearest(search="mse", **options).solve(x, config.quantizer())
            found = errors(searched, x)
            # what is compared is a float32 sum: it may prefer an error that is larger in its last bits
            assert (found <= plain * (1 + 1e-5)).all()
            gains.append(1 - found.sum() / plain.sum())
        assert torch.equal(x, before)
        # with many bits only ranges near the full one are better; floats span so many binades that none need be
        least = 0.02 if config.bits <= 4 else 0.0
        assert max(gains) > least or (config.name == "fp8" and config.strategy == "tensor"), gains
        layout = config.param_layout(130, 192)
        assert {n: tuple(p.shape) for n, p in searched.params.items()} == {n: s for n, (_, s) in layout.items()}
        assert {n: p.dtype for n, p in searched.params.items()} == {
            n: p.dtype for n, p in config.quantizer().quantize(x).params.items()
        }

    def test_a_search_equals_a_slow_one_group_by_group(self, config: SchemeConfig) -> None:
        x = heavy(6, 64, seed=1)
        options = RoundToNearest(search="mse", grid=9, lowest=0.35)
        fast = options.solve(x, config.quantizer(), x.abs().amax())
        slow = slow_search(x, config, 9, 0.35)
        assert same(fast, slow)

    def test_a_search_keeps_zeros_and_refuses_what_is_not_finite(self, config: SchemeConfig) -> None:
        x = heavy(130, 192)
        x[:, ::9] = 0
        searched = RoundToNearest(search="mse")
        q = searched.solve(x, config.quantizer())
        assert (config.quantizer().dequantize(q)[x == 0] == 0).all()
        for bad in (math.nan, math.inf, -math.inf):
            x[129, 191] = bad
            for algorithm in (searched, RoundToNearest()):
                for absmax in (None, torch.tensor(1.0)):
                    with pytest.raises(NonFinite):
                        algorithm.solve(x, config.quantizer(), absmax)

    @pytest.mark.parametrize("search", ["mse", "imatrix", "hessian"])
    def test_rows_do_not_influence_one_another(self, config: SchemeConfig, search: Any) -> None:
        x = heavy(256, 64)
        if not config.splittable:
            return
        absmax, searched = x.abs().amax(), RoundToNearest(search=search, grid=5)
        whole = searched.solve(x, config.quantizer(), absmax, second_moments(64))
        for half in (slice(0, 128), slice(128, 256)):
            part = searched.solve(x[half], config.quantizer(), absmax, second_moments(64))
            # products of other sizes are summed in another order, which may decide a tie
            least = 1.0 if search == "mse" else 0.99
            assert (part.codes == whole.codes[half]).float().mean() >= least

    def test_a_search_by_the_hessian_finds_what_a_slow_one_does(self, config: SchemeConfig) -> None:
        x, known = heavy(6, 64, seed=1), second_moments(64)
        before = x.clone(), known.hessian.clone()
        q = RoundToNearest(search="hessian", grid=9, lowest=0.35).solve(x, config.quantizer("x"), None, known)
        assert torch.equal(x, before[0]) and torch.equal(known.hessian, before[1])
        found, least = output_errors(q, x, known.hessian), slow_search_by_hessian(x, config, known.hessian, 9, 0.35)
        scale = output_errors(RoundToNearest().solve(torch.zeros_like(x), config.quantizer()), x, known.hessian)
        assert ((found - least).abs() <= 1e-3 * least + 1e-7 * scale).all()

    def test_a_search_by_the_hessian_is_never_worse_than_rounding(self, config: SchemeConfig) -> None:
        x, known = heavy(130, 192), second_moments(192)
        x[:, ::9] = 0
        plain = output_errors(RoundToNearest().solve(x, config.quantizer()), x, known.hessian)
        searched = RoundToNearest(search="hessian")
        q = searched.solve(x, config.quantizer(), None, known)
        found = output_errors(q, x, known.hessian)
        assert (found <= plain * (1 + 1e-4)).all()
        assert found.sum() < (0.95 if config.bits <= 4 else 1) * plain.sum() or config.name == "fp8"
        assert (config.quantizer().dequantize(q)[x == 0] == 0).all()
        layout = config.param_layout(130, 192)
        assert {n: tuple(p.shape) for n, p in q.params.items()} == {n: s for n, (_, s) in layout.items()}
        for bad in (math.nan, math.inf):
            x[129, 191] = bad
            with pytest.raises(NonFinite):
                searched.solve(x, config.quantizer(), None, known)


def second_moments(columns: int, seed: int = 0) -> Statistics:
    """Of inputs that go together, of sizes that differ a lot; some are silent."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator) / columns**0.5 + torch.eye(columns)
    x = torch.randn(512, columns, generator=generator) @ mix * torch.logspace(-1, 1, columns)
    x[:, ::13] = 0
    return Statistics(x.t() @ x / len(x), len(x))


def places(config: SchemeConfig, rows: int, columns: int) -> list[tuple[slice, slice]]:
    """The rows and columns of each group, in the order of parameters."""
    down, across = config.grid(rows, columns)
    tall, wide = (128, 128) if config.strategy == "block" else (rows // down, columns // across)
    return [(slice(i * tall, (i + 1) * tall), slice(j * wide, (j + 1) * wide)) for i, j in product(range(down), range(across))]


def output_errors(q: QuantizedTensor, x: Tensor, hessian: Tensor) -> Tensor:
    """`tr(E H_g E^T)` of each group, float64."""
    error, hessian = q.scheme.quantizer().dequantize(q).double() - x.double(), hessian.double()
    return torch.stack([(error[r, c] @ hessian[c, c] * error[r, c]).sum() for r, c in places(q.scheme, *x.shape)])


def slow_search_by_hessian(x: Tensor, config: SchemeConfig, hessian: Tensor, count: int, lowest: float) -> Tensor:
    """The least error of each group's outputs, one group and one range at a time, in float64: with the range's own step and,
    where steps are fine, with the one that fits the range's codes best."""
    quantizer = config.quantizer()
    absmax = x.abs().amax() if config.needs_absmax else None
    groups = quantizer.groups(x)
    found = []
    for number, (r, c) in enumerate(places(config, *x.shape)):
        i, j = divmod(number, groups.shape[1])
        group, part, known = groups[i : i + 1, j : j + 1], x[r, c].double(), hessian[c, c].double()

        def values(params: Params, group: Tensor = group, shape: tuple[int, ...] = part.shape) -> Tensor:
            nearest = quantizer.nearest(group, params)
            return (
                nearest.view(128, 128)[: shape[0], : shape[1]] if config.strategy == "block" else nearest.view(shape)
            ).double()

        least = math.inf
        for factor in config.shrink_factors(count, lowest):
            tried = [quantizer.fit(group, factor, absmax)]
            codes = values(tried[0])
            size = float((codes @ known * codes).sum())
            if config.fine_steps and size > 0:
                ratio = float((part @ known * codes).sum()) / size
                tried.append(quantizer.with_step(tried[0], quantizer.step(tried[0]) * ratio))
            for params in tried:
                error = values(params) - part
                least = min(least, float((error @ known * error).sum()))
        found.append(least)
    return torch.tensor(found, dtype=torch.float64)


def slow_search(x: Tensor, config: SchemeConfig, count: int, lowest: float) -> QuantizedTensor:
    """One group at a time, one factor at a time, in plain Python: the factor with the least error, the first of equals."""
    quantizer = config.quantizer()
    absmax = x.abs().amax()
    groups = quantizer.groups(x)
    down, across = groups.shape[:2]
    factors = [1 - i * (1 - lowest) / (count - 1) for i in range(count)]
    if config.name.startswith("mx"):
        factors = [1.0, 2.0, 0.5]
    chosen: dict[str, list[Tensor]] = {}
    for i in range(down):
        for j in range(across):
            group = groups[i : i + 1, j : j + 1]
            best: Params = {}
            least = math.inf
            for factor in factors:
                params = quantizer.fit(group, factor, absmax)
                difference = quantizer.decode(quantizer.encode(group, params), params) - group
                error = difference.square().sum(-1).item()
                if error < least:
                    best, least = params, error
            for name, value in best.items():
                chosen.setdefault(name, []).append(value.reshape(-1))
    params = {
        name: values[0] if name in config.tensor_params else torch.cat([v.view(torch.uint8) for v in values])
        for name, values in chosen.items()
    }
    fitted = quantizer.fit(groups, 1.0, absmax)
    for name in params.keys() - config.tensor_params:
        params[name] = params[name].view(fitted[name].dtype).view(down, across, 1)
    return quantizer.quantize_groups(groups, params, *x.shape)


def test_mse_finds_the_planted_range() -> None:
    """Weights on an int4 grid of step 1, and one far outside: covering it would cost all the others."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randint(-7, 8, (4, 512), generator=generator).float()
    x[:, 0] = 7 / 0.55  # the range 0.55 of the full one has the step 1
    config = SCHEMES.get("int4")(granularity="channel", scale_dtype="float32")
    q = RoundToNearest(search="mse", grid=13, lowest=0.4).solve(x, config.quantizer())
    torch.testing.assert_close(q.params["scale"], torch.ones(4, 1))
    assert torch.equal(config.quantizer().dequantize(q)[:, 1:].round(), x[:, 1:])


def test_ties_go_to_the_range_tried_first() -> None:
    """1.0 is exact in mxfp4 with the rule's own scale and with the next: the rule's own stays."""
    x = torch.zeros(1, 32)
    x[0, 0] = 1
    q = RoundToNearest(search="mse").solve(x, SCHEMES.get("mxfp4")().quantizer())
    assert q.params["scale"].item() == 125


def test_microscaling_may_widen_its_range() -> None:
    """A block whose largest value would saturate is better off a binade higher: only the neighbours are tried."""
    x = torch.zeros(1, 32)
    x[0, 0] = 7.9  # the floor rule saturates at 6; a binade up it is 8
    config = SCHEMES.get("mxfp4")()
    plain = RoundToNearest().solve(x, config.quantizer())
    searched = RoundToNearest(search="mse").solve(x, config.quantizer())
    assert (plain.params["scale"].item(), searched.params["scale"].item()) == (127, 128)
    assert config.quantizer().dequantize(searched)[0, 0] == 8


@pytest.mark.parametrize("mutant", ["worse is better", "the last one wins", "one factor for all", "the first scale stays"])
def test_the_slow_reference_bites(mutant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = SCHEMES.get("int4")(symmetric=False)
    x = heavy(6, 64, seed=1)

    def wrong(self: Any, groups: Tensor, quantizer: Quantizer, absmax: Tensor | None) -> Params:
        best: Params = {}
        least: Tensor | None = None
        for factor in quantizer.config.shrink_factors(self.grid, self.lowest):
            params = quantizer.fit(groups, factor, absmax)
            error = (quantizer.decode(quantizer.encode(groups, params), params) - groups).square().sum(-1, keepdim=True)
            if least is None:
                best, least = params, error
                continue
            better = {"worse is better": error > least, "the last one wins": error == error}.get(mutant, error < least)
            if mutant == "one factor for all":
                better = (error.sum() < least.sum()).expand_as(error)
            least = torch.where(better, error, least)
            best["zero_point"] = torch.where(better, params["zero_point"], best["zero_point"])
            if mutant != "the first scale stays":
                best["scale"] = torch.where(better, params["scale"], best["scale"])
        return best

    options = RoundToNearest(search="mse", grid=9, lowest=0.35)
    reference = slow_search(x, config, 9, 0.35)
    assert same(options.solve(x, config.quantizer()), reference)
    monkeypatch.setattr(RoundToNearest, "_least_error", wrong)
    assert not same(options.solve(x, config.quantizer()), reference)


def test_options() -> None:
    for member in ALGORITHMS:
        assert member.__doc__ and ALGORITHMS.get(member.name) is member
        assert not RESERVED & set(member.model_fields)
        assert all(f.description for f in member.plan_options().values())
        made = member()
        assert member.model_validate_json(made.model_dump_json()) == made and hash(made) == hash(member())
        with pytest.raises(ValidationError):
            member.model_validate({"colour": 1})
    for wrong in ({"search": "best"}, {"grid": 1}, {"grid": 1001}, {"lowest": 0}, {"lowest": 1}, {"lowest": -0.5}):
        with pytest.raises(ValidationError):
            RoundToNearest.model_validate(wrong)
