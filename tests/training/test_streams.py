"""Streams for vosops-s: scenes of videos and stills, the same for the same seed; training that resumes exactly."""

from __future__ import annotations

import io
import itertools
import random
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.models.test_propagate import render
from vosops.io.errors import InputError
from vosops.models.vosops_s import Refiner
from vosops.training.footage import Mix, Scene, Shot, degraded
from vosops.training.streams import Streams, StreamSettings, StreamTrainer

PIL = pytest.importorskip("PIL.Image")
WINDOW = (64, 96)
SETTINGS = StreamSettings(window=WINDOW, shortest=2, longest=5)
SHIPPED = Path(__file__).parents[2] / "weights"


def write(folder: Path, count: int, move: int) -> Shot:
    folder.mkdir()
    frames = []
    for i in range(count):
        frame, labels = render({1: (20, 20 + move * i)})
        image, label = folder / f"{i}.png", folder / f"{i}_mask.png"
        PIL.fromarray(frame.permute(1, 2, 0).numpy()).save(image)
        PIL.fromarray((labels * 255).byte().numpy()).save(label)
        frames.append((image, label))
    return Shot(folder.name, tuple(frames))


@pytest.fixture(scope="module")
def shots(tmp_path_factory) -> tuple[list[Shot], list[Shot]]:
    root = tmp_path_factory.mktemp("footage")
    videos = [write(root / name, 6, move) for name, move in (("right", 4), ("slow", 1))]
    return videos, [write(root / "still", 1, 0), write(root / "other", 1, 0)]


