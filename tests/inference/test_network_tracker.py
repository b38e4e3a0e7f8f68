"""NetworkTracker: how it runs a network over a video, with a network whose every number is predictable."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

import vosops
from tests.clips import ColourTracker, picture, truth
from tests.models.tracker_contract import check_tracker
from vosops import backends
from vosops.inference import NetworkTracker, TrackingLoop, network_tracker
from vosops.io.frames import ArraySource
from vosops.io.masks import MaskSet, masks_from_python
from vosops.memory import MemoryBudgetError
from vosops.models import create_model
from vosops.models._tracking import most_probable
from vosops.models.network import Masks, Memory, Network, resize_rows

STRIDE = 4
SIZE = (22, 29)  # 24 x 32 with padding


class Echo(Network):
    """Predicts the masks that it was given last, blurred a little, brighter where the new frame is brighter."""

    stride = STRIDE

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(()))
        self.memories: list[EchoMemory] = []

    def new_memory(self, *, budget: int | None = None, naive: bool = False) -> Memory:
        self.memories.append(EchoMemory(self, budget, naive))
        return self.memories[-1]

    def evidence(self, scores: Tensor, size: tuple[int, int], rows: range) -> Tensor:
        assert not torch.is_autocast_enabled("cpu")
        return resize_rows(scores, size, rows)

    def aggregate(self, evidence: Tensor) -> Tensor:
        return vosops.soft_aggregate(evidence)


class EchoMemory(Memory):
    def __init__(self, network: Echo, budget: int | None, naive: bool) -> None:
        self.network, self.budget, self.naive = network, budget, naive
        self.object_ids = []
        self.last: dict[int, Tensor] = {}  # coarse masks
        self.added: list[dict[str, Any]] = []
        self.seen: list[tuple[int, ...]] = []

    def add(self, image: Tensor, masks: Masks, *, frame: int, permanent: bool, keep: bool) -> None:
        full = torch.stack([masks.of(i) for i in range(1 + len(masks.object_ids))])
        self.added.append(
            {
                "frame": frame,
                "permanent": permanent,
                "keep": keep,
                "image": image,
                "masks": full,
                "labels": masks.labels(),
                "ids": list(masks.object_ids),
            }
        )
        coarse = functional.avg_pool2d(full[None, 1:], STRIDE)[0]
        self.object_ids = list(masks.object_ids)
        self.last = dict(zip(self.object_ids, coarse, strict=True))

    def segment(self, image: Tensor, *, frame: int) -> Tensor:
        self.seen.append(tuple(image.shape))
        light = functional.avg_pool2d(image.mean(1), STRIDE)
        return self.network.gain * (
            0.1 + 0.7 * torch.stack([self.last[o] for o in self.object_ids]) + 0.1 * light
        )

    def remove_object(self, object_id: int) -> None:
        self.object_ids.remove(object_id)
        del self.last[object_id]

    def state_dict(self) -> dict[str, Any]:
        return {"ids": list(self.object_ids), "last": [x.clone() for x in self.last.values()]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.object_ids = list(state["ids"])
        self.last = dict(zip(state["ids"], state["last"], strict=True))

    def memory_bytes(self) -> int:
        return sum(4 * x.numel() for x in self.last.values())


def frames(count: int) -> list[Tensor]:
    return list(torch.rand(count, 3, *SIZE))


def first_labels(ids=(1, 2)) -> Tensor:
    labels = torch.zeros(SIZE, dtype=torch.uint8)
    for n, i in enumerate(ids):
        labels[2 + 6 * n : 8 + 6 * n, 3 + 8 * n : 12 + 8 * n] = i
    return labels


def started(labels: Tensor | None = None, **options) -> tuple[NetworkTracker, EchoMemory]:
    network = Echo()
    one = NetworkTracker(network, **options)
    one.initialize(torch.rand(3, *SIZE), first_labels() if labels is None else labels)
    return one, network.memories[0]


class TestProtocol:
    def test_every_frame_is_added_before_the_next_one(self):
        one, memory = started(memory_every=3)
        assert memory.added == []
        for image in frames(7):
            one.step(image)
        assert [a["frame"] for a in memory.added] == list(range(7))
        assert [a["permanent"] for a in memory.added] == [True] + 6 * [False]
        assert [a["keep"] for a in memory.added] == [True, False, False, True, False, False, True]

    def test_first_masks_are_the_labels_and_0_in_the_padding(self):
        one, memory = started()
        one.step(frames(1)[0])
        inside = memory.added[0]["masks"][:, 1:23, 1:30]
        assert torch.equal(inside, torch.stack([first_labels() == i for i in range(3)]).float())
        assert memory.added[0]["masks"].sum() == SIZE[0] * SIZE[1]
        assert torch.equal(memory.added[0]["labels"][1:23, 1:30], first_labels().long())

    def test_a_mask_of_bools_is_one_object(self):
        one, _ = started(first_labels((1,)).bool())
        assert [(type(i), i) for i in one.object_ids] == [(int, 1)]
        assert one.step(frames(1)[0], output="labels").dtype == torch.uint8

    def test_later_masks_are_the_soft_results(self):
        one, memory = started()
        found = [one.step(image) for image in frames(3)]
        for probabilities, added in zip(found, memory.added[1:], strict=False):
            assert torch.equal(added["masks"][:, 1:23, 1:30], probabilities)
            assert added["masks"][:, 0].sum() == added["masks"][:, :, 30:].sum() == 0
            assert torch.equal(added["labels"][1:23, 1:30], probabilities.argmax(0))

    def test_masks_may_cover_the_padding(self, monkeypatch):
        monkeypatch.setattr(Echo, "masks_cover_padding", True)
        one, memory = started()
        found = [one.step(image) for image in frames(2)]
        torch.testing.assert_close(memory.added[0]["masks"].sum(0), torch.ones(24, 32))  # background there
        torch.testing.assert_close(memory.added[1]["masks"][:, 1:23, 1:30], found[0])
        torch.testing.assert_close(memory.added[1]["masks"].sum(0), torch.ones(24, 32))
        assert (memory.added[1]["masks"][1:, 0] > 0).all()

    def test_images_are_padded_and_uint8_is_scaled(self):
        one, memory = started()
        image = (255 * frames(1)[0]).byte()
        one.step(image)
        one.step(image)
        padded = functional.pad(image[None].float() / 255, (1, 2, 1, 1))
        assert torch.equal(memory.added[1]["image"], padded)
        assert memory.seen == [(1, 3, 24, 32)] * 2

    def test_the_callers_frame_may_change_after_the_step(self):
        one, memory = started()
        image = frames(1)[0]
        before = image.clone()
        one.step(image)
        image.zero_()
        one.step(image)
        assert torch.equal(memory.added[1]["image"][0, :, 1:23, 1:30], before)

    def test_probabilities_sum_to_one_in_float32(self):
        found = started()[0].step(frames(1)[0])
        assert found.shape == (3, *SIZE) and found.dtype == torch.float32
        torch.testing.assert_close(found.sum(0), torch.ones(SIZE))

    def test_results_are_ordinary_tensors_in_any_mode(self):
        network = Echo()
        one = NetworkTracker(network)
        with torch.inference_mode():
            one.initialize(frames(1)[0], first_labels())
            found = one.step(frames(1)[0])
        assert not found.is_inference() and not found.requires_grad
        one.step(frames(1)[0])

    def test_end_changes_nothing(self):
        images = frames(3)
        torch.manual_seed(1)
        one, _ = started()
        torch.manual_seed(1)
        other, _ = started()
        assert torch.equal(one.step(images[0]), other.step(images[0], end=True))
        assert torch.equal(one.step(images[1]), other.step(images[1]))


class TestLabels:
    @pytest.mark.parametrize("ids", [(1, 2), (3, 300)])
    @pytest.mark.parametrize("tile", [1, 1 << 20])
    def test_are_the_most_probable_of_the_probabilities(self, monkeypatch, ids, tile):
        monkeypatch.setattr(network_tracker, "_TILE_BYTES", tile)
        monkeypatch.setattr(network_tracker, "_GROUP_BYTES", tile)
        images, labels = frames(3), torch.zeros(SIZE, dtype=torch.int64)
        for n, i in enumerate(ids):
            labels[2 + 6 * n : 8 + 6 * n, 3 + 8 * n : 12 + 8 * n] = i
        torch.manual_seed(1)
        one, memory = started(labels)
        torch.manual_seed(1)
        other, same = started(labels)
        for image in images:
            probabilities, found = one.step(image), other.step(image, output="labels")
            assert torch.equal(found, most_probable(probabilities, ids))
            assert found.dtype == (torch.uint8 if max(ids) < 256 else torch.int64)
            assert torch.equal(other.confidence(), probabilities.amax(0))
        for a, b in zip(memory.added, same.added, strict=True):
            assert torch.equal(a["masks"], b["masks"])

    def test_never_hold_the_probabilities_of_all_pixels(self, monkeypatch):
        monkeypatch.setattr(network_tracker, "_TILE_BYTES", 16 << 10)
        monkeypatch.setattr(network_tracker, "_GROUP_BYTES", 1)

        class Sparing(EchoMemory):
            def add(self, image, masks, **options):
                coarse = [functional.avg_pool2d(masks.of(1 + i)[None], STRIDE)[0] for i in range(9)]
                self.object_ids = list(masks.object_ids)
                self.last = dict(zip(self.object_ids, coarse, strict=True))

        class Largest(TorchDispatchMode):
            most = 0

            def __torch_dispatch__(self, function, types, args=(), kwargs=None):
                result = function(*args, **(kwargs or {}))
                if isinstance(result, Tensor):
                    self.most = max(self.most, result.numel())
                return result

        monkeypatch.setattr(
            Echo, "new_memory", lambda self, budget=None, naive=False: Sparing(self, budget, naive)
        )
        size = (60, 100)
        labels = torch.arange(9).repeat_interleave(6000 // 9 + 1)[:6000].view(size) + 1
        one = NetworkTracker(Echo())
        one.initialize(torch.rand(3, *size), labels)
        with Largest() as largest:
            for _ in range(2):
                one.step(torch.rand(3, *size), output="labels")
        assert largest.most <= 3 * size[0] * size[1]  # the frame itself
        with Largest() as largest:
            one.step(torch.rand(3, *size))
        assert largest.most == 10 * size[0] * size[1]


def test_the_protocol():
    check_tracker(lambda: NetworkTracker(Echo()), frames(4), [first_labels((i,)) for i in (1, 2, 3)])


class TestCorrections:
    def test_given_labels_are_the_result_and_kept(self):
        one, memory = started()
        one.step(frames(1)[0])
        labels = first_labels((2, 1)).long()
        found = one.step(frames(1)[0], labels)
        assert torch.equal(found, torch.stack([labels == i for i in range(3)]).float())
        one.step(frames(1)[0])
        assert memory.added[2]["permanent"] and torch.equal(memory.added[2]["masks"][:, 1:23, 1:30], found)

    def test_unknown_pixels_take_the_prediction(self):
        torch.manual_seed(1)
        one, _ = started()
        torch.manual_seed(1)
        other, _ = started()
        image, labels = frames(1)[0], first_labels()
        labels[:, 10:] = 255
        given, predicted = one.step(image, labels), other.step(image)
        assert torch.equal(given[:, :, 10:], predicted[:, :, 10:])
        assert torch.equal(given[:, :, :10].argmax(0), labels[:, :10].long())

    def test_unknown_pixels_of_the_first_frame_are_background(self):
        labels = first_labels()
        labels[0] = 255
        one, memory = started(labels)
        assert one.object_ids == [1, 2]
        one.step(frames(1)[0])
        assert (memory.added[0]["masks"][0, 1, 1:30] == 1).all()

    def test_permanent_keeps_a_result(self):
        one, memory = started()
        one.step(frames(1)[0], permanent=True)
        one.step(frames(1)[0])
        assert [a["permanent"] for a in memory.added] == [True, True]

    def test_new_objects_in_a_step(self):
        one, memory = started()
        labels = torch.full(SIZE, 255)
        labels[15:20, 3:9] = 7
        found = one.step(frames(1)[0], labels)
        assert one.object_ids == [1, 2, 7] and found.shape[0] == 4
        assert (found[3, 15:20, 3:9] == 1).all() and found[3].sum() == 30
        assert one.step(frames(1)[0]).shape[0] == 4
        assert memory.added[1]["ids"] == [1, 2, 7] and memory.added[1]["permanent"]

    def test_add_objects_speaks_of_those_it_shows(self):
        one, memory = started()
        image = frames(1)[0]
        before = one.step(image, output="labels").long()
        labels = torch.zeros(SIZE, dtype=torch.uint8)
        labels[15:20, 3:9] = 7  # a new one
        labels[0:3, 0:3] = 1  # a known one, corrected
        one.add_objects(image, labels)
        assert one.object_ids == [1, 2, 7]
        one.step(frames(1)[0])
        wanted = torch.where((labels == 0) & (before == 2), 2, labels.long())
        found = memory.added[1]["masks"][:, 1:23, 1:30]
        assert torch.equal(found.argmax(0), torch.tensor([0, 1, 2, 0, 0, 0, 0, 3])[wanted])
        assert memory.added[1]["permanent"]

    def test_add_objects_leaves_unknown_pixels_as_they_were(self):
        one, memory = started()
        image = frames(1)[0]
        before = one.step(image)
        labels = torch.full(SIZE, 255)
        labels[15:20, 3:9] = 7
        one.add_objects(image, labels)
        one.step(frames(1)[0])
        found = memory.added[1]["masks"][:, 1:23, 1:30]
        assert torch.equal(found[:3, :15], before[:, :15])

    def test_add_objects_may_start(self):
        one = NetworkTracker(Echo())
        one.add_objects(frames(1)[0], first_labels())
        assert one.object_ids == [1, 2]

    def test_a_removed_object_becomes_background(self):
        one, memory = started()
        before = one.step(frames(1)[0])
        one.remove_object(1)
        assert one.object_ids == [2] and memory.object_ids == [2]
        assert one.step(frames(1)[0]).shape[0] == 2
        found = memory.added[1]["masks"][:, 1:23, 1:30]
        assert torch.equal(found[0], before[0] + before[1]) and torch.equal(found[1], before[2])

    def test_a_removed_id_may_come_again(self):
        one, memory = started()
        image = frames(1)[0]
        one.step(image)
        one.remove_object(1)
        labels = torch.full(SIZE, 255)
        labels[15:20, 3:9] = 1
        one.add_objects(image, labels)
        one.step(frames(1)[0])
        assert memory.added[1]["ids"] == [2, 1]
        assert memory.added[1]["masks"][2].sum() == 30

    def test_nothing_left_is_background(self):
        one, _ = started()
        one.step(frames(1)[0])
        one.remove_object(1)
        one.remove_object(2)
        assert torch.equal(one.step(frames(1)[0]), torch.ones(1, *SIZE))
        assert not one.step(frames(1)[0], output="labels").any()
        one.add_objects(frames(1)[0], first_labels((5,)))
        assert one.step(frames(1)[0]).shape[0] == 2


class TestState:
    @pytest.mark.parametrize("labelled", [False, True])
    def test_goes_on_to_the_bit(self, tmp_path, labelled):
        images = frames(5)
        one, _ = started(memory_every=2)
        one.step(images[0])
        if labelled:
            labels = first_labels((2, 9))
            labels[:, 20:] = 255
            one.step(images[1], labels)
            one.remove_object(1)
        torch.save(one.state_dict(), tmp_path / "state.pth")
        wanted = [one.step(image) for image in images[2:]]
        other = NetworkTracker(Echo(), memory_every=2)
        other.load_state_dict(torch.load(tmp_path / "state.pth", weights_only=True))
        assert other.object_ids == one.object_ids
        assert all(torch.equal(other.step(x), y) for x, y in zip(images[2:], wanted, strict=True))

    def test_of_a_tracker_that_has_not_begun(self):
        one, _ = started()
        one.load_state_dict(NetworkTracker(Echo()).state_dict())
        assert one.object_ids == []
        with pytest.raises(RuntimeError, match="initialize must be called before"):
            one.step(frames(1)[0])

    def test_of_other_options_is_refused(self):
        with pytest.raises(ValueError, match=r"state must be of memory_every 5, got 2"):
            started()[0].load_state_dict(started(memory_every=2)[0].state_dict())
        with pytest.raises(ValueError, match=r"state must be of naive False, got True"):
            started()[0].load_state_dict(started(naive=True)[0].state_dict())


class TestScales:
    def test_run_at_each_size_and_average(self):
        one, memory = started(scales=(1.0, 0.5))
        half = one.network.memories[1]
        image = frames(1)[0]
        found = one.step(image)
        assert memory.seen == [(1, 3, 24, 32)] and half.seen == [(1, 3, 12, 16)]
        assert half.added[0]["masks"].shape == (3, 12, 16)
        network, parts = one.network, []
        for scores, size in zip(one._latest.scores, [(24, 32), (12, 16)], strict=True):
            part = network.evidence(scores, size, range(size[0]))
            parts.append(functional.interpolate(part[None], (24, 32), mode="bilinear")[0])
        wanted = network.aggregate(sum(parts) / 2)[:, 1:23, 1:30]
        torch.testing.assert_close(found, wanted)

    def test_tiles_agree_with_the_whole(self, monkeypatch):
        image = frames(1)[0]
        torch.manual_seed(1)
        whole = started(scales=(0.5, 0.75, 1.0))[0].step(image)
        monkeypatch.setattr(network_tracker, "_TILE_BYTES", 1)
        torch.manual_seed(1)
        torch.testing.assert_close(started(scales=(0.5, 0.75, 1.0))[0].step(image), whole)

    def test_share_the_budget_by_their_area(self):
        one, _ = started(scales=(1.0, 0.5), memory_budget="1000B")
        assert [memory.budget for memory in one.network.memories] == [800, 200]

    @pytest.mark.parametrize(
        "name, scales", [("stm", (0.5, 0.75, 1.0)), ("stm", (0.3, 0.7)), ("rgmp", (1.0, 0.5))]
    )
    def test_too_small_a_budget_is_named_whole_with_what_all_scales_need(self, name, scales):
        """The error's own figure is enough; a little less is not, and says so."""
        network = create_model(name)
        image, labels = torch.rand(3, 64, 96), torch.zeros(64, 96, dtype=torch.uint8)
        labels[8:30, 8:30], labels[32:60, 40:90] = 1, 2

        def run(budget):
            one = NetworkTracker(network, scales=scales, memory_budget=budget)
            one.initialize(image, labels)
            one.step(image)
            return one

        with pytest.raises(MemoryBudgetError) as caught:
            run(5000)
        needed = caught.value.needed
        assert str(caught.value).startswith(f"budget must be at least {needed} bytes for ")
        assert f"of 2 objects at {len(scales)} scales, got 5000" in str(caught.value)
        assert 0 < run(needed).memory_bytes() <= needed
        short = needed * 99 // 100
        with pytest.raises(MemoryBudgetError, match=f"at least {needed} bytes .*, got {short}"):
            run(short)

    def test_a_frame_that_one_scale_has_is_not_added_to_it_again(self, monkeypatch):
        """The second scale refuses the frame twice, then takes it."""
        one, _ = started(scales=(1.0, 0.5), memory_budget=1000)
        first, second = one.network.memories
        add = second.add

        def refuse(*args, **options):
            raise MemoryBudgetError.of(300, "1 permanent frames", second.budget, 0)

        monkeypatch.setattr(second, "add", refuse)
        for _ in range(2):
            message = "at least 1500 bytes for 1 permanent frames at 2 scales, got 1000: 0 fit"
            with pytest.raises(MemoryBudgetError, match=message):
                one.step(frames(1)[0])
        monkeypatch.setattr(second, "add", add)
        one.step(frames(1)[0])
        assert [len(memory.added) for memory in (first, second)] == [1, 1]


