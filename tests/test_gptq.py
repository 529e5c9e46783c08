"""gptq against a slow reference: optimal brain quantization in float64, column by column, which never factorizes anything."""

import math
from dataclasses import dataclass

import pytest
import torch
from test_algorithms import ALL, label, same
from torch import Tensor

from quantplan.algorithm import ALGORITHMS, Algorithm
from quantplan.algorithms import gptq as module
from quantplan.algorithms.gptq import GPTQ
from quantplan.algorithms.rtn import RoundToNearest
from quantplan.errors import QuantplanError
from quantplan.scale_search import Ranges, search_scales
from quantplan.scheme import SCHEMES, NonFinite, Params, Quantizer, SchemeConfig
from quantplan.statistics import Statistics
from quantplan.tensor import QuantizedTensor

NEAR = 1e-3  # of the distance between grid values: what float32 may mistake for a tie


def gathered(columns: int, tokens: int = 512, seed: int = 0, drift: float = 0.05) -> Statistics:
    """Of correlated inputs whose sizes differ a lot, and of a float model that sees slightly others."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator) / columns**0.5 + torch.eye(columns)
    x = torch.randn(tokens, columns, generator=generator) @ mix * torch.logspace(-1, 1, columns)
    y = x + drift * torch.randn(tokens, columns, generator=generator) @ mix
    return Statistics(x.t() @ x / tokens, tokens, (y - x).t() @ x / tokens if drift else None)


def weights(rows: int, columns: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator) * 0.02


@dataclass(frozen=True)
class Grid:
    """Every value each weight may take, float64: `values[group[r, c]]`, NaN where a code stands for no number."""

    values: Tensor  # [groups, codes]
    group: Tensor  # [rows, columns]

    @classmethod
    def of(cls, q: QuantizedTensor) -> "Grid":
        quantizer = q.scheme.quantizer()
        params = {n: p if n in q.scheme.tensor_params else p.unsqueeze(-1) for n, p in q.params.items()}
        down, across = q.scheme.grid(*q.shape)
        codes = torch.arange(2**q.scheme.bits, dtype=torch.uint8).expand(down, across, -1)
        values = quantizer.decode(codes, params).double().reshape(down * across, -1)
        size = quantizer.groups(torch.zeros(q.shape)).shape[-1]
        index = torch.arange(down * across, dtype=torch.float32).view(down, across, 1).expand(-1, -1, size)
        return cls(torch.where(values.isfinite(), values, torch.nan), quantizer.ungroup(index, *q.shape).long())

    def check_nearest(self, wanted: Tensor, chosen: Tensor, column: int) -> None:
        """That `chosen` are the grid's values nearest to `wanted`, both `[rows]`, or as near up to a tie."""
        distances = (self.values[self.group[:, column]] - wanted[:, None]).abs()
        two = distances.nan_to_num(nan=math.inf).topk(2, largest=False).values
        taken = (chosen - wanted).abs()
        assert (taken - two[:, 0] <= NEAR * (two[:, 0] + two[:, 1])).all(), (column, taken, two)


def check_brain_quantization(weight: Tensor, q: QuantizedTensor, hessian: Tensor, order: Tensor) -> None:
    """Optimal brain quantization (Frantar and Alistarh 2022, arXiv 2208.11580): each column in turn takes its nearest values, the
    columns left make up for the error as far as they can, and the inverse Hessian forgets the column. Codes are those of `q`:
    one tie decided otherwise would change all that follows."""
    grid, values = Grid.of(q), q.scheme.quantizer().dequantize(q).double()
    work, inverse = weight.double().clone(), torch.linalg.inv(hessian.double())
    for column in order.tolist():
        grid.check_nearest(work[:, column], values[:, column], column)
        error = (work[:, column] - values[:, column]) / inverse[column, column]
        work -= error[:, None] * inverse[column]
        inverse = inverse - inverse[:, column, None] * inverse[column] / inverse[column, column]


def corrected(weight: Tensor, statistics: Statistics, damping: float) -> Tensor:
    """`W + W D (H + damping)^-1` in float64, by inverting."""
    assert statistics.drift is not None
    hessian = statistics.hessian.double()
    damped = hessian + damping * hessian.diagonal().mean() * torch.eye(len(hessian))
    return weight.double() + weight.double() @ statistics.drift.double() @ torch.linalg.inv(damped)


