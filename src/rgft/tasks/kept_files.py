"""Where files are kept that are made once and used again."""

from __future__ import annotations

import os
from pathlib import Path


def kept_files(kind: str) -> Path:
    """The folder of files of that kind: below the environment variable RGFT_CACHE, else `~/.cache/rgft`."""
    return Path(os.environ.get("RGFT_CACHE") or Path.home() / ".cache" / "rgft").expanduser() / kind
