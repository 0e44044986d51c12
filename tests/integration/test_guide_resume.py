"""An interrupted run that goes on ends as if it had not been interrupted, to the last bit."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rgft import Config, Guide
from rgft.errors import AttachError, ConfigError
from tests.families import FAMILIES
from tests.integration.loops import Examples, adamw, example_losses, trimmed

COMMON = {"probe": {"interval": 3, "size": 2}, "budget": 0.7}
PRESETS: dict[str, dict[str, Any]] = {
    # The cut by hand: a budget that reaches the second epoch pays for one of everything, where RGFT freezes nothing.
    "rgft": {**COMMON, "warmup_fraction": 0.5, "seed": 3, "mask": {"frozen_fraction": 0.5}},
    "rgft with heads": {**COMMON, "warmup_fraction": 0.5, "granularity": "head", "ffn_blocks": 2,
                        "mask": {"frozen_fraction": 0.5}, "update": {"moments": "offload"}},
    "proposal_a": {"preset": "proposal_a", "probe": {"interval": 2, "size": 2}, "update": {"moments": "decay"}},
    "proposal_b": {"preset": "proposal_b"},
    "lisa": {"policy": {"name": "lisa", "every": 2}, "update": {"moments": "reset"}},
    "full": {"preset": "full"},
    "sampled": {**COMMON, "warmup_fraction": 0.5, "mask": {"frozen_fraction": 0.5}, "update": {"sample": 0.25}},
    "skipping": {**COMMON, "warmup_fraction": 0.5, "seed": 3, "mask": {"frozen_fraction": 0.5},
                 "examples": {"prune": 0.5, "threshold": 1.1, "off_for_last": 0.2}},
}  # fmt: skip
#: While measuring; just after the first decision; in the second epoch, when the cache is read.
INTERRUPTIONS = {"rgft": (1, 7, 9), "skipping": (1, 7, 9), "rgft with heads": (2, 7, 9)}
EPOCHS, STEPS = 2.0, 11


class Session:
    """Everything that a process holds."""

    def __init__(self, settings: dict[str, Any], seed: int = 0, *, fused: bool | None = None) -> None:
        family = FAMILIES["bert"]
        self.model = family.build(seed)
        self.guide = Guide(self.model, Config(**settings), loss=example_losses if "examples" in settings else None)
        self.optimizer = adamw(self.guide, weight_decay=0.1, fused=fused)
        self.scheduler = self.guide.scheduler(self.optimizer)
        self.guide.set_optimizer(self.optimizer)
        self.data = Examples(family)
        self.seen: list[torch.Tensor] = []

    def run(self, until: int, after_step: Callable[[], object] = lambda: None) -> None:
        batches = self.guide.batches(self.data, batch_size=4, collate_fn=trimmed, epochs=EPOCHS)
        for batch in batches:
            self.seen.append(batch["input_ids"])
            self.guide.loss(batch).backward()
            self.guide.step(self.optimizer, self.scheduler)
            self.optimizer.zero_grad()
            after_step()
            if self.guide.step_count == until:
                return

    def save(self) -> bytes:
        parts = ("model", "optimizer", "scheduler", "guide")
        file = io.BytesIO()
        torch.save({part: getattr(self, part).state_dict() for part in parts}, file)
        return file.getvalue()

    def load(self, saved: bytes) -> None:
        state = torch.load(io.BytesIO(saved), weights_only=True)
        for part in ("model", "optimizer", "scheduler", "guide"):
            getattr(self, part).load_state_dict(state[part])

    def end(self) -> dict[str, Any]:
        """All that must be equal."""
        ledger = self.guide.ledger.to_dict()
        for key in ("seconds", "joules", "measured_joules", "peak_memory_bytes", "peak_accelerator_bytes"):
            del ledger[key]
        guide = self.guide.state_dict()
        del guide["spending"]  # the ledger again, and seconds
        return {
            "weights": dict(self.model.state_dict()), "ledger": ledger, "guide": guide,
            "optimizer": self.optimizer.state_dict(), "scheduler": self.scheduler.state_dict(),
            "random": torch.rand(3),
        }  # fmt: skip


def assert_equal(found: Any, expected: Any, path: str = "") -> None:
    if isinstance(expected, torch.Tensor):
        assert torch.equal(found, expected), path
    elif isinstance(expected, dict):
        assert list(found) == list(expected), path
        for key, value in expected.items():
            assert_equal(found[key], value, f"{path}/{key}")
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected), path
        for index, value in enumerate(expected):
            assert_equal(found[index], value, f"{path}/{index}")
    else:
        assert found == expected, path


@pytest.mark.parametrize(("preset", "fused"), [*((preset, None) for preset in PRESETS), ("rgft with heads", True)])
def test_resumed_equals_uninterrupted(preset: str, fused: bool | None) -> None:
    settings = PRESETS[preset]
    torch.manual_seed(7)
    whole = Session(settings, fused=fused)
    whole.run(STEPS)
    expected = whole.end()
    assert whole.guide.step_count >= 8
    if preset == "skipping":
        assert whole.guide.ledger.examples_skipped > 2
    if "rgft" in preset or preset == "skipping":
        assert whole.guide.ledger.probes >= 2
        assert whole.guide.plan.cut > 1
        assert whole.guide.cache is not None
        assert whole.guide.cache.hits > 0
    for step in INTERRUPTIONS.get(preset, (1, 4, 7)):
        torch.manual_seed(7)
        first = Session(settings, fused=fused)
        first.run(step)
        saved = first.save()
        first.guide.detach()
        torch.manual_seed(99)  # another process has other random numbers, and a model from elsewhere
        second = Session(settings, seed=5, fused=fused)
        second.load(saved)
        second.run(STEPS)
        assert_equal(second.end(), expected, f"after step {step}: ")
        assert_equal(first.seen + second.seen, whole.seen)


def test_resumed_with_a_cache_on_disk_equals_uninterrupted(tmp_path: Path) -> None:
    """States that the interrupted run left are found again, though the prefix was trained before it was frozen."""

    def settings(folder: str) -> dict[str, Any]:
        return {**PRESETS["rgft"], "execution": {"cache": "disk", "cache_dir": str(tmp_path / folder)}}

    torch.manual_seed(7)
    whole = Session(settings("whole"))
    whole.run(STEPS)
    expected = whole.end()
    for step in INTERRUPTIONS["rgft"]:
        torch.manual_seed(7)
        first = Session(settings(f"from {step}"))
        first.run(step)
        saved = first.save()
        first.guide.detach()
        torch.manual_seed(99)
        second = Session(settings(f"from {step}"), seed=5)
        second.load(saved)
        second.run(STEPS)
        found = second.end()
        for end in (found, expected):
            end["guide"].pop("config", None)
        assert_equal(found, expected, f"after step {step}: ")


def test_phases_are_where_the_test_above_wants_them() -> None:
    for preset, (measuring, decided, cached) in INTERRUPTIONS.items():
        session = Session(PRESETS[preset])
        session.run(measuring)
        assert session.guide.is_measuring
        session.guide.detach()
        session = Session(PRESETS[preset])
        session.run(decided)
        assert session.guide._decisions.has_decided
        session.guide.detach()
        session = Session(PRESETS[preset])
        session.run(cached)
        assert session.guide.cache is not None
        assert session.guide.cache.hits > 0


def test_saving_changes_nothing() -> None:
    ends = []
    for saves in (False, True):
        torch.manual_seed(7)
        session = Session(PRESETS["rgft"])
        session.run(STEPS, after_step=session.save if saves else lambda: None)
        ends.append(session.end())
    assert_equal(ends[1], ends[0])


def test_a_state_of_another_configuration_is_refused() -> None:
    session = Session(PRESETS["rgft"])
    session.run(2)
    saved = session.save()
    other = Session({**PRESETS["rgft"], "seed": 4})
    with pytest.raises(ConfigError, match="another configuration"):
        other.load(saved)


def test_loading_before_the_optimizer_is_known_is_refused() -> None:
    """What the executor keeps of the optimizer would be lost without a word."""
    session = Session(PRESETS["lisa"])
    session.run(3)
    guide = Guide(FAMILIES["bert"].build(), Config(**PRESETS["lisa"]))
    with pytest.raises(AttachError, match=r"set_optimizer\(optimizer\) first"):
        guide.load_state_dict(session.guide.state_dict())