def damped(statistics: Statistics, damping: float) -> Tensor:
    hessian = statistics.hessian.double()
    return hessian + damping * hessian.diagonal().mean() * torch.eye(len(hessian))


def loss(target: Tensor, values: Tensor, hessian: Tensor) -> Tensor:
    """`e H e^T` of each row, float64."""
    error = target.double() - values.double()
    return (error @ hessian.double() * error).sum(-1)


def solved(options: Algorithm, weight: Tensor, config: SchemeConfig, statistics: Statistics) -> Tensor:
    quantizer = config.quantizer()
    return quantizer.dequantize(options.solve(weight, quantizer, None, statistics))


@pytest.mark.parametrize("config", ALL, ids=label)
class TestEveryScheme:
    def test_codes_are_those_of_optimal_brain_quantization(self, config: SchemeConfig) -> None:
        for rows, columns, act_order in ((5, 192, True), (130, 64, False)):
            statistics, weight = gathered(columns), weights(rows, columns)
            options = GPTQ(refits=0, drift=0, act_order=act_order)
            q = options.solve(weight, config.quantizer(), None, statistics)
            order = statistics.hessian.diagonal().argsort(descending=True) if act_order else torch.arange(columns)
            check_brain_quantization(weight, q, damped(statistics, options.damping), order)

    def test_targets_are_corrected_for_drift(self, config: SchemeConfig) -> None:
        statistics, weight = gathered(64, drift=0.3), weights(4, 64)
        options = GPTQ(refits=0, act_order=False)
        q = options.solve(weight, config.quantizer(), None, statistics)
        target = corrected(weight, statistics, options.drift_damping)
        assert (target - weight).abs().max() > 0.01 * weight.abs().max()
        check_brain_quantization(target, q, damped(statistics, options.damping), torch.arange(64))

    def test_each_part_lowers_the_error(self, config: SchemeConfig) -> None:
        statistics, weight = gathered(192, drift=0), weights(130 if config.strategy == "block" else 9, 192)
        hessian = statistics.damped(GPTQ().damping)
        plain = loss(weight, solved(RoundToNearest(), weight, config, statistics), hessian)
        compensated = loss(weight, solved(GPTQ(refits=0), weight, config, statistics), hessian)
        refined = loss(weight, solved(GPTQ(refits=2, sweeps=3), weight, config, statistics), hessian)
        assert (refined <= compensated * (1 + 1e-4)).all()
        assert refined.sum() < compensated.sum() < 0.9 * plain.sum()

    def test_it_is_deterministic_and_leaves_its_inputs_alone(self, config: SchemeConfig) -> None:
        statistics, weight = gathered(64), weights(5, 64)
        assert statistics.drift is not None
        kept = weight.clone(), statistics.hessian.clone(), statistics.drift.clone()
        first = GPTQ().solve(weight, config.quantizer("a"), None, statistics)
        again = GPTQ().solve(weight, config.quantizer("a"), None, gathered(64))
        assert same(first, again) and first.scheme == config
        assert all(torch.equal(a, b) for a, b in zip(kept, (weight, statistics.hessian, statistics.drift), strict=True))
        layout = config.param_layout(5, 64)
        assert {n: tuple(p.shape) for n, p in first.params.items()} == {n: shape for n, (_, shape) in layout.items()}

    def test_rows_do_not_influence_one_another(self, config: SchemeConfig) -> None:
        if not config.splittable:
            return
        statistics, weight = gathered(64), weights(256, 64)
        absmax = weight.abs().amax()
        whole = GPTQ().solve(weight, config.quantizer(), absmax, statistics)
        for half in (slice(0, 128), slice(128, 256)):
            part = GPTQ().solve(weight[half], config.quantizer(), absmax, statistics)
            assert (part.codes != whole.codes[half]).float().mean() < 0.01  # ties that products of other sizes decide otherwise

    def test_nothing_but_zeros(self, config: SchemeConfig) -> None:
        statistics = gathered(64)
        q = GPTQ().solve(torch.zeros(3, 64), config.quantizer(), None, statistics)
        assert not config.quantizer().dequantize(q).any()
        assert all(torch.isfinite(p.float()).all() for p in q.params.values())

    @pytest.mark.parametrize("kind", ["silent columns", "rank 3", "one token", "no tokens", "condition 1e12", "tiny", "huge"])
    def test_odd_second_moments(self, config: SchemeConfig, kind: str) -> None:
        statistics, weight = odd(kind, 64), weights(6, 64)
        values = solved(GPTQ(), weight, config, statistics)
        assert torch.isfinite(values).all()
        before = loss(weight, solved(RoundToNearest(), weight, config, statistics), statistics.hessian)
        assert loss(weight, values, statistics.hessian).sum() <= before.sum() * 1.01  # its ranges are not all that rtn has

    @pytest.mark.parametrize("power", [-12, 9])
    def test_the_scale_of_the_inputs_does_not_matter(self, config: SchemeConfig, power: int) -> None:
        """Some columns being silent: these must not count for more where the others count for little."""
        given, weight = gathered(64), weights(6, 64)
        heard = (torch.arange(64) % 3 > 0).float()
        assert given.drift is not None
        hessian, drift = given.hessian * heard * heard[:, None], given.drift * heard
        one, other = (Statistics(hessian * c, given.count, drift * c) for c in (1.0, 4.0**power))
        assert same(*(GPTQ().solve(weight, config.quantizer("x"), None, s) for s in (one, other)))


