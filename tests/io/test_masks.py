"""Masks: ids, palettes, and the frames they lie on."""

import sys
import warnings

import numpy as np
import pytest
from PIL import Image

from tests.clips import picture, write_folder, write_mask, write_video
from vosops.io.errors import InputError
from vosops.io.frames import ImageFolder
from vosops.io.masks import (
    GivenMask,
    MaskSet,
    davis_palette,
    find_masks,
    masks_from_python,
    read_labels,
    write_labels,
)
from vosops.io.notes import InputWarning
from vosops.io.video import VideoFile

SIZE = (6, 8)
pytestmark = pytest.mark.filterwarnings("ignore:.*pixels of value 255")
PALETTE = bytes(range(200, 0, -1)).ljust(768, b"\7")


def label_map(**boxes):
    labels = np.zeros(SIZE, np.uint8)
    for row, (_, value) in enumerate(boxes.items()):
        labels[row, 1:5] = value
    return labels


def mask_set(*maps, **options):
    masks = [GivenMask(i, f"m{i}", "", array=m) for i, m in enumerate(maps)]
    return MaskSet(masks, SIZE, **options)


class TestReading:
    def test_palette(self, tmp_path):
        labels = label_map(a=3, b=255)
        got, palette = read_labels(write_mask(tmp_path / "m.png", labels, PALETTE))
        np.testing.assert_array_equal(got, labels)
        assert palette == PALETTE

    def test_a_short_palette_is_filled_up(self, tmp_path):
        image = Image.fromarray(label_map(a=1))
        image.putpalette(PALETTE[:6])
        image.save(tmp_path / "m.png", bits=1)
        got, palette = read_labels(tmp_path / "m.png")
        assert got.max() == 1
        assert palette[:6] == PALETTE[:6] and len(palette) == 768

    def test_grey_and_black_and_white(self, tmp_path):
        Image.fromarray(label_map(a=7)).save(tmp_path / "l.png")
        Image.fromarray(label_map(a=255)).convert("1").save(tmp_path / "1.png")
        assert set(np.unique(read_labels(tmp_path / "l.png")[0])) == {0, 7}
        assert set(np.unique(read_labels(tmp_path / "1.png")[0])) == {0, 255}

    def test_sixteen_bits(self, tmp_path):
        Image.fromarray(label_map(a=7).astype(np.uint16)).save(tmp_path / "m.png")
        assert read_labels(tmp_path / "m.png")[0].max() == 7
        Image.fromarray(label_map(a=7).astype(np.uint16) * 100).save(tmp_path / "m.png")
        with pytest.raises(InputError, match="ids above 255"):
            read_labels(tmp_path / "m.png")

    def test_colours_of_the_davis_palette(self, tmp_path):
        colours = np.frombuffer(davis_palette(), np.uint8).reshape(256, 3)
        labels = label_map(a=1, b=2, c=20)
        Image.fromarray(colours[labels]).save(tmp_path / "m.png")
        np.testing.assert_array_equal(read_labels(tmp_path / "m.png")[0], labels)

    def test_other_colours_are_refused(self, tmp_path):
        Image.fromarray(picture({1: (0, 0, 2, 2)}, SIZE)).save(tmp_path / "m.png")
        with pytest.raises(InputError, match="colour image"):
            read_labels(tmp_path / "m.png")

    def test_grey_saved_as_colour(self, tmp_path):
        Image.fromarray(label_map(a=255)).convert("RGBA").save(tmp_path / "m.png")
        assert set(np.unique(read_labels(tmp_path / "m.png")[0])) == {0, 255}

    def test_jpeg_and_rubbish_are_refused(self, tmp_path):
        Image.fromarray(label_map(a=255)).save(tmp_path / "m.jpg")
        with pytest.raises(InputError, match="JPEG"):
            read_labels(tmp_path / "m.jpg")
        (tmp_path / "m.png").write_text("rubbish")
        with pytest.raises(InputError, match="cannot be read"):
            read_labels(tmp_path / "m.png")


class TestWriting:
    def test_palette_is_kept(self, tmp_path):
        labels = label_map(a=3, b=200)
        write_labels(tmp_path / "m.png", labels, PALETTE)
        got, palette = read_labels(tmp_path / "m.png")
        np.testing.assert_array_equal(got, labels)
        assert palette == PALETTE
        assert Image.open(tmp_path / "m.png").mode == "P"

    def test_nothing_is_left_when_writing_fails(self, tmp_path, monkeypatch):
        def full(self, file, **options):
            file.write(b"half")
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(Image.Image, "save", full)
        with pytest.raises(Exception, match="the disk is full"):
            write_labels(tmp_path / "m.png", label_map(a=1), None)
        assert list(tmp_path.iterdir()) == []


