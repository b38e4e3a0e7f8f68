"""Clips: what a number stands for, what they show, and what happens to files that cannot be read."""

from __future__ import annotations

import random
import shutil

import pytest

pytest.importorskip("pydantic")
pytest.importorskip("numpy")
pytest.importorskip("torchvision")
pytest.importorskip("av")
import torch  # noqa: E402

from tests.training.conftest import break_file  # noqa: E402
from vosops.io.errors import InputError  # noqa: E402
from vosops.training.config import Clips, Data, Motion, Source  # noqa: E402
from vosops.training.loading import batches  # noqa: E402
from vosops.training.motion import Window, control_points, sampled, thin_plate, walk  # noqa: E402
from vosops.training.samples import ClipSamples, numbered  # noqa: E402
from vosops.training.sources import Decoded, places_of  # noqa: E402
from vosops.training.task import Shard  # noqa: E402

CROP = (32, 40)
STEADY = Motion(rotation=0, zoom=0, shear=0, shift=0, bend=0, colour=0, objects=0, distractors=0, occluders=0)


def videos(root, **clips):
    source = Source(kind="videos", root=root)
    return Data(train=(source,), clips=Clips(**{"crop": CROP, "colour": 0, **clips}), workers=0)


def still_data(root, motion=STEADY, **clips):
    source = Source(kind="stills", images=root / "images", masks=root / "masks")
    return Data(
        train=(source,), clips=Clips(**{"crop": CROP, "colour": 0, **clips}), motion=motion, workers=0
    )


def samples(data, *, seed=0, per_step=1, objects=True):
    return ClipSamples(data, CROP, seed=seed, per_step=per_step, objects=objects)


def same(a, b):
    return torch.equal(a.frames, b.frames) and torch.equal(a.labels, b.labels) and a.objects == b.objects


@pytest.mark.parametrize("make", [videos, lambda root: still_data(root, Motion())], ids=["videos", "stills"])
def test_seed_and_number_decide_whatever_was_read_before(make, davis, stills):
    data = make(davis if make is videos else stills)
    one, other = samples(data), samples(data)
    forth = [one[n] for n in range(4)]
    back = [other[n] for n in reversed(range(4))][::-1]
    assert all(map(same, forth, back))
    assert not same(forth[0], forth[1]) and not same(forth[0], samples(data, seed=1)[0])


def test_clips_have_the_documented_form(davis):
    clip = samples(videos(davis, frames=4))[0]
    assert clip.frames.shape == (4, 3, *CROP) and clip.labels.shape == (4, *CROP)
    assert clip.frames.dtype == clip.labels.dtype == torch.uint8
    assert set(clip.labels[0].unique().tolist()) - {255} <= set(range(clip.objects + 1))


def agreement(clip):
    """The share of the object's pixels that have its colour (red or green, not the sky), over all frames."""
    inside = clip.labels == 1
    colours = clip.frames.float().permute(0, 2, 3, 1)[inside]
    return float((colours[:, :2].amax(1) > 120).float().mean())


def test_labels_move_with_what_they_label(stills):
    for number in range(6):
        clip = samples(still_data(stills, Motion(objects=0, distractors=0, occluders=0, colour=0)))[number]
        assert (clip.labels == 1).any() and agreement(clip) > 0.9
        assert not torch.equal(clip.frames[0], clip.frames[2])


def test_without_motion_a_still_stays_as_it_is(stills):
    clip = samples(still_data(stills))[0]
    assert torch.equal(clip.labels[0], clip.labels[2]) and torch.equal(clip.frames[0], clip.frames[2])


def test_objects_that_are_pasted_are_followed_and_others_are_background(stills):
    moving = STEADY.model_copy(update={"objects": 1.0})
    counts = {samples(still_data(stills, moving))[n].objects for n in range(12)}
    assert 2 in counts
    hidden = STEADY.model_copy(update={"occluders": 1.0})
    data = still_data(stills, hidden, flip=False, scale=(1, 1))
    covered = [samples(data)[n] for n in range(12)]
    plain = [samples(still_data(stills, flip=False, scale=(1, 1)))[n] for n in range(12)]
    less = [
        int((a.labels == 1).sum()) < int((b.labels == 1).sum()) for a, b in zip(covered, plain, strict=True)
    ]
    assert any(less) and max(clip.objects for clip in covered) == 1


def test_gaps_grow_with_the_step(davis):
    clips = Clips(frames=2, gap={"first": 1, "last": 6, "steps": 10}, reverse=False)
    choice = random.Random(0)

    def widest(step):
        return max(b - a for a, b in (places_of(9, clips, clips.gap.at(step), choice) for _ in range(60)))

    assert widest(0) == 1 and widest(10) == 6


def test_neighbours_follow_the_first_frame():
    clips = Clips(frames=3, neighbours=True, reverse=False)
    for seed in range(20):
        first, second, third = places_of(9, clips, 4, random.Random(seed))
        assert third == second + 1 and 1 <= second - first <= 4


def test_sources_take_turns_by_step(davis, stills):
    data = videos(davis).model_copy(
        update={
            "train": (
                Source(kind="videos", root=davis, last_step=2),
                Source(kind="stills", images=stills / "images", masks=stills / "masks", first_step=2),
            ),
            "motion": STEADY,
        }
    )
    clips = [samples(data, per_step=2)[n] for n in range(8)]
    moves = [not torch.equal(clip.frames[0], clip.frames[-1]) for clip in clips]
    assert moves == [True] * 4 + [False] * 4


