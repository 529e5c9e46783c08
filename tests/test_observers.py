"""Observers: what each promises, checked over the registry; numbers of torch.ao's; ranges as parameters of every scheme."""

from __future__ import annotations

import copy
import math
import pickle
import warnings
from collections.abc import Callable
from fractions import Fraction
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.ao.quantization import observer as ao

import quantplan
from quantplan import INT8Config, INT8Quantizer, QuantplanError
from quantplan.nn import observers as modules
from quantplan.numerics import count_bfloat16, counted_values
from quantplan.observer import OBSERVERS, Observer, ObserverConfig, Range
from quantplan.observers import histogram, minmax, mse, percentile
from quantplan.scheme import SCHEMES, NonFinite, Quantizer, SchemeConfig

Stream = list[Tensor]


def make(name: str, **options: Any) -> Observer:
    return OBSERVERS.get(name).model_validate(options).observer()


# every observer with its defaults, and with options that change what it does
CONFIGS = [
    *(member() for member in OBSERVERS),
    OBSERVERS.get("per_channel").model_validate({"axis": 0}),
    OBSERVERS.get("moving_average").model_validate({"averaging_constant": 0.3}),
    OBSERVERS.get("moving_average").model_validate({"averaging_constant": 1, "axis": -1}),
    OBSERVERS.get("percentile").model_validate({"percentile": 90}),
    OBSERVERS.get("percentile").model_validate({"percentile": 100}),
    OBSERVERS.get("histogram").model_validate({"bins": 37, "bits": 4, "upsample_rate": 5}),
    OBSERVERS.get("mse").model_validate({"grid": 7, "lowest": 0.2}),
]
COLLECTING = [c for c in CONFIGS if not c.dynamic]
KEEPING = [c for c in COLLECTING if not c.order_matters]


def label(config: ObserverConfig) -> str:
    return " ".join([config.name, *(f"{k}={v}" for k, v in config.model_dump(exclude_defaults=True).items())])


every = pytest.mark.parametrize("config", CONFIGS, ids=label)
collecting = pytest.mark.parametrize("config", COLLECTING, ids=label)
keeping = pytest.mark.parametrize("config", KEEPING, ids=label)

KINDS = ("normal", "heavy", "positive", "drifting", "few values", "constant", "outlier", "negative")


