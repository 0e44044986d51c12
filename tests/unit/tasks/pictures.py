"""Small pictures in folders, and tiny random image models, as users have them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

SIDE = 16


def picture(kind: int, number: int, *, side: int = SIDE) -> Image.Image:
    """Noise in which one channel is brighter, on the left more than on the right."""
    pixels = np.random.default_rng([kind, number]).integers(0, 100, (side, side, 3), dtype=np.uint8)
    pixels[..., kind] += np.linspace(150, 60, side, dtype=np.uint8)
    return Image.fromarray(pixels)


def save_folder(folder: Path, classes: dict[str, int], *, ending: str = "png", first: int = 0) -> Path:
    """Writes `classes[name]` pictures into a folder per class; the n-th class has the n-th kind."""
    for kind, (name, count) in enumerate(classes.items()):
        (folder / name).mkdir(parents=True)
        for number in range(first, first + count):
            picture(kind, number).save(folder / name / f"{number:03d}.{ending}")
    return folder


def save_model(folder: Path, family: str = "vit", *, side: int = SIDE) -> Path:
    """Saves a tiny random model of two classes with the image processor of its kind."""
    torch.manual_seed(0)
    model, processor = FAMILIES[family](side)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def _vit(side: int) -> tuple[Any, Any]:
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

    config = ViTConfig(
        image_size=side, patch_size=8, hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=48
    )  # fmt: skip
    return ViTForImageClassification(config), ViTImageProcessor(size={"height": side, "width": side})


def _resnet(side: int) -> tuple[Any, Any]:
    from transformers import ConvNextImageProcessor, ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16, 16], depths=[1, 1, 1], layer_type="basic")
    return ResNetForImageClassification(config), ConvNextImageProcessor(size={"shortest_edge": side}, crop_pct=1.0)


def _efficientnet(side: int) -> tuple[Any, Any]:
    from transformers import EfficientNetConfig, EfficientNetForImageClassification, EfficientNetImageProcessor

    config = EfficientNetConfig(
        image_size=side, width_coefficient=0.25, depth_coefficient=0.5, depth_divisor=8, kernel_sizes=[3, 3, 5],
        in_channels=[32, 16, 24], out_channels=[16, 24, 32], depthwise_padding=[], strides=[1, 2, 1],
        num_block_repeats=[1, 1, 1], expand_ratios=[1, 6, 6], hidden_dim=320,
    )  # fmt: skip
    model: Any = EfficientNetForImageClassification(config)
    for module in model.modules():  # as a trained one has it: drawn with deviation 0.02, nothing would be learnt
        if isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
        elif isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
    return model, EfficientNetImageProcessor(size={"height": side, "width": side})


#: Side in pixels → model and image processor.
FAMILIES: dict[str, Callable[[int], tuple[Any, Any]]] = {
    "vit": _vit, "resnet": _resnet, "efficientnet": _efficientnet
}  # fmt: skip