class TestLoop:
    """The loop of `vosops segment` around a tracker."""

    class Copying(NetworkTracker):
        """Looks ahead by saving and restoring, as a tracker may that cannot do better."""

        def predict(self, frame: Tensor, *, output: str = "probs") -> Tensor:
            state = copy.deepcopy(self.state_dict())
            found = self.step(frame, output=output)
            self.load_state_dict(state)
            return found

    @pytest.mark.parametrize("short_side", [-1, 32])
    def test_a_correction_of_some_objects_needs_no_copy_of_the_state(self, short_side):
        one_and_two = {1: (2, 4, 28, 36), 2: (32, 4, 14, 30)}
        masks = {0: truth(one_and_two), 2: truth({2: (31, 6, 14, 30), 3: (4, 44, 30, 16)})}

        def run(one: Any) -> list[Any]:
            source = ArraySource([picture({}) for _ in range(4)])
            given = MaskSet(masks_from_python(masks, source, range(4)), source.size)
            return list(
                TrackingLoop(one, source, given, range(4), short_side=short_side, device=torch.device("cpu"))
            )

        one = NetworkTracker(Echo())
        one.load_state_dict = None  # never called
        found = run(one)
        assert one.object_ids == [1, 2, 3]
        assert (found[2].labels == 1).any() and (found[3].labels == 3).any()
        for ours, theirs in zip(found, run(self.Copying(Echo())), strict=True):
            assert torch.equal(ours.labels, theirs.labels)
            assert ours.confidences == pytest.approx(theirs.confidences, abs=1e-5)

    def test_segment_takes_a_network_and_a_tracker(self):
        clip = [picture({1: (4, 4 + t, 20, 30)}) for t in range(3)]
        mask = truth({1: (4, 4, 20, 30)})
        found = [
            [frame.labels for frame in vosops.segment(clip, mask, model=model, size=-1, **options)]
            for model, options in ((NetworkTracker(Echo(), scales=(0.5,)), {}), (Echo(), {"scales": (0.5,)}))
        ]
        assert (found[0][2] == 1).any()
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
        with pytest.raises(TypeError, match="model must be a name, a network or a tracker, got Linear"):
            next(vosops.segment(clip, mask, model=nn.Linear(1, 1)))


