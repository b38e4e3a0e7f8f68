"""RGMP: the original's numbers, protocol and parameters."""

from __future__ import annotations

import io
from ast import literal_eval

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from tests.conftest import SHARED, with_golden_weights
from vosops.inference import NetworkTracker
from vosops.memory import MemoryBudgetError
from vosops.models import create_model
from vosops.models.network import TensorMasks
from vosops.models.resnet import ResNet50Encoder
from vosops.models.rgmp import RGMP

HEIGHT, WIDTH = 40, 50  # of the frames; 64 x 64 with the original's padding, at any of its scales
LARGER = (70, 100)  # 96 x 128, and 64 x 96 at half the scale
ALL_SCALES = (0.5, 0.75, 1.0)  # of the original
TOLERANCE = {"atol": 1e-4, "rtol": 0}


@pytest.fixture(scope="module")
def network() -> RGMP:
    """Random weights whose maps neither explode nor vanish."""
    torch.manual_seed(3)
    network = RGMP().eval()
    for name, parameter in network.named_parameters():
        if name.endswith(("bn3.weight", "downsample.1.weight")):
            parameter.data.fill_(0.3)
    return network


def clip(frames: int, objects: int, size: tuple[int, int] = (HEIGHT, WIDTH)) -> tuple[list[Tensor], Tensor]:
    """Smooth moving noise, and the labels of its first frame: a square for each object."""
    height, width = size
    noise = functional.interpolate(torch.rand(1, 3, 12, 14), (height + 8, width + 8), mode="bicubic")[0]
    images = [noise.clamp(0, 1)[:, t : t + height, t : t + width] for t in range(frames)]
    labels = torch.zeros(size, dtype=torch.int64)
    for i in range(objects):
        labels[5 + 9 * i : 15 + 9 * i, 6 + 12 * i : 20 + 12 * i] = 3 * i + 2
    return images, labels


@torch.no_grad()
def original_protocol(
    network: RGMP, frames: list[Tensor], labels: Tensor, scales: tuple[float, ...]
) -> list[Tensor]:
    """The probabilities of frames 1 and on, as the original makes them: object by object, scale by scale."""
    rows, columns = labels.shape
    height, width = (side + 32 - side % 32 for side in labels.shape)
    top, left = (height - rows) // 2, (width - columns) // 2
    around = (left, width - columns - left, top, height - rows - top)
    frames = [functional.pad(frame[None], around) for frame in frames]
    ids = [i for i in labels.unique().tolist() if i]
    masks = [functional.pad((labels == i).float()[None, None], around) for i in ids]
    if len(ids) > 1:
        masks.insert(0, torch.stack(masks).sum(0))

    def resized(x: Tensor, scale: float) -> Tensor:
        if scale == 1:
            return x
        size = [int(side * scale) + 32 - int(side * scale) % 32 for side in x.shape[2:]]
        return functional.interpolate(x, size, mode="bilinear", align_corners=False)

    def encoded(frame: Tensor, mask: Tensor, scale: float) -> list[Tensor]:
        return network.Encoder(resized(frame, scale), resized(mask, scale))

    references = [[encoded(frames[0], mask, scale)[-1] for scale in scales] for mask in masks]
    results = []
    for frame in frames[1:]:
        propagated = []
        for mask, of_scales in zip(masks, references, strict=True):
            mean = torch.zeros(1, 1, height, width)
            for scale, reference in zip(scales, of_scales, strict=True):
                logits = network.Decoder(encoded(frame, mask, scale), network.Decoder.GC.prepare(reference))[
                    0
                ]
                logits = functional.interpolate(logits, scale_factor=4, mode="bilinear", align_corners=True)
                probability = logits.softmax(1)[:, 1:]
                mean += functional.interpolate(probability, (height, width), mode="bilinear") / len(scales)
            propagated.append(mean)
        if len(ids) == 1:
            masks = propagated
            together = torch.cat([1 - propagated[0], propagated[0]], 1)
        else:
            apart = torch.cat([1 - propagated[0], *propagated[1:]], 1).clamp(1e-7, 1 - 1e-7)
            together = torch.log(apart / (1 - apart)).softmax(1)
            objects = list(together[:, 1:].split(1, 1))
            masks = [sum(objects), *objects]
        results.append(together[0, :, top : top + rows, left : left + columns])
    return results