class TestMaskSet:
    def test_ids_may_have_gaps_and_255_is_ignored(self):
        masks = mask_set(label_map(a=3, b=200, c=255))
        labels, ids = masks.labels(0)
        assert ids == [3, 200]
        assert set(np.unique(labels)) == {0, 3, 200, 255}
        assert not masks.binary
        assert masks.palette == davis_palette()
        np.testing.assert_array_equal(masks.restore(labels), labels)

    def test_0_and_255_alone_are_one_object(self):
        masks = mask_set(label_map(a=255))
        labels, ids = masks.labels(0)
        assert ids == [1]
        assert set(np.unique(labels)) == {0, 1}
        assert masks.outside(1) == 255
        assert masks.palette is None
        assert set(np.unique(masks.restore(labels))) == {0, 255}

    def test_the_first_area_of_each_object(self):
        masks = mask_set(label_map(a=1), label_map(a=1, b=1, c=2))
        assert masks.first_area == {1: 4, 2: 4}

    def test_only_new_objects(self):
        masks = mask_set(label_map(a=1), label_map(a=1), label_map(a=1, b=2), only_new_objects=True)
        assert masks.frames == [0, 2]
        labels, ids = masks.labels(2)
        assert ids == [2]
        assert set(np.unique(labels)) == {0, 2}

    def test_palette_of_the_first_that_has_one(self, tmp_path):
        paths = [write_mask(tmp_path / f"{i}.png", label_map(a=1), p) for i, p in enumerate((None, PALETTE))]
        masks = MaskSet([GivenMask(i, "", "", path=p) for i, p in enumerate(paths)], SIZE)
        assert masks.palette == PALETTE

    @pytest.mark.parametrize("empty", [label_map(), label_map(a=0)])
    def test_no_object(self, empty):
        with pytest.raises(InputError, match="m0 shows no object"):
            mask_set(empty)

    def test_nothing_but_ignored(self):
        with pytest.raises(InputError, match="m1 shows no object"):
            mask_set(label_map(a=1), label_map(a=255))

    def test_another_size(self):
        with pytest.raises(InputError, match="m0 is 3x2, but the frames are 8x6"):
            mask_set(np.ones((2, 3), np.uint8))

    def test_a_mask_of_frames_that_were_turned(self):
        with pytest.raises(
            InputError, match="is 6x8, but the frames are 8x6: .* turned as the frames are seen"
        ):
            mask_set(np.ones((8, 6), np.uint8))

    def test_two_on_one_frame(self):
        given = [GivenMask(0, t, "", array=label_map(a=1)) for t in ("x", "y")]
        with pytest.raises(InputError, match="x and y are both for frame 0"):
            MaskSet(given, SIZE)


