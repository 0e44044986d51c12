"""The readout: what a linear map from each layer's output cannot tell of the targets, before anything is trained.

Under a cut everything above it is trained, on what the layers below make of the input. Where a linear map of that
already tells the targets, whatever is trained above can learn it, and little is missed below; where no layer's output
tells anything, the features themselves have to change. A new head's gradients cannot tell the two apart: they are
largest just below it in either case. A layer's share of unexplained variance can, from some tens of examples.
"""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor, nn

from rgft.batches import BatchStream
from rgft.errors import DataError
from rgft.execution.binding import Binding
from rgft.execution.probing import still
from rgft.measurement import Loss
from rgft.signals.base import Probe
from rgft.signals.captures import capture
from rgft.signals.targets import Targets, targets_of
from rgft.signals.tuned_lens import hidden_states, leave_one_out_errors, target_matrix
from rgft.spending import Spending
from rgft.workload import batch_shape

log = logging.getLogger("rgft")

#: Examples that are read at most: more tell little more about shares that are a few hundredths apart.
MOST_EXAMPLES = 48
#: Fewer say more about the draw than about the features.
FEWEST_EXAMPLES = 16
#: λ of the ridge regression, relative to the mean eigenvalue of the centred Gram matrix.
RIDGE = 1.0


@dataclass(frozen=True, kw_only=True)
class Readout:
    """What was read.

    Attributes:
        unexplained: layer path → leave-one-out squared error of a ridge regression from its output to the targets, as a
            share of that of their mean alone: 1 and more is nothing explained. Layers whose positions do not match the
            targets' are left out.
        standard_errors: of these shares, over the examples.
        targets: how many it was fitted to, one of each example.
    """

    unexplained: Mapping[str, float]
    standard_errors: Mapping[str, float]
    targets: int

    def at_most(self, layer: str) -> float:
        """The layer's share and one standard error, at most 1: what is not sure to be explained is not (Breiman et al.
        1984, section 3.4.3); 1 where nothing is known."""
        if layer not in self.unexplained:
            return 1.0
        return min(1.0, self.unexplained[layer] + self.standard_errors[layer])

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Readout:
        return cls(**data)


class Reader:
    """Reads a run's own training examples out, by forward passes alone, and books them (not the regressions).

    Leave-one-out errors are of examples that the regression has not seen, so that none need be set aside. Of an example
    with several targets, a text's tokens, the middle one is read: others of the same text would tell it.

    Args:
        model, binding: of the run.
        loss: mean loss of a batch; its call of the model is what is looked at.
        spending: pays.
    """

    def __init__(self, model: nn.Module, binding: Binding, loss: Loss, spending: Spending) -> None:
        self._model, self._binding, self._loss, self._spending = model, binding, loss, spending

    def read(self, stream: BatchStream, *, flops: float, rows: int) -> Readout | None:
        """Reads the first examples of the stream; None where too few are paid for, or nothing can be read.

        Args:
            stream: of the run; its place is left alone.
            flops: that it may spend.
            rows: of a pass, at most.
        """
        costs, spending = self._spending.costs, self._spending
        if costs is None:
            return None
        of_one = costs.forward_flops(1, spending.typical[1])
        paid = flops / of_one if of_one else MOST_EXAMPLES
        ids = _first(stream, int(min(max(0.0, paid), MOST_EXAMPLES)))
        if len(ids) < FEWEST_EXAMPLES:
            log.info("readout: %d examples are too few, %d are wanted: decided by costs", len(ids), FEWEST_EXAMPLES)
            return None
        started, spent = time.perf_counter(), 0.0
        seen: list[tuple[Tensor, dict[str, Tensor]]] = []
        try:
            for start in range(0, len(ids), rows):
                batch = stream.load(ids[start : start + rows])
                spent += costs.forward_flops(*batch_shape(batch))
                seen.append(self._states(batch))
            found = _unexplained(seen)
        except DataError as error:
            log.info("readout: %s: decided by costs", error)
            found = None
        spending.ledger.add_readout(flops=spent, seconds=time.perf_counter() - started)
        return found

    def _states(self, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """A target of each example that has any, and its hidden states in each layer that was called once."""
        binding = self._binding
        probe = Probe(
            model=self._model, partition=binding.partition, parameters=binding.parameters, batch=batch, loss=self._loss
        )
        with still(self._model, binding), capture(probe, gradients=False) as captured:
            probe.loss(self._model, batch)
            if len(captured.outputs) != 1:
                raise DataError(
                    f"expected the loss to call the model once; it was called {len(captured.outputs)} times"
                )
            targets = targets_of(self._model, batch, captured.outputs[0], outputs=None, shift=None)
            chosen = _one_of_each_row(targets)
            states = {
                path: found[chosen.to(found.device)].detach()
                for path, calls in captured.layers.items()
                if len(calls) == 1 and (found := hidden_states(calls[0], targets, batch)) is not None
            }
        return targets.counting[chosen.to(targets.labels.device)], states


def _first(stream: BatchStream, number: int) -> list[int]:
    """The first ids of the stream's first epoch, each once: what stands there twice would tell itself."""
    ids = chain.from_iterable(islice(stream.indices(), stream.batches_per_epoch))
    return list(islice(dict.fromkeys(ids), number))


def _one_of_each_row(targets: Targets) -> Tensor:
    """Which of the targets that count are read: the middle one of each row's; of rows with one, that."""
    rows_N = targets.counts.nonzero()[:, 0].cpu()
    starts = torch.cat([torch.ones(1, dtype=torch.bool), rows_N[1:] != rows_N[:-1]]).nonzero()[:, 0]
    ends = torch.cat([starts[1:], torch.tensor([len(rows_N)])])
    return (starts + ends) // 2


def _unexplained(seen: Sequence[tuple[Tensor, Mapping[str, Tensor]]]) -> Readout:
    counting = torch.cat([targets for targets, _ in seen])
    if len(counting) < FEWEST_EXAMPLES:
        raise DataError(f"{len(counting)} targets count, {FEWEST_EXAMPLES} are wanted")
    wanted_NC = target_matrix(counting)
    if bool((wanted_NC == wanted_NC[0]).all()):
        raise DataError("all targets are alike")
    of_mean_N = leave_one_out_errors(wanted_NC.new_zeros((len(counting), 1)), wanted_NC, ridge=RIDGE)
    by_layer: dict[str, list[Tensor]] = defaultdict(list)
    for _, states in seen:
        for path, found in states.items():
            by_layer[path].append(found)
    shares: dict[str, float] = {}
    errors: dict[str, float] = {}
    for path, found in by_layer.items():
        if len(found) < len(seen) or len({states.shape[1:] for states in found}) > 1:
            continue
        states_ND = torch.cat(found)
        if not bool(states_ND.isfinite().all()):
            continue
        left_N = leave_one_out_errors(states_ND, wanted_NC, ridge=RIDGE)
        shares[path] = share = float(left_N.mean() / of_mean_N.mean())
        # Of a ratio of means, by the delta method.
        errors[path] = float((left_N - share * of_mean_N).std() / (len(counting) ** 0.5 * of_mean_N.mean()))
    if shares:
        best = min(shares, key=shares.__getitem__)
        log.info(
            "readout: of %d targets, a linear map of %s leaves %.2f unexplained, the least of all layers",
            len(counting), best, shares[best],
        )  # fmt: skip
    return Readout(unexplained=shares, standard_errors=errors, targets=len(counting))
