"""What every scheme promises, checked over the registry, and that the checks bite: mutated schemes break them.

A promise is a function of a config that asserts. It runs on every scheme, granularity and option, and again on mutants.
"""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any, Literal, get_args, get_origin

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from quantplan import numerics, scheme
from quantplan.checkpoint.reader import TORCH_DTYPES
from quantplan.numerics import E2M1, decode_float, float_values
from quantplan.scheme import BLOCK, SCHEMES, NonFinite, Params, Quantizer, SchemeConfig
from quantplan.schemes import floating, integer, microscaling, nf4, nvfp4
from quantplan.tensor import QuantizedTensor, concatenate

ROWS, COLUMNS = 130, 192  # blocks of 128 have edges; groups of 16, 32 and 64 divide
RESERVED = {"pattern", "wq", "aq", "algorithm", "keep", "optional", "expect", "scheme", "name"}


def choices(field: Any) -> list[Any]:
    """What an option of few values can be: a bool, a Literal, a Literal or None."""
    if field.annotation is bool:
        return [True, False]
    kinds = [field.annotation, *get_args(field.annotation)]
    return [value for kind in kinds if get_origin(kind) is Literal for value in get_args(kind)]


def configs() -> list[SchemeConfig]:
    """Every scheme in every granularity, with and without symmetry, and every value of its other options."""
    found: dict[SchemeConfig, None] = {}
    for member in SCHEMES:
        options = {name: choices(f) for name, f in member.plan_options().items() if name not in ("granularity", "rounding")}
        for granularity in member.granularities:
            size = {"group_size": member.fixed_group_size or 32} if granularity == "group" else {}
            for symmetric in options.get("symmetric", [None]):
                given = {} if symmetric is None else {"symmetric": symmetric}
                found[member(granularity=granularity, **size, **given)] = None
        found[member()] = None
        for name, values in options.items():
            for value in values:
                found[member(**{name: value})] = None
    return list(found)


def label(config: SchemeConfig) -> str:
    given = {k: v for k, v in config.model_dump(exclude_defaults=True).items() if v is not None}
    return " ".join([config.name, *(f"{k}={v}" for k, v in given.items())])


def matrix(rows: int = ROWS, columns: int = COLUMNS, seed: int = 0) -> Tensor:
    """Weights a scheme may find hard: heavy tails, magnitudes apart by orders, rows of one sign, constants, zeros."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=generator)
    x *= torch.randn(rows, columns, generator=generator).mul(0.7).exp() * torch.randn(rows, 1, generator=generator).exp()
    x[:, ::17] = 0
    x[1] = 0
    x[2] = x[2].abs() + 3
    x[3] = -x[3].abs() - 3
    x[4] = 0.7
    x[5, 64:] = 0
    x[6] = torch.where(torch.arange(columns) % 2 == 0, 0.0, -0.0)
    return x * 0.05


def quotient_dtype(config: SchemeConfig) -> torch.dtype:
    """What weight / scale is rounded to before it is rounded to a level."""
    return getattr(torch, getattr(config, "quotient_dtype", "float32"))


def like(config: SchemeConfig, **changes: Any) -> SchemeConfig:
    return type(config).model_validate({**config.model_dump(), **changes})


def grouped(q: QuantizedTensor) -> Params:
    """Parameters as `fit` returns them."""
    return {n: p if n in q.scheme.tensor_params else p.unsqueeze(-1) for n, p in q.params.items()}


def values_of(quantizer: Quantizer, params: Params) -> Tensor:
    """Every value each group can hold, in order, `[..., values]`; codes that are no numbers are left out."""
    lead = params["scale"].shape[:-1]
    codes = torch.arange(2**quantizer.config.bits, dtype=torch.uint8).expand(*lead, -1)
    values = quantizer.decode(codes, params)
    number = values.isfinite()[(0,) * len(lead)]
    return values[..., number].sort(-1).values.contiguous()


def neighbours(values: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest of `values` on either side of each `x`; at the ends the last one twice."""
    place = torch.searchsorted(values, x.contiguous())
    last = values.shape[-1] - 1
    return values.gather(-1, (place - 1).clamp(0, last)), values.gather(-1, place.clamp(0, last))


def same(a: QuantizedTensor, b: QuantizedTensor) -> bool:
    """Equal codes and parameters, bit for bit."""
    return torch.equal(a.codes, b.codes) and all(
        torch.equal(a.params[n].view(torch.uint8), b.params[n].view(torch.uint8)) for n in a.params | b.params
    )


# --- promises ---------------------------------------------------------------------------------------------------------


def layout_is_kept(config: SchemeConfig) -> None:
    """Codes and parameters have the dtypes and shapes the layout says, in every shape of matrix."""
    for rows, columns in ((ROWS, COLUMNS), (1, COLUMNS), (257, 64), (3, 128)):
        q = config.quantizer().quantize(matrix(rows, columns, seed=1) if rows > 6 else torch.randn(rows, columns))
        layout = config.param_layout(rows, columns)
        assert {n: (p.dtype, tuple(p.shape)) for n, p in q.params.items()} == {
            n: (DTYPES[dtype], shape) for n, (dtype, shape) in layout.items()
        }
        assert all(p.is_contiguous() for p in (q.codes, *q.params.values()))
        assert q.codes.dtype == torch.uint8 and q.shape == (rows, columns) and q.scheme == config
        assert int(q.codes.max()) < 2**config.bits
        assert config.tensor_params <= layout.keys() and config.grid(rows, columns) == layout["scale"][1]
        dense = config.quantizer().dequantize(q)
        assert dense.dtype == torch.float32 and dense.shape == (rows, columns) and dense.isfinite().all()


def code_is_the_nearest(config: SchemeConfig) -> None:
    """No code stands for a value nearer to the weight, given the parameters as stored."""
    quantizer, x = config.quantizer(), matrix()
    q = quantizer.quantize(x)
    chosen, groups = quantizer.groups(quantizer.dequantize(q)), quantizer.groups(x)
    low, high = neighbours(values_of(quantizer, grouped(q)), groups)
    least = torch.minimum((groups - low).abs(), (groups - high).abs())
    # a quotient in bfloat16 is off by half of its last bit, so that the next level over may be as near to it
    slack = max(1e-6, torch.finfo(quotient_dtype(config)).eps)
    assert ((chosen - groups).abs() <= least + slack * groups.abs()).all()


