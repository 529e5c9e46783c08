"""The search for scales, against one that goes group by group, and its promises: never worse than the whole range."""

import pytest
import torch
from test_algorithms import ALL, heavy, label, second_moments
from torch import Tensor

from quantplan import scale_search
from quantplan.algorithms.rtn import RoundToNearest
from quantplan.scale_search import Ranges, choose, joined, search_by_hessian, search_scales
from quantplan.scheme import SCHEMES, NonFinite, Params, Quantizer, SchemeConfig


def shares(columns: int, seed: int = 0) -> Tensor:
    """Importances that differ a thousandfold; a few columns count for nothing."""
    found = torch.logspace(-2, 1, columns)[torch.randperm(columns, generator=torch.Generator().manual_seed(seed))]
    found[::13] = 0
    return found


def weighed_error(weight: Tensor, quantizer: Quantizer, params: Params, importance: Tensor | None) -> Tensor:
    """Of each group, float64, with every weight at its nearest value."""
    groups = quantizer.groups(weight)
    values = quantizer.nearest(groups, params).double()
    counted = torch.ones(weight.shape[1]) if importance is None else importance
    return ((values - groups.double()).square() * quantizer.groups(counted.expand(weight.shape).contiguous())).sum(-1)


def slowly(weight: Tensor, config: SchemeConfig, importance: Tensor | None, grid: int, lowest: float) -> Params:
    """One group and one range at a time, in float64 sums: a range proposes codes, least squares their step where steps are
    fine, and the proposal that would leave the least error (of the step before it is stored) wins."""
    quantizer = config.quantizer()
    absmax = weight.abs().amax() if config.needs_absmax else None
    groups = quantizer.groups(weight)
    counted = torch.ones(weight.shape[1]) if importance is None else importance
    parts = quantizer.groups(counted.expand(weight.shape).contiguous()).double()
    chosen: Params = {}
    for i in range(groups.shape[0]):
        for j in range(groups.shape[1]):
            group, part = groups[i : i + 1, j : j + 1], parts[i : i + 1, j : j + 1]
            least, best = float("inf"), {}
            for factor in config.shrink_factors(grid, lowest):
                params = quantizer.fit(group, factor, absmax)
                values = quantizer.nearest(group, params).double()
                if config.fine_steps:
                    size = float((part * values.square()).sum())
                    ratio = float((part * values * group).sum()) / size if size else 1.0
                    params = quantizer.with_step(params, quantizer.step(params) * ratio)
                    values = values * ratio
                error = float((part * (values - group.double()).square()).sum())
                if error < least - 1e-6 * float((part * group.double().square()).sum()):
                    least, best = error, params
            for name, value in best.items():
                if name in config.tensor_params:
                    chosen[name] = value
                    continue
                if name not in chosen:
                    chosen[name] = value.new_zeros(*groups.shape[:2], 1)
                chosen[name].view(torch.uint8)[i, j] = value.view(torch.uint8).reshape(-1)
    return chosen


