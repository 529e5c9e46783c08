"""The Hugging Face Hub: headers by range request, snapshots when weights are needed. The only file that reaches a network."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from quantplan.errors import QuantplanError, fail, printable
from quantplan.headers import Checkpoint, TensorInfo, read_config, tensor_entry


def read_hub_headers(repo: str, revision: str | None = None) -> Checkpoint:
    """Config, names and shapes of a Hub repository, fetched by range requests; no weights are downloaded.

    Raises QP406 when the Hub cannot be reached (or is switched off), QP202 when the repository has no safetensors, QP201 to
    QP207 for malformed ones.
    """
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import NotASafetensorsRepoError, SafetensorsParsingError

    try:
        commit = HfApi().model_info(repo, revision=revision).sha or ""
        metadata = HfApi().get_safetensors_metadata(repo, revision=commit)
        config = read_config(Path(hf_hub_download(repo, "config.json", revision=commit)).parent)
    except NotASafetensorsRepoError:
        raise fail("QP202", "the repository has no safetensors weights", "quantplan reads nothing else", file=repo) from None
    except (SafetensorsParsingError, AttributeError, KeyError, TypeError) as error:  # the library's parser trusts the types
        raise fail("QP201", f"a header or the index is malformed: {_first_line(error)}", file=repo) from None
    except QuantplanError:
        raise
    except Exception as error:  # httpx, huggingface_hub and OS errors share no base class
        raise _unreachable(repo, error) from error
    tensors: dict[str, TensorInfo] = {}
    for file, header in sorted(metadata.files_metadata.items()):
        for name, info in header.tensors.items():
            if name in tensors:
                raise fail("QP207", f"tensor also stored in {printable(tensors[name].file)}", file=file, tensor=name)
            entry = {"dtype": info.dtype, "shape": info.shape, "data_offsets": list(info.data_offsets)}
            checked = tensor_entry(name, entry, f"{repo}/{file}")
            tensors[name] = replace(checked, file=file, start=info.data_offsets[0], end=info.data_offsets[1])
    return Checkpoint(repo, None, config, tensors, revision=commit)


def fetch(repo: str, revision: str | None = None) -> tuple[Path, str]:
    """A local snapshot of a Hub repository (safetensors and side files), and its commit. Raises QP406."""
    from huggingface_hub import snapshot_download

    try:
        ignored = ["*.bin", "*.pt", "*.pth", "*.gguf", "*.h5", "*.msgpack", "*.onnx", "original/*"]
        path = Path(snapshot_download(repo, revision=revision, ignore_patterns=ignored))
    except Exception as error:  # as above
        raise _unreachable(repo, error) from error
    return path, path.name


def _unreachable(repo: str, error: Any) -> QuantplanError:
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return fail(
            "QP406",
            "the Hub is switched off (HF_HUB_OFFLINE)",
            "give a local directory, or unset HF_HUB_OFFLINE",
            file=repo,
        )
    advice = "is the name right, the token set, the network up?"
    return fail("QP406", f"cannot be fetched from the Hub: {_first_line(error)}", advice, file=repo)


def _first_line(error: Any) -> str:
    return printable((str(error).strip() or type(error).__name__).splitlines()[0])