def range_covers_the_weights(config: SchemeConfig) -> None:
    """The largest weight is not far outside what codes can hold, and the range is not much wider than the weights."""
    quantizer, x = config.quantizer(), matrix()
    groups = quantizer.groups(x)
    values = values_of(quantizer, grouped(quantizer.quantize(x)))
    high, low, top = groups.amax(-1), groups.amin(-1), groups.abs().amax(-1)
    beyond = torch.maximum(high - values[..., -1], values[..., 0] - low)
    assert (beyond <= 0.51 * top).all()  # int2 with the qmin rule saturates at half; mx at three quarters
    widest = torch.maximum(values[..., -1], -values[..., 0])[top > 0] / top[top > 0]
    assert (widest <= 2.02).all()  # int2 with the qmax rule reaches twice as far down as up


def zero_is_exact(config: SchemeConfig) -> None:
    """Zeros stay zero, in groups of zeros and where all weights lie far from zero."""
    quantizer, x = config.quantizer(), matrix()
    q = quantizer.quantize(x)
    assert (quantizer.dequantize(q)[x == 0] == 0).all()
    assert scales_are_positive(q)
    nothing = quantizer.quantize(torch.zeros(ROWS, COLUMNS))
    assert (quantizer.dequantize(nothing) == 0).all() and scales_are_positive(nothing)
    if "scale_dtype" in type(config).model_fields:
        assert (nothing.params["scale"] == 1).all()
        assert (q.params["scale"].unsqueeze(-1)[(quantizer.groups(x) == 0).all(-1)] == 1).all()
    for far in (torch.linspace(5, 6, COLUMNS), -torch.linspace(5, 6, COLUMNS), torch.full((COLUMNS,), 7.3)):
        groups = quantizer.groups(far.repeat(ROWS, 1))
        params = quantizer.fit(groups, absmax=groups.abs().amax())
        for zero in (0.0, -0.0):
            assert (quantizer.decode(quantizer.encode(torch.full_like(groups, zero), params), params) == 0).all()


def outside_saturates(config: SchemeConfig) -> None:
    """Values `fit` never saw, of any size, become the last code on their side."""
    quantizer = config.quantizer()
    params = quantizer.fit(quantizer.groups(matrix()), absmax=matrix().abs().amax())
    values = values_of(quantizer, params)
    for factor in (1.0001, 1.3, 2.0, 1e6, 1e25):
        for edge in (values[..., -1:], values[..., :1]):
            held = quantizer.decode(quantizer.encode(edge * factor, params), params)
            assert torch.equal(held, edge)
    huge = torch.full_like(values[..., :1], 3e38)
    assert torch.equal(quantizer.decode(quantizer.encode(huge, params), params), values[..., -1:])
    assert torch.equal(quantizer.decode(quantizer.encode(-huge, params), params), values[..., :1])


def grid_points_stay(config: SchemeConfig) -> None:
    """Encoding what a code stands for gives the code's value again, for every code and the same parameters."""
    quantizer = config.quantizer()
    params = quantizer.fit(quantizer.groups(matrix()), absmax=matrix().abs().amax())
    values = values_of(quantizer, params)
    assert torch.equal(quantizer.decode(quantizer.encode(values, params), params), values)
    steps = (values[..., 1:] - values[..., :-1] > 0).sum(-1) + 1
    doubled = isinstance(quantizer, floating.FloatQuantizer | microscaling.MXQuantizer | nvfp4.NVFP4Quantizer)  # -0
    assert (steps == values.shape[-1] - doubled).all()


def quantizing_twice_changes_nothing(config: SchemeConfig) -> None:
    """The quantized matrix, quantized anew, is itself: to the bit, or to float32's last bit where scales are float32.

    Not so for grids that cannot hold the largest magnitude they were fitted to (`midpoint`, `qmin`, a rounded quotient),
    nor where the zero point is rounded: there the second range is a little narrower. No value moves by more than two steps.
    """
    quantizer, x = config.quantizer(), matrix() * 2**14
    q = quantizer.quantize(x)
    once = quantizer.dequantize(q)
    twice = quantizer.dequantize(quantizer.quantize(once))
    exact = config.symmetric_grid and getattr(config, "scale_rule", "qmax") == "qmax"
    if not exact or quotient_dtype(config) != torch.float32:
        steps = (quantizer.groups(once - twice) / grouped(q)["scale"].float()).abs()
        assert steps.max() <= 2.01
    elif getattr(config, "scale_dtype", None) == "float32" or config.name == "nvfp4":
        assert ((once - twice).abs() <= 3e-7 * once.abs()).all()
    else:
        assert torch.equal(once, twice)


def non_finite_is_refused(config: SchemeConfig) -> None:
    """One NaN or infinity anywhere raises NonFinite, whatever the largest magnitude was said to be."""
    quantizer = config.quantizer()
    for bad in (math.nan, math.inf, -math.inf):
        for row, column in ((0, 0), (ROWS - 1, COLUMNS - 1), (1, 7), (64, 100)):
            for dtype in (torch.float32, torch.bfloat16):
                x = matrix().to(dtype)
                x[row, column] = bad
                for absmax in (None, torch.tensor(1.0)):
                    assert refused(quantizer, x, absmax), (bad, row, column, dtype, absmax)
    assert refused(quantizer, torch.full((ROWS, COLUMNS), math.nan), None)


def scales_are_positive(q: QuantizedTensor) -> bool:
    scales = [p.float() for n, p in q.params.items() if p.dtype != torch.uint8 and n != "zero_point"]
    return all((s > 0).all() and s.isfinite().all() for s in scales)


def refused(quantizer: Quantizer, x: Tensor, absmax: Tensor | None) -> bool:
    try:
        quantizer.quantize(x, absmax)
    except NonFinite:
        return True
    return False


def denormals_are_harmless(config: SchemeConfig) -> None:
    """Weights below float32's normals give finite numbers no larger than about twice themselves, and disturb nobody."""
    quantizer = config.quantizer()
    for tiny in (2.0**-149, 1e-40, 1.2e-38, 1e-37):
        x = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0)).sign() * tiny
        q = quantizer.quantize(x)
        dense = quantizer.dequantize(q)
        assert scales_are_positive(q)
        assert ((dense - x).abs() <= 1.5 * tiny).all()
    if config.strategy in ("group", "channel", "token"):
        x = matrix()
        mixed = x.clone()
        mixed[7] = 1e-41
        others = torch.arange(ROWS) != 7
        absmax = x.abs().amax()
        kept = quantizer.fake_quantize(x, absmax)[others]
        assert torch.equal(quantizer.fake_quantize(mixed, absmax)[others], kept)


def outlier_is_held(config: SchemeConfig) -> None:
    """A weight of any size is held to within its range's rule, nothing becomes infinite, other groups do not notice."""
    quantizer = config.quantizer()
    sizes = (100.0, 1e4) if getattr(config, "scale_dtype", None) == "float16" else (100.0, 1e4, 1e30, -2e37)
    for size in sizes:
        x = matrix()
        x[10, 20] = size
        dense = quantizer.fake_quantize(x)
        assert dense.isfinite().all()
        assert 0.45 < dense[10, 20] / size < 1.4  # the ends are int2's, with the qmin and midpoint rules
        if config.strategy in ("group", "channel", "token"):
            others = torch.arange(ROWS) != 10
            absmax = x.abs().amax()
            assert torch.equal(dense[others], quantizer.fake_quantize(x[others], absmax))


