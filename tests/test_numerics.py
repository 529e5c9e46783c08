"""Bits and floats: every code of every small float against tables and torch, rounding, packing bit by bit."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quantplan import numerics
from quantplan.numerics import (
    E2M1,
    E2M3,
    E3M2,
    E4M3,
    E5M2,
    FloatFormat,
    chance,
    decode_float,
    encode_float,
    float_values,
    look_up,
    pack_bits,
    packed_bytes,
    round_through,
    round_to_integers,
    unpack_bits,
)

FORMATS = [E2M1, E2M3, E3M2, E4M3, E5M2]
TORCH_DTYPES = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}

# OCP Microscaling Formats 1.0, section 5.3: the magnitudes, in the order of their codes
# fmt: off
MAGNITUDES = {
    "e2m1": [0, 0.5, 1, 1.5, 2, 3, 4, 6],
    "e2m3": [
        0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875,
        1, 1.125, 1.25, 1.375, 1.5, 1.625, 1.75, 1.875,
        2, 2.25, 2.5, 2.75, 3, 3.25, 3.5, 3.75,
        4, 4.5, 5, 5.5, 6, 6.5, 7, 7.5,
    ],
    "e3m2": [
        0, 0.0625, 0.125, 0.1875, 0.25, 0.3125, 0.375, 0.4375,
        0.5, 0.625, 0.75, 0.875, 1, 1.25, 1.5, 1.75,
        2, 2.5, 3, 3.5, 4, 5, 6, 7,
        8, 10, 12, 14, 16, 20, 24, 28,
    ],
}
# fmt: on


def bits(x: Tensor) -> list[int]:
    """The bit patterns of float32 values: tells -0.0 from 0.0."""
    return x.contiguous().view(torch.int32).flatten().tolist()


def finite(target: FloatFormat) -> Tensor:
    """The finite non-negative values in order, their codes being 0, 1, 2, …"""
    values = float_values(target)[: 2 ** (target.bits - 1)]
    return values[values.isfinite()]


@pytest.mark.parametrize("target", [E4M3, E5M2], ids=lambda f: f.name)
class TestAgainstTorch:
    def test_every_code_decodes_to_torchs_value(self, target: FloatFormat) -> None:
        codes = torch.arange(256, dtype=torch.uint8)
        expected = codes.view(TORCH_DTYPES[target.name]).float()
        decoded = decode_float(codes, target)
        assert torch.equal(decoded.isnan(), expected.isnan())
        number = ~expected.isnan()
        assert bits(decoded[number]) == bits(expected[number])

    def test_every_finite_code_encodes_to_itself(self, target: FloatFormat) -> None:
        codes = torch.arange(256, dtype=torch.uint8)
        values = codes.view(TORCH_DTYPES[target.name]).float()
        number = values.isfinite()
        assert torch.equal(encode_float(values[number], target), codes[number])

    def test_every_bfloat16_number_encodes_as_torch_casts_it(self, target: FloatFormat) -> None:
        """65,536 numbers, which hold all borders between codes, all ties and bfloat16's denormals."""
        x = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.bfloat16).float()
        x = x[x.isfinite()]
        inside = x.clamp(-target.maximum, target.maximum)
        assert torch.equal(encode_float(x, target), inside.to(TORCH_DTYPES[target.name]).view(torch.uint8))

    def test_numbers_a_bit_off_every_tie_encode_as_torch_casts_them(self, target: FloatFormat) -> None:
        values = finite(target)
        ties = (values[1:] + values[:-1]) / 2
        near = torch.cat([ties, ties.nextafter(torch.tensor(math.inf)), ties.nextafter(torch.tensor(-math.inf))])
        x = torch.cat([near, -near])
        assert torch.equal(encode_float(x, target), x.to(TORCH_DTYPES[target.name]).view(torch.uint8))


@pytest.mark.parametrize("target", [E2M1, E2M3, E3M2], ids=lambda f: f.name)
def test_every_code_is_the_specifications(target: FloatFormat) -> None:
    table = MAGNITUDES[target.name]
    assert len(table) == 2 ** (target.bits - 1) and target.maximum == table[-1]
    expected = torch.tensor([*table, *(-float(v) for v in table)])
    codes = torch.arange(2**target.bits, dtype=torch.uint8)
    assert bits(decode_float(codes, target)) == bits(expected)
    assert torch.equal(encode_float(expected, target), codes)


@pytest.mark.parametrize(
    ("target", "maximum", "exponent"),
    [(E2M1, 6.0, 2), (E2M3, 7.5, 2), (E3M2, 28.0, 4), (E4M3, 448.0, 8), (E5M2, 57344.0, 15)],
    ids=lambda v: getattr(v, "name", v),
)
def test_the_maximum_is_the_specifications(target: FloatFormat, maximum: float, exponent: int) -> None:
    assert target.maximum == maximum == finite(target).max()
    assert target.maximum_exponent == exponent


