"""ConvLSTMs at the places of the networks for frames: both ways, steps and clips, trackers, weights, gradients."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

import vosops
from tests.models.segmentation import originals
from vosops.inference import SemanticTracker
from vosops.models import create_model, list_models, load_weights
from vosops.models.recurrence import layer_options
from vosops.models.segmentation import deconvnet

NARROW = {"_STAGES": ((8, 8), (8, 12), (12, 12, 16), (16, 16, 16), (16, 16, 16)), "_FULL": 32}
NETWORKS = {  # options, and a size
    "unet": ({}, (34, 50)),
    "unetplusplus": ({"deep_supervision": True}, (32, 48)),
    "resunet": ({"filters": (8, 16, 32, 64)}, (24, 40)),
    "resunetplusplus": ({}, (24, 40)),
    "segnet": ({}, (34, 50)),
    "deconvnet": ({}, (224, 224)),
    "icnn": ({}, (33, 40)),
    "gridnet": ({"widths": (8, 12, 16)}, (24, 36)),
    "deeplabv3plus": ({"backbone": "mobilenet_v2"}, (65, 81)),
    "hrnet_w18": ({}, (64, 96)),
    "hrnet_w32": None,
    "hrnet_w48": None,
    "hrnet_w48_ocr": ({}, (64, 64)),
    "danet": ({}, (48, 49)),
    "pspnet": ({}, (49, 57)),
    "icnet": ({}, (97, 66)),
}  # None: the same code as another's
RECURRENT_BEFORE = {"lstm_icnet", "lstm_segnet", "rfcn"}
VARIANTS = ("convolution", "spatial", "depthwise", "separable")


@pytest.fixture(autouse=True)
def _narrow_deconvnet(monkeypatch):
    for constant, value in NARROW.items():
        monkeypatch.setattr(deconvnet, constant, value)


def made(name, recurrent, **options):
    """The network with random weights that keep what it sees."""
    given, size = NETWORKS[name]
    torch.manual_seed(0)
    network = originals.empty(name, recurrent=recurrent, **given, **options).to_empty(device="cpu")
    network = originals.draw(network)
    for module in network.modules():
        if isinstance(module, vosops.nn.ConvLSTMCell):
            module.reset_parameters()
    for parameter_name, parameter in network.named_parameters():
        if parameter_name.endswith("gamma"):
            parameter.data.fill_(0.5)
    return network, size


def small(recurrent, **options):
    """A network that costs little, two frames of it apart by what recurs."""
    return create_model("gridnet", num_classes=3, widths=(4, 6), recurrent=recurrent, **options)


def test_every_network_for_frames_is_here():
    assert set(list_models("semantic network")) - RECURRENT_BEFORE == set(NETWORKS)


@pytest.mark.parametrize("name", [name for name, case in NETWORKS.items() if case])
def test_every_place_by_rows_and_as_the_original(name):
    places = originals.empty(name, **NETWORKS[name][0]).places
    assert {"bottleneck", "head"} <= set(places)
    network, size = made(name, dict.fromkeys(places, "depthwise"))
    clip = torch.rand(1, 2, 3, *size)
    with torch.no_grad():
        assert network.streams
        found, state = network(clip)
        with vosops.use_backend("reference"):
            assert not network.streams
            naive, of_naive = network(clip)
        assert set(state) == set(of_naive) == set(places)
        for place, channels in places.items():
            assert state[place][0].shape[:3] == (1, 1, channels)
            for x, y in zip(state[place], of_naive[place], strict=True):
                assert_close(x, y, rtol=1e-3, atol=1e-4 * float(y.abs().max()))
        assert found.shape == naive.shape == (1, 2, *found.shape[2:])
        assert (found - naive).abs().max() <= 1e-4 * naive.abs().max()
        first, carried = network(clip[:, 0])
        second, _ = network(clip[:, 1], carried)
        for x, y in ((first, found[:, 0]), (second, found[:, 1])):
            assert (x - y).abs().max() <= 1e-4 * y.abs().max()
        forgetful, _ = network(clip[:, 1])
        assert (forgetful - second).abs().max() > 1e-3 * (second - second.mean()).abs().max()


@pytest.mark.parametrize("place", ["row1", "bottleneck", "head"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_place_alone_is_a_conv_lstm_over_its_maps(place, variant):
    """By a hook on the layer: what it reads is what the network without it makes there."""
    network, plain = small({place: variant}), small(None)
    layer = network.lstms[place].layers[0]
    assert (layer.variant, layer.hidden_size) == (variant, network.places[place])
    seen = []
    handle = network.lstms[place].register_forward_hook(lambda _, given, found: seen.append((given, found)))
    read = []
    plain.at = lambda name, x: read.append(x) or x if name == place else x
    clip = torch.rand(2, 3, 3, 16, 20)
    network(clip)
    plain(clip.flatten(0, 1))
    ((frames, before), (_, state)) = seen[0]
    handle.remove()
    assert before is None and state[0].shape[:2] == (1, 2)
    assert_close(frames.flatten(0, 1), read[0])


@pytest.mark.parametrize("recurrent", ["bottleneck", "row1:separable", "row1,head:depthwise"])
def test_trackers(recurrent):
    network = small(recurrent)
    clip = torch.rand(5, 3, 15, 22)
    window, naive = SemanticTracker(network, window=3), SemanticTracker(network, window=3, naive=True)
    streaming = SemanticTracker(network, streaming=True)
    streaming_naive = SemanticTracker(network, streaming=True, naive=True)
    apart = 0.0
    for t, frame in enumerate(clip):
        expected = naive.step(frame)
        assert expected.shape == (3, 15, 22)
        assert_close(window.step(frame), expected, rtol=1e-4, atol=1e-5)
        carried = streaming.step(frame)
        assert_close(carried, streaming_naive.step(frame), rtol=1e-4, atol=1e-5)
        if t < 3:
            assert_close(carried, expected, rtol=1e-4, atol=1e-5)
        apart = max(apart, float((carried - expected).abs().max()))
    assert apart > 1e-4, "a window forgets"


@pytest.mark.parametrize("streaming", [False, True])
def test_a_tracker_goes_on_where_it_was_saved(streaming):
    network = small("row1,head:depthwise")
    clip = torch.rand(5, 3, 16, 20)
    tracker = SemanticTracker(network, window=3, streaming=streaming)
    for frame in clip[:3]:
        tracker.step(frame)
    saved = tracker.state_dict()
    wanted = [tracker.step(frame) for frame in clip[3:]]
    other = SemanticTracker(network, window=3, streaming=streaming)
    other.load_state_dict(saved)
    for frame, expected in zip(clip[3:], wanted, strict=True):
        assert torch.equal(other.step(frame), expected)
    tracker.reset()
    assert_close(tracker.step(clip[0]), SemanticTracker(network).step(clip[0]))


def test_it_runs_at_sizes_and_images_that_the_network_pads():
    network = small("bottleneck")
    image = torch.rand(3, 13, 21)
    labels = network.predict(image)
    assert labels.shape == (13, 21)
    assert torch.equal(labels, SemanticTracker(network).step(image, output="labels"))
    assert torch.equal(labels, network.predict(image, naive=True))
    assert network.reach is None and small(None).reach is None
    with pytest.raises(ValueError, match="tile must be None for GridNet, which is recurrent"):
        SemanticTracker(network, tile=16)


def test_gradients_pass_through_time():
    """The loss of the last frame alone reaches the first, and every weight of the layer."""
    network = small("bottleneck:separable").train()
    clip = torch.rand(2, 3, 3, 16, 20, requires_grad=True)
    logits, state = network(clip)
    logits[:, -1].square().mean().backward()
    assert clip.grad[:, 0].abs().max() > 0
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        if name.startswith("lstms."):
            assert parameter.grad.abs().max() > 0, name
    assert all(x.requires_grad for x in state["bottleneck"])


def test_gradients_are_those_of_differences():
    torch.manual_seed(0)
    network = small("bottleneck:separable").double()
    clip = torch.rand(1, 2, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: network(x)[0], (clip,), fast_mode=True)


@pytest.mark.parametrize(
    ("name", "outputs"),
    [("unetplusplus", 4), ("danet", 3), ("pspnet", 2), ("icnet", 4), ("hrnet_w48_ocr", 2)],
)
def test_auxiliary_heads_come_by_clip_and_frame(name, outputs):
    network, size = made(name, "bottleneck:depthwise")
    with torch.no_grad():
        found, _ = originals.with_auxiliary_heads(network)(torch.rand(1, 2, 3, *size))
    assert len(found) == outputs
    assert all(x.shape[:3] == (1, 2, network.num_classes) for x in found)


def test_weights_of_the_network_for_frames_load(tmp_path):
    plain, network = small(None), small("head", device="cpu")
    own = {name: x.clone() for name, x in network.state_dict().items() if name.startswith("lstms.")}
    for x in plain.parameters():
        torch.nn.init.normal_(x)
    torch.save({"state_dict": plain.state_dict()}, tmp_path / "plain.pth")
    with pytest.warns(UserWarning, match=r"none of the 2 recurrent weights of GridNet \(lstms.head.layers.0"):
        network = small("head", weights=tmp_path / "plain.pth")
    for name, x in network.state_dict().items():
        assert torch.equal(x, own[name] if name in own else plain.state_dict()[name]), name
    assert set(network.load_state_dict(plain.state_dict(), strict=False).missing_keys) == set(own)
    torch.save(network.state_dict(), tmp_path / "recurrent.pth")
    load_weights(small("head"), tmp_path / "recurrent.pth")
    with pytest.raises(ValueError, match="2 unexpected"):
        load_weights(plain, tmp_path / "recurrent.pth")
    some = {name: x for name, x in network.state_dict().items() if not name.endswith("0.bias")}
    torch.save(
        {name: x for name, x in some.items() if not name.startswith("lstms.")}
        | {name: x for name, x in some.items() if name.startswith("lstms.")},
        tmp_path / "part.pth",
    )
    with pytest.raises(ValueError, match=r"1 missing \(lstms.head.layers.0.bias\)"):
        load_weights(small("head"), tmp_path / "part.pth")


def test_the_network_begins_with_the_weights_that_it_has_without():
    plain, network = small(None), small(["row1", "head"])
    for name, x in plain.state_dict().items():
        assert torch.equal(network.state_dict()[name], x)


def test_options():
    places = {"bottleneck": 8, "head": 4}
    assert layer_options(None, places) == layer_options([], places) == {}
    assert layer_options("head", places) == {"head": {}}
    assert layer_options("bottleneck:spatial, head", places) == {
        "bottleneck": {"variant": "spatial"},
        "head": {},
    }
    assert layer_options({"head": {"kernel_size": 5}}, places) == {"head": {"kernel_size": 5}}
    network = small({"head": {"variant": "spatial", "kernel_size": (1, 5), "num_layers": 2}})
    first, second = network.lstms["head"].layers
    assert first.kernel_size == (1, 5) and second.variant == "spatial"
    logits, state = network(torch.rand(1, 3, 8, 8))
    assert logits.shape == (1, 3, 8, 8) and state["head"][0].shape == (2, 1, 4, 8, 8)


def test_wrong_use_is_refused():
    with pytest.raises(
        ValueError, match="recurrent must name places among row1, bottleneck, head, got 'middle'"
    ):
        small("middle")
    with pytest.raises(
        TypeError, match="recurrent must be places or a dictionary of options by place, got int"
    ):
        small(3)
    with pytest.raises(ValueError, match="variant must be one of"):
        small("head:deep")
    with pytest.raises(ValueError, match="state must be None: the network has no recurrent place"):
        small(None)(torch.rand(1, 3, 8, 8), {"head": (torch.rand(1), torch.rand(1))})
    with pytest.raises(ValueError, match=r"images must be \(N,C,H,W\)"):
        small("head")(torch.rand(3, 8, 8))
    network = small("head")
    _, state = network(torch.rand(2, 3, 8, 8))
    with pytest.raises(ValueError, match="state"):
        network(torch.rand(1, 3, 8, 8), state)
