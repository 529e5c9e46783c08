"""Second moments: damping, factors that are tried again, the correction for drift, and what is computed once."""

import math
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from quantplan import statistics
from quantplan.errors import QuantplanError
from quantplan.statistics import Statistics


def inputs(tokens: int = 300, columns: int = 48, seed: int = 0) -> tuple[Tensor, Tensor]:
    """What a quantized and a float model see, float64."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, columns, generator=generator, dtype=torch.float64) * torch.logspace(-1, 1, columns)
    return x, x + 0.2 * torch.randn(tokens, columns, generator=generator, dtype=torch.float64)


def moments(x: Tensor, y: Tensor | None = None) -> Statistics:
    drift = None if y is None else ((y - x).t() @ x / len(x)).float()
    return Statistics((x.t() @ x / len(x)).float(), len(x), drift)


def test_damping_is_a_share_of_the_mean_diagonal() -> None:
    statistics = moments(inputs()[0])
    for damping in (0.0, 0.01, 1.0):
        added = statistics.damped(damping) - statistics.hessian
        mean = statistics.hessian.diagonal().mean()
        torch.testing.assert_close(added, torch.eye(48) * mean * damping, rtol=1e-3, atol=1e-5 * float(mean))
    assert statistics.damped(0.01) is statistics.damped(0.01)


@pytest.mark.parametrize("scale", [1e-12, 1e-3, 1.0, 1e12])
def test_columns_that_were_always_zero_are_damped_as_the_others(scale: float) -> None:
    x, _ = inputs()
    x[:, [3, 40]] = 0
    statistics = moments(x * scale)
    hessian, damped = statistics.hessian.double(), statistics.damped(0.01).double()
    share = 0.01 * hessian.diagonal().mean()
    torch.testing.assert_close(damped, hessian + share * torch.eye(48), rtol=1e-6, atol=1e-6 * float(share))
    upper = statistics.factor(0.01, torch.arange(48)).double()
    silent = upper.diagonal()[[3, 40]].square().reciprocal()  # what an error there costs
    torch.testing.assert_close(silent, share.expand(2), rtol=1e-4, atol=0)


def test_without_inputs_all_columns_count_alike() -> None:
    assert torch.equal(Statistics(torch.zeros(5, 5), 0).damped(0.01), torch.eye(5))


@given(st.integers(-30, 30), st.floats(1e-6, 1), st.integers(0, 3))
def test_inputs_of_another_scale_have_the_same_factors_and_corrections(power: int, damping: float, seed: int) -> None:
    """Of powers of two, bit for bit."""
    x, y = inputs(60, 12, seed)
    x[:, 5] = y[:, 5] = 0
    one, other = moments(x, y), moments(x * 2.0**power, y * 2.0**power)
    order, weight = torch.randperm(12), torch.randn(3, 12)
    assert torch.equal(other.factor(damping, order) * 2.0**power, one.factor(damping, order))
    assert torch.equal(other.corrected(weight, damping), one.corrected(weight, damping))


@pytest.mark.parametrize("order", ["as they are", "largest first", "random"])
def test_a_factor_is_that_of_the_inverse(order: str) -> None:
    statistics = moments(inputs()[0])
    diagonal = statistics.hessian.diagonal()
    columns = {
        "as they are": torch.arange(48),
        "largest first": diagonal.argsort(descending=True),
        "random": torch.randperm(48, generator=torch.Generator().manual_seed(1)),
    }[order]
    upper = statistics.factor(0.01, columns)
    assert torch.equal(upper, upper.triu()) and (upper.diagonal() > 0).all()
    damped = statistics.damped(0.01).double()[columns][:, columns]
    torch.testing.assert_close(upper.double().t() @ upper.double() @ damped, torch.eye(48).double(), rtol=0, atol=1e-3)
    # 1 / U_jj^2 is what an error of a column costs when all after it make up for it
    for j in (0, 20, 47):
        rest = damped[j + 1 :, j + 1 :]
        cost = damped[j, j] - damped[j, j + 1 :] @ torch.linalg.solve(rest, damped[j + 1 :, j])
        assert math.isclose(1 / float(upper[j, j]) ** 2, float(cost), rel_tol=1e-3)
    assert statistics.factor(0.01, columns) is upper
    assert statistics.factor(0.02, columns) is not upper
    assert statistics.factor(0.01, columns.flip(0)) is not upper


@pytest.mark.parametrize("kind", ["rank 2", "copies", "condition", "no data", "one token", "tiny", "huge"])
def test_factors_of_what_cannot_be_factorized_as_it_is(kind: str) -> None:
    x, _ = inputs(tokens={"rank 2": 2, "one token": 1}.get(kind, 300))
    if kind == "copies":
        x[:, 24:] = x[:, :24]
    if kind == "condition":
        x = x * torch.logspace(-8, 4, 48)
    statistics = moments(x * {"tiny": 1e-16, "huge": 1e14}.get(kind, 1.0))
    if kind == "no data":
        statistics = Statistics(torch.zeros(48, 48), 0)
    for damping in (0.01, 1e-9):
        upper = statistics.factor(damping, torch.arange(48))
        assert torch.isfinite(upper).all() and (upper.diagonal() > 0).all()


def test_damping_is_raised_until_there_is_a_factor() -> None:
    """Not positive: no data give such a matrix, but sums in float32 may."""
    hessian = torch.eye(6)
    hessian[0, 1] = hessian[1, 0] = 1.2
    upper = Statistics(hessian, 8).factor(0.01, torch.arange(6))
    added = (upper.double().t() @ upper.double()).inverse().diagonal().mean() - 1
    assert 0.2 < added < 0.5  # doubled from 0.01 until more than 0.2


@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0])
def test_what_never_has_a_factor_is_a_coded_error(value: float) -> None:
    hessian = torch.eye(6)
    hessian[2, 2] = value
    if value < 0:
        hessian = -1e6 * torch.eye(6)
    with pytest.raises(QuantplanError, match=r"QP604 .*\n.*rtn"):
        Statistics(hessian, 8).factor(0.01, torch.arange(6))


def test_a_correction_solves_the_normal_equations() -> None:
    """The weight that, on the quantized model's inputs, comes nearest to what the weight makes of the float model's, with a
    ridge towards the weight itself."""
    x, y = inputs()
    weight = torch.randn(9, 48, generator=torch.Generator().manual_seed(2))
    statistics = moments(x, y)
    for damping in (1e-4, 0.01, 1.0):
        found = statistics.corrected(weight, damping).double()
        ridge = damping * statistics.hessian.diagonal().mean().double()
        left = torch.cat([x, (ridge * len(x)).sqrt() * torch.eye(48)])
        right = torch.cat([y @ weight.double().t(), (ridge * len(x)).sqrt() * weight.double().t()])
        wanted = torch.linalg.lstsq(left, right).solution.t()
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)
        outputs = [((x @ w.t() - y @ weight.double().t()) ** 2).sum() for w in (found, weight.double())]
        assert outputs[0] < outputs[1]


def test_no_drift_no_correction() -> None:
    weight = torch.randn(4, 48)
    assert moments(inputs()[0]).corrected(weight, 0.01) is weight
    x, _ = inputs()
    assert torch.equal(moments(x, x).corrected(weight, 0.01), weight)


def test_a_correction_that_cannot_be_computed_is_none() -> None:
    hessian = -torch.eye(6)
    weight = torch.randn(4, 6)
    assert torch.equal(Statistics(hessian, 8, torch.eye(6)).corrected(weight, 0.01), weight)


def test_matrices_that_share_inputs_share_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    real = torch.linalg.cholesky_ex

    def counted(*arguments: object, **options: object) -> object:
        calls.append(1)
        return real(*arguments, **options)

    monkeypatch.setattr(torch.linalg, "cholesky_ex", counted)
    statistics = moments(*inputs())
    for _ in range(3):
        statistics.factor(0.01, torch.arange(48))
        statistics.corrected(torch.zeros(2, 48), 0.01)
    assert len(calls) == 3
    before = statistics.hessian.clone()
    statistics.damped(0.5).mul_(2)
    assert torch.equal(statistics.hessian, before)


def test_threads_compute_a_factor_once(monkeypatch: pytest.MonkeyPatch) -> None:
    shared, real, computed = moments(inputs()[0]), statistics._inverse_factor, []

    def slow(matrix: Tensor) -> Tensor | None:
        computed.append(matrix)
        time.sleep(0.05)  # the others have come by then
        return real(matrix)

    monkeypatch.setattr(statistics, "_inverse_factor", slow)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: shared.factor(0.01, torch.arange(48)), range(8)))
    assert len(computed) == 1 and all(f is found[0] for f in found)
    assert shared.nbytes == 3 * 4 * 48**2
