"""GaLore and the sparse optimizers: what a step may move, what is kept of it, and which entries are chosen."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import AdamW

from rgft.bench.optimizers.choices import (
    DropAndGrow,
    LowRankMagnitude,
    PerNeuron,
    RowsOrColumns,
    TopShare,
    Unmasking,
)
from rgft.bench.optimizers.galore import GaLoreAdamW, svd_flops
from rgft.bench.optimizers.sparse import INDEX, Choice, SparseAdamW
from rgft.bench.optimizers.stand_ins import StandInAdamW
from rgft.errors import ConfigError
from rgft.execution.snapshot import Snapshot

SHAPES = ((6, 10), (12, 5))


def matrices(seed: int = 0) -> list[nn.Parameter]:
    draw = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=draw)) for shape in SHAPES]


def groups(held: Sequence[nn.Parameter], **settings: Any) -> list[dict[str, Any]]:
    return [{"params": list(held), "is_matrix": True, **settings}]


def give_gradients(held: Sequence[nn.Parameter], step: int) -> None:
    draw = torch.Generator().manual_seed(100 + step)
    for p in held:
        p.grad = torch.randn(p.shape, generator=draw)


def sparse(held: Sequence[nn.Parameter], choice: Choice, **settings: Any) -> SparseAdamW:
    return SparseAdamW(groups(held), lr=1e-2, choice=choice, **settings)


CHOICES: dict[str, Callable[[], Choice]] = {
    "gps": lambda: PerNeuron(count=2),
    "sift": lambda: TopShare(fraction=0.2),
    "grft": lambda: RowsOrColumns(fraction=0.3),
    "lift": lambda: LowRankMagnitude(fraction=0.2, rank=2, every=3),
    "id3": lambda: Unmasking(fraction=0.3, unmask_steps=5),
    "spiel": lambda: DropAndGrow(fraction=0.2, churn=0.5, every=2, window=1, until=20),
}
MADE: dict[str, Callable[[Sequence[nn.Parameter]], StandInAdamW]] = {
    **{name: lambda held, make=make: sparse(held, make(), weight_decay=0.1) for name, make in CHOICES.items()},
    "galore": lambda held: GaLoreAdamW(groups(held), lr=1e-2, weight_decay=0.1, rank=2, every=3),
}


@pytest.mark.parametrize("name", ["lift", "galore"])
def test_what_is_renewed_by_shares_of_a_run_is_charged_as_often_before_and_after_its_length_is_known(name: str) -> None:
    held, made = matrices(), list[int]()
    optimizer = (
        GaLoreAdamW(groups(held), lr=1e-2, rank=2, every=0.2)
        if name == "galore"
        else sparse(held, LowRankMagnitude(fraction=0.2, rank=2, every=0.2))
    )
    before = [step for step in range(23) if optimizer.occasional_flops(step)]
    assert len(before) == 5
    give_gradients(held, 0)
    with pytest.raises(ConfigError, match=r"every: expected a number of steps"):
        optimizer.step()
    if isinstance(optimizer, GaLoreAdamW):
        optimizer.over(23)
    else:
        optimizer.choice = optimizer.choice.over(23)
    assert [step for step in range(23) if optimizer.occasional_flops(step)] == [0, 5, 10, 15, 20]
    last: list[Tensor] = []
    for step in range(23):
        give_gradients(held, step)
        for p in held:
            p.data.add_(torch.randn_like(p))  # so that another choice would be made at every step
        optimizer.step()
        now = [optimizer.state[p]["projector" if name == "galore" else INDEX].clone() for p in held]
        made += [step] if not last or any(not torch.equal(a, b) for a, b in zip(now, last, strict=True)) else []
        last = now
    assert made == [0, 5, 10, 15, 20]


@pytest.mark.parametrize("name", CHOICES)
def test_only_chosen_entries_move_and_have_state(name: str) -> None:
    held = matrices()
    optimizer = sparse(held, CHOICES[name](), weight_decay=0.5)
    for step in range(7):
        before = [p.detach().clone() for p in held]
        give_gradients(held, step)
        optimizer.step()
        for p, old in zip(held, before, strict=True):
            state = optimizer.state[p]
            index: Tensor = state[INDEX]
            assert index.tolist() == sorted(set(index.tolist()))
            assert len(state["exp_avg"]) == len(state["exp_avg_sq"]) == len(index) < p.numel()
            elsewhere = torch.ones(p.numel(), dtype=torch.bool).index_fill(0, index, value=False)
            if name == "spiel":  # what it drops goes back to where it was
                elsewhere &= (p.detach() == old).flatten()
            assert torch.equal(p.detach().flatten()[elsewhere], old.flatten()[elsewhere])
            assert not torch.equal(p, old)


def test_all_entries_chosen_is_adamw() -> None:
    held, plain = matrices(), matrices()
    ours = sparse(held, TopShare(fraction=1.0), weight_decay=0.1)
    theirs = AdamW(plain, lr=1e-2, weight_decay=0.1)
    for step in range(4):
        for parameters, optimizer in ((held, ours), (plain, theirs)):
            give_gradients(parameters, step)
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(held, plain, strict=True))


def test_other_groups_are_adamw() -> None:
    vector, same = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))
    held = matrices()
    optimizers = [
        SparseAdamW([*groups(held), {"params": [vector]}], lr=1e-2, choice=TopShare(fraction=0.1)),
        AdamW([same], lr=1e-2, weight_decay=0.0, fused=True),
    ]
    give_gradients(held, 0)
    for p, optimizer in zip((vector, same), optimizers, strict=True):
        p.grad = torch.arange(4.0)
        optimizer.step()
    assert torch.equal(vector, same)


@pytest.mark.parametrize("name", MADE)
@pytest.mark.parametrize("way", ["resumed", "rewound"])
def test_it_goes_on_bit_for_bit(name: str, way: str) -> None:
    def train(held: Sequence[nn.Parameter], optimizer: StandInAdamW, steps: range) -> None:
        for step in steps:
            give_gradients(held, step)
            optimizer.step()

    held = matrices()
    optimizer = MADE[name](held)
    train(held, optimizer, range(4))
    if way == "resumed":
        other = [nn.Parameter(p.detach().clone()) for p in held]
        resumed = MADE[name](other)
        resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        train(held, optimizer, range(4, 9))
        train(other, resumed, range(4, 9))
        assert all(torch.equal(a, b) for a, b in zip(held, other, strict=True))
        return
    point = Snapshot(nn.ParameterList(held), held, optimizer)
    train(held, optimizer, range(4, 9))
    expected = [p.detach().clone() for p in held]
    point.restore()
    train(held, optimizer, range(4, 9))
    assert all(torch.equal(a, b) for a, b in zip(held, expected, strict=True))


def test_galore_updates_have_its_rank_and_state_its_size() -> None:
    held = matrices()
    optimizer = GaLoreAdamW(groups(held), lr=1e-2, rank=2, every=3)
    for step in range(5):
        before = [p.detach().clone() for p in held]
        projectors = [optimizer.state[p].get("projector") for p in held]
        give_gradients(held, step)
        optimizer.step()
        for p, old, known in zip(held, before, projectors, strict=True):
            assert torch.linalg.matrix_rank(p.detach() - old, rtol=1e-4) == 2
            basis = optimizer.state[p]["projector"]
            assert basis.shape == (min(p.shape), 2)
            torch.testing.assert_close(basis.T @ basis, torch.eye(2))
            assert sum(optimizer.state[p]["exp_avg"].shape) == 2 + max(p.shape)
            assert (known is basis) is (step % 3 != 0)


def test_galore_of_full_rank_is_adam_on_the_rotated_gradient() -> None:
    (held, _) = matrices()
    optimizer = GaLoreAdamW(groups([held]), lr=1e-2, rank=6, every=100, scale=0.5)
    before = held.detach().clone()
    give_gradients([held], 0)
    assert held.grad is not None
    rotated = torch.linalg.svd(held.grad, full_matrices=False)
    optimizer.step()
    signs = torch.sign(rotated.U.T @ held.grad)  # Adam's first step is the gradient's sign
    torch.testing.assert_close(held.detach() - before, -0.5 * 1e-2 * rotated.U @ signs, atol=1e-6, rtol=1e-4)


def test_products_and_decompositions_are_told() -> None:
    held = matrices()
    galore = GaLoreAdamW(groups(held), lr=1e-2, rank=2, every=3)
    assert galore.product_flops() == {id(p): 2 * 2 * 2 * p.numel() for p in held}
    decompositions = sum(svd_flops(shape) for shape in SHAPES)
    assert [galore.occasional_flops(step) for step in range(4)] == [decompositions, 0.0, 0.0, decompositions]
    lift = sparse(held, CHOICES["lift"]())
    assert lift.occasional_flops(0) == decompositions + 2 * 2 * sum(p.numel() for p in held)
    assert lift.occasional_flops(1) == 0.0
    assert sparse(held, CHOICES["gps"]()).occasional_flops(0) == 0.0
    assert svd_flops((3, 5)) == svd_flops((5, 3)) == 6 * 5 * 9 + 20 * 27


def test_gps_takes_as_many_of_each_neuron() -> None:
    held = matrices()
    optimizer = sparse(held, PerNeuron(count=2))
    give_gradients(held, 0)
    optimizer.choose_from({p: p.grad for p in held if p.grad is not None})
    for p in held:
        chosen = torch.zeros(p.numel(), dtype=torch.bool).index_fill(0, optimizer.state[p][INDEX], value=True)
        assert (chosen.view_as(p).sum(1) == 2).all()
        assert p.grad is not None
        kept, left = p.grad.abs()[chosen.view_as(p)], p.grad.abs().masked_fill(chosen.view_as(p), 0.0)
        assert (kept.view(-1, 2).min(1).values >= left.max(1).values).all()


def test_sift_takes_the_largest_of_all_matrices() -> None:
    held = matrices()
    optimizer = sparse(held, TopShare(fraction=0.25))
    give_gradients(held, 0)
    held[0].grad = 100 * held[0].grad  # type: ignore[operator]
    optimizer.choose_from({p: p.grad for p in held if p.grad is not None})
    assert [len(optimizer.state[p][INDEX]) for p in held] == [30, 0]
    optimizer.step()  # a matrix of which nothing trains
    assert torch.equal(held[1], matrices()[1])


def test_grft_takes_whole_rows_or_columns_and_pulls_back() -> None:
    held = matrices()
    optimizer = sparse(held, RowsOrColumns(fraction=0.25), penalty=0.3)
    give_gradients(held, 0)
    assert held[0].grad is not None
    held[0].grad[:, 3] += 50.0
    optimizer.step()
    chosen = torch.zeros(60, dtype=torch.bool).index_fill(0, optimizer.state[held[0]][INDEX], value=True).view(6, 10)
    assert chosen[:, 3].all()
    assert set(chosen.sum(0).tolist()) == {0, 6}
    value, start = optimizer._value(held[0]), optimizer.state[held[0]]["initial"]
    assert not torch.equal(value, start)
    held[0].grad.zero_()
    torch.testing.assert_close(optimizer._gradient(held[0]), 0.3 * (value - start))


def test_id3_grows_at_an_even_pace_and_keeps_what_it_has() -> None:
    held = matrices()
    choice = Unmasking(fraction=0.3, unmask_steps=5)
    optimizer, before = sparse(held, choice), [set[int](), set[int]()]
    for step in range(7):
        give_gradients(held, step)
        optimizer.step()
        now = [set(optimizer.state[p][INDEX].tolist()) for p in held]
        assert sum(map(len, now)) == choice.quota(step, 120)
        assert all(old <= new for old, new in zip(before, now, strict=True))
        before = now
    assert sum(map(len, before)) == 36


def test_spiel_exchanges_at_a_constant_count_and_takes_back_what_it_drops() -> None:
    (held, _) = matrices()
    start = held.detach().flatten().clone()
    optimizer = sparse([held], DropAndGrow(fraction=0.2, churn=0.5, every=2, window=1, until=20))
    seen: list[set[int]] = []
    for step in range(6):
        give_gradients([held], step)
        optimizer.step()
        index = optimizer.state[held][INDEX]
        seen.append(set(index.tolist()))
        assert len(index) == 12
        outside = torch.ones(60, dtype=torch.bool).index_fill(0, index, value=False)
        assert torch.equal(held.detach().flatten()[outside], start[outside])
        assert torch.equal(optimizer.state[held]["pretrained"], start[index])
    assert [old == new for old, new in pairwise(seen)] == [True, False, True, False, True]
    assert len(seen[1] - seen[2]) == 5  # half of 12, at cos(π/10)


def test_lift_follows_the_low_rank_part_and_carries_moments() -> None:
    (held, _) = matrices()
    u, v = torch.randn(6, 1, generator=torch.Generator().manual_seed(1)), torch.zeros(1, 10)
    v[0, :3] = 10.0
    with torch.no_grad():
        held.copy_(u @ v + 0.01 * held)
    optimizer = sparse([held], LowRankMagnitude(fraction=0.1, rank=1, every=2))
    give_gradients([held], 0)
    optimizer.step()
    index = optimizer.state[held][INDEX]
    assert (index % 10 < 3).all()
    moments = dict(zip(index.tolist(), optimizer.state[held]["exp_avg"].tolist(), strict=True))
    give_gradients([held], 1)
    optimizer.step()
    with torch.no_grad():
        held[:, :2] = 0.0
    optimizer._prepare([held])
    new = optimizer.state[held]
    assert (new[INDEX] % 10 == 2).all()
    for position, value in zip(new[INDEX].tolist(), new["exp_avg"].tolist(), strict=True):
        assert (value == 0.0) is (position not in moments)


def test_settings_out_of_range_are_refused_together() -> None:
    with pytest.raises(ConfigError, match=r"galore.rank[\s\S]*galore.every[\s\S]*galore.scale"):
        GaLoreAdamW(groups(matrices()), lr=1e-2, rank=0, every=0, scale=0.0)
    with pytest.raises(ConfigError, match=r"choice\.every"):
        DropAndGrow(every=2, window=3)
    with pytest.raises(ConfigError, match=r"choice\.fraction"):
        TopShare(fraction=0.0)
