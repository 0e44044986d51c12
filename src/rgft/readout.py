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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
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
from rgft.signals.targets import targets_of
from rgft.signals.tuned_lens import hidden_states, leave_one_out_errors, target_matrix
from rgft.spending import Spending
from rgft.workload import batch_shape

log = logging.getLogger("rgft")

#: Examples that are read at most: more tell little more about shares that are a few hundredths apart.
MOST_EXAMPLES = 48
#: Fewer say more about the draw than about the features.
FEWEST_EXAMPLES = 16
#: Targets that are fitted at most, where an example has several.
MOST_TARGETS = 512
#: λ of the ridge regression, relative to the mean eigenvalue of the centred Gram matrix.
RIDGE = 1.0


@dataclass(frozen=True, kw_only=True)
class Readout:
    """What was read.

    Attributes:
        unexplained: layer path → leave-one-out squared error of a ridge regression from its output to the targets, as a
            share of that of their mean alone: 1 and more is nothing explained. Layers whose positions do not match the
            targets' are left out.
        standard_errors: of these shares, over the targets.
        targets: how many it was fitted to.
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
    """Reads a run's own training examples out, by forward passes alone, and books them.

    Leave-one-out errors are of examples that the regression has not seen, so that none need be set aside.

    Args:
        model, binding: of the run.
        loss: mean loss of a batch; its call of the model is what is looked at.
        spending: pays.
    """

    def __init__(self, model: nn.Module, binding: Binding, loss: Loss, spending: Spending) -> None:
        self._model, self._binding, self._loss, self._spending = model, binding, loss, spending

    def read(self, stream: BatchStream, *, share: float, rows: int) -> Readout | None:
        """Reads the first examples of the stream; None where the share does not pay for enough, or nothing can be read.

        Args:
            stream: of the run; its place is left alone.
            share: of what the run may spend.
            rows: of a pass, at most.
        """
        costs, spending = self._spending.costs, self._spending
        if costs is None:
            return None
        of_one = costs.forward_flops(1, spending.typical[1])
        paid = share * spending.allowed / of_one if of_one else MOST_EXAMPLES
        number = int(min(paid, MOST_EXAMPLES, len(stream.dataset)))
        if number < FEWEST_EXAMPLES:
            log.info("readout: %d examples are too few, %d are wanted: decided by costs", number, FEWEST_EXAMPLES)
            return None
        started, flops = time.perf_counter(), 0.0
        seen: list[tuple[Tensor, dict[str, Tensor]]] = []
        try:
            for ids in _pieces(stream, number, rows):
                batch = stream.load(ids)
                flops += costs.forward_flops(*batch_shape(batch))
                seen.append(self._states(batch))
                if sum(len(counting) for counting, _ in seen) >= MOST_TARGETS:
                    break
            found = _unexplained(seen)
        except DataError as error:
            log.info("readout: %s: decided by costs", error)
            found = None
        spending.ledger.add_readout(flops=flops, seconds=time.perf_counter() - started)
        return found

    def _states(self, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """The targets that count, and the hidden states of each layer that it has called once, one for each of them."""
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
            states = {
                path: found.detach()
                for path, calls in captured.layers.items()
                if len(calls) == 1 and (found := hidden_states(calls[0], targets, batch)) is not None
            }
        return targets.counting, states


def _pieces(stream: BatchStream, number: int, rows: int) -> Iterator[Sequence[int]]:
    """The ids of the stream's first `number` examples, at most `rows` at a time."""
    left = number
    for ids in stream.indices():
        for start in range(0, min(len(ids), left), rows):
            yield ids[start : min(start + rows, left)]
        left -= len(ids)
        if left <= 0:
            return


def _unexplained(seen: Sequence[tuple[Tensor, Mapping[str, Tensor]]]) -> Readout:
    counting = torch.cat([targets for targets, _ in seen])[:MOST_TARGETS]
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
        states_ND = torch.cat(found)[:MOST_TARGETS]
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