def stream(kind: str = "heavy", batches: int = 4, features: int = 8, seed: int = 0) -> Stream:
    """Batches `[batch, tokens, features]` whose range grows now and then."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for i in range(batches):
        x = torch.randn(6, 11, features, generator=generator)
        found.append(
            {
                "normal": x,
                "heavy": x**3,
                "positive": x.relu(),
                "drifting": x * 1.5**i + i,
                "few values": x.round(),
                "constant": torch.full_like(x, 0.7),
                "outlier": x.index_put((torch.tensor(0), torch.tensor(0), torch.tensor(0)), torch.tensor(50.0 + i)),
                "negative": -x.abs() - 1,
            }[kind]
        )
    return found


def seen(config: ObserverConfig, batches: Stream) -> Observer:
    observer = config.observer()
    for x in batches:
        observer.update(x)
    return observer


def same(a: Observer, b: Observer) -> bool:
    """Equal statistics, bit for bit, and equal ranges."""
    one, other = a.state(), b.state()
    equal = one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)
    return equal and (not one or same_range(a.result(), b.result()))


def same_range(a: Range, b: Range) -> bool:
    return torch.equal(a.low, b.low) and torch.equal(a.high, b.high)


def codes(error: pytest.ExceptionInfo[QuantplanError]) -> set[str]:
    return {p.code for p in error.value.problems}


# --- the contract -----------------------------------------------------------------------------------------------------


@collecting
@pytest.mark.parametrize("kind", KINDS)
def test_a_range_is_finite_ordered_float32_and_within_what_was_seen(config: ObserverConfig, kind: str) -> None:
    batches = stream(kind)
    before = [x.clone() for x in batches]
    found = seen(config, batches).result()
    assert all(torch.equal(a, b) for a, b in zip(before, batches, strict=True))
    shape = {None: (), -1: (8,), 0: (6,)}[config.channel_axis]
    assert found.low.shape == found.high.shape == shape
    assert found.low.dtype == found.high.dtype == torch.float32
    assert found.low.isfinite().all() and found.high.isfinite().all() and (found.low <= found.high).all()
    everything = torch.stack(batches)
    top = everything.abs().max() * (1 + 1e-6)
    assert (found.absmax <= top).all() or not config.within
    if config.within and config.name != "static_range":
        assert (found.low >= everything.min() - 1e-6 * top).all() and (found.high <= everything.max() + 1e-6 * top).all()
    assert (found.absmax == torch.maximum(-found.low, found.high)).all() or kind in ("drifting", "constant", "negative")


@collecting
def test_nothing_seen_is_an_error_and_empty_tensors_are_nothing(config: ObserverConfig) -> None:
    observer = config.observer()
    none = torch.zeros(2, 3, dtype=torch.bool)
    for _ in range(2):
        with pytest.raises(QuantplanError) as error:
            observer.result()
        assert codes(error) == {"QP603"} and observer.state() == {}
        for empty in (torch.zeros(0), torch.zeros(0, 8), torch.zeros(2, 0, 8)):
            observer.update(empty)
        if config.channel_axis != 0:
            observer.update(torch.full((2, 3, 8), math.nan), none)
    observer.update(torch.ones(6, 8))
    after = observer.state()
    observer.update(torch.zeros(6, 0) if config.channel_axis == 0 else torch.zeros(0, 8))
    assert all(torch.equal(after[n], v) for n, v in observer.state().items())
    observer.reset()
    assert observer.state() == {}


@collecting
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_what_is_not_finite_is_refused_and_changes_nothing(config: ObserverConfig, bad: float, dtype: torch.dtype) -> None:
    x = torch.randn(6, 8).to(dtype)
    wrong = x.clone()
    wrong[3, 5] = bad
    observer = config.observer()
    with pytest.raises(NonFinite):
        observer.update(wrong)
    assert observer.state() == {}
    observer.update(x)
    before = observer.state()
    with pytest.raises(NonFinite):
        observer.update(wrong)
    assert all(torch.equal(before[n], v) for n, v in observer.state().items())
    if config.channel_axis != 0:
        observer.update(wrong, torch.arange(6) != 3)  # what does not count may be anything


@collecting
def test_a_number_too_large_for_float32_is_not_finite(config: ObserverConfig) -> None:
    with pytest.raises(NonFinite):
        config.observer().update(torch.tensor([[1e300]], dtype=torch.float64))


def test_a_histogram_refuses_a_range_that_float32_cannot_divide() -> None:
    for x in (torch.tensor([-3e38, 3e38]), torch.tensor([0.0, 3e38])):
        with pytest.raises(NonFinite):
            make("histogram").update(x)
    observer = make("histogram")
    for value in (-3e38, 3e38):
        x = torch.tensor([value])
        if value < 0:
            observer.update(x)
            continue
        with pytest.raises(NonFinite):
            observer.update(x)


@collecting
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_a_dtype_counts_as_its_values(config: ObserverConfig, dtype: torch.dtype) -> None:
    batches = [x.to(dtype) for x in stream(batches=3)]
    assert same(seen(config, batches), seen(config, [x.float() for x in batches]))


@collecting
def test_small_floats_and_integers_are_values_too(config: ObserverConfig) -> None:
    x = stream(batches=1)[0].round().clamp(-7, 7) + 0.0  # integers have no -0
    assert same(seen(config, [x.to(torch.float8_e4m3fn)]), seen(config, [x]))
    assert same(seen(config, [x.to(torch.int32)]), seen(config, [x]))


@collecting
def test_views_gradients_and_inference_mode_make_no_difference(config: ObserverConfig) -> None:
    batches = stream(batches=3, features=16)
    plain = seen(config, [x[:, ::2, 1::3].contiguous() for x in batches])
    assert same(seen(config, [x[:, ::2, 1::3] for x in batches]), plain)
    assert same(seen(config, [x.mT.contiguous().mT[:, ::2, 1::3] for x in batches]), plain)
    with torch.inference_mode():
        inferred = seen(config, [x[:, ::2, 1::3].clone() for x in batches[:2]])
    inferred.update(batches[2][:, ::2, 1::3].clone().requires_grad_())
    assert same(inferred, plain)
    found = inferred.result()
    scale = torch.ones((), requires_grad=True)
    (found.low * scale).sum().backward()  # autograd refuses tensors made in inference mode
    assert not found.high.requires_grad and not found.high.is_inference()


@collecting
def test_scalars_and_vectors(config: ObserverConfig) -> None:
    observer = config.observer()
    observer.update(torch.tensor(-1.5))
    found = observer.result()
    assert not config.within or (found.low.reshape(-1).tolist() == [-1.5] and found.high.item() in (-1.5, 1.5))
    observer = config.observer()
    observer.update(torch.tensor([1.0, 2.0, -4.0]))
    assert (observer.result().absmax.max() <= 4 or not config.within) and observer.result().low.numel() in (1, 3)


@pytest.mark.parametrize("config", [c for c in COLLECTING if c.channel_axis != 0], ids=label)
def test_a_mask_picks_the_tokens_that_count(config: ObserverConfig) -> None:
    generator = torch.Generator().manual_seed(3)
    batches = stream()
    masks = [torch.rand(6, 11, generator=generator) < 0.6 for _ in batches]
    masked = config.observer()
    for x, mask in zip(batches, masks, strict=True):
        masked.update(x, mask)
    assert same(masked, seen(config, [x[mask] for x, mask in zip(batches, masks, strict=True)]))
    whole = config.observer()
    for x in batches:
        whole.observe(x, torch.ones(6, 11, dtype=torch.bool))
    assert same(whole, seen(config, batches))
    vector = config.observer()
    vector.update(batches[0][0, 0], torch.tensor(True))
    assert same(vector, seen(config, [batches[0][0, 0]]))


@collecting
def test_a_mask_or_axis_that_does_not_fit_is_refused(config: ObserverConfig) -> None:
    x = torch.randn(6, 11, 8)
    for mask in (torch.ones(6, 11), torch.ones(6, 11, 8, dtype=torch.bool), torch.ones(11, dtype=torch.bool)):
        with pytest.raises(QuantplanError) as error:
            config.observer().update(x, mask)
        assert codes(error) == {"QP105"}


def test_channels_that_do_not_fit_are_refused() -> None:
    observer = make("per_channel", axis=1)
    with pytest.raises(QuantplanError, match="axis 1 is not one of a tensor with 1 axes") as error:
        observer.update(torch.ones(3))
    assert codes(error) == {"QP105"}
    with pytest.raises(QuantplanError, match="axis 1 is not the last"):
        observer.update(torch.ones(2, 3, 4), torch.ones(2, 3, dtype=torch.bool))
    observer.update(torch.ones(2, 3), torch.tensor([True, False]))  # here it is the last
    with pytest.raises(QuantplanError, match="4 channels where 3 were seen before"):
        observer.update(torch.ones(2, 4))
    other = make("per_channel", axis=1)
    other.update(torch.ones(2, 4))
    with pytest.raises(QuantplanError, match="4 channels joined to 3"):
        observer.merge(other)


@keeping
@pytest.mark.parametrize("kind", KINDS)
def test_the_order_of_batches_and_how_they_are_cut_do_not_matter(config: ObserverConfig, kind: str) -> None:
    batches = stream(kind, batches=5)
    whole = seen(config, batches)
    assert same(seen(config, batches[::-1]), whole)
    if config.channel_axis != 0 and config.name != "static_range":  # which counts batches
        assert same(seen(config, [torch.cat(batches)]), whole)
        assert same(seen(config, [row for x in batches for row in x]), whole)


@collecting
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cut", [1, 2, 4])
def test_partial_runs_merge_into_the_whole(config: ObserverConfig, kind: str, cut: int) -> None:
    batches = stream(kind, batches=5)
    whole, merged, rest = seen(config, batches), seen(config, batches[:cut]), seen(config, batches[cut:])
    kept = rest.state()
    merged.merge(rest)
    assert all(torch.equal(kept[n], v) for n, v in rest.state().items())
    if not config.order_matters:
        assert same(merged, whole)
        return
    one, other = merged.result(), whole.result()
    # a histogram is off by the bins that its parts were counted in
    slack = 4 * torch.stack(batches).abs().max().item() / getattr(config, "bins", 1e6)
    torch.testing.assert_close(one.low, other.low, rtol=1e-5, atol=slack)
    torch.testing.assert_close(one.high, other.high, rtol=1e-5, atol=slack)
    if config.name == "histogram":
        a, b = merged.state(), whole.state()
        assert torch.equal(a["low"], b["low"]) and torch.equal(a["high"], b["high"])
        torch.testing.assert_close(a["histogram"].sum(), b["histogram"].sum())


@every
def test_merging_with_nothing_and_with_another_config(config: ObserverConfig) -> None:
    full, empty = seen(config, stream()), config.observer()
    before = full.state()
    full.merge(empty)
    assert all(torch.equal(before[n], v) for n, v in full.state().items())
    empty.merge(full)
    assert all(torch.equal(before[n], v) for n, v in empty.state().items())
    empty.update(torch.full((6, 11, 8), 1e3))  # statistics are shared until one of them goes on, never after
    assert all(torch.equal(before[n], v) for n, v in full.state().items())
    other = next(c for c in CONFIGS if c != config)
    with pytest.raises(QuantplanError) as error:
        full.merge(other.observer())
    assert codes(error) == {"QP105"}


@every
def test_statistics_survive_a_file(config: ObserverConfig, tmp_path: Path) -> None:
    batches = stream("drifting", batches=4)
    whole, first = seen(config, batches), seen(config, batches[:2])
    save_file(first.state(), tmp_path / "statistics.safetensors")
    again = config.observer()
    again.load_state(load_file(tmp_path / "statistics.safetensors"))
    state = first.state()
    for value in state.values():
        value.fill_(3)  # copies: nothing of it reaches the observer
    for x in batches[2:]:
        again.update(x)
    assert same(again, whole)
    again.load_state({})
    assert again.state() == {}


@every
def test_statistics_of_something_else_are_refused(config: ObserverConfig) -> None:
    observer = seen(config, stream())
    state = observer.state()
    wrong: list[dict[str, Tensor]] = [{"colour": torch.ones(())}, {**state, "colour": torch.ones(())}]
    for name, value in state.items():
        wrong += [{k: v for k, v in state.items() if k != name}] * (len(state) > 1)
        wrong += [{**state, name: value.half()}, {**state, name: value.unsqueeze(0)}]
    if "histogram" in state:
        wrong.append({**state, "histogram": state["histogram"][1:]})
    if "counts" in state:
        wrong.append({**state, "counts": state["counts"][1:]})
    for bad in wrong:
        with pytest.raises(QuantplanError) as error:
            observer.load_state(bad)
        assert codes(error) == {"QP105"}
    if "low" in state:
        with pytest.raises(NonFinite):
            observer.load_state({**state, "low": state["low"] * math.nan})
    assert all(torch.equal(state[n], v) for n, v in observer.state().items())


def test_a_placeholder_collects_nothing() -> None:
    observer = make("placeholder")
    observer.update(torch.full((2, 2), math.nan))
    assert observer.state() == {}
    with pytest.raises(QuantplanError, match="collects no range") as error:
        observer.result()
    assert codes(error) == {"QP603"}


@every
def test_options(config: ObserverConfig) -> None:
    member = type(config)
    assert member.__doc__ and member.use and OBSERVERS.get(config.name) is member
    assert all(f.description for f in member.options().values())
    assert member.model_validate_json(config.model_dump_json()) == config and hash(config) == hash(config.model_copy())
    with pytest.raises(ValidationError):
        member.model_validate({"colour": 1})
    with pytest.raises(ValidationError):
        config.axis = 3  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("moving_average", {"averaging_constant": 0}),
        ("moving_average", {"averaging_constant": 1.1}),
        ("percentile", {"percentile": 50}),
        ("percentile", {"percentile": 100.1}),
        ("histogram", {"bins": 1}),
        ("histogram", {"bits": 0}),
        ("histogram", {"upsample_rate": 0}),
        ("mse", {"grid": 1}),
        ("mse", {"lowest": 1}),
        ("mse", {"lowest": 0}),
    ],
)
def test_options_out_of_range(name: str, options: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        OBSERVERS.get(name).model_validate(options)


def test_the_registry_and_the_documents() -> None:
    names = ["headroom", "histogram", "minmax", "moving_average", "mse", "per_channel", "percentile", "placeholder"]
    names.append("static_range")
    assert OBSERVERS.names() == names
    with pytest.raises(QuantplanError, match="unknown observer 'min_max'"):
        OBSERVERS.get("min_max")
    page = (Path(quantplan.__file__).parent.parent / "docs/observers.md").read_text()
    for member in OBSERVERS:
        assert f"\n## {member.name}\n" in page
        assert all(f"| `{option}` |" in page for option in member.options())


# --- slow references --------------------------------------------------------------------------------------------------


def slow_percentile(values: list[float], share: float) -> tuple[float, float]:
    """The ends of the sorted values after as many as may be left out are dropped on either side."""
    values = sorted(values)
    dropped = math.floor(len(values) * (1 - Fraction(str(share)) / 100))
    return values[dropped], values[-1 - dropped]


@pytest.mark.parametrize("share", [51, 75.5, 90, 99, 99.9, 99.99, 100])
@pytest.mark.parametrize("kind", KINDS)
def test_percentile_equals_sorting(share: float, kind: str) -> None:
    batches = [x.bfloat16() for x in stream(kind)]
    found = seen(OBSERVERS.get("percentile").model_validate({"percentile": share}), batches).result()
    assert (found.low.item(), found.high.item()) == slow_percentile(torch.cat(batches).flatten().tolist(), share)


def test_percentile_of_float32_is_off_by_its_rounding_to_bfloat16_and_inside_what_was_seen() -> None:
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0)) + 3
    for share in (60, 99, 99.9, 100):
        found = seen(OBSERVERS.get("percentile").model_validate({"percentile": share}), [x]).result()
        low, high = slow_percentile(x.tolist(), share)
        assert abs(found.low - low) <= abs(low) / 256 and abs(found.high - high) <= abs(high) / 256
        assert found.low >= x.min() and found.high <= x.max()
    assert found.low == x.min() and found.high == x.max()


def test_percent_means_what_is_written() -> None:
    """100 - 99.9 is less than 0.1 in floating point: one value of a thousand may be left out on each side, not none."""
    x = torch.zeros(1000)
    x[0], x[1] = -2, 2
    found = seen(OBSERVERS.get("percentile").model_validate({"percentile": 99.9}), [x]).result()
    assert found.low == found.high == 0


def slow_mse(batches: Stream, quantizer: Quantizer, grid: int, lowest: float) -> tuple[float, float]:
    """One range at a time over the values themselves; ranges are cut at a magnitude."""
    values = torch.cat(batches).flatten().bfloat16().float()
    low, high = torch.cat(batches).min(), torch.cat(batches).max()
    top, best, least = max(-low, high, key=abs).abs(), (low.item(), high.item()), math.inf
    for i in range(grid):
        cut = top * lowest ** (i / (grid - 1))
        ends = [min(max(end, -cut), cut) for end in (low, high)]
        params = quantizer.fit(torch.stack(ends))
        error = 0.0
        for part in values.split(64):
            rounded = quantizer.decode(quantizer.encode(part, params), params)
            error += sum((a - b) ** 2 for a, b in zip(rounded.tolist(), part.tolist(), strict=True))
        if error < least * (1 - 1e-12):
            best, least = (ends[0].item(), ends[1].item()), error
    return best


MSE_SCHEMES: list[SchemeConfig] = [
    SCHEMES.get(name).model_validate({"granularity": "tensor", **options})
    for name, options in [
        ("int4", {}),
        ("int4", {"symmetric": False}),
        ("int8", {"symmetric": False, "scale_dtype": "float32"}),
        ("int3", {"scale_rule": "midpoint"}),
        ("fp4", {}),
        ("fp8", {"format": "e5m2"}),
        ("nf4", {}),
    ]
] + [SCHEMES.get("mxfp4")()]


@pytest.mark.parametrize("kind", ["heavy", "positive", "outlier", "negative", "constant"])
@pytest.mark.parametrize("scheme", MSE_SCHEMES, ids=str)
def test_mse_equals_a_slow_search(kind: str, scheme: SchemeConfig) -> None:
    batches = [x[:2] for x in stream(kind, batches=2, seed=5)]
    found = seen(OBSERVERS.get("mse").model_validate({"grid": 12, "lowest": 0.1}), batches).result(scheme.quantizer())
    assert (found.low.item(), found.high.item()) == slow_mse(batches, scheme.quantizer(), 12, 0.1)


def test_mse_clips_an_outlier_that_costs_the_rest_and_keeps_the_nearer_end() -> None:
    x = torch.cat([torch.rand(5000, generator=torch.Generator().manual_seed(0)) * 2 - 0.5, torch.tensor([30.0])])
    observer = seen(OBSERVERS.get("mse")(), [x])
    found = observer.result(SCHEMES.get("int4")(granularity="tensor", symmetric=False).quantizer())
    assert 1.4 < found.high < 15 and found.low == x.min()
    many = seen(OBSERVERS.get("mse")(), [x, *[x[:-1]] * 200])  # the more the rest weighs, the less is left of the outlier
    assert 1.4 < many.result(SCHEMES.get("int4")(granularity="tensor", symmetric=False).quantizer()).high < 1.7
    # many bits afford the outlier
    assert observer.result(SCHEMES.get("int8")(granularity="tensor", symmetric=False).quantizer()).high > 20
    assert same_range(
        observer.result(), observer.result(INT8Config(granularity="tensor", symmetric=False, scale_dtype="float32").quantizer())
    )


@pytest.mark.parametrize("name", ["mse", "histogram"])
def test_a_static_range_over_blocks_with_scales_of_their_own_only_covers(name: str) -> None:
    observer = seen(OBSERVERS.get(name)(), stream("outlier"))
    found = observer.result(SCHEMES.get("nvfp4")().quantizer())
    assert found.high == 53 and found.low == torch.cat(stream("outlier")).min()


def test_stochastic_rounding_does_not_make_a_range_random() -> None:
    observer = seen(OBSERVERS.get("mse")(), stream())
    plain, drawn = (INT8Config(granularity="tensor", rounding=rounding) for rounding in ("nearest", "stochastic"))
    assert same_range(observer.result(plain.quantizer()), observer.result(drawn.quantizer()))


def test_static_range_is_the_mean_of_the_largest_magnitudes() -> None:
    observer, total = make("static_range"), 0.0
    for kind in KINDS:
        for x in stream(kind):
            observer.update(x)
            total += max(abs(v) for v in x.flatten().tolist())
    state = observer.state()
    assert state.keys() == {"count", "sum_of_absmax"} and state["count"] == 4 * len(KINDS)
    assert state["sum_of_absmax"].item() == pytest.approx(total, rel=1e-12)
    assert observer.result().high.item() == pytest.approx(total / 32, rel=1e-6) and observer.result().low < 0


def test_a_moving_average_in_plain_python() -> None:
    for constant in (0.01, 0.5, 1):
        observer = make("moving_average", averaging_constant=constant)
        low = high = None
        for x in stream("drifting", batches=8):
            observer.update(x)
            least, largest = x.min().item(), x.max().item()
            low = least if low is None else low + constant * (least - low)
            high = largest if high is None else high + constant * (largest - high)
        assert observer.result().low.item() == pytest.approx(low, rel=1e-5)
        assert observer.result().high.item() == pytest.approx(high, rel=1e-5)


def test_counting_bfloat16() -> None:
    every_code = torch.arange(1 << 16).to(torch.int16).view(torch.bfloat16)
    finite = every_code[every_code.isfinite()]
    counts = count_bfloat16(finite)
    assert counts.sum() == len(finite) == (counts == 1).sum()
    values, times = counted_values(counts)
    assert torch.equal(values, finite.float().sort().values) and (times == 1).all()
    x = torch.randn(50, 30).repeat(1, 3)[:, ::2]
    values, times = counted_values(count_bfloat16(x))
    unique, expected = x.bfloat16().float().unique(return_counts=True)
    assert torch.equal(values, unique) and torch.equal(times, expected)
    values, times = counted_values(count_bfloat16(torch.tensor([3.4e38, -3.4e38])))
    assert values.tolist() == [-torch.finfo(torch.bfloat16).max, torch.finfo(torch.bfloat16).max]  # held, not infinite


def test_a_histogram_counts_beyond_what_float32_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(histogram, "PIECE", 100)
    x = stream("normal", batches=1)[0]
    pieces = seen(OBSERVERS.get("histogram")(), [x]).state()
    monkeypatch.undo()
    assert torch.equal(pieces["histogram"], seen(OBSERVERS.get("histogram")(), [x]).state()["histogram"])
    many = {**pieces, "histogram": pieces["histogram"] + 2.0**24}
    observer = make("histogram")
    observer.load_state(many)
    observer.update(x)
    assert torch.equal(observer.state()["histogram"], many["histogram"] + pieces["histogram"])


# --- torch.ao ---------------------------------------------------------------------------------------------------------

TENSOR_SCHEMES = (torch.per_tensor_affine, torch.per_tensor_symmetric)
CHANNEL_SCHEMES = (torch.per_channel_affine, torch.per_channel_symmetric)
INTEGERS: list[dict[str, Any]] = [
    {"dtype": torch.quint8},
    {"dtype": torch.qint8},
    {"dtype": torch.int8, "reduce_range": True},
    {"dtype": torch.uint8},
    {"dtype": torch.qint8, "quant_min": -127, "quant_max": 127},
    {"dtype": torch.qint8, "quant_min": -128, "quant_max": 127, "reduce_range": True},
    {"dtype": torch.quint8, "quant_min": 0, "quant_max": 15},
    {"dtype": torch.quint8, "quant_min": 0, "quant_max": 100},
    {"dtype": torch.int16},
    {"dtype": torch.uint16},
    {"dtype": torch.qint32},
    {"dtype": torch.quint4x2},
    {"dtype": torch.qint8, "eps": 0.25},
]


def pair(name: str, **arguments: Any) -> tuple[Any, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return getattr(quantplan, name)(**arguments), getattr(ao, name)(**arguments)


def equal_parameters(ours: Any, theirs: Any) -> None:
    scale, zero = ours.calculate_qparams()
    expected_scale, expected_zero = theirs.calculate_qparams()
    assert torch.equal(scale, expected_scale) and scale.dtype == torch.float32
    assert torch.equal(zero.long(), expected_zero.long()) and zero.shape == expected_zero.shape and zero.dtype == torch.int32


@pytest.mark.parametrize("integers", INTEGERS, ids=str)
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("MinMaxObserver", {}),
        ("MovingAverageMinMaxObserver", {}),
        ("MovingAverageMinMaxObserver", {"averaging_constant": 0.3}),
        ("PerChannelMinMaxObserver", {"ch_axis": 0}),
        ("PerChannelMinMaxObserver", {"ch_axis": 2}),
        ("PerChannelMinMaxObserver", {}),
        ("MovingAveragePerChannelMinMaxObserver", {"ch_axis": 1, "averaging_constant": 0.2}),
    ],
    ids=str,
)
def test_scale_and_zero_point_are_those_of_torch(name: str, options: dict[str, Any], integers: dict[str, Any]) -> None:
    for qscheme, kind in product(CHANNEL_SCHEMES if "Channel" in name else TENSOR_SCHEMES, KINDS):
        ours, theirs = pair(name, qscheme=qscheme, **options, **integers)
        for x in stream(kind):
            assert ours(x) is x
            theirs(x)
            assert torch.equal(ours.min_val, theirs.min_val) and torch.equal(ours.max_val, theirs.max_val)
        assert (ours.quant_min, ours.quant_max) == (theirs.quant_min, theirs.quant_max)
        equal_parameters(ours, theirs)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", [0, 1])
def test_a_histogram_finds_the_range_torch_finds(kind: str, seed: int) -> None:
    """The same bins and the same search; sums are exact here and float32 there, which could move an end by a bin."""
    for options in ({"bins": 2048}, {"bins": 100, "qscheme": torch.per_tensor_symmetric, "dtype": torch.qint8}):
        ours, theirs = pair("HistogramObserver", **options)
        for x in stream(kind, seed=seed, features=64):
            ours(x)
            theirs(x)
        state = ours.state()
        torch.testing.assert_close(state["histogram"].float(), theirs.histogram, rtol=1e-5, atol=1e-4)
        assert torch.equal(state["low"], theirs.min_val) and torch.equal(state["high"], theirs.max_val)
        equal_parameters(ours, theirs)


# --- streams ----------------------------------------------------------------------------------------------------------

floats = st.floats(-(2.0**100), 2.0**100, width=32)
streams = st.lists(st.lists(floats, min_size=1, max_size=12), min_size=1, max_size=6)


@settings(max_examples=60, deadline=None)
@given(streams)
def test_any_stream_has_the_range_of_its_values(batches: list[list[float]]) -> None:
    tensors = [torch.tensor(b) for b in batches]
    values = [v for b in batches for v in b]
    found = seen(OBSERVERS.get("minmax")(), tensors).result()
    assert (found.low.item(), found.high.item()) == (min(values), max(values))
    static = seen(OBSERVERS.get("static_range")(), tensors).result()
    assert static.high.item() == pytest.approx(sum(max(map(abs, b)) for b in batches) / len(batches), rel=1e-6)
    rounded = [x.bfloat16() for x in tensors]
    percent = seen(OBSERVERS.get("percentile").model_validate({"percentile": 80}), rounded).result()
    assert (percent.low.item(), percent.high.item()) == slow_percentile(torch.cat(rounded).tolist(), 80)


@settings(max_examples=40, deadline=None)
@given(streams, st.integers(0, 6))
def test_any_stream_keeps_its_count_and_merges(batches: list[list[float]], cut: int) -> None:
    tensors = [torch.tensor(b) for b in batches]
    for name, options in (("minmax", {}), ("static_range", {}), ("percentile", {}), ("histogram", {"bins": 64})):
        config = OBSERVERS.get(name).model_validate(options)
        whole, merged = seen(config, tensors), seen(config, tensors[:cut])
        merged.merge(seen(config, tensors[cut:]))
        for key in whole.state().keys() - {"histogram"}:
            torch.testing.assert_close(merged.state()[key], whole.state()[key], rtol=1e-12, atol=0)
        for observer in (whole, merged):
            found, state = observer.result(), observer.state()
            assert found.low <= found.high
            if "histogram" in state:
                assert state["histogram"].sum().item() == pytest.approx(sum(map(len, batches)), rel=1e-9)
                assert (state["histogram"] >= 0).all()


# --- ranges as parameters of schemes ----------------------------------------------------------------------------------


def scheme_configs() -> list[SchemeConfig]:
    """Every scheme, and every way it makes parameters of a range."""
    found = [member() for member in SCHEMES]
    for member in SCHEMES:
        if "symmetric" in member.model_fields:
            found.append(member.model_validate({"symmetric": False}))
        if "scale_rule" in member.model_fields:
            found += [member.model_validate({"scale_rule": rule, "scale_dtype": "float32"}) for rule in ("midpoint", "qmin")]
    return [*found, *(SCHEMES.get(n).model_validate({"format": f}) for n, f in (("fp8", "e5m2"), ("mxfp8", "e5m2")))]


scheme_wise = pytest.mark.parametrize("scheme", scheme_configs(), ids=str)


@scheme_wise
@pytest.mark.parametrize("kind", KINDS)
def test_a_range_gives_the_parameters_its_values_give(scheme: SchemeConfig, kind: str) -> None:
    x = torch.cat(stream(kind)).flatten(0, -2)
    quantizer = scheme.quantizer()
    tensor = seen(OBSERVERS.get("minmax")(), [x]).result()
    channels = seen(OBSERVERS.get("per_channel")(), [x]).result()
    absmax = x.abs().max() if scheme.needs_absmax else None
    for known, groups, shape in ((tensor, x.reshape(-1), (1,)), (channels, x.T.contiguous(), (8, 1))):
        params, fitted = quantizer.fit_range(known), quantizer.fit(groups, absmax=absmax)
        for name, value in params.items():
            assert torch.equal(value.view(torch.uint8), fitted[name].view(torch.uint8)), name
            assert value.shape == ((1,) if name in scheme.tensor_params else shape)


@scheme_wise
def test_a_range_of_zeros_keeps_zero(scheme: SchemeConfig) -> None:
    zero = torch.zeros(())
    quantizer = scheme.quantizer()
    params = quantizer.fit_range(Range(zero, zero))
    assert (quantizer.decode(quantizer.encode(torch.zeros(5), params), params) == 0).all()
    with pytest.raises(NonFinite):
        quantizer.fit_range(Range(zero, zero + math.inf))


def test_using_with_observers() -> None:
    """Seed 001's snippet."""
    calibration_data = stream("normal")
    # Create quantizer with observer
    config = INT8Config(symmetric=True)
    quantizer = INT8Quantizer(config)
    observer = quantplan.MinMaxObserver()
    quantizer.attach_observer(observer)

    # Calibrate on data
    for data in calibration_data:
        observer.observe(data)

    # Finish calibration
    quantizer.calibrate_finish()

    # Now quantizer uses precomputed scales
    new_data = stream("normal", seed=9)[0]
    new_data[0, 0, 0] = 1000
    quantized = quantizer.quantize_activation(new_data)
    top = torch.cat(calibration_data).abs().max()
    scale = (top / 127).bfloat16().float()
    assert torch.equal(quantized, (new_data / scale).round().clamp(-128, 127) * scale)
    assert not torch.equal(quantized, config.quantizer().quantize_activation(new_data))


