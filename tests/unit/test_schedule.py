import math

import pytest
import torch

from rgft.errors import ConfigError
from rgft.schedule import learning_rate_schedule


@pytest.mark.parametrize(
    ("shape", "expected"),
    [("linear", 0.5), ("cosine", 0.5 * (1 + math.cos(math.pi / 2))), ("constant", 1.0)],
)
def test_rate_follows_what_is_spent(shape: str, expected: float) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    spent = [0.0]
    scheduler = learning_rate_schedule(optimizer, lambda: spent[0], shape=shape, warmup=0.2)
    assert 0 < optimizer.param_groups[0]["lr"] < 0.1
    optimizer.step()
    for spent[0], factor in ((0.1, 0.5), (0.2, 1.0), (0.6, expected)):
        scheduler.step()
        assert optimizer.param_groups[0]["lr"] == pytest.approx(2.0 * factor)


def test_bad_settings() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    with pytest.raises(ConfigError, match="linear, cosine, constant"):
        learning_rate_schedule(optimizer, lambda: 0.0, shape="linaer")
    with pytest.raises(ConfigError, match="warmup"):
        learning_rate_schedule(optimizer, lambda: 0.0, warmup=1.0)
