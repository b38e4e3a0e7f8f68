"""LSTM-ICNet against a naive float64 re-writing (naive_icnet.py), the original's variables, and its ways with video."""

import ast
import io
import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from tests.conftest import SHARED
from tests.models.naive_icnet import Naive, resize
from vosops.inference import SemanticTracker
from vosops.models import create_model, list_models
from vosops.models.icnet import ICNet, PSPNet, double, halve, resize_aligned, resize_legacy
from vosops.models.lstm_icnet import LSTMICNet, segmentation_loss
from vosops.models.tensorflow import load_variables, variable_shapes
from vosops.nn import ConvLSTMCell

VERSIONS = ("v1", "v2", "v3", "v4", "v5", "v6")
SIZE = (97, 122)  # the least height; halves of both parities follow


def draw(shapes, seed=0):
    """Variables by TensorFlow's names, such that no layer dies or explodes."""
    rng = np.random.default_rng(seed)
    found = {}
    for name, shape in shapes.items():
        leaf = name.rsplit("/", 1)[-1]
        if len(shape) == 4:
            fan = np.prod(shape[:2]) if leaf == "kernel_depth" else np.prod(shape[:3])
            found[name] = rng.uniform(-1, 1, shape) * np.sqrt(6 / fan)
        elif leaf == "moving_variance":
            found[name] = rng.uniform(0.8, 1.2, shape)
        elif leaf == "gamma":
            found[name] = rng.uniform(0.4, 0.8, shape)
        else:
            found[name] = rng.uniform(-0.1, 0.1, shape)
    return found


def clip_of(frames, size=SIZE, batch=1):
    return torch.randint(0, 256, (batch, frames, 3, *size), dtype=torch.uint8)


def original_of(options, seed=0):
    """A float64 model and the variables that it was loaded from."""
    model = LSTMICNet(**options).double().eval()
    variables = draw(variable_shapes(model), seed)
    model.load_tensorflow(variables)
    return model, variables