def dtypes_are_followed(config: SchemeConfig) -> None:
    """bfloat16 and float16 inputs count as the numbers they are; what comes back has their dtype, or the one asked for."""
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        x = matrix().to(dtype)
        assert same(config.quantizer().quantize(x), config.quantizer().quantize(x.float()))
        dense = config.quantizer().fake_quantize(x)
        assert dense.dtype == dtype and torch.equal(dense, config.quantizer().fake_quantize(x.float()).to(dtype))
        for asked in ("bfloat16", "float16", "float32"):
            assert like(config, dtype=asked).quantizer().fake_quantize(x).dtype == getattr(torch, asked)


def shapes_are_followed(config: SchemeConfig) -> None:
    """Inputs of any rank are their last axis's rows; strides do not matter; the input is left alone."""
    quantizer, x = config.quantizer(), matrix()
    before = x.clone()
    dense = quantizer.fake_quantize(x)
    assert torch.equal(x, before) and dense.data_ptr() != x.data_ptr()
    assert torch.equal(quantizer.fake_quantize(x.view(2, 5, 13, COLUMNS)), dense.view(2, 5, 13, COLUMNS))
    assert torch.equal(quantizer.quantize_activation(x.view(2, 65, COLUMNS)), dense.view(2, 65, COLUMNS))
    assert torch.equal(quantizer.quantize_weight(x.view(ROWS, COLUMNS // 4, 2, 2)), dense.view(ROWS, COLUMNS // 4, 2, 2))
    assert torch.equal(quantizer.fake_quantize(x[8]), quantizer.fake_quantize(x[8:9])[0])
    assert torch.equal(quantizer.fake_quantize(x.t().contiguous().t()), dense)
    assert quantizer.fake_quantize(x[:0]).shape == (0, COLUMNS)


def parts_make_the_whole(config: SchemeConfig) -> None:
    """Rows in multiples of 128 quantized apart, given the largest magnitude of all, are the whole quantized."""
    x = matrix(300)
    for rounding in ("nearest", "stochastic"):
        for first, second in ((128, 256), (256, 256), (128, 128)):
            absmax, quantizer = x.abs().amax(), like(config, rounding=rounding).quantizer("w")
            parts = [quantizer.quantize(part, absmax) for part in (x[:first], x[first:second], x[second:]) if len(part)]
            whole = like(config, rounding=rounding).quantizer("w").quantize(x)
            assert same(concatenate(parts), whole)
            assert concatenate(parts[:1]) is parts[0]


def regions_are_apart(config: SchemeConfig) -> None:
    """What shares a scale is what the granularity says: each region equals a matrix of its own."""
    quantizer, x = config.quantizer(), matrix()
    q, absmax = quantizer.quantize(x), x.abs().amax()
    group = config.group or COLUMNS
    rows, columns = (BLOCK, BLOCK) if config.strategy == "block" else (1, group)
    if config.strategy == "tensor":
        rows, columns = ROWS, COLUMNS
    for i in range(0, ROWS, rows) if rows > 1 else (0, 2, 5, 127, 129):
        for j in range(0, COLUMNS, columns):
            here = slice(i, i + rows), slice(j, j + columns)
            region = quantizer.quantize(x[here], absmax)
            assert torch.equal(region.codes, q.codes[here])
            for name in q.params.keys() - config.tensor_params:
                assert torch.equal(region.params[name].float(), q.params[name][i // rows, j // columns].float().view(1, 1))
    groups = quantizer.groups(x)
    assert groups.shape[:2] == config.grid(ROWS, COLUMNS)
    assert torch.equal(quantizer.ungroup(groups, ROWS, COLUMNS), x)


def powers_of_two_pass_through(config: SchemeConfig) -> None:
    """A matrix 2^k times as large is quantized 2^k times as large: no scale is too small, or too large, to be stored."""
    quantizer, x = config.quantizer(), matrix()
    half = getattr(config, "scale_dtype", None) == "float16"
    normal = quantizer.fake_quantize(x * 64 if half else x) / (64 if half else 1)
    for k in (6, 12) if half else (-30, -12, 5, 30):
        scaled = quantizer.fake_quantize(x * 2.0**k)
        if getattr(config, "format", "") == "e5m2" and half:
            assert (scaled / 2.0**k - normal).abs().max() <= 0.01 * normal.abs().max()
        else:
            assert torch.equal(scaled / 2.0**k, normal)
    if half:  # small weights reach float16's denormals: the scale is coarser there, and that is all
        small = torch.randn(32, COLUMNS, generator=torch.Generator().manual_seed(1)) * 2.0**-11
        ratio = _error(quantizer, small) / _error(quantizer, small * 2.0**14)
        assert ratio < 1.1


def _error(quantizer: Quantizer, x: Tensor) -> float:
    return ((quantizer.fake_quantize(x) - x).norm() / x.norm()).item()


def options_survive_json(config: SchemeConfig) -> None:
    """Options written out and read again are the same, with or without their defaults."""
    member = type(config)
    for dumped in (config.model_dump(), config.model_dump(exclude_defaults=True), config.model_dump(mode="json")):
        again = member.model_validate(dumped, strict=True)
        assert again == config and hash(again) == hash(config)
    again = member.model_validate_json(config.model_dump_json(), strict=True)
    assert again == config and config.model_dump().keys() == member.activation_options().keys()
    assert same(again.quantizer().quantize(matrix()), config.quantizer().quantize(matrix()))


def stochastic_is_reproducible(config: SchemeConfig) -> None:
    """The same seed and stream give the same codes; another seed, another stream or another draw give others."""
    x = matrix()
    nearest = config.quantizer("a").quantize(x)

    def draw(seed: int = 3, stream: str = "a") -> QuantizedTensor:
        return like(config, rounding="stochastic", seed=seed).quantizer(stream).quantize(x)

    first = draw()
    assert same(first, draw())
    for n in first.params:
        assert torch.equal(first.params[n].float(), nearest.params[n].float())
    quantizer = like(config, rounding="stochastic", seed=3).quantizer("a")
    second = [quantizer.quantize(x), quantizer.quantize(x)][1]
    drawn = [nearest, first, second, draw(seed=4), draw(stream="b"), draw(seed=2**32 - 1)]
    for i, one in enumerate(drawn):
        assert all(not torch.equal(one.codes, other.codes) for other in drawn[:i])
    assert config.quantizer("a").generator is None


def stochastic_is_unbiased(config: SchemeConfig) -> None:
    """Stochastic rounding takes one of the two neighbours, in proportion, saturates, and leaves zeros alone."""
    quantizer, x = like(config, rounding="stochastic", seed=5).quantizer("w"), matrix()
    groups = quantizer.groups(x)
    q = quantizer.quantize(x)
    low, high = neighbours(values_of(quantizer, grouped(q)), groups)
    error = []
    for _ in range(4):
        drawn = quantizer.decode(quantizer.encode(groups, grouped(q)), grouped(q))
        near = 1e-6 * groups.abs()
        assert (((drawn - low).abs() <= near) | ((drawn - high).abs() <= near)).all()
        assert (drawn[groups == 0] == 0).all()
        between = (high - low > 4 * near) & (low < groups) & (groups < high)
        gap = torch.where(between, high - low, 1)
        error.append(torch.stack([(drawn - groups) / gap, (drawn - groups) / gap * groups.sign()])[:, between])
    moved = torch.cat(error, 1)
    assert (moved.mean(1).abs() < 3.0 / math.sqrt(moved.shape[1])).all()  # six standard deviations of at most a half


PROMISES: list[Callable[[SchemeConfig], None]] = [
    layout_is_kept,
    code_is_the_nearest,
    range_covers_the_weights,
    zero_is_exact,
    outside_saturates,
    grid_points_stay,
    quantizing_twice_changes_nothing,
    non_finite_is_refused,
    denormals_are_harmless,
    outlier_is_held,
    dtypes_are_followed,
    shapes_are_followed,
    parts_make_the_whole,
    regions_are_apart,
    powers_of_two_pass_through,
    options_survive_json,
    stochastic_is_reproducible,
    stochastic_is_unbiased,
]
ALL = configs()
DTYPES = {name: getattr(torch, torch_name) for name, torch_name in TORCH_DTYPES.items()}


@pytest.mark.parametrize("member", list(SCHEMES), ids=lambda m: m.name)
@pytest.mark.parametrize("promise", PROMISES, ids=lambda p: p.__name__)
def test_promise(promise: Callable[[SchemeConfig], None], member: type[SchemeConfig]) -> None:
    for config in (c for c in ALL if type(c) is member):
        if promise is parts_make_the_whole and not config.splittable:
            assert config.strategy == "tensor"
            continue
        try:
            promise(config)
        except Exception as error:
            raise AssertionError(f"{label(config)}: {promise.__doc__}") from error


# --- formulas ---------------------------------------------------------------------------------------------------------


def integers_follow_seed_001(config: SchemeConfig) -> None:
    """scale = max / qmax, or (max - min) / (qmax - qmin) with zero point qmin - min / scale; signed and unsigned levels."""
    assert isinstance(config, integer.IntegerConfig)
    quantizer, bits = config.quantizer(), config.bits
    x = torch.randn(40, 64, generator=torch.Generator().manual_seed(2)) + torch.linspace(-4, 4, 40)[:, None]
    q = quantizer.quantize(x)
    scale = q.params["scale"].float().repeat_interleave(64 // q.params["scale"].shape[1], 1)
    groups, quotients = quantizer.groups(x), (x / scale).to(quotient_dtype(config)).float()
    if config.symmetric:
        divisor = {"qmax": 2 ** (bits - 1) - 1, "midpoint": (2**bits - 1) / 2, "qmin": 2 ** (bits - 1)}[config.scale_rule]
        expected = groups.abs().amax(-1) / divisor
        codes = quotients.round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        assert torch.equal(q.codes.int() - 2 ** (bits - 1), codes.int())
        assert torch.equal(quantizer.dequantize(q), codes * scale)
    else:
        low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
        expected = (high - low) / (2**bits - 1)
        zero = (0 - low / q.params["scale"].float()).round().clamp(0, 2**bits - 1)
        assert torch.equal(q.params["zero_point"], zero.to(torch.uint8))
        zeros = zero.repeat_interleave(64 // zero.shape[1], 1)
        codes = (quotients.round() + zeros).clamp(0, 2**bits - 1)
        assert torch.equal(q.codes.int(), codes.int())
        assert torch.equal(quantizer.dequantize(q), (codes - zeros) * scale)
    stored = q.params["scale"].dtype
    torch.testing.assert_close(q.params["scale"].float(), expected, rtol=torch.finfo(stored).eps, atol=0)
    assert stored is torch.float32 or (q.params["scale"] == expected.to(stored)).float().mean() > 0.98


def microscaling_follows_ocp(config: SchemeConfig) -> None:
    """Scale byte = floor(log2(largest)) - emax + 127 (OCP MX 1.0, section 6.3), clamped; 127 for a block of zeros."""
    assert isinstance(config, microscaling.MXConfig)
    emax = {"e2m1": 2, "e2m3": 2, "e3m2": 4, "e4m3": 8, "e5m2": 15}[config.format]
    tops = [1.0, 1.9999999, 2.0, 0.9, 3.0, 1.75, 448.0, 2.0**-126, 2.0**-140, 3.3e38, 2.0**-20 * 1.5]
    x = torch.zeros(len(tops) + 1, 64)
    x[:-1, 5] = torch.tensor(tops)
    x[:-1, 40] = -torch.tensor(tops)
    scale = config.quantizer().quantize(x).params["scale"]
    expected = [min(max(math.frexp(t)[1] - 1 - emax + 127, 0), 254) for t in tops]
    assert scale.tolist() == [[e, e] for e in [*expected, 127]]


def floats_fill_their_range(config: SchemeConfig) -> None:
    """scale = largest / maximum: the largest weight becomes the largest code."""
    quantizer = config.quantizer()
    maximum = {"e4m3": 448.0, "e5m2": 57344.0, "e2m1": 6.0}[config.format] if config.name != "nf4" else 1.0
    x = matrix() * 2**10
    groups = quantizer.groups(x)
    top = groups.abs().amax(-1)
    scale = quantizer.quantize(x).params["scale"]
    assert torch.equal(scale, torch.where(top == 0, 1, top * (1 / maximum)).to(scale.dtype))


INTEGERS = [c for c in ALL if isinstance(c, integer.IntegerConfig) and c.strategy in ("group", "channel", "token")]


@pytest.mark.parametrize("config", INTEGERS, ids=label)
def test_integers_follow_seed_001(config: SchemeConfig) -> None:
    integers_follow_seed_001(config)


@pytest.mark.parametrize("config", [c for c in ALL if isinstance(c, microscaling.MXConfig)], ids=label)
def test_microscaling_follows_ocp(config: SchemeConfig) -> None:
    microscaling_follows_ocp(config)


FLOATS = [c for c in ALL if isinstance(c, floating.FloatConfig | nf4.NF4Config)]


@pytest.mark.parametrize("config", [c for c in FLOATS if not c.symmetric_grid], ids=label)
def test_a_moved_grid_covers_the_range_and_meets_one_of_its_ends(config: SchemeConfig) -> None:
    quantizer = config.model_copy(update={"scale_dtype": "float32"}).quantizer()
    groups = quantizer.groups(matrix().abs() + 0.1)
    params = quantizer.fit(groups)
    assert (params["zero_point"] == -6).all()
    torch.testing.assert_close(params["scale"], groups.amax(-1, keepdim=True) / 12)
    groups = quantizer.groups(matrix())
    params = quantizer.fit(groups)
    zero, scale = params["zero_point"].float(), params["scale"]
    low, high = (-6 - zero) * scale, (6 - zero) * scale
    assert (low <= groups + 1e-6 * scale).all() and (high >= groups - 1e-6 * scale).all()
    some = groups.abs().amax(-1, keepdim=True) > 0
    ends = torch.minimum((groups.amin(-1, keepdim=True) - low).abs(), (high - groups.amax(-1, keepdim=True)).abs())
    assert (ends[some] < 1e-5 * scale[some]).all()


@pytest.mark.parametrize("config", [c for c in FLOATS if c.symmetric_grid], ids=label)
def test_floats_fill_their_range(config: SchemeConfig) -> None:
    floats_fill_their_range(config)


def test_integer_codes_reach_both_ends() -> None:
    """int4: [-8, 7] and [0, 15], as seed 001 and the README say."""
    x = torch.linspace(-1, 2, 64).repeat(2, 1)
    for bits in range(2, 9):
        both = torch.cat([x, x.neg()], 1)
        symmetric = SCHEMES.get(f"int{bits}")(granularity="channel", scale_rule="qmin").quantizer().quantize(both)
        signed = symmetric.codes.int() - 2 ** (bits - 1)
        assert (signed.min(), signed.max()) == (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        unsigned = SCHEMES.get(f"int{bits}")(granularity="channel", symmetric=False, scale_dtype="float32")
        unsigned = unsigned.quantizer().quantize(x).codes
        assert (unsigned.min(), unsigned.max()) == (0, 2**bits - 1)


def test_the_qmax_rule_never_uses_the_extra_negative_level() -> None:
    for bits in range(2, 9):
        codes = SCHEMES.get(f"int{bits}")().quantizer().quantize(matrix()).codes
        assert codes.min() >= 1


def test_microscaling_scale_of_the_references_example() -> None:
    """fp4, largest .9: byte 124, and .9 saturates to 6 / 8."""
    x = torch.zeros(1, 32)
    x[0, 3] = 0.9
    quantizer = microscaling.MXFP4Config().quantizer()
    q = quantizer.quantize(x)
    assert q.params["scale"].item() == 124 and quantizer.dequantize(q)[0, 3] == 0.75


def test_nvfp4_follows_the_references_worked_example() -> None:
    group = [0, 0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.07, 0.08, 0.09, 0.10, 0.11, 0.12, -0.12, -0.06, -0.03]
    quantizer = nvfp4.NVFP4Config().quantizer()
    x = torch.tensor([group, [0.24] + [0.0] * 15])
    assert quantizer.quantize(x).params["global_scale"].tolist() == pytest.approx([11200], rel=1e-6)
    # times 1.5625 the step is a power of two: three values are ties, where a float32 that is a bit off would decide
    x = (x * 100).round() / 64
    q = quantizer.quantize(x)
    assert q.params["global_scale"].tolist() == [7168]
    assert q.params["scale"][0].view(torch.uint8).item() == 0x76 and q.params["scale"][1].float().item() == 448
    reference = [0, 1, 2, 3, 4, 4, 5, 6, 6, 6, 6, 7, 7, 15, 13, 11]
    values = decode_float(torch.tensor(reference, dtype=torch.uint8), E2M1)
    assert q.codes[0].tolist() == reference
    assert torch.equal(quantizer.dequantize(q)[0], values / 32)


def test_nvfp4_shares_the_given_magnitude() -> None:
    """Layers an engine fuses must have one tensor scale: that of the largest."""
    x = torch.full((2, 16), 0.5)
    q = nvfp4.NVFP4Config().quantizer().quantize(x, torch.tensor(4.0))
    assert q.params["global_scale"].item() == 448 * 6 / 4
    assert q.params["scale"].float().tolist() == [[56.0], [56.0]]  # 0.5 / 6 * 672


def test_nvfp4_scale_that_rounds_to_zero_is_the_smallest() -> None:
    x = torch.full((1, 32), 1e-7)
    x[0, 16:] = 1.0
    q = nvfp4.NVFP4Config().quantizer().quantize(x)
    assert q.params["scale"].view(torch.uint8).tolist() == [[1, 0x7E]]
    assert nvfp4.NVFP4Config().quantizer().dequantize(q)[0, :16].abs().max() == 0


def test_nf4_is_the_nearest_level_of_its_table() -> None:
    """QLoRA's table: sixteen levels in order, both ends and zero exact, quantiles of a normal distribution."""
    levels = torch.tensor(nf4.LEVELS)
    assert len(levels) == 16 and (levels.diff() > 0).all()
    assert (levels[0], levels[7], levels[15]) == (-1, 0, 1)
    offset = 0.9677083  # QLoRA's: the mean of 1 - 1/32 and 1 - 1/30
    normal = torch.distributions.Normal(0.0, 1.0)
    positive = normal.icdf(torch.linspace(offset, 0.5, 9, dtype=torch.float64))[:-1]
    negative = -normal.icdf(torch.linspace(offset, 0.5, 8, dtype=torch.float64))[:-1]
    made = torch.cat([negative, torch.zeros(1), positive.flip(0)]) / positive.max()
    torch.testing.assert_close(made.float(), levels, rtol=0, atol=1e-5)
    x = torch.linspace(-1, 1, 64 * 64).view(64, 64)
    x[:, 0] = 1  # so that every scale is one
    nearest = (x[..., None] - levels).abs().argmin(-1)
    assert torch.equal(nf4.NF4Config().quantizer().quantize(x).codes.long(), nearest)


@pytest.mark.parametrize(
    "family",
    [
        [SCHEMES.get(f"int{b}")(group_size=32) for b in range(2, 9)],
        [SCHEMES.get(f"int{b}")(group_size=32, symmetric=False) for b in range(2, 9)],
        [SCHEMES.get(f"int{b}")(granularity="channel", scale_rule="midpoint") for b in range(2, 9)],
        [SCHEMES.get(f"int{b}")(granularity="block", scale_rule="qmin") for b in range(2, 9)],
        [SCHEMES.get(n)(granularity="channel") for n in ("fp4", "fp8")],
        [SCHEMES.get(n)() for n in ("mxfp4", "mxfp8")],  # mxfp6's e2m3 has the mantissa of e4m3, and saturates less
    ],
    ids=["symmetric", "asymmetric", "midpoint", "qmin", "floats", "microscaling"],
)
def test_more_bits_mean_less_error(family: list[SchemeConfig]) -> None:
    x = torch.randn(256, 256, generator=torch.Generator().manual_seed(3))
    errors = [_error(config.quantizer(), x) for config in family]
    # each bit halves the step, so the error: int2's symmetric grid has three levels where int3's has seven
    assert all(b < 0.62 * a for a, b in pairwise(errors)), errors


# relative errors on Gaussian weights that others measured with their own code: formats.md, section 8.3
@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("int8", {"group_size": 32, "scale_dtype": "float16"}, 0.005),
        ("int4", {"group_size": 32, "symmetric": False, "scale_dtype": "float16"}, 0.078),
        ("int5", {"group_size": 32, "symmetric": False, "scale_dtype": "float16"}, 0.038),
        ("nvfp4", {}, 0.095),
        ("mxfp4", {}, 0.114),
    ],
)
def test_error_on_gaussian_weights_is_what_the_field_measures(name: str, options: dict[str, Any], expected: float) -> None:
    x = torch.randn(512, 512, generator=torch.Generator().manual_seed(4))
    assert _error(SCHEMES.get(name)(**options).quantizer(), x) == pytest.approx(expected, rel=0.05, abs=5e-4)


def test_finer_granularity_means_less_error() -> None:
    x = matrix(256, 256)
    errors = [
        _error(SCHEMES.get("int4")(granularity=g, group_size=32 if g == "group" else None).quantizer(), x)
        for g in ("tensor", "block", "channel", "group")
    ]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.6 * errors[0]


def test_shrinking_the_range_shrinks_the_scale() -> None:
    """What a search over ranges relies on: factor 1 first, and `fit` obeys the factor in every scheme."""
    for config in ALL:
        quantizer = config.quantizer()
        factors = config.shrink_factors(25, 0.4)
        if config.name.startswith("mx"):
            assert factors == [1, 2, 0.5]
        else:
            assert factors == pytest.approx([1 - 0.025 * i for i in range(25)])
        groups = quantizer.groups(matrix() * 64)
        absmax = groups.abs().amax()
        full, half = (quantizer.fit(groups, f, absmax) for f in (1.0, 0.5))
        used = (groups != 0).any(-1, keepdim=True)
        wide = [values_of(quantizer, p)[..., -1:] - values_of(quantizer, p)[..., :1] for p in (full, half)]
        ratio = (wide[1] / wide[0])[used]
        if config.name == "nvfp4":  # its block scales are floats of three bits, and cannot shrink below the smallest
            ratio = ratio[(full["scale"].float() > 0.1)[used]]
        assert ((ratio - 0.5).abs() < 0.04).all(), label(config)


# --- options ----------------------------------------------------------------------------------------------------------


def test_the_registry_holds_the_schemes() -> None:
    expected = {"fp4", "fp8", "mxfp4", "mxfp6", "mxfp8", "nf4", "nvfp4", *(f"int{b}" for b in range(2, 9))}
    assert expected <= set(SCHEMES.names())
    for member in SCHEMES:
        assert issubclass(member, SchemeConfig) and member.__doc__ and 1 <= member.bits <= 8
        assert SCHEMES.get(member.name) is member


def test_no_option_has_a_reserved_name() -> None:
    """`group_size` and others stand beside `wq` in a rule: an option called `pattern` would not be told from the rule's."""
    for member in SCHEMES:
        assert not RESERVED & set(member.model_fields)
        assert all(f.description for f in member.plan_options().values()), member.name


@pytest.mark.parametrize("member", list(SCHEMES), ids=lambda m: m.name)
def test_options_that_make_no_sense_are_refused(member: type[SchemeConfig]) -> None:
    wrong: list[dict[str, Any]] = [
        {"granularity": "row"},
        {"rounding": "up"},
        {"group_size": 0},
        {"group_size": -32},
        {"colour": 1},
        {"seed": 1.5},
    ]
    wrong += [{"granularity": g} for g in ("tensor", "channel", "group", "block", "token") if g not in member.granularities]
    wrong += [{"granularity": g, "group_size": 32} for g in ("tensor", "channel", "block", "token")]
    if member.fixed_group_size:
        wrong.append({"group_size": member.fixed_group_size * 2})
    elif member.default_group_size is None:
        wrong.append({"granularity": "group"})
    for options in wrong:
        with pytest.raises(ValidationError):
            member.model_validate(options)
    with pytest.raises(ValidationError):
        member().group_size = 64  # frozen
    assert len({member(), member()}) == 1


def test_the_granularity_in_effect() -> None:
    int4, int8 = SCHEMES.get("int4"), SCHEMES.get("int8")
    assert (int4().strategy, int4().group) == ("group", 32)
    assert (int4(group_size=64).strategy, int4(group_size=64).group) == ("group", 64)
    assert (int4(granularity="channel").strategy, int4(granularity="channel").group) == ("channel", None)
    assert (int8().strategy, int8().group, int8(group_size=128).group) == ("channel", None, 128)
    assert (SCHEMES.get("nvfp4")().group, SCHEMES.get("mxfp4")().group) == (16, 32)


def test_a_misfit_names_sizes_that_would_do() -> None:
    int4 = SCHEMES.get("int4")
    assert int4(group_size=128).misfit(576) == (128, [64, 32, 16, 8])
    assert int4(group_size=64).misfit(576) is None
    assert int4(granularity="channel").misfit(577) is None
    assert SCHEMES.get("nvfp4")().misfit(24) == (16, [8])


def test_groups_that_do_not_divide_are_an_error() -> None:
    for member in SCHEMES:
        if member().group:
            with pytest.raises((RuntimeError, ValueError)):
                member().quantizer().quantize(torch.randn(4, 8 + (member().group or 0)))


def test_float8_values_of_the_table_are_finite_but_for_nan_and_infinity() -> None:
    assert float_values(numerics.E4M3).isnan().sum() == 2 and float_values(numerics.E5M2).isfinite().sum() == 248


# --- mutants ----------------------------------------------------------------------------------------------------------

Make = Callable[[Any], Any]


def short_of_a_code(original: Any) -> Any:
    return lambda self, x, params: original(self, x, params).clamp(max=2**self.config.bits - 2)


def without_the_lowest_code(original: Any) -> Any:
    return lambda self, x, params: original(self, x, params).clamp(min=1)


def integer_codes(finish: Callable[[Tensor, int], Tensor]) -> Make:
    """Integer encoding with another ending than a clamp to the levels."""

    def encode(self: Any, x: Tensor, params: Params) -> Tensor:
        zero = 2 ** (self.config.bits - 1) if self.config.symmetric else params["zero_point"].float()
        return finish((x / params["scale"].float()).round() + zero, 2**self.config.bits - 1).to(torch.uint8)

    return lambda original: encode


def scaled_fit(factor: float) -> Make:
    def make(original: Any) -> Any:
        def fit(self: Any, x: Tensor, shrink: float = 1.0, absmax: Tensor | None = None) -> Params:
            params = original(self, x, shrink, absmax)
            return params | {"scale": (params["scale"].float() * factor).to(params["scale"].dtype)}

        return fit

    return make


def range_without_zero(original: Any) -> Any:
    def fit(self: Any, x: Tensor, shrink: float = 1.0, absmax: Tensor | None = None) -> Params:
        low, high = torch.aminmax(x, dim=-1, keepdim=True)
        levels = 2**self.config.bits - 1
        scale = ((high - low) / levels).clamp(min=1e-9).bfloat16()
        return {"scale": scale, "zero_point": (-low / scale.float()).round().clamp(0, levels).to(torch.uint8)}

    return fit


def scale_of_zero_groups_is_zero(original: Any) -> Any:
    def fit(self: Any, x: Tensor, shrink: float = 1.0, absmax: Tensor | None = None) -> Params:
        params = original(self, x, shrink, absmax)
        return params | {"scale": torch.where((x == 0).all(-1, keepdim=True), 0, params["scale"])}

    return fit


def codes_of_another_scale(original: Any) -> Any:
    """Codes chosen with a scale that differs from the stored one: rounding it afterwards does that."""

    def quantize_groups(self: Any, groups: Tensor, params: Params, rows: int, columns: int) -> QuantizedTensor:
        stored = original(self, groups, params, rows, columns)
        exact = params | {"scale": params["scale"].float() * 1.003}
        codes = self.ungroup(self.encode(groups, exact), rows, columns).contiguous()
        return QuantizedTensor(codes, stored.params, stored.scheme)

    return quantize_groups


def wrapping_float(original: Any) -> Any:
    def encode(x: Tensor, target: Any, generator: Any = None) -> Tensor:
        return original(x.remainder(target.maximum), target, generator)

    return encode


def no_saturation(original: Any) -> Any:
    def encode(x: Tensor, target: Any, generator: Any = None) -> Tensor:
        codes = original(x, target, generator)
        return torch.where(x.abs() > target.maximum * 1.01, codes + 1, codes)

    return encode


def generator_of(text: Callable[[Any], str]) -> Make:
    def generator(self: Any) -> torch.Generator | None:
        if self.config.rounding == "stochastic" and self._generator is None:
            self._generator = torch.Generator().manual_seed(hash(text(self)) % 2**32)
        return self._generator

    return lambda original: property(generator)


def dropped_seed(original: Any) -> Any:
    """torch's generator takes the low 32 bits of a seed: what is above them does nothing."""

    def generator(self: Any) -> torch.Generator | None:
        if self.config.rounding == "stochastic" and self._generator is None:
            self._generator = torch.Generator().manual_seed(self.config.seed * 2**32 + len(self._stream))
        return self._generator

    return property(generator)


def fresh_generator(original: Any) -> Any:
    def generator(self: Any) -> torch.Generator | None:
        if self.config.rounding == "nearest":
            return None
        return torch.Generator().manual_seed(self.config.seed * 1000 + len(self._stream) + ord(self._stream[:1] or "a"))

    return property(generator)


def blocks_not_put_back(original: Any) -> Any:
    return lambda self, groups, rows, columns: groups.reshape(-1, -(-columns // BLOCK) * BLOCK)[:rows, :columns]


def shifted_groups(original: Any) -> Any:
    return lambda self, x: original(self, x.roll(1, -1))


def shifted_back(original: Any) -> Any:
    return lambda self, groups, rows, columns: original(self, groups, rows, columns).roll(-1, -1)


def no_smallest_scale(original: Any) -> Any:
    def fit(self: Any, x: Tensor, shrink: float = 1.0, absmax: Tensor | None = None) -> Params:
        params = original(self, x, shrink, absmax)
        scale = params["scale"].view(torch.uint8)
        return params | {"scale": torch.where(scale == 1, 0, scale).view(torch.float8_e4m3fn)}

    return fit


def own_absmax(original: Any) -> Any:
    return lambda self, x, shrink=1.0, absmax=None: original(self, x, shrink, None)


def in_place(original: Any) -> Any:
    return lambda self, x: original(self, x.mul_(1.5) if x.is_floating_point() else x)


def stepped_exponent(step: int) -> Make:
    def make(original: Any) -> Any:
        def fit(self: Any, x: Tensor, shrink: float = 1.0, absmax: Tensor | None = None) -> Params:
            params = original(self, x, shrink, absmax)
            return {"scale": torch.where((x == 0).all(-1, keepdim=True), 127, params["scale"] + step).to(torch.uint8)}

        return fit

    return make


def swapped(levels: tuple[float, ...]) -> tuple[float, ...]:
    return (*levels[:4], levels[5], levels[4], *levels[6:])


def int4(**options: Any) -> SchemeConfig:
    return SCHEMES.get("int4")(**options)


IQ, Q = integer.IntegerQuantizer, Quantizer
FP8, NF4, MX, NV = (SCHEMES.get(n)() for n in ("fp8", "nf4", "mxfp4", "nvfp4"))
STOCHASTIC = generator_of(lambda self: str(self.config.seed)), generator_of(lambda self: self._stream)
MUTANTS: list[tuple[str, SchemeConfig, Callable[[SchemeConfig], None], Any, str, Make]] = [
    ("floor for round", int4(), code_is_the_nearest, numerics, "round_to_integers", lambda o: lambda x, g: x.floor_()),
    ("floor for round", FP8, code_is_the_nearest, numerics, "round_to_integers", lambda o: lambda x, g: x.floor_()),
    ("floor for round", MX, code_is_the_nearest, numerics, "round_to_integers", lambda o: lambda x, g: x.trunc_()),
    ("wrong sign", int4(), code_is_the_nearest, IQ, "decode", lambda o: lambda s, c, p: -o(s, c, p)),
    ("no top code", int4(), outside_saturates, IQ, "encode", short_of_a_code),
    ("no top code", int4(symmetric=False), code_is_the_nearest, IQ, "encode", short_of_a_code),
    ("no lowest code", int4(), outside_saturates, IQ, "encode", without_the_lowest_code),
    ("one code too many", int4(), outside_saturates, IQ, "encode", integer_codes(lambda u, n: u.clamp(0, n + 1))),
    (
        *("one code too many", int4(scale_rule="qmin"), layout_is_kept, IQ, "encode"),
        integer_codes(lambda u, n: u.clamp(0, n + 1)),
    ),
    ("codes wrap", int4(), outside_saturates, IQ, "encode", integer_codes(lambda u, n: u.remainder(n + 1))),
    ("scale for 8 levels, not 7", int4(), integers_follow_seed_001, IQ, "fit", scaled_fit(7 / 8)),
    ("scale for 6 levels, not 7", int4(), integers_follow_seed_001, IQ, "fit", scaled_fit(7 / 6)),
    ("range too wide", int4(), range_covers_the_weights, IQ, "fit", scaled_fit(2.0)),
    ("range too narrow", int4(), range_covers_the_weights, IQ, "fit", scaled_fit(0.45)),
    ("range without zero", int4(symmetric=False), range_covers_the_weights, IQ, "fit", range_without_zero),
    ("scale of zeros is zero", int4(), zero_is_exact, IQ, "fit", scale_of_zero_groups_is_zero),
    ("scale in another dtype", int4(), layout_is_kept, numerics, "round_through", lambda o: lambda x, d: x),
    ("scale not protected", int4(), denormals_are_harmless, numerics, "round_through", lambda o: lambda x, d: x.to(d)),
    (
        *("float16 scales end at its normals", SCHEMES.get("int8")(scale_dtype="float16"), powers_of_two_pass_through),
        *(numerics, "round_through", lambda o: lambda x, d: x.clamp(min=torch.finfo(d).tiny).to(d)),
    ),
    ("codes of another scale", SCHEMES.get("int8")(), code_is_the_nearest, Q, "quantize_groups", codes_of_another_scale),
    ("zero point off by one", int4(), zero_is_exact, IQ, "decode", lambda o: lambda s, c, p: o(s, c + 1, p)),
    ("codes in int16", int4(), layout_is_kept, IQ, "encode", lambda o: lambda s, x, p: o(s, x, p).short()),
    ("nf4 levels out of order", NF4, code_is_the_nearest, nf4, "LEVELS", swapped),
    ("nf4 without a zero", NF4, zero_is_exact, nf4, "LEVELS", lambda v: (*v[:7], 0.01, *v[8:])),
    (
        "nf4 rounds down above a half",
        NF4,
        code_is_the_nearest,
        torch,
        "bucketize",
        lambda o: lambda y, b: o(y, b) - (y > 0.5).long(),
    ),
    ("floats do not saturate", FP8, outside_saturates, numerics, "encode_float", no_saturation),
    ("floats wrap", MX, outside_saturates, numerics, "encode_float", wrapping_float),
    ("exponent rounded up", MX, microscaling_follows_ocp, microscaling.MXQuantizer, "fit", stepped_exponent(1)),
    ("exponent one too small", MX, range_covers_the_weights, microscaling.MXQuantizer, "fit", stepped_exponent(-1)),
    ("NaN goes unnoticed", int4(), non_finite_is_refused, scheme, "check_finite", lambda o: lambda s: None),
    ("NaN goes unnoticed", int4(symmetric=False), non_finite_is_refused, integer, "check_finite", lambda o: lambda s: None),
    (
        *("the last column is not looked at", int4(granularity="channel"), non_finite_is_refused),
        *(integer, "largest_magnitude", lambda o: lambda x: o(x[..., :-1])),
    ),
    ("blocks not put back", int4(granularity="block"), code_is_the_nearest, Q, "ungroup", blocks_not_put_back),
    ("groups begin one off", int4(), regions_are_apart, Q, "groups", shifted_groups),
    ("another stream, the same numbers", int4(), stochastic_is_reproducible, Q, "generator", STOCHASTIC[0]),
    ("another seed, the same numbers", int4(), stochastic_is_reproducible, Q, "generator", STOCHASTIC[1]),
    ("the seed is dropped", int4(), stochastic_is_reproducible, Q, "generator", dropped_seed),
    ("the same numbers at each call", int4(), stochastic_is_reproducible, Q, "generator", fresh_generator),
    ("stochastic rounding leans", int4(), stochastic_is_unbiased, numerics, "chance", lambda o: lambda x, g: o(x, g) * 0.9),
    ("stochastic rounding leans", FP8, stochastic_is_unbiased, numerics, "chance", lambda o: lambda x, g: o(x, g) * 0.9),
    ("stochastic rounding leans", NF4, stochastic_is_unbiased, numerics, "chance", lambda o: lambda x, g: o(x, g) * 0.9),
    ("each part its own magnitude", NV, parts_make_the_whole, nvfp4.NVFP4Quantizer, "fit", own_absmax),
    ("nvfp4 scale of zero", NV, zero_is_exact, nvfp4.NVFP4Quantizer, "fit", no_smallest_scale),
    (
        *("the dtype asked for is ignored", int4(), dtypes_are_followed, Q, "fake_quantize"),
        lambda o: lambda s, x, a=None: o(s, x, a).to(x.dtype),
    ),
    ("the input is changed", int4(), shapes_are_followed, Q, "groups", in_place),
    ("fp8 leaves room", FP8, floats_fill_their_range, floating.FloatQuantizer, "fit", scaled_fit(448 / 440)),
    (
        *("grids move when refitted", int4(), quantizing_twice_changes_nothing, integer.IntegerConfig, "divisor"),
        lambda o: property(lambda self: 7.5),
    ),
]


@pytest.mark.parametrize(
    ("config", "promise", "owner", "attribute", "make"),
    [mutant[1:] for mutant in MUTANTS],
    ids=[f"{mutant[0]}, {label(mutant[1])}" for mutant in MUTANTS],
)
def test_mutants_break_a_promise(
    monkeypatch: pytest.MonkeyPatch,
    config: SchemeConfig,
    promise: Callable[[SchemeConfig], None],
    owner: Any,
    attribute: str,
    make: Make,
) -> None:
    """What the promises are worth: a scheme that is wrong in one place fails the check that is there for it."""
    promise(config)
    monkeypatch.setattr(owner, attribute, make(getattr(owner, attribute)))
    with pytest.raises(AssertionError):
        promise(config)


def test_a_mutant_that_changes_nothing_survives(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other way round: groups that are shifted and shifted back are caught only by the check of regions."""
    monkeypatch.setattr(Quantizer, "groups", shifted_groups(Quantizer.groups))
    monkeypatch.setattr(Quantizer, "ungroup", shifted_back(Quantizer.ungroup))
    code_is_the_nearest(int4())
    with pytest.raises(AssertionError):
        regions_are_apart(int4())