def scene(shots, mix: Mix, length: int = 4, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    made = Scene(*shots, WINDOW, mix, random.Random(seed), length)
    return [made.next() for _ in range(length + (3 if made.late else 1))]


class TestScene:
    @pytest.mark.parametrize("stills, composites", [(0.0, 0.0), (1.0, 0.0), (0.0, 1.0)])
    @pytest.mark.parametrize("late", [0.0, 1.0])
    def test_shows_the_object_from_the_first_frame_on(self, shots, stills, composites, late):
        for seed in range(4):
            frames = scene(shots, Mix(stills, composites, late=late, second=0.0, occluders=0.0), seed=seed)
            for image, labels in frames:
                assert image.shape == (3, *WINDOW) and image.min() >= 0 and image.max() <= 1
                assert labels.shape == WINDOW and set(labels.unique().tolist()) <= {0, 1, 255}
            assert (frames[0][1] == 1).sum() > 60

    def test_is_the_same_for_the_same_seed_and_another_for_another(self, shots):
        mix = Mix(0.5, 0.5)
        first, again = scene(shots, mix, seed=3), scene(shots, mix, seed=3)
        assert all(
            torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(first, again, strict=True)
        )
        assert not torch.equal(first[0][0], scene(shots, mix, seed=4)[0][0])

    def test_labels_lie_on_the_object(self, shots):
        """The square is red, and nothing else is, whatever is done to the picture."""
        for seed in range(4):
            for image, labels in scene(shots, Mix(0.0, 0.0, late=0.0), seed=seed)[:3]:
                redness = image[0] - image[1:].mean(0)
                assert redness[labels == 1].mean() > redness[labels == 0].mean() + 0.15

    def test_a_composite_may_have_two_objects(self, shots):
        found = [
            set(labels.unique().tolist())
            for seed in range(6)
            for _, labels in scene(shots, Mix(0.0, 1.0, second=1.0), seed=seed)
        ]
        assert {0, 1, 2} in found

    def test_moves(self, shots):
        frames = scene(shots, Mix(1.0, 0.0, late=0.0, second=0.0, occluders=0.0))
        assert not torch.equal(frames[0][1], frames[-1][1])

    def test_shots_without_objects_are_refused_and_broken_files_named(self, tmp_path):
        shot = write(tmp_path / "broken", 1, 0)
        shot.frames[0][1].write_bytes(b"no picture")
        with pytest.raises(InputError, match="0_mask.png"):
            scene(([], [shot]), Mix(1.0, 0.0))


class TestDegraded:
    def test_spoils_masks_but_loses_none(self):
        mask = torch.zeros(1, 64, 96)
        mask[:, 20:44, 30:60] = 1
        found = [degraded(mask, random.Random(seed)) for seed in range(12)]
        changed = [(x - mask).abs().mean() for x in found]
        assert all(x.min() >= 0 and x.max() <= 1 and (x > 0.5).any() for x in found)
        assert sum(change > 0.005 for change in changed) > 6 and max(changed) < 0.5


class TestStreams:
    def test_frame_n_depends_on_seed_and_n_alone(self, shots):
        streams = Streams(*shots, SETTINGS, 2, seed=5)
        whole = list(itertools.islice(streams.batches(0), 9))
        later = next(streams.batches(8))
        for a, b in zip(whole[8].frames, later.frames, strict=True):
            assert torch.equal(a.image, b.image) and torch.equal(a.labels, b.labels)
            assert (a.begin is None) == (b.begin is None)
        other = next(Streams(*shots, SETTINGS, 2, seed=6).batches(0))
        assert not torch.equal(whole[0].frames[0].image, other.frames[0].image)

    def test_streams_of_another_process_are_others(self, shots):
        both = next(Streams(*shots, SETTINGS, 2, seed=5).batches(0)).frames
        second = next(Streams(*shots, SETTINGS, 1, seed=5, first=1).batches(0)).frames
        assert torch.equal(both[1].image, second[0].image) and not torch.equal(both[0].image, both[1].image)

    def test_a_broken_image_is_skipped_and_told(self, tmp_path):
        shot = write(tmp_path / "broken", 3, 2)
        shot.frames[1][0].write_bytes(b"no picture")
        batches = itertools.islice(Streams([shot], [], SETTINGS, 1, seed=1).batches(0), 12)
        assert any("1.png" in problem for batch in batches for problem in batch.problems)

    def test_settings_are_checked(self):
        assert StreamSettings.parsed({"window": [64, 64], "mix": {"late": 0.1}}).mix.late == 0.1
        with pytest.raises(ValueError, match="window must be multiples of 32"):
            StreamSettings(window=(60, 64))
        with pytest.raises(ValueError, match="among .*late.*, got latte"):
            StreamSettings.parsed({"mix": {"latte": 1}})


class TestTrainer:
    def make(self, seed: int = 0) -> tuple[Refiner, StreamTrainer]:
        torch.manual_seed(seed)
        network = Refiner(dropout=0.0)
        return network, StreamTrainer(network, SETTINGS, 2, pretrained=False)

    def test_the_loss_falls_on_what_is_seen_again(self, shots):
        network, trainer = self.make()
        batch = next(Streams(*shots, SETTINGS, 2, seed=5).batches(0))
        assert all(frame.begin is not None for frame in batch.frames)
        optimizer = torch.optim.Adam(network.parameters(), 3e-3)
        losses = []
        for _ in range(12):  # every scene begins anew, so that nothing but the network changes
            loss, figures = trainer.loss(network, batch.frames)
            losses.append(float(loss.detach()))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        assert losses[-1] < 0.7 * losses[0]
        assert set(figures) == {"iou", "propagate"}

    def test_a_resumed_run_is_the_same_to_the_bit(self, shots):
        streams = Streams(*shots, SETTINGS, 2, seed=7)

        def run(trainer, network, batches):
            return [float(trainer.loss(network, batch.frames)[0].detach()) for batch in batches]

        network, trainer = self.make()
        run(trainer, network, itertools.islice(streams.batches(0), 5))
        saved = io.BytesIO()
        torch.save(trainer.state_dict(), saved)
        saved.seek(0)
        resumed = self.make()[1]
        resumed.load_state_dict(torch.load(saved, weights_only=True))
        batches = list(itertools.islice(streams.batches(5), 3))
        assert run(resumed, network, batches) == run(trainer, network, batches)
        with pytest.raises(ValueError, match="state must have 1 streams, got 2"):
            StreamTrainer(network, SETTINGS, 1, pretrained=False).load_state_dict(trainer.state_dict())

    def test_a_tracker_that_lost_its_object_is_put_back_on_it(self, shots):
        network, _ = self.make()
        torch.nn.init.constant_(network.last.bias, -30.0)  # sees nothing anywhere
        settings = StreamSettings(window=WINDOW, shortest=6, longest=6, mix=Mix(0.0, 0.0, late=0.0))
        trainer = StreamTrainer(network, settings, 1, pretrained=False)
        lost = []
        with torch.no_grad():
            for batch in itertools.islice(Streams(*shots, settings, 1, seed=2).batches(0), 3):
                trainer.loss(network, batch.frames)
                lost.append(trainer.lost[0])
        assert lost == [1, 2, 0]
        assert trainer.trackers[0]._recent_probabilities[-1][1].max() > 0.5


class TestTask:
    """`vosops train` on streams."""

    @pytest.fixture
    def config(self, shots):
        for package in ("pydantic", "yaml", "lightning_fabric", "safetensors"):
            pytest.importorskip(package)
        from vosops.training.config import load_config

        still = shots[1][0].frames[0][0].parent
        sources = [{"kind": "stills", "images": str(still), "masks": str(still.parent / "masks")}]
        (still.parent / "masks").mkdir(exist_ok=True)
        (still.parent / "masks" / "0.png").write_bytes((still / "0_mask.png").read_bytes())
        changes = {
            "data.train": sources,
            "task": {"window": list(WINDOW), "shortest": 2, "longest": 5},
            "options": {"pretrained": False},
            "steps": 4,
            "batch": 1,
            "every": {"log": 1, "score": 4, "save": 2, "pictures": 4},
            "tensorboard": False,
            "device": "cpu",
        }
        return lambda **more: load_config("vosops_s", [f"{k}={v!r}" for k, v in {**changes, **more}.items()])

    def test_trains_and_goes_on_to_the_bit(self, config, tmp_path):
        from safetensors.torch import load_file

        from vosops.io.errors import InterruptedRunError
        from vosops.models.vosops_s import load_refiner
        from vosops.training.loop import train

        whole = train(config(), tmp_path / "whole")
        stops = iter((False, False, True))
        with pytest.raises(InterruptedRunError):
            train(config(), tmp_path / "parts", should_stop=lambda: next(stops))
        parts = train(config(), tmp_path / "parts", resume=True)
        one, other = load_file(whole.weights), load_file(parts.weights)
        assert all(torch.equal(one[name], other[name]) for name in one)
        assert next(iter(one.values())).dtype == torch.float16
        assert load_refiner(whole.weights).last.weight.abs().max() > 0
        assert list((tmp_path / "whole" / "pictures").iterdir())

    def test_trains_on_another_backbone_which_its_weights_then_bring(self, config, tmp_path):
        from vosops.models.features import EfficientNetLite0
        from vosops.models.vosops_s import VosopsS
        from vosops.training.loop import train

        options = {"backbone": "efficientnet_lite0", "pretrained": False}
        done = train(config(options=options, steps=1), tmp_path / "run")
        tracker = VosopsS(done.weights, pretrained=False)
        assert isinstance(tracker.backbone, EfficientNetLite0)
        assert tracker.refiner.maps == (16, 24, 40, 112)

    def test_the_shipped_weights_are_of_the_network_that_the_recipe_trains(self, config):
        from safetensors.torch import load_file

        from vosops.training.task import create_task

        task = create_task(config())
        own, shipped = (
            task.weights(task.network),
            load_file(SHIPPED / "vosops_weights_s/vosops_s.safetensors"),
        )
        assert {name: (x.shape, x.dtype) for name, x in own.items()} == {
            name: (x.shape, x.dtype) for name, x in shipped.items()
        }

    def test_the_recipe_is_what_the_model_card_tells(self):
        from vosops.training.config import load_config

        recipe = load_config("vosops_s")
        card = (SHIPPED / "README.md").read_text()
        window = "x".join(str(side) for side in StreamSettings.parsed(recipe.task).window)
        told = (
            f"{recipe.steps} steps of four frames at {window} in {recipe.precision}",
            f"rate {recipe.optimizer.rate:.0e}".replace("e-0", "e-"),
            f"weight decay {recipe.optimizer.weight_decay:.0e}".replace("e-0", "e-"),
            f"weight averaging with decay {recipe.ema}",
            f"all but {', '.join(recipe.data.train[0].without)}",
        )
        assert not [words for words in told if words not in card]
        assert (recipe.batch, recipe.optimizer.kind, recipe.schedule.kind) == (4, "adamw", "cosine")

    def test_what_it_cannot_use_is_refused(self, config):
        from vosops.training.task import create_task

        with pytest.raises(
            InputError, match="options of vosops_s must be among backbone, pretrained, got size"
        ):
            create_task(config(options={"size": 480}))
        with pytest.raises(
            InputError, match="options.backbone must be one of efficientnet_lite0, .*, got 'x'"
        ):
            create_task(config(options={"backbone": "x"}))
        shipped = str(SHIPPED / "vosops_weights_s/vosops_s.safetensors")
        with pytest.raises(InputError, match="vosops_s cannot be created: .* 2 misshapen"):
            create_task(
                config(options={"backbone": "efficientnet_lite0", "pretrained": False}, weights=shipped)
            )
        with pytest.raises(InputError, match="task: options of streams must be among"):
            create_task(config(task={"windows": 1}))
