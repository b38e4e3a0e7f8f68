"""Clips for training, from a small folder in DAVIS' layout."""

from __future__ import annotations

import pytest
import torch

np = pytest.importorskip("numpy")
Image = pytest.importorskip("PIL.Image")

from vosops.training import ClipSampler  # noqa: E402

FRAMES, SIZE = 9, (48, 64)


@pytest.fixture
def davis(tmp_path):
    """Frames whose red channel is 20 times their number, with two objects; of "short" there is one frame."""
    for name, frames in (("long", FRAMES), ("short", 1)):
        for part in ("JPEGImages", "Annotations"):
            (tmp_path / part / name).mkdir(parents=True)
        for t in range(frames):
            picture = np.zeros((*SIZE, 3), np.uint8)
            picture[..., 0] = 20 * t
            labels = np.zeros(SIZE, np.uint8)
            labels[10:30, 5:25], labels[20:40, 40:60] = 3, 8
            picture[labels == 3, 1], picture[labels == 8, 2] = 200, 200
            Image.fromarray(picture).save(tmp_path / "JPEGImages" / name / f"{t:05}.png")
            Image.fromarray(labels).save(tmp_path / "Annotations" / name / f"{t:05}.png")
    return tmp_path


def sampler(davis, **options):
    return ClipSampler(davis / "JPEGImages", davis / "Annotations", **{"crop": 32, **options})


def test_clips_have_the_documented_shapes(davis):
    frames, labels, objects = sampler(davis, frames=4)()
    assert frames.shape == (4, 3, 32, 32) and labels.shape == (4, 32, 32)
    assert frames.dtype == torch.float32 and frames.min() >= 0 and frames.max() <= 1
    assert labels.dtype == torch.int64 and set(labels[0].unique().tolist()) <= {0, *range(1, objects + 1)}


def test_the_first_frame_comes_before_neighbours(davis):
    sample, gaps = sampler(davis, max_distance=3), set()
    for _ in range(50):
        first, previous, current = (round(float(f[0].median()) * 255 / 20) for f in sample()[0])
        assert current == previous + 1
        gaps.add(previous - first)
    assert gaps == {1, 2, 3}


def test_labels_lie_where_the_objects_are(davis):
    sample = sampler(davis)
    seen = set()
    for _ in range(20):
        frames, labels, objects = sample()
        seen.add(objects)
        numbers = labels[0].unique().tolist()
        for channel in (1, 2):
            inside = labels[0][frames[0, channel] > 0.7]  # one object, or none
            assert inside.numel() == 0 or (inside[0] > 0 and (inside == inside[0]).all())
        assert numbers[-1] == objects
    assert seen == {1, 2}


def test_all_objects_can_be_one_and_255_is_part_of_it(davis):
    path = davis / "Annotations" / "long" / "00000.png"
    for file in path.parent.iterdir():
        Image.fromarray(np.where(np.array(Image.open(file)) > 0, 255, 0).astype(np.uint8)).save(file)
    sample = sampler(davis, binary=True)
    for _ in range(5):
        _, labels, objects = sample()
        assert objects == 1 and labels.unique().tolist() == [0, 1]


def test_a_seed_decides(davis):
    first, again, other = (sampler(davis, seed=seed) for seed in (1, 1, 2))
    clips = [[sample() for _ in range(3)] for sample in (first, again, other)]
    same = [[torch.equal(a[0], b[0]) for a, b in zip(clips[0], x, strict=True)] for x in clips[1:]]
    assert all(same[0]) and not all(same[1])


def test_frames_smaller_than_the_crop_are_enlarged(davis):
    frames, _, _ = sampler(davis, crop=80)()
    assert frames.shape[2:] == (80, 80)


def test_folders_without_a_clip_are_refused(davis):
    with pytest.raises(ValueError, match="no sequence of .* has 3 annotated frames"):
        sampler(davis, sequences=["short"])
    with pytest.raises(ValueError, match="frames must be at least 2, got 1"):
        sampler(davis, frames=1)


def relabel(davis, change):
    """Changes the labels of each frame: `change(t, labels)`."""
    for t, file in enumerate(sorted((davis / "Annotations" / "long").iterdir())):
        Image.fromarray(change(t, np.array(Image.open(file))).astype(np.uint8)).save(file)


def test_0_and_255_alone_are_one_object_unless_told_otherwise(davis):
    relabel(davis, lambda t, labels: np.where(labels > 0, 255 if t else 0, 0))
    _, labels, objects = sampler(davis)()
    assert objects == 1 and 255 not in labels
    with pytest.raises(ValueError, match="no sequence has 3 annotated frames from its first object on"):
        sampler(davis, binary=False)()


def test_clips_begin_with_the_first_frame_that_shows_an_object(davis):
    relabel(davis, lambda t, labels: labels if t >= 4 else np.where(labels > 0, 255, 0))
    (davis / "Annotations" / "long" / "._00008.png").write_bytes(b"")
    sample = sampler(davis)
    for _ in range(20):
        frames, labels, objects = sample()
        assert round(float(frames[0, 0].median()) * 255 / 20) >= 4
        assert objects == labels[0].max() > 0


def test_frames_may_have_any_suffix_of_a_picture(davis):
    folder = davis / "JPEGImages" / "long"
    for t in range(FRAMES):
        (folder / f"{t:05}.png").rename(folder / f"{t:05}.PNG")
    assert len(sampler(davis).sequences[0]) == FRAMES
