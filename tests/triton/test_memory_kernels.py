"""What the Triton kernels of memory_read do beyond the contract that tests/ops checks: parts, copies, full lists.

They run in Triton's interpreter (TRITON_INTERPRET=1) or on a GPU. The interpreter proves the logic; only a GPU proves
precision.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
import triton.language as tl

import vosops
from tests.triton.device import DEVICE
from vosops import _verdicts
from vosops.ops._registration import TRITON_INTERPRETED
from vosops.reference.memory_read import memory_read_core, memory_select_core
from vosops.triton import memory_descriptors, memory_read, memory_scores, memory_select, memory_softmax
from vosops.triton._common import Target


def read(query, key, value, precision="ieee"):
    return memory_read.memory_read(query, key, value, None, None, None, 0.5, precision)


def problem(dtype=torch.float32, memory=200, queries=9, channels=6, columns=20):
    sizes = ((1, channels, queries), (1, channels, memory), (1, 1, columns, memory))
    return [torch.randn(size, dtype=torch.float32).to(DEVICE, dtype) for size in sizes]


@pytest.mark.parametrize("processors", [1, 3, 132])
def test_any_number_of_parts_gives_the_same_read(chip, processors):
    query, key, value = problem()
    chip(9, processors)
    out, lse = read(query, key, value)
    want_out, want_lse = memory_read_core(*(t.double() for t in (query, key, value)), None, None, None, 0.5)
    torch.testing.assert_close(out.double(), want_out, rtol=0, atol=1e-5)
    torch.testing.assert_close(lse.double(), want_lse, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("programs", "steps", "parts"),
    [
        (26, 507, 5),
        (26, 127, 5),
        (78, 507, 5),
        (128, 638, 1),
        (132, 100, 1),
        (1, 3, 3),
        (1, 10**6, 132),
        (0, 1, 1),
    ],
)
def test_parts_fill_the_multiprocessors_of_an_h100(programs, steps, parts):
    """480p at 1/16 with 20, with 5 frames, and with 20 of three objects; 1080p with 5."""
    assert memory_scores.parts_for(programs, steps, 132) == parts
    longest = -(-programs * parts // 132) * -(-steps // parts)
    assert longest <= steps * max(1, -(-programs // 132))


@pytest.mark.parametrize("capability", [0, 8, 10])
def test_the_tiles_of_other_devices_read_the_same(chip, capability):
    query, key, value = problem(torch.float16, memory=70, columns=300)
    chip(capability, 2)
    out, _ = read(query, key, value)
    want, _ = memory_read_core(*(t.double() for t in (query, key, value)), None, None, None, 0.5)
    torch.testing.assert_close(out.double(), want, rtol=0, atol=2e-3)


def test_only_what_cannot_be_read_in_wide_pieces_is_copied():
    rows = torch.randn(2, 3, 32, 48, device=DEVICE)
    for as_it_is in (rows, rows.transpose(2, 3), rows[:1].expand(4, -1, -1, -1)):
        assert memory_scores.aligned(as_it_is) is as_it_is
    for copied in (rows[..., 1:], rows[..., :47], rows[..., ::2]):
        copy = memory_scores.aligned(copied)
        assert copy.shape[-1] % memory_scores.ALIGNMENT == 0 and copy.is_contiguous()
        assert (
            torch.equal(copy[..., : copied.shape[-1]], copied) and copy[..., copied.shape[-1] :].eq(0).all()
        )


def shaped(layout, *sizes, dtype=torch.float16):
    """Numbers in one of the layouts that models make: neighbouring positions or channels, or a part of a longer row."""
    numbers = torch.randn(*sizes[:-1], sizes[-1] + 4).to(DEVICE, dtype)[..., 4:]
    if layout == "part":
        return numbers
    numbers = numbers.contiguous()
    return numbers if layout == "channel-major" else numbers.mT.contiguous().mT


PIECES = [
    ("channel-major", 100, torch.float16, 4),
    ("channel-major", 102, torch.float16, 2),
    ("channel-major", 101, torch.float16, None),
    ("channel-major", 101, torch.float32, 1),
    ("channel-major", 8, torch.float32, 8),
    ("channel-last", 101, torch.float16, 4),
    ("part", 100, torch.bfloat16, 4),
]
"""Layout, positions, dtype, and the elements that can be read at a time; None: a copy."""


@pytest.mark.parametrize(("layout", "memory", "dtype", "piece"), PIECES)
def test_keys_and_values_of_any_number_are_read_in_place(layout, memory, dtype, piece):
    """5 frames of 30 x 54 are 8100 positions: rows of 16200 bytes, in pieces of 8."""
    query = torch.randn(2, 20, 9).to(DEVICE, dtype)
    key = shaped(layout, 2, 20, memory, dtype=dtype)
    value = shaped(layout, 2, 2, 12, memory, dtype=dtype)
    for tensor in (key, value):
        pieces = memory_scores.in_pieces(tensor)
        assert (pieces.tensor is tensor) == (piece is not None)
        assert pieces.piece == (piece or 1) and pieces.channel_last == (layout == "channel-last")
    out, lse = read(query, key, value)
    want, want_lse = memory_read_core(*(t.double() for t in (query, key, value)), None, None, None, 0.5)
    tolerance = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(out.double(), want, rtol=0, atol=tolerance)
    torch.testing.assert_close(lse.double(), want_lse, rtol=0, atol=1e-5)


LENGTHS = (200, 129, 128, 127, 65, 64, 63, 33, 17, 1, 0)
"""All of a memory, whole tiles of 64, 32 and 16 positions and one more or less, one position, none."""


def ragged(
    memory: int,
    lengths: Sequence[int],
    dtype: torch.dtype = torch.float32,
    layout: str = "channel-major",
    channels: int = 20,
    columns: tuple[int, int] = (2, 12),
    tile: int = 1,
):
    """A memory for each length, its bias, and what a read of each part alone gives, float64.

    NaN behind each, from the first tile on in which nothing is read.
    """
    batch = len(lengths)
    query = torch.randn(batch, channels, 9).to(DEVICE, dtype)
    key, value = (shaped(layout, batch, *sizes, memory, dtype=dtype) for sizes in ((channels,), columns))
    positions, ends = torch.arange(memory, device=DEVICE), torch.tensor(lengths, device=DEVICE)[:, None]
    bias = torch.randn(batch, memory, device=DEVICE).masked_fill(positions >= ends, -torch.inf)
    wide = [t.double() for t in (query, key, value)]
    want = memory_read_core(*wide, None, None, bias.double(), 0.5)
    behind = positions >= (ends + tile - 1) // tile * tile
    key.masked_fill_(behind[:, None], torch.nan)
    value.masked_fill_(behind[:, None, None], torch.nan)
    return query, key, value, bias, want


@pytest.mark.parametrize(
    ("dtype", "layout", "tile", "processors"),
    [
        (torch.float32, "channel-major", 32, 1),
        (torch.float32, "channel-last", 1, 40),
        (torch.float16, "channel-major", 64, 40),
        (torch.float16, "channel-last", 1, 40),
        (torch.bfloat16, "part", 64, 132),
    ],
)
def test_a_read_ends_with_the_memory(chip, dtype, layout, tile, processors):
    """In one part or in several; NaN in a tile that is read in part is harmless in channel-last keys and values."""
    chip(9, processors)
    query, key, value, bias, (want, want_lse) = ragged(200, LENGTHS, dtype, layout, tile=tile)
    assert memory_read.ends_with_memory(query, key, value) == (tile == 1)
    out, lse = memory_read.memory_read(query, key, value, None, None, bias, 0.5, "ieee")
    tolerance = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(out.double(), want, rtol=0, atol=tolerance)
    torch.testing.assert_close(lse.double(), want_lse, rtol=0, atol=1e-5)


def test_what_is_copied_does_not_end_with_the_memory():
    """Odd strides of 16 bits: the copy is channel-major."""
    query, key, value = (
        torch.zeros(1, *sizes, dtype=torch.float16) for sizes in ((12, 9), (12, 40), (1, 12, 40))
    )
    odd = torch.zeros(1, 40, 13, dtype=torch.float16)[..., :12].mT
    rows = [tensor.mT.contiguous().mT for tensor in (key, value)]
    ends = [
        memory_read.ends_with_memory(query, *each)
        for each in (rows, (key, rows[1]), (rows[0], value), (odd, rows[1]))
    ]
    assert ends == [True, False, False, False]


@pytest.mark.parametrize("stride", [1, 2])
def test_the_end_of_a_memory_is_the_last_position_read(monkeypatch, stride):
    """The last positions are looked at first, so many at a time."""
    if TRITON_INTERPRETED:
        monkeypatch.setattr(memory_scores, "SCAN_BLOCK", tl.constexpr(32))
    block = memory_scores.SCAN_BLOCK.value
    memory = 2 * block + 10
    ends = [memory, memory - 1, 2 * block - 1, block + 10, block, 10, 9, 1, 0]
    bias = torch.full((len(ends), memory, stride), -torch.inf)
    for row, end in zip(bias, ends, strict=True):
        row[[each for each in (end - 1, end - 3) if each >= 0]] = 0.0
    bias[1, -2] = torch.nan
    assert memory_scores.ends_of(bias.to(DEVICE)[..., 0]).tolist() == ends
    assert memory_scores.ends_of(None) is None


@pytest.mark.skipif(DEVICE == "cuda", reason="counts the calls of the interpreter")
@pytest.mark.parametrize("layout", ["channel-major", "channel-last"])
def test_tiles_behind_the_end_are_not_loaded(chip, monkeypatch, layout):
    """Three programs share the tiles of 64 positions in which something is read."""
    chip(9, 3)
    loaded = []
    load = memory_softmax.load_columns
    monkeypatch.setattr(
        memory_softmax,
        "load_columns",
        lambda *args: loaded.append(int(args[1].handle.data[0])) or load(*args),
    )
    for length, tiles in ((640, 10), (500, 8), (65, 2), (64, 1), (17, 1), (0, 0)):
        query, key, value, bias, (want, _) = ragged(640, (length,), torch.float16, layout, tile=64)
        loaded.clear()
        out, _ = memory_read.memory_read(query, key, value, None, None, bias, 0.5, "ieee")
        assert sorted(loaded) == [64 * tile for tile in range(tiles)]
        torch.testing.assert_close(out.double(), want, rtol=0, atol=2e-3)


def test_a_selection_ends_with_the_memory(chip):
    chip(9, 3)
    top_k = 3
    query, key, _, bias, _ = ragged(200, (200, 65, 32, 1, 0))
    score, index = memory_select.memory_select(query, key, None, None, bias, 0.5, "ieee", top_k)
    hidden = bias.isneginf()
    wide = query.double(), key.double().masked_fill(hidden[:, None], 0)
    want, want_index = memory_select_core(*wide, None, None, bias.double(), 0.5, top_k)
    assert torch.equal(index, want_index)
    torch.testing.assert_close(score.double(), want, rtol=0, atol=1e-5)


def test_what_asynchronous_copies_cannot_read_is_copied():
    far = torch.empty_strided((2, 4, 12), (2**31, 12, 1), device="meta")
    every_second = torch.empty(1, 4, 24, device="meta")[..., ::2]
    odd = torch.empty(1, 4, 13, dtype=torch.float16, device="meta")
    for tensor in (far, every_second, odd):
        pieces = memory_scores.in_pieces(tensor)
        assert pieces.tensor is not tensor and pieces.piece == 1
        assert memory_scores.is_aligned(pieces.tensor)


@pytest.mark.parametrize(
    ("order", "processors"), [("rising", 1), ("equal", 1), ("equal", 132), ("random", 132)]
)
def test_lists_that_overflow_are_repaired(chip, monkeypatch, order, processors):
    """Rising scores defeat every threshold that comes from a part's own past, equal ones every threshold."""
    monkeypatch.setattr(memory_select, "GROUPS_PER_CHOICE", 0)
    chip(9, processors)
    scores = {"rising": torch.arange(300.0), "equal": torch.ones(300), "random": torch.randn(300)}[order]
    query, key = torch.ones(1, 1, 3, device=DEVICE), scores[None, None].to(DEVICE)
    for top_k in (2, 40):
        got = memory_select.memory_select(query, key, None, None, None, 1.0, "ieee", top_k)
        want = memory_select_core(query, key, None, None, None, 1.0, top_k)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_scores_of_both_signs_and_infinities_are_in_order():
    scores = torch.tensor([0.0, -1.5, 3.0, -0.0, torch.inf, -torch.inf, torch.nan, -1e-30, 1e-30, 3.0])
    bias = scores[None].to(DEVICE)
    query, key = torch.zeros(1, 1, 1, device=DEVICE), torch.zeros(1, 1, 10, device=DEVICE)
    score, index = memory_select.memory_select(query, key, None, None, bias, 1.0, "ieee", 10)
    assert index.flatten().tolist() == [4, 2, 9, 8, 0, 3, 7, 1, -1, -1]
    assert score.flatten().tolist()[-2:] == [-torch.inf] * 2


