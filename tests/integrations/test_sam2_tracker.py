"""SAM 2 as a tracker: the protocol, the masks of its own sessions, clicks and boxes, the budget, the command."""

from __future__ import annotations

import io

import pytest
import torch

from tests.integrations.sam2_models import SIDE, SMALL, small_predictor, write_frames
from tests.models.tracker_contract import check_tracker
from vosops.inference.prompts import Prompt
from vosops.integrations import accelerate
from vosops.memory import MemoryBudgetError
from vosops.models import create_model

HEIGHT, WIDTH = 64, 90
CONFIG = {name: value for name, value in SMALL.items() if name != "image_size"}
OPTIONS = {"variant": "t", "image_size": SIDE, "config": CONFIG}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file in the form of the published ones."""
    pytest.importorskip("sam2", reason="the package sam2 is not installed")
    path = tmp_path_factory.mktemp("sam2") / "sam2.1_small.pt"
    torch.save({"model": small_predictor().state_dict()}, path)
    return path


@pytest.fixture
def make(weights):
    made = []

    def make(**options):
        made.append(create_model("sam2", weights, **OPTIONS, **options))
        return made[-1]

    yield make
    for tracker in made:
        tracker.acceleration.undo()


def frame(t, height=HEIGHT, width=WIDTH):
    image = torch.rand(3, height, width, generator=torch.Generator().manual_seed(t))
    return (image * 255).to(torch.uint8)


def labels(*ids):
    """Bands of objects from the top, and background."""
    picture = torch.zeros(HEIGHT, WIDTH, dtype=torch.uint8)
    for n, i in enumerate(ids):
        picture[16 * n : 16 * n + 12, 8:60] = i
    return picture


def test_the_protocol(make):
    check_tracker(make, [frame(t) for t in range(4)], [labels(7), labels(7), labels(3).flip(0)])


def test_objects_come_and_go_and_a_saved_state_goes_on_to_the_bit(make):
    tracker = make()
    tracker.initialize(frame(0), labels(4))
    for t in range(1, 4):
        found = tracker.step(frame(t))
    assert found.shape == (2, HEIGHT, WIDTH)
    torch.testing.assert_close(found.sum(0), torch.ones(HEIGHT, WIDTH))
    tracker.add_objects(frame(3), labels(0, 9))
    tracker.step(frame(4), labels(4, 9, 2))
    assert tracker.object_ids == [4, 9, 2]
    tracker.step(frame(5))
    tracker.remove_object(9)
    assert tracker.step(frame(6)).shape[0] == 3
    file = io.BytesIO()
    torch.save(tracker.state_dict(), file)
    want = [tracker.step(frame(t)) for t in range(7, 9)]
    other = make()
    for one in (other, tracker):
        one.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
        assert all(torch.equal(one.step(frame(t)), w) for t, w in zip(range(7, 9), want))
    for i in (4, 2):
        tracker.remove_object(i)
    assert tracker.step(frame(9)).shape[0] == 1
    tracker.step(frame(10), labels(5))
    assert tracker.step(frame(11)).shape[0] == 2


def test_the_masks_are_those_of_its_own_session(make, tmp_path):
    from PIL import Image

    from vosops.io.pictures import read_frame

    folder = write_frames(tmp_path, 6, SIDE, SIDE)
    given = torch.zeros(SIDE, SIDE, dtype=torch.uint8)
    given[20:80, 30:90] = 1
    tracker = make()
    images = [torch.from_numpy(read_frame(folder / f"{t:05d}.jpg")).permute(2, 0, 1) for t in range(6)]
    assert Image.open(folder / "00000.jpg").size == (SIDE, SIDE)  # neither way has to resize
    tracker.initialize(images[0], given)
    got = [tracker.step(image)[1] for image in images[1:]]
    tracker.acceleration.undo()
    with torch.inference_mode():
        state = tracker.network.init_state(str(folder))
        tracker.network.add_new_mask(state, 0, 1, given == 1)
        state["num_frames"] = 100  # shorter videos than 16 frames count the ages of pointers in larger steps
        want = [logits[0, 0].sigmoid() for *_, logits in tracker.network.propagate_in_video(state, 0, 5)]
    for a, b in zip(want[1:], got):
        torch.testing.assert_close(b, a.clone(), rtol=0, atol=1e-4)


def test_memory_stays_within_the_budget(make):
    probe = make()
    probe.initialize(frame(0), labels(1))
    probe.step(frame(1))
    budget = 20 * probe.memory_bytes() // 2
    tracker = make(memory_budget=budget)
    tracker.initialize(frame(0), labels(1))
    used = []
    for t in range(1, 26):
        tracker.step(frame(t % 3))
        used.append(tracker.memory_bytes())
    assert 0.5 * budget < max(used) <= budget
    assert len(set(used[-4:])) == 1
    with pytest.raises(MemoryBudgetError, match="budget must be at least [0-9]+ bytes for the 1 frames"):
        make(memory_budget="2kB").initialize(frame(0), labels(1))


def test_clicks_and_boxes(make):
    tracker = make()
    tracker.initialize(frame(0), labels(1))
    before = tracker.step(frame(1))
    prompts = {
        3: Prompt(points=((30.0, 20.0, True), (80.0, 60.0, False))),
        5: Prompt(box=(4.0, 4.0, 50.0, 40.0)),
    }
    found = tracker.labels_of_prompts(frame(0), prompts)
    assert found.shape == (HEIGHT, WIDTH) and found.dtype == torch.uint8
    assert {3, 5} & set(found.unique().tolist())
    other = make()
    other.initialize(frame(0), labels(1))
    assert torch.equal(other.step(frame(1)), before)
    assert torch.equal(tracker.step(frame(2)), other.step(frame(2)))  # it stayed as it was


def test_errors(weights, tmp_path):
    with pytest.raises(ValueError, match="weights must be SAM 2's file, .*, got None"):
        create_model("sam2")
    with pytest.raises(ValueError, match=r"variant must be one of t, s, b\+, l for weights of 16 channels"):
        create_model("sam2", weights)
    with pytest.raises(ValueError, match="variant must be one of t, s, b.*, got 'x'"):
        create_model("sam2", weights, variant="x")
    with pytest.raises(ValueError, match="image_size must be a multiple of 32, got 100"):
        create_model("sam2", weights, image_size=100)
    with pytest.raises(ValueError, match="weights must be those of SAM2VideoPredictor, got .* 1 misshapen"):
        create_model("sam2", weights, variant="t", image_size=SIDE, config={"num_maskmem": 3, **CONFIG})
    torch.save({"other": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="weights must be SAM 2's, got .*other.pth, without"):
        create_model("sam2", tmp_path / "other.pth")


@pytest.fixture
def segment(weights, tmp_path, monkeypatch, capsys):
    """Runs `vosops segment --model sam2`; returns (exit code, what it printed, masks by name)."""
    pytest.importorskip("typer")
    clips = pytest.importorskip("tests.clips")
    from tests.cli.commands import run_command

    boxes = clips.moving(6)
    frames = clips.write_folder(tmp_path / "frames", [clips.picture(b) for b in boxes])
    accelerated = []
    monkeypatch.setattr(
        "vosops.integrations.sam2.accelerate",
        lambda core: accelerated.append(accelerate(core)) or accelerated[-1],
    )

    def run(out, *more, model="sam2"):
        arguments = [frames, "--out", tmp_path / out, "--model", model, "--size", -1, *more]
        if model == "sam2":
            arguments += ["--weights", weights, "--option", "variant=t", "--option", f"image_size={SIDE}"]
            arguments += ["--option", f"config={CONFIG}"]
        try:
            code, printed = run_command(monkeypatch, capsys, "segment", *arguments)
        finally:
            while accelerated:
                accelerated.pop().undo()
        masks = {path.name: path.read_bytes() for path in (tmp_path / out).glob("0*.png")}
        return code, " ".join(printed.split()), masks

    return run


def test_segment_command(segment, monkeypatch, tmp_path):
    from tests.cli.commands import stop_after

    marks = ("--points", "1:9,8", "--points", "1:60,40,0", "--box", "2:2,2,40,40")
    code, printed, masks = segment("masks", *marks)
    assert code == 0, printed
    assert len(masks) == 6
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        assert segment("resumed", *marks)[0] != 0
    code, printed, resumed = segment("resumed", *marks, "--resume")
    assert code == 0, printed
    assert resumed == masks


@pytest.mark.parametrize(
    "marks, error",
    [
        (("--points", "1:9"), "--points must be ID:X,Y or ID:X,Y,0, got 1:9"),
        (("--points", "1:9,8,2"), "--points must end with 1 .* or 0 .*, got 1:9,8,2"),
        (("--points", "1:9,8,0"), "--points of object 1 must include one on the object"),
        (("--points", "300:9,8"), "--points must have an ID from 1 to 254, got 300:9,8"),
        (("--box", "1:9,8,3,9"), "--box must have LEFT < RIGHT and TOP < BOTTOM"),
        (("--box", "1:1,1,3,9", "--box", "1:1,1,3,8"), "--box of object 1 is given twice"),
        (("--points", "1:900,8"), "the prompt of object 1 must be inside the frame of 64x48, got 900,8"),
        (
            ("--points", "1:9,8", "--init", "hrnet_w48:car"),
            "--init cannot be combined with --points or --box",
        ),
    ],
)
def test_marks_that_cannot_be(segment, marks, error):
    import re

    code, printed, masks = segment("masks", *marks)
    assert (code, masks) != (0, {}) and not masks
    assert re.search(error, printed), printed


def test_marks_need_a_model_that_takes_them(segment):
    code, printed, _ = segment("masks", "--points", "1:9,8", model="propagate")
    assert code != 0 and "--points and --box cannot be used with --model propagate: choose sam2" in printed
