"""Models in GGUF files: converted once to a plain folder, which loads quickly from then on."""

from __future__ import annotations

import hashlib
import logging
import os
import secrets
import shutil
from pathlib import Path
from typing import Any

import torch

from rgft.errors import DataError
from rgft.tasks.kept_files import kept_files

log = logging.getLogger("rgft")

#: Bytes of each end of a file that, with its size, tell it apart from others.
FINGERPRINT_BYTES = 1 << 20


def converted(path: Path) -> Path:
    """A folder with the model of a GGUF file in fp32 and its tokenizer, as `from_pretrained` reads it.

    It is made once, aside and then renamed, in the folder of the environment variable RGFT_CACHE (else
    `~/.cache/rgft`). Quantised weights come out dequantised: what was lost stays lost.

    Raises:
        DataError: there is no such file, the package gguf is missing, or the file cannot be converted.
    """
    if not path.is_file():
        raise DataError(f"{path}: expected a GGUF file, found {'a folder' if path.is_dir() else 'nothing'}")
    root = kept_files("models")
    folder = root / f"{path.stem}-{_fingerprint(path)}"
    if (folder / "config.json").is_file():
        return folder
    log.info("%s: converting to %s, once", path, folder)
    aside: Path | None = None
    try:
        root.mkdir(parents=True, exist_ok=True)
        aside = root / f".{folder.name}-{secrets.token_hex(8)}"
        aside.mkdir()
        _convert(path, aside)
        os.replace(aside, folder)
    except Exception as error:  # the readers of the format raise many kinds
        if (folder / "config.json").is_file():
            return folder  # another process was first
        raise DataError(
            f"{path}: cannot be converted: {type(error).__name__}: {error}. The package gguf is needed (pip install "
            f"'rgft[quant]'), a format that Transformers knows, and room in {root} (see RGFT_CACHE)"
        ) from error
    finally:
        if aside is not None:
            shutil.rmtree(aside, ignore_errors=True)
    return folder


def _convert(path: Path, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place: dict[str, Any] = {"gguf_file": path.name}
    AutoTokenizer.from_pretrained(str(path.parent), **place).save_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(str(path.parent), dtype=torch.float32, **place)
    # The weights are plain now, but the model still says that it is quantised, and would refuse to be saved.
    for holder, name in ((model.config, "quantization_config"), (model, "hf_quantizer"), (model, "is_quantized")):
        if hasattr(holder, name):
            delattr(holder, name)
    model.save_pretrained(folder)


def _fingerprint(path: Path) -> str:
    digest, size = hashlib.sha256(), path.stat().st_size
    digest.update(str(size).encode())
    with path.open("rb") as file:
        digest.update(file.read(FINGERPRINT_BYTES))
        file.seek(max(0, size - FINGERPRINT_BYTES))
        digest.update(file.read(FINGERPRINT_BYTES))
    return digest.hexdigest()[:16]
