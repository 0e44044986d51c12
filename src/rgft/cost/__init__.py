"""What a step costs in FLOPs, read off the autograd graph of the real model.

`trace_costs` runs the model on a few small batches and reads every matrix product off the graph (`graph.py`);
`CostModel` then answers for any set of active components, batch shape and cut (`model.py`).
"""

from rgft.cost.batch_shape import BatchShape
from rgft.cost.counting import flop_counter
from rgft.cost.model import CostModel, StepCost
from rgft.cost.operations import Operation, Product
from rgft.cost.targets import with_targets
from rgft.cost.trace import LowRankShapes, trace_costs

__all__ = [
    "BatchShape", "CostModel", "LowRankShapes", "Operation", "Product", "StepCost", "flop_counter", "trace_costs",
    "with_targets",
]  # fmt: skip