@pytest.mark.parametrize("config", ALL, ids=label)
class TestEveryScheme:
    def test_it_equals_a_slow_one(self, config: SchemeConfig) -> None:
        weight = heavy(6, 64, seed=1)
        for importance in (None, shares(64)):
            quantizer = config.quantizer()
            found = search_scales(weight, quantizer, importance, Ranges(9, 0.4))
            slow = slowly(weight, config, importance, 9, 0.4)
            assert found.keys() == slow.keys()
            fast, reference = (weighed_error(weight, quantizer, params, importance) for params in (found, slow))
            scale = quantizer.groups(weight * (1 if importance is None else importance.sqrt())).double().square().sum(-1)
            # a proposal as good as another may win here and lose there: what they cost once steps are stored is close
            assert ((fast - reference).abs() <= (0.03 if config.bits <= 4 else 0.15) * reference + 1e-6 * scale).all()
            if config.bits <= 4:
                close = [torch.isclose(found[n].float(), slow[n].float(), rtol=1e-3, atol=0) for n in found]
                assert min(c.float().mean() for c in close) > 0.9

    def test_it_is_never_worse_than_the_whole_range(self, config: SchemeConfig) -> None:
        weight = heavy(130, 192)
        for importance in (None, shares(192)):
            quantizer = config.quantizer()
            absmax = weight.abs().amax()
            plain = weighed_error(weight, quantizer, quantizer.fit(quantizer.groups(weight), 1.0, absmax), importance)
            found = weighed_error(weight, quantizer, search_scales(weight, quantizer, importance, Ranges(12, 0.5)), importance)
            # a step is stored in bfloat16 after it was chosen: that may cost a little where there was nothing to gain
            slack = 1 + (0.02 if config.bits <= 4 or not config.fine_steps else 0.3)
            assert (found <= plain * slack).float().mean() > 0.97
            assert found.sum() <= plain.sum() * (1.0001 if config.bits <= 4 else slack)

    def test_shapes_and_dtypes_are_those_of_fit(self, config: SchemeConfig) -> None:
        for rows, columns in ((1, 64), (130, 192)):
            weight, quantizer = heavy(max(rows, 3), columns)[:rows], config.quantizer()
            fitted = quantizer.fit(quantizer.groups(weight), 1.0, weight.abs().amax())
            found = search_scales(weight, quantizer, shares(columns), Ranges(5, 0.5))
            assert {n: (p.shape, p.dtype) for n, p in found.items()} == {n: (p.shape, p.dtype) for n, p in fitted.items()}

    def test_pieces_change_nothing(self, config: SchemeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
        weight, quantizer, importance = heavy(130, 192), config.quantizer(), shares(192)
        whole = search_scales(weight, quantizer, importance, Ranges(5, 0.5))
        monkeypatch.setattr(scale_search, "PIECE", 192 * 7)
        parts = search_scales(weight, quantizer, importance, Ranges(5, 0.5))
        assert all(torch.equal(whole[n].view(torch.uint8), parts[n].view(torch.uint8)) for n in whole)

    def test_nothing_counts(self, config: SchemeConfig) -> None:
        """Columns that count for nothing, and groups of zeros: the whole range stays."""
        weight, quantizer = heavy(4, 64), config.quantizer()
        weight[3] = 0
        found = search_scales(weight, quantizer, torch.zeros(64), Ranges(5, 0.5))
        fitted = quantizer.fit(quantizer.groups(weight), 1.0, weight.abs().amax())
        for name, param in fitted.items():
            assert torch.equal(found[name].view(torch.uint8), param.view(torch.uint8))

    def test_what_is_not_finite_is_refused(self, config: SchemeConfig) -> None:
        for bad in (float("nan"), float("inf")):
            weight = heavy(4, 64)
            weight[3, 63] = bad
            with pytest.raises(NonFinite):
                search_scales(weight, config.quantizer(), None, Ranges(5, 0.5))


def test_an_important_column_is_fitted() -> None:
    """One column alone counts: the grid goes through its weights."""
    weight, importance = heavy(64, 32), torch.zeros(32)
    importance[5] = 1
    config = SCHEMES.get("int4")(group_size=32, scale_dtype="float32")
    quantizer = config.quantizer()
    found = quantizer.nearest(quantizer.groups(weight), search_scales(weight, quantizer, importance, Ranges(16, 0.6)))
    large = weight[:, 5].abs() > weight.abs().amax(1) / 7  # what is not nearest to zero
    assert torch.isclose(found[:, 0, 5], weight[:, 5], rtol=1e-5)[large].all() and large.sum() > 30
    rounded = RoundToNearest().solve(weight, quantizer)
    assert torch.isclose(quantizer.dequantize(rounded)[:, 5], weight[:, 5], rtol=1e-3)[large].float().mean() < 0.2


def test_planted_steps_are_found() -> None:
    """Weights on a grid, and one far outside: least squares gives its step exactly, although no range on the list does."""
    weight = torch.randint(-7, 8, (4, 512), generator=torch.Generator().manual_seed(2)).float() * 0.0371
    weight[:, 0] = 0.5
    importance = torch.ones(512)
    importance[0] = 0
    config = SCHEMES.get("int4")(granularity="channel", scale_dtype="float32")
    found = search_scales(weight, config.quantizer(), importance, Ranges(20, 0.4))
    torch.testing.assert_close(found["scale"].flatten(), torch.full((4,), 0.0371))


@pytest.mark.parametrize("config", ALL, ids=label)
class TestByHessian:
    def test_a_diagonal_one_counts_columns_apart(self, config: SchemeConfig) -> None:
        """As `search_scales` does; but it compares what is stored, so it may end lower."""
        weight, quantizer, importance = heavy(130, 192), config.quantizer(), shares(192)
        by_hessian = search_by_hessian(weight, quantizer, importance.diag(), Ranges(9, 0.4))
        by_columns = search_scales(weight, quantizer, importance, Ranges(9, 0.4))
        found, other = (weighed_error(weight, quantizer, p, importance) for p in (by_hessian, by_columns))
        scale = quantizer.groups(weight * importance.sqrt()).double().square().sum(-1)
        assert (found <= other * (1 + 1e-4) + 1e-7 * scale).all()
        assert found.sum() >= 0.95 * other.sum() or config.bits > 4

    def test_pieces_change_nothing(self, config: SchemeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
        """But for ties, which sums of another order may decide."""
        weight, quantizer, hessian = heavy(130, 192), config.quantizer(), second_moments(192).hessian
        whole = search_by_hessian(weight, quantizer, hessian, Ranges(5, 0.5))
        for name, size in (("PIECE", 192 * 7), ("ROWS", 7)):
            monkeypatch.setattr(scale_search, name, size)
        parts = search_by_hessian(weight, quantizer, hessian, Ranges(5, 0.5))
        assert all(p.shape == whole[n].shape and p.dtype == whole[n].dtype for n, p in parts.items())
        assert all((p.float() == whole[n].float()).float().mean() > 0.99 for n, p in parts.items())

    def test_nothing_counts(self, config: SchemeConfig) -> None:
        weight, quantizer = heavy(4, 64), config.quantizer()
        weight[3] = 0
        found = search_by_hessian(weight, quantizer, torch.zeros(64, 64), Ranges(5, 0.5))
        fitted = quantizer.fit(quantizer.groups(weight), 1.0, weight.abs().amax())
        for name, param in fitted.items():
            assert torch.equal(found[name].view(torch.uint8), param.view(torch.uint8))


def test_columns_that_go_together_are_fitted_together() -> None:
    """Two columns that always see the same input: only the sum of their weights counts, which one step makes exact and none
    makes both weights."""
    config = SCHEMES.get("int4")(group_size=32, scale_dtype="float32")
    weight, hessian = torch.zeros(1, 32), torch.zeros(32, 32)
    weight[0, :3] = torch.tensor([7.0, 1.45, 2.55])  # 1 + 3 is their sum, and 1 and 3 are their codes at step 1
    hessian[1:3, 1:3] = 1.0
    quantizer = config.quantizer()
    for search, expected in ((search_by_hessian, 0.0), (search_scales, 0.1)):
        counted = hessian if search is search_by_hessian else hessian.diagonal()
        params = search(weight, quantizer, counted, Ranges(2, 0.9))
        error = quantizer.nearest(quantizer.groups(weight), params).flatten() - weight[0]
        cost = float(error @ hessian @ error)
        assert cost < 1e-9 if expected == 0 else cost > 1e-4


def test_joined_and_choose() -> None:
    params = [{"scale": torch.full((2, 3, 1), float(i)), "whole": torch.tensor(7.0)} for i in range(3)]
    quantizer = SCHEMES.get("nvfp4")().quantizer()
    own = next(iter(quantizer.config.tensor_params))
    made = joined([{own: p["whole"], "scale": p["scale"]} for p in params], quantizer)
    assert made["scale"].shape == (6, 3, 1) and made[own].dim() == 0
    for dtype in (torch.float8_e4m3fn, torch.bfloat16, torch.float32, torch.uint8):
        new, old = torch.full((3, 2, 1), 2.0).to(dtype), torch.full((3, 2, 1), 1.0).to(dtype)
        condition = torch.tensor([True, False, True]).view(3, 1, 1).expand(3, 2, 1)
        assert choose(condition, new, old).float()[:, 0, 0].tolist() == [2, 1, 2]
