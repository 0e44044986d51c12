"""What a configuration leaves open and the model decides.

Of language models, whose heads are pre-trained: layers train by low-rank pairs (docs/decisions/0021), and less is cut
(docs/decisions/0022).
"""

from __future__ import annotations

import logging
from itertools import chain

from torch import nn

from rgft.allocation.budget import PRETRAINED_HEAD_EXPONENT, PRETRAINED_HEAD_READOUT, BudgetMask
from rgft.architectures.adapters import adapter_paths
from rgft.architectures.output_head import output_head
from rgft.assembly import build_signal, find_pair_sites
from rgft.components import Partition
from rgft.config import Config
from rgft.config.sections import LowRankConfig
from rgft.errors import ConfigError

log = logging.getLogger("rgft")

#: Pairs that nobody asked for, and how many times their rank both sides of a weight must be to have one.
USUAL, SMALL = LowRankConfig(), 8


def spelled_out(config: Config, model: nn.Module, partition: Partition) -> Config:
    """The configuration with all that this model decides: `update.low_rank` is a mapping or None.

    Args:
        config: of the run, resolved.
        model: plain.
        partition: of it.
    """
    config = _with_mask_for(model, config)
    if config.update.low_rank != "auto":
        return config
    pairs = usual_pairs(config, model, partition)
    if pairs is not None:
        log.info(
            "layers train by low-rank pairs of rank %d, at %g × the learning rate; update.low_rank: null trains dense "
            "weights", pairs.rank, pairs.lr_multiplier,
        )  # fmt: skip
    return _with(config, pairs)


def _with_mask_for(model: nn.Module, config: Config) -> Config:
    mask = config.mask
    if mask is None or mask.name != BudgetMask.name or output_head(model) is None:
        return config
    usual = {"bias_exponent": PRETRAINED_HEAD_EXPONENT, "readout": PRETRAINED_HEAD_READOUT}
    params = {**mask.params, **{key: value for key, value in usual.items() if mask.params.get(key) is None}}
    return config.model_copy(update={"mask": mask.model_copy(update={"params": params})})


def usual_pairs(config: Config, model: nn.Module, partition: Partition) -> LowRankConfig | None:
    """The low-rank pairs of a model where nobody asks for any; None: it trains dense weights.

    Args:
        config: of the run, resolved.
        model: plain.
        partition: of it.
    """
    return USUAL if _suits_pairs(config, model, partition) else None


def without_usual_pairs(config: Config) -> Config:
    """The configuration without pairs that nobody asked for: where the optimizer exists already, they come too late."""
    return _with(config, None) if config.update.low_rank == "auto" else config


def _with(config: Config, pairs: LowRankConfig | None) -> Config:
    return config.model_copy(update={"update": config.update.model_copy(update={"low_rank": pairs})})


def _suits_pairs(config: Config, model: nn.Module, partition: Partition) -> bool:
    """Whether it is a language model whose layers can have pairs, and are large against them."""
    if output_head(model) is None or adapter_paths(model):
        return False
    smallest = _with(config, LowRankConfig(rank=1))  # nobody is to be warned of large pairs who asked for none
    try:
        found = find_pair_sites(smallest, model, partition, build_signal(config))
    except ConfigError as error:
        log.info("layers train dense weights: %s", error)
        return False
    return all(min(site.inputs, site.outputs) >= SMALL * USUAL.rank for site in chain.from_iterable(found.values()))