@scheme_wise
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_static_activations_have_the_range_that_was_found(scheme: SchemeConfig, dtype: torch.dtype) -> None:
    calibration, x = stream("drifting", features=64), stream("heavy", features=64, seed=7)[0].to(dtype)
    quantizer, observer = scheme.quantizer(), make("minmax")
    quantizer.attach_observer(observer)
    for batch in calibration:
        observer.observe(batch)
    before = quantizer.quantize_activation(x)
    assert torch.equal(before, scheme.quantizer().quantize_activation(x))  # dynamic until calibration is finished
    quantizer.calibrate_finish()
    static = quantizer.quantize_activation(x)
    assert static.dtype == dtype and static.shape == x.shape
    # a token's values do not depend on its neighbours any more (blocks of 16 lie within a token)
    assert torch.equal(static[2:3, 4:5], quantizer.quantize_activation(x[2:3, 4:5]))
    if scheme.needs_absmax:
        assert torch.equal(static, scheme.quantizer().fake_quantize(x, torch.cat(calibration).abs().max()))
    else:
        params = quantizer.fit_range(observer.result())
        assert torch.equal(static, quantizer.decode(quantizer.encode(x.float(), params), params).to(dtype))
    assert quantizer.quantize_activation(x[:0]).shape == (0, 11, 64)
    x[0, 0, 0] = math.nan
    with pytest.raises(NonFinite):
        quantizer.quantize_activation(x)


