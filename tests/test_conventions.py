"""Scale conventions: with a peer's convention the codes are the peer's, bit for bit."""

from __future__ import annotations

import pytest
import torch

from quantplan.scheme import SCHEMES

ct = pytest.importorskip("compressed_tensors.quantization")


@pytest.mark.parametrize(("bits", "group"), [(4, 64), (4, 32), (8, None), (3, 32)])
def test_midpoint_and_bfloat16_quotients_are_what_llm_compressor_rounds_with(bits: int, group: int | None) -> None:
    """Its observer divides absmax by (2^b - 1) / 2, and compressed-tensors divides and rounds in the weight's dtype."""
    from compressed_tensors.quantization.lifecycle.forward import quantize

    weight = (torch.randn(96, 192, generator=torch.Generator().manual_seed(0)) * 0.04).bfloat16()
    strategy = {"strategy": "group", "group_size": group} if group else {"strategy": "channel"}
    args = ct.QuantizationArgs(num_bits=bits, type="int", symmetric=True, **strategy)
    grouped = weight.view(96, -1, group or 192)
    scale = (grouped.abs().amax(-1).float() / ((2**bits - 1) / 2)).bfloat16()
    theirs = quantize(weight, scale, None, args, dtype=torch.int8)
    options = {"group_size": group} if group else {"granularity": "channel"}
    config = SCHEMES.get(f"int{bits}")(scale_rule="midpoint", quotient_dtype="bfloat16", **options)
    ours = config.quantizer().quantize(weight)
    assert torch.equal(ours.params["scale"], scale)
    assert torch.equal(ours.codes.to(torch.int16) - 2 ** (bits - 1), theirs.to(torch.int16))


def test_each_rule_divides_by_what_it_says() -> None:
    weight = torch.tensor([[-3.5, 1.0, 2.0, 0.5]])
    for rule, divisor in (("qmax", 7), ("midpoint", 7.5), ("qmin", 8)):
        config = SCHEMES.get("int4")(granularity="channel", scale_rule=rule, scale_dtype="float32")
        assert config.quantizer().quantize(weight).params["scale"].item() == pytest.approx(3.5 / divisor)