def started(
    network: RGMP, objects: int = 2, steps: int = 1, **options
) -> tuple[NetworkTracker, list[Tensor]]:
    frames, labels = clip(steps + 4, objects)
    tracker = NetworkTracker(network, **options)
    tracker.initialize(frames[0], labels)
    for frame in frames[1 : steps + 1]:
        tracker.step(frame)
    return tracker, frames[steps + 1 :]


def test_parameters_are_those_of_the_original(network):
    path = SHARED / "params/params_rgmp.txt"
    if not path.exists():
        pytest.skip(f"{path} is not here (set VOSOPS_TEST_DATA)")
    lines = (line.split("\t") for line in path.read_text().splitlines() if not line.startswith("#"))
    official = {name: literal_eval(shape) for name, shape, _ in lines}
    assert {name: tuple(x.shape) for name, x in network.state_dict().items()} == official


@pytest.mark.parametrize("align_corners", [True, False])
def test_golden(golden, align_corners):
    """Logits of all stages there are, and three frames of probabilities, each from the one before."""
    case = golden("rgmp_model.pt")["so_1scale"]
    network, suffix = with_golden_weights(RGMP(align_corners=align_corners)), "_ac1" if align_corners else ""
    frames, mask, size = case["frames"], case["masks"][:, 0, 0], (96, 160)
    with torch.no_grad():
        torch.testing.assert_close(network.Encoder.last(frames[:, :, 0], mask), case["ref_r5"], **TOLERANCE)
        output = network(frames[:, :, 1], mask, network.reference(frames[:, :, 0], mask))
        torch.testing.assert_close(output.logits, case[f"dec_p{suffix}"], **TOLERANCE)
        if not align_corners:
            torch.testing.assert_close(output.pred2, case["dec_p2"], **TOLERANCE)
            torch.testing.assert_close(output.pred5, case["dec_p5"], **TOLERANCE)
        memory, probabilities = network.new_memory(), torch.cat([1 - mask, mask])
        for t in range(1, 4):
            masks = TensorMasks(probabilities, [1])
            memory.add(frames[:, :, t - 1], masks, frame=t - 1, permanent=t == 1, keep=False)
            probabilities = network.probabilities(memory.segment(frames[:, :, t], frame=t), size)
            torch.testing.assert_close(probabilities, case[f"all_E{suffix}"][0, :, t], **TOLERANCE)


@pytest.mark.parametrize(
    ("objects", "scales"),
    [(1, (1.0,)), (3, (1.0,)), (1, ALL_SCALES), (2, (0.5, 1.0))],
    ids=["one object", "three objects", "three scales", "two objects, two scales"],
)
def test_the_original_protocol(network, objects, scales):
    frames, labels = clip(3, objects, (HEIGHT, WIDTH) if scales == (1.0,) else LARGER)
    tracker = NetworkTracker(network, scales=scales)
    tracker.initialize(frames[0], labels)
    for frame, expected in zip(frames[1:], original_protocol(network, frames, labels, scales), strict=True):
        probabilities = tracker.step(frame)
        assert 0.001 < probabilities[1:].mean() < 0.999
        torch.testing.assert_close(probabilities, expected, **TOLERANCE)


def test_the_naive_way_gives_the_same(network):
    naive, frames = started(network, 3, naive=True)
    torch.manual_seed(0)
    fused, again = started(network, 3)
    assert torch.equal(frames[0], again[0])
    torch.testing.assert_close(fused.step(frames[0]), naive.step(frames[0]), **TOLERANCE)
    assert naive.memory_bytes() == 4 * fused.memory_bytes()


@pytest.mark.parametrize("pixels", [1, 64 * 12], ids=["strips of a row", "strips of three rows"])
def test_objects_in_a_batch_and_whole_maps_are_as_one_by_one_in_strips(network, monkeypatch, pixels):
    monkeypatch.setattr("vosops.models.rgmp.objects_together", lambda image: 4)
    batched, frames = started(network, 3)
    expected = batched.step(frames[0])
    monkeypatch.undo()
    monkeypatch.setattr("vosops.models.rgmp._STRIP_PIXELS", pixels)
    torch.manual_seed(0)
    torch.testing.assert_close(started(network, 3)[0].step(frames[0]), expected, **TOLERANCE)


def test_labels_are_the_most_probable_objects_made_in_tiles(network, monkeypatch):
    tracker, frames = started(network)
    state = tracker.state_dict()
    expected = torch.tensor([0, 2, 5], dtype=torch.uint8)[tracker.step(frames[0]).argmax(0)]
    monkeypatch.setattr("vosops.inference.network_tracker._TILE_BYTES", 4 * 3 * 64 * 7)  # seven rows
    tracker.load_state_dict(state)
    assert torch.equal(tracker.step(frames[0], output="labels"), expected)