def test_static_ranges_by_channel() -> None:
    x = stream("normal")[0] * torch.logspace(-2, 2, 8)
    config = INT8Config(symmetric=False, scale_dtype="float32")
    quantizer = config.quantizer()
    observer = make("per_channel")
    observer.update(x)
    quantizer.attach_observer(observer)
    quantizer.calibrate_finish()
    quantized = quantizer.quantize_activation(x)
    features = torch.stack([config.quantizer().quantize_activation(x[..., i].reshape(1, -1)).view(6, 11) for i in range(8)], -1)
    assert torch.equal(quantized, features)


def test_calibrating_without_an_observer_without_data_and_without_a_range() -> None:
    quantizer = INT8Quantizer(INT8Config())
    with pytest.raises(QuantplanError, match="no observer is attached") as error:
        quantizer.calibrate_finish()
    assert codes(error) == {"QP603"}
    quantizer.attach_observer(quantplan.HistogramObserver())
    with pytest.raises(QuantplanError, match="has seen no values"):
        quantizer.calibrate_finish()
    placeholder = quantplan.PlaceholderObserver()
    quantizer.attach_observer(placeholder)
    x = stream()[0]
    placeholder.observe(x)
    quantizer.calibrate_finish()
    assert torch.equal(quantizer.quantize_activation(x), INT8Quantizer(INT8Config()).quantize_activation(x))


