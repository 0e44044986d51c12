"""Components that are trained by low-rank pairs: what changes, what must not, and what they go with."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import AdamW

from rgft import Config, Guide
from rgft.allocation.base import Policy, Situation
from rgft.allocation.selection import make_plan
from rgft.errors import AttachError, ConfigError, RGFTWarning
from rgft.execution.fingerprint import prefix_fingerprint
from rgft.execution.low_rank import LowRank
from rgft.plan import UpdatePlan
from tests.families import FAMILIES, loss_of
from tests.integration.loops import (
    Examples,
    adamw,
    assert_same_state,
    collate,
    guided,
    state_of,
    trimmed,
    without_dropout,
)
from tests.integration.policies import steer

GRANULARITIES = ("layer", "block", "head")


def config(granularity: str = "layer", *, rank: int = 3, others: str = "dense", **settings: Any) -> Config:
    blocks = {"ffn_blocks": 2} if granularity == "head" else {}
    pairs = {"rank": rank, "others": others, "lr_multiplier": 1.0}
    update = {"low_rank": pairs, **settings.pop("update", {})}
    return Config(**{"preset": "full", "granularity": granularity, **blocks, "update": update, **settings})


def pairs_of(guide: Guide) -> LowRank:
    assert guide._binding.low_rank is not None
    return guide._binding.low_rank


class Forms(Policy):
    """What is on at a step, and what of it is trained by pairs, by hand."""

    name = "forms"

    def __init__(self, active: Any, low_rank: Any) -> None:
        self._active, self._low_rank = active, low_rank

    def decide(self, situation: Situation) -> UpdatePlan:
        plan = make_plan(situation, self._active(situation.step), reason="by hand")
        low_rank = tuple(n for n in plan.multipliers if n in self._low_rank(situation.step))
        return UpdatePlan(**{**plan.to_dict(), "low_rank": low_rank})


def everything(guide: Guide) -> dict[str, list[Tensor]]:
    """Copies of weights and pairs by component."""
    return {name: [p.detach().clone() for p in held] for name, held in guide._binding.held.items()}


# ---------------------------------------------------------------- attaching and leaving


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "t5", "vit", "mixtral", "torch_transformer_encoder"])
def test_a_new_pair_changes_nothing(name: str, granularity: str) -> None:
    """Not a bit of outputs and state, nor the global random state; and all of it can be taken back."""
    family = FAMILIES[name]
    model = family.build().eval()
    batch, keys = family.batch(), list(model.state_dict())
    modules, parameters = [n for n, _ in model.named_modules()], [n for n, _ in model.named_parameters()]
    expected, before, random = model(**batch).logits.detach(), copy.deepcopy(model), torch.get_rng_state()
    hooks = sum(len(m._forward_hooks) + len(m._state_dict_hooks) for m in model.modules())
    guide = Guide(model, config(granularity, rank=2))
    assert torch.equal(torch.get_rng_state(), random)
    guide._executor.apply(guide.plan, 0)
    assert pairs_of(guide).running == frozenset(pairs_of(guide).sites)
    with torch.enable_grad():
        assert torch.equal(model(**batch).logits, expected)
    assert list(model.state_dict()) == keys
    assert_same_state(model, before)
    guide.detach()
    assert [n for n, _ in model.named_modules()] == modules
    assert [n for n, _ in model.named_parameters()] == parameters
    assert sum(len(m._forward_hooks) + len(m._state_dict_hooks) for m in model.modules()) == hooks
    assert all(p.requires_grad for p in model.parameters())
    assert_same_state(model, before)


def test_the_same_seed_draws_the_same_pairs_and_another_does_not() -> None:
    first, second, other = (
        [p.detach() for p in pairs_of(Guide(FAMILIES["bert"].build(), config(seed=seed))).held.values() for p in p]
        for seed in (0, 0, 1)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_training_leaves_merged_weights(granularity: str) -> None:
    family = FAMILIES["bert"]
    model = family.build()
    start = copy.deepcopy(model).eval()
    guide = Guide(model, config(granularity))
    guided(guide, adamw(guide), Examples(family), epochs=2)
    model.eval()
    batch, trained = family.batch(seed=9), model(**family.batch(seed=9)).logits.detach()
    assert not torch.allclose(trained, start(**batch).logits, atol=1e-3)
    plain = family.build().eval()
    plain.load_state_dict(model.state_dict())  # what a user saves on the way
    torch.testing.assert_close(plain(**batch).logits, trained, rtol=1e-5, atol=1e-6)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(**batch).logits, trained)  # with pairs of its own
    saved = state_of(model)
    guide.detach()
    assert all(torch.equal(saved[name], value) for name, value in model.state_dict().items())
    torch.testing.assert_close(model(**batch).logits, trained, rtol=1e-5, atol=1e-6)


def test_what_is_loaded_is_the_whole_weight() -> None:
    family = FAMILIES["bert"]
    model, other = family.build(), family.build(seed=5)
    guide = Guide(model, config("head"))
    guided(guide, adamw(guide), Examples(family), steps=3)
    model.load_state_dict(other.state_dict())
    model.eval()
    other.eval()
    assert torch.equal(model(**family.batch()).logits, other(**family.batch()).logits)
    guide.detach()
    assert_same_state(model, other)


@pytest.mark.parametrize("granularity", ["layer", "head"])
@pytest.mark.parametrize("others", ["dense", "frozen"])
def test_what_is_off_keeps_every_bit_of_weights_and_pairs(granularity: str, others: str) -> None:
    family = FAMILIES["bert"]
    guide = Guide(family.build(), config(granularity, others=others))
    low_rank, names = pairs_of(guide), guide.partition.names
    active = [set(names), set(names[::2]), set(names[1::2]), set(names[len(names) // 2 :])]
    steer(guide, Forms(lambda step: active[step % 4], lambda step: set(low_rank.sites)))
    optimizer = AdamW(guide.param_groups(1e-2, weight_decay=0.1), lr=1e-2)
    before = everything(guide)

    def check(guide: Guide) -> None:
        after = everything(guide)
        for name in names:
            same = [torch.equal(a, b) for a, b in zip(before[name], after[name], strict=True)]
            if name not in active[(guide.step_count - 1) % 4]:
                assert all(same), name
                continue
            of_pairs = len(low_rank.pairs.get(name, ()))
            dense, paired = same[: len(same) - of_pairs], same[len(same) - of_pairs :]
            assert not any(paired), name
            with_pair = {site.position for site in low_rank.sites.get(name, ())}
            for position, is_same in enumerate(dense):
                is_frozen = position in with_pair or (bool(of_pairs) and others == "frozen")
                assert is_same == is_frozen, (name, position)
        before.update(after)

    guided(guide, optimizer, Examples(family, count=32), epochs=1, after_step=check)
    assert guide.step_count == 8
    held = {id(p) for pairs in low_rank.sites for p in low_rank.parts[low_rank.weight_part(pairs)]}
    assert not any(id(p) in held for p in optimizer.state)  # frozen weights have no state


# ---------------------------------------------------------------- from one form to the other


@pytest.mark.parametrize("granularity", ["layer", "head"])
@pytest.mark.parametrize("moments", ["keep", "reset", "decay", "offload"])
def test_forms_change_in_the_middle_of_a_run(granularity: str, moments: str) -> None:
    """Pairs are merged where the plan says so, without a jump; moments go as those of what goes off."""
    family = FAMILIES["bert"]
    model = without_dropout(family.build()).double()
    guide = Guide(model, config(granularity, update={"moments": moments}, policy={"name": "all_on"}))
    low_rank = pairs_of(guide)
    some = set(list(low_rank.sites)[::2])
    forms = [set(low_rank.sites), some, set(), set(low_rank.sites), some]
    steer(guide, Forms(lambda step: guide.partition.names, lambda step: forms[step % 5]))
    optimizer, batch = adamw(guide), family.batch(seed=7)
    outputs: list[Tensor] = []
    for step, training in enumerate(guide.batches(Examples(family), batch_size=4, collate_fn=collate, epochs=2)):
        if outputs:
            guide.begin_step()
            assert torch.allclose(model.eval()(**batch).logits, outputs[-1], rtol=0, atol=1e-12)
            model.train()
        guide.loss(training).backward()
        assert low_rank.in_form == frozenset(forms[step % 5])
        for name in low_rank.sites:
            a, b, *_ = low_rank.pairs[name]
            is_paired = name in forms[step % 5]
            assert (b.grad is not None) is is_paired
            assert (low_rank.parts[low_rank.weight_part(name)][0].grad is None) is is_paired
            assert is_paired or not b.detach().any()
            if step % 5 == 2 and step > 2:
                held = optimizer.state.get(a)
                assert (held is None) is (moments == "reset")
        guide.step(optimizer)
        optimizer.zero_grad()
        outputs.append(model.eval()(**batch).logits.detach())
        model.train()
    assert guide.step_count == 12
    assert len({plan.pairs for plan in guide.plans}) == 3
    guide.detach()
    assert torch.allclose(model.eval()(**batch).logits, outputs[-1], rtol=0, atol=1e-12)


def test_a_form_changes_only_while_a_component_is_on() -> None:
    family = FAMILIES["bert"]
    guide = Guide(family.build(), config())
    low_rank, names = pairs_of(guide), guide.partition.names
    layer = next(iter(low_rank.sites))
    active = [set(names), set(names) - {layer}, set(names)]
    steer(guide, Forms(lambda step: active[step], lambda step: set(low_rank.sites) - ({layer} if step else set())))
    optimizer, seen = adamw(guide), []

    def look(guide: Guide) -> None:
        seen.append((layer in low_rank.in_form, layer in low_rank.running))

    guided(guide, optimizer, Examples(family), steps=3, after_step=look)
    assert seen == [(True, True), (True, True), (False, False)]


@pytest.mark.parametrize("granularity", ["layer", "head"])
def test_the_mean_of_iterates_survives_a_merge(granularity: str) -> None:
    """With A held still, the mean of W + s B A is linear in what is averaged, so that it can be told from outside."""
    family = FAMILIES["bert"]
    model = without_dropout(family.build()).double()
    guide = Guide(model, config(granularity, others="frozen", update={"average_last": 0.9}))
    low_rank = pairs_of(guide)
    steer(guide, Forms(lambda step: set(low_rank.sites), lambda step: set(low_rank.sites) if step < 4 else set()))
    groups = guide.param_groups(1e-2)
    firsts = {id(p) for pairs in low_rank.pairs.values() for p in pairs[::2]}
    groups = [{**g, "params": [p for p in g["params"] if (id(p) in firsts) is is_a], "lr": 0.0 if is_a else 1e-2}
              for g in groups for is_a in (True, False)]  # fmt: skip
    optimizer = AdamW([g for g in groups if g["params"]], lr=1e-2, weight_decay=0.0)
    iterates: list[dict[str, Tensor]] = []

    def look(guide: Guide) -> None:
        if guide.is_averaging:
            iterates.append(state_of(model))

    guided(guide, optimizer, Examples(family, count=32), after_step=look)
    assert 4 < len(iterates) < 9
    guide.detach()
    for name, value in model.state_dict().items():
        mean = torch.stack([iterate[name] for iterate in iterates]).mean(0)
        torch.testing.assert_close(value, mean, rtol=1e-9, atol=1e-12, msg=name)


def test_a_cached_layer_that_is_a_linear_layer_itself_does_not_compute_its_pairs() -> None:
    """Of a plain MLP the layers have the pairs, whose inputs a skipped layer does not see."""
    family, found = FAMILIES["mlp"], []
    for cache in ("memory", "none"):
        guide = Guide(family.build(), config(rank=2, execution={"cache": cache}, policy={"name": "all_on"}))
        depths = {component.name: component.depth for component in guide.partition}
        cuts = [0, 2, 2, 3, 3, 3, 2, 2, 0]
        steer(guide, Forms(lambda s: [n for n, d in depths.items() if d >= cuts[s]], lambda s: depths))  # noqa: B023
        optimizer = adamw(guide)
        guided(guide, optimizer, Examples(family, count=12), epochs=3)
        assert guide.cache is None or (guide.cache.hits > 0 and guide.cache.upgrades > 0)
        found.append(everything(guide))
        guide.detach()
    for component, tensors in found[1].items():
        for cached, plain in zip(found[0][component], tensors, strict=True):
            torch.testing.assert_close(cached, plain, rtol=1e-4, atol=1e-6, msg=component)


@pytest.mark.parametrize("granularity", ["block", "head"])
def test_components_that_are_nothing_but_pairs_are_averaged(granularity: str) -> None:
    """Attention without biases has no other part."""
    family = FAMILIES["llama"]
    guide = Guide(family.build(), config(granularity, update={"average_last": 0.5}))
    pairs = pairs_of(guide)
    assert any(not pairs.parts[name] for name in pairs.sites)
    guided(guide, adamw(guide), Examples(family, count=16))
    assert guide.step_count == 4


# ---------------------------------------------------------------- with all else


RUNS: dict[str, dict[str, Any]] = {
    "rgft": {"preset": "rgft", "budget": 0.7, "probe": {"interval": 3, "size": 2}, "warmup_fraction": 0.3,
             "mask": {"frozen_fraction": 0.5}},
    "rgft with heads": {"preset": "rgft", "granularity": "head", "budget": 0.7, "probe": {"interval": 3, "size": 2},
                        "warmup_fraction": 0.2, "mask": {"frozen_fraction": 0.5}, "update": {"moments": "offload"}},
    "proposal_b": {"preset": "proposal_b"},
    "lisa": {"policy": {"name": "lisa", "every": 2}, "update": {"moments": "reset"}},
    "full, frozen others": {"others": "frozen"},
}  # fmt: skip


class Session:
    """Everything that a process holds."""

    def __init__(self, settings: dict[str, Any], seed: int = 0) -> None:
        family = FAMILIES["bert"]
        self.model = family.build(seed)
        self.guide = Guide(self.model, config(**settings))
        self.optimizer = adamw(self.guide, weight_decay=0.1)
        self.scheduler = self.guide.scheduler(self.optimizer)
        self.guide.set_optimizer(self.optimizer)
        self.data = Examples(family)

    def run(self, until: int) -> None:
        for batch in self.guide.batches(self.data, batch_size=4, collate_fn=trimmed, epochs=2):
            self.guide.loss(batch).backward()
            self.guide.step(self.optimizer, self.scheduler, max_grad_norm=1.0)
            self.optimizer.zero_grad()
            if self.guide.step_count == until:
                return

    def save(self) -> bytes:
        file = io.BytesIO()
        parts = ("model", "optimizer", "scheduler", "guide")
        torch.save({part: getattr(self, part).state_dict() for part in parts}, file)
        return file.getvalue()

    def load(self, saved: bytes) -> None:
        state = torch.load(io.BytesIO(saved), weights_only=True)
        for part in ("model", "optimizer", "scheduler", "guide"):
            getattr(self, part).load_state_dict(state[part])


@pytest.mark.parametrize("name", RUNS)
def test_resumed_equals_uninterrupted(name: str) -> None:
    settings = RUNS[name]
    torch.manual_seed(7)
    whole = Session(copy.deepcopy(settings))
    whole.run(11)
    assert whole.guide.step_count >= 7
    expected = everything(whole.guide)
    if "rgft" in name:
        assert whole.guide.plan.cut > 1
        assert whole.guide.cache is not None
        assert whole.guide.cache.hits > 0
    for interruption in (1, 5):
        torch.manual_seed(7)
        first = Session(copy.deepcopy(settings))
        first.run(interruption)
        saved = first.save()
        torch.manual_seed(99)
        second = Session(copy.deepcopy(settings), seed=3)
        second.load(saved)
        second.run(11)
        found = everything(second.guide)
        for component, tensors in expected.items():
            assert all(torch.equal(a, b) for a, b in zip(found[component], tensors, strict=True)), component
        assert second.guide.ledger.spent_flops == whole.guide.ledger.spent_flops
        assert second.guide.error_map.values() == whole.guide.error_map.values()


def trained(
    granularity: str, *, precision: str = "fp32", dtype: torch.dtype = torch.float32, checkpointing: bool = False,
    accumulation: int = 1, batch_size: int = 4, cache: str = "none", fused: bool = False,
) -> dict[str, Tensor]:  # fmt: skip
    """Weights after six steps above a cut, under settings that should not matter."""
    family = FAMILIES["bert"]
    model: Any = without_dropout(family.build()).to(dtype)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})

    def loss(net: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"):
            return loss_of(net, batch)

    settings = config(
        granularity, policy={"name": "last_n", "layers": 1}, execution={"cache": cache}
    )  # fmt: skip
    guide = Guide(model, settings, loss=loss)
    guide.accumulation = accumulation
    optimizer = AdamW(guide.param_groups(1e-3), lr=1e-3, fused=fused)
    guided(guide, optimizer, Examples(family), batch_size=batch_size, accumulation=accumulation, clip=0.5, epochs=2)
    assert guide.step_count == 12
    if cache != "none":
        assert guide.cache is not None
        assert guide.cache.hits > 0
    assert guide.plan.cut == 2
    low_rank = pairs_of(guide)
    assert all(p.dtype is torch.float32 for pairs in low_rank.pairs.values() for p in pairs)
    moved = {name: any(bool(b.detach().any()) for b in pairs[1::2]) for name, pairs in low_rank.pairs.items()}
    assert {guide.partition[name].depth >= 2 for name, has in moved.items() if has} == {True}
    assert all(has for name, has in moved.items() if guide.partition[name].depth >= 2)
    guide.detach()
    return {name: value.float() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("granularity", ["layer", "head"])
@pytest.mark.parametrize(
    ("changes", "tolerance"),
    [
        ({"checkpointing": True}, 0.0),
        ({"cache": "memory"}, 1e-5),
        ({"cache": "memory", "checkpointing": True}, 1e-5),
        ({"accumulation": 2, "batch_size": 2}, 2e-2),
        ({"fused": True}, 1e-4),
        ({"precision": "bf16"}, 0.6),
    ],
    ids=str,
)
def test_goes_with(granularity: str, changes: dict[str, Any], tolerance: float) -> None:
    before = FAMILIES["bert"].build().state_dict()
    plain, found = trained(granularity), trained(granularity, **changes)
    apart = torch.stack([(found[n] - plain[n]).norm() for n in plain]).norm()
    moved = torch.stack([(plain[n] - before[n].float()).norm() for n in plain]).norm()
    assert moved > 0.05
    assert apart <= tolerance * moved


@pytest.mark.parametrize("granularity", ["layer", "head"])
def test_weights_in_bf16(granularity: str) -> None:
    """Pairs are kept in fp32, and steps too small for a weight in bf16 are not lost."""
    before = FAMILIES["bert"].build().to(torch.bfloat16).state_dict()
    found = trained(granularity, dtype=torch.bfloat16)
    assert any(not torch.equal(found[n], before[n].float()) for n in found)


def test_dw_is_not_made_and_the_ledger_says_so() -> None:
    family = FAMILIES["bert"]
    spent = {}
    for form in ("dense", "pairs"):
        settings = config(rank=1) if form == "pairs" else Config(preset="full")
        guide = Guide(family.build(), settings)
        guided(guide, adamw(guide), Examples(family), steps=3)
        ledger = guide.ledger
        spent[form] = ledger.to_dict()
        guide.detach()
    dense, pairs = spent["dense"], spent["pairs"]
    assert dense["pair_flops"] == 0.0 < pairs["pair_flops"] < 0.3 * dense["dw_flops"]
    assert pairs["dw_flops"] < 0.1 * dense["dw_flops"]  # of what lies outside the layers
    assert pairs["dw_flops"] + pairs["dw_skipped_flops"] == pytest.approx(dense["dw_flops"])
    for axis in ("forward_flops", "dx_flops", "reference_flops"):
        assert pairs[axis] == dense[axis]
    rows = ledger.as_rows()
    assert sum(flops for _, flops, _ in rows[:-1]) == pytest.approx(rows[-1][1])


def test_multipliers_scale_the_rate_of_pairs() -> None:
    """Adam's first step is its learning rate in each element."""
    family = FAMILIES["bert"]
    guide = Guide(family.build(), config(others="frozen"))
    low_rank = pairs_of(guide)
    factors = dict(zip(guide.partition.names, (1.0, 0.25, 0.5, 1.0), strict=False))
    plan = UpdatePlan(step=0, multipliers=factors, low_rank=tuple(low_rank.sites))
    optimizer = AdamW(guide.param_groups(1e-3), lr=1e-3, eps=1e-30)
    guide.set_optimizer(optimizer)
    guide._executor.apply(plan, 0)
    loss_of(guide.model, family.batch()).backward()
    optimizer.step()
    for name, pairs in low_rank.pairs.items():
        step = pairs[-1].detach().abs()
        assert torch.allclose(step[step > 0], torch.tensor(1e-3 * factors[name]), rtol=1e-3)