def test_the_public_op_with_selection_runs_on_triton_to_second_order():
    query, key = (torch.randn(1, 3, size, device=DEVICE, requires_grad=True) for size in (4, 6))
    value = torch.randn(1, 2, 3, 6, device=DEVICE, requires_grad=True)
    selection = torch.rand(1, 3, 4, device=DEVICE)
    inputs = (query, key, value)
    for top_k in (None, 2):
        results = []
        for name in ("triton", "reference"):
            with vosops.use_backend(name):
                out, usage = vosops.memory_read(
                    *inputs, similarity="l2", selection=selection, top_k=top_k, return_usage=True
                )
            first = torch.autograd.grad(out.square().sum(), inputs, create_graph=True)
            second = torch.autograd.grad(sum(g.square().sum() for g in first), inputs)
            results.append((out, usage, *first, *second))
        for ours, theirs in zip(*results, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_too_many_pixels_are_refused():
    query = torch.zeros(1, 1, 1).expand(1, 1, memory_scores.MAX_QUERIES + 1)
    with pytest.raises(ValueError, match="query and key must have at most"):
        read(query, torch.zeros(1, 1, 4), torch.zeros(1, 1, 1, 4))


# ---- By tensor descriptors


@pytest.fixture
def by_descriptors(monkeypatch):
    """Read by descriptors wherever they can, and count the reads."""
    monkeypatch.setenv(_verdicts.DESCRIPTORS, "1")
    reads = []
    arguments = memory_descriptors.arguments
    monkeypatch.setattr(memory_descriptors, "arguments", lambda *args: reads.append(1) or arguments(*args))
    return reads


def rows(layout: str, *sizes: int, dtype: torch.dtype) -> torch.Tensor:
    """Numbers (N, ..., C, M) in layouts whose rows are whole pieces of 16 bytes."""
    numbers = torch.randn(*sizes[:-2], sizes[-2] + 8, sizes[-1] + 8).to(DEVICE, dtype)
    if layout == "part":
        return numbers[..., 8:, 8:]
    numbers = numbers[..., 8:, 8:].contiguous()
    if layout == "channel-major":
        return numbers
    if layout == "channel-last":
        return numbers.mT.contiguous().mT
    return (
        numbers.movedim(-1, 1).contiguous().movedim(1, -1)
    )  # "interleaved": the objects of a position side by side


DESCRIBED = [
    ("channel-major", "channel-major", torch.float16, 72, (2, 24), 1),
    ("channel-last", "channel-last", torch.bfloat16, 128, (1, 104), 40),
    ("part", "interleaved", torch.float16, 136, (3, 24), 40),
    ("channel-last", "part", torch.float16, 64, (2, 256), 1),
    ("channel-major", "channel-last", torch.float16, 256, (2, 256), 1),
]
"""Layouts of keys and values, dtype, channels of a key, objects and channels of a value, multiprocessors."""


@pytest.mark.parametrize(("of_keys", "of_values", "dtype", "channels", "columns", "processors"), DESCRIBED)
def test_descriptors_read_the_same(
    chip, by_descriptors, of_keys, of_values, dtype, channels, columns, processors
):
    """Whole tiles and what is left, in one part or in several; batch elements of one key; every term of the score."""
    chip(9, processors)
    batch, memory = 2, 152
    query = torch.randn(batch, channels, 9).to(DEVICE, dtype) / channels**0.5
    key, value = (
        rows(of_keys, 1, channels, memory, dtype=dtype),
        rows(of_values, batch, *columns, memory, dtype=dtype),
    )
    key = key.expand(batch, -1, -1)
    shrinkage, query_bias, key_bias = (torch.rand(batch, n, device=DEVICE) for n in (memory, 9, memory))
    for vectors in ((None, None, None), (shrinkage, query_bias, key_bias)):
        out, lse = memory_read.memory_read(query, key, value, *vectors, 2.0, "ieee")
        wide = [t if t is None else t.double() for t in (query, key, value, *vectors)]
        want, want_lse = memory_read_core(*wide, 2.0)
        tolerance = {torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
        torch.testing.assert_close(out.double(), want, rtol=0, atol=tolerance)
        torch.testing.assert_close(lse.double(), want_lse, rtol=0, atol=1e-5)
    assert len(by_descriptors) == 2


def test_a_read_by_descriptors_ends_with_the_memory(chip, by_descriptors):
    """Lengths around whole tiles: of a tile with a hidden position nothing comes by a descriptor."""
    chip(9, 20)
    for layout, lengths in (("channel-major", LENGTHS), ("channel-last", (136, 128, 127, 65, 1))):
        query, key, value, bias, (want, want_lse) = ragged(200, lengths, torch.float16, layout, 24, (1, 24))
        out, lse = memory_read.memory_read(query, key, value, None, None, bias, 0.5, "ieee")
        torch.testing.assert_close(out.double(), want, rtol=0, atol=2e-3)
        torch.testing.assert_close(lse.double(), want_lse, rtol=0, atol=1e-5)
    assert len(by_descriptors) == 2


def described(dtype=torch.float16, channels=64, memory=128, columns=(1, 64)):
    query, key = torch.zeros(1, channels, 9, dtype=dtype), torch.zeros(1, channels, memory, dtype=dtype)
    return query, key, torch.zeros(1, *columns, memory, dtype=dtype)


@pytest.mark.parametrize(
    ("target", "changes", "reason"),
    [
        ((9, 0), {}, ""),
        ((10, 0), {}, ""),
        ((8, 0), {}, "it multiplies by mma.sync"),
        ((12, 0), {}, "it multiplies by mma.sync"),
        ((0, 0), {}, "it multiplies by mfma"),
        ((9, 0), {"dtype": torch.float32}, "query, key and value must have 16 bits"),
        ((9, 0), {"channels": 264}, "keys must have 1 to 256 channels"),
        ((9, 0), {"memory": 56}, "a memory must have at least 64 positions"),
        ((9, 0), {"columns": (0, 64)}, "a memory must have at least 64 positions and one column"),
        ((9, 0), {"memory": 132}, "a key's rows must be whole pieces of 16 bytes"),
    ],
)
def test_what_descriptors_cannot_read_is_named(target, changes, reason):
    chip = Target(target[0], 132, target[1])
    found = memory_descriptors.reason_not(*described(**changes), chip)
    assert found.startswith(reason) and bool(found) == bool(reason)


def test_layouts_that_descriptors_cannot_read_are_named():
    query, key, value = described()
    chip = Target(9, 132)
    assert memory_descriptors.reason_not(query.repeat(1, 2, 1), key, value, chip).startswith("keys must have")
    odd = torch.zeros(1, 1, 64, 132, dtype=torch.float16)[..., :128]
    assert memory_descriptors.reason_not(query, key, odd, chip).startswith(
        "a value's rows must be whole pieces"
    )
    moved = torch.zeros(64 * 128 + 4, dtype=torch.float16)[4:].view(1, 64, 128)
    assert memory_descriptors.reason_not(query, moved, value, chip).startswith(
        "a key's rows must be whole pieces"
    )
    apart = torch.zeros(1, 2, 128, 96, dtype=torch.float16).mT
    assert memory_descriptors.reason_not(query, key, apart, chip).startswith(
        "tiles of 256 columns must be of one"
    )


def test_descriptors_are_not_preferred_until_they_were_found_right(chip, by_descriptors, monkeypatch):
    chip(9)
    problem = [tensor.to(DEVICE) for tensor in described()]
    asked = []

    def read_with(setting: str, proved: bool) -> bool:
        monkeypatch.setenv(_verdicts.DESCRIPTORS, setting)
        monkeypatch.setattr(_verdicts, "proved", lambda *args: asked.append(args) or proved)
        by_descriptors.clear()
        read(*problem)
        return bool(by_descriptors)

    assert [read_with(*each) for each in (("", False), ("", True), ("0", True))] == [False, True, False]
    assert set(asked) == {(problem[1].device, "memory_read", "triton descriptors", torch.float16)}
    assert read_with("1", False)
    chip(8)
    assert not read_with("1", True)
