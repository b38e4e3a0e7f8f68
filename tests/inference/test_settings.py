"""What a run is told of its model, and how it comes to the factory and into the record."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import vosops
from tests.clips import picture, truth
from tests.inference.test_network_tracker import Echo
from vosops.inference import NetworkTracker
from vosops.inference.settings import (
    ModelSettings,
    find_device,
    find_dtype,
    make_semantic_tracker,
    make_tracker,
    model_options,
)
from vosops.io.errors import InputError, VosopsError
from vosops.models import FrameNetwork, ModelEntry, registry
from vosops.runs.checkpoint import differences
from vosops.runs.job import Settings


class Echoing(Echo):
    def __init__(self, *, slots: int = 2, backbone: str = "") -> None:
        super().__init__()
        self.given = (slots, backbone)


class Classes(FrameNetwork):
    def __init__(self, num_classes: int = 3, *, least: int = 1) -> None:
        super().__init__()
        self.num_classes = max(num_classes, least)
        self.layer = torch.nn.Conv2d(3, self.num_classes, 1)

    def forward(self, images):
        return self.layer(images)


@pytest.fixture(autouse=True)
def models(monkeypatch):
    """Two models for these tests."""
    entries = [
        ModelEntry("echo", Echoing, "mask network", "for tests", weights="optional"),
        ModelEntry("classes", Classes, "semantic network", "for tests", weights="optional"),
    ]
    monkeypatch.setattr(registry, "_ENTRIES", {**registry._ENTRIES, **{e.name: e for e in entries}})
    monkeypatch.setattr(registry, "_NAMES", {**registry._NAMES, **{e.name: e.name for e in entries}})


class TestOptions:
    def test_values_are_what_they_look_like(self):
        texts = ["a=3", "b=1e-3", "c=true", "d=None", "e=(1, 2)", "f=resnet50", "g=", "h=x=y", "i='3'"]
        expected = dict(
            zip("abcdefghi", [3, 1e-3, True, None, (1, 2), "resnet50", "", "x=y", "3"], strict=True)
        )
        assert model_options(texts) == expected

    def test_short_ones_join_them_where_they_are_given(self):
        assert model_options(["a=1"], backbone="x", checkout=None) == {"backbone": "x", "a": 1}

    @pytest.mark.parametrize(
        ("texts", "message"),
        [
            (["a"], "--option must be NAME=VALUE, got a"),
            (["=3"], "--option must be NAME=VALUE, got =3"),
            (["a b=3"], "--option must be NAME=VALUE, got a b=3"),
            (["a=1", "a=2"], "--option a is given twice"),
            (["backbone=y"], "--option backbone is given twice"),
            (["memory_budget=3"], "--option memory_budget cannot be given: use --memory-budget"),
            (["size=3"], "--option size cannot be given: use --size"),
        ],
    )
    def test_mistakes(self, texts, message):
        with pytest.raises(InputError, match=message):
            model_options(texts, backbone="x")


class TestTracker:
    def test_everything_reaches_the_factory(self):
        options = {"slots": 5, "backbone": "net"}
        settings = ModelSettings("echo", None, options, "cpu", "float32", "1MB", True, (0.5, 1.0))
        tracker = make_tracker(settings)
        assert isinstance(tracker, NetworkTracker) and tracker.network.given == (5, "net")
        assert (tracker.memory_budget, tracker.naive, tracker.scales) == (1_000_000, True, (0.5, 1.0))

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"model": "echoo"}, "--model echoo is unknown: choose one of cutie, echo, "),
            ({"model": "classes"}, "--model classes does not track objects, see vosops semantic: choose one"),
            (
                {"options": {"slot": 3}},
                "--option slot cannot be used with --model echo, whose options are: slots, back",
            ),
            ({"options": {"checkout": "x"}}, "--checkout cannot be used with --model echo"),
            ({"options": {"num_classes": 3}}, "--classes cannot be used with --model echo"),
            ({"weights": Path("absent")}, "--weights absent does not exist"),
            ({"weights": Path(".")}, "--weights . is a folder: give a file"),
            (
                {"model": "stm"},
                r"--model stm needs --weights FILE \(STM_weights.pth\): no weights are included",
            ),
            ({"memory_budget": "much"}, "--memory-budget much cannot be used: a size must be"),
            ({"scales": ()}, r"--scales must be positive numbers, got \(\)"),
            ({"scales": (float("nan"),)}, "--scales must be positive numbers"),
            (
                {"model": "propagate", "scales": (0.5,)},
                "--scales cannot be used with --model propagate, which runs at",
            ),
            ({"device": "nowhere"}, r"--device nowhere cannot be used \(.*\): try cpu, cuda or cuda:0"),
        ],
    )
    def test_mistakes(self, changes, message):
        with pytest.raises(InputError, match=message):
            make_tracker(ModelSettings(**{"model": "echo", **changes}))

    def test_what_the_factory_refuses_is_one_line(self, tmp_path):
        (tmp_path / "w.pth").write_text("no checkpoint")
        with pytest.raises(
            VosopsError, match="^model echo cannot be created: weights must be a checkpoint"
        ) as error:
            make_tracker(ModelSettings("echo", tmp_path / "w.pth"))
        assert "\n" not in str(error.value)


class TestSemanticTracker:
    def test_everything_reaches_the_factory(self):
        settings = ModelSettings(
            "classes", options={"num_classes": 5}, device="cpu", dtype="bfloat16", naive=True
        )
        tracker = make_semantic_tracker(settings, streaming=True)
        assert tracker.num_classes == 5 and tracker.dtype == torch.bfloat16
        assert tracker.streaming and tracker.naive

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            (
                {"model": "echo"},
                "--model echo does not segment into classes, see vosops segment: choose one of cl",
            ),
            ({"options": {"version": "v5"}}, "--version cannot be used with --model classes"),
            ({"options": {"num_classes": 1}}, "--classes must be from 2 to 255, got 1"),
            ({"options": {"num_classes": 256}}, "--classes must be from 2 to 255, got 256"),
            ({"options": {"least": 256}}, "--model classes has 256 classes: 255 can be written"),
            ({"dtype": "int8"}, "--dtype must be one of float32, bfloat16, float16, got int8"),
        ],
    )
    def test_mistakes(self, changes, message):
        with pytest.raises(InputError, match=message):
            make_semantic_tracker(ModelSettings(**{"model": "classes", **changes}))


class TestRecord:
    def test_a_run_of_the_last_version_goes_on(self, tmp_path):
        """What it recorded of the command's defaults, and of --model stm with its options."""
        before = {
            "model": "propagate", "weights content": None, "backbone": None, "device": "cpu", "dtype": "float32",
            "size": 480, "start": None, "end": None, "step": 1, "memory-budget": None, "checkout": None,
            "naive": False, "scales": [1.0],
        }  # fmt: skip
        assert differences(before, Settings(device="cpu").arguments()) == []
        before |= {"model": "xmem", "checkout": "clone", "backbone": "b", "memory-budget": "2GB", "size": -1}
        given = {"checkout": Path("clone"), "backbone": "b"}
        now = Settings("xmem", options=given, device="cpu", memory_budget="2GB", size=-1)
        assert differences(before, json.loads(json.dumps(now.arguments()))) == []

    def test_a_semantic_run_of_the_last_version_goes_on(self):
        before = {
            "weights content": None, "version": "v5", "variant": "fast", "classes": 19, "naive": False,
            "device": "cpu", "dtype": "float32",
        }  # fmt: skip
        settings = ModelSettings("lstm_icnet", options={"variant": "fast"}, device="cpu")
        assert differences(before, settings.semantic_arguments()) == []
        assert settings.semantic_arguments().keys() == before.keys()
        assert ModelSettings("classes").semantic_arguments()["model"] == "classes"

    def test_other_options_are_told_as_they_were_given(self):
        before = ModelSettings("echo", options={"slots": 3}).arguments()
        now = ModelSettings("echo", options={"slots": 4, "odd": {1, 2}}).arguments()
        assert differences(before, now) == [
            "--option odd was None, is {1, 2}",
            "--option slots was 3, is 4",
        ]

    def test_the_content_of_weights_counts_and_what_is_read_is_known(self, tmp_path):
        (tmp_path / "a").write_text("a")
        (tmp_path / "b").write_text("b")
        settings = [ModelSettings("echo", tmp_path / name, {"checkout": "clone"}) for name in "ab"]
        assert differences(*(s.arguments() for s in settings)) == ["the weights content changed"]
        assert settings[0].files == [tmp_path / "a", Path("clone")]


def test_segment_in_python_gives_options_to_the_model():
    clip, mask = [picture({1: (4, 4, 20, 30)})] * 2, truth({1: (4, 4, 20, 30)})
    frames = list(vosops.segment(clip, mask, model="echo", slots=7, size=-1, device="cpu"))
    assert len(frames) == 2
    with pytest.raises(TypeError, match="options of echo must be among slots, backbone, got slot"):
        next(vosops.segment(clip, mask, model="echo", slot=7))
    with pytest.raises(TypeError, match="slots"):
        next(vosops.segment(clip, mask, model=Echo(), slots=7))
    with pytest.raises(InputError, match="--model nothing is unknown"):
        next(vosops.segment(clip, mask, model="nothing"))


def test_devices_and_dtypes():
    assert find_device("cpu").type == "cpu"
    assert find_device(None).type in ("cpu", "cuda")
    assert find_dtype("float16") == torch.float16