def test_pairs_may_have_a_rate_of_their_own() -> None:
    guide = Guide(
        FAMILIES["bert"].build(),
        config(update={"low_rank": {"rank": 2, "lr_multiplier": 5.0}}, classifier_lr_multiplier=10.0),
    )
    rates = {id(p): group["lr"] for group in guide.param_groups(1e-3) for p in group["params"]}
    low_rank = pairs_of(guide)
    assert {rates[id(p)] for pairs in low_rank.pairs.values() for p in pairs} == {5e-3}
    assert {rates[id(p)] for _, parameters in guide._binding for p in parameters} == {1e-3, 1e-2}


def test_an_optimizer_that_gives_pairs_the_rate_of_dense_weights_is_remarked_on(
    recwarn: pytest.WarningsRecorder,
) -> None:
    def attached(multiplier: float, groups: str) -> None:
        pairs = {"rank": 2, "lr_multiplier": multiplier}
        settings = config(update={"low_rank": pairs}, classifier_lr_multiplier=5.0)
        guide = Guide(FAMILIES["bert"].build(), settings)
        guide.set_optimizer(AdamW(guide.param_groups(1e-3) if groups == "own" else guide.model.parameters(), lr=1e-3))

    attached(5.0, "own")
    attached(1.0, "one")
    assert not recwarn.list
    with pytest.warns(RGFTWarning, match=r"group 0 .* one learning rate \(0\.001\).*5 times .*guide\.param_groups"):
        attached(5.0, "one")