@pytest.mark.parametrize(
    "options",
    [
        {"version": "icnet"},
        *({"version": v} for v in VERSIONS),
        {"version": "v5", "variant": "spatial"},
        {"version": "v6", "variant": "depthwise"},
        {"version": "v5", "variant": "separable"},
        {"version": "v5", "variant": "fast"},
        {"version": "v6", "variant": "faster"},
        {"version": "v2", "variant": "separable", "lstm_channels": 48},
        {"version": "v5", "variant": "convolution", "lstm_channels": 32, "num_classes": 5},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_all_heads_are_those_of_the_naive_network(options):
    model, variables = original_of(options)
    clip = clip_of(2)
    with torch.no_grad():
        result = model(clip, auxiliary=True)
    expected = Naive(variables, model.kind)(clip[0].permute(0, 2, 3, 1).numpy())
    for head, right in zip(result[:3], expected, strict=True):
        assert_close(head[0], torch.from_numpy(right).permute(0, 3, 1, 2), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("size", [(98, 131), (100, 97), (128, 160)], ids=str)
def test_sides_of_every_parity(size):
    model, variables = original_of({"version": "icnet"})
    clip = clip_of(1, size)
    with torch.no_grad():
        logits = model(clip).logits
    expected = Naive(variables)(clip[0].permute(0, 2, 3, 1).numpy())[0]
    assert_close(logits[0], torch.from_numpy(expected).permute(0, 3, 1, 2), rtol=1e-9, atol=1e-9)


def test_float32_is_near_float64():
    model, variables = original_of({"version": "v5"})
    clip = clip_of(2)
    with torch.no_grad():
        right = model(clip).logits
        logits = model.float()(clip).logits
    assert (logits - right).abs().max() < 1e-4 * right.abs().max()


def test_floating_frames_are_those_of_bytes():
    model = LSTMICNet().eval()
    clip = clip_of(1)
    with torch.no_grad():
        assert_close(model(clip.float() / 255).logits, model(clip).logits, rtol=1e-4, atol=1e-4)


def test_icnet_and_pspnet_are_parts_of_it():
    model, variables = original_of({"version": "icnet"})
    clip = clip_of(1)
    icnet = ICNet().double().eval()
    load_variables(icnet, variables)
    pspnet = PSPNet().double().eval()
    load_variables(pspnet, {n: x for n, x in variables.items() if n in variable_shapes(pspnet)})
    with torch.no_grad():
        whole = model(clip, auxiliary=True)
        assert_close(icnet(clip[0]), whole.logits[0])
        assert_close(pspnet(clip[0]), whole.sub4[0])


# The three ways to resize


@pytest.mark.parametrize(
    "shape, size", [((5, 7), (9, 13)), ((9, 4), (10, 5)), ((8, 8), (3, 5)), ((1, 3), (4, 4))]
)
@pytest.mark.parametrize("way, corners", [(resize_aligned, True), (resize_legacy, False)])
def test_resizing_is_tensorflows(way, corners, shape, size):
    x = torch.randn(2, *shape, 3, dtype=torch.float64)
    expected = torch.from_numpy(resize(x.numpy(), size, corners)).permute(0, 3, 1, 2)
    assert_close(way(x.permute(0, 3, 1, 2), size), expected)


def test_the_legacy_way_by_hand():
    x = torch.tensor([[[[0.0, 6.0]]]])
    assert resize_legacy(x, (1, 3)).flatten().tolist() == pytest.approx([0, 4, 6])
    assert resize_aligned(x, (1, 3)).flatten().tolist() == pytest.approx([0, 3, 6])


def test_sizes_at_the_originals_resolution():
    assert halve(torch.empty(1, 1, 64, 128)).shape[-2:] == (32, 64)
    assert double(torch.empty(1, 1, 32, 64)).shape[-2:] == (63, 127)
    assert double(torch.empty(1, 1, 128, 256)).shape[-2:] == (255, 511)


# The original's outputs

ORIGINALS = json.loads((Path(__file__).parent / "lstm_icnet_original.json").read_text())
OPTIONS_OF = {  # the original's --model and --model-variant -> ours
    **{("LSTM_ICNet_" + v, "end2end"): {"version": v} for v in VERSIONS},
    **{
        ("LSTM_ICNet_v5", f"{kind}_end2end"): {"version": "v5", "variant": kind}
        for kind in ("spatial", "depthwise", "separable")
    },
    ("Faster_LSTM_ICNet_v5", "end2end_half"): {"version": "v5", "variant": "fast"},
    ("Faster_LSTM_ICNet_v5", "depthwise_end2end_half"): {"version": "v5", "variant": "faster"},
    ("Faster_LSTM_ICNet_v6", "separable_end2end_third"): {
        "version": "v6",
        "variant": "separable",
        "lstm_channels": 48,
    },
    ("Faster_LSTM_ICNet_v2", "end2end_quarter"): {"version": "v2", "lstm_channels": 32},
}


def draw_by_name(name, shape):
    """The values that the original was run with: uniform, from the name alone, by NumPy's frozen generator."""
    uniform = np.random.RandomState(zlib.crc32(name.encode())).random_sample(shape)
    leaf = name.rsplit("/", 1)[-1]
    if len(shape) == 4:
        fan = np.prod(shape[:2]) if leaf == "kernel_depth" else np.prod(shape[:3])
        return (2 * uniform - 1) * np.sqrt(6 / fan)
    if leaf == "moving_variance":
        return 0.8 + 0.4 * uniform
    return 0.4 + 0.4 * uniform if leaf == "gamma" else 0.2 * uniform - 0.1


@pytest.mark.parametrize("case", ORIGINALS, ids=lambda case: f"{case['model']}-{case['variant']}")
def test_outputs_are_the_originals(case):
    """Samples of all heads and their norms, from the original's code on TensorFlow 2.15 (compat.v1), on the CPU."""
    options = OPTIONS_OF[case["model"], case["variant"]]
    shapes = variable_shapes(LSTMICNet(**options))
    variables = {n: draw_by_name(n, shape).astype(np.float32) for n, shape in shapes.items()}
    model = LSTMICNet.from_tensorflow(variables).eval()
    clip = np.random.RandomState(0).randint(0, 256, (2, *SIZE, 3)).astype(np.uint8)
    with torch.no_grad():
        result = model(torch.from_numpy(clip).permute(0, 3, 1, 2)[None], auxiliary=True)
    for found, head in zip(result[:3], case["heads"], strict=True):
        maps = found[0].permute(0, 2, 3, 1)  # (T,h,w,K), as TensorFlow has them
        assert list(maps.shape) == head["shape"]
        samples = maps.flatten()[np.linspace(0, maps.numel() - 1, len(head["samples"])).astype(int)]
        scale = maps.abs().max().item()
        assert_close(samples, torch.tensor(head["samples"]), rtol=0, atol=1e-4 * scale)
        assert maps.double().norm().item() == pytest.approx(head["norm"], rel=1e-5)


# The original's variables


@pytest.mark.parametrize("version", VERSIONS)
def test_every_variable_of_the_original_is_used_once(version):
    path = SHARED / "params" / f"params_lstm_icnet_{version}.txt"
    if not path.exists():
        pytest.skip(f"{path} is not here (set VOSOPS_TEST_DATA)")
    rows = [line.split("\t") for line in path.read_text().splitlines() if not line.startswith("#")]
    shapes = {name: ast.literal_eval(shape) for name, shape, _ in rows}
    assert len(shapes) == len(rows)
    variables = draw(shapes)
    model = LSTMICNet.from_tensorflow(variables)
    assert model.version == version
    assert variable_shapes(model) == shapes
    held = sum(x.numel() for n, x in model.state_dict().items() if not n.endswith("num_batches_tracked"))
    assert held == sum(x.size for x in variables.values())


def test_names_are_the_originals():
    model, variables = original_of({"version": "v5"})
    state = model.state_dict()
    kernel = torch.from_numpy(variables["conv2_1_3x3/weights"])
    assert_close(state["conv2_1_3x3.weight"], kernel.permute(3, 2, 0, 1))
    assert_close(
        state["conv2_1_3x3_bn.running_var"], torch.from_numpy(variables["conv2_1_3x3_bn/moving_variance"])
    )
    gates = torch.from_numpy(variables["convlstm3_sub1/rnn/convlstm3_sub1/biases"]).view(4, -1)
    assert_close(state["convlstm3_sub1.bias"].view(4, -1), gates[[0, 2, 1, 3]])


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda v: v.pop("conv_sub4/weights"), "1 missing (first conv_sub4/weights)"),
        (lambda v: v.update({"conv7/weights": np.zeros(1)}), "1 unexpected (first conv7/weights)"),
        (
            lambda v: v.update({"conv_sub2/weights": np.zeros((3, 3, 64, 128))}),
            "1 misshapen (first conv_sub2/weights is (3, 3, 64, 128) and must be (3, 3, 128, 128))",
        ),
    ],
)
def test_wrong_variables_are_named(change, message):
    variables = draw(variable_shapes(LSTMICNet(version="v3")))
    change(variables)
    model = LSTMICNet(version="v3")
    before = {name: x.clone() for name, x in model.state_dict().items()}
    with pytest.raises(ValueError) as error:
        model.load_tensorflow(variables)
    assert message in str(error.value)
    assert all(torch.equal(before[name], x) for name, x in model.state_dict().items())


