"""STM: the original's numbers and parameters, its memory, and that frugal and naive ways agree."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

import vosops
from tests.conftest import SHARED, with_golden_weights
from vosops.inference import NetworkTracker, segment
from vosops.memory import MemoryBudgetError
from vosops.models import STM, create_model
from vosops.models import stm as module
from vosops.models.resnet import ResNet50Encoder

SIZE = (40, 56)  # of the clips' frames: 48 x 64 with padding
CLOSE = {"atol": 1e-4, "rtol": 0}
FRAME_BYTES = 4 * (128 + 512) * 3 * 4  # of an object in a frame of SIZE


@pytest.fixture(scope="module")
def network() -> STM:
    return create_model("stm")


@pytest.fixture(scope="module")
def original() -> STM:
    """With the weights of the golden cases."""
    return with_golden_weights(STM())


def clip(frames: int, objects: int) -> tuple[list[Tensor], Tensor]:
    """Smooth moving noise, and the labels of its first frame: a square for each object."""
    noise = functional.interpolate(torch.rand(1, 3, 12, 14), (SIZE[0] + 8, SIZE[1] + 8), mode="bicubic")[0]
    images = [noise.clamp(0, 1)[:, t : t + SIZE[0], t : t + SIZE[1]] for t in range(frames)]
    labels = torch.zeros(SIZE, dtype=torch.int64)
    for o in range(objects):
        labels[4 + 10 * o : 13 + 10 * o, 6 + 12 * o : 18 + 12 * o] = 1 + o
    return images, labels


def run(network: STM, images: list[Tensor], labels: Tensor, **options) -> list[Tensor]:
    tracker = NetworkTracker(network, **options)
    tracker.initialize(images[0], labels)
    return [tracker.step(image) for image in images[1:]]


def assert_all_close(found: list[Tensor], wanted: list[Tensor]) -> None:
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, **CLOSE)


class TestOriginal:
    def test_parameters_bear_its_names(self, network):
        path = SHARED / "params/params_stm.txt"
        if not path.exists():
            pytest.skip(f"{path} is not here (set VOSOPS_TEST_DATA)")
        lines = [line.split("\t") for line in path.read_text().splitlines() if not line.startswith("#")]
        wanted = {name: shape for name, shape, *_ in lines}
        assert {name: str(tuple(x.shape)) for name, x in network.state_dict().items()} == wanted

    def test_its_checkpoint_loads(self, network, tmp_path):
        state = {f"module.{name}": x for name, x in network.state_dict().items()}
        torch.save(state, tmp_path / "STM_weights.pth")
        loaded = create_model("stm", tmp_path / "STM_weights.pth")
        assert all(torch.equal(x, state[f"module.{name}"]) for name, x in loaded.state_dict().items())

    def test_memorises_the_same(self, original, golden):
        case = golden("stm_model.pt")["single"]
        with torch.no_grad():
            mask = case["masks"][0, 1:, 0]
            key, value = original.memorise(case["frames"][:, :, 0], mask, torch.zeros_like(mask))
        torch.testing.assert_close(key, case["key0"][0, 1:, :, 0], **CLOSE)
        torch.testing.assert_close(value, case["value0"][0, 1:, :, 0], **CLOSE)

    @pytest.mark.parametrize("options", [{}, {"naive": True}, {"channels_last": False}])
    def test_segments_the_same(self, original, golden, options):
        case = golden("stm_model.pt")["single"]
        frames, labels = case["frames"][0].unbind(1), case["masks"][0, :, 0].argmax(0)
        found = run(original, frames, labels, memory_every=case["mem_every"], **options)
        assert_all_close(found, list(case["Es"][0].unbind(1))[1:])
        assert all(torch.equal(p.argmax(0), x) for p, x in zip(found, case["pred"][1:].long(), strict=True))

    def test_has_the_same_logits(self, original, golden):
        case = golden("stm_model.pt")["single"]
        memory = original.new_memory()
        frames = case["frames"][0].unbind(1)
        with torch.no_grad():
            masks = vosops.models.network.TensorMasks(case["masks"][0, :, 0], [1])
            memory.add(frames[0][None], masks, frame=0, permanent=True, keep=True)
            scores = memory.segment(frames[1][None], frame=1)
            apart = original.evidence(scores, (64, 96), range(64))
        logits = vosops.soft_aggregate(apart, return_logits=True)
        torch.testing.assert_close(logits, case["logit1"][0], **CLOSE)

    def test_eleven_slots_leave_something_to_what_is_not_there(self):
        network = STM(slots=11)
        apart = torch.full((2, 1, 1), 0.5)
        rest = 1 - network.aggregate(apart).double().sum()
        assert 0 < rest < 8 * 1.1e-7
        with pytest.raises(ValueError, match="slots must be at least 12"):
            network.aggregate(torch.rand(11, 2, 2))


def by_the_book(network: STM, images: list[Tensor], labels: Tensor, memory_every: int) -> list[Tensor]:
    """STM's protocol as its authors wrote it: 11 classes, memory by concatenation, maps at full size."""
    classes, (height, width) = 11, labels.shape
    top, left = -height % 16 // 2, -width % 16 // 2
    padding = (left, -width % 16 - left, top, -height % 16 - top)
    count = int(labels.max())
    estimate = torch.stack([labels == k for k in range(classes)]).float()
    stored_keys, stored_values, results = [], [], []
    for t in range(1, len(images)):
        masks = functional.pad(estimate, padding)
        before, now = (functional.pad(images[i], padding)[None] for i in (t - 1, t))
        key_value = []
        for o in range(1, count + 1):
            others = sum(masks[k] for k in range(1, classes) if k != o).clamp(0, 1)
            r4 = network.Encoder_M(before, masks[None, o], others[None])[-1]
            key_value.append(network.KV_M_r4(r4))
        keys, values = (torch.cat(x)[:, :, None] for x in zip(*key_value, strict=True))
        keys, values = torch.cat([*stored_keys, keys], 2), torch.cat([*stored_values, values], 2)
        if (t - 1) % memory_every == 0:
            stored_keys, stored_values = [keys], [values]
        r2, r3, r4 = network.Encoder_Q(now)
        key, value = network.KV_Q_r4(r4)
        affinity = keys.flatten(2).transpose(1, 2) @ key.flatten(2) / 128**0.5
        read = (values.flatten(2) @ affinity.softmax(1)).view(count, 512, *key.shape[2:])
        m = network.Decoder.convFM(torch.cat([read, value.expand(count, -1, -1, -1)], 1))
        m = network.Decoder.ResMM(m)
        for refine, features in ((network.Decoder.RF3, r3), (network.Decoder.RF2, r2)):
            skip = refine.ResFS(refine.convFS(features.expand(count, -1, -1, -1)))
            m = refine.ResMM(skip + functional.interpolate(m, scale_factor=2, mode="bilinear"))
        logits = network.Decoder.pred2(m.relu())
        apart = functional.interpolate(logits, scale_factor=4, mode="bilinear").softmax(1)[:, 1]
        apart = apart[:, top : top + height, left : left + width]
        shares = torch.zeros(classes, height, width)
        shares[0] = (1 - apart).prod(0)
        shares[1 : count + 1] = apart
        shares = shares.clamp(1e-7, 1 - 1e-7)
        estimate = (shares / (1 - shares)).log().softmax(0)
        results.append(estimate[: count + 1])
    return results