@pytest.mark.parametrize(("side", "padded"), [(480, 512), (854, 864), (512, 544), (1, 32)])
def test_padding_always_adds(network, side, padded):
    left, right, top, bottom = network.padding((side, 31))
    assert (top + side + bottom, left + 31 + right) == (padded, 32)
    assert 0 <= bottom - top <= 1


@pytest.mark.parametrize(("scale", "size"), [(1.0, (512, 864)), (0.75, (416, 672)), (0.5, (288, 448))])
def test_sizes_of_the_scales(network, scale, size):
    assert network.scaled_size((512, 864), scale) == size


def test_references_are_made_once_and_are_all_that_is_kept(network, monkeypatch):
    calls = []
    monkeypatch.setattr(network, "reference", lambda *x: calls.append(1) or RGMP.reference(network, *x))
    tracker, frames = started(network, 3, steps=0)
    for frame in frames[:3]:
        tracker.step(frame)
    assert len(calls) == 4, "three objects and their union"
    assert tracker.memory_bytes() == 4 * 512 * 2 * 2 * 4


def test_the_budget_is_held(network):
    frames, labels = clip(2, 2)
    tracker = NetworkTracker(network, memory_budget=3 * 512 * 4 * 4 - 1)
    tracker.initialize(frames[0], labels)
    with pytest.raises(
        MemoryBudgetError, match="budget must be at least 24576 bytes for the references of 2"
    ):
        tracker.step(frames[1])
    tracker = NetworkTracker(network, memory_budget=3 * 512 * 4 * 4)
    tracker.initialize(frames[0], labels)
    tracker.step(frames[1])


def test_an_object_refers_to_the_frame_where_it_appeared(network):
    """The later object and the union to the second frame; the first object to the first, corrected or not."""
    frames, labels = clip(3, 2)
    tracker = NetworkTracker(network)
    tracker.initialize(frames[0], torch.where(labels == 2, 2, 0))
    tracker.step(frames[1], labels)
    tracker.step(frames[2])
    assert tracker.object_ids == [2, 5]
    geometry, [memory] = tracker._geometry, tracker._memories
    images = [geometry.image(frame, torch.contiguous_format) for frame in frames]
    given = functional.pad(labels, geometry.padding)[None]
    for reference, image, mask in (
        (memory._references[2], images[0], given == 2),
        (memory._references[5], images[1], given == 5),
        (memory._union, images[1], given > 0),
    ):
        with torch.no_grad():
            torch.testing.assert_close(reference, network.reference(image, mask.float()), **TOLERANCE)


def test_corrections_are_the_mask_that_the_next_frame_sees(network):
    frames, labels = clip(3, 1)
    corrected, other = NetworkTracker(network), NetworkTracker(network)
    for tracker in (corrected, other):
        tracker.initialize(frames[0], labels)
        tracker.step(frames[1])
    corrected.add_objects(frames[1], labels.roll(7, 1))
    assert (corrected.step(frames[2]) - other.step(frames[2])).abs().max() > 1e-3


def test_a_removed_object_takes_the_union_with_it(network):
    tracker, frames = started(network)
    tracker.remove_object(2)
    assert tracker.step(frames[0]).shape == (2, HEIGHT, WIDTH)
    assert tracker.memory_bytes() == 512 * 4 * 4, "one object needs no union"
    assert set(tracker.step(frames[1], output="labels").unique().tolist()) <= {0, 5}
    tracker.remove_object(5)
    assert tracker.step(frames[2]).eq(1).all()


@pytest.mark.parametrize("change", [None, "remove", "add"])
def test_resuming_is_bit_identical(network, change):
    tracker, frames = started(network, scales=(1.0, 0.5))
    if change == "remove":
        tracker.remove_object(2)
    elif change == "add":
        tracker.add_objects(frames[0], torch.full((HEIGHT, WIDTH), 9))
    file = io.BytesIO()
    torch.save(tracker.state_dict(), file)
    file.seek(0)
    resumed = NetworkTracker(network, scales=(1.0, 0.5))
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for frame in frames[:2]:
        assert torch.equal(tracker.step(frame), resumed.step(frame))


