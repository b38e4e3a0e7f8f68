"""vosops-s: untrained it is propagate, trained it corrects it; any number of objects; its weights in a package."""

from __future__ import annotations

import importlib
import io
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.models.test_propagate import HEIGHT, WIDTH, moving, render
from tests.models.tracker_contract import check_tracker
from vosops.inference.settings import ModelSettings, default_model
from vosops.models import Propagate, VosopsS, create_model, find_model
from vosops.models.propagate import Evidence
from vosops.models.vosops_s import (
    BACKBONES,
    CELL,
    EVIDENCE_CHANNELS,
    MASK_CHANNELS,
    Refiner,
    RefinerInput,
    load_refiner,
)

SIZE = 2 * HEIGHT


def trained(seed: int = 0) -> Refiner:
    """A network whose corrections are random, but not zero."""
    torch.manual_seed(seed)
    refiner = Refiner().eval().requires_grad_(False)
    torch.nn.init.normal_(refiner.last.weight, std=0.02)
    return refiner


def make_model(refiner: Refiner | None = None, **options) -> VosopsS:
    return VosopsS(refiner or trained(), pretrained=False, size=SIZE, **options)


def inputs_of(objects: int, cells: tuple[int, int]) -> RefinerInput:
    h, w = cells
    generator = torch.Generator().manual_seed(1)

    def rand(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    maps = tuple(
        rand(1, c, 8 * h // s, 8 * w // s) for c, s in zip((16, 24, 48, 120), (2, 4, 8, 16), strict=True)
    )
    return RefinerInput(
        rand(objects, EVIDENCE_CHANNELS, h, w),
        rand(objects, 1, h, w),
        rand(objects, MASK_CHANNELS, 2 * h, 2 * w),
        maps,
        torch.zeros(objects, dtype=torch.long),
    )


class TestRefiner:
    def test_begins_with_propagates_logit(self):
        inputs = inputs_of(2, (8, 12))
        out = Refiner().eval()(inputs)
        assert out.shape == (2, 1, 8 * CELL, 12 * CELL)
        assert torch.nn.functional.avg_pool2d(out, 2)[0, 0, 1::2, 1::2].shape == (8, 12)
        flat = inputs_of(1, (8, 8))
        flat.logit.fill_(2.5)
        torch.testing.assert_close(Refiner().eval()(flat), torch.full((1, 1, 32, 32), 2.5))

    def test_each_object_is_judged_by_itself(self):
        inputs, refiner = inputs_of(3, (8, 8)), trained()
        alone = RefinerInput(
            inputs.evidence[1:2], inputs.logit[1:2], inputs.masks[1:2], inputs.maps, inputs.frame[1:2]
        )
        torch.testing.assert_close(refiner(inputs)[1:2], refiner(alone), atol=1e-5, rtol=1e-4)

    def test_frames_are_joined_with_their_own_maps(self):
        one, other, refiner = inputs_of(2, (8, 8)), inputs_of(1, (8, 8)), trained()
        other = RefinerInput(
            other.evidence, other.logit, other.masks, tuple(x + 1 for x in other.maps), other.frame
        )
        joined = RefinerInput.joined([one, other])
        assert joined.frame.tolist() == [0, 0, 1]
        apart = torch.cat([refiner(one), refiner(other)])
        torch.testing.assert_close(refiner(joined), apart, atol=1e-5, rtol=1e-4)

    def test_maps_of_stride_2_enter_as_four_channels_of_stride_4(self):
        refiner, x = trained(), inputs_of(1, (4, 6)).maps[0]
        apart = refiner.project2(torch.nn.functional.pixel_unshuffle(x, 2))
        torch.testing.assert_close(refiner._enter2(x), apart)

    def test_takes_any_even_number_of_cells(self):
        assert trained()(inputs_of(1, (6, 10))).shape == (1, 1, 24, 40)

    def test_gradients_reach_every_parameter_once_the_correction_is_not_zero(self):
        refiner = trained().requires_grad_(True)
        refiner(inputs_of(1, (8, 8))).square().sum().backward()
        assert not [name for name, p in refiner.named_parameters() if p.grad is None or not p.grad.any()]


class TestTracker:
    def test_untrained_it_is_propagate(self):
        mine = make_model(Refiner().eval())
        theirs = Propagate("efficientnet_lite2", pretrained=False, size=SIZE, memory=True)
        clip = list(moving(7, second=True))
        for model in (mine, theirs):
            model.initialize(*clip[0])
        for frame, _ in clip[1:]:
            a, b = mine.step(frame, output="labels"), theirs.step(frame, output="labels")
            assert (a == b).float().mean() > 0.99

    def test_trained_it_differs(self):
        one, other = make_model(Refiner().eval()), make_model()
        for model in (one, other):
            model.initialize(*next(moving(1)))
        frame = render({1: (10, 20)})[0]
        assert (one.step(frame) - other.step(frame)).abs().max() > 0.01

    def test_the_protocol(self):
        clip = list(moving(4, second=True))
        only_7 = torch.where(clip[3][1] == 7, 7, 0)
        first = [torch.where(labels == 1, 1, 0) for _, labels in clip]
        check_tracker(make_model, [frame for frame, _ in clip], [first[0], first[2], only_7])

    def test_probabilities_of_several_objects_sum_to_one(self):
        model = make_model()
        clip = list(moving(3, second=True))
        model.initialize(*clip[0])
        for frame, _ in clip[1:]:
            found = model.step(frame)
            assert found.shape == (3, HEIGHT, WIDTH) and found.min() >= 0
            torch.testing.assert_close(found.sum(0), torch.ones(HEIGHT, WIDTH))

    def test_the_order_of_the_objects_does_not_matter(self):
        clip = list(moving(3, second=True))
        one, other = make_model(bfloat16=False), make_model(bfloat16=False)
        swapped = torch.where(clip[0][1] == 1, 9, clip[0][1])  # 7 comes first now
        one.initialize(*clip[0])
        other.initialize(clip[0][0], swapped)
        for frame, _ in clip[1:]:
            a, b = one.step(frame), other.step(frame)
        torch.testing.assert_close(a, b[[0, 2, 1]], atol=1e-3, rtol=0)

    def test_a_removed_object_is_gone_and_the_other_goes_on(self):
        clip = list(moving(4, second=True))
        model = make_model()
        model.initialize(*clip[0])
        model.step(clip[1][0])
        model.remove_object(1)
        assert set(model.step(clip[2][0], output="labels").unique().tolist()) <= {0, 7}
        model.remove_object(7)
        assert model.step(clip[3][0]).shape[0] == 1

    def test_a_saved_and_resumed_run_is_the_same_to_the_bit(self):
        clip = list(moving(8, second=True))
        model, resumed = make_model(), make_model()
        model.initialize(*clip[0])
        for frame, _ in clip[1:6]:
            model.step(frame)
        file = io.BytesIO()
        torch.save(model.state_dict(), file)
        file.seek(0)
        resumed.load_state_dict(torch.load(file, weights_only=True))
        for frame, _ in clip[6:]:
            assert torch.equal(model.step(frame), resumed.step(frame))

    def test_what_it_remembers_counts_in_its_budget(self):
        frame, labels = next(moving(1))
        model = make_model()
        model.initialize(frame, labels)
        cells = (SIZE // 8) * (2 * WIDTH // 8)
        propagates = Propagate.memory_bytes(model)
        assert model.memory_bytes() - propagates == 4 * CELL**2 * cells

    def test_masks_move_with_the_best_match(self):
        model = make_model()
        model._latest = torch.zeros(1, 4 * CELL, 4 * CELL)
        model._latest[0, :CELL, 1 : CELL - 1] = 1  # a part of the first cell
        nearest = torch.arange(16).view(1, 4, 4).repeat(2, 1, 1)
        nearest[:, 1, 1] = 0  # the cell at (1, 1) was at (0, 0)
        search = torch.ones(4, 4, dtype=torch.bool)
        nothing = torch.zeros(2, 4, 4)
        evidence = Evidence(search, nothing, [nothing], nearest, nothing[0], nothing, nothing, nothing)
        carried, motion = model._carried(evidence)
        assert torch.equal(carried[0, CELL : 2 * CELL, CELL : 2 * CELL], model._latest[0, :CELL, :CELL])
        assert motion[:, 1, 1].tolist() == [-1 / 8, -1 / 8] and not motion[:, 0].any()

    def test_the_backbone_sees_what_is_searched(self, monkeypatch):
        monkeypatch.setattr("vosops.models.propagate.SEARCH_RADIUS", 2)
        monkeypatch.setattr("vosops.models.vosops_s.MARGIN", 1)
        monkeypatch.setattr("vosops.models.vosops_s.DOUBTFUL", 0.0)
        part, whole = make_model(Refiner().eval()), make_model(Refiner().eval())
        monkeypatch.setattr(whole, "_searched_features", whole._features)
        clip = list(moving(2))
        found = []
        for model in (part, whole):
            model.initialize(*clip[0])
            found.append(model.step(clip[1][0], output="labels"))
        known = part._recent_keys[-1].any(0)
        assert not known.all() and known[part._search_region()].all()
        assert not part._recent_classes(1)[:, ~known].any()
        assert whole._recent_keys[-1].any(0).all()
        assert (found[0] == found[1]).float().mean() > 0.95

    def test_bfloat16_is_the_networks_alone_and_changes_little(self):
        exact, rounded = (make_model(bfloat16=given) for given in (False, True))
        clip, found = list(moving(3)), []
        for model in (exact, rounded):
            model.initialize(*clip[0])
            model.step(clip[1][0])
            found.append(model.step(clip[2][0]))
        assert rounded._recent_keys[-1].dtype == torch.float32
        assert 0 < (found[0] - found[1]).abs().max() < 0.05

    def test_bfloat16_is_for_processors_with_tiles(self, monkeypatch):
        for tiles in (False, True):
            monkeypatch.setattr("vosops.models.vosops_s.HAS_TILES", tiles)
            assert make_model().bfloat16 is tiles

    def test_looks_farther_for_a_doubtful_object(self):
        model = make_model()
        model.initialize(*render({1: (8, 8)}))
        near = model._search_region().sum()
        sure = model._recent_probabilities[-1].clone()
        model._recent_probabilities[-1] = torch.stack([1 - 0.5 * sure[1], 0.5 * sure[1]])
        assert model._search_region().sum() > 1.5 * near


@pytest.fixture
def weights_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A stand-in for the distribution, with random weights."""
    from safetensors.torch import save_file

    folder = tmp_path / "site" / "vosops_weights_s"
    folder.mkdir(parents=True)
    file = folder / "vosops_s.safetensors"
    (folder / "__init__.py").write_text(
        f"from pathlib import Path\nTITLE, LICENCE = 'weights 1.0', 'CC BY-NC 4.0'\n"
        f"def weights_path():\n    return Path({str(file)!r})\n"
    )
    save_file({name: x.half().contiguous() for name, x in trained().state_dict().items()}, file)
    monkeypatch.syspath_prepend(folder.parent)
    monkeypatch.delitem(sys.modules, "vosops_weights_s", raising=False)
    importlib.invalidate_caches()
    yield file
    sys.modules.pop("vosops_weights_s", None)


@pytest.fixture
def no_weights_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vosops_weights_s", None)
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec",
        lambda name, *rest: None if name == "vosops_weights_s" else find(name, *rest),
    )


class TestWeights:
    def test_the_installed_ones_are_taken(self, weights_package):
        model = create_model("vosops-s", pretrained=False)
        assert isinstance(model, VosopsS)
        assert torch.equal(model.refiner.last.weight, trained().last.weight.half().float())
        assert not model.refiner.training and not any(p.requires_grad for p in model.refiner.parameters())

    def test_without_them_a_file_is_needed(self, no_weights_package):
        with pytest.raises(
            ValueError, match="weights must be a file where vosops-weights-s is not installed"
        ):
            create_model("vosops_s", pretrained=False)

    def test_a_broken_file_is_named(self, tmp_path):
        broken = tmp_path / "broken.safetensors"
        broken.write_bytes(b"no weights")
        with pytest.raises(ValueError, match="broken.safetensors"):
            load_refiner(broken)
        with pytest.raises(FileNotFoundError):
            load_refiner(tmp_path / "none.safetensors")

    def test_a_file_of_another_network_is_refused(self, tmp_path):
        file = tmp_path / "other.pth"
        torch.save(torch.nn.Linear(2, 2).state_dict(), file)
        with pytest.raises(ValueError, match="weights must be those of Refiner"):
            load_refiner(file)

    @pytest.mark.parametrize("backbone", BACKBONES)
    def test_they_decide_the_backbone(self, backbone, tmp_path):
        file = tmp_path / "weights.pth"
        torch.save(Refiner(maps=BACKBONES[backbone]).state_dict(), file)
        model = VosopsS(file, pretrained=False, size=SIZE)
        assert model.backbone_name == f"{backbone} (random)"
        maps = model.pyramid(torch.zeros(1, 3, 32, 32))
        assert tuple(x.shape[1] for x in maps) == BACKBONES[backbone]

    def test_a_network_for_other_maps_is_refused(self):
        with pytest.raises(ValueError, match="maps must be the channels of one of .*, got "):
            VosopsS(Refiner(maps=(16, 24, 48, 112)), pretrained=False)


class TestDefault:
    @pytest.fixture(autouse=True)
    def features(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The test depends on the weights alone: the backbone's package counts as installed."""
        monkeypatch.setattr("vosops.inference.settings.find_spec", lambda name: object())

    def test_it_is_the_trained_model_where_its_weights_are(self, weights_package):
        assert default_model() == "vosops_s"
        settings = ModelSettings(default_model())
        assert settings.weights_notice == "weights 1.0, CC BY-NC 4.0"
        assert settings.arguments()["weights"] == settings.weights_notice
        assert settings.arguments()["weights content"]

    def test_elsewhere_it_is_propagate(self, no_weights_package):
        assert default_model() == "propagate"
        arguments = ModelSettings(default_model(), device="cpu").arguments()
        assert "weights" not in arguments and arguments["weights content"] is None

    def test_it_is_propagate_for_options_that_the_other_has_not(self, weights_package):
        assert default_model({"backbone": "timm:resnet18"}) == "propagate"
        assert default_model({"memory": False}) == "vosops_s"

    def test_it_is_propagate_without_the_features(self, weights_package, monkeypatch):
        monkeypatch.setattr("vosops.inference.settings.find_spec", lambda name: None)
        assert default_model() == "propagate"

    def test_a_file_of_weights_says_that_a_model_is_meant(self, weights_package, tmp_path):
        assert default_model({}, tmp_path / "weights.pth") == "propagate"

    def test_the_registry_says_whose_weights_they_are(self, weights_package):
        assert find_model("vosops-s").weights_notice == "weights 1.0, CC BY-NC 4.0"
        assert find_model("stm").weights_notice == "" and find_model("stm").installed_weights is None
