"""What :class:`vosops.inference.SemanticTracker` needs of a network that segments clips into classes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from vosops import _checks, backends
from vosops.models._tracking import check_frame
from vosops.models.recurrence import Recurrent, State, Time, build_layers, layer_options
from vosops.models.rows import Cropped, Enlarged, Held, Mapped, Rows
from vosops.models.tiles import Tile, cut_into_tiles

__all__ = ["FrameNetwork", "SemanticNetwork", "Sides", "State", "bands"]

_BYTE_VALUES = 256


@dataclass(frozen=True)
class Sides:
    """Which heights and widths a network takes: ``least`` or more, that divided by ``multiple`` leave ``remainder``.

    >>> from vosops.models.semantic_network import Sides
    >>> Sides(32, least=224).at_least(2160), Sides(8, 1).nearest(713), Sides(8, 1).nearest(720)
    (2176, [713], [713, 721])
    """

    multiple: int = 1
    remainder: int = 0
    least: int = 1

    def at_least(self, side: int) -> int:
        """Return the shortest side that is taken and not below this one."""
        side = max(side, self.least)
        return side + (self.remainder - side) % self.multiple

    def nearest(self, side: int) -> list[int]:
        """Return the next one below, if there is one, and above; the side alone if it is taken."""
        above = self.at_least(side)
        below = above - self.multiple
        return [above] if above == side or below < self.least else [below, above]

    def check(self, images: Tensor) -> None:
        """Raise ValueError, which names the nearest sizes, unless images are (N,C,H,W) of sides that are taken."""
        if images.ndim != 4:
            raise ValueError(f"images must be (N,C,H,W), got {tuple(images.shape)}")
        wrong = [
            f"{name} {side}: the nearest {'is' if len(near) == 1 else 'are'} {' and '.join(map(str, near))}"
            for name, side in zip(("height", "width"), images.shape[2:], strict=True)
            if (near := self.nearest(side)) != [side]
        ]
        if wrong:
            raise ValueError(f"images must have sides {self}, got {'; '.join(wrong)}")

    def __str__(self) -> str:
        wanted = f"of {self.least} pixels or more"
        if self.remainder:
            return f"{wanted} that are {self.remainder} more than a multiple of {self.multiple}"
        return wanted + f" that are multiples of {self.multiple}" * (self.multiple > 1)


def bands(
    logits: Tensor | Rows, size: tuple[int, int], *, align_corners: bool = False, whole: bool = False
) -> Iterator[tuple[slice, Tensor]]:
    """Enlarge logits (K,h,w), or rows (1,K,h,w), to a size, a few rows at a time.

    Where they are in the whole, and (K,rows,W) float32. One class alone comes as two, the background with logits of 0
    and it. ``whole``: all rows at once.
    """
    source = Mapped(logits if isinstance(logits, Rows) else Held(logits[None]), Tensor.float)
    enlarged = Enlarged(source, size, align_corners=align_corners)
    for rows, (band,) in enlarged.bands(whole=whole):
        yield rows, torch.cat([torch.zeros_like(band), band]) if len(band) == 1 else band


_LAYERS = frozenset(
    {
        nn.AdaptiveAvgPool2d,
        nn.BatchNorm2d,
        nn.Conv2d,
        nn.ConvTranspose2d,
        nn.Dropout,
        nn.Dropout2d,
        nn.Identity,
        nn.Linear,
        nn.MaxPool2d,
        nn.PReLU,
        nn.ReLU,
        nn.ReLU6,
        nn.Sigmoid,
        nn.SyncBatchNorm,
        nn.Tanh,
        nn.Upsample,
    }
)
"""PyTorch's modules that networks here are made of."""


def _is_changed(module: nn.Module) -> bool:
    """Return whether a module has hooks, or is neither one of `_LAYERS` nor made of others or of this package."""
    own = type(module)
    if module._forward_hooks or module._forward_pre_hooks:
        return True
    return own not in _LAYERS and not module._modules and not own.__module__.startswith("vosops.")


_BATCH = 1  # dimension of a state (L,N,C,h,w)


def _begun_one_more(clips: State | None, most: int) -> State | None:
    """Return the states of clips of one video, the oldest first, with another that begins; without those too old."""
    if clips is None:
        return None

    def one_more(x: Tensor) -> Tensor:
        kept = x[:, max(0, x.shape[_BATCH] - most + 1) :]
        return torch.cat([kept, torch.zeros_like(x[:, :1])], _BATCH)

    return {place: (one_more(h), one_more(c)) for place, (h, c) in clips.items()}


