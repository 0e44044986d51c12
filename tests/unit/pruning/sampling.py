"""Whether a mean over draws is what it should be, by a bound that would notice weights off by 5 %."""

from __future__ import annotations

from torch import Tensor

#: Standard errors: passed by chance in all but 6 of 100,000 draws of seeds.
BOUND = 4.0


def assert_unbiased(draws_DK: Tensor, expected_K: Tensor, skippable_K: Tensor) -> None:
    """The mean over D draws is as expected, and a wrong weight would show.

    Args:
        draws_DK: K quantities, D times.
        expected_K: their expectation.
        skippable_K: what the items that may be skipped contribute to it.
    """
    mean_K = draws_DK.double().mean(0)
    error_K = draws_DK.double().std(0) / len(draws_DK) ** 0.5
    assert bool(((mean_K - expected_K).abs() <= BOUND * error_K).all()), (mean_K, expected_K, error_K)
    power = (0.05 * skippable_K.double().abs() / error_K).max()
    assert power > BOUND + 2.5, f"5 % off would be {power:.1f} standard errors only"