def odd(kind: str, columns: int) -> Statistics:
    """Second moments that make trouble."""
    generator = torch.Generator().manual_seed(0)
    tokens = {"rank 3": 3, "one token": 1, "no tokens": 0}.get(kind, 200)
    x = torch.randn(tokens, columns, generator=generator)
    if kind == "silent columns":
        x[:, ::3] = 0
    if kind == "condition 1e12":
        x = x * torch.logspace(-6, 0, columns)
    x = x * {"tiny": 1e-15, "huge": 1e15}.get(kind, 1.0)
    return Statistics(x.t() @ x / max(1, tokens), tokens)


@pytest.mark.parametrize("member", list(ALGORITHMS), ids=lambda m: m.name)
@pytest.mark.parametrize("config", ALL, ids=label)
def test_every_algorithm_is_deterministic_and_no_worse_than_rounding(member: type[Algorithm], config: SchemeConfig) -> None:
    """On its own objective: the layer's error where it takes statistics; without, its own tests say more."""
    options = member()
    statistics, weight = gathered(64, drift=0), weights(9, 64)
    given = statistics if options.needs else None
    found = [options.solve(weight, config.quantizer("x"), None, given) for _ in range(2)]
    assert same(*found)
    assert found[0].scheme == config
    values = config.quantizer().dequantize(found[0])
    assert torch.isfinite(values).all()
    if options.needs:
        plain = solved(RoundToNearest(), weight, config, statistics)
        after, before = (loss(weight, v, statistics.hessian).sum() for v in (values, plain))
        assert after <= before
        assert after < before or options.name == "awq", "only a search among ranges may end where rounding is"


@pytest.mark.parametrize("shape", [(1, 64), (1, 32), (64, 32), (3, 32)])
@pytest.mark.parametrize("name", ["int4", "nvfp4", "mxfp4", "nf4"])
def test_one_row_one_group(shape: tuple[int, int], name: str) -> None:
    config = SCHEMES.get(name)(group_size=16 if name == "nvfp4" else 32)
    statistics, weight = gathered(shape[1], drift=0), weights(*shape)
    before = loss(weight, solved(RoundToNearest(), weight, config, statistics), statistics.hessian)
    after = loss(weight, solved(GPTQ(), weight, config, statistics), statistics.hessian)
    assert after.sum() < before.sum()


def test_without_drift_the_option_does_nothing() -> None:
    statistics, weight, config = gathered(64, drift=0), weights(4, 64), SCHEMES.get("int4")()
    with_it, without = (GPTQ(drift=d).solve(weight, config.quantizer(), None, statistics) for d in (1.0, 0.0))
    assert same(with_it, without)
    assert GPTQ(drift=0).needs == {"hessian"} and GPTQ().needs == {"hessian", "drift"}


