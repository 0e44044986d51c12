"""The ledger: everything a run spends, by axis, beside what full fine-tuning would have spent on the same batches.

All FLOPs are modelled ones (`rgft.cost`), padding included. Audited ones, counted while a step really ran, stand beside
the modelled ones of the very same steps, so that the model's error can be read off.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, Self, cast

import torch

from rgft.cost import StepCost
from rgft.errors import ConfigError
from rgft.telemetry import ledger_figures
from rgft.telemetry.energy import WORLD_CARBON_INTENSITY, Spent
from rgft.telemetry.updates import Updates

try:
    import resource
except ModuleNotFoundError:  # not on Windows
    resource = None

Part = Literal["step", "probe", "fill", "search", "data", "evaluation"]

#: What a saved ledger holds of its `updates`.
_OF_UPDATES = ("component_parameters", "component_steps")


def peak_memory_bytes() -> int | None:
    """Highest resident memory of this process so far, in bytes; None where the system does not say."""
    if resource is None:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def peak_accelerator_bytes() -> int:
    """Highest memory that tensors held on any one CUDA device so far, in bytes; 0 without one. Does not synchronise."""
    if not torch.cuda.is_initialized():
        return 0
    return max(torch.cuda.max_memory_allocated(device) for device in range(torch.cuda.device_count()))


@dataclass(frozen=True, kw_only=True)
class Skipped:
    """What a training pass was spared of its nominal batch because it is learnt well.

    Attributes:
        rows: examples that were skipped.
        row_targets: target tokens of those.
        targets: target tokens of the other rows that were skipped.
        is_biased: whether the choice of target tokens is: then another objective than the loss is trained.
    """

    rows: int = 0
    row_targets: int = 0
    targets: int = 0
    is_biased: bool = False


@dataclass(kw_only=True)
class Ledger:
    """Running sums of a run. Every call costs O(1), but for one addition per component that was updated.

    Attributes:
        steps: optimizer steps.
        passes: training forward and backward passes (several per step with gradient accumulation).
        examples: rows trained on, repetitions included.
        tokens: positions trained on, padding included.
        padding_tokens: those of them that were padding, as far as told.
        tokens_with_known_padding: tokens of the passes that told their padding.
        reference_flops: what full fine-tuning spends on the same batches, skipped examples included.
        forward_flops, dx_flops, dw_flops: what the training passes spent.
        forward_cached_flops, dx_truncated_flops, dw_skipped_flops: what they saved against the reference, by axis.
        padding_flops: what of the reference is padding that no pass computed, as rows of like length passed together;
            the other savings are against what is left of it.
        unread_flops: what they saved beside, on all axes, by skipping positions that the loss does not read.
        examples_flops, targets_flops: what they saved beside, under the plan in force, by skipping well-learnt examples
            (taken to be as long as the kept ones of their batch) and target tokens.
        examples_skipped, targets_skipped: numbers of those; targets of skipped examples are not among them.
        targets_are_biased: whether target tokens were chosen by another rule than an unbiased one.
        head_flops: part of what they spent: of a language model's head, where it is computed at targets alone.
        pair_flops: what low-rank pairs cost beside the model's own weights, on all axes.
        recomputed_flops: forward work done again: by gradient checkpointing, where a memory budget turned it on, and
            where nothing is dropped at random in attention's fused kernel.
        optimizer_flops: products in the optimizer's own steps (Muon's).
        probe_flops, readout_flops, fill_flops, search_flops: scoring, reading layers out before the first step, filling
            the activation cache, and candidates of a search that lost; part of what is spent.
        evaluation_flops: not part of it.
        audited_flops, audited_modelled_flops, audits: counted and modelled FLOPs of the same audited pieces of work.
        seconds: wall-clock by part; "probe" is all scoring, of training gradients too, and the readout.
        joules: energy by part, as `seconds`.
        measured_joules: of these, counted by the hardware; the others are an estimate.
        energy_notes: how energy was found, in words; one for each way.
        carbon_intensity: grams of CO2 equivalent per kWh.
        peak_memory_bytes: highest resident memory of the process; None when unknown.
        peak_accelerator_bytes: highest tensor memory on one device.
        memory_limit_bytes: of the memory budget; None without one.
        memory_forecast_bytes: what the chosen plan was forecast to need, at most.
        peak_step_bytes: highest tensor memory of the steps that were followed (on the CPU, under a memory budget).
        resident_before_bytes: highest resident memory of the process before the first step.
        updated_parameters: parameters updated, summed over steps.
        last_updated_parameters: parameters updated in the last step.
        updates: of components.
    """

    steps: int = 0
    passes: int = 0
    examples: int = 0
    tokens: int = 0
    padding_tokens: int = 0
    tokens_with_known_padding: int = 0
    reference_flops: float = 0.0
    forward_flops: float = 0.0
    dx_flops: float = 0.0
    dw_flops: float = 0.0
    forward_cached_flops: float = 0.0
    dx_truncated_flops: float = 0.0
    dw_skipped_flops: float = 0.0
    padding_flops: float = 0.0
    unread_flops: float = 0.0
    examples_flops: float = 0.0
    targets_flops: float = 0.0
    examples_skipped: int = 0
    targets_skipped: int = 0
    targets_are_biased: bool = False
    head_flops: float = 0.0
    recomputed_flops: float = 0.0
    pair_flops: float = 0.0
    optimizer_flops: float = 0.0
    probe_flops: float = 0.0
    probes: int = 0
    readout_flops: float = 0.0
    fill_flops: float = 0.0
    search_flops: float = 0.0
    evaluation_flops: float = 0.0
    audited_flops: float = 0.0
    audited_modelled_flops: float = 0.0
    audits: int = 0
    seconds: dict[Part, float] = field(
        default_factory=lambda: {"step": 0.0, "probe": 0.0, "fill": 0.0, "search": 0.0, "data": 0.0, "evaluation": 0.0}
    )
    joules: dict[Part, float] = field(default_factory=dict)
    measured_joules: float = 0.0
    energy_notes: list[str] = field(default_factory=list)
    carbon_intensity: float = WORLD_CARBON_INTENSITY
    peak_memory_bytes: int | None = None
    peak_accelerator_bytes: int = 0
    memory_limit_bytes: int | None = None
    memory_forecast_bytes: int | None = None
    peak_step_bytes: int | None = None
    resident_before_bytes: int | None = None
    updated_parameters: int = 0
    last_updated_parameters: int = 0
    updates: Updates = field(default_factory=Updates)

    # ---------------------------------------------------------------- adding

    def add_forward(
        self, *, full: StepCost, spent: StepCost, rows: int, tokens: int, padding_tokens: int | None = None,
        all_positions: StepCost | None = None,
    ) -> None:  # fmt: skip
        """Books one training pass (forward and backward) over a batch.

        Args:
            full: what full fine-tuning spends on the batch.
            spent: what the plan in force spends; no axis exceeds `full`'s.
            rows: examples in the batch.
            tokens: positions in the batch, padding included.
            padding_tokens: those of them that are padding; None when unknown.
            all_positions: what the plan would spend if no position were skipped; None: it skips none.
        """
        planned = all_positions or spent
        self.passes += 1
        self.examples += rows
        self.tokens += tokens
        if padding_tokens is not None:
            self.padding_tokens += padding_tokens
            self.tokens_with_known_padding += tokens
        self.reference_flops += full.total
        self.forward_flops += spent.forward
        self.dx_flops += spent.dx
        self.dw_flops += spent.dw
        self.forward_cached_flops += full.forward - planned.forward
        self.dx_truncated_flops += full.dx - planned.dx
        self.dw_skipped_flops += full.dw - planned.dw
        self.recomputed_flops += spent.recomputed
        self.pair_flops += spent.pairs
        # Of what is computed twice, skipped positions are spared twice; what is left of that is `recomputed`. So with
        # low-rank pairs.
        self.unread_flops += planned.forward + planned.dx + planned.dw - (spent.forward + spent.dx + spent.dw)
        self.head_flops += spent.head

    def add_skipped(self, skipped: Skipped, *, tokens: int, examples: StepCost, targets: StepCost) -> None:
        """Books what the pass booked last, as one over its nominal batch, was spared of that.

        Args:
            skipped: what.
            tokens: positions of the skipped examples.
            examples, targets: what these would have cost under the plan in force.
        """
        self.examples -= skipped.rows
        self.tokens -= tokens
        self.examples_skipped += skipped.rows
        self.targets_skipped += skipped.targets
        self.targets_are_biased |= skipped.is_biased and skipped.targets > 0
        for cost in (examples, targets):
            self.forward_flops -= cost.forward
            self.dx_flops -= cost.dx
            self.dw_flops -= cost.dw
            self.recomputed_flops -= cost.recomputed
            self.pair_flops -= cost.pairs
            self.head_flops -= cost.head
        self.examples_flops += examples.forward + examples.dx + examples.dw
        self.targets_flops += targets.forward + targets.dx + targets.dw

    def add_padding(self, *, flops: float) -> None:
        """Books what full fine-tuning spends on padding of a batch that is in none of its passes."""
        self.reference_flops += flops
        self.padding_flops += flops

    def end_step(self, *, seconds: float, updated: Mapping[str, int], optimizer_flops: float = 0.0) -> None:
        """Books the end of an optimizer step.

        Args:
            seconds: wall-clock of the step, scoring excluded.
            updated: name → number of parameters, of the components that were updated; see `Updates.add`.
            optimizer_flops: of products in the optimizer's own step.
        """
        self.steps += 1
        self.optimizer_flops += optimizer_flops
        self.seconds["step"] += seconds
        self.updates.add(updated)
        self.last_updated_parameters = self.updates.latest
        self.updated_parameters += self.last_updated_parameters
        self.observe_memory()

    def add_probe(self, *, flops: float, seconds: float) -> None:
        """Books one look at held-out examples."""
        self.probes += 1
        self.probe_flops += flops
        self.seconds["probe"] += seconds

    def add_scoring(self, *, seconds: float, flops: float = 0.0) -> None:
        """Books time spent on scoring a training step's own gradients, which needs no pass of its own."""
        self.probe_flops += flops
        self.seconds["probe"] += seconds

    def add_readout(self, *, flops: float, seconds: float) -> None:
        """Books passes that read layers out before the first step."""
        self.readout_flops += flops
        self.seconds["probe"] += seconds

    def add_fill(self, *, flops: float, seconds: float) -> None:
        """Books passes that filled the activation cache and trained nothing."""
        self.fill_flops += flops
        self.seconds["fill"] += seconds

    def add_search(self, *, flops: float, seconds: float, joules: float = 0.0) -> None:
        """Books what candidates of a search spent whose training is thrown away."""
        self.search_flops += flops
        self.seconds["search"] += seconds
        if joules:
            self.joules["search"] = self.joules.get("search", 0.0) + joules

    def add_energy(self, spent: Spent) -> None:
        """Books the energy of a stretch of time."""
        for part, joules in spent.joules.items():
            if joules:
                self.joules[cast("Part", part)] = self.joules.get(cast("Part", part), 0.0) + joules
        if spent.source == "measured":
            self.measured_joules += sum(spent.joules.values())
        note = f"{spent.source}: {spent.note}"
        if note not in self.energy_notes:
            self.energy_notes.append(note)

    def add_data(self, *, seconds: float) -> None:
        """Books time spent on waiting for a batch."""
        self.seconds["data"] += seconds

    def add_evaluation(self, *, seconds: float, flops: float = 0.0) -> None:
        """Books an evaluation: recorded, and outside the budget."""
        self.evaluation_flops += flops
        self.seconds["evaluation"] += seconds

    def add_audit(self, *, counted: float, modelled: float) -> None:
        """Books the FLOPs counted while some work ran, beside those modelled for it. Spends nothing itself."""
        self.audits += 1
        self.audited_flops += counted
        self.audited_modelled_flops += modelled

    def limit_memory(self, *, limit: int, forecast: int) -> None:
        """Takes note of a memory budget, before the first step."""
        self.memory_limit_bytes, self.memory_forecast_bytes = limit, forecast
        if self.resident_before_bytes is None:
            self.resident_before_bytes = peak_memory_bytes()

    def add_step_peak(self, peak: int) -> None:
        """Books the highest memory that tensors held in a step that was followed."""
        self.peak_step_bytes = max(peak, self.peak_step_bytes or 0)

    def observe_memory(self) -> None:
        """Takes note of the peak memory so far; a resumed run keeps the higher one."""
        peak = peak_memory_bytes()
        if peak is not None:
            self.peak_memory_bytes = max(peak, self.peak_memory_bytes or 0)
        self.peak_accelerator_bytes = max(peak_accelerator_bytes(), self.peak_accelerator_bytes)

    # ---------------------------------------------------------------- reading

    @property
    def training_flops(self) -> float:
        """Spent by training passes."""
        return self.forward_flops + self.dx_flops + self.dw_flops + self.recomputed_flops + self.pair_flops

    @property
    def spent_flops(self) -> float:
        """What counts against the budget: training and what is beside it; evaluation does not."""
        return self.training_flops + self.optimizer_flops + self.beside_flops

    @property
    def beside_flops(self) -> float:
        """Spent by passes that train nothing: probes, readout, cache filling and a search's losers."""
        return self.probe_flops + self.readout_flops + self.fill_flops + self.search_flops

    @property
    def elapsed(self) -> float:
        """Seconds that count against a budget: all but evaluation."""
        return sum(self.seconds.values()) - self.seconds["evaluation"]

    @property
    def spent_joules(self) -> float:
        """Joules that count against a budget: all but evaluation's."""
        return sum(joules for part, joules in self.joules.items() if part != "evaluation")

    @property
    def component_parameters(self) -> dict[str, int]:
        """Size of every component updated at least once."""
        return self.updates.sizes

    @property
    def component_steps(self) -> dict[str, int]:
        """Number of steps in which each of them was updated."""
        return self.updates.steps

    @property
    def parameters_ever_updated(self) -> int:
        """Parameters updated in at least one step."""
        return sum(self.component_parameters.values())

    @property
    def audit_error(self) -> float | None:
        """Relative error of the modelled FLOPs against the counted ones; None without an audit."""
        return self.audited_modelled_flops / self.audited_flops - 1.0 if self.audited_flops else None

    def summary(self, full_flops: float | None = None) -> dict[str, Any]:
        """All figures of the run, fit for JSON.

        Args:
            full_flops: what full fine-tuning of the whole run spends; None: not known, and no `fraction_of_full`.

        Returns:
            Nested by topic: `flops` (`spent` and its parts; `saved` against full fine-tuning on the *same* batches, by
            axis, with all that is beside training as `added`; the fractions), `audit`, `seconds`, `energy` (without
            evaluation's), `memory`, `data`, `parameters`.
        """
        return ledger_figures.summary(self, full_flops)

    def as_rows(self, full_flops: float | None = None) -> list[tuple[str, float, float | None]]:
        """Rows of a table of FLOPs: (what, FLOPs, share of full fine-tuning); savings are negative.

        The rows between the reference and the total add up to the total.

        Args:
            full_flops: as in `summary`; None gives shares of full fine-tuning on the same batches.
        """
        return ledger_figures.as_rows(self, full_flops)

    @property
    def bias_label(self) -> str:
        """Goes behind what is said of skipped target tokens."""
        return " (BIASED)" if self.targets_are_biased else ""

    # ---------------------------------------------------------------- saving

    def to_dict(self) -> dict[str, Any]:
        """Everything, exactly: `Ledger.from_dict(ledger.to_dict()) == ledger`."""
        data = asdict(self)
        del data["updates"]
        return {**data, **{name: dict(getattr(self, name)) for name in _OF_UPDATES}}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Restores `to_dict`.

        Raises:
            ConfigError: keys are missing, or unknown.
        """
        names = {item.name for item in fields(cls)} - {"updates"} | set(_OF_UPDATES)
        problems = [f"ledger: expected the entry {name!r}, found none" for name in sorted(names - data.keys())]
        problems += [
            f"ledger: unknown entry {name!r}; made by another version?" for name in sorted(data.keys() - names)
        ]
        if problems:
            raise ConfigError(problems)
        restored: dict[str, Any] = {
            k: dict(v) if isinstance(v, Mapping) else list(v) if isinstance(v, list) else v for k, v in data.items()
        }
        sizes, steps = (restored.pop(name) for name in _OF_UPDATES)
        return cls(**restored, updates=Updates(sizes, steps))
