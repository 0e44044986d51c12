"""Leaving out what is learnt well: which examples and which target tokens a step skips, and what the kept ones weigh.

Decided for an epoch at its start, from losses of earlier visits, which cost nothing. Where the choice is unbiased, a
well-learnt item is skipped with probability r and weighs 1/(1−r) when it is kept, so that the expectation of every
gradient is the one without skipping.
"""

from rgft.pruning.examples import ExamplePruning, KeptRows
from rgft.pruning.tokens import TokenPruning

__all__ = ["ExamplePruning", "KeptRows", "TokenPruning"]
