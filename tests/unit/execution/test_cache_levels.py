"""A cut that is moved up: what was known at the old one is computed from there, once."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from rgft.execution.activation_cache import ActivationCache
from rgft.execution.switching import Switch
from rgft.plan import UpdatePlan
from tests.unit.execution.toy import Toy, toy_batch, toy_binding, toy_partition

IDS = [4, 7, 9, 2]
MASK = torch.tensor([[1] * 5, [1] * 4 + [0], [1] * 3 + [0] * 2, [1] * 5])


class Cached:
    """The toy with a cache, and which layers ran on how many rows in the last pass."""

    def __init__(self, folder: Path | None = None, *, max_bytes: int = 1 << 20) -> None:
        self.model = Toy().train()
        for module in self.model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0  # where the cut is does not change what comes out
        partition = toy_partition(self.model)
        self.names, self.switch = partition.names, Switch(self.model, toy_binding(self.model))
        self.cache = ActivationCache(self.model, partition, folder=folder, max_bytes=max_bytes)
        self.ran: list[tuple[int, int]] = []
        for position, layer in enumerate(self.model.layers):
            layer.linear.register_forward_hook(lambda m, a, o, position=position: self.ran.append((position, len(o))))

    def move(self, cut: int) -> None:
        """Nothing is stepped here: the head alone could train at any of these cuts."""
        multipliers = {name: float(name == "head") for name in self.names}
        self.switch.apply(UpdatePlan(step=0, multipliers=multipliers, cut=cut), 0)
        self.cache.set_cut(cut)

    def passes(self, ids: list[int], tokens: Tensor, mask: Tensor | None = None) -> tuple[int, Tensor]:
        """As a training step: identified, filled where that pays, forward, and the backward pass that is the proof."""
        self.ran.clear()
        kwargs = {} if mask is None else {"attention_mask": mask}
        self.cache.identify(ids, (tokens,), kwargs, tokens.shape[1])
        rows = self.cache.rows_by_level(ids, mask, tokens.shape[1])
        if len(rows) > 1:
            for level, some in rows.items():
                if level < self.cache.cut:
                    self.cache.fill(self.model, (tokens,), kwargs, ids, some, tokens.shape[1])
        level = self.cache.begin(ids, mask, tokens.shape[1])
        output = self.model(tokens, mask)
        self.cache.end()
        output.sum().backward()
        return level, output.detach()


@pytest.fixture(params=["memory", "disk"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path | None:
    return tmp_path if request.param == "disk" else None


def test_a_deeper_cut_is_computed_from_the_old_one_and_then_known(folder: Path | None) -> None:
    cached, tokens = Cached(folder), toy_batch()
    cached.move(2)
    assert cached.passes(IDS, tokens)[0] == 0
    level, expected = cached.passes(IDS, tokens)
    assert level == 2
    assert cached.ran == [(1, 4), (2, 4)]
    cached.move(4)
    level, output = cached.passes(IDS, tokens)
    assert (level, cached.ran) == (2, [(1, 4), (2, 4)])
    assert torch.equal(output, expected)
    level, output = cached.passes(IDS, tokens)
    assert (level, cached.ran) == (4, [])
    assert torch.equal(output, expected)
    assert cached.cache.upgrades == 4
    if folder is None:
        assert cached.cache.bytes == 4 * 5 * 8 * 4  # those of the old cut are gone


def test_rows_of_all_kinds_in_one_batch(folder: Path | None) -> None:
    cached, tokens = Cached(folder), toy_batch()
    _, expected = Cached().passes(IDS, tokens, MASK)
    cached.move(2)
    cached.passes(IDS[:2], tokens[:2], MASK[:2])
    cached.move(3)
    cached.passes(IDS[1:2], tokens[1:2, :4], MASK[1:2, :4])
    cached.passes(IDS[2:3], tokens[2:3], MASK[2:3])
    cached.move(4)
    cached.passes(IDS[2:3], tokens[2:3], MASK[2:3])
    level, output = cached.passes(IDS, tokens, MASK)
    assert level == 4
    assert torch.allclose(output, expected, atol=1e-6)
    assert sum(rows for position, rows in cached.ran if position == 0) <= 2
    assert cached.passes(IDS, tokens, MASK)[0] == 4
    assert cached.ran == []


def test_padding_is_read_at_the_old_cut_only_where_that_was_proved_there() -> None:
    tokens = toy_batch()
    for is_proved in (False, True):
        cached = Cached()
        cached.move(2)
        if is_proved:
            cached.passes(IDS, tokens, MASK)
        else:
            cached.cache.begin(IDS, MASK, 5)
            cached.model(tokens, MASK)
            cached.cache.end()
        cached.move(3)
        assert cached.passes(IDS, tokens, MASK)[0] == (2 if is_proved else 0)


def test_known_and_unknown_rows_wait_for_the_proof_at_the_new_cut() -> None:
    cached, tokens = Cached(), toy_batch()
    cached.move(2)
    cached.passes(IDS[:3], tokens[:3], MASK[:3])
    cached.move(3)
    assert cached.passes(IDS, tokens, MASK)[0] == 0
    assert cached.ran == [(0, 4), (1, 4), (2, 4)]
    assert cached.passes(IDS, tokens, MASK)[0] == 3


def test_a_cut_that_comes_back_finds_what_still_holds() -> None:
    cached, tokens = Cached(), toy_batch()
    cached.move(2)
    cached.passes(IDS, tokens)
    cached.move(4)
    cached.passes(IDS[:2], tokens[:2])
    cached.move(3)  # the top layer may train now: its states are dropped
    assert [cached.passes(some, tokens[rows])[0] for some, rows in ((IDS[:2], [0, 1]), (IDS[2:], [2, 3]))] == [0, 2]
    cached.move(0)
    assert cached.cache.bytes == 0


def test_what_has_no_room_is_still_read_by_the_batch_that_it_was_computed_for() -> None:
    cached, tokens = Cached(max_bytes=2 * 5 * 8 * 4), toy_batch()
    expected = cached.passes(IDS, tokens)[1]
    cached.move(3)
    cached.passes(IDS[:2], tokens[:2])
    level, output = cached.passes(IDS, tokens)
    assert (level, cached.ran) == (3, [(0, 2), (1, 2), (2, 4)])  # the two unknown ones, once
    assert torch.allclose(output, expected, atol=1e-6)
    assert len(cached.cache) == 2
    cached.move(4)
    cached.passes(IDS[:2], tokens[:2])
    assert (len(cached.cache), cached.cache.bytes) == (2, 2 * 5 * 8 * 4)  # the old cut's made room for them


def test_rows_of_two_levels_without_room_are_computed_once() -> None:
    """A filling pass ends in the model's own hooks, too, where a guide's step ends the batch."""
    cached, tokens = Cached(), toy_batch()
    cached.move(2)
    expected = cached.passes(IDS, tokens)[1]
    cached.move(3)
    cached.cache.limit(1)
    others = [IDS[0], IDS[1], 30, 31]
    cached.model.register_forward_hook(lambda *_: cached.cache.end(), always_call=True)
    level, output = cached.passes(others, tokens)
    assert (level, cached.ran) == (3, [(1, 2), (0, 2), (1, 2), (2, 4)])
    assert torch.allclose(output, expected, atol=1e-6)


def test_a_restored_cache_knows_what_was_proved_at_each_cut() -> None:
    cached, tokens = Cached(), toy_batch()
    cached.move(2)
    cached.passes(IDS, tokens, MASK)
    cached.move(3)
    resumed = Cached()
    resumed.cache.load_state_dict(cached.cache.state_dict())
    (level, output), (found, again) = (each.passes(IDS, tokens, MASK) for each in (cached, resumed))
    assert level == found == 2
    assert torch.equal(output, again)


def test_a_restored_cache_reads_the_same_bytes(folder: Path | None) -> None:
    cached, tokens = Cached(folder), toy_batch()
    cached.move(2)
    cached.passes(IDS, tokens)
    cached.move(3)
    cached.passes(IDS[:2], tokens[:2])
    resumed = Cached(folder)
    resumed.cache.load_state_dict(cached.cache.state_dict())
    assert len(resumed.cache) == len(cached.cache)
    assert resumed.cache.bytes == cached.cache.bytes
    for some, rows in ((IDS[:2], [0, 1]), (IDS[2:], [2, 3]), (IDS, [0, 1, 2, 3])):
        (level, output), (found, again) = (each.passes(some, tokens[rows]) for each in (cached, resumed))
        assert level == found > 0
        assert torch.equal(output, again)