@pytest.mark.parametrize("target", FORMATS, ids=lambda f: f.name)
class TestEncoding:
    def test_a_tie_goes_to_the_even_code(self, target: FloatFormat) -> None:
        values = finite(target)
        for low, (a, b) in enumerate(pairwise(values.tolist())):
            even = low if low % 2 == 0 else low + 1
            sign = 1 << (target.bits - 1)
            assert encode_float(torch.tensor([(a + b) / 2, -(a + b) / 2]), target).tolist() == [even, even | sign]

    def test_the_nearest_code_is_chosen(self, target: FloatFormat) -> None:
        generator = torch.Generator().manual_seed(1)
        values = finite(target).double()
        inside = torch.rand(3000, generator=generator).double() * target.maximum
        small = torch.rand(1000, generator=generator).double() * values[1] * 4  # the denormals
        x = torch.cat([inside, small]).float()
        nearest = (x.double()[:, None] - values).abs().argmin(1)
        distance = (x.double()[:, None] - values).abs()
        chosen = encode_float(x, target).long()
        assert torch.equal(distance.gather(1, chosen[:, None]), distance.gather(1, nearest[:, None]))

    def test_what_is_too_large_saturates(self, target: FloatFormat) -> None:
        top = target.maximum
        x = torch.tensor([top, top * 1.0001, top * 1.9, 1e30, 3.4e38, math.inf])
        largest = len(finite(target)) - 1
        assert encode_float(x, target).tolist() == [largest] * len(x)
        assert encode_float(-x, target).tolist() == [largest | 1 << (target.bits - 1)] * len(x)

    def test_a_negative_zero_keeps_its_sign_and_stays_zero(self, target: FloatFormat) -> None:
        codes = encode_float(torch.tensor([0.0, -0.0, 1e-30, -1e-30]), target)
        sign = 1 << (target.bits - 1)
        assert codes.tolist() == [0, sign, 0, sign]
        assert decode_float(codes, target).tolist() == [0, 0, 0, 0]

    def test_float32_denormals_are_zero(self, target: FloatFormat) -> None:
        x = torch.tensor([2.0**-149, 2.0**-140, 2.0**-127, 2.0**-126])
        assert encode_float(x, target).tolist() == [0, 0, 0, 0]

    def test_the_input_is_left_alone(self, target: FloatFormat) -> None:
        x = torch.linspace(-10, 10, 50)
        before = x.clone()
        encode_float(x, target)
        encode_float(x, target, torch.Generator().manual_seed(0))
        assert torch.equal(x, before)

    def test_shape_and_strides_do_not_matter(self, target: FloatFormat) -> None:
        x = torch.linspace(-9, 9, 48).view(2, 4, 6)
        flat = encode_float(x.reshape(-1), target)
        assert torch.equal(encode_float(x, target).flatten(), flat)
        assert torch.equal(encode_float(x.transpose(0, 2), target).transpose(0, 2).flatten(), flat)
        decoded = decode_float(encode_float(x.transpose(0, 2), target), target)
        assert torch.equal(decoded.transpose(0, 2).flatten(), decode_float(flat, target))

    def test_stochastic_rounding_is_unbiased_and_takes_a_neighbour(self, target: FloatFormat) -> None:
        generator = torch.Generator().manual_seed(2)
        values = finite(target).tolist()
        steps = [i for i in (0, 1, len(values) // 2, len(values) - 2) if i + 1 < len(values)]
        for low in steps:
            a, b = values[low], values[low + 1]
            for share in (0.125, 0.5, 0.8125):
                x = torch.full((20_000,), a + share * (b - a))
                codes = encode_float(x, target, generator)
                assert set(codes.tolist()) == {low, low + 1}
                ups = (codes == low + 1).float().mean().item()
                assert abs(ups - share) < 5 * math.sqrt(share * (1 - share) / len(x)), (low, share, ups)
                mirrored = encode_float(-x, target, generator) - (1 << (target.bits - 1))
                assert set(mirrored.tolist()) == {low, low + 1}

    def test_stochastic_rounding_keeps_what_is_exact_and_saturates(self, target: FloatFormat) -> None:
        generator = torch.Generator().manual_seed(3)
        values = finite(target).repeat(500)
        codes = torch.arange(len(finite(target)), dtype=torch.uint8).repeat(500)
        assert torch.equal(encode_float(values, target, generator), codes)
        over = torch.full((500,), target.maximum * 3)
        assert set(encode_float(over, target, generator).tolist()) == {int(codes.max())}


class TestRounding:
    def test_ties_go_to_even(self) -> None:
        x = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 0.49999997, 2.4999998])
        assert round_to_integers(x).tolist() == [0, 2, 2, 0, -2, -2, 0, 2]

    @pytest.mark.parametrize("value", [0.25, -0.25, 3.75, -126.125, 100.5])
    def test_stochastic_is_unbiased_and_takes_a_neighbour(self, value: float) -> None:
        rounded = round_to_integers(torch.full((40_000,), value), torch.Generator().manual_seed(4))
        assert set(rounded.tolist()) == {math.floor(value), math.ceil(value)}
        share = value - math.floor(value)
        assert abs(rounded.double().mean().item() - value) < 5 * math.sqrt(share * (1 - share) / 40_000)

    def test_stochastic_never_moves_an_integer(self) -> None:
        """Adding the random number and taking the floor would: the sum rounds up to the next integer now and then."""
        whole = torch.cat([torch.full((2_000_000,), 127.0), torch.full((2_000_000,), -128.0)])
        assert torch.equal(round_to_integers(whole.clone(), torch.Generator().manual_seed(5)), whole)

    @pytest.mark.parametrize("drawn", [0.0, 1 - 2**-24])
    def test_stochastic_never_moves_an_integer_whatever_is_drawn(self, drawn: float, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(numerics, "chance", lambda x, generator: torch.full_like(x, drawn))
        x = torch.cat([torch.arange(-256.0, 257), torch.arange(-64.0, 64) + 0.5])
        rounded = round_to_integers(x.clone(), torch.Generator())
        assert torch.equal(rounded[:513], x[:513])
        assert torch.equal(rounded[513:], x[513:] + (0.5 if drawn == 0 else -0.5))

    def test_random_numbers_lie_in_zero_to_one(self) -> None:
        numbers = chance(torch.zeros(100, 100), torch.Generator().manual_seed(6))
        assert numbers.shape == (100, 100) and 0 <= numbers.min() < 0.01 and 0.99 < numbers.max() < 1


class TestRoundThrough:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
    def test_it_is_the_cast_inside_the_range_and_never_zero_nor_infinite(self, dtype: torch.dtype) -> None:
        x = torch.logspace(-3, 4, 1000)
        assert torch.equal(round_through(x, dtype), x.to(dtype))
        edge = round_through(torch.tensor([0.0, 1e-45, 1e-39, 3.4e38, math.inf]), dtype)
        assert edge.dtype == dtype and edge.isfinite().all() and (edge > 0).all()

    def test_float16_goes_down_to_its_denormals(self) -> None:
        assert round_through(torch.tensor([0.0, 1e-6]), torch.float16).tolist() == [2**-24, 17 * 2**-24]

    def test_bfloat16_stops_at_its_normals(self) -> None:
        assert round_through(torch.tensor([1e-40]), torch.bfloat16).item() == 2**-126


def slow_pack(codes: Tensor, width: int) -> list[list[int]]:
    """Bit by bit, as the reference says it: value i of a row occupies bits [i * b, (i + 1) * b)."""
    out = []
    for row in codes.tolist():
        stream = sum(code << (i * width) for i, code in enumerate(row))
        out.append(list(stream.to_bytes(-(-len(row) * width // 32) * 4, "little")))
    return out


def random_codes(rows: int, count: int, width: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 2**width, (rows, count), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


# formats.md, section 2.1: each was made by compressed-tensors
WORKED = [
    (1, [1, 0, 1, 0, 1, 0, 1, 0], "55000000"),
    (2, [1, 2, 3, 0, 1, 2, 3, 0], "39390000"),
    (3, [1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 7], "d1581fd101000000"),
    (4, [1, 2, 3, 4, 5, 6, 7, 8, 9], "2143658709000000"),
    (4, [0, 1, 2, 3, 4, 5, 6, 7], "10325476"),
    (5, [1, 2, 3, 4, 5, 6, 7], "410c52cc01000000"),
    (6, [1, 2, 3, 4, 5, 6], "8130108501000000"),
    (7, [1, 2, 3, 4, 120], "01c1808007000000"),
    (8, [1, 2, 3, 4], "01020304"),
]


class TestPacking:
    @pytest.mark.parametrize(("width", "codes", "expected"), WORKED)
    def test_worked_examples(self, width: int, codes: list[int], expected: str) -> None:
        packed = pack_bits(torch.tensor([codes], dtype=torch.uint8), width)
        assert bytes(packed.flatten().tolist()).hex() == expected
        assert unpack_bits(packed, width, len(codes)).tolist() == [codes]

    def test_worked_example_of_zero_points_packed_downwards(self) -> None:
        """int4, one column of groups, nine rows: z = 0 -8 1 3 -1 5 -3 7 2."""
        zeros = torch.tensor([[8, 0, 9, 11, 7, 13, 5, 15, 10]], dtype=torch.uint8)
        words = pack_bits(zeros, 4).view(torch.int32)[0].tolist()
        assert [w & 0xFFFFFFFF for w in words] == [0xF5D7B908, 0x0000000A]

    @pytest.mark.parametrize(
        ("width", "values", "target", "expected"),
        [
            (4, [0, 0.5, 1, 1.5, -0.0, -0.5, 6, -6], E2M1, "103298f7"),
            (6, [1, -1, 0.125, 7.5], E2M3, "081a7c"),
        ],
    )
    def test_worked_floats(self, width: int, values: list[float], target: FloatFormat, expected: str) -> None:
        packed = pack_bits(encode_float(torch.tensor([values]), target), width)
        assert bytes(packed.flatten().tolist()).hex() == expected.ljust(len(packed[0]) * 2, "0")

    @settings(max_examples=250, deadline=None)
    @given(rows=st.integers(1, 5), count=st.integers(1, 90), width=st.integers(1, 8), seed=st.integers(0, 2**20))
    def test_equal_to_the_bit_by_bit_reference_and_back(self, rows: int, count: int, width: int, seed: int) -> None:
        codes = random_codes(rows, count, width, seed)
        packed = pack_bits(codes, width)
        assert packed.dtype == torch.uint8 and packed.is_contiguous()
        assert packed.shape == (rows, packed_bytes(count, width)) and packed.shape[1] % 4 == 0
        assert packed.tolist() == slow_pack(codes, width)
        back = unpack_bits(packed, width, count)
        assert back.dtype == torch.uint8 and back.is_contiguous() and torch.equal(back, codes)

    @pytest.mark.parametrize("width", range(1, 9))
    def test_every_code_at_every_place(self, width: int) -> None:
        for count in (1, 7, 8, 9, 31, 32, 33, 64):
            codes = torch.arange(2**width, dtype=torch.uint8)[:, None].repeat(1, count)
            packed = pack_bits(codes, width)
            assert packed.tolist() == slow_pack(codes, width)
            assert torch.equal(unpack_bits(packed, width, count), codes)

    @pytest.mark.parametrize("width", range(1, 9))
    def test_bytes_without_the_padding_of_a_word_unpack_too(self, width: int) -> None:
        """nvfp4, mxfp4 and mxfp6 are stored without it."""
        codes = random_codes(3, 24, width)
        assert torch.equal(unpack_bits(pack_bits(codes, width)[:, : 3 * width], width, 24), codes)

    @pytest.mark.parametrize("width", range(1, 9))
    def test_strides_and_offsets_do_not_matter(self, width: int) -> None:
        codes = random_codes(16, 24, width)
        assert torch.equal(pack_bits(codes.t(), width), pack_bits(codes.t().contiguous(), width))
        shifted = random_codes(1, 3 + 16 * 24, width).flatten()[3:].view(16, 24)
        assert torch.equal(pack_bits(shifted, width), pack_bits(shifted.clone(), width))
        packed = pack_bits(codes, width)
        wide = torch.cat([torch.full((16, 1), 255, dtype=torch.uint8), packed], 1)[:, 1:]
        assert torch.equal(unpack_bits(wide, width, 24), codes)

    @pytest.mark.parametrize("width", range(1, 9))
    @settings(max_examples=25, deadline=None)
    @given(rows=st.integers(1, 9), count=st.integers(1, 140))
    def test_equal_to_compressed_tensors_along_both_axes(self, width: int, rows: int, count: int) -> None:
        helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
        codes = random_codes(rows, count, width, seed=rows * 1000 + count)
        signed = (codes.int() - 2 ** (width - 1)).to(torch.int8)
        words = helpers.pack_to_int32(signed, width)
        assert torch.equal(pack_bits(codes, width).view(torch.int32), words)
        assert torch.equal(unpack_bits(words.view(torch.uint8), width, count), codes)
        ours = pack_bits(codes, width).view(torch.int32)
        assert torch.equal(helpers.unpack_from_int32(ours, width, codes.shape), signed)
        down = helpers.pack_to_int32(signed, width, packed_dim=0)  # zero points
        assert torch.equal(pack_bits(codes.t().contiguous(), width).view(torch.int32).t(), down)


def test_look_up_takes_any_shape() -> None:
    table = torch.tensor([5.0, 6.0, 7.0])
    codes = torch.tensor([[[2, 0], [1, 1]]], dtype=torch.uint8)
    assert look_up(table, codes).tolist() == [[[7, 5], [6, 6]]]
    assert look_up(table, codes.transpose(1, 2)).tolist() == [[[7, 6], [5, 6]]]
