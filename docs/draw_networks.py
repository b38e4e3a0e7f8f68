"""Draws the architectures of the segmentation networks: `python docs/draw_networks.py [NAME...]`.

Nothing of a drawing is typed but which modules are boxes (blue: with parameters). Names are those of the modules;
channels, sizes and arrows are what a run of the network shows: an arrow leads to a box from each box whose output it
reads, whatever is computed in between. What nothing reads is left out. Needs matplotlib. Writes
docs/images/networks/*.svg.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from math import log2
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import vosops
from vosops.models import find_model

IMAGES = Path(__file__).parent / "images" / "networks"
INPUT = "image"
SIDE = 256
"""Of the image, or the next one that the network takes."""

WIDEST = 15
"""Letters of a line in a box."""

COLUMN, ROW, TITLE, ABOVE = 1.12, 0.66, 0.3, 0.72
"""Inches; the last above arrows that rise over the first row."""

GAP = 0.09
ARCH, ARCH_MORE = 0.8, 0.12
"""Rows that an arrow rises above boxes in its way, if it skips one, and for each one more."""

FILL, PLAIN, EDGE, ARROW, BACKGROUND = "#dbe9f4", "#f4f4f4", "#1b6ca8", "#666666", "#ffffff"

BOXES: dict[
    str, tuple[list[str], dict[str, Any]]
] = {  # network: patterns of the modules that are boxes, and options
    "unet": (["inc", "down*", "up?", "outc"], {}),
    "unetplusplus": (["conv?_?", "final"], {}),
    "resunet": (
        ["input_layer", "input_skip", "residual_conv_?", "bridge", "up_residual_conv?", "output_layer"],
        {},
    ),
    "resunetplusplus": (["c?", "b1", "d?.a1", "d?.r1", "aspp", "output"], {}),
    "segnet": (["ConvEn?1", "ConvEn?2", "ConvEn?3", "ConvDe?1", "ConvDe?2", "ConvDe?3"], {}),
    "deconvnet": (["conv?", "conv67", "deconv67", "deconv?"], {}),
    "deeplabv3plus": (
        [
            "backbone.conv1",
            "backbone.layer?",
            "classifier.project",
            "classifier.aspp.convs.?",
            "classifier.aspp.project",
            "classifier.classifier.0",
            "classifier.classifier.3",
        ],
        {},
    ),
    "icnn": (["input_conv.?", "interlink_layers.?.iCNN_Nodelist.?", "last_conv?"], {}),
    "gridnet": (["lateral_*", "down_?_?", "up_?_?"], {}),
    "hrnet_w48": (
        [
            "conv1",
            "conv2",
            "layer1",
            "stage2.0.branches.?",
            "stage3.3.branches.?",
            "stage4.2.branches.?",
            "last_layer",
        ],
        {},
    ),
    "hrnet_w48_ocr": (
        [
            "conv1",
            "conv2",
            "layer1",
            "stage2.0.branches.?",
            "stage3.3.branches.?",
            "stage4.2.branches.?",
            "aux_head",
            "conv3x3_ocr",
            "ocr_gather_head",
            "ocr_distri_head.object_context_block",
            "ocr_distri_head.conv_bn_dropout",
            "cls_head",
        ],
        {},
    ),
    "danet": (
        [
            "pretrained.conv1",
            "pretrained.layer?",
            "head.conv5?",
            "head.sa",
            "head.sc",
            "head.conv51",
            "head.conv52",
            "head.conv8",
        ],
        {},
    ),
    "pspnet": (["layer?", "ppm.features.?", "cls.0", "cls.4"], {}),
    "icnet": (
        [
            "conv_sub1.?",
            "pretrained.layer?",
            "head.cff_*.conv_low",
            "head.cff_*.conv_high",
            "head.conv_cls",
        ],
        {},
    ),
}


@dataclass
class Box:
    """A run of a module: its name, the size (C,H,W) of its output, and the boxes that it reads, by number."""

    name: str
    size: tuple[int, ...]
    reads: set[int] = field(default_factory=set)
    parameters: int = 0

    @property
    def text(self) -> str:
        """What the box says below its name: channels, rows and columns."""
        return " x ".join(map(str, self.size))


class _Origins(TorchDispatchMode):
    """Remembers of which boxes' outputs every tensor was made."""

    def __init__(self) -> None:
        super().__init__()
        self.of: dict[int, set[int]] = {}
        self.kept: list[Tensor] = []

    def set(self, tensors: Any, boxes: set[int]) -> None:
        for x in tree_leaves(tensors):
            if isinstance(x, Tensor):
                self.kept.append(x)  # so that no other gets its number
                self.of[id(x)] = boxes

    def get(self, tensors: Any) -> set[int]:
        found = (self.of.get(id(x), set()) for x in tree_leaves(tensors) if isinstance(x, Tensor))
        return set().union(*found)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        self.set(result, self.get([args, kwargs]))
        return result