class TestFinding:
    @pytest.fixture
    def folder(self, tmp_path):
        frames = [picture({}, SIZE)] * 6
        return ImageFolder(write_folder(tmp_path / "frames", frames, first=10))

    @pytest.fixture
    def png(self, tmp_path):
        return write_mask(tmp_path / "m.png", label_map(a=1))

    @staticmethod
    def frames(found):
        return [m.frame for m in found]

    def test_a_png_lies_on_the_first_frame_processed(self, folder, png):
        assert self.frames(find_masks([str(png)], folder, range(2, 6))) == [2]

    def test_frame_by_number_and_by_name(self, folder, png):
        specs = [f"3={png}", f"00014={png}", f"00015.png={png}"]
        assert self.frames(find_masks(specs, folder, range(6))) == [3, 4, 5]

    def test_a_path_with_an_equals_sign(self, folder, tmp_path):
        odd = write_mask(tmp_path / "a=b.png", label_map(a=1))
        assert self.frames(find_masks([str(odd)], folder, range(6))) == [0]

    def test_a_frame_whose_name_has_an_equals_sign(self, tmp_path, png):
        folder = ImageFolder(write_folder(tmp_path / "f", [picture({}, SIZE)] * 3, name="t={}.png"))
        assert self.frames(find_masks([f"t=1={png}", f"2={png}"], folder, range(3))) == [1, 2]

    @pytest.mark.parametrize("name", ["m" * 5000, "a\0b", "m.png/x", "dangling.png"])
    def test_names_of_nothing(self, folder, tmp_path, monkeypatch, name):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "dangling.png").symlink_to("/nowhere.png")
        for spec in (name, f"1={name}"):
            with pytest.raises(InputError, match="mask .* (does not exist|cannot be opened)"):
                find_masks([spec], folder, range(6))

    def test_a_folder_named_by_frame(self, folder, tmp_path):
        for name in ("00011", "00013", "contact_sheet"):
            write_mask(tmp_path / "masks" / f"{name}.png", label_map(a=1))
        assert self.frames(find_masks([str(tmp_path / "masks")], folder, range(6))) == [1, 3]
        assert self.frames(find_masks([str(tmp_path / "masks")], folder, range(2, 6))) == [3]
        with pytest.raises(InputError, match="holds no PNG for a processed frame"):
            find_masks([str(tmp_path / "masks")], folder, range(4, 6))

    def write_masks(self, tmp_path, *masks):
        for index, labels in enumerate(masks):
            write_mask(tmp_path / "masks" / f"{10 + index:05d}.png", labels)
        return [str(tmp_path / "masks")]

    def test_255_is_decided_over_a_whole_folder(self, folder, tmp_path):
        specs = self.write_masks(tmp_path, label_map(a=255), label_map(a=255), label_map(a=1, b=255))
        with pytest.raises(InputError, match="no mask in .*masks of a processed frame shows an object"):
            MaskSet(find_masks(specs, folder, range(2)), SIZE)
        assert MaskSet(find_masks(specs, folder, range(6)), SIZE).frames == [2]
        write_mask(tmp_path / "masks" / "00012.png", label_map(a=255))
        assert MaskSet(find_masks(specs, folder, range(2)), SIZE).binary

    def test_masks_of_a_folder_that_show_no_object_are_left_out(self, folder, tmp_path):
        specs = self.write_masks(tmp_path, label_map(), label_map(a=1), label_map(b=255), label_map(a=1))
        masks = MaskSet(find_masks(specs, folder, range(6)), SIZE)
        assert masks.frames == [1, 3] and masks.first_area == {1: 4}
        with pytest.raises(InputError, match="00010.png shows no object"):
            MaskSet(find_masks([f"{specs[0]}/00010.png"], folder, range(6)), SIZE)

    def test_unknown_pixels_of_a_folder_are_told_once(self, folder, tmp_path):
        specs = self.write_masks(tmp_path, *[label_map(a=1, b=255)] * 3)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            MaskSet(find_masks(specs, folder, range(6)), SIZE)
        assert ["255, like those of 2 others, count as unknown" in str(w.message) for w in told] == [True]

    def test_a_folder_with_strangers(self, folder, tmp_path):
        write_mask(tmp_path / "masks" / "other.png", label_map(a=1))
        with pytest.raises(InputError, match="named like other.png"):
            find_masks([str(tmp_path / "masks")], folder, range(6))

    def test_frames_of_a_video_are_numbers(self, tmp_path, png):
        video = VideoFile(write_video(tmp_path / "v.mp4", [picture({})] * 3))
        write_mask(tmp_path / "masks" / "0000002.png", label_map(a=1))
        found = find_masks([f"1={png}", str(tmp_path / "masks")], video, range(sys.maxsize))
        assert self.frames(found) == [1, 2]

    def test_absent_files_and_frames(self, folder, png):
        with pytest.raises(InputError, match="does not exist"):
            find_masks(["absent.png"], folder, range(6))
        with pytest.raises(InputError, match="has no frame nine"):
            find_masks([f"nine={png}"], folder, range(6))
        with pytest.raises(InputError, match="frame 1, which is not processed"):
            find_masks([f"1={png}"], folder, range(0, 6, 2))

    def test_the_hash_tells_changed_masks(self, folder, png):
        before = find_masks([str(png)], folder, range(6))[0].digest
        write_mask(png, label_map(b=0, a=1))
        assert find_masks([str(png)], folder, range(6))[0].digest != before

    def test_from_python(self, folder, png):
        import torch

        def frames(mask):
            return self.frames(masks_from_python(mask, folder, range(6)))

        assert frames(png) == [0]
        assert frames(label_map(a=1).astype(bool)) == [0]
        assert frames(torch.from_numpy(label_map(a=1)).long()) == [0]
        assert frames({2: label_map(a=1), "00014": str(png)}) == [2, 4]
        assert frames([str(png), f"1={png}"]) == [0, 1]
        with pytest.raises(InputError, match="bool or integer"):
            frames(np.zeros(SIZE))
        with pytest.raises(InputError, match="bool or integer"):
            frames(label_map(a=1).astype(int) * 300)
        with pytest.raises(InputError, match="frame 9"):
            frames({9: label_map(a=1)})

    @pytest.mark.parametrize("key", [1, np.int64(1), np.uint8(1)])
    def test_an_integer_key_is_a_frame_number(self, tmp_path, png, key):
        import torch

        folder = ImageFolder(write_folder(tmp_path / "f", [picture({}, SIZE)] * 3, name="{}.png", first=1))
        for value in (png, str(png), label_map(a=1), torch.from_numpy(label_map(a=1))):
            assert self.frames(masks_from_python({key: value}, folder, range(3))) == [1]
        assert self.frames(masks_from_python({"1": png, torch.tensor(1): png}, folder, range(3))) == [0, 1]

    @pytest.mark.parametrize("key", [True, np.True_, 1.0, None, (1,)])
    def test_other_keys_are_refused(self, folder, png, key):
        for value in (png, label_map(a=1)):
            with pytest.raises(InputError, match="frame numbers or names"):
                masks_from_python({key: value}, folder, range(6))

    @pytest.mark.parametrize("key", [-1, 6, 10**30, "six", "\u00b2"])
    def test_keys_of_no_frame_are_refused(self, folder, png, key):
        for value in (png, label_map(a=1)):
            with pytest.raises(InputError):
                masks_from_python({key: value}, folder, range(6))

    def test_a_path_with_an_equals_sign_under_a_key(self, folder, tmp_path):
        odd = write_mask(tmp_path / "a=b.png", label_map(a=1))
        assert self.frames(masks_from_python({"00012": odd, 3: str(odd)}, folder, range(6))) == [2, 3]