# ---------------------------------------------------------------- signals


@pytest.mark.parametrize(
    ("granularity", "signal"),
    [
        *(("layer", signal) for signal in ("generalising_decrease", "grad_norm", "fisher", "taylor")),
        *(("head", signal) for signal in ("generalising_decrease", "grad_norm", "residual_dot")),
    ],
)
def test_components_are_scored_in_the_form_they_have(signal: str, granularity: str) -> None:
    """Probes score every component, on or off, ever trained or not; they move nothing."""
    family = FAMILIES["bert"]
    settings = config(
        granularity, preset="rgft", signal=signal, budget=None, probe={"interval": 2, "size": 4}, scaling="none",
        warmup_fraction=0.0, mask={"frozen_fraction": 0.5},
    )  # fmt: skip
    guide = Guide(family.build(), settings)
    low_rank, optimizer = pairs_of(guide), adamw(guide)
    guided(guide, optimizer, Examples(family, count=40), steps=5)
    assert guide.ledger.probes >= 2
    scored = {name for name in low_rank.sites if guide.error_map.is_observed(name)}
    assert scored == set(low_rank.sites)
    before, running = everything(guide), low_rank.running
    assert guide._decisions.probe()
    assert running == low_rank.running
    assert all(torch.equal(a, b) for n, ts in everything(guide).items() for a, b in zip(before[n], ts, strict=True))
    assert all(p.grad is None for held in guide._binding.held.values() for p in held)