class TestProtocol:
    def test_several_objects_are_led_as_the_original_does(self):
        network = create_model("stm", slots=11)
        images, labels = clip(6, 3)
        images, labels = [image[:, :39, :53] for image in images], labels[:39, :53]
        with torch.no_grad():
            wanted = by_the_book(network, images, labels, memory_every=2)
        found = run(network, images, labels, memory_every=2)
        assert_all_close(found, wanted)
        assert max((p - 1 / 4).abs().max() for p in found) > 0.1  # they say something


class TestWaysAgree:
    def test_naive(self, network):
        images, labels = clip(5, 3)
        frugal = run(network, images, labels, memory_every=2)
        assert_all_close(run(network, images, labels, memory_every=2, naive=True), frugal)

    def test_one_object_at_a_time_and_in_strips(self, network, monkeypatch):
        images, labels = clip(3, 3)
        monkeypatch.setattr(module, "objects_together", lambda image: 2)
        together = run(network, images, labels)
        monkeypatch.setattr(module, "objects_together", lambda image: 1)
        monkeypatch.setattr(module, "_STRIP_PIXELS", 1)
        assert_all_close(run(network, images, labels), together)

    def test_strips_are_those_of_the_whole(self, network, monkeypatch):
        monkeypatch.setattr(module, "_STRIP_PIXELS", 1)
        decoder, r2 = network.Decoder, torch.randn(1, 256, 32, 12)
        read, value, skip3 = torch.randn(2, 512, 8, 3), torch.randn(1, 512, 8, 3), torch.randn(1, 256, 16, 6)
        value = value.expand(2, -1, -1, -1)
        with torch.no_grad():
            whole = decoder(read, value, skip3, decoder.RF2.skip(r2))
            middle = decoder.middle(read, value, skip3)
            torch.testing.assert_close(decoder.in_strips(middle.split(1), r2), whole, **CLOSE)

    def test_training_forward_is_the_tracker(self, network):
        images, labels = clip(3, 2)
        images = [functional.pad(image, (4, 4, 4, 4)) for image in images]
        labels = functional.pad(labels, (4, 4, 4, 4))
        with torch.no_grad():
            masks = torch.stack([labels == 1, labels == 2]).float()
            logits = network(torch.stack(images)[None], masks[None])
        assert_all_close(list(logits[0].softmax(1)), run(network, images, labels, memory_every=1))

    def test_bfloat16(self, network):
        images, labels = clip(3, 2)
        exact = run(network, images, labels)
        for ours, theirs in zip(run(network, images, labels, dtype=torch.bfloat16), exact, strict=True):
            assert ours.dtype == torch.float32
            assert 0 < (ours - theirs).abs().mean() < 0.05


