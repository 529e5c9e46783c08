"""The compressed-tensors format: its layout is kept, its bytes are the library's own, its config is one the library reads."""

import math
import re
from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

import models
import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor

from quantplan.algorithms.rtn import RoundToNearest
from quantplan.assignment import Assignment
from quantplan.checkpoint.reader import TORCH_DTYPES
from quantplan.formats.compressed_tensors import CompressedTensors
from quantplan.headers import TensorInfo, read_checkpoint
from quantplan.models.modules import Kind, Matrix, Module
from quantplan.plan.load import load_plan
from quantplan.plan.resolve import resolve
from quantplan.scheme import SCHEMES, SchemeConfig
from quantplan.tensor import QuantizedTensor

FORMAT = CompressedTensors()
ROWS, COLUMNS = 130, 192


def weight_configs() -> list[SchemeConfig]:
    """Every scheme, granularity, symmetry and element format."""
    found: dict[SchemeConfig, None] = {}
    for member in SCHEMES:
        for granularity in member.granularities:
            size = {"group_size": member.fixed_group_size or 32} if granularity == "group" else {}
            found[member(granularity=granularity, **size)] = None
            if "symmetric" in member.model_fields:
                found[member(granularity=granularity, symmetric=False, **size)] = None
    found[SCHEMES.get("fp8")(format="e5m2")] = None
    found[SCHEMES.get("mxfp6")(format="e3m2")] = None
    found[SCHEMES.get("mxfp8")(format="e5m2")] = None
    for name in ("int4", "int8", "fp8"):
        found[SCHEMES.get(name)(granularity="channel", scale_dtype="float16")] = None
    found[SCHEMES.get("int4")(group_size=64, scale_rule="midpoint")] = None
    return list(found)


def token(name: str, **options: Any) -> SchemeConfig:
    return SCHEMES.get(name)(granularity="token", **options)


ACTIVATIONS: dict[str, SchemeConfig | None] = {
    "": None,
    "int8": token("int8"),
    "int8 asymmetric": token("int8", symmetric=False),
    "int4": token("int4"),
    "fp8": token("fp8"),
    "fp8 in groups": SCHEMES.get("fp8")(group_size=128),
}


def label(config: SchemeConfig) -> str:
    given = {k: v for k, v in config.model_dump(exclude_defaults=True).items() if v is not None}
    return " ".join([config.name, *(f"{k}={v}" for k, v in given.items())])


def assigned(wq: SchemeConfig | None, aq: SchemeConfig | None = None, name: str = "m", kind: Kind = "linear") -> Assignment:
    info = TensorInfo(f"{name}.weight", "BF16", (ROWS, COLUMNS))
    module = Module(name, info, kind, (Matrix(name, info.name, ROWS, COLUMNS),))
    return Assignment(module, wq, aq, RoundToNearest(), {})


ACCEPTED = [
    (wq, name) for wq, (name, aq) in product(weight_configs(), ACTIVATIONS.items()) if FORMAT.refuse(assigned(wq, aq)) is None
]
CASES = pytest.mark.parametrize(("wq", "activations"), ACCEPTED, ids=[f"{label(w)}+{a}" for w, a in ACCEPTED])