def test_a_memory_goes_on_from_its_state(network):
    """Also between memorising a frame and segmenting the next."""
    image, mask = torch.rand(1, 3, 64, 64), torch.rand(2, 64, 64)
    masks = TensorMasks(torch.cat([1 - mask.sum(0, keepdim=True), mask]), [4, 1])
    memory, other = network.new_memory(), network.new_memory()
    with torch.no_grad():
        memory.add(image, masks, frame=0, permanent=True, keep=True)
        other.load_state_dict(memory.state_dict())
        assert torch.equal(memory.segment(image, frame=1), other.segment(image, frame=1))
    assert other.object_ids == [4, 1] and memory.memory_bytes() == other.memory_bytes()


def test_training_reaches_every_parameter(network):
    """The losses of all stages, through the current frame and the reference."""
    frames, masks = torch.rand(2, 1, 3, 64, 64), torch.rand(2, 64, 64)
    output = network(frames[1], masks, network.reference(frames[0], masks))
    assert [x.shape[2] for x in output] == [64, 16, 8, 4, 2]
    network.zero_grad()
    sum(x.square().mean() for x in output).backward()
    gradients = {name: parameter.grad for name, parameter in network.named_parameters()}
    network.zero_grad()
    assert not [name for name, grad in gradients.items() if grad is None or not grad.isfinite().all()]
    assert not [name for name, grad in gradients.items() if not grad.any()]
    for half in gradients["Decoder.GC.conv_l1.weight"].split(2048, 1):
        assert half.abs().max() > 0, "both streams"


def official_checkpoint(network: RGMP) -> dict[str, Tensor]:
    """As the original's file: of a DataParallel, by a torch whose batch norm did not count."""
    state = network.state_dict().items()
    return {f"module.{name}": x for name, x in state if not name.endswith("num_batches_tracked")}


def test_an_official_checkpoint_loads(network, tmp_path):
    torch.save(official_checkpoint(network), tmp_path / "weights.pth")
    loaded = create_model("rgmp", tmp_path / "weights.pth").state_dict()
    assert all(torch.equal(loaded[name], x) for name, x in network.state_dict().items())


def test_a_wrong_checkpoint_is_refused_with_names(network, tmp_path):
    state = official_checkpoint(network)
    del state["module.Decoder.pred2.bias"]
    state["module.Decoder.GC.conv_l1.weight"] = torch.zeros(256, 2048, 7, 1)
    torch.save(state, tmp_path / "weights.pth")
    with pytest.raises(
        ValueError, match=r"1 missing \(Decoder.pred2.bias\); 1 misshapen \(Decoder.GC.conv_l1.weight"
    ):
        create_model("rgmp", tmp_path / "weights.pth")


def test_the_command_segments_a_clip(tmp_path, monkeypatch):
    """From frames and a first mask in files, with seeded weights, to masks in files."""
    image = pytest.importorskip("PIL.Image")
    pytest.importorskip("typer")
    from vosops import cli

    clip_folder = SHARED / "data/davis2017/JPEGImages/480p/bmx-trees"
    mask = SHARED / "data/davis2017/Annotations/480p/bmx-trees/00000.png"
    if not clip_folder.exists():
        pytest.skip(f"{clip_folder} is not here (set VOSOPS_TEST_DATA)")
    torch.save(official_checkpoint(with_golden_weights(RGMP(align_corners=True))), tmp_path / "weights.pth")
    options = [
        "--model",
        "rgmp",
        "--weights",
        tmp_path / "weights.pth",
        "--size",
        64,
        "--scales",
        "0.5,1",
        "--end",
        3,
    ]
    arguments = ["vosops", "segment", clip_folder, "--mask", mask, "--out", tmp_path / "out", *options]
    monkeypatch.setattr("sys.argv", [str(x) for x in arguments])
    with pytest.raises(SystemExit) as exit:
        cli.main()
    assert not exit.value.code
    written = sorted((tmp_path / "out").glob("0*.png"))
    assert [path.stem for path in written] == ["00000", "00001", "00002"]
    assert image.open(written[-1]).size == (854, 480)


@pytest.mark.parametrize("size", [(1, 16, 16), (32, 32)])
def test_masks_of_another_size_are_refused(size):
    encoder = ResNet50Encoder(("p",))
    with pytest.raises(ValueError, match=r"masks must be .* for a frame of \(1, 3, 32, 32\), got"):
        encoder(torch.rand(1, 3, 32, 32), torch.rand(size))