class TestMemory:
    def test_holds_first_every_so_many_and_previous(self, network):
        images, labels = clip(8, 2)
        tracker = NetworkTracker(network, memory_every=3)
        tracker.initialize(images[0], labels)
        stored = []
        for image in images[1:]:
            tracker.step(image)
            banks = tracker._memories[0]._banks.values()
            frames = [[slot.frame for slot in bank.frames] for bank in banks]
            assert frames[0] == frames[1]
            stored.append(frames[0])
        assert stored == [[0], [0, 1], [0, 2], [0, 3], [0, 3, 4], [0, 3, 5], [0, 3, 6]]

    def test_budget_is_never_passed_and_shared_anew(self, network):
        images, labels = clip(8, 3)
        budget = 20 * FRAME_BYTES
        tracker = NetworkTracker(network, memory_every=1, memory_budget=budget)
        tracker.initialize(images[0], torch.where(labels == 3, 0, labels))
        for t, image in enumerate(images[1:]):
            tracker.step(image)
            assert tracker.memory_bytes() <= budget
            if t == 3:
                tracker.add_objects(image, torch.where(labels == 3, labels, 0))
        assert tracker.object_ids == [1, 2, 3]
        tracker.remove_object(1)
        assert tracker.step(images[0]).shape == (3, *SIZE)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
    def test_may_be_stored_in_less(self, network, dtype):
        small = create_model("stm", memory_dtype=dtype)
        images, labels = clip(4, 2)
        exact, memories = [], []
        for one in (network, small):
            tracker = NetworkTracker(one)
            tracker.initialize(images[0], labels)
            exact.append([tracker.step(image) for image in images[1:]])
            memories.append(tracker.memory_bytes())
        assert memories[1] < 0.8 * memories[0]
        for ours, theirs in zip(*exact, strict=True):
            assert 0 < (ours - theirs).abs().max() < 0.05

    def test_says_when_permanent_frames_do_not_fit(self, network):
        images, labels = clip(2, 1)
        tracker = NetworkTracker(network, memory_budget=FRAME_BYTES // 2)
        tracker.initialize(images[0], labels)
        for _ in range(2):
            with pytest.raises(MemoryBudgetError, match="budget must be at least"):
                tracker.step(images[1])
            assert tracker.memory_bytes() == 0

    def test_says_that_objects_share_the_budget(self, network):
        images, labels = clip(2, 2)
        tracker = NetworkTracker(network, memory_budget=FRAME_BYTES // 2)
        tracker.initialize(images[0], labels)
        with pytest.raises(
            MemoryBudgetError,
            match=rf"for 1 permanent frames of 2 objects, got {FRAME_BYTES // 2}: 0 fit",
        ) as caught:
            tracker.step(images[1])
        for budget, fits in ((caught.value.needed, True), (caught.value.needed - 2, False)):
            tracker = NetworkTracker(network, memory_budget=budget)
            tracker.initialize(images[0], labels)
            if fits:
                tracker.step(images[1])
                assert tracker.memory_bytes() <= budget
            else:
                with pytest.raises(MemoryBudgetError, match=f"got {budget}"):
                    tracker.step(images[1])

    @pytest.mark.parametrize("naive", [False, True])
    def test_state_goes_on_to_the_bit(self, network, tmp_path, naive):
        images, labels = clip(6, 2)
        one = NetworkTracker(network, memory_every=2, naive=naive)
        one.initialize(images[0], labels)
        for image in images[1:4]:
            one.step(image)
        torch.save(one.state_dict(), tmp_path / "state.pth")
        wanted = [one.step(image) for image in images[4:]]
        other = NetworkTracker(network, memory_every=2, naive=naive)
        other.load_state_dict(torch.load(tmp_path / "state.pth", weights_only=True))
        assert all(torch.equal(other.step(x), y) for x, y in zip(images[4:], wanted, strict=True))

    @pytest.mark.parametrize("naive", [False, True])
    def test_objects_come_and_go(self, network, naive):
        images, labels = clip(6, 3)
        tracker = NetworkTracker(network, memory_every=2, naive=naive)
        tracker.initialize(images[0], torch.where(labels == 3, 0, labels))
        tracker.step(images[1])
        tracker.step(images[2], torch.where(labels == 3, labels, 255))
        assert tracker.step(images[3]).shape == (4, *SIZE)
        tracker.remove_object(2)
        assert tracker.step(images[4]).shape == (3, *SIZE)
        assert tracker.object_ids == [1, 3]


class TestTraining:
    def test_every_parameter_learns(self, network):
        network = create_model("stm").train()
        statistics = network.Encoder_Q.bn1.running_mean.clone()
        logits = network(torch.rand(1, 3, 3, 32, 32), torch.rand(1, 2, 32, 32).round())
        assert logits.shape == (1, 2, 3, 32, 32) and logits.dtype == torch.float32
        functional.cross_entropy(logits.flatten(0, 1), torch.randint(0, 3, (2, 32, 32))).backward()
        without = [name for name, x in network.named_parameters() if x.grad is None or not x.grad.any()]
        assert without == []
        assert torch.equal(network.Encoder_Q.bn1.running_mean, statistics)

    @pytest.mark.parametrize(
        ("shape", "message"),
        [((1, 1, 3, 32, 32), "at least two"), ((1, 2, 3, 32, 40), "multiples of 16")],
    )
    def test_refuses_other_clips(self, network, shape, message):
        with pytest.raises(ValueError, match=message):
            network(torch.rand(shape), torch.rand(1, 1, *shape[3:]))


class TestByName:
    def test_untrained_weights_are_always_the_same(self, network):
        before = torch.get_rng_state()
        again = create_model("stm")
        assert torch.equal(torch.get_rng_state(), before)
        assert all(map(torch.equal, again.parameters(), network.parameters()))

    def test_segments_a_video(self, network, tmp_path):
        save_file(network.state_dict(), tmp_path / "stm.safetensors")
        images, labels = clip(3, 2)
        video = np.stack([(255 * image).byte().permute(1, 2, 0).numpy() for image in images])
        options = {"model": "stm", "weights": tmp_path / "stm.safetensors", "size": -1, "device": "cpu"}
        frames = list(segment(video, labels.numpy().astype(np.uint8), **options))
        naive = list(segment(video, labels.numpy().astype(np.uint8), **options, naive=True))
        uint8 = [torch.from_numpy(x).permute(2, 0, 1) for x in video]
        for frame, other, wanted in zip(frames[1:], naive[1:], run(network, uint8, labels), strict=True):
            agree = frame.labels == wanted.argmax(0)
            assert agree.float().mean() > 0.999
            assert (frame.labels == other.labels).float().mean() > 0.999
            for o, confidence in frame.confidences.items():
                mine = wanted.amax(0)[frame.labels == o]
                assert confidence == pytest.approx(mine.mean().item() if len(mine) else 0, abs=1e-3)

    def test_torch_hub(self, network):
        loaded = torch.hub.load(str(Path(__file__).parents[2]), "stm", source="local", slots=11)
        assert loaded.slots == 11
        assert all(map(torch.equal, loaded.parameters(), network.parameters()))


class TestEncoder:
    def test_folding_the_norms_changes_nothing_and_follows_the_weights(self):
        encoder = ResNet50Encoder(("m",), last_stage=5, mask_bias=True)
        for name, x in encoder.named_buffers():
            if name.endswith("running_mean"):
                x.uniform_(-0.1, 0.1)
            elif name.endswith("running_var"):
                x.uniform_(0.5, 1.5)
        frame, mask = torch.rand(1, 3, 32, 64), torch.rand(2, 1, 32, 64)

        @torch.no_grad()
        def change_in_place():
            for x in encoder.parameters():
                x.mul_(1 + 0.1 * torch.rand_like(x))

        def change_data():  # which PyTorch does not count as a change
            for x in encoder.parameters():
                x.data.mul_(1 + 0.1 * torch.rand_like(x))

        for change in (change_in_place, change_data, lambda: None):
            with_gradients = encoder(frame, mask)
            with torch.no_grad():
                for folded, plain in zip(encoder(frame, mask), with_gradients, strict=True):
                    assert plain.abs().max() > 0.1
                    torch.testing.assert_close(folded, plain, rtol=1e-4, atol=1e-4 * plain.abs().max().item())
                assert torch.equal(encoder.last(frame, mask), encoder(frame, mask)[-1])
            change()

    def test_refuses_other_masks_and_stages(self):
        with pytest.raises(ValueError, match="masks must be 0 tensors, got 1"):
            ResNet50Encoder((), last_stage=2)(torch.rand(1, 3, 32, 32), torch.rand(1, 1, 32, 32))
        with pytest.raises(ValueError, match="last_stage must be one of"):
            ResNet50Encoder((), last_stage=6)

    def test_compiles_to_one_graph(self):
        encoder = ResNet50Encoder(("m", "o"), last_stage=2)
        inputs = torch.rand(1, 3, 32, 32), torch.rand(2, 32, 32), torch.rand(2, 32, 32)
        with torch.no_grad():
            compiled = torch.compile(encoder.last, backend="eager", fullgraph=True)
            torch.testing.assert_close(compiled(*inputs), encoder.last(*inputs), rtol=1e-4, atol=1e-4)
