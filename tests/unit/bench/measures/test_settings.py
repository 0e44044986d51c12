"""An experiment's `evaluate`: all problems at once, and what cannot be measured is refused."""

import pytest

from rgft.bench.measures import Extra
from rgft.errors import ConfigError


def test_all_problems_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        Extra.from_dict(
            {
                "at": [0.5, 1.5], "wieghts": True, "general_texts": -1, "general_corpus": "newz", "probe": "bcc",
                "other_domains": ["imbd"],
            }
        )  # fmt: skip
    assert len(caught.value.problems) == 6
    assert "weights" in str(caught.value)
    assert "nearest: bbc" in str(caught.value)


def test_nothing_is_evaluated_unless_it_is_asked_for() -> None:
    extra = Extra.from_dict({})
    assert extra == Extra()
    assert not extra.follows_run


def test_shares_come_in_order() -> None:
    assert Extra.from_dict({"at": [0.5, 0.25]}).at == (0.25, 0.5)


def test_what_cannot_be_measured_is_refused() -> None:
    extra = Extra(at=(0.5,), probe="bbc", other_domains=("rotten_tomatoes",))
    extra.check(task="sst2", searches_rate=False)
    with pytest.raises(ConfigError, match="one learning rate"):
        extra.check(task="sst2", searches_rate=True)
    with pytest.raises(ConfigError, match="another task"):
        extra.check(task="bbc", searches_rate=False)
    with pytest.raises(ConfigError, match="is trained on"):
        extra.check(task="rotten_tomatoes", searches_rate=False)