def test_observers_that_weigh_errors_weigh_those_of_the_quantizer() -> None:
    """Four bits clip what eight bits need not, and are the better for it."""
    x = torch.randn(20000, generator=torch.Generator().manual_seed(0))
    x = torch.cat([x, x[:100] * 3])
    for name, gain in (("mse", 0.5), ("histogram", 1.0)):  # the histogram's search ends where the error first grows
        tops = []
        for bits in (4, 8):
            config = SCHEMES.get(f"int{bits}")(granularity="tensor")
            quantizer, observer = config.quantizer(), make(name)
            observer.update(x)
            quantizer.attach_observer(observer)
            quantizer.calibrate_finish()
            static = (quantizer.quantize_activation(x) - x).square().mean()
            dynamic = (config.quantizer().quantize_activation(x[None])[0] - x).square().mean()
            assert static < dynamic * (gain if bits == 4 else 1.01)
            tops.append(observer.result(quantizer).absmax)
        assert tops[0] < tops[1] or name == "histogram"


# --- modules under torch's names --------------------------------------------------------------------------------------

MODULES = [getattr(quantplan, name) for name in quantplan.__all__ if name.endswith("Observer")]
RANGED = [m for m in MODULES if m is not quantplan.PlaceholderObserver]


def test_every_observer_has_a_module() -> None:
    assert {m.kind for m in MODULES} == set(OBSERVERS.names())
    assert all(issubclass(m, nn.Module) and issubclass(m, Observer) and m.__doc__ for m in MODULES)


