"""The TensorFlow variables of FEELVOS: which belongs to which layer, for the checkpoints of the original code.

The names are those that the original code (tensorflow/models: research/feelvos and research/deeplab) gives its
variables, with Xception-65 as the encoder.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from torch import nn

from vosops.models.tensorflow import NORM_NAMES, Variable

if TYPE_CHECKING:
    from vosops.models.feelvos import FEELVOS

_MODULE = "xception_module"
# Layers, as regular expressions, and the scopes of their variables; {} takes a group's number, plus 1 if it is {+}.
_SCOPES = (
    (r"deeplab\.encoder\.network\.stem\.(\d)", "xception_65/entry_flow/conv1_{+}"),
    (r"deeplab\.aspp\.pool", "image_pooling"),
    (r"deeplab\.aspp\.branches\.0", "aspp0"),
    (r"deeplab\.aspp\.branches\.([123])\.0", "aspp{}_depthwise"),
    (r"deeplab\.aspp\.branches\.([123])\.1", "aspp{}_pointwise"),
    (r"deeplab\.aspp\.project", "concat_projection"),
    (r"deeplab\.low", "decoder/feature_projection0"),
    (r"deeplab\.decoder\.0", "decoder/decoder_conv0_depthwise"),
    (r"deeplab\.decoder\.1", "decoder/decoder_conv0_pointwise"),
    (r"deeplab\.decoder\.2", "decoder/decoder_conv1_depthwise"),
    (r"deeplab\.decoder\.3", "decoder/decoder_conv1_pointwise"),
    (r"embedding\.(depthwise|pointwise)", "embedding/split_separable_conv2d_{}"),
    (r"head\.layers\.(\d)\.(depthwise|pointwise)", "embedding_seg/split_separable_conv2d_{}_{}"),
    (r"head\.logit", "logits/semantic"),
)
_BLOCK = re.compile(r"deeplab\.encoder\.network\.blocks\.(\d+)\.(.*)")
_FLOWS = (
    ("entry_flow", 3, "block{}/unit_1"),
    ("middle_flow", 16, "block1/unit_{}"),
    ("exit_flow", 2, "block{}/unit_1"),
)
_OWN_NAMES = re.compile(r"\.(conv|bn|0|1)$")  # a convolution and its norm, inside the layer that they are


def tensorflow_variables(network: FEELVOS) -> dict[str, Variable]:
    """Return the variables of the original's checkpoint and their targets; ValueError for any other encoder."""
    if "deeplab.encoder.network.stem.0.conv" not in dict(network.named_modules()):
        raise ValueError(
            "backbone must be 'xception65' to load a checkpoint of the original, got another one"
        )
    found = {}
    for name, layer in network.named_modules():
        if isinstance(layer, nn.Conv2d):
            depthwise = layer.groups > 1
            scope = _scope(name)
            found[f"{scope}/{'depthwise_' if depthwise else ''}weights"] = Variable(
                layer.weight, depthwise=depthwise
            )
            if layer.bias is not None:
                found[f"{scope}/biases"] = Variable(layer.bias)
        elif isinstance(layer, nn.BatchNorm2d):
            for theirs, ours in NORM_NAMES.items():
                found[f"{_scope(name)}/BatchNorm/{theirs}"] = Variable(getattr(layer, ours))
    return found


def _scope(name: str) -> str:
    """Return the scope of a convolution or batch norm by its name."""
    block = _BLOCK.fullmatch(name)
    if block is not None:
        return f"xception_65/{_block_scope(int(block[1]))}/{_MODULE}/{_inner_scope(block[2])}"
    for candidate in (name, _OWN_NAMES.sub("", name)):
        for pattern, scope in _SCOPES:
            match = re.fullmatch(pattern, candidate)
            if match is not None:
                for group in match.groups():
                    scope = (
                        scope.replace("{+}", str(int(group) + 1))
                        if "{+}" in scope
                        else scope.replace("{}", group, 1)
                    )
                return scope
    raise AssertionError(name)


def _block_scope(index: int) -> str:
    for flow, blocks, scope in _FLOWS:
        if index < blocks:
            return f"{flow}/{scope.format(index + 1)}"
        index -= blocks
    raise AssertionError(index)


def _inner_scope(name: str) -> str:
    """Of "shortcut.conv", "stack.conv2.bn_pw" and the like."""
    if name.startswith("shortcut"):
        return "shortcut"
    _, conv, part = name.split(".")
    kind = "depthwise" if part.endswith("dw") else "pointwise"
    return f"separable_{conv}_{kind}"