def test_variables_of_another_version_are_refused():
    variables = draw(variable_shapes(LSTMICNet(version="v5")))
    with pytest.raises(ValueError, match="4 unexpected .first convlstm5_4_sub4/rnn/convlstm5_4_sub4/kernel"):
        LSTMICNet.from_tensorflow(variables, version="v1")


def test_what_optimizers_save_is_passed_over():
    variables = draw(variable_shapes(LSTMICNet(version="v3")))
    slots = {f"{name}/Adam": x for name, x in variables.items()} | {"beta1_power": np.zeros(())}
    LSTMICNet.from_tensorflow(variables | slots)


def test_weights_from_files(tmp_path):
    variables = draw(variable_shapes(LSTMICNet(version="v3", variant="faster")))
    original = LSTMICNet.from_tensorflow(variables)
    np.savez(tmp_path / "original.npz", **variables)
    torch.save(original.state_dict(), tmp_path / "own.pth")
    for name in ("original.npz", "own.pth"):
        model = create_model("lstm_icnet", tmp_path / name, version="v3", variant="faster")
        assert all(torch.equal(x, model.state_dict()[n]) for n, x in original.state_dict().items())
    (tmp_path / "broken.npz").write_bytes(b"PK\x03\x04 and no more")
    for name, problem in (("absent.npz", FileNotFoundError), ("broken.npz", ValueError)):
        with pytest.raises(problem, match=name):
            create_model("lstm_icnet", tmp_path / name, version="v3")
    with pytest.raises(ValueError, match="missing"):
        create_model("lstm_icnet", tmp_path / "own.pth", version="v5")