def test_usage() -> None:
    """Seed 003's snippets."""
    calibration_data = stream("normal")
    observer = quantplan.MinMaxObserver(dtype=torch.qint8)
    for batch in calibration_data:
        observer(batch)
    scale, zero_point = observer.calculate_qparams()
    low, high = torch.cat(calibration_data).min(), torch.cat(calibration_data).max()
    assert scale.item() == pytest.approx(((high - low) / 255).item())
    assert zero_point.item() == -128 - round((low / scale).item())

    activation = quantplan.MinMaxObserver.with_args(dtype=torch.quint8, qscheme=torch.per_tensor_affine)
    weight = quantplan.PerChannelMinMaxObserver.with_args(dtype=torch.qint8, qscheme=torch.per_channel_symmetric, ch_axis=0)
    attention = quantplan.HistogramObserver.with_args(dtype=torch.quint8, bins=2048)
    assert activation().dtype == torch.quint8 and activation() is not activation()
    assert weight().qscheme == torch.per_channel_symmetric and weight().ch_axis == 0 and activation().ch_axis == -1
    assert attention().config.bins == 2048
    reduced = activation.with_args(reduce_range=True).with_args(dtype=torch.qint8)()
    assert (reduced.quant_min, reduced.quant_max) == (-64, 63) and isinstance(reduced, quantplan.MinMaxObserver)
    assert quantplan.HistogramObserver(upsample_rate=128).config.upsample_rate == 128


