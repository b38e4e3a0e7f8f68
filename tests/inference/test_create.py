"""`create_tracker`: the one place that decides what tracks objects."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import vosops.inference
import vosops.models
from tests.clips import ColourTracker
from tests.inference.test_network_tracker import Echo
from vosops.inference import NetworkTracker, TrackingLoop, create_tracker
from vosops.models import ModelEntry, Propagate, registry


@pytest.fixture
def network():
    return Echo()


def test_it_is_found_beside_create_model():
    assert vosops.models.create_tracker is create_tracker


def test_a_name_of_a_network_is_run():
    tracker = create_tracker("stm", memory_every=3, scales=(0.5,), memory_budget="1MB", slots=4, naive=True)
    assert isinstance(tracker, NetworkTracker)
    assert (tracker.memory_every, tracker.scales, tracker.memory_budget) == (3, (0.5,), 1_000_000)
    assert tracker.naive and tracker.network.slots == 4


def test_a_name_of_a_tracker_is_made():
    tracker = create_tracker("propagate", pretrained=False, memory_budget="1MB")
    assert isinstance(tracker, Propagate) and tracker.memory_budget == 1_000_000
    with pytest.raises(TypeError, match="options of propagate must be among .*memory, got scales"):
        create_tracker("propagate", scales=(0.5,))


@pytest.fixture
def echo(monkeypatch):
    """Echo in the registry."""
    entry = ModelEntry("echo", Echo, "mask network", "for tests")
    monkeypatch.setattr(registry, "_ENTRIES", {**registry._ENTRIES, "echo": entry})
    monkeypatch.setattr(registry, "_NAMES", {**registry._NAMES, "echo": "echo"})


def test_weights_are_loaded(echo, tmp_path):
    torch.save({"gain": torch.tensor(3.0)}, tmp_path / "w.pth")
    assert create_tracker("echo", tmp_path / "w.pth").network.gain.item() == 3


def test_a_network_is_run(network):
    tracker = create_tracker(network, memory_every=2)
    assert isinstance(tracker, NetworkTracker) and tracker.network is network and tracker.memory_every == 2
    assert create_tracker(network, device="cpu").device.type == "cpu"
    with pytest.raises(ValueError, match="weights must be None with an existing model, got w.pth"):
        create_tracker(network, "w.pth")


def test_a_tracker_is_returned(network):
    for tracker in (ColourTracker(), NetworkTracker(network)):
        assert create_tracker(tracker) is tracker
        with pytest.raises(
            TypeError, match=f"none for {type(tracker).__name__}, which is a tracker, got memory_every"
        ):
            create_tracker(tracker, memory_every=3)
        with pytest.raises(TypeError, match="which is a tracker, got device"):
            create_tracker(tracker, device="cpu")


def test_other_things_are_refused():
    with pytest.raises(TypeError, match="model must be a name, a network or a tracker, got Linear"):
        create_tracker(nn.Linear(1, 1))
    with pytest.raises(ValueError, match="model must be one of"):
        create_tracker("no_such_model")
    with pytest.raises(ValueError, match="model must track objects, got 'rfcn', a semantic network"):
        create_tracker("rfcn")


def test_a_tracker_of_an_older_protocol_is_told_what_it_lacks():
    class Older:
        object_ids = []
        initialize = step = add_objects = remove_object = state_dict = load_state_dict = reset = None

    with pytest.raises(TypeError, match="model must have predict, confidence, as a VideoTracker, got Older"):
        create_tracker(Older())


def test_names_of_the_last_release():
    with pytest.warns(DeprecationWarning, match=r"inference\.Tracker is deprecated, use .*\.NetworkTracker"):
        assert vosops.inference.Tracker is NetworkTracker
    with pytest.warns(
        DeprecationWarning, match=r"inference\.Propagation is deprecated, use .*\.TrackingLoop"
    ):
        assert vosops.inference.Propagation is TrackingLoop
    with pytest.raises(AttributeError, match=r"module 'vosops\.inference' has no attribute 'Nothing'"):
        vosops.inference.Nothing  # noqa: B018