def trace(name: str) -> list[Box]:
    """Run a network, and return what its boxes are, in the order in which they end; the first is the image."""
    patterns, options = BOXES[name]
    with torch.device("meta"):
        network = find_model(name).load()(**options).eval()
    sides = network.sides.at_least(SIDE)
    boxes = [Box(INPUT, (3, sides, sides))]
    origins = _Origins()
    names = [path for path, _ in network.named_modules() if any(_matches(path, p) for p in patterns)]
    reads: dict[str, set[int]] = {}

    def before(path: str) -> Any:
        def hook(module: nn.Module, given: Any) -> None:
            reads[path] = origins.get(given)

        return hook

    def after(path: str) -> Any:
        def hook(module: nn.Module, given: Any, found: Any) -> None:
            x = next(x for x in tree_leaves(found) if isinstance(x, Tensor))
            count = sum(p.numel() for p in module.parameters())
            boxes.append(Box(path, tuple(x.shape[1:]), reads[path], count))
            origins.set(found, {len(boxes) - 1})

        return hook

    for path in names:
        module = network.get_submodule(path)
        module.register_forward_pre_hook(before(path))
        module.register_forward_hook(after(path))
    images = torch.empty(1, 3, sides, sides, device="meta")
    with torch.no_grad(), vosops.use_backend("reference"), origins:
        origins.set(images, {0})
        found = network(images)
    return _read(boxes, origins.get(found))


def _read(boxes: list[Box], last: set[int]) -> list[Box]:
    """Return the boxes that the last ones are made of, with new numbers."""
    kept, more = set(last), list(last)
    while more:
        new = boxes[more.pop()].reads - kept
        kept |= new
        more += new
    order = sorted(kept)
    number = {n: place for place, n in enumerate(order)}
    return [replace(boxes[n], reads={number[m] for m in boxes[n].reads}) for n in order]


def _matches(path: str, pattern: str) -> bool:
    """Match part by part, so that `*` does not cross a dot."""
    parts, patterns = path.split("."), pattern.split(".")
    return len(parts) == len(patterns) and all(map(fnmatchcase, parts, patterns))


def columns(boxes: list[Box]) -> list[int]:
    """Return the column of each box: one after the last that it reads."""
    found: list[int] = []
    for box in boxes:
        found.append(1 + max((found[n] for n in box.reads), default=-1))
    return found


def heights(boxes: list[Box]) -> list[float]:
    """Return how far below the top each box is: maps of a size in a row, those of a column below each other."""
    levels = [round(log2(boxes[0].size[1] / box.size[1])) for box in boxes]
    stacks: dict[tuple[int, int], list[int]] = {}
    for n, place in enumerate(zip(levels, columns(boxes), strict=True)):
        stacks.setdefault(place, []).append(n)
    found = [0.0] * len(boxes)
    top = 0.0
    for level in sorted(set(levels)):
        here = [stack for (own, _), stack in stacks.items() if own == level]
        tallest = max(map(len, here))
        for stack in here:
            first = top + (tallest - len(stack)) / 2
            for place, n in enumerate(stack):
                found[n] = first + place
        top += tallest
    return found


