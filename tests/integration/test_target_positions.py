"""A language model's head at targets alone: the same loss and gradients, for the FLOPs that the ledger says."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rgft import Config, Guide
from rgft.batches import BatchStream
from rgft.execution import chunked_loss
from rgft.tasks.target_loss import TOKEN_LOSS_AT_TARGETS, chunked_losses, gathered_losses
from rgft.tasks.token_loss import IGNORED, number_of_targets, token_losses
from rgft.telemetry.flop_counter import count_flops
from tests.families import FAMILIES, VOCABULARY, Family, _decoder_sizes
from tests.integration.loops import Examples, adamw, collate, guided, trimmed
from tests.integration.policies import Scripted, steer
from tests.unit.execution.test_chunked_loss import Largest

DECODERS = [name for name, family in FAMILIES.items() if family.kind == "lm"]
Batch = dict[str, Tensor]


def tied_llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**_decoder_sizes(tie_word_embeddings=True)))


def untied_gemma() -> nn.Module:
    from transformers import GemmaConfig, GemmaForCausalLM

    return GemmaForCausalLM(GemmaConfig(**_decoder_sizes(head_dim=8, tie_word_embeddings=False)))


def biased_phi() -> nn.Module:
    from transformers import PhiConfig, PhiForCausalLM

    return PhiForCausalLM(PhiConfig(**_decoder_sizes()))


def capped_gemma2() -> nn.Module:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    return Gemma2ForCausalLM(Gemma2Config(**_decoder_sizes(head_dim=16, sliding_window=8)))


def scaled_granite() -> nn.Module:
    from transformers import GraniteConfig, GraniteForCausalLM

    return GraniteForCausalLM(GraniteConfig(**_decoder_sizes(logits_scaling=4.0)))


def scaled_cohere() -> nn.Module:
    from transformers import CohereConfig, CohereForCausalLM

    return CohereForCausalLM(CohereConfig(**_decoder_sizes()))


def adapted_head(**settings: Any) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(task_type="CAUSAL_LM", r=2, **settings)
    return get_peft_model(FAMILIES["llama"].make(), config)


MADE: dict[str, Callable[[], nn.Module]] = {
    "tied_llama": tied_llama,
    "untied_gemma": untied_gemma,
    "phi": biased_phi,
    "gemma2": capped_gemma2,
    "granite": scaled_granite,
    "cohere": scaled_cohere,
    "lora_on_head": lambda: adapted_head(target_modules=["q_proj", "lm_head"]),
    "head_beside_lora": lambda: adapted_head(target_modules=["q_proj"], modules_to_save=["lm_head"]),
}
#: Whose logits are not a plain linear layer's output.
GATHERED = {"gemma2", "granite", "cohere", "lora_on_head", "head_beside_lora"}
MODELS = [*DECODERS, *MADE]


def build(name: str) -> nn.Module:
    family = FAMILIES[name] if name in FAMILIES else Family(name, MADE[name], "lm")
    model = family.build()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def few(batch: Batch) -> Batch:
    """Of each third row's tokens every fifth is learnt, else nothing but the last of those that are no padding."""
    labels = batch["labels"].clone()
    for row, mine in enumerate(labels):
        known = (mine != IGNORED).nonzero().flatten()
        kept = known[::5] if row % 3 == 0 else known[-1:]
        mask = torch.ones_like(mine, dtype=torch.bool)
        mask[kept] = False
        mine.masked_fill_(mask, IGNORED)
    return {**batch, "labels": labels}