@pytest.mark.parametrize("name", ["convlstm_convolution", "convlstm_separable"])
def test_recurrent_layers_are_the_originals(golden, name):
    case = golden("convlstm_tf.pt")[name]
    layer = torch.nn.Module()
    layer.lstm = ConvLSTMCell(8, 8, variant=name.removeprefix("convlstm_"))
    variables = {
        f"lstm/rnn/lstm/{n.removeprefix('var_')}": x for n, x in case.items() if n.startswith("var_")
    }
    load_variables(layer, variables)
    with torch.no_grad():
        output, _ = layer.lstm.run(case["x"].permute(0, 1, 4, 2, 3))
    assert_close(output, case["y"].permute(0, 1, 4, 2, 3), rtol=1e-5, atol=1e-5)


# Choices


def test_it_is_listed():
    assert "lstm_icnet" in list_models()
    assert isinstance(create_model("lstm_icnet", version="v5"), LSTMICNet)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"version": "v7"}, "version must be one of icnet, v1"),
        (
            {"variant": "dense"},
            "variant must be one of convolution, spatial, depthwise, separable, fast, faster, got 'dense'",
        ),
        ({"lstm_channels": 129}, "lstm_channels must be from 1 to 128, got 129"),
        ({"lstm_channels": 0}, "lstm_channels must be"),
        ({"num_classes": 0}, "num_classes must be"),
    ],
)
def test_wrong_choices_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        LSTMICNet(**options)


def test_wrong_clips_are_refused():
    model = LSTMICNet(version="v3").eval()
    with pytest.raises(ValueError, match=r"clip must be \(N,T,3,H,W\), got \(1, 3, 97, 97\)"):
        model(torch.zeros(1, 3, 97, 97))
    with pytest.raises(ValueError, match="sides of at least 97, got"):
        model(torch.zeros(1, 1, 3, 96, 200))


def test_clips_of_a_batch_do_not_mix():
    model = LSTMICNet(version="v6").double().eval()
    clips = clip_of(2, batch=2)
    with torch.no_grad():
        both = model(clips)
        for n in (0, 1):
            alone = model(clips[n : n + 1])
            assert_close(both.logits[n : n + 1], alone.logits)
            for name, parts in alone.state.items():
                for part, whole in zip(parts, both.state[name], strict=True):
                    assert_close(whole[n : n + 1], part)


# Training