@pytest.mark.parametrize("module", MODULES)
def test_a_module_is_copied_pickled_and_kept_in_a_state_dict(module: Callable[..., Any], tmp_path: Path) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.watch = module()

    model, fresh = Model(), Model()
    fresh.load_state_dict(model.state_dict())
    for x in stream():
        assert model.watch(x) is x
    torch.save(model.state_dict(), tmp_path / "model.pt")
    fresh.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    observer = model.watch
    for other in (fresh.watch, copy.deepcopy(observer), pickle.loads(pickle.dumps(observer))):
        assert observer.state().keys() == other.state().keys()
        if not observer.config.dynamic:
            assert same(observer, other)
            for a, b in zip(observer.calculate_qparams(), other.calculate_qparams(), strict=True):
                assert torch.equal(a, b)
    assert type(observer).__name__ in repr(model) and str(observer.dtype) in repr(model)
    observer.reset_min_max_vals()
    assert observer.state() == {} and observer.min_val == math.inf and observer.max_val == -math.inf


@pytest.mark.parametrize("module", RANGED)
def test_a_module_refuses_what_does_not_go_together(module: Callable[..., Any]) -> None:
    wrong = TENSOR_SCHEMES if module.by_channel else CHANNEL_SCHEMES  # type: ignore[attr-defined]
    symmetric = (CHANNEL_SCHEMES if module.by_channel else TENSOR_SCHEMES)[1]  # type: ignore[attr-defined]
    for arguments in (
        {"qscheme": wrong[0]},
        {"qscheme": wrong[1]},
        {"qscheme": torch.per_channel_affine_float_qparams},
        {"dtype": torch.float16},
        {"qscheme": symmetric, "reduce_range": True},
        {"quant_min": 1, "quant_max": 5},
        {"quant_min": 0, "quant_max": 0},
        {"quant_min": 0, "quant_max": 256},
    ):
        with pytest.raises(QuantplanError) as error:
            module(**arguments)
        assert codes(error) == {"QP105"}
    with pytest.raises(QuantplanError) as error:
        module().calculate_qparams()
    assert codes(error) == {"QP603"}
    with pytest.raises(ValidationError):
        module(colour=1)


