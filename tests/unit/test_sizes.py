from typing import Any

import pytest

from rgft import Budget, Config
from rgft.config import apply_overrides
from rgft.errors import ConfigError
from rgft.sizes import parsed_bytes, size_text


@pytest.mark.parametrize(("text", "expected"), [
    ("8GB", 8 * 10**9), ("8gb", 8 * 10**9), ("8 GB", 8 * 10**9), ("8GiB", 8 * 2**30), ("7.5GiB", 7.5 * 2**30),
    ("500MB", 5 * 10**8), ("512 MiB", 2**29), (".5KB", 500), ("1024KiB", 2**20), ("2TB", 2 * 10**12),
    ("100", 100), ("100B", 100), (8_000_000_000, 8 * 10**9), (8e9, 8 * 10**9), (1, 1),
])  # fmt: skip
def test_forms(text: Any, expected: int) -> None:
    assert parsed_bytes(text, setting="memory") == expected
    assert Budget(memory=text).memory == Budget(memory=text).memory_bytes == expected
    assert Config(budget={"memory": text}).budget == Budget(memory=expected)


@pytest.mark.parametrize("wrong", ["8G", "GB", "-8GB", "8 G B", "", "all", "1e9", "0GB", 0, -5, 1.5, True, [1], "0.4B",
                                   float("inf"), float("nan")])  # fmt: skip
def test_what_is_no_amount_of_memory(wrong: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        Config(budget={"memory": wrong, "flops": 2})
    first, second = sorted(caught.value.problems)
    assert first.startswith("budget.flops: expected a share")
    assert second.startswith("budget.memory: expected a number of bytes > 0, or one with a unit")
    assert '"8GB"' in second
    assert second.endswith(f"found {wrong!r}")


def test_beside_other_budgets_and_in_files() -> None:
    both = Config(budget=Budget(flops=0.3, memory="8GB"))
    assert Config.from_dict(both.to_dict()) == both
    assert both.to_dict()["budget"] == {"flops": 0.3, "memory": 8 * 10**9}
    assert Budget(memory="8GB").is_spent is False
    assert Budget(memory="8GB", seconds=3).is_spent
    with pytest.raises(ConfigError, match="found none"):
        Budget()


def test_as_an_override_it_replaces_no_other_budget() -> None:
    assert apply_overrides({"budget": 0.5}, ["budget.memory=8GB"]) == {"budget": {"flops": 0.5, "memory": "8GB"}}
    assert apply_overrides({}, ["budget.memory=500"]) == {"budget": {"memory": 500}}
    assert apply_overrides({"budget": "none"}, ["budget.memory=8GB"]) == {"budget": {"memory": "8GB"}}


def test_amounts_for_people() -> None:
    found = [size_text(amount) for amount in (17, 999, 1000, 12_345, 210_400_000, 8 * 10**9, 1_234_000_000_000)]
    assert found == ["17 B", "999 B", "1 KB", "12.3 KB", "210 MB", "8 GB", "1.23 TB"]