def test_loss_by_hand():
    model = LSTMICNet(version="v3", num_classes=4).eval()
    with torch.no_grad():
        result = model(clip_of(2), auxiliary=True)
    labels = torch.randint(0, 6, (1, *SIZE))
    labels[0, :40] = 255
    expected = 0.0
    for weight, head in ((0.16, result.sub4), (0.4, result.sub24), (1.0, result.logits)):
        scores = head[0, -1].double().log_softmax(0)
        height, width = scores.shape[1:]
        losses = []
        for y in range(height):
            for x in range(width):
                label = int(labels[0, y * SIZE[0] // height, x * SIZE[1] // width])
                if label < 4:
                    losses.append(-scores[label, y, x])
        expected += weight * torch.stack(losses).mean()
    assert_close(segmentation_loss(result, labels).double(), expected, rtol=1e-5, atol=1e-5)


def test_nothing_labelled_costs_nothing():
    model = LSTMICNet(version="v3")
    loss = segmentation_loss(model(clip_of(1, batch=2)), torch.full((2, *SIZE), 255))
    loss.backward()
    assert loss == 0
    assert not model.get_submodule("conv6_cls").weight.grad.any()


def test_loss_needs_all_heads():
    model = LSTMICNet(version="v3").eval()
    with pytest.raises(ValueError, match="auxiliary=True"):
        segmentation_loss(model(clip_of(1)), torch.zeros(1, *SIZE, dtype=torch.int64))


def test_gradients_are_the_slope_of_the_loss():
    """In float64, along a random direction of all parameters; through the recurrence to the first frame."""
    model = LSTMICNet(version="v6").double()
    clip = clip_of(2).double() / 255
    clip.requires_grad_()
    labels = torch.randint(0, 19, (1, *SIZE))
    segmentation_loss(model(clip), labels).backward()
    assert clip.grad[0, 0].abs().sum() > 0
    parameters = list(model.parameters())
    assert all(p.grad is not None for p in parameters)
    direction = [torch.randn_like(p) * p.abs().mean() for p in parameters]
    slope = sum((p.grad * d).sum() for p, d in zip(parameters, direction, strict=True))
    step, values = 1e-9, []
    for sign in (1, -1):
        with torch.no_grad():
            for p, d in zip(parameters, direction, strict=True):
                p += sign * step * d
            values.append(segmentation_loss(model(clip), labels))
            for p, d in zip(parameters, direction, strict=True):
                p -= sign * step * d
    assert_close((values[0] - values[1]) / (2 * step), slope, rtol=1e-4, atol=1e-6)


def test_frozen_branches():
    model = LSTMICNet(version="v5", variant="faster")
    model.freeze_branches()
    learning = {name for name, p in model.named_parameters() if p.requires_grad}
    assert "conv4_2_3x3.weight" not in learning
    assert "sub4_out.weight" not in learning
    assert "conv1_sub1.weight" not in learning
    assert {
        "conv_sub4.weight",
        "conv3_sub1_proj.weight",
        "convlstm3_sub1.weight_depth",
        "convlstm3_sub1_input_reduction.weight",
        "conv3_sub1_proj_1x1_reduce.weight",
        "conv4_2_3x3_bn.weight",
        "sub24_out.weight",
    } <= learning


# A frame at a time


def labels_of(model, clip):
    """The original's result for the last frame of a clip: logits to the frame's size, corners on corners."""
    with torch.no_grad():
        logits = model(clip[None]).logits[0, -1:]
    return resize_aligned(logits, clip.shape[-2:])[0]


@pytest.mark.parametrize("options", [{"version": "v5"}, {"version": "v6", "variant": "faster"}])
def test_window_is_the_whole_clip(options):
    model = LSTMICNet(**options).eval()
    clip = clip_of(3)[0]
    tracker = SemanticTracker(model, window=2)
    for t in range(3):
        expected = labels_of(model, clip[max(0, t - 1) : t + 1]).softmax(0)
        assert_close(tracker.step(clip[t]), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("version", ["v2", "v5"])
def test_streaming_is_one_long_clip(version):
    model = LSTMICNet(version=version).eval()
    clip = clip_of(3)[0]
    streaming = SemanticTracker(model, streaming=True)
    window = SemanticTracker(model, window=2)
    with torch.no_grad():
        expected = resize_aligned(model(clip[None]).logits[0], SIZE).softmax(1)
    differences = []
    for frame, right in zip(clip, expected, strict=True):
        found = streaming.step(frame)
        assert_close(found, right, rtol=1e-4, atol=1e-5)
        differences.append((found - window.step(frame)).abs().max().item())
    assert max(differences[:2]) < 1e-5  # the window holds the whole video
    assert differences[2] > 1e-3  # and no longer does


@pytest.mark.parametrize("streaming", [False, True])
def test_the_naive_way_gives_the_same(streaming):
    model = LSTMICNet(version="v5").eval()
    clip = clip_of(3)[0]
    naive, fast = (SemanticTracker(model, window=2, streaming=streaming, naive=n) for n in (True, False))
    for frame in clip:
        assert_close(naive.step(frame), fast.step(frame), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tile_rows", [1, 7, 1000])
def test_labels_are_the_most_probable_classes_in_any_tiling(tile_rows, monkeypatch):
    size = (61, 50)
    monkeypatch.setattr("vosops.models.rows._BAND_BYTES", {"cpu": tile_rows * 4 * size[1] * 19})
    model = LSTMICNet(version="v3").eval()
    frame = clip_of(1)[0, 0]
    probabilities = SemanticTracker(model).step(frame, size=size)
    assert_close(probabilities.sum(0), torch.ones(size))
    labels, best = SemanticTracker(model).labels(frame, size=size)
    assert labels.dtype == torch.uint8
    assert_close(best, probabilities.amax(0))
    assert_close(probabilities.gather(0, labels.long()[None])[0], best)
    assert torch.equal(SemanticTracker(model).step(frame, output="labels", size=size), labels)


def test_half_precision_and_channels_last_agree():
    model = LSTMICNet(version="v5").eval()
    frame = clip_of(1)[0, 0]
    expected = SemanticTracker(model).step(frame)
    found = SemanticTracker(model, channels_last=True).step(frame)
    assert_close(found, expected, rtol=1e-4, atol=1e-5)
    found = SemanticTracker(model, dtype=torch.bfloat16).step(frame)
    assert found.dtype == torch.float32
    assert (found - expected).abs().mean() < 0.01


@pytest.mark.parametrize("streaming", [False, True])
def test_a_saved_state_goes_on_to_the_bit(streaming):
    model = LSTMICNet(version="v5").eval()
    clip = clip_of(3)[0]
    tracker = SemanticTracker(model, window=2, streaming=streaming)
    for frame in clip[:2]:
        tracker.step(frame)
    file = io.BytesIO()
    torch.save(tracker.state_dict(), file)
    expected = [tracker.step(frame) for frame in clip[2:]]
    file.seek(0)
    other = SemanticTracker(model, window=2, streaming=streaming)
    other.load_state_dict(torch.load(file, weights_only=True))
    for frame, right in zip(clip[2:], expected, strict=True):
        assert torch.equal(other.step(frame), right)


def test_reset_forgets():
    model = LSTMICNet(version="v5").eval()
    clip = clip_of(2)[0]
    tracker = SemanticTracker(model, streaming=True)
    first = tracker.step(clip[0])
    assert not torch.equal(tracker.step(clip[0]), first)
    tracker.reset()
    assert torch.equal(tracker.step(clip[0]), first)
    tracker.reset()
    tracker.step(clip_of(1, (100, 100))[0, 0])  # another video, of another size


def test_wrong_use_of_a_tracker_is_refused():
    tracker = SemanticTracker(LSTMICNet(version="v3"), window=2)
    frame = clip_of(1)[0, 0]
    tracker.step(frame)
    with pytest.raises(ValueError, match="first frame's size"):
        tracker.step(clip_of(1, (100, 100))[0, 0])
    with pytest.raises(ValueError, match="output must be"):
        tracker.step(frame, output="classes")
    with pytest.raises(TypeError, match="frame must be uint8"):
        tracker.step(frame.int())
    with pytest.raises(ValueError, match="window=2, got 3"):
        tracker.load_state_dict(SemanticTracker(tracker.model, window=3).state_dict())
    with pytest.raises(ValueError, match="window must be"):
        SemanticTracker(tracker.model, window=0)
    with pytest.raises(ValueError, match="dtype must be None, float32"):
        SemanticTracker(tracker.model, dtype=torch.int8)