def lines_of(name: str) -> list[str]:
    """Return a name in lines that fit into a box, broken after dots and underscores."""
    lines = [""]
    for part in re.findall(r"[^._]+[._]?", name):
        if lines[-1] and len(lines[-1]) + len(part) > WIDEST:
            lines.append("")
        lines[-1] += part
    return lines


def _rises(boxes: list[Box], places: list[tuple[int, float]]) -> list[dict[int, float]]:
    """Return for each box which arrows from others rise over boxes in their way, and by how many rows."""
    found = []
    for (x, y), box in zip(places, boxes, strict=True):
        rises = {}
        for n in box.reads:
            from_x, from_y = places[n]
            if from_y == y and any(other_y == y and from_x < other_x < x for other_x, other_y in places):
                rises[n] = ARCH + ARCH_MORE * (x - from_x - 2)
        found.append(rises)
    return found


def draw(name: str, path: Path) -> None:
    """Draw a network into an SVG; boxes have the ids ``NAME:SIZE``, arrows ``FROM>TO``."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

    boxes = trace(name)
    places = list(zip(columns(boxes), heights(boxes), strict=True))
    right, bottom = (max(values) + 1 for values in zip(*places, strict=True))
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "font.family": "sans-serif"}):
        above = (
            ABOVE
            if any(y == 0 and rise for (_, y), rise in zip(places, _rises(boxes, places), strict=True))
            else 0
        )
        height = above + bottom * ROW + TITLE
        figure = Figure(figsize=(right * COLUMN, height))
        figure.patch.set_facecolor(BACKGROUND)
        axes = figure.add_axes((0, TITLE / height, 1, bottom * ROW / height))
        axes.set(xlim=(0, right), ylim=(bottom, 0))
        axes.set_axis_off()
        sides = " x ".join(map(str, boxes[0].size[1:]))
        title = f"{name}: channels x rows x columns of an image of {sides}"
        figure.text(GAP / right, TITLE / 2 / height, title, va="center", size=8)
        for (x, y), box, rises in zip(places, boxes, _rises(boxes, places), strict=True):
            for n in sorted(box.reads):
                from_x, from_y = places[n]
                bend = -2 * rises.get(n, 0) * ROW / max(1, (x - from_x - 1) * COLUMN)
                arrow = FancyArrowPatch(
                    (from_x + 1 - GAP, from_y + 0.5),
                    (x + GAP, y + 0.5),
                    connectionstyle=f"arc3,rad={bend}",
                    arrowstyle="-|>",
                    mutation_scale=7,
                    lw=0.8,
                    color=ARROW,
                    shrinkA=0,
                    shrinkB=0,
                    zorder=1,
                    clip_on=False,
                    gid=f"{boxes[n].name}>{box.name}",
                )
                axes.add_patch(arrow)
            trained = box.parameters > 0
            patch = FancyBboxPatch(
                (x + GAP, y + GAP),
                1 - 2 * GAP,
                1 - 2 * GAP,
                boxstyle="round,pad=0,rounding_size=0.06",
                fc=FILL if trained else PLAIN,
                ec=EDGE,
                lw=0.8,
                zorder=2,
                gid=f"{box.name}:{box.text}",
            )
            axes.add_patch(patch)
            label = "\n".join([*lines_of(box.name), box.text])
            axes.text(x + 0.5, y + 0.5, label, ha="center", va="center", size=6.5, zorder=3, linespacing=1.15)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})


if __name__ == "__main__":
    for chosen in sys.argv[1:] or BOXES:
        draw(chosen, IMAGES / f"{chosen}.svg")
