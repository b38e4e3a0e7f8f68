"""Makes the pictures of the documentation from the demonstration clip: `python docs/make_pictures.py [RUN]`.

Needs `pip install 'vosops[demo]' matplotlib`, and for demo.png the folder that `vosops demo --out RUN`
wrote (by default that of `make demo`). Writes docs/images/*.png.
"""

from __future__ import annotations

import copy
import functools
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.patches import Rectangle
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

import vosops
import vosops.nn
from vosops import reference
from vosops.benchmarking import conv_lstm
from vosops.benchmarking.conv_lstm import EAGER, EXACT
from vosops.benchmarking.measure import Clock, interleave
from vosops.data import DemoClip
from vosops.data.demo_clip import COLOURS
from vosops.models.features import create_backbone
from vosops.runs.drawing import overlay

matplotlib.use("Agg")

IMAGES = Path(__file__).parent / "images"
DEMO = Path(__file__).parents[1] / "demo-output"
"""What `make demo` writes."""

SIZE = (960, 1712)
"""Of the rendered frames; embeddings of stride 8 then have 120 x 214 pixels, as FEELVOS' have at 480p."""

STRIDE = 8
NAMES = ("background", "astronaut", "shuttle", "cup")
LOCAL_FRAMES, RADIUS = (14, 18), 15
GLOBAL_FRAMES = (0, 45)
DEMO_FRAMES = (0, 20, 31, 45)
DEMO_WIDTH = 440
COLOUR_TABLE = np.zeros((256, 3), np.uint8)
COLOUR_TABLE[list(COLOURS)] = list(COLOURS.values())
POINT = "#ffffff"
ABSENT_GREY = "0.82"
PALETTE_SIZE = 192
LSTM_COLOURS = ("#1b6ca8", "#d1495b", "#3b8b5a")
LSTM_ROUNDS = 5
LSTM_TICKS = (10, 20, 50, 100, 200)
LSTM_BOUND = 2e-5
"""The error up to which Winograd's algorithm is the default."""
TAPS = 7
WINOGRAD_CHANNELS = 512
COMMON_POINTS = {
    4: (0, 0.5, 1, 2, 4),
    6: (0, 0.5, 1, 2, 4, 0.25),
}
RECIPROCALS = {
    4: (0, 0.416, 0.8, 1.25, 2.4),
    5: (0.194, 0.566, 0.909, 1.354, 2.602),
    6: (0, 0.357, 0.686, 1, 1.457, 2.804),
    8: (0, 0.312, 0.604, 0.868, 1.153, 1.655, 3.207),
}
"""Outputs of F(m, 7) -> its points, zero and the positive ones."""
CONV_SIZES = ((4096, 15, 27), (2048, 30, 54), (256, 60, 107))
TIMED_ROUNDS = 5


def embed(frame: np.ndarray) -> Tensor:
    """(H,W,3) uint8 -> (1,C,H/8,W/8) unit vectors: ImageNet features of two strides, side by side."""
    image = torch.from_numpy(frame).permute(2, 0, 1)[None] / 255
    with torch.no_grad():
        fine, coarse = (F.normalize(m, dim=1) for m in create_backbone()(image))
    coarse = F.interpolate(coarse, fine.shape[2:], mode="bilinear", align_corners=False)
    return F.normalize(torch.cat([fine, coarse], 1), dim=1)