def test_a_pairs_score_is_that_of_its_gradients() -> None:
    family = FAMILIES["bert"]
    guide = Guide(family.build(), config(others="frozen", signal="grad_norm", probe={"interval": 1, "size": 0}))
    low_rank, batch = pairs_of(guide), family.batch()
    guide._executor.apply(guide.plan, 0)
    loss_of(guide.model, batch).backward()
    assert guide._measurement is not None
    guide._measurement.observe_training(0)
    for name, pairs in low_rank.pairs.items():
        squares = sum(float(p.grad.double().square().sum()) for p in pairs if p.grad is not None)
        expected = (squares / sum(p.numel() for p in pairs)) ** 0.5
        assert guide.error_map.value(name) == pytest.approx(expected, rel=1e-5)


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize("signal", ["delta", "weight_magnitude", "low_rank_magnitude", "suppression"])
def test_signals_of_weights_are_refused(signal: str) -> None:
    model = FAMILIES["bert"].build()
    with pytest.raises(ConfigError, match=f"signal: '{signal}' looks at the weights themselves"):
        Guide(model, config(preset="rgft", signal=signal, scaling="none"))
    assert "_rgft_guide" not in model.__dict__


def test_components_without_a_linear_layer_are_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"update.low_rank.components: expected a component with the weight of a linear"
    ):
        Guide(FAMILIES["resnet"].build(), config())
    with pytest.raises(ConfigError, match=r"update.low_rank.components.*'ffns'.*nearest: ffn"):
        Guide(FAMILIES["bert"].build(), config(update={"low_rank": {"rank": 2, "components": ["ffns"]}}))