def _split(clips: State | None) -> list[State | None]:
    """Return the state of each clip."""
    if clips is None:
        return [None]
    parts = {place: (h.split(1, _BATCH), c.split(1, _BATCH)) for place, (h, c) in clips.items()}
    count = next(iter(clips.values()))[0].shape[_BATCH]
    return [{place: (h[n], c[n]) for place, (h, c) in parts.items()} for n in range(count)]


def _joined(pairs: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Return the states of a place in one."""
    return torch.cat([h for h, _ in pairs], _BATCH), torch.cat([c for _, c in pairs], _BATCH)


def labels_dtype(classes: int) -> torch.dtype:
    """Return the dtype of label maps: uint8, or int64 for more than 256 classes."""
    return torch.uint8 if classes <= _BYTE_VALUES else torch.int64


class SemanticNetwork(nn.Module, ABC):
    """A network of two halves: one that sees a frame alone, and one that is recurrent.

    One that is not recurrent, or has ConvLSTMs at places of its own choice, is a :class:`FrameNetwork`.
    """

    num_classes: int
    """K; 1 for a network whose only logit says foreground."""

    unused_weights: tuple[str, ...] = ()
    """How names begin that checkpoints of the original hold and that are not loaded."""

    min_side: int = 1
    """The least side of a frame."""

    align_corners: bool = False
    """How logits are enlarged to the frame's size."""

    recurrent: bool = True
    """Whether a frame's logits depend on the frames before it."""

    @abstractmethod
    def prepare(self, frames: Tensor) -> Tensor:
        """(N,3,H,W) RGB, uint8 or floating in [0, 1] -> images in the network's dtype, normalised."""

    @abstractmethod
    def features(self, images: Tensor) -> tuple[Tensor, ...]:
        """Images (N,3,H,W) -> maps, each of N, that later frames of the same clip need no more than once."""

    def supervised(self, clips: Tensor) -> list[tuple[float, Tensor]]:
        """Return what a loss is taken of, with gradients, for training by ``vosops train``.

        clips (N,T,3,H,W), uint8 or floating in [0, 1] -> the weight and the logits (N,T',K,h,w) of each output, of the
        last T' frames of each clip.
        """
        length = clips.shape[1]
        logits, _ = self.logits(self.features(self.prepare(clips.flatten(0, 1))), length)
        return [(1.0, logits.unflatten(0, (-1, length)))]

    @abstractmethod
    def logits(
        self, features: tuple[Tensor, ...], length: int, state: State | None = None, *, last: bool = False
    ) -> tuple[Tensor, State]:
        """Features of N clips of ``length`` frames (N*length, a clip's frames in order) -> logits and the state.

        state: what an earlier part of the clips returned; None begins with zeros. Logits are (N*length,K,h,w), or
        with ``last`` of each clip's last frame alone, (N,K,h,w).
        """


class FrameNetwork(SemanticNetwork):
    """A network that segments each frame alone: it has ``num_classes`` and a ``forward``, and nothing else is needed.

    >>> import torch
    >>> from vosops.inference import SemanticTracker
    >>> from vosops.models import FrameNetwork
    >>> class OneLayer(FrameNetwork):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.num_classes = 5
    ...         self.layer = torch.nn.Conv2d(3, 5, 3, stride=4, padding=1)
    ...
    ...     def forward(self, images):
    ...         return self.layer(images)
    >>> SemanticTracker(OneLayer()).step(torch.rand(3, 32, 48), output="labels").shape
    torch.Size([32, 48])

    Those of this package have an option `recurrent`, by which a :class:`vosops.nn.ConvLSTM` takes the place of the map
    at some of their `places`. `forward` then takes clips (N,T,C,H,W), or images (N,C,H,W) as a step, and a state, and
    returns what it does otherwise and the state.

    >>> from vosops.models import create_model
    >>> network = create_model("unet", num_classes=4, recurrent="bottleneck")
    >>> logits, state = network(torch.rand(1, 2, 3, 32, 48))
    >>> logits.shape, network(torch.rand(1, 3, 32, 48), state)[0].shape
    (torch.Size([1, 2, 4, 32, 48]), torch.Size([1, 4, 32, 48]))
    """

    recurrent = False
    places: Mapping[str, int] = {}
    """Where a ConvLSTM can be, in the order in which maps get there, and the channels of the map."""

    time: Time | None = None
    """What is known of a run through time while it lasts."""

    sides: Sides = Sides()
    """The heights and widths that `forward` takes; what is smaller or between them is padded by `features`."""

    stride: int = 1
    """Tiles begin at multiples of it, so that they are pooled as the whole image is."""

    reach: int | None = None
    """How many rows or columns from a pixel others lie, at most, that its logits depend on; None: the whole image."""

    in_channels: int = 3
    """Channels of images."""

    mean: tuple[float, ...] = (0.0,)
    """Mean of the channels of frames in [0, 1], subtracted before `forward`."""

    std: tuple[float, ...] = (1.0,)
    """What they are divided by then."""

    loss_weights: tuple[float, ...] = ()
    """Of what `forward` gives in training mode, if that is several; empty: all count alike."""

    @abstractmethod
    def forward(self, images: Tensor) -> Any:
        """Images (N,3,H,W), as `prepare` gives them -> logits (N,K,h,w), in eval mode; they may be smaller."""

    def set_places(self, places: Mapping[str, int], recurrent: Recurrent | None) -> None:
        """Say which places there are, and put a ConvLSTM at those that are chosen; at the end of `__init__`.

        What `forward` and `rows` make of the map at each place then passes :meth:`at` or :meth:`rows_at`, in the order
        of `places`. Parameters are named ``lstms.PLACE.layers.N.*``. recurrent: places and options, see
        :func:`vosops.models.recurrence.layer_options`. Raises ValueError for a place that there is not.
        """
        self.places = dict(places)
        options = layer_options(recurrent, self.places)
        self.recurrent = bool(options)
        if options:
            self.lstms = build_layers(options, self.places)
            self.reach = None  # a state sees farther from frame to frame

    def at(self, place: str, x: Tensor) -> Tensor:
        """Map (N,C,h,w) at a place -> what the ConvLSTM there makes of it, a map of its own; x if there is none.

        Without a run through time (:meth:`during`) each map is the first of a clip.
        """
        if not self._is_recurrent_at(place):
            return x
        return (self.time or Time()).run(place, self.lstms[place], x)  # type: ignore[arg-type]

    def rows_at(self, place: str, x: Rows) -> Rows:
        """Do the same with rows; where there is no ConvLSTM they stay what they are."""
        return Held(self.at(place, x.whole())) if self._is_recurrent_at(place) else x

    def classify(self, head: nn.Sequential, x: Tensor) -> Tensor:
        """Return what a head makes of a map; the place "head" is before its last module."""
        if not self._is_recurrent_at("head"):
            logits: Tensor = head(x)
            return logits
        logits = head[-1](self.at("head", head[:-1](x)))
        return logits

    def _is_recurrent_at(self, place: str) -> bool:
        return self.recurrent and place in self.lstms  # type: ignore[operator]

    @contextmanager
    def during(self, time: Time) -> Iterator[Time]:
        """Run maps through time while the context lasts."""
        self.time = time
        try:
            yield time
        finally:
            self.time = None

    @property
    def optional_weights(self) -> tuple[str, ...]:
        """How names begin that a checkpoint may lack as a whole: a network that is trained before it is recurrent."""
        return ("lstms.",) if self.recurrent else ()

    def rows(self, images: Tensor) -> Rows:
        """Images -> the logits of `forward`, in eval mode without gradients, as rows that are made when asked for.

        What a network overrides to need less memory than `forward`, which calls it where :attr:`streams` is true.
        """
        logits: Tensor = self(images)
        return Held(logits)

    @property
    def streams(self) -> bool:
        """Whether `forward` computes by rows: in eval mode without gradients.

        Not under ``use_backend("reference")``, where it computes as the original does; not while it is compiled,
        exported, traced or mapped (``torch.vmap``); and not where a module has a hook, which would not be called, or
        has been replaced by one of another class.
        """
        return not (
            self.training
            or torch.is_grad_enabled()
            or self.naive
            or torch.compiler.is_compiling()
            or torch._C._get_tracing_state() is not None
            or torch._C._functorch.peek_interpreter_stack() is not None
            or any(_is_changed(module) for module in self.modules())
        )

    @property
    def naive(self) -> bool:
        """Whether everything is to be computed as the original does, what it discards too."""
        return backends.forced() == "reference"

    def prepare(self, frames: Tensor) -> Tensor:
        """See :class:`SemanticNetwork`; frames of other than three channels are not normalised."""
        dtype = next(self.parameters()).dtype
        images = frames.to(dtype) / 255 if frames.dtype == torch.uint8 else frames.to(dtype)
        if len(self.mean) not in (1, images.shape[-3]):
            return images
        mean, std = (images.new_tensor(x)[:, None, None] for x in (self.mean, self.std))
        return (images - mean) / std

    def logit_rows(self, images: Tensor, size: tuple[int, int] | None = None) -> Rows:
        """Images (N,C,H,W) of any size -> logits (N,K,*size) as rows, size being that of the images unless given.

        Images are padded to sides that `forward` takes, by repeating the last row and column.
        """
        own = images.shape[2:]
        images = self._padded(images)
        padded = images.shape[2:]
        logits = self.rows(images) if self.streams else Held(self._of_frames(images))
        if padded != own:
            logits = Cropped(Enlarged(logits, padded, align_corners=self.align_corners), own)
        return Enlarged(logits, size or own, align_corners=self.align_corners)

    def features(self, images: Tensor) -> tuple[Tensor, ...]:
        """See :class:`SemanticNetwork`: the logits, of images that are padded to sides that `forward` takes.

        Of a recurrent network the images: all of it is run for each frame of a clip, see :meth:`advance`.
        """
        return (images if self.recurrent else self._logits_inside(images),)

    def supervised(self, clips: Tensor) -> list[tuple[float, Tensor]]:
        """See :class:`SemanticNetwork`: what `forward` gives, by `loss_weights`."""
        length = clips.shape[1]
        images = self.prepare(clips.flatten(0, 1))
        found = self(images.unflatten(0, (-1, length)))[0] if self.recurrent else self(images)
        outputs = list(found) if isinstance(found, (tuple, list)) else [found]
        if not self.recurrent:
            outputs = [x.unflatten(0, (-1, length)) for x in outputs]
        weights = self.loss_weights if len(self.loss_weights) == len(outputs) else None
        return list(zip(weights or [1 / len(outputs)] * len(outputs), outputs, strict=True))

    def _logits_inside(self, images: Tensor) -> Tensor:
        """Return logits of images of any size; at their size where `forward` does not take it."""
        height, width = images.shape[2:]
        padded = self._padded(images)
        size = padded.shape[2:]
        logits = self._of_frames(padded)
        if size == (height, width):
            return logits
        if logits.shape[2:] != size:
            logits = functional.interpolate(logits, size, mode="bilinear", align_corners=self.align_corners)
        return logits[:, :, :height, :width]

    def _of_frames(self, images: Tensor) -> Tensor:
        """Return what `forward` does without the state."""
        found = self(images)
        logits: Tensor = found[0] if self.recurrent and self.time is None else found
        return logits

    def _padded(self, images: Tensor) -> Tensor:
        """Repeat the last row and column of images up to sides that `forward` takes."""
        height, width = images.shape[2:]
        rows, columns = (self.sides.at_least(side) - side for side in (height, width))
        if not rows and not columns:
            return images
        return functional.pad(images, (0, columns, 0, rows), mode="replicate")

    def logits(
        self, features: tuple[Tensor, ...], length: int, state: State | None = None, *, last: bool = False
    ) -> tuple[Tensor, State]:
        """See :class:`SemanticNetwork`."""
        (x,) = features
        after: State = {}
        if self.recurrent:
            with self.during(Time(length, state)) as time:
                x = self._logits_inside(x)
            after = time.after
        return (x[length - 1 :: length] if last else x), after

    def advance(
        self,
        images: Tensor,
        state: State | None = None,
        *,
        window: int | None = None,
        size: tuple[int, int] | None = None,
    ) -> tuple[Rows, State]:
        """Segment the next frame (1,C,H,W) of a video: logits (1,K,*size) as rows, see `logit_rows`, and the state.

        Args:
            images: The frame, as `prepare` gives it.
            state: What the frame before returned with the same window; None begins a video.
            window: The frame is the last of a clip of that many, which begins with zeros. Its ConvLSTM is then run as
                often, or all that precedes the last of several. None: the state is that of all frames before.
            size: As for `logit_rows`.
        """
        if window is None:
            with self.during(Time(1, state)) as time:
                return self.logit_rows(images, size), time.after
        clips = _begun_one_more(state, window)
        if len(self.lstms) == 1:  # type: ignore[arg-type]
            with self.during(Time(1, clips, windows=True)) as time:
                return self.logit_rows(images, size), time.after
        found: list[State] = []
        for clip in reversed(_split(clips)):  # the last that is run is the oldest, whose result is wanted
            with self.during(Time(1, clip)) as time:
                rows = self.logit_rows(images, size)
            found.insert(0, time.after)
        return rows, {place: _joined([after[place] for after in found]) for place in found[0]}

    def pieces(
        self,
        images: Tensor,
        size: tuple[int, int] | None = None,
        *,
        tile: int | None = None,
        overlap: int | None = None,
    ) -> Iterator[tuple[slice, slice, Tensor]]:
        """Compute the logits of an image (1,C,H,W) of any size a piece at a time, as `predict` does.

        Where it is in the whole, rows and columns, and (K,rows,columns) float32; one class alone comes as two, see
        `bands`. size: (height, width) of the whole, the image's unless given; with tiles it is the image's.
        """
        own = (images.shape[2], images.shape[3])
        if tile is None:
            for rows, band in bands(self.logit_rows(images, size), size or own, whole=self.naive):
                yield rows, slice(None), band
            return
        for part in self.tiles(own, tile, overlap):
            rows, columns = (slice(x.start, x.stop) for x in (part.rows, part.columns))
            logits = self.logit_rows(images[:, :, rows, columns])
            inside = slice(part.kept_columns.start - columns.start, part.kept_columns.stop - columns.start)
            for made, band in bands(logits, logits.size[2:], whole=self.naive):
                top = max(made.start + rows.start, part.kept_rows.start)
                bottom = min(made.stop + rows.start, part.kept_rows.stop)
                if top < bottom:
                    first = made.start + rows.start
                    yield (
                        slice(top, bottom),
                        slice(part.kept_columns.start, part.kept_columns.stop),
                        band[:, top - first : bottom - first, inside],
                    )

    def tiles(self, size: tuple[int, int], tile: int, overlap: int | None = None) -> list[Tile]:
        """Cut an image of (height, width) into the tiles that `predict` takes; ValueError for what cannot be."""
        _checks.check_positive_int("tile", tile)
        if overlap is None:
            wanted = tile if self.reach is None else -(-2 * self.reach // self.stride) * self.stride
            overlap = wanted if wanted <= tile // 2 else tile // 4
        return cut_into_tiles(size, tile, overlap, self.stride)

    @torch.inference_mode()
    def predict(
        self, image: Tensor, *, tile: int | None = None, overlap: int | None = None, naive: bool = False
    ) -> Tensor:
        """Find the class of every pixel of an image of any size: (C,H,W) uint8 or in [0, 1] -> (H,W) uint8.

        int64 for more than 256 classes; a network with one class gives 1 where its logit is positive, and 0 elsewhere.
        The image is padded to a size that `forward` takes. Where :attr:`streams` is true memory is that of the maps
        that :meth:`rows` holds, and full-size logits are made a few rows at a time.

        Args:
            image: C is the network's `in_channels`; three channels are RGB.
            tile: Segment tiles of at most that many rows and columns one after the other, for images that would need
                too much memory at once.
            overlap: Pixels that neighbouring tiles share; half of them count in each. The labels are those of the whole
                image if that half is :attr:`reach` or more, as by default where tiles are four times as large. Where
                `reach` is None a pixel's class depends on the whole image, and that of a tile is another; a quarter of
                a tile by default.
            naive: Compute as the original code does, at its memory.

        Raises:
            ValueError, TypeError: In training mode; for another image, tile or overlap.

        >>> import torch
        >>> from vosops.models import create_model
        >>> create_model("unet", num_classes=4).predict(torch.rand(3, 30, 50)).shape
        torch.Size([30, 50])
        """
        if self.training:
            raise ValueError("the network must be in eval mode to predict: call network.eval()")
        check_frame(image, channels=self.in_channels)
        device = next(self.parameters()).device
        labels = torch.empty(image.shape[1:], dtype=labels_dtype(self.num_classes), device=device)
        with backends.use_backend("reference") if naive else nullcontext():
            images = self.prepare(image[None].to(device))
            for rows, columns, logits in self.pieces(images, tile=tile, overlap=overlap):
                labels[rows, columns] = logits.argmax(0)
        return labels