def shrink(labels: np.ndarray) -> Tensor:
    """Labels (H,W) at the embedding's size, (1,H/8,W/8)."""
    return torch.from_numpy(labels[STRIDE // 2 :: STRIDE, STRIDE // 2 :: STRIDE].copy())[None]


def matching_picture(name: str, frames: tuple[int, int], radius: int | None) -> None:
    """Draw the two frames, the nearest object of each query pixel, and below them the distance to each object."""
    clip = DemoClip(size=SIZE)
    (key_frame, key_labels), (query_frame, _) = (clip[t] for t in frames)
    query, key, labels = embed(query_frame), embed(key_frame), shrink(key_labels)
    if radius is None:
        distance = vosops.global_matching(query, key, labels, num_objects=len(NAMES), normalize=False)[0]
    else:
        distance = vosops.local_matching(
            query, key, labels, num_objects=len(NAMES), radius=radius, normalize=False
        )[0]
    nearest = distance.argmin(0).to(torch.uint8).repeat_interleave(STRIDE, 0).repeat_interleave(STRIDE, 1)

    figure, axes = plt.subplots(2, 4, figsize=(12, 3.9), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.03, h_pad=0.03, wspace=0.02)
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
        axis.spines[:].set_visible(False)
    (first, second, third, scale), maps = axes
    first.imshow(overlay(key_frame, key_labels, COLOUR_TABLE, binary=False))
    first.set_title(f"key: frame {frames[0]} and its mask", fontsize=10)
    second.imshow(query_frame)
    second.set_title(f"query: frame {frames[1]}", fontsize=10)
    third.imshow(overlay(query_frame, nearest.numpy(), COLOUR_TABLE, binary=False))
    third.set_title("object with the least distance", fontsize=10)
    if radius is not None:
        y, x = 0.5 * SIZE[0], 0.36 * SIZE[1]
        side = 2 * radius * STRIDE
        first.add_patch(Rectangle((x - side / 2, y - side / 2), side, side, fill=False, color=POINT, lw=1.5))
        first.plot(x, y, "+", color=POINT, ms=6)
        first.text(x, y - side / 2 - 14, "window", color=POINT, fontsize=8, ha="center", va="bottom")
        second.plot(x, y, "+", color=POINT, ms=8, mew=1.5)
        second.text(x, y - 40, "p", color=POINT, fontsize=9, ha="center", va="bottom")
    top = float(distance[distance.isfinite()].quantile(0.98))
    colours = matplotlib.colormaps["viridis_r"].copy()
    colours.set_bad(ABSENT_GREY)
    for axis, values, title in zip(maps, distance, NAMES, strict=True):
        shown = axis.imshow(np.ma.masked_invalid(values.numpy()), cmap=colours, vmin=0, vmax=top)
        axis.set_title(f"distance to: {title}", fontsize=10)
    scale.set_aspect("auto")
    bar = figure.colorbar(
        shown, cax=scale.inset_axes([0.06, 0.62, 0.88, 0.09]), orientation="horizontal", extend="max"
    )
    bar.set_label("squared distance (near is yellow)", fontsize=9)
    bar.ax.tick_params(labelsize=8)
    if radius is not None:
        scale.add_patch(Rectangle((0.06, 0.1), 0.1, 0.14, color=ABSENT_GREY, transform=scale.transAxes))
        scale.text(0.2, 0.17, "no pixel of the object in the window:\n+inf (1 when normalised)", fontsize=8,
                   va="center", transform=scale.transAxes)  # fmt: skip
    figure.savefig(IMAGES / name, dpi=78)
    plt.close(figure)
    compress(IMAGES / name)


def demo_picture(name: str, run: Path) -> None:
    """Frames of the clip with the masks that `vosops demo --out RUN` found from the first one."""
    tiles = []
    for t in DEMO_FRAMES:
        with Image.open(run / f"clip/JPEGImages/480p/demo/{t:05d}.jpg") as image:
            frame = np.asarray(image)
        with Image.open(run / f"masks/{t:05d}.png") as image:
            labels = np.asarray(image)
        picture = Image.fromarray(overlay(frame, labels, COLOUR_TABLE, binary=False))
        height = round(DEMO_WIDTH * picture.height / picture.width)
        tiles.append(np.asarray(picture.resize((DEMO_WIDTH, height), Image.Resampling.LANCZOS)))
    gap = np.full((tiles[0].shape[0], 4, 3), 255, np.uint8)
    top, bottom = (np.hstack([tiles[i], gap, tiles[i + 1]]) for i in (0, 2))
    sheet = np.vstack([top, np.full((4, top.shape[1], 3), 255, np.uint8), bottom])
    Image.fromarray(sheet).save(IMAGES / name)
    compress(IMAGES / name)


def compress(file: Path) -> None:
    """Rewrites a PNG with a small palette of its own."""
    with Image.open(file) as image:
        image.convert("RGB").quantize(PALETTE_SIZE, dither=Image.Dither.NONE).save(file, optimize=True)


def lstm_picture(name: str) -> None:
    """Error against time of a ConvLSTM step: PyTorch's cell in two dtypes, and ours, direct and by Winograd."""
    clock = Clock("cpu", 1)
    markers = {EAGER: ("s", torch.float32), "eager, bfloat16": ("D", torch.bfloat16)}
    markers |= {EXACT: ("^", torch.float32), "vosops": ("o", torch.float32)}
    by_name = {v.name: v for v in conv_lstm.BENCHMARK.variants}
    figure, axes = plt.subplots(figsize=(7.5, 3.6), layout="constrained")
    for size, colour in zip(conv_lstm.BENCHMARK.cases[:3], LSTM_COLOURS, strict=True):
        wide = replace(size, dtype=torch.float32).inputs(clock.device)
        want = reference.conv_lstm(
            wide.x.double(), wide.kernel.double(), wide.bias.double(), tuple(s.double() for s in wide.state)
        )[0]
        calls = {
            title: by_name[title.split(",")[0]].call(replace(size, dtype=dtype).inputs(clock.device), False)
            for title, (_, dtype) in markers.items()
        }
        errors = {
            t: float((call()[0].double() - want).abs().max() / want.abs().max()) for t, call in calls.items()
        }
        times = interleave(calls, clock, rounds=LSTM_ROUNDS, least=LSTM_ROUNDS, budget=60)
        for title, (marker, _) in markers.items():
            axes.scatter(times[title].best * 1e3, errors[title], marker=marker, color=colour, s=55)
    for title, (marker, _) in markers.items():
        axes.scatter([], [], marker=marker, color="0.4", label=title)
    for size, colour in zip(conv_lstm.BENCHMARK.cases[:3], LSTM_COLOURS, strict=True):
        axes.scatter([], [], marker="s", color=colour, label=f"C={size.channels}, {size.height}x{size.width}")
    axes.axhline(LSTM_BOUND, color="0.6", linestyle=":", linewidth=1)
    axes.set(xscale="log", yscale="log", xlabel="ms, one thread", ylabel="largest error of h, relative")
    axes.set_xticks(LSTM_TICKS, [str(t) for t in LSTM_TICKS])
    axes.minorticks_off()
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    figure.savefig(IMAGES / name, dpi=110)
    compress(IMAGES / name)


def toom_cook(points: np.ndarray, outputs: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the float64 transforms of outputs, taps and inputs of F(outputs, TAPS) at finite points and infinity."""
    size = outputs + TAPS - 1

    def at_points(degree: int) -> np.ndarray:
        return np.vstack([np.vander(points, degree, increasing=True), np.eye(degree)[-1]])

    return at_points(outputs).T, at_points(TAPS), np.linalg.inv(at_points(size)).T


def winograd_error(points: np.ndarray, outputs: int) -> float:
    """Return the rms error of F(outputs, TAPS) in float32, relative to the result, over many channels."""
    generator = torch.Generator().manual_seed(0)
    tiles = torch.randn(WINOGRAD_CHANNELS, outputs + TAPS - 1, 64, generator=generator)
    taps = torch.randn(32, WINOGRAD_CHANNELS, TAPS, generator=generator)
    windows = tiles.double().unfold(1, TAPS, 1)
    exact = torch.einsum("cotr,mcr->omt", windows, taps.double())
    out, weight, values = toom_cook(points, outputs)
    norms = np.abs(weight).max(1, keepdims=True)
    transformed = torch.einsum("pj,cjt->pct", torch.from_numpy((values * norms).astype(np.float32)), tiles)
    weights = torch.einsum("pr,mcr->pmc", torch.from_numpy(weight / norms), taps.double()).float()
    result = torch.einsum("op,pmt->omt", torch.from_numpy(out.astype(np.float32)), weights @ transformed)
    return float((result.double() - exact).norm() / exact.norm())


def conv_picture(name: str) -> None:
    """Left: the error of F(m, 7) by its points. Right: speed and error of whole global convolutions."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for label, mark, positive in (
        ("common points", "s--", COMMON_POINTS),
        ("pairs of reciprocals", "o-", RECIPROCALS),
    ):
        errors = []
        for outputs, pairs in positive.items():
            points = np.array([sign * p for p in pairs for sign in ((1, -1) if p else (1,))])
            errors.append((TAPS * outputs / (outputs + TAPS - 1), winograd_error(points, outputs), outputs))
        left.semilogy([e[0] for e in errors], [e[1] for e in errors], mark, label=label)
        for x, y, outputs in errors:
            left.annotate(f"F({outputs}, 7)", (x, y), xytext=(4, -11), textcoords="offset points", fontsize=8)
    left.axhline(2e-5, color="0.6", lw=1)
    left.set(xlabel="times fewer multiplications", ylabel="rms error, relative")
    left.legend()

    torch.set_num_threads(1)
    for size, mark in zip(CONV_SIZES, "os^", strict=True):
        module = vosops.nn.GlobalConv2d(size[0], 256).requires_grad_(False)
        low, x = (
            copy.deepcopy(module).bfloat16(),
            torch.randn(1, *size, generator=torch.Generator().manual_seed(0)),
        )
        exact, calls = vosops.reference.global_conv, {}
        for label, of, dtype, op in (
            ("PyTorch float32", module, torch.float32, exact),
            ("vosops float32", module, torch.float32, vosops.global_conv),
            ("PyTorch bfloat16", low, torch.bfloat16, exact),
            ("vosops bfloat16", low, torch.bfloat16, vosops.global_conv),
        ):
            calls[label] = functools.partial(call_conv, op, of, x.to(dtype))
        wide = call_conv(exact, copy.deepcopy(module).double(), x.double())
        times: dict[str, list[float]] = {label: [] for label in calls}
        errors_of = {}
        for _ in range(TIMED_ROUNDS):
            for label, call in calls.items():
                start = time.process_time()
                result = call()
                times[label].append(time.process_time() - start)
                errors_of[label] = float((result.double() - wide).norm() / wide.norm())
        base = min(times["PyTorch float32"])
        for label, colour in zip(calls, ("C7", "C0", "C3", "C1"), strict=True):
            right.semilogy(base / min(times[label]), errors_of[label], mark, color=colour,
                           label=f"{label}, {size[0]} x {size[1]} x {size[2]}")  # fmt: skip
    right.set(xlabel="times as fast as PyTorch float32", ylabel="rms error, relative")
    right.legend(fontsize=7)
    figure.savefig(IMAGES / name, dpi=90)
    plt.close(figure)
    compress(IMAGES / name)


def call_conv(op: Callable[..., Tensor], module: vosops.nn.GlobalConv2d, x: Tensor) -> Tensor:
    """Return the global convolution of a module by `op`."""
    convs = [module.conv_l1, module.conv_l2, module.conv_r1, module.conv_r2]
    names = ("l1_bias", "l2_bias", "r1_bias", "r2_bias")
    return op(x, *(c.weight for c in convs), **{n: c.bias for n, c in zip(names, convs, strict=True)})


if __name__ == "__main__":
    IMAGES.mkdir(exist_ok=True)
    conv_picture("global_conv.png")
    matching_picture("local_matching.png", LOCAL_FRAMES, RADIUS)
    matching_picture("global_matching.png", GLOBAL_FRAMES, None)
    lstm_picture("conv_lstm.png")
    run = Path(sys.argv[1]) if len(sys.argv) > 1 else DEMO
    if run.exists():
        demo_picture("demo.png", run)
    else:
        print(f"demo.png left as it is: there is no {run}; `make demo` writes it")
