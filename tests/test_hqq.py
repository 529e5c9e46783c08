"""hqq: zero points and steps by half-quadratic turns; never worse by its own measure, nor by squares."""

import math

import pytest
import torch
from pydantic import ValidationError
from test_algorithms import ALL, heavy, label, same
from torch import Tensor

from quantplan import scale_search
from quantplan.algorithms import hqq as module
from quantplan.algorithms.hqq import HQQ
from quantplan.algorithms.rtn import RoundToNearest
from quantplan.scheme import SCHEMES, NonFinite, SchemeConfig
from quantplan.tensor import QuantizedTensor


def errors(q: QuantizedTensor, x: Tensor, norm: float) -> Tensor:
    """`sum |error|^norm` of each group, float64."""
    quantizer = q.scheme.quantizer()
    return quantizer.groups((quantizer.dequantize(q).double() - x.double()).abs().pow(norm)).sum(-1)


@pytest.mark.parametrize("config", ALL, ids=label)
class TestEveryScheme:
    def test_it_is_never_worse_than_rounding(self, config: SchemeConfig) -> None:
        x = heavy(130, 192)
        before = x.clone()
        plain, found = (a.solve(x, config.quantizer()) for a in (RoundToNearest(), HQQ()))
        for norm in (0.7, 2.0):
            # what is compared is a float32 sum
            assert (errors(found, x, norm) <= errors(plain, x, norm) * (1 + 1e-5)).all()
        assert torch.equal(x, before)
        layout = config.param_layout(130, 192)
        assert {n: tuple(p.shape) for n, p in found.params.items()} == {n: s for n, (_, s) in layout.items()}
        assert {n: p.dtype for n, p in found.params.items()} == {n: p.dtype for n, p in plain.params.items()}

    def test_zeros_stay_and_what_is_not_finite_is_refused(self, config: SchemeConfig) -> None:
        x = heavy(130, 192)
        x[:, ::9] = 0
        q = HQQ(turns=3).solve(x, config.quantizer())
        assert (config.quantizer().dequantize(q)[x == 0] == 0).all()
        for bad in (math.nan, math.inf):
            x[129, 191] = bad
            with pytest.raises(NonFinite):
                HQQ(turns=3).solve(x, config.quantizer())

    def test_pieces_change_nothing(self, config: SchemeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
        x = heavy(130, 192)
        whole = HQQ(turns=4).solve(x, config.quantizer())
        monkeypatch.setattr(module, "PIECE", 192 * 7)
        assert same(HQQ(turns=4).solve(x, config.quantizer()), whole)
        assert scale_search.PIECE != 192 * 7


@pytest.mark.parametrize("symmetric", [True, False], ids=["steps", "zero points"])
def test_a_low_bit_grid_is_strictly_better(symmetric: bool) -> None:
    config = SCHEMES.get("int3")(group_size=32, symmetric=symmetric)
    x = heavy(256, 256, seed=3)
    plain, found = (errors(a.solve(x, config.quantizer()), x, 0.7) for a in (RoundToNearest(), HQQ()))
    better = (found < plain).float().mean()
    assert better > (0.2 if symmetric else 0)  # an integer leaves a zero point little to gain


def test_a_planted_zero_point_is_found() -> None:
    """A range that its step, once rounded to bfloat16, covers no more, of -4.52 to 10.51 steps: the range's own zero point, 5,
    cuts off 0.51 of a step at the end where almost all weights are; 4 cuts off 0.52 where one is."""
    config = SCHEMES.get("int4")(granularity="channel", symmetric=False, scale_dtype="bfloat16")
    x = torch.full((1, 128), 10.51)
    x[:, 7] = -4.52
    plain, found = (a.solve(x, config.quantizer()) for a in (RoundToNearest(), HQQ()))
    assert plain.params["scale"] == found.params["scale"] == 1
    assert (plain.params["zero_point"], found.params["zero_point"]) == (5, 4)
    for norm in (0.7, 2.0):
        assert (errors(found, x, norm) < 0.99 * errors(plain, x, norm)).all()


def test_the_threshold_is_that_of_the_paper() -> None:
    """`sign(x) relu(|x| - |x|^(p-1) / beta)`; at p = 1 the usual soft threshold."""
    x = torch.tensor([-2.0, -0.3, 0.0, 0.05, 0.5, 3.0])
    soft = HQQ(norm=1.0)._outliers(x, 10.0)
    torch.testing.assert_close(soft, torch.tensor([-1.9, -0.2, 0.0, 0.0, 0.4, 2.9]))
    found = HQQ()._outliers(x, 10.0)
    expected = [math.copysign(max(0.0, abs(v) - abs(v) ** -0.3 / 10), v) if v else 0.0 for v in x.tolist()]
    torch.testing.assert_close(found, torch.tensor(expected))


def test_options() -> None:
    for wrong in ({"norm": 0}, {"norm": 1.5}, {"beta": 0}, {"growth": 0.9}, {"turns": 0}, {"colour": 1}):
        with pytest.raises(ValidationError):
            HQQ.model_validate(wrong)
    assert not HQQ().needs