class TestOptions:
    @pytest.mark.parametrize("make", [ColourTracker, lambda: NetworkTracker(Echo())])
    def test_what_tracks_by_itself_is_refused_with_what_to_do(self, make):
        with pytest.raises(
            TypeError, match=r"which is already a tracker: use it directly, or let create_tracker"
        ):
            NetworkTracker(make())

    def test_a_compiled_network_is_refused_with_what_to_do(self):
        with pytest.raises(TypeError, match="wrapped by torch.compile.*: compile these"):
            NetworkTracker(torch.compile(Echo()))

    def test_naive_uses_the_reference_ops(self, monkeypatch):
        forced = []
        segment = EchoMemory.segment
        monkeypatch.setattr(
            EchoMemory, "segment", lambda *a, **o: forced.append(backends._forced) or segment(*a, **o)
        )
        one, memory = started(naive=True)
        one.step(frames(1)[0])
        assert memory.naive and forced == ["reference"] and backends._forced is None

    def test_autocast_is_for_the_network_alone(self, monkeypatch):
        seen = []
        segment = EchoMemory.segment

        def watched(self, image, *, frame):
            seen.append(torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None)
            return segment(self, image, frame=frame)

        monkeypatch.setattr(EchoMemory, "segment", watched)
        for dtype in (None, torch.bfloat16, torch.float32):
            started(dtype=dtype)[0].step(frames(1)[0])  # Echo.evidence asserts that it is off there
        assert seen == [None, torch.bfloat16, None]

    @pytest.mark.parametrize(
        ("options", "error", "message"),
        [
            ({"memory_every": 0}, ValueError, "memory_every must be at least 1"),
            ({"scales": ()}, ValueError, "scales must be positive"),
            ({"scales": (1.0, -1.0)}, ValueError, "scales must be positive"),
            ({"scales": (float("nan"),)}, ValueError, "scales must be positive"),
            ({"scales": (float("inf"),)}, ValueError, "scales must be positive"),
            ({"memory_budget": "much"}, ValueError, "a size must be"),
            ({"dtype": torch.int8}, ValueError, "dtype must be"),
        ],
    )
    def test_refuses_other_options(self, options, error, message):
        with pytest.raises(error, match=message):
            NetworkTracker(Echo(), **options)

    def test_refuses_what_is_no_model(self):
        with pytest.raises(TypeError, match="model must be a Network, got Linear"):
            NetworkTracker(nn.Linear(1, 1))

    def test_refuses_other_frames_and_labels(self):
        one, _ = started()
        with pytest.raises(ValueError, match=r"frame must have the first frame's size \(22, 29\)"):
            one.step(torch.rand(3, 8, 8))
        with pytest.raises(ValueError, match="labels must be"):
            one.step(frames(1)[0], torch.zeros(4, 4, dtype=torch.uint8))
        with pytest.raises(ValueError, match="output must be 'probs' or 'labels'"):
            one.step(frames(1)[0], output="masks")
        with pytest.raises(ValueError, match=r"object_id must be one of \[1, 2\], got 3"):
            one.remove_object(3)
        assert one.step(frames(1)[0]).shape == (3, *SIZE)
