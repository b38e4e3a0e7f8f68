"""Maps whose rows are made when they are asked for, so that between two layers there is never a whole map.

A network is written as usual, from :class:`Held` maps through layers to its logits, and nothing is computed until
:meth:`Rows.whole` or :meth:`Rows.bands` takes the last layer's rows, a band after the other. A layer keeps the few
rows that the next band needs again, so that no row is computed twice. Peak memory is that of the maps that are held,
and a band of each layer. For inference only: nothing here has a gradient.

    >>> import torch
    >>> from vosops.models.rows import Convolved, Held, Pooled
    >>> weight = torch.rand(8, 3, 3, 3)
    >>> with torch.no_grad():
    ...     Pooled(Convolved([Held(torch.rand(1, 3, 20, 30))], weight, padding=1)).whole().shape
    torch.Size([1, 8, 10, 15])
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from vosops.models.network import resize_rows, source_rows
from vosops.ops.conv3x3 import conv2d_rows, takes_rows

__all__ = [
    "Added",
    "Convolved",
    "Cropped",
    "Doubled",
    "Enlarged",
    "Held",
    "Mapped",
    "Padded",
    "Pooled",
    "Repeated",
    "Rows",
    "Unpooled",
    "pool_with_places",
]

_BAND_BYTES = {"cpu": 24 << 20, "cuda": 256 << 20}
"""Of all layers' rows together that are made at a time, by device; on any other as on a CPU."""

_SPLITTING = ("cuda",)
"""Devices where a convolution of several maps is the sum of one for each; elsewhere a band of them is concatenated."""

_LEAST_ROWS = 8
_LAG = 4  # rows that are kept for the slower of two layers that read the same one
_PLACES = 4  # of two bits, in a byte

Size = tuple[int, int, int, int]
Slope = float | Tensor