def test_half_the_drift_is_half_the_correction() -> None:
    statistics, weight = gathered(64, drift=0.3), weights(4, 64)
    config = SCHEMES.get("int8")(granularity="channel", scale_dtype="float32")
    options = GPTQ(refits=0, drift=0.5, act_order=False)
    q = options.solve(weight, config.quantizer(), None, statistics)
    target = (weight.double() + corrected(weight, statistics, options.drift_damping)) / 2
    check_brain_quantization(target, q, damped(statistics, options.damping), torch.arange(64))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_weights_that_are_not_finite(bad: float) -> None:
    weight = weights(4, 64)
    weight[2, 7] = bad
    for config in ALL:
        with pytest.raises(NonFinite):
            GPTQ().solve(weight, config.quantizer(), None, gathered(64))


def test_a_hessian_that_is_not_finite_is_a_coded_error() -> None:
    broken = Statistics(torch.full((64, 64), math.nan), 8)
    with pytest.raises(QuantplanError, match="QP604"):
        GPTQ().solve(weights(4, 64), SCHEMES.get("int4")().quantizer(), None, broken)


# the parts


def fitted(config: SchemeConfig, weight: Tensor) -> tuple[Quantizer, Params, Tensor]:
    """Quantizer, parameters and rounded values `[columns, rows]`."""
    quantizer = config.quantizer()
    params = search_scales(weight, quantizer, None, Ranges(8, 0.6))
    q = quantizer.quantize_groups(quantizer.groups(weight), params, *weight.shape)
    return quantizer, params, quantizer.dequantize(q).t().contiguous()


FINE = [c for c in ALL if c.fine_steps and c.strategy in ("group", "channel") and c.rounding == "nearest"]


