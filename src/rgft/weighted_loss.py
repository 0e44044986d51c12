"""The loss of steps that skip examples or targets: weighed so that its expectation is the loss of all there was."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from rgft.cost.batch_shape import BatchShape
from rgft.cost.undisturbed import undisturbed
from rgft.errors import AttachError, ConfigError
from rgft.execution.target_positions import ChosenTargets
from rgft.progress import Progress
from rgft.pruning import ExamplePruning, KeptRows, TokenPruning
from rgft.spending import NOTHING_SKIPPED, Spending
from rgft.telemetry.ledger import Skipped
from rgft.training_loss import TrainingLoss

#: Relative difference that an example's loss may have beside another one, from rounding (in bf16, too).
OWN_TOLERANCE = 2e-2


class WeightedLoss:
    """The loss of training passes, and what is remembered of them for later epochs.

    A nominal batch's loss is (1/C) Σ_i c_i m_i with m_i the mean loss of example i on its own, c_i what it counts (1;
    its target tokens) and C = Σ c_i. Of kept rows it is (1/C) Σ_i w_i c_i m_i, with the same C.

    Args:
        loss, progress, spending: of the run.
        examples: which examples are skipped; None: none are.
        tokens: which targets are skipped; None: none are.
    """

    def __init__(
        self, loss: TrainingLoss, progress: Progress, spending: Spending, *, examples: ExamplePruning | None,
        tokens: TokenPruning | None,
    ) -> None:  # fmt: skip
        self._loss, self._progress, self._spending = loss, progress, spending
        self.examples, self.tokens = examples, tokens
        self._skipped = NOTHING_SKIPPED  # by the pass in hand, against the nominal batch; not booked yet
        self._booked: KeptRows | None = None  # the batch whose skipped rows were booked last

    def check(self) -> None:
        """Once costs are traced: makes sure that what is to be skipped can be.

        Raises:
            ConfigError: the head is computed at all positions, so that skipping targets would save nothing.
        """
        if self.tokens is not None and self._loss.at_targets is None:
            raise ConfigError(
                "examples.tokens: expected a language model whose head can be computed at targets alone (a task of "
                "`rgft train`, or Guide(loss_at_targets=…), with execution.positions 'auto'), found none: skipping "
                "targets would save nothing. Set examples.tokens to 0"
            )

    def check_rows(self, model: nn.Module, batch: Any) -> None:
        """Makes sure that the loss is one per example, and an example's own, on two rows of a batch and one of them.

        Raises:
            AttachError: it is not.
        """
        if self.examples is None:
            return
        shape = BatchShape.of(batch)
        pair, alone = (shape.resize(batch, replace(shape, rows=rows)) for rows in (2, 1))
        with undisturbed(model), torch.no_grad():
            model.eval()
            both, one = self._mean_of_first(model, pair, 2), self._mean_of_first(model, alone, 1)
        if not abs(both - one) <= OWN_TOLERANCE * max(abs(both), abs(one)):
            raise AttachError(
                f"examples.prune: expected losses that are each example's own, found {both:.6g} for an example beside "
                f"another and {one:.6g} alone: a loss that divides by all tokens of a batch (or compares its rows) "
                "cannot be weighed by example. Return each example's mean, or give Guide what counts its tokens "
                "(loss_at_targets), or set examples.prune to 0"
            )

    def _mean_of_first(self, model: nn.Module, batch: Any, rows: int) -> float:
        counts = self._loss.count_rows(batch) or [1] * rows
        losses_B = self._of_rows(self._loss.plain(model, batch), range(rows))
        return float(losses_B[0]) * sum(counts) / (rows * max(1, counts[0]))

    @property
    def says(self) -> str:
        """What is skipped, in words; empty: nothing."""
        parts: list[str] = []
        if self.examples is not None:
            parts.append(f"well-learnt examples with probability {self.examples.probability:g} (unbiased)")
        if self.tokens is not None:
            share, kind = self.tokens.probability, "well-learnt tokens with probability"
            if self.tokens.is_biased:
                parts.append(
                    f"the {share:.0%} of tokens with the lowest loss (BIASED: not the expectation of the loss)"
                )
            else:
                parts.append(f"{kind} {share:g} (unbiased)")
        return " and ".join(parts)

    @property
    def history(self) -> list[dict[str, Any]]:
        """What was decided at the start of each epoch, of examples and of tokens."""
        found = [("examples", False, self.examples), ("tokens", self.tokens and self.tokens.is_biased, self.tokens)]
        return [
            {"of": of, "biased": bool(biased), **entry} for of, biased, pruning in found if pruning is not None
            for entry in pruning.history
        ]  # fmt: skip

    # ---------------------------------------------------------------- a training pass

    def of_step(self, model: nn.Module, batch: Any) -> Tensor:
        """The loss of a batch of the step, or of a piece of it.

        Raises:
            AttachError: the loss is not one per example.
        """
        ids = self._progress.ids
        if ids is None:
            return self._loss.of_step(model, batch)
        counts = self._loss.count_rows(batch) or [1] * len(ids)
        weights_B, factors_N = self.weights(ids), self._target_factors(model, ids, counts)
        self.note_skipped(ids, counts, skips_targets=factors_N)
        if self._loss.runs_at_targets(model) and (weights_B is not None or self.tokens is not None):
            losses_B, plain_B = self._at_chosen(model, batch, ids, counts, weights_B, factors_N)
        else:
            losses_B = self._of_rows(self._loss.values(model, batch), ids)
            plain_B = losses_B.detach()
            if weights_B is not None:
                losses_B = losses_B * weights_B.to(losses_B.device, losses_B.dtype)
        share = sum(counts) / max(1, len(ids))
        self.observe(ids, plain_B, [share / max(1, count) for count in counts], counts)
        if weights_B is None:
            return losses_B.mean()
        kept, all_rows = self.nominal_count(ids, counts)
        return losses_B.sum() * (kept / (len(ids) * max(1, all_rows)))

    def _at_chosen(
        self, model: nn.Module, batch: Any, ids: Sequence[int], counts: Sequence[int], weights_B: Tensor | None,
        factors_N: Tensor | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Weighted losses of the rows, and the same unweighted and detached, with the head at some targets alone."""
        factors = torch.ones(sum(counts)) if factors_N is None else factors_N
        if weights_B is not None:  # beforehand: weights that only backward brought would have dW computed twice
            factors = factors * weights_B.repeat_interleave(torch.tensor(counts))
        chosen = ChosenTargets(factors_N=factors)
        losses_B = self._of_rows(self._loss.values(model, batch, chosen=chosen), ids)
        if self.tokens is not None and chosen.losses_K is not None:
            self.tokens.observe(ids, counts, factors_N, chosen.losses_K)
            if self.tokens.is_biased and factors_N is not None:
                # The mean is over those that were chosen.
                losses_B = losses_B * (len(factors) / max(1, int((factors_N > 0.0).sum())))
        plain_B = losses_B.detach()
        return losses_B, plain_B if weights_B is None else plain_B / weights_B.to(plain_B.device, plain_B.dtype)

    def _of_rows(self, losses: Tensor, ids: Sequence[int]) -> Tensor:
        if losses.shape != (len(ids),):
            raise AttachError(
                f"examples.prune, examples.tokens: expected one loss per example, [{len(ids)}], found the shape "
                f"{list(losses.shape)}: a mean cannot be weighed by example. Give Guide a loss(model, batch) that "
                "returns one for each row, or set them to 0"
            )
        return losses

    def _target_factors(self, model: nn.Module, ids: Sequence[int], counts: Sequence[int]) -> Tensor | None:
        course = self._progress.course
        if self.tokens is None or course is None or not self._loss.runs_at_targets(model):
            return None
        self.tokens.begin_epoch(course.epoch)
        return self.tokens.factors(ids, counts)

    # ---------------------------------------------------------------- rows

    def weights(self, ids: Sequence[int]) -> Tensor | None:
        """Weights [B] of these rows of the batch in hand; None: it is whole, and its loss is their mean."""
        kept = self._progress.kept
        if self.examples is None or kept is None or kept.is_whole:
            return None
        of_id = dict(zip(kept.ids, kept.weights, strict=True))
        return torch.tensor([of_id[example] for example in ids])

    def nominal_count(self, ids: Sequence[int], counts: Sequence[int]) -> tuple[int, int]:
        """What the kept rows of the batch in hand count together, and what all of its rows do.

        Args:
            ids, counts: of the rows of the pass, which may be a piece of the batch.
        """
        kept = self._progress.kept
        if self.examples is None or kept is None:
            return sum(counts), sum(counts)
        of_kept = sum(counts) if len(ids) == len(kept.ids) else self.examples.counts(kept.ids)
        return of_kept, of_kept + self.examples.counts(kept.skipped)

    def note_skipped(self, ids: Sequence[int], counts: Sequence[int], skips_targets: Tensor | None = None) -> None:
        """Before a pass: says what it is spared, to be booked with it. Rows of a batch are booked with its first pass.

        Args:
            ids, counts: of the rows of the pass.
            skips_targets: factors of their targets [N]; None: none is skipped.
        """
        kept, rows, row_targets = self._progress.kept, 0, 0
        if self.examples is not None and kept is not None and kept is not self._booked:
            rows, row_targets = len(kept.skipped), self.examples.counts(kept.skipped)
        self._booked = kept
        targets = 0 if skips_targets is None else int((skips_targets == 0.0).sum())
        self._skipped = Skipped(
            rows=rows, row_targets=row_targets, targets=targets,
            is_biased=self.tokens is not None and self.tokens.is_biased,
        )  # fmt: skip
        self._spending.kept_rows = 1.0 if self.examples is None else self.examples.kept_share
        self._spending.kept_targets = 1.0 if self.tokens is None else self.tokens.kept_share

    def take_skipped(self) -> Skipped:
        """What the pass in hand is spared, told once: a loss may call the model more than once."""
        skipped, self._skipped = self._skipped, NOTHING_SKIPPED
        return skipped

    def observe(self, ids: Sequence[int], losses_B: Tensor, scales: Sequence[float], counts: Sequence[int]) -> None:
        """Remembers the losses of examples, each of which its scale makes the example's own mean."""
        if self.examples is not None:
            self.examples.observe(ids, losses_B, scales, counts)

    # ---------------------------------------------------------------- saving

    def state_dict(self) -> dict[str, Any]:
        return {
            "examples": None if self.examples is None else self.examples.state_dict(),
            "tokens": None if self.tokens is None else self.tokens.state_dict(),
            "kept": [self._spending.kept_rows, self._spending.kept_targets],
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.examples is not None:
            self.examples.load_state_dict(state["examples"])
        if self.tokens is not None:
            self.tokens.load_state_dict(state["tokens"])
        self._spending.kept_rows, self._spending.kept_targets = state["kept"]
