"""LSTM-SegNet and RFCN: by hand, over clips, and a frame at a time."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from vosops.inference import SemanticTracker
from vosops.models import create_model
from vosops.models.lstm_segnet import RFCN, LSTMSegNet

SIZE = (37, 50)  # odd sides at every depth
OPTIONS = [
    ("lstm_segnet", {}),
    ("lstm_segnet", {"positions": ("encoder", "decoder"), "variant": "separable"}),
    ("lstm_segnet", {"positions": ()}),
    ("rfcn", {"hidden": 16}),
]


@pytest.fixture(params=OPTIONS, ids=str)
def model(request):
    name, options = request.param
    return create_model(name, num_classes=4, width=8, **options)


def test_segnet_without_recurrence_by_hand():
    """With torch's own pooling modules, on sides that halve exactly."""
    model = LSTMSegNet(num_classes=4, positions=(), width=8).eval()
    clip = torch.rand(1, 2, 3, 64, 32)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    x = (clip[0] - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    pool, unpool = nn.MaxPool2d(2, return_indices=True), nn.MaxUnpool2d(2)
    places = []
    with torch.no_grad():
        for stage in model.encoder:
            x, place = pool(stage(x))
            places.append(place)
        for stage, place in zip(list(model.decoder)[::-1], places[::-1], strict=True):
            x = stage(unpool(x, place))
        assert_close(model(clip)[0][0], model.classifier(x))


def test_shapes_of_the_networks():
    channels = [m.out_channels for m in LSTMSegNet(width=8).modules() if isinstance(m, nn.Conv2d)]
    assert channels[:13] == [8 * n for n in (1, 1, 2, 2, 4, 4, 4, 8, 8, 8, 8, 8, 8)]  # VGG-16
    assert len(channels) == 13 + 13 + 1
    with torch.no_grad():
        assert RFCN(5, width=8).eval()(torch.rand(1, 1, 3, *SIZE))[0].shape == (1, 1, 5, 5, 7)
        assert LSTMSegNet(5, width=8).eval()(torch.rand(1, 1, 3, *SIZE))[0].shape == (1, 1, 5, *SIZE)


def test_a_clip_is_its_frames_with_the_state_carried(model):
    clip = torch.rand(2, 3, 3, *SIZE)
    with torch.no_grad():
        whole, final = model(clip)
        state = None
        for t in range(3):
            logits, state = model(clip[:, t : t + 1], state)
            assert_close(logits[:, 0], whole[:, t], rtol=1e-4, atol=1e-5)
    for name, pair in final.items():
        assert_close(state[name], pair, rtol=1e-4, atol=1e-5)


def test_trackers(model):
    clip = torch.rand(3, 3, *SIZE)
    window, naive = SemanticTracker(model, window=2), SemanticTracker(model, window=2, naive=True)
    streaming = SemanticTracker(model, streaming=True)
    for t, frame in enumerate(clip):
        expected = naive.step(frame)
        assert expected.shape == (4, *SIZE)
        assert_close(window.step(frame), expected, rtol=1e-4, atol=1e-5)
        carried = streaming.step(frame)
        if t < 2:
            assert_close(carried, expected, rtol=1e-4, atol=1e-5)


def test_gradients_reach_all_parameters(model):
    model.train()
    logits, _ = model(torch.rand(1, 2, 3, 64, 64))
    logits.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_wrong_use_is_refused():
    with pytest.raises(ValueError, match="positions must be among encoder, decoder"):
        LSTMSegNet(positions=("middle",))
    with pytest.raises(ValueError, match=r"clip must be \(N,T,3,H,W\)"):
        RFCN(2, width=8)(torch.rand(1, 3, 64, 64))
    with pytest.raises(ValueError, match="at least 32"):
        RFCN(2, width=8)(torch.rand(1, 1, 3, 31, 64))
    with pytest.raises(ValueError, match="at least 32"):
        SemanticTracker(RFCN(2, width=8)).step(torch.rand(3, 31, 64))
