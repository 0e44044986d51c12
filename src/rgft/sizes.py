"""Amounts of memory as people write them: "8GB", "7.5 GiB", 500_000_000."""

from __future__ import annotations

import re
from typing import Any

from rgft.errors import ConfigError

_UNITS = {
    "": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12, "kib": 2**10, "mib": 2**20, "gib": 2**30,
    "tib": 2**40,
}  # fmt: skip
_FORM = re.compile(r"(\d+\.?\d*|\.\d+)\s*([a-z]*)")

FORMS = 'a number of bytes > 0, or one with a unit: "500MB", "8GB" (powers of 1000), "512MiB", "7.5GiB" (of 1024)'


def parsed_bytes(value: Any, *, setting: str) -> int:
    """Bytes.

    Args:
        value: an integer, or text with or without one of the units B, KB, MB, GB, TB, KiB, MiB, GiB, TiB.
        setting: whose value it is, for the message.

    Raises:
        ConfigError: it is neither, or not above 0.
    """
    found: float | None = None
    if isinstance(value, str) and (form := _FORM.fullmatch(value.strip().lower())) and form[2] in _UNITS:
        found = float(form[1]) * _UNITS[form[2]]
    elif isinstance(value, (int, float)) and not isinstance(value, bool) and value == value // 1:
        found = value
    if found is None or not 1 <= found < float("inf"):
        raise ConfigError(f"{setting}: expected {FORMS}, found {value!r}")
    return int(found)


def size_text(amount: float) -> str:
    """An amount to three digits: "210 MB", "7.45 GB"."""
    unit, factor = next(
        (pair for pair in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("KB", 10**3)) if amount >= pair[1]), ("B", 1)
    )
    value = amount / factor
    return f"{value:,.0f} {unit}" if value >= 100 or factor == 1 else f"{value:.3g} {unit}"