def gradients(model: nn.Module, batch: Batch, losses: Any, weights: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    found = losses(model, batch)
    (found * weights.to(found)).sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return found.detach(), gradients


def assert_alike(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    norms = {name: float(torch.linalg.vector_norm(gradient.double())) for name, gradient in expected.items()}
    for name, gradient in expected.items():
        least = 1e-3 * max(norms.values())  # a key's bias has none but for rounding
        distance = float(torch.linalg.vector_norm((found[name] - gradient).double()))
        assert distance <= tolerance * max(norms[name], least), name


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("losses", [chunked_losses, gathered_losses])
def test_loss_and_every_gradient_are_the_plain_ones(name: str, losses: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    if losses is chunked_losses and name in GATHERED:
        pytest.skip("refused: see test_what_is_found")
    monkeypatch.setattr(chunked_loss, "MIN_POSITIONS", 4)
    monkeypatch.setattr(chunked_loss, "CHUNK_ELEMENTS", 4 * VOCABULARY)
    weights = {"mean": torch.full((5,), 0.2), "unequal": torch.tensor([1.0, 0.0, -2.0, 0.5, 3.0])}
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        if name == "mixtral" and dtype == torch.float64:
            continue  # its experts' products exist in narrower types only
        model = build(name).to(dtype)
        whole = FAMILIES["llama"].batch(rows=5)
        for batch in (whole, few(whole)):
            for weight in weights.values():
                expected_loss, expected = gradients(model, batch, token_losses, weight)
                loss, found = gradients(model, batch, losses, weight)
                torch.testing.assert_close(loss, expected_loss, rtol=tolerance, atol=tolerance)
                assert_alike(found, expected, tolerance)


@pytest.mark.parametrize("name", ["gpt2", "tied_llama", "gemma2"])
@pytest.mark.parametrize("losses", [chunked_losses, gathered_losses])
def test_a_batch_without_targets(name: str, losses: Any) -> None:
    model, batch = build(name), FAMILIES["llama"].batch()
    batch["labels"] = torch.full_like(batch["labels"], IGNORED)
    loss, found = gradients(model, batch, losses, torch.ones(4))
    assert loss.tolist() == [0.0] * 4
    assert found
    assert not any(gradient.any() for gradient in found.values())


@pytest.mark.parametrize("losses", [chunked_losses, gathered_losses])
def test_under_autocast_and_accumulated(losses: Any) -> None:
    model = build("tied_llama")
    batches = [few(FAMILIES["llama"].batch(rows=5, seed=seed)) for seed in range(3)]

    def run(form: Any, *, is_exact: bool = False) -> dict[str, Tensor]:
        model.zero_grad()
        for batch in batches:
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=not is_exact):
                (form(model, batch).mean() / len(batches)).backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    exact, plain, found = run(token_losses, is_exact=True), run(token_losses), run(losses)
    assert_alike(run(losses, is_exact=True), exact, 1e-5)
    for name, gradient in exact.items():
        error, own = (torch.linalg.vector_norm(g[name] - gradient) for g in (found, plain))
        assert 0.0 < error < 1.3 * own + 1e-4 * torch.linalg.vector_norm(gradient), name


def test_beside_gradient_checkpointing() -> None:
    results = []
    for losses in (token_losses, chunked_losses):
        model: Any = build("llama").double()
        model.gradient_checkpointing_enable({"use_reentrant": False})
        results.append(gradients(model, few(FAMILIES["llama"].batch()), losses, torch.ones(4))[1])
    assert_alike(results[1], results[0], 1e-12)


# ---------------------------------------------------------------- what is found


def found_for(model: nn.Module, batch: Batch | None = None) -> Any:
    return TOKEN_LOSS_AT_TARGETS.find(model, FAMILIES["llama"].batch() if batch is None else batch)


@pytest.mark.parametrize("name", MODELS)
def test_what_is_found(name: str, caplog: pytest.LogCaptureFixture) -> None:
    model = build(name)
    token_losses(model, FAMILIES["llama"].batch())  # some models put in hooks of their own
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    before, flags = copy.deepcopy(model.state_dict()), [p.requires_grad for p in model.parameters()]
    with caplog.at_level(logging.INFO, "rgft"):
        found = found_for(model)
    assert found is (gathered_losses if name in GATHERED else chunked_losses)
    (said,) = [record.getMessage() for record in caplog.records]
    assert ("not in chunks: " in said) == (name in GATHERED)
    assert model.training
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()] == hooks


class Neighbours(nn.Linear):
    """A head that also reads the position before."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input + 0.1 * input.roll(1, dims=1))


def with_head(head: nn.Module) -> nn.Module:
    model: Any = build("llama")
    head.weight = model.lm_head.weight
    model.lm_head = head
    return model


def called_twice() -> nn.Module:
    model: Any = build("llama")
    own = model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        output = own(*args, **kwargs)
        output.logits = output.logits + 0.0 * model.lm_head(torch.zeros(1, 1, model.config.hidden_size)).sum()
        return output

    model.forward = forward
    return model


def without_name() -> nn.Module:
    model: Any = build("llama")
    model.get_output_embeddings = lambda: None
    return model


def compiled() -> nn.Module:
    model = build("llama")
    model.model.layers[0].compile(backend="aot_eager")  # type: ignore[union-attr, operator, index]
    return model


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: with_head(Neighbours(32, VOCABULARY, bias=False)), "loss or gradients differ"),
        (called_twice, "expected one call of the language model's head"),
        (lambda: build("llama").bfloat16(), "in torch.bfloat16 nothing could be told from rounding"),
        (compiled, "the model is compiled"),
        (lambda: torch.compile(build("llama"), backend="aot_eager"), "the model is compiled"),
        (without_name, "LlamaForCausalLM names no head"),
    ],
)
def test_what_cannot_be_proved_computes_everything_and_says_so(
    make: Callable[[], nn.Module], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "rgft"):
        assert found_for(make()) is None
    assert "the head is computed everywhere" in caplog.text
    assert reason in caplog.text


def test_a_batch_without_targets_proves_nothing(caplog: pytest.LogCaptureFixture) -> None:
    batch = FAMILIES["llama"].batch()
    with caplog.at_level(logging.INFO, "rgft"):
        assert found_for(build("llama"), {**batch, "labels": torch.full_like(batch["labels"], IGNORED)}) is None
    assert "the batch that would show it has no target" in caplog.text


def test_a_head_that_is_hooked_later_is_called_with_targets() -> None:
    model: Any = build("llama")
    batch = few(FAMILIES["llama"].batch())
    assert found_for(model) is chunked_losses
    expected = token_losses(model, batch)
    seen: list[Any] = []
    model.lm_head.register_forward_hook(lambda module, args, output: seen.append(tuple(output.shape)))
    torch.testing.assert_close(chunked_losses(model, batch), expected)
    assert seen == [(1, number_of_targets(batch), VOCABULARY)]


# ---------------------------------------------------------------- runs


class Answers(Examples):
    """Examples of which the last tokens are learnt, in some only one."""

    def __init__(self, count: int = 24, tokens: int = 12) -> None:
        super().__init__(FAMILIES["llama"], count, tokens)
        for number, row in enumerate(self.rows):
            known = int(row["attention_mask"].sum())
            row["labels"] = row["labels"].clone()
            row["labels"][: known - 1 - number % 3] = IGNORED


def guide_of(model: nn.Module, **settings: Any) -> Guide:
    return Guide(model, Config(**settings), loss=token_losses, loss_at_targets=TOKEN_LOSS_AT_TARGETS)


def is_head(name: str) -> bool:
    return "lm_head" in name or "embed" in name or "wte" in name


PLANS: dict[str, Callable[[Guide], set[str]]] = {
    "all": lambda guide: set(guide.partition.names),
    "head frozen": lambda guide: {c.name for c in guide.partition if not is_head(c.name)},
    "cut, head trained": lambda guide: {c.name for c in guide.partition if c.depth >= 2},
    "cut, head frozen": lambda guide: {c.name for c in guide.partition if c.depth >= 2 and not is_head(c.name)},
    "head alone": lambda guide: {c.name for c in guide.partition if c.depth > 1 and is_head(c.name)},
}


@pytest.mark.parametrize("name", ["llama", "tied_llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("data", [Answers(), Examples(FAMILIES["llama"], 24)], ids=["few", "many"])
def test_the_ledger_equals_the_count(name: str, plan: str, data: Examples) -> None:
    guide = guide_of(build(name), warmup_fraction=0.0, probe={"interval": 0})
    names = PLANS[plan](guide)
    if not names:
        pytest.skip("tied: the head lies at the bottom")
    steer(guide, Scripted(lambda s: names))
    optimizer = adamw(guide)
    targets, positions, unread_in_first = 0, 0, 0
    for batch in guide.batches(data, batch_size=4, collate_fn=trimmed, epochs=2):
        before = guide.ledger.spent_flops
        passed = count_flops(lambda batch=batch: guide.loss(batch).backward())
        modelled = guide.ledger.spent_flops - before
        assert modelled == pytest.approx(passed, rel=1e-6)
        targets, positions = targets + number_of_targets(batch), positions + batch["input_ids"].numel()
        unread_in_first = unread_in_first or positions - targets
        guide.step(optimizer)
        optimizer.zero_grad()
    assert guide.run_plan is not None
    assert guide.run_plan.head_at_targets
    ledger = guide.ledger
    assert ledger.passes == 12
    if "cut" in plan or plan == "head alone":
        assert guide.cache is not None
        assert guide.cache.hits > 0
        assert ledger.forward_cached_flops > 0.0
    width = 32 * VOCABULARY
    products = 1 + (plan != "head alone") + any(map(is_head, guide.active))
    assert ledger.head_flops == pytest.approx(products * 2 * width * targets)
    # Before the cache is read, one pass goes down to the cut, through a head that is alone, to prove padding unread.
    proof = 2 * width * unread_in_first if plan == "head alone" else 0
    assert ledger.unread_flops == pytest.approx(products * 2 * width * (positions - targets) + proof)
    summary = guide.summary()["flops"]
    assert summary["head_at_targets"] == ledger.head_flops
    assert summary["saved"]["unread_positions"] == ledger.unread_flops
    rows = ledger.as_rows()
    assert sum(flops for _, flops, _ in rows[:-1]) == pytest.approx(rows[-1][1])
    guide.detach()


def test_full_fine_tuning_computes_the_head_everywhere() -> None:
    """What a budget is a share of does not depend on what is spared."""
    plans = []
    for positions in ("all", "auto"):
        guide = guide_of(build("llama"), budget=0.3, execution={"positions": positions})
        plans.append(guide.prepare(BatchStream(Answers(), batch_size=4, collate_fn=trimmed, epochs=3, seed=0)))
        assert guide.costs is not None
        assert guide.costs.full_step(4, 12).head == (0.0 if positions == "all" else 4 * 12 * 3 * 2 * 32 * VOCABULARY)
        assert (guide.costs.target_share < 0.5) == (positions == "auto")
    assert plans[0].full_flops == plans[1].full_flops
    assert plans[0].flops == plans[1].flops


# Budgets at which what is saved comes to a whole step.
@pytest.mark.parametrize(("budget", "accumulation"), [(0.2, 1), (0.5, 1), (0.4, 2)])
def test_a_run_spends_its_budget_and_not_more(budget: float, accumulation: int) -> None:
    passes = []
    for positions in ("all", "auto"):
        guide = guide_of(build("llama"), budget=budget, execution={"positions": positions})
        guide.accumulation = accumulation
        guided(guide, adamw(guide), Answers(48), epochs=4, accumulation=accumulation, collate_fn=trimmed)
        spent = guide.summary()["flops"]["fraction_of_full"]
        assert spent <= budget
        assert spent > 0.9 * budget or guide.progress == 1.0
        passes.append(guide.ledger.passes)
    assert passes[1] > passes[0] or guide.progress == 1.0


def trained(positions: str, model: nn.Module, **settings: Any) -> tuple[dict[str, Tensor], Guide]:
    execution = {"positions": positions, **settings.pop("execution", {})}
    common = {"mask": {"frozen_fraction": 0.5}, "warmup_fraction": 0.2, "probe": {"interval": 4, "size": 2}}
    guide = guide_of(model, **{**common, "update": {"average_last": 0.0}, **settings, "execution": execution})
    torch.manual_seed(0)
    guided(guide, adamw(guide, lr=1e-3), Answers(), epochs=3, accumulation=2, collate_fn=collate)
    guide.detach()
    return {key: value.clone() for key, value in model.state_dict().items()}, guide


@pytest.mark.parametrize("name", ["llama", "tied_llama", "gemma2"])
@pytest.mark.parametrize("granularity", ["layer", "head"])
def test_a_whole_run_with_and_without_agrees(name: str, granularity: str) -> None:
    settings = {"granularity": granularity, **({"ffn_blocks": 2} if granularity == "head" else {})}
    (expected, plain), (found, narrowed) = (
        trained(positions, build(name).double(), **settings) for positions in ("all", "auto")
    )
    assert plain.plan.cut > 0
    assert narrowed.cache is not None
    assert narrowed.cache.hits > 0
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-6, atol=1e-8)
    assert plain.ledger.unread_flops == plain.ledger.head_flops == 0.0
    assert narrowed.ledger.unread_flops > 0.0
    assert narrowed.ledger.training_flops + narrowed.ledger.unread_flops == pytest.approx(plain.ledger.training_flops)
    assert narrowed.ledger.reference_flops == plain.ledger.reference_flops


@pytest.mark.parametrize("preset", ["full", "proposal_a", "proposal_b"])
def test_other_presets_compute_as_before_bit_for_bit(preset: Any) -> None:
    states = []
    for form in (None, TOKEN_LOSS_AT_TARGETS):
        model = build("llama")
        guide = Guide(model, Config(preset=preset), loss=token_losses, loss_at_targets=form)
        torch.manual_seed(0)
        guided(guide, adamw(guide), Answers(), epochs=1, collate_fn=collate)
        guide.detach()
        states.append(model.state_dict())
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())


@pytest.mark.parametrize("name", ["llama", "tied_llama"])
@pytest.mark.parametrize("data", [Answers(tokens=40), Examples(FAMILIES["llama"], 24, 40)], ids=["few", "many"])
def test_the_logits_of_a_batch_never_exist(name: str, data: Examples, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked_loss, "MIN_POSITIONS", 4)
    monkeypatch.setattr(chunked_loss, "CHUNK_ELEMENTS", 4 * VOCABULARY)
    largest = {}
    for positions in ("all", "auto"):
        guide = guide_of(
            build(name), warmup_fraction=0.9, probe={"interval": 0}, execution={"positions": positions, "cache": "none"}
        )
        with_logits = 4 * 40 * VOCABULARY
        for batch in guide.batches(data, batch_size=4, collate_fn=collate):
            with Largest() as seen:
                guide.loss(batch).backward()
            largest[positions] = seen.elements
            break
        guide.detach()
    assert largest["all"] == with_logits
    assert largest["auto"] <= 4 * 40 * 48  # of the feed-forward block


def test_a_model_that_is_compiled_meanwhile_computes_everything() -> None:
    guide = guide_of(build("llama"), warmup_fraction=0.9, probe={"interval": 0})
    optimizer = adamw(guide)
    unread = []
    for batch in guide.batches(Answers(), batch_size=4, collate_fn=collate):
        if guide.step_count == 1:
            guide.model.model.layers[0].compile(backend="eager")  # type: ignore[union-attr, operator, index]
        guide.loss(batch).backward()
        unread.append(guide.ledger.unread_flops)
        guide.step(optimizer)
        optimizer.zero_grad()
        if guide.step_count == 2:
            break
    assert unread[0] == unread[1] > 0.0
    guide.detach()
