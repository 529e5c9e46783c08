"""transformers: native checkpoints open with `from_pretrained` once quantplan is imported; `load` opens every output.

This file imports neither torch nor transformers.
"""


def register() -> None:
    """Makes `quant_method: quantplan` known to transformers. Does nothing the second time."""
    from transformers.quantizers.auto import (
        AUTO_QUANTIZATION_CONFIG_MAPPING,
        register_quantization_config,
        register_quantizer,
    )

    if "quantplan" not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        from quantplan.hf.plugin import QuantplanConfig, QuantplanQuantizer

        register_quantization_config("quantplan")(QuantplanConfig)
        register_quantizer("quantplan")(QuantplanQuantizer)
