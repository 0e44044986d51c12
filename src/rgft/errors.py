"""The exception tree: every error RGFT raises on purpose is an `RGFTError`.

A message says what was expected, what was found, where (component, key, file, step) and what to do.
"""

from __future__ import annotations


class RGFTError(Exception):
    """Base of all errors raised on purpose by RGFT."""


class ConfigError(RGFTError, ValueError):
    """One or more settings are wrong; `problems` lists all of them at once."""

    def __init__(self, problems: list[str] | str) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


class PartitionError(RGFTError, ValueError):
    """The model cannot be split into components: some element lies in none, or in several."""


class AttachError(RGFTError, RuntimeError):
    """The guide cannot be attached here: attached twice, too late, or without effect."""


class OptimizerError(RGFTError, ValueError):
    """The optimizer cannot work on this granularity (states of blocks, kernels that may write beyond slices)."""


class StorageError(RGFTError, RuntimeError):
    """A view no longer shares its weight's memory, so that training it would change nothing."""


class BudgetError(RGFTError, ValueError):
    """No plan fits the budget; the message gives the smallest that would."""


class CacheError(RGFTError, ValueError):
    """Cached activations cannot be used for this model, cut or data."""


class NonFiniteError(RGFTError, ArithmeticError):
    """A loss, gradient or score is NaN or infinite."""


class DataError(RGFTError, ValueError):
    """A data file or a column of it cannot be used."""


class RunFolderError(RGFTError, OSError):
    """A run folder exists already, is incomplete or cannot be written."""


class RGFTWarning(UserWarning):
    """A setting without effect, or a result that deserves a second look."""
