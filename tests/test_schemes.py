"""What every scheme promises, checked over the registry, and that the checks bite: mutated schemes break them.

A promise is a function of a config that asserts. It runs on every scheme, granularity and option, and again on mutants.
"""

import math
from collections.abc import Callable
from typing import Any, Literal, get_args, get_origin

import pytest
import torch
from torch import Tensor

from quantplan.checkpoint.reader import TORCH_DTYPES
from quantplan.scheme import BLOCK, SCHEMES, NonFinite, Params, Quantizer, SchemeConfig
from quantplan.schemes import floating, microscaling, nvfp4
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
    return "-".join([config.name, *(str(v) if v is not False else f"not_{k}" for k, v in given.items())])


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
        assert q.codes.max() < 2**config.bits
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
    assert ((chosen - groups).abs() <= least + 1e-6 * groups.abs()).all()


def range_covers_the_weights(config: SchemeConfig) -> None:
    """The largest weight is not far outside what codes can hold, and the range is not much wider than the weights."""
    quantizer, x = config.quantizer(), matrix()
    groups = quantizer.groups(x)
    values = values_of(quantizer, grouped(quantizer.quantize(x)))
    used = (groups != 0).any(-1)
    high, low = groups.amax(-1).clamp(min=0), groups.amin(-1).clamp(max=0)
    reach = torch.maximum(values[..., -1] / high, values[..., 0] / low)[used]
    assert (reach > 0.45).all()  # int2 with the qmin rule saturates at half
    wide = (values[..., -1] - values[..., 0])[used] / torch.maximum(high, -low)[used]
    assert (wide <= 4.6).all()  # int2 with the qmax rule reaches twice as far down; mx up to a binade


def zero_is_exact(config: SchemeConfig) -> None:
    """Zeros stay zero, in groups of zeros and where all weights lie far from zero."""
    quantizer, x = config.quantizer(), matrix()
    q = quantizer.quantize(x)
    assert (quantizer.dequantize(q)[x == 0] == 0).all()
    assert all((p.float() > 0).all() and p.float().isfinite().all() for n, p in q.params.items() if "scale" in n)
    nothing = quantizer.quantize(torch.zeros(ROWS, COLUMNS))
    assert (quantizer.dequantize(nothing) == 0).all() and (nothing.params["scale"].float() > 0).all()
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

    Not so for grids that cannot hold the largest magnitude they were fitted to (`midpoint`, `qmin`), nor where the zero
    point is rounded: there the second range is a little narrower. No value moves by more than a step.
    """
    quantizer, x = config.quantizer(), matrix() * 2**14
    q = quantizer.quantize(x)
    once = quantizer.dequantize(q)
    twice = quantizer.dequantize(quantizer.quantize(once))
    if not config.symmetric_grid or getattr(config, "scale_rule", "qmax") != "qmax":
        steps = (quantizer.groups(once - twice) / grouped(q)["scale"].float()).abs()
        assert steps.max() <= 1.01
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
        assert all((p.float() > 0).all() and p.float().isfinite().all() for n, p in q.params.items() if "scale" in n)
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
        assert 0.45 < dense[10, 20] / size < 1.1
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
        small = torch.randn(32, COLUMNS, generator=torch.Generator().manual_seed(1)) * 2.0**-8
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
    assert again == config and config.model_dump().keys() == member.plan_options().keys()
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


@pytest.mark.parametrize("config", ALL, ids=label)
@pytest.mark.parametrize("promise", PROMISES, ids=lambda p: p.__name__)
def test_promise(promise: Callable[[SchemeConfig], None], config: SchemeConfig) -> None:
    if promise is parts_make_the_whole and not config.splittable:
        assert config.strategy == "tensor"
        return
    promise(config)