def weights(rows: int = ROWS, columns: int = COLUMNS, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=generator) * torch.randn(rows, 1, generator=generator).exp() * 0.05
    x[rows // 2] = 0
    x[rows // 3, ::3] = -0.0
    x[-1] = x[-1].abs() + 1
    return x


def stored(q: QuantizedTensor, aq: SchemeConfig | None) -> dict[str, Tensor]:
    matrix = Matrix("m", "m.weight", *q.shape)
    return FORMAT.encode(matrix, q, aq)


def local(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names as compressed-tensors' compressors take them."""
    return {name.removeprefix("m."): tensor for name, tensor in tensors.items()}


def group_of(wq: SchemeConfig, aq: SchemeConfig | None) -> dict[str, Any]:
    """The config group of one module."""
    (group,) = FORMAT.config([assigned(wq, aq)])["config_groups"].values()
    return group


def same(a: QuantizedTensor, b: QuantizedTensor) -> bool:
    return torch.equal(a.codes, b.codes) and all(
        torch.equal(a.params[n].view(torch.uint8), b.params[n].view(torch.uint8)) for n in a.params | b.params
    )


# --- bytes ------------------------------------------------------------------------------------------------------------


def test_what_is_accepted_covers_the_formats() -> None:
    """Guards the tests below: they run over what is accepted."""
    kinds = {group_of(wq, ACTIVATIONS[a])["format"] for wq, a in ACCEPTED}
    packed = {f"{name}-pack-quantized" for name in ("nvfp4", "mxfp4", "mxfp6")}
    assert kinds == packed | {"pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "mxfp8-quantized"}
    alone = {wq.name for wq, a in ACCEPTED if not a}
    assert alone == {*(f"int{b}" for b in range(2, 9)), "fp8", "nvfp4", "mxfp4", "mxfp6", "mxfp8"}


@CASES
def test_what_is_stored_is_what_the_layout_says(wq: SchemeConfig, activations: str) -> None:
    aq = ACTIVATIONS[activations]
    for rows, columns in ((ROWS, COLUMNS), (1, 64), (8, 64), (64, 32), (3, 96), (257, 128)):
        if wq.misfit(columns):
            continue
        matrix = Matrix("m", "m.weight", rows, columns)
        q = wq.quantizer().quantize(weights(rows, columns))
        tensors = FORMAT.encode(matrix, q, aq)
        assert {n: (t.dtype, tuple(t.shape)) for n, t in tensors.items()} == {
            n: (getattr(torch, TORCH_DTYPES[dtype]), shape) for n, (dtype, shape) in FORMAT.layout(matrix, wq, aq).items()
        }
        assert all(t.is_contiguous() for t in tensors.values())
        assert same(FORMAT.decode(matrix, wq, aq, load(save(tensors)).__getitem__), q)  # with the strides of a file


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("rows", [1, 8, 9, 65, 128])
def test_any_shape_is_stored_one_scale_a_channel(bits: int, rows: int) -> None:
    """Zero points are packed downwards: a single column of them is a row of any stride to the packer."""
    wq = SCHEMES.get(f"int{bits}")(granularity="channel", symmetric=False)
    for columns in (1, 7, 33, 64, 65):
        matrix = Matrix("m", "m.weight", rows, columns)
        q = wq.quantizer().quantize(torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows)))
        tensors = FORMAT.encode(matrix, q, None)
        assert tensors["m.weight_packed"].shape == (rows, math.ceil(columns * bits / 32))
        assert tensors["m.weight_zero_point"].shape == (math.ceil(rows * bits / 32), 1)
        assert same(FORMAT.decode(matrix, wq, None, tensors.__getitem__), q)


@CASES
def test_the_library_reads_our_bytes_as_our_numbers(wq: SchemeConfig, activations: str) -> None:
    """What compressed-tensors' own decompressor makes of the tensors is what the quantizer says they stand for."""
    ct = pytest.importorskip("compressed_tensors")
    aq = ACTIVATIONS[activations]
    group = ct.quantization.QuantizationScheme.model_validate(group_of(wq, aq))
    compressor = ct.compressors.BaseCompressor.get_value_from_registry(group.format)
    for x in (weights(), weights(seed=1) * 2.0**-9, weights(seed=2) * 2.0**9):
        q = wq.quantizer().quantize(x)
        opened = compressor.decompress(local(stored(q, aq)), group)["weight"]
        scale = q.params["scale"].dtype
        assert opened.dtype == (scale if scale in (torch.bfloat16, torch.float16) else torch.bfloat16)
        assert torch.equal(opened, wq.quantizer().dequantize(q).to(opened.dtype))


@CASES
def test_our_bytes_are_what_the_library_would_write(wq: SchemeConfig, activations: str) -> None:
    """Given the dequantized matrix and our parameters, its compressor makes the same tensors to the bit."""
    ct = pytest.importorskip("compressed_tensors")
    aq = ACTIVATIONS[activations]
    group = ct.quantization.QuantizationScheme.model_validate(group_of(wq, aq))
    compressor = ct.compressors.BaseCompressor.get_value_from_registry(group.format)
    q = wq.quantizer().quantize(weights())
    ours = local(stored(q, aq))
    state = {"weight": wq.quantizer().dequantize(q), "weight_scale": ours["weight_scale"].float()}
    if wq.name.startswith("mx"):
        state["weight_scale"] = torch.ldexp(torch.ones(q.params["scale"].shape), q.params["scale"].int() - 127)
    if "zero_point" in q.params:
        state["weight_zero_point"] = (q.params["zero_point"].int() - 2 ** (wq.bits - 1)).to(torch.int8)
    if "global_scale" in q.params:
        state["weight_global_scale"] = q.params["global_scale"]
    made = compressor.compress(state, group)
    assert made.keys() == ours.keys()
    for name, tensor in ours.items():
        theirs = made[name].to(tensor.dtype) if name == "weight_scale" else made[name]
        assert theirs.dtype == tensor.dtype and theirs.shape == tensor.shape, name
        if name == "weight_packed" and wq.bits == 4 and tensor.dtype == torch.uint8:
            theirs, tensor = plain_zeros(theirs), plain_zeros(tensor)
        if tensor.is_floating_point():
            theirs, tensor = theirs.float(), tensor.float()
        assert torch.equal(theirs, tensor), name


def plain_zeros(packed: Tensor) -> Tensor:
    """Pairs of fp4 codes without the sign of zeros, which the library drops."""
    low, high = packed & 0xF, packed >> 4
    return torch.where(low == 8, 0, low) | torch.where(high == 8, 0, high) << 4


def words(tensor: Tensor) -> list[int]:
    return [w & 0xFFFFFFFF for w in tensor.flatten().tolist()]


class TestWorkedExamples:
    """formats.md, sections 2 and 3."""

    def test_int4_is_offset_binary_lowest_bits_first(self) -> None:
        wq = SCHEMES.get("int4")(granularity="channel")
        q = QuantizedTensor(torch.arange(8, dtype=torch.uint8)[None], {"scale": torch.ones(1, 1).bfloat16()}, wq)
        assert wq.quantizer().dequantize(q).tolist() == [[-8, -7, -6, -5, -4, -3, -2, -1]]
        assert words(stored(q, None)["m.weight_packed"]) == [0x76543210]

    def test_zero_points_are_packed_downwards(self) -> None:
        wq = SCHEMES.get("int4")(group_size=32, symmetric=False)
        signed = torch.tensor([0, -8, 1, 3, -1, 5, -3, 7, 2])[:, None]
        params = {"scale": torch.ones(9, 1).bfloat16(), "zero_point": (signed + 8).to(torch.uint8)}
        q = QuantizedTensor(torch.zeros(9, 32, dtype=torch.uint8), params, wq)
        packed = stored(q, None)["m.weight_zero_point"]
        assert packed.shape == (2, 1) and words(packed) == [0xF5D7B908, 0x0000000A]

    def test_int8_beside_int8_activations_is_plain(self) -> None:
        wq = SCHEMES.get("int8")()
        codes = torch.tensor([[0, 1, 127, 128, 129, 255]], dtype=torch.uint8)
        q = QuantizedTensor(codes, {"scale": torch.ones(1, 1).bfloat16()}, wq)
        assert stored(q, token("int8"))["m.weight"].tolist() == [[-128, -127, -1, 0, 1, 127]]
        assert stored(q, None)["m.weight_shape"].tolist() == [1, 6]

    def test_nvfp4_puts_the_even_column_in_the_low_nibble(self) -> None:
        group = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, -12, -6, -3]
        x = torch.tensor([group, [24] + [0] * 15]) / 64
        tensors = stored(SCHEMES.get("nvfp4")().quantizer().quantize(x), None)
        assert bytes(tensors["m.weight_packed"][0].tolist()).hex() == "103244656676f7bd"
        assert tensors["m.weight_scale"].view(torch.uint8)[0].tolist() == [0x76]
        assert tensors["m.weight_global_scale"].tolist() == [7168]

    def test_mxfp6_puts_four_codes_in_three_bytes(self) -> None:
        wq = SCHEMES.get("mxfp6")()
        x = torch.zeros(1, 32)
        x[0, :4] = torch.tensor([1, -1, 0.125, 7.5])
        tensors = stored(wq.quantizer().quantize(x), None)
        assert bytes(tensors["m.weight_packed"][0].tolist()).hex() == "081a7c" + "00" * 21
        assert tensors["m.weight_scale"].tolist() == [[127]]

    def test_fp8_is_torchs_float8(self) -> None:
        x = torch.tensor([[448.0, 1.0, 0.5, 2.0**-6, 2.0**-9, -448.0]])
        tensors = stored(SCHEMES.get("fp8")().quantizer().quantize(x), None)
        assert tensors["m.weight_scale"].tolist() == [[1]]
        assert tensors["m.weight"].view(torch.uint8).tolist() == [[0x7E, 0x38, 0x30, 0x08, 0x01, 0xFE]]

    def test_sizes_of_the_reference(self) -> None:
        """int4, groups of 128, 4096 x 4096; asymmetric; int3; nvfp4."""
        q_proj = Matrix("q", "q.weight", 4096, 4096)
        int4 = SCHEMES.get("int4")
        plain = FORMAT.layout(q_proj, int4(group_size=128), None)
        assert plain == {
            "q.weight_packed": ("I32", (4096, 512)),
            "q.weight_shape": ("I64", (2,)),
            "q.weight_scale": ("BF16", (4096, 32)),
        }
        zeros = FORMAT.layout(q_proj, int4(group_size=128, symmetric=False), None)
        assert dict(zeros.items() - plain.items()) == {"q.weight_zero_point": ("I32", (512, 32))}
        assert FORMAT.layout(q_proj, SCHEMES.get("int3")(group_size=128), None)["q.weight_packed"] == ("I32", (4096, 384))
        assert FORMAT.layout(q_proj, SCHEMES.get("nvfp4")(), None) == {
            "q.weight_packed": ("U8", (4096, 2048)),
            "q.weight_scale": ("F8_E4M3", (4096, 256)),
            "q.weight_global_scale": ("F32", (1,)),
        }
        one = FORMAT.layout(q_proj, SCHEMES.get("fp8")(granularity="tensor"), token("fp8"))
        assert one == {"q.weight": ("F8_E4M3", (4096, 4096)), "q.weight_scale": ("BF16", (1,))}


@pytest.mark.parametrize("mutant", ["high nibble first", "signed codes", "zero points along columns", "scales of channels flat"])
def test_the_checks_of_bytes_bite(mutant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    encode = CompressedTensors.encode
    wq = SCHEMES.get("nvfp4")() if mutant == "high nibble first" else SCHEMES.get("int4")(group_size=32, symmetric=False)

    def wrong(self: Any, matrix: Matrix, quantized: QuantizedTensor, aq: SchemeConfig | None) -> dict[str, Tensor]:
        out = encode(self, matrix, quantized, aq)
        packed, zero = out["m.weight_packed"], out.get("m.weight_zero_point")
        if mutant == "high nibble first":
            out["m.weight_packed"] = packed << 4 | packed >> 4
        elif mutant == "signed codes":
            out["m.weight_packed"] = (packed.view(torch.uint8) ^ 0x88).view(torch.int32)
        elif mutant == "zero points along columns":
            assert zero is not None
            out["m.weight_zero_point"] = zero.roll(1, 0)
        else:
            out["m.weight_scale"] = out["m.weight_scale"].roll(1, 1)
        return out

    test_the_library_reads_our_bytes_as_our_numbers(wq, "")
    monkeypatch.setattr(CompressedTensors, "encode", wrong)
    with pytest.raises(AssertionError):
        test_the_library_reads_our_bytes_as_our_numbers(wq, "")
    with pytest.raises(AssertionError):
        test_what_is_stored_is_what_the_layout_says(wq, "")


# --- config -----------------------------------------------------------------------------------------------------------


@CASES
def test_a_group_is_one_the_library_reads(wq: SchemeConfig, activations: str) -> None:
    ct = pytest.importorskip("compressed_tensors")
    aq = ACTIVATIONS[activations]
    config = ct.quantization.QuantizationConfig.model_validate(FORMAT.config([assigned(wq, aq)]))
    (group,) = config.config_groups.values()
    assert group.targets == ["m"] and config.quantization_status.value == "compressed"
    assert config.format == group.format and config.ignore == ["lm_head"]
    arguments = group.weights
    assert (arguments.num_bits, arguments.symmetric, arguments.dynamic) == (wq.bits, wq.symmetric_grid, False)
    assert arguments.strategy == ("tensor_group" if wq.name == "nvfp4" else wq.strategy)
    assert arguments.group_size == wq.group
    assert arguments.type == ("int" if wq.name.startswith("int") else "float")
    assert arguments.block_structure == ([128, 128] if wq.strategy == "block" else None)
    assert (arguments.scale_dtype == torch.uint8) == wq.name.startswith("mx")
    if aq is None:
        assert group.input_activations is None
    else:
        assert (group.input_activations.num_bits, group.input_activations.dynamic) == (aq.bits, True)
        assert group.input_activations.symmetric == aq.symmetric_grid
        assert group.input_activations.strategy == aq.strategy
        assert group.input_activations.group_size == aq.group


PLANS: dict[str, dict[str, Any]] = {
    "one scheme": {"default": {"wq": "int4", "group_size": 32}},
    "mixture": {
        "default": {"wq": "int4", "group_size": 64},
        "overrides": [
            {"pattern": "*.self_attn.*", "wq": {"scheme": "int8", "granularity": "channel"}, "aq": "int8"},
            {"pattern": "*.layers.1.*.down_proj", "wq": {"scheme": "fp8", "granularity": "channel"}},
            {"pattern": "*.layers.0.*.o_proj", "keep": True},
        ],
    },
    "one layer": {"default": {"wq": None}, "overrides": [{"pattern": "*.layers.0.*.q_proj", "wq": "int8"}]},
    "output head": {"default": {"wq": "int8"}, "overrides": [{"pattern": "lm_head", "wq": "int8", "optional": True}]},
    "seeds": {
        "default": {"wq": {"scheme": "int4", "group_size": 32, "rounding": "stochastic", "seed": 1}},
        "overrides": [{"pattern": "*.mlp.*", "wq": {"seed": 2}}],
    },
}


def resolution(plan: str, model: str, folder: Any) -> Sequence[Assignment]:
    checkpoint = read_checkpoint(models.write(model, folder))
    return list(resolve(load_plan({"engines": ["transformers"], **PLANS[plan]}), checkpoint).assignments.values())


@pytest.mark.parametrize("model", ["llama", "moe", "fused"])
@pytest.mark.parametrize("plan", PLANS)
def test_every_module_is_in_one_group_or_ignored(plan: str, model: str, tmp_path: Any) -> None:
    """No reader can disagree: exactly one group's targets match a quantized matrix, and no kept one's name."""
    ct = pytest.importorskip("compressed_tensors")
    assignments = resolution(plan, model, tmp_path)
    config = FORMAT.config(assignments)
    groups = ct.quantization.QuantizationConfig.model_validate(config).config_groups
    matches = ct.utils.match.match_name
    quantized = {m.name: a for a in assignments for m in a.matrices}
    kept = [m.name for a in assignments if a.wq is None and a.module.kind != "embedding" for m in a.module.matrices]
    assert quantized and not quantized.keys() & set(kept)
    for name, assignment in quantized.items():
        (group,) = (g for g in groups.values() if any(matches(name, t) for t in g.targets))
        assert group.weights.num_bits == assignment.wq.bits  # type: ignore[union-attr]
        assert group.weights.group_size == assignment.wq.group  # type: ignore[union-attr]
        assert (group.input_activations is None) == (assignment.aq is None)
        assert not any(matches(name, i) for i in config["ignore"])
    for name in kept:
        assert sum(matches(name, i) for i in config["ignore"]) == 1
        assert not any(matches(name, t) for g in groups.values() for t in g.targets)
    # tied heads are not stored, but are Linears when loaded
    assert "lm_head" in quantized or "lm_head" in config["ignore"]


@pytest.mark.parametrize("model", ["llama", "moe", "fused"])
@pytest.mark.parametrize("plan", PLANS)
def test_ignored_and_targeted_are_leaves(plan: str, model: str, tmp_path: Any) -> None:
    """vLLM takes an ignored container for all that is in it; transformers does not: only leaves may be named."""
    assignments = resolution(plan, model, tmp_path)
    config = FORMAT.config(assignments)
    leaves = {m.name for a in assignments for m in a.module.matrices} | {"lm_head"}
    named = [*config["ignore"], *(t for g in config["config_groups"].values() for t in g["targets"])]
    assert len(named) == len(set(named))
    for name in named:
        if name.startswith("re:"):
            assert name.endswith("$") and any(re.match(name[3:], leaf) for leaf in leaves)
        else:
            assert name in leaves
    assert not any("embed" in name or "norm" in name for name in named)


def test_the_global_format_is_mixed_where_groups_differ() -> None:
    int4, fp8 = SCHEMES.get("int4")(), SCHEMES.get("fp8")()
    one = FORMAT.config([assigned(int4, name="a"), assigned(SCHEMES.get("int8")(), name="b")])
    assert one["format"] == "pack-quantized" and len(one["config_groups"]) == 2
    two = FORMAT.config([assigned(int4, name="a"), assigned(fp8, name="b"), assigned(None, name="c")])
    assert two["format"] == "mixed-precision" and two["ignore"] == ["c", "lm_head"]
    assert [g["format"] for g in two["config_groups"].values()] == ["pack-quantized", "naive-quantized"]
    assert two["quantization_status"] == "compressed"  # without it loaders leave weights random, without a word


def test_seeds_make_no_groups() -> None:
    """Two modules that differ in nothing a reader sees are in one group."""
    a, b = (SCHEMES.get("int4")(rounding="stochastic", seed=s) for s in (1, 2))
    config = FORMAT.config([assigned(a, name="a"), assigned(b, name="b"), assigned(SCHEMES.get("int4")(), name="c")])
    assert [g["targets"] for g in config["config_groups"].values()] == [["a", "b", "c"]]


# --- refusals ---------------------------------------------------------------------------------------------------------


def scheme(name: str, **options: Any) -> SchemeConfig:
    return SCHEMES.get(name)(**options)


BLOCKS = "blocks of fp8 need activations in groups of 128: aq: {scheme: fp8, group_size: 128}"
PER_TOKEN = "dynamic activations need one scale per token"
ONE_SCALE = "one scale for the whole tensor is held for symmetric int8 only"
FP8_BLOCK = scheme("fp8", granularity="block")
REFUSALS: list[tuple[SchemeConfig, SchemeConfig | None, str | None]] = [
    (scheme("fp4"), None, "it has no fp4; nvfp4 and mxfp4 are its 4-bit floats"),
    (scheme("nf4"), None, "it has no nf4; nvfp4 and mxfp4 are its 4-bit floats"),
    (scheme("fp8", format="e5m2"), None, "it has no e5m2: engines read e4m3 only"),
    (scheme("mxfp8", format="e5m2"), None, "it has no e5m2: engines read e4m3 only"),
    (scheme("mxfp6", format="e3m2"), None, "it has no e3m2: engines read e2m3 only"),
    (scheme("int4", granularity="token"), None, "weights have no tokens"),
    (scheme("fp8", granularity="token"), None, "weights have no tokens"),
    (scheme("int8", granularity="block"), None, "it has no blocks of integers"),
    (scheme("int4", granularity="tensor"), None, ONE_SCALE),
    (scheme("int8", granularity="tensor", symmetric=False), None, ONE_SCALE),
    (scheme("int8", granularity="tensor"), None, None),
    (scheme("int8"), token("nf4"), "dynamic nf4 activations; it has int4, int8, fp8"),
    (scheme("int8"), token("int6"), "dynamic int6 activations; it has int4, int8, fp8"),
    (scheme("nvfp4"), scheme("nvfp4"), "dynamic nvfp4 activations; it has int4, int8, fp8, and nvfp4 with dynamic: false"),
    (scheme("fp8"), token("fp8", format="e5m2"), "activations in e5m2"),
    (scheme("fp8"), token("int8"), "fp8 weights with int8 activations"),
    (scheme("nvfp4"), token("fp8"), "nvfp4 weights with fp8 activations"),
    (scheme("mxfp4"), token("int8"), "mxfp4 weights with int8 activations"),
    (FP8_BLOCK, token("fp8"), BLOCKS),
    (FP8_BLOCK, scheme("fp8", group_size=64), BLOCKS),
    (FP8_BLOCK, scheme("fp8", group_size=128), None),
    (FP8_BLOCK, None, None),
    (scheme("fp8"), scheme("fp8", group_size=128), PER_TOKEN),
    (scheme("int8"), scheme("int8", granularity="tensor"), PER_TOKEN),
    (scheme("int8"), scheme("int8", granularity="channel"), PER_TOKEN),
    (scheme("int8"), token("int8"), None),
    (scheme("int8", symmetric=False), token("int8"), None),
    (scheme("int4"), token("int8", symmetric=False), None),
    (scheme("int4"), token("fp8"), None),
    (scheme("int4"), token("int4"), None),
    *((scheme(f"int{b}", symmetric=s), None, None) for b in range(2, 9) for s in (True, False)),
    *((scheme(n), None, None) for n in ("fp8", "nvfp4", "mxfp4", "mxfp6", "mxfp8")),
]


@pytest.mark.parametrize(("wq", "aq", "sentence"), REFUSALS, ids=[f"{label(w)}+{label(a) if a else ''}" for w, a, _ in REFUSALS])
def test_what_is_refused_and_how_it_is_said(wq: SchemeConfig, aq: SchemeConfig | None, sentence: str | None) -> None:
    assert FORMAT.refuse(assigned(wq, aq)) == sentence
    assert sentence is None or (sentence[0].islower() and not sentence.endswith("."))


def test_embeddings_are_refused() -> None:
    sentence = FORMAT.refuse(assigned(scheme("int8"), kind="embedding"))
    assert sentence == "embeddings cannot be quantized in it"
