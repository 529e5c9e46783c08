"""transformers: native checkpoints open with `from_pretrained` once quantplan is imported; `load` opens every output.

This file imports neither torch nor transformers.
"""

from importlib import import_module


def register() -> None:
    """Makes `quant_method: quantplan` known to transformers, as importing the plug-in does: once, however often."""
    import_module("quantplan.hf.plugin")