@pytest.mark.parametrize("config", FINE, ids=label)
def test_refit_equals_least_squares_row_by_row(config: SchemeConfig) -> None:
    if "scale_dtype" in type(config).model_fields:
        config = config.model_copy(update={"scale_dtype": "float32"})
    statistics, weight = gathered(64, drift=0), weights(7, 64)
    quantizer, params, values = fitted(config, weight)
    hessian = statistics.damped(0.01)
    tried = module._refit(weight.t(), quantizer, params, values, hessian)
    across = config.grid(*weight.shape)[1]
    root = torch.linalg.cholesky(hessian.double()).t()
    for row in range(len(weight)):
        parts = torch.zeros(64, across, dtype=torch.float64)
        for k, part in enumerate(values[:, row].double().split(64 // across)):
            parts[k * len(part) : (k + 1) * len(part), k] = part
        wanted = torch.linalg.lstsq(root @ parts, (root @ weight[row].double())[:, None]).solution[:, 0]
        found = (quantizer.step(tried)[row, :, 0] / quantizer.step(params)[row, :, 0]).double()
        exact = "scale_dtype" in type(config).model_fields
        torch.testing.assert_close(found, wanted, rtol=1e-3 if exact else 0.07, atol=0)


def test_refits_of_some_rows_at_a_time_are_those_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    config, statistics, weight = SCHEMES.get("int4")(group_size=16), gathered(192, drift=0), weights(50, 192)
    quantizer, params, values = fitted(config, weight)
    hessian = statistics.damped(0.01)
    whole = module._refit(weight.t(), quantizer, params, values, hessian)
    sizes: list[int] = []
    real = module._factors

    def counted(target: Tensor, values: Tensor, across: int, hessian: Tensor) -> Tensor:
        sizes.append(target.shape[1] * across**2)
        return real(target, values, across, hessian)

    monkeypatch.setattr(module, "_factors", counted)
    for limit in (7 * 12**2, 1):
        monkeypatch.setattr(module, "NORMAL", limit)
        parts = module._refit(weight.t(), quantizer, params, values, hessian)
        # a sum of another order may round a scale to bfloat16's next
        torch.testing.assert_close(parts["scale"].float(), whole["scale"].float(), rtol=2**-7, atol=0)
        assert (parts["scale"] == whole["scale"]).float().mean() > 0.99
        assert max(sizes) <= max(limit, 12**2) and len(sizes) == -(-50 // max(1, limit // 12**2))
        sizes.clear()


def test_refit_leaves_alone_what_it_cannot_fit() -> None:
    """A group of zeros, and a step that would turn round."""
    config, statistics = SCHEMES.get("int4")(group_size=32, scale_dtype="float32"), gathered(64, drift=0)
    quantizer, params, values = fitted(config, weights(3, 64))
    values[:32, 0] = 0
    values[:, 1] *= -1
    tried = module._refit(weights(3, 64).t(), quantizer, params, values, statistics.damped(0.01))
    assert tried["scale"][0, 0] == params["scale"][0, 0] and tried["scale"][0, 1] != params["scale"][0, 1]
    assert torch.equal(tried["scale"][1], params["scale"][1])


@pytest.mark.parametrize("config", ALL, ids=label)
def test_descent_never_raises_the_error_and_ends_where_no_column_gains(config: SchemeConfig) -> None:
    statistics, weight = gathered(64, drift=0), weights(130 if config.strategy == "block" else 12, 64)
    quantizer, params, values = fitted(config, weight)
    hessian, target = statistics.damped(0.03), weight.t().contiguous()
    columns = module._Columns(quantizer, params, *weight.shape)
    errors = [loss(weight, values.t(), hessian)]
    for _ in range(30):
        values = module._descend(target, values, columns, hessian, 1)
        errors.append(loss(weight, values.t(), hessian))
        assert (errors[-1] <= errors[-2] * (1 + 1e-4)).all()
    assert errors[-1].sum() < errors[0].sum()
    at_once = module._descend(target, fitted(config, weight)[2], columns, hessian, 30)
    assert (at_once != values).float().mean() < 0.01  # 30 sweeps are 30 times one, but for the slope's rounding
    q = quantizer.quantize_groups(quantizer.groups(values.t().contiguous()), params, *weight.shape)
    torch.testing.assert_close(quantizer.dequantize(q), values.t().contiguous(), rtol=1e-6, atol=0)
    grid, exact = Grid.of(q), hessian.double()
    slope = (weight.double() - values.t().double()) @ exact
    still = (errors[-1] >= errors[-2] * (1 - 1e-9)).nonzero()[:, 0]  # rows that have come to rest
    assert len(still) > 0.8 * len(weight)
    for column in range(64):
        wanted = values[column].double() + slope[:, column] / exact[column, column]
        rested = Grid(grid.values, grid.group[still])
        rested.check_nearest(wanted[still], values[column].double()[still], column)


@pytest.mark.parametrize("config", ALL, ids=label)
def test_single_columns_are_rounded_as_the_whole(config: SchemeConfig) -> None:
    weight = weights(130, 192)
    quantizer, params, values = fitted(config, weight)
    columns = module._Columns(quantizer, params, *weight.shape)
    assert torch.equal(columns.nearest_all(weight.t()), values)
    for column in (0, 31, 32, 127, 128, 191):
        assert torch.equal(columns.nearest(weight[:, column], column), values[column])


def test_blocks_of_columns_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The products beyond a block are the same sums, in another order."""
    statistics, weight, config = gathered(192), weights(16, 192), SCHEMES.get("int4")()
    whole = GPTQ().solve(weight, config.quantizer(), None, statistics)
    for size in (1, 7, 500):
        monkeypatch.setattr(module, "BLOCK", size)
        other = GPTQ().solve(weight, config.quantizer(), None, gathered(192))
        assert (other.codes != whole.codes).float().mean() < 0.02


@pytest.mark.parametrize("mutant", ["errors are dropped", "errors are added", "the order is the other way round", "no damping"])
def test_the_reference_bites(mutant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    statistics, weight, config = gathered(64, drift=0), weights(8, 64), SCHEMES.get("int3")()
    real = module._compensate

    def wrong(target: Tensor, columns: module._Columns, upper: Tensor, order: Tensor) -> Tensor:
        if mutant.startswith("errors"):
            off = upper - torch.diag(upper.diagonal())
            upper = upper - off if mutant == "errors are dropped" else upper - 2 * off
        elif mutant.startswith("the order"):
            order = order.flip(0)
            upper = statistics.factor(0.03, order)
        else:
            upper = statistics.factor(1e-6, order)
        return real(target, columns, upper, order)

    monkeypatch.setattr(module, "_compensate", wrong)
    q = GPTQ(refits=0, drift=0).solve(weight, config.quantizer(), None, statistics)
    order = statistics.hessian.diagonal().argsort(descending=True)
    with pytest.raises(AssertionError):
        check_brain_quantization(weight, q, damped(statistics, 0.03), order)