@pytest.mark.parametrize("granularity", ["layer", "adapter"])
def test_adapters_are_refused(granularity: str) -> None:
    wanted = {"rank": 2, "components": ["adapter", "layer"]}
    with pytest.raises(ConfigError, match="holds, an adapter already"):
        Guide(
            FAMILIES["peft_lora"].build(), Config(preset="full", granularity=granularity, update={"low_rank": wanted})
        )


class Shared(nn.Module):
    """Two layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x)))


class Bypassed(nn.Module):
    """Reads a layer's weight without calling the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(torch.relu(self.first(x)), self.second.weight, self.second.bias)


def test_shared_and_bypassed_weights_are_refused() -> None:
    def parts(model: nn.Module) -> dict[str, list[str]]:
        return {"all": [name for name, _ in model.named_parameters()]}

    settings = Config(preset="full", granularity=parts, update={"low_rank": {"rank": 2, "components": ["all"]}})
    with pytest.raises(ConfigError, match=r"'first.weight' is shared by 'first', 'second'"):
        Guide(Shared(), settings)
    guide = Guide(Bypassed(), settings, loss=lambda model, batch: model(batch).square().mean())
    data = [torch.randn(8) for _ in range(8)]
    with pytest.raises(AttachError, match=r"1 modules are never called, e.g. 'second'"):
        next(guide.batches(data, batch_size=4))