class Rows(ABC):
    """A map (N,C,H,W) of which rows can be had, from top to bottom.

    size: (N,C,H,W). like: a tensor of its dtype, device and memory format. row_bytes: what a row takes in all layers
    that make it.
    """

    size: Size
    like: Tensor
    row_bytes: float = 0.0

    @abstractmethod
    def rows(self, start: int, stop: int) -> Tensor:
        """Return rows (N,C,stop-start,W); they are valid until rows are asked for again, and not to be changed."""

    def bands(self, *, whole: bool = False) -> Iterator[tuple[slice, Tensor]]:
        """Take all rows, some at a time: where they are, and (N,C,rows,W). whole: all at once."""
        for start, stop in [(0, self.size[2])] if whole else self._steps():
            yield slice(start, stop), self.rows(start, stop)

    def whole(self, into: Tensor | None = None) -> Tensor:
        """Return the whole map (N,C,H,W).

        into: where to, which may be a map that this one is made of, if between them are layers that need no rows above
        those that have been made: a residual block.
        """
        out = self._empty(self.size[2]) if into is None else into
        for rows, band in self.bands():
            out[:, :, rows] = band
        return out

    def _steps(self) -> Iterator[tuple[int, int]]:
        height = self.size[2]
        budget = _BAND_BYTES.get(self.like.device.type, _BAND_BYTES["cpu"])
        step = _round_up(max(1, height), _LEAST_ROWS)
        if self.row_bytes:
            step = min(step, max(_LEAST_ROWS, int(budget / self.row_bytes) // _LEAST_ROWS * _LEAST_ROWS))
        if step < height < 2 * step:  # two bands alike rather than a short one
            step = _round_up(-(-height // 2), _LEAST_ROWS)
        for start in range(0, height, step):
            yield start, min(start + step, height)

    def _empty(self, rows: int) -> Tensor:
        n, channels, _, width = self.size
        return _empty(self.like, (n, channels, rows, width))

    @property
    def _own_bytes(self) -> float:
        n, channels, _, width = self.size
        return float(n * channels * width * self.like.element_size())


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


def _empty(like: Tensor, size: Size) -> Tensor:
    memory_format = torch.channels_last if _is_channels_last(like) else torch.contiguous_format
    return torch.empty(size, dtype=like.dtype, device=like.device, memory_format=memory_format)


def _is_channels_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


class Held(Rows):
    """A map that exists."""

    def __init__(self, x: Tensor) -> None:
        self.x = self.like = x
        n, channels, height, width = x.shape
        self.size = (n, channels, height, width)

    def rows(self, start: int, stop: int) -> Tensor:
        """See :class:`Rows`."""
        return self.x[:, :, start:stop]

    def whole(self, into: Tensor | None = None) -> Tensor:
        """See :class:`Rows`."""
        return self.x if into is None else into.copy_(self.x)


class _Layer(Rows):
    """A map that is computed, of which the latest rows are kept while others may need them."""

    def __init__(self, size: Size, like: Tensor) -> None:
        self.size, self.like = size, like
        self._kept: Tensor | None = None
        self._first = 0  # row of the map that the kept ones begin with
        self._buffer: Tensor | None = None

    @abstractmethod
    def make(self, start: int, stop: int, out: Tensor) -> None:
        """Compute rows into out (N,C,stop-start,W), a part of a map."""

    def rows(self, start: int, stop: int) -> Tensor:
        """See :class:`Rows`."""
        kept, first = self._kept, self._first
        end = first if kept is None else first + kept.shape[2]
        if kept is None or start < first or start > end:
            kept, first, end = None, start, start
        elif stop <= end:
            return kept[:, :, start - first : stop - first]
        begin = max(first, start - _LAG)
        old = None if kept is None else kept[:, :, begin - first :].clone()
        if self._buffer is None or self._buffer.shape[2] < stop - begin:
            self._buffer = self._kept = None  # so that the next one can take its place
            self._buffer = self._empty(stop - begin)
        new = self._buffer[:, :, : stop - begin]
        if old is not None:
            new[:, :, : end - begin] = old
        self.make(end, stop, new[:, :, end - begin :])
        self._kept, self._first = new, begin
        return new[:, :, start - begin :]

    def whole(self, into: Tensor | None = None) -> Tensor:
        """See :class:`Rows`."""
        out = self._empty(self.size[2]) if into is None else into
        for start, stop in self._steps():
            self.make(start, stop, out[:, :, start:stop])
        return out


class Convolved(_Layer):
    """A convolution of several maps as if they were one, whose channels follow each other; no such map is made.

    weight: (M,C/groups,k,k), C channels of all sources together. slope: factor of what is negative in the end, a
    number or a tensor of one; 0 is a ReLU, 1 does nothing. addend: a map that is added before that. Where
    :func:`vosops.ops.conv3x3.takes_rows` says so the sources are read in place; otherwise, on a GPU in float32, each
    is convolved by itself and the sums are added, or a band of them is concatenated.
    """

    def __init__(
        self,
        sources: Sequence[Rows],
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        stride: int = 1,
        padding: int = 0,
        dilation: int = 1,
        groups: int = 1,
        slope: Slope = 1.0,
        addend: Rows | None = None,
    ) -> None:
        n, _, height, width = sources[0].size
        taps = weight.shape[2]
        span = dilation * (taps - 1) + 1
        rows, columns = ((side + 2 * padding - span) // stride + 1 for side in (height, width))
        super().__init__((n, weight.shape[0], rows, columns), sources[0].like)
        self.sources, self.weight, self.bias = list(sources), weight, bias
        self.stride, self.padding, self.dilation, self.groups = stride, padding, dilation, groups
        self.slope, self.addend = slope, addend
        self._span = span
        self._in_place = (
            (stride, padding, dilation, groups, taps) == (1, 1, 1, 1, 3)
            and not _is_channels_last(self.like)
            and takes_rows(rows * columns, weight, self.like)
        )
        # Partial sums in half precision would be rounded once more.
        self._splits = (
            self.like.device.type in _SPLITTING
            and self.like.dtype in (torch.float32, torch.float64)
            and not torch.is_autocast_enabled(self.like.device.type)
            and groups == 1
            and len(sources) > 1
        )
        # Far above and below the rows that are made others are needed, but none between them.
        self._by_taps = (
            stride == 1 and dilation > _LAG and all(isinstance(source, Held) for source in sources)
        )
        of_sources = sum(source.row_bytes for source in sources)
        if not self._in_place:
            of_sources += sum(source.size[1] for source in sources) * n * width * self.like.element_size()
        self.row_bytes = self._own_bytes + stride * of_sources + (addend.row_bytes if addend else 0.0)

    def make(self, start: int, stop: int, out: Tensor) -> None:
        """See :class:`_Layer`."""
        if self._by_taps:
            self._add_taps(start, stop, out)
            return
        low, high, beyond = _seen(start, stop, self.stride, self.padding, self._span, self.sources[0].size[2])
        maps = [source.rows(low, high) for source in self.sources]
        if self._in_place:
            addend = self.addend.rows(start, stop) if self.addend else None
            slope = float(self.slope)
            conv2d_rows(maps, self.weight, self.bias, out, above=start - low, addend=addend, slope=slope)
            return
        if self._splits:
            weights = self.weight.split([x.shape[1] for x in maps], 1)
            y = self._convolved(maps[0], weights[0], self.bias, beyond)
            for x, weight in zip(maps[1:], weights[1:], strict=True):
                y += self._convolved(x, weight, None, beyond)
        else:
            y = self._convolved(_joined(maps), self.weight, self.bias, beyond)
        del maps
        if self.addend:
            y += self.addend.rows(start, stop)
        out.copy_(_bend(y, self.slope))

    def _convolved(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, beyond: tuple[int, int, int, int]
    ) -> Tensor:
        if any(beyond):
            x = functional.pad(x, beyond)
        padding = (0, self.padding)
        return functional.conv2d(x, weight, bias, self.stride, padding, self.dilation, self.groups)

    def _add_taps(self, start: int, stop: int, out: Tensor) -> None:
        """Sum up what each row of the kernel sees."""
        height = self.sources[0].size[2]
        total: Tensor = (
            out.zero_() if self.bias is None else out.copy_(self.bias.view(-1, 1, 1).expand_as(out))
        )
        for tap in range(self.weight.shape[2]):
            offset = tap * self.dilation - self.padding
            low, high = max(start + offset, 0), min(stop + offset, height)
            if low >= high:
                continue
            maps = [source.rows(low, high) for source in self.sources]
            total[:, :, low - offset - start : high - offset - start] += functional.conv2d(
                _joined(maps),
                self.weight[:, :, tap : tap + 1],
                None,
                1,
                (0, self.padding),
                self.dilation,
                self.groups,
            )
        if self.addend:
            total += self.addend.rows(start, stop)
        bent = _bend(total, self.slope)
        if bent is not total:
            out.copy_(bent)


def _seen(
    start: int, stop: int, stride: int, padding: int, span: int, height: int
) -> tuple[int, int, tuple[int, int, int, int]]:
    """Return the rows of a map that windows see, from and up to, and how far they see beyond it, as `pad` takes it.

    start, stop: rows of windows. padding: rows above the first window that are beyond the map. span: of a window.
    """
    first = start * stride - padding
    last = (stop - 1) * stride - padding + span
    low, high = max(first, 0), min(last, height)
    return low, high, (0, 0, low - first, last - high)


def _joined(maps: Sequence[Tensor]) -> Tensor:
    return maps[0] if len(maps) == 1 else torch.cat(list(maps), 1)


def _bend(y: Tensor, slope: Slope) -> Tensor:
    """Multiply what is negative by the slope, in place if it is a number."""
    if isinstance(slope, Tensor):
        return functional.prelu(y, slope)
    if slope == 0:
        return functional.relu_(y)
    return y if slope == 1 else functional.leaky_relu_(y, slope)


class _View(Rows):
    """A map whose rows cost little more than those it is made of, so that none are kept."""

    def __init__(self, source: Rows, size: Size, *, rate: float = 1.0, copies: float = 1.0) -> None:
        self.source, self.size, self.like = source, size, source.like
        self.row_bytes = copies * self._own_bytes + rate * source.row_bytes


class Mapped(_View):
    """A function of every entry of a map, which may differ between channels: it gets and returns rows (N,C,rows,W)."""

    def __init__(self, source: Rows, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__(source, source.size)
        self.function = function

    def rows(self, start: int, stop: int) -> Tensor:
        """See :class:`Rows`."""
        return self.function(self.source.rows(start, stop))


class Added(_View):
    """The sum of maps of one size; slope as for :class:`Convolved`."""

    def __init__(self, sources: Sequence[Rows], *, slope: Slope = 1.0) -> None:
        super().__init__(sources[0], sources[0].size)
        self.sources, self.slope = sources, slope
        self.row_bytes = self._own_bytes + sum(source.row_bytes for source in sources)

    def rows(self, start: int, stop: int) -> Tensor:
        """See :class:`Rows`."""
        first, *others = self.sources
        total = first.rows(start, stop).clone()
        for source in others:
            total += source.rows(start, stop)
        return _bend(total, self.slope)


class Enlarged(_View):
    """A map resized bilinearly to (height, width)."""

    def __init__(self, source: Rows, size: Sequence[int], *, align_corners: bool) -> None:
        n, channels, height, _ = source.size
        super().__init__(source, (n, channels, size[0], size[1]), rate=height / size[0], copies=2)
        self.align_corners = align_corners

    def rows(self, start: int, stop: int) -> Tensor:
        """See :class:`Rows`."""
        n, channels, height, width = self.source.size
        _, _, *size = self.size
        if [height, width] == size:
            return self.source.rows(start, stop)
        wanted = range(start, stop)
        near = source_rows(height, size[0], wanted, align_corners=self.align_corners)
        if height == size[0]:
            near = wanted
        x = self.source.rows(near.start, near.stop)
        y: Tensor = resize_rows(
            x.flatten(0, 1),
            (size[0], size[1]),
            wanted,
            align_corners=self.align_corners,
            first=near.start,
            height=height,
        )
        return y.view(n, channels, *y.shape[1:]).to(x.dtype)


class Repeated(_View):
    """A map resized to (height, width) by the nearest entry, as ``interpolate(mode="nearest")``."""

    def __init__(self, source: Rows, size: Sequence[int]) -> None:
        n, channels, height, width = source.size
        super().__init__(source, (n, channels, size[0], size[1]), rate=height / size[0])
        device = source.like.device
        self._at = [
            (torch.arange(to, device=device) * of).div(to, rounding_mode="floor")
            for of, to in zip((height, width), size, strict=True)
        ]

    def rows(self, start: int, stop: int) -> Tensor:
        """See :class:`Rows`."""
        _, _, height, width = self.source.size
        first, last = start * height // self.size[2], (stop - 1) * height // self.size[2]
        x = self.source.rows(first, last + 1)
        rows, columns = self._at
        if 2 * width == self.size[3]:
            x = x.repeat_interleave(2, 3)
        elif width != self.size[3]:
            x = x.index_select(3, columns)
        return x.index_select(2, rows[start:stop] - first)


class Cropped(_View):
    """The first rows and columns of a map."""

    def __init__(self, source: Rows, size: Sequence[int]) -> None:
        n, channels, _, _ = source.size
        super().__init__(source, (n, channels, size[0], size[1]), copies=0)

    def rows(self, start: int, stop: int) -> Tensor:
        """See :class:`Rows`."""
        return self.source.rows(start, stop)[..., : self.size[3]]


class Padded(_View):
    """A map with zeros around it, up to (height, width): `left` columns before it and `above` rows."""

    def __init__(self, source: Rows, size: Sequence[int], *, left: int, above: int) -> None:
        n, channels, _, _ = source.size
        super().__init__(source, (n, channels, size[0], size[1]))
        self.left, self.above = left, above

    def rows(self, start: int, stop: int) -> Tensor:
        """See :class:`Rows`."""
        _, _, height, width = self.source.size
        low, high = (min(max(row - self.above, 0), height) for row in (start, stop))
        x = self.source.rows(low, high) if low < high else self.source.like[:1, :1, :0, :1]
        n, channels, _, columns = self.size
        out = x.new_zeros((n, channels, stop - start, columns))
        if low < high:
            top = low + self.above - start
            out[:, :, top : top + high - low, self.left : self.left + width] = x
        return out


class Doubled(_Layer):
    """A transposed convolution with kernels of 2x2 and stride 2: weight (C,M,2,2)."""

    def __init__(self, source: Rows, weight: Tensor, bias: Tensor | None) -> None:
        n, _, height, width = source.size
        super().__init__((n, weight.shape[1], 2 * height, 2 * width), source.like)
        self.source = source
        # Output channel 4 m + 2 i + j is channel m at row i and column j of each square.
        self.weight = weight.permute(1, 2, 3, 0).reshape(-1, weight.shape[0], 1, 1)
        self.bias = None if bias is None else bias.repeat_interleave(4)
        self.row_bytes = 3 * self._own_bytes + source.row_bytes / 2

    def make(self, start: int, stop: int, out: Tensor) -> None:
        """See :class:`_Layer`."""
        first = start // 2
        x = self.source.rows(first, -(-stop // 2))
        y = functional.pixel_shuffle(functional.conv2d(x, self.weight, self.bias), 2)
        out.copy_(y[:, :, start - 2 * first : stop - 2 * first])


class Pooled(_Layer):
    """Greatest of windows: by default of 2x2, side by side."""

    def __init__(self, source: Rows, window: int = 2, *, stride: int = 2, padding: int = 0) -> None:
        n, channels, height, width = source.size
        rows, columns = ((side + 2 * padding - window) // stride + 1 for side in (height, width))
        super().__init__((n, channels, rows, columns), source.like)
        self.source, self.window, self.stride, self.padding = source, window, stride, padding
        self.row_bytes = self._own_bytes + stride * source.row_bytes

    def make(self, start: int, stop: int, out: Tensor) -> None:
        """See :class:`_Layer`."""
        low, high, beyond = _seen(start, stop, self.stride, self.padding, self.window, self.source.size[2])
        x = self.source.rows(low, high)
        if any(beyond):
            x = functional.pad(x, beyond, value=-torch.inf)
        out.copy_(functional.max_pool2d(x, self.window, self.stride, (0, self.padding)))


def pool_with_places(source: Rows) -> tuple[Tensor, Tensor]:
    """Return the greatest of windows of 2x2 (N,C,H//2,W//2), and where each one was: 2 bits, four places to a byte.

    The first of equals counts, as in ``max_pool2d(return_indices=True)``. What is left over on the right and at the
    bottom of odd sides is in no window.
    """
    n, channels, height, width = source.size
    pooled = _empty(source.like, (n, channels, height // 2, width // 2))
    places = torch.empty(
        (n, channels, height // 2, -(-(width // 2) // _PLACES)), dtype=torch.uint8, device=pooled.device
    )
    windows = _Windows(source)
    for rows, band in windows.bands():
        pooled[:, :, rows], places[:, :, rows] = band, windows.places
    return pooled, places


class _Windows(_View):
    """The greatest of each window, and after each call `places` of them."""

    places: Tensor

    def __init__(self, source: Rows) -> None:
        n, channels, height, width = source.size
        super().__init__(source, (n, channels, height // 2, width // 2), rate=2, copies=4)

    def rows(self, start: int, stop: int) -> Tensor:
        """See :class:`Rows`."""
        width = 2 * self.size[3]
        x = self.source.rows(2 * start, 2 * stop)[..., :width]
        upper, lower = x[:, :, ::2], x[:, :, 1::2]
        top, bottom = (torch.maximum(pair[..., ::2], pair[..., 1::2]) for pair in (upper, lower))
        of_top, of_bottom = (pair[..., 1::2] > pair[..., ::2] for pair in (upper, lower))
        below = bottom > top
        place = torch.where(below, of_bottom, of_top).to(torch.uint8)
        place += below.to(torch.uint8).mul_(2)
        place = functional.pad(place, (0, -place.shape[3] % _PLACES))
        self.places = place[..., 0::4] | place[..., 1::4] << 2 | place[..., 2::4] << 4 | place[..., 3::4] << 6
        return torch.maximum(top, bottom)


class Unpooled(_Layer):
    """A map put back to where `pool_with_places` found it, zeros elsewhere, up to (height, width)."""

    def __init__(self, source: Rows, places: Tensor, size: Sequence[int]) -> None:
        n, channels, _, _ = source.size
        super().__init__((n, channels, size[0], size[1]), source.like)
        self.source, self.places = source, places
        self.row_bytes = 2 * self._own_bytes + source.row_bytes / 2

    def make(self, start: int, stop: int, out: Tensor) -> None:
        """See :class:`_Layer`."""
        _, _, height, width = self.source.size
        low, high = start // 2, min(-(-stop // 2), height)
        packed = self.places[:, :, low:high]
        shifts = torch.arange(0, 8, 2, dtype=torch.uint8, device=packed.device)
        places = (packed[..., None] >> shifts & 3).flatten(3)[..., :width]
        x = self.source.rows(low, high)
        out.zero_()
        for place in range(_PLACES):
            row, column = place // 2, place % 2
            first = low + (2 * low + row < start)  # of the rows that are wanted
            last = min(high, (stop - row + 1) // 2)
            if first < last:
                value = torch.where(
                    places[:, :, first - low : last - low] == place, x[:, :, first - low : last - low], 0
                )
                rows = slice(2 * first + row - start, 2 * (last - 1) + row - start + 1, 2)
                out[:, :, rows, column : 2 * width : 2] = value
