"""Signals: what turns a backward pass into one raw score per component.

Reading order: `base` (the protocol) · `gradient`, `decrease` (scores of gradients, streamed) · `captures`, `targets`,
`residual`, `activation`, `tuned_lens` (scores of activations) · `suppression`, `router`, `weights`, `control` ·
`sketch`, `sketched` (gradient scores without dW) · `registry` (signals by name).
"""

from rgft.signals.activation import ActXGrad
from rgft.signals.base import GradientSignal, PartGradient, Probe, Signal
from rgft.signals.control import Random, Uniform
from rgft.signals.decrease import GeneralisingDecrease, PredictedDecrease
from rgft.signals.gradient import Fisher, GradNorm, GradOverWeight, Taylor
from rgft.signals.registry import SIGNALS, make
from rgft.signals.residual import ResidualDot
from rgft.signals.router import RouterShare
from rgft.signals.sketch import Estimate, LinearSketch, estimate
from rgft.signals.sketched import SketchedScores, sketched_measure
from rgft.signals.suppression import Suppression
from rgft.signals.tuned_lens import TunedLens
from rgft.signals.weights import Delta, LowRankMagnitude, WeightMagnitude

__all__ = [
    "SIGNALS", "ActXGrad", "Delta", "Estimate", "Fisher", "GeneralisingDecrease", "GradNorm", "GradOverWeight",
    "GradientSignal", "LinearSketch", "LowRankMagnitude", "PartGradient", "PredictedDecrease", "Probe", "Random",
    "ResidualDot", "RouterShare", "Signal", "SketchedScores", "Suppression", "Taylor", "TunedLens", "Uniform",
    "WeightMagnitude", "estimate", "make", "sketched_measure",
]  # fmt: skip