def test_plans_with_pairs_need_pairs() -> None:
    plan = UpdatePlan(step=0, multipliers={"a": 1.0}, low_rank=("a",))
    model = FAMILIES["bert"].build()
    names = Guide(copy.deepcopy(model), Config(preset="full")).partition.names
    plan = UpdatePlan(step=0, multipliers=dict.fromkeys(names, 1.0), low_rank=(names[1],))
    guide = Guide(model, Config(preset="full", policy={"name": "static", "plan": plan.to_dict()}))
    with pytest.raises(ConfigError, match=r"by a low-rank pair.*name the component in update.low_rank.components"):
        guided(guide, adamw(guide), Examples(FAMILIES["bert"]), steps=1)


def test_a_rank_that_saves_nothing_is_said() -> None:
    with pytest.warns(RGFTWarning, match=r"pairs of rank 8 save nothing at \d+ of \d+ places.*expected less than 6.4"):
        Guide(FAMILIES["bert"].build(), config("head", rank=8))


def test_states_at_a_cut_depend_on_the_pairs_below_it() -> None:
    """Or a cache on disk would hand out another run's; pairs that were never trained make no difference."""
    family = FAMILIES["bert"]
    model = family.build()

    def digest() -> str:
        return prefix_fingerprint(model, guide.partition, 2, "model")

    guide = Guide(model, Config(preset="full"))
    guide.detach()
    plain = digest()
    guide = Guide(model, config())
    assert digest() == plain
    steer(guide, Forms(lambda step: guide.partition.names[2:], lambda step: set(pairs_of(guide).sites)))
    optimizer = adamw(guide)
    guided(guide, optimizer, Examples(family), steps=2)
    assert guide.plan.cut == 2
    assert digest() == plain
    steer(guide, Forms(lambda step: guide.partition.names[1:], lambda step: set(pairs_of(guide).sites)))
    guided(guide, optimizer, Examples(family), steps=4)
    beside = digest()
    guide.detach()
    assert len({plain, beside, digest()}) == 3