def test_a_placeholder_module_only_carries_its_arguments() -> None:
    observer = quantplan.PlaceholderObserver.with_args(dtype=torch.qint8, is_dynamic=True, custom_op_name="op")()
    assert observer.dtype == torch.qint8 and observer.is_dynamic and observer.custom_op == "op"
    x = torch.full((2,), math.nan)
    assert observer(x) is x
    with pytest.raises(QuantplanError, match="collects no range"):
        observer.calculate_qparams()


def test_an_mse_module_searches_on_the_grid_of_its_qscheme() -> None:
    x = torch.randn(20000, generator=torch.Generator().manual_seed(0)) + 1
    for qscheme in TENSOR_SCHEMES:
        observer = quantplan.MSEObserver(dtype=torch.qint8, qscheme=qscheme, quant_min=-8, quant_max=7)
        observer(x)
        scale, zero = observer.calculate_qparams()
        rounded = torch.fake_quantize_per_tensor_affine(x, scale, zero, -8, 7)
        plain = quantplan.MinMaxObserver(dtype=torch.qint8, qscheme=qscheme, quant_min=-8, quant_max=7)
        plain(x)
        coarse = torch.fake_quantize_per_tensor_affine(x, *plain.calculate_qparams(), -8, 7)
        assert (rounded - x).square().mean() < 0.8 * (coarse - x).square().mean()


# --- the checks bite --------------------------------------------------------------------------------------------------


def mutants() -> dict[str, tuple[Any, str, Any, Callable[[], None]]]:
    """What is replaced, by what, and the check that must then fail."""
    config = minmax.MinMaxConfig()
    percent, bins, collect = percentile.PercentileConfig(percentile=90), histogram.HistogramConfig(), mse.MSEConfig.collect

    def one_way(self: Any, first: Any, second: Any) -> Any:
        return {**first, "low": torch.minimum(first["low"], second["low"])}

    def forgetful(self: Any, first: Any, second: Any) -> Any:
        return {**second, "low": torch.minimum(first["low"], second["low"]), "high": torch.maximum(first["high"], second["high"])}

    return {
        "minmax forgets high": (
            minmax.MinMaxConfig,
            "join",
            one_way,
            lambda: test_the_order_of_batches_and_how_they_are_cut_do_not_matter(config, "drifting"),
        ),
        "percentile forgets counts": (
            percentile.PercentileConfig,
            "join",
            forgetful,
            lambda: test_the_order_of_batches_and_how_they_are_cut_do_not_matter(percent, "drifting"),
        ),
        "mse takes the whole range": (
            mse.MSEConfig,
            "range",
            lambda self, seen, quantizer: Range(seen["low"], seen["high"]),
            test_mse_clips_an_outlier_that_costs_the_rest_and_keeps_the_nearer_end,
        ),
        "mse takes too much": (
            mse.MSEConfig,
            "collect",
            lambda self, x: {**collect(self, x), "low": x.amin().float() * 2},
            lambda: test_a_range_is_finite_ordered_float32_and_within_what_was_seen(mse.MSEConfig(lowest=0.9, grid=2), "normal"),
        ),
        "histogram is not spread": (
            histogram.HistogramConfig,
            "_spread",
            lambda self, seen, low, high: seen["histogram"].clone(),
            lambda: test_a_histogram_finds_the_range_torch_finds("drifting", 0),
        ),
        "histogram loses counts": (
            histogram.HistogramConfig,
            "_spread",
            lambda self, seen, low, high: seen["histogram"] * 0,
            lambda: test_partial_runs_merge_into_the_whole(bins, "drifting", 4),
        ),
        "another error": (
            histogram.HistogramConfig,
            "_error",
            lambda self, counts, start, end, steps: float(self.bins - (end - start)),
            lambda: test_a_histogram_finds_the_range_torch_finds("heavy", 0),
        ),
        "scale without eps": (
            modules.ObserverModule,
            "calculate_qparams",
            lambda self: (self.result().absmax.reshape(1) / 127.5, torch.zeros(1, dtype=torch.int32)),
            lambda: test_scale_and_zero_point_are_those_of_torch("MinMaxObserver", {}, {"dtype": torch.qint8, "eps": 0.25}),
        ),
    }


@pytest.mark.parametrize("name", mutants())
def test_the_checks_bite(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, attribute, replacement, check = mutants()[name]
    check()
    monkeypatch.setattr(owner, attribute, replacement)
    with pytest.raises(AssertionError):
        check()