class TestSmoothEdges:
    """A blurred or resized mask has hundreds of ids between those that were meant."""

    @staticmethod
    def disc(value=255, size=(120, 160)):
        y, x = np.mgrid[: size[0], : size[1]]
        return Image.fromarray((((y - 50) ** 2 + (x - 70) ** 2 < 900) * value).astype(np.uint8))

    @staticmethod
    def mask_set(image):
        labels = np.array(image)
        return MaskSet([GivenMask(0, "m", "", array=labels)], labels.shape)

    @pytest.mark.parametrize("value", [255, 60])
    @pytest.mark.parametrize("radius", [0.7, 1.5, 6])
    def test_blurred(self, value, radius):
        from PIL import ImageFilter

        with pytest.raises(InputError, match=r"mask m shows the ids .* Threshold it"):
            self.mask_set(self.disc(value).filter(ImageFilter.GaussianBlur(radius)))

    @pytest.mark.parametrize("size", [(80, 60), (320, 240), (231, 171)])
    def test_resized(self, size):
        with pytest.raises(InputError, match="Threshold it"):
            self.mask_set(self.disc().resize(size, Image.Resampling.BILINEAR))

    def test_a_jpeg_saved_as_png(self):
        import io

        buffer = io.BytesIO()
        self.disc().save(buffer, "JPEG", quality=80)
        with pytest.raises(InputError, match="Threshold it"):
            self.mask_set(Image.open(buffer))

    def test_a_few_steps_are_warned_about(self):
        smooth = self.disc(3).resize((320, 240), Image.Resampling.BILINEAR)
        with pytest.warns(InputWarning, match="ids 1, 2 as thin strips"):
            self.mask_set(smooth)

    def test_small_and_many_objects_are_none(self, recwarn):
        random = np.random.default_rng(0)
        for largest in (4, 30):
            labels = np.zeros((240, 320), np.uint8)
            for i in range(1, 200):
                top, left = random.integers(0, 230), random.integers(0, 310)
                labels[top : top + random.integers(1, largest), left : left + random.integers(1, largest)] = i
            self.mask_set(labels)
        assert not recwarn.list


def test_255_beside_other_ids_is_said_to_be_unknown():
    with pytest.warns(InputWarning, match="m0: its 4 pixels of value 255 count as unknown"):
        masks = mask_set(label_map(a=127, b=255))
    assert masks.labels(0)[1] == [127]
