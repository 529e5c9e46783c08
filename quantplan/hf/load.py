"""`load`: an output opened as a transformers model, whatever its format."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quantplan.checkpoint.reader import TensorReader
from quantplan.checkpoint.stored import stored_matrices
from quantplan.engine.verify import read_record
from quantplan.errors import fail
from quantplan.format import FORMATS
from quantplan.headers import read_checkpoint, read_config
from quantplan.hf.plugin import QuantplanConfig
from quantplan.kv_cache import SCALES
from quantplan.live.skeleton import model_class


def load(out: str | os.PathLike[str], **options: Any) -> Any:
    """The model in the directory `out`, of the class its config names, by transformers' `from_pretrained(out, **options)`.

    Quantized linears are `QuantLinear`, packed, with activations quantized as the plan says, from native and
    compressed-tensors outputs alike: the latter are decoded here, not by the compressed-tensors package, so that every
    scheme, mixture and dtype opens, exactly. Fused experts are dense. An unquantized checkpoint opens as it is.

    Raises QP220 for a compressed-tensors checkpoint that quantplan did not write, QP221 when stored tensors are missing,
    QP222 for another quantization method, or where transformers cannot compute with what is stored.
    """
    folder = Path(out)
    place: Path | None = folder
    config = read_config(folder)
    method = (config.get("quantization_config") or {}).get("quant_method")
    if method == "compressed-tensors":
        place, options = None, {**options, **_as_native(folder, options)}
    elif method not in ("quantplan", None):
        raise fail("QP222", f"quantized by '{method}'", "open it with transformers' from_pretrained", file=str(folder))
    model, found = model_class(config).from_pretrained(place, output_loading_info=True, **options)
    made_here = ("weight_", "input_", *SCALES)
    lost = sorted(name for name in found["missing_keys"] if name.rpartition(".")[2].startswith(made_here))
    if lost:
        raise fail("QP221", "tensor is missing", "copy the checkpoint again", file=str(folder), tensor=lost[0])
    return model


def _as_native(folder: Path, options: Mapping[str, Any]) -> dict[str, Any]:
    """A compressed-tensors output as arguments of `from_pretrained`: a config and a state dict in the native format."""
    import transformers

    record, written = read_record(folder), read_checkpoint(folder)
    output, native = FORMATS.get("compressed-tensors")(), FORMATS.get("quantplan")()
    groups: list[dict[str, Any]] = []
    state: dict[str, Any] = {}
    used: set[str] = set()
    with TensorReader(folder, written.tensors) as reader:
        for treatment in record["treatments"]:
            names = []
            for stored in stored_matrices(treatment, reader):
                matrix, wq, aq = stored.matrix, stored.wq, stored.aq
                used |= output.layout(matrix, wq, aq).keys()
                state |= native.encode(matrix, output.decode(matrix, wq, aq, reader.read), aq)
                state |= native.encode_inputs(matrix, output.decode_inputs(matrix, aq, reader.read))
                names.append(matrix.name)
            groups.append({"wq": treatment["wq"], "aq": treatment["aq"], "modules": names})
        state |= {name: reader.read(name) for name in written.tensors if name not in used}
    remote = {key: options[key] for key in ("trust_remote_code",) if key in options}
    config = options.get("config") or transformers.AutoConfig.from_pretrained(folder, **remote)
    config.quantization_config = QuantplanConfig(groups, kv_cache=record.get("kv_cache")).to_dict()
    arguments: dict[str, Any] = {"config": config, "state_dict": state}
    if (folder / "generation_config.json").exists():
        arguments["generation_config"] = transformers.GenerationConfig.from_pretrained(folder)
    return {**arguments, **{key: options[key] for key in ("generation_config",) if key in options}}