def test_a_file_that_cannot_be_read_is_named_and_passed_over(davis, tmp_path):
    root = shutil.copytree(davis, tmp_path / "davis")
    broken = root / "JPEGImages" / "480p" / "two" / "00004.png"
    break_file(broken)
    found = [samples(videos(root, frames=5))[n] for n in range(12)]
    problems = {problem for clip in found for problem in clip.problems}
    assert problems and all("00004.png" in problem for problem in problems)
    assert all(clip.objects for clip in found)


def test_a_source_of_which_nothing_can_be_read_is_refused(stills, tmp_path):
    root = shutil.copytree(stills, tmp_path / "stills")
    for file in (root / "masks").iterdir():
        break_file(file)
    with pytest.raises(InputError, match=r"no clip of 20 can be read, the first because mask .*png"):
        samples(still_data(root))[0]


def test_a_clip_without_an_object_is_not_given(stills, tmp_path):
    root = shutil.copytree(stills, tmp_path / "stills")
    for n in range(5):
        for part in ("images", "masks"):
            (root / part / f"{n:05d}.png").write_bytes((root / part / "00005.png").read_bytes())
    from PIL import Image

    Image.new("L", (64, 48)).save(root / "masks" / "00000.png")
    assert all(samples(still_data(root))[n].objects == 1 for n in range(12))
    for file in (root / "masks").iterdir():
        Image.new("L", (64, 48)).save(file)
    with pytest.raises(InputError, match="no clip of 20 shows an object"):
        samples(still_data(root))[0]


def test_sequences_that_there_are_not(davis, tmp_path):
    with pytest.raises(InputError, match="has no sequence four"):
        samples(Data(train=(Source(kind="videos", root=davis, sequences=("four",)),)))
    with pytest.raises(
        InputError, match="must hold JPEGImages and Annotations, or folders with frames and masks"
    ):
        samples(Data(train=(Source(kind="videos", root=tmp_path),)))
    with pytest.raises(InputError, match="holds no sequence with 20 annotated frames"):
        samples(videos(davis, frames=20))


def test_classes_keep_their_values_and_some_count_nothing(stills):
    source = Source(
        kind="stills", images=stills / "images", masks=stills / "masks", ignored=(2,), binary=False
    )
    data = Data(train=(source,), clips=Clips(frames=1, crop=CROP), workers=0)
    labels = torch.cat([samples(data, objects=False)[n].labels for n in range(12)])
    assert set(labels.unique().tolist()) == {0, 1, 255}


def test_objects_are_numbered_and_strangers_unknown():
    labels = torch.tensor([[[0, 7, 9, 255]], [[4, 7, 9, 0]]], dtype=torch.uint8)
    found, objects = numbered(labels, 3, random.Random(0))
    assert objects == 2 and found.tolist() == [[[0, 1, 2, 255]], [[255, 1, 2, 0]]]
    found, objects = numbered(labels, 1, random.Random(0))
    assert objects == 1 and sorted(found[0, 0].tolist()) == [0, 0, 1, 255]


def test_two_processes_see_what_one_with_a_larger_batch_does(davis):
    data = videos(davis)
    common = {"workers": 0}
    whole = batches(samples(data), 3, batch=2, shard=Shard(), **common)
    halves = [batches(samples(data), 3, batch=1, shard=Shard(rank, 2), **common) for rank in (0, 1)]
    for _ in range(3):
        both, parts = next(whole), [next(half) for half in halves]
        assert torch.equal(both.frames, torch.cat([part.frames for part in parts]))
        assert both.objects == tuple(n for part in parts for n in part.objects)


def test_batches_begin_anywhere_and_workers_change_nothing(davis):
    data = videos(davis)
    alone = batches(samples(data), 0, batch=2, shard=Shard(), workers=0)
    expected = [next(alone) for _ in range(4)]
    later = batches(samples(data), 2, batch=2, shard=Shard(), workers=1)
    for batch in expected[2:]:
        found = next(later)
        assert torch.equal(found.frames, batch.frames) and found.number == batch.number
    later.close()


def test_what_is_decoded_is_kept_within_the_bytes(stills):
    one = (stills / "images" / "00000.png", stills / "masks" / "00000.png")
    other = (stills / "images" / "00001.png", stills / "masks" / "00001.png")
    decoded = Decoded(4 * 48 * 64)
    frame, labels = decoded.read(*one, None)
    assert decoded.read(*one, None)[0] is frame
    small, _ = decoded.read(*one, 24)
    assert small.shape == (3, 24, 32) and decoded.bytes == 4 * 24 * 32
    decoded.read(*other, None)
    assert decoded.bytes == 4 * 48 * 64 and len(decoded.kept) == 1


def test_a_thin_plate_spline_passes_through_its_points():
    points = control_points()
    moved = points + 0.2 * torch.randn(points.shape, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(thin_plate(points, points, moved), moved, atol=1e-4)


def test_a_window_shows_its_part():
    frame = torch.arange(48, dtype=torch.uint8).view(1, 6, 8).repeat(3, 1, 1)
    window = Window((2, 4), (6, 8), (1, 2, 2, 4), flipped=False)
    [moved] = walk(STEADY, random.Random(0), 1)
    shown, labels = sampled(frame, frame[0], window, moved)
    assert torch.equal(labels, frame[0, 1:3, 2:6]) and torch.equal(shown, frame[:, 1:3, 2:6])
