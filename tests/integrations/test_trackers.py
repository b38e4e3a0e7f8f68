"""Cutie and XMem as trackers: the protocol, the memory budget, and the same masks as without vosops' read."""

from __future__ import annotations

import io
import sys

import pytest
import torch

from tests.integrations.conftest import CHECKOUT, assert_agree
from tests.models.tracker_contract import check_tracker
from vosops.integrations import accelerate
from vosops.integrations.checkouts import MemoryPlan, plan_memory
from vosops.memory import MemoryBudgetError
from vosops.models import create_model
from vosops.models._tracking import most_probable

HEIGHT, WIDTH = 64, 90  # 4 x 6 positions
# Memories that are full, condensed and evicted within a few frames.
LONG_TERM = {
    "max_mem_frames": 5,
    "min_mem_frames": 3,
    "num_prototypes": 16,
    "max_num_tokens": 60,
    "buffer_tokens": 10,
}
CUTIE = {"mem_every": 1, "top_k": 20, "long_term": LONG_TERM}
XMEM = {
    "mem_every": 1,
    "top_k": 20,
    "max_mid_term_frames": 5,
    "min_mid_term_frames": 3,
    "num_prototypes": 16,
    "max_long_term_elements": 64,
}


@pytest.fixture
def xmem(checkout, tmp_path):
    """Makes a tracker on the checkout with seeded weights."""
    import model.network
    import model.resnet

    from vosops.integrations.checkouts import without_pretraining

    torch.manual_seed(0)
    with without_pretraining(model.resnet):
        torch.save(model.network.XMem({}).state_dict(), tmp_path / "XMem.pth")
    made = []

    def make(config=XMEM, **options):
        weights = tmp_path / "XMem.pth"
        made.append(create_model("xmem", weights=weights, checkout=checkout, config=dict(config), **options))
        return made[-1]

    yield make
    for tracker in made:
        tracker.acceleration.undo()


@pytest.fixture
def cutie(cutie_weights):
    """Makes a tracker on the package with seeded weights."""
    made = []

    def make(config=CUTIE, **options):
        made.append(create_model("cutie", weights=cutie_weights, config=config, **options))
        return made[-1]

    yield make
    for tracker in made:
        tracker.acceleration.undo()


@pytest.fixture(params=["xmem", "cutie"])
def make(request):
    return request.getfixturevalue(request.param)


def frame(t):
    return (torch.rand(3, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(t)) * 255).to(torch.uint8)


def labels(*ids):
    """Bands of objects from the top, and background."""
    picture = torch.zeros(HEIGHT, WIDTH, dtype=torch.uint8)
    for n, i in enumerate(ids):
        picture[16 * n : 16 * n + 12, 8:60] = i
    return picture


def test_probabilities(make):
    tracker = make()
    tracker.initialize(frame(0), labels(7, 3))
    assert tracker.object_ids == [3, 7]
    got = tracker.step(frame(1))
    assert got.shape == (3, HEIGHT, WIDTH) and got.dtype == torch.float32 and not got.is_inference()
    torch.testing.assert_close(got.sum(0), torch.ones(HEIGHT, WIDTH))
    tracker.initialize(frame(0), labels(7, 3))
    ids = tracker.step(frame(1).float() / 255, output="labels")
    assert torch.equal(ids, torch.tensor([0, 3, 7], dtype=torch.uint8)[got.argmax(0)])
    tracker.reset()
    assert tracker.object_ids == [] and tracker.memory_bytes() == 0
    with pytest.raises(RuntimeError, match="initialize"):
        tracker.step(frame(1))


def test_the_protocol(make):
    check_tracker(make, [frame(t) for t in range(4)], [labels(7), labels(7), labels(3).flip(0)])


def test_given_labels_are_the_result(make):
    tracker = make()
    tracker.initialize(frame(0), labels(1))
    tracker.step(frame(1))
    got = tracker.step(frame(2), labels(1, 5))
    assert tracker.object_ids == [1, 5]
    assert torch.equal(most_probable(got, tracker.object_ids), labels(1, 5))


def test_unknown_pixels_take_the_prediction(make):
    tracker = make()
    tracker.initialize(frame(0), labels(1))
    predicted = tracker.predict(frame(1), output="labels").long()
    given = labels(1)
    given[40:] = 255
    got = most_probable(tracker.step(frame(1), given), tracker.object_ids)
    assert torch.equal(got[:40], labels(1)[:40])
    assert torch.equal(got[40:].long(), predicted[40:])


def test_objects_come_and_go(make):
    tracker = make()
    tracker.initialize(frame(0), labels(4))
    for t in range(1, 5):
        tracker.step(frame(t))
    tracker.add_objects(frame(4), labels(0, 9))
    assert tracker.object_ids == [4, 9]
    for t in range(5, 8):
        assert tracker.step(frame(t)).shape[0] == 3
    tracker.remove_object(4)
    assert tracker.object_ids == [9]
    got = tracker.step(frame(8))
    assert got.shape[0] == 2
    torch.testing.assert_close(got.sum(0), torch.ones(HEIGHT, WIDTH))
    tracker.remove_object(9)
    assert tracker.step(frame(9)).shape[0] == 1
    tracker.step(frame(10), labels(4))
    assert tracker.step(frame(11)).shape[0] == 2
    with pytest.raises(ValueError, match="object_id must be one of"):
        tracker.remove_object(9)


def test_a_saved_state_goes_on_to_the_bit(make):
    tracker = make()
    tracker.initialize(frame(0), labels(1))
    for t in range(1, 9):
        tracker.step(frame(t), labels(1, 2) if t == 3 else None)
    file = io.BytesIO()
    torch.save(tracker.state_dict(), file)
    state = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    expected = [tracker.step(frame(t)) for t in range(9, 13)]
    tracker.reset()
    for _ in range(2):  # a state can be loaded twice: what runs on from it leaves it alone
        tracker.load_state_dict(state)
        assert all(torch.equal(tracker.step(frame(t)), want) for t, want in zip(range(9, 13), expected))


def test_masks_are_those_of_the_plain_checkout(make):
    """Long-term memory, three groups of objects, eviction."""
    tracker = make()

    def run():
        tracker.initialize(frame(0), labels(1))
        given = {3: labels(1, 2), 6: labels(1, 2, 3)}
        return [tracker.step(frame(t), given.get(t)) for t in range(1, 16)]

    got = run()
    assert any("do_softmax" in name for name in tracker.acceleration.replaced)
    tracker.acceleration.undo()
    assert_agree(run(), got)


def test_memory_stays_within_the_budget_and_constant(make):
    """Objects appear, frames are given: never a byte more than the budget, and no growth once it is full."""
    probe = make()
    probe.initialize(frame(0), labels(1))
    budget = 16 * probe.memory_bytes()
    tracker = make(config={"mem_every": 1}, memory_budget=budget)
    tracker.initialize(frame(0), labels(1))
    used = []
    for t in range(1, 26):
        tracker.step(frame(t), {6: labels(1, 2)}.get(t))
        used.append(tracker.memory_bytes())
        assert used[-1] <= budget
    assert max(used) > 0.5 * budget, "the budget is made use of"
    assert max(used[16:]) <= max(used[:16]) * 1.1


def test_a_budget_that_is_too_small_says_how_much_is_needed(make):
    tracker = make(memory_budget="2kB")
    with pytest.raises(
        MemoryBudgetError, match="budget must be at least [0-9]+ bytes for 1 permanent frames"
    ):
        tracker.initialize(frame(0), labels(1))


def test_the_size_of_the_computation(make):
    tracker = make(size=32)
    tracker.initialize(frame(0), labels(1))
    assert tracker.step(frame(1)).shape == (2, HEIGHT, WIDTH)


def test_plan_of_the_memory():
    default = MemoryPlan(9, 4, 128, 10_000, 2000)
    assert plan_memory(default, 1620, 1, 1000, None) == default
    assert plan_memory(default, 1620, 1, 1000, 10**9) == default
    small = plan_memory(default, 24, 1, 1000, None)
    assert small.prototypes <= (small.work_frames - small.kept_frames) * 24
    for budget in range(5 * 24_000, 40 * 24_000, 11_000):
        plan = plan_memory(default, 24, 2, 1000, budget)
        assert 1000 * (24 * (2 + plan.work_frames) + plan.long_tokens) <= budget
        assert 0 < plan.prototypes + plan.buffer_tokens < plan.long_tokens


def test_errors(xmem, tmp_path):
    with pytest.raises(ValueError, match="weights must be Cutie's file, .*, got None"):
        create_model("cutie")
    with pytest.raises(ValueError, match="weights must be XMem's file, such as XMem.pth, got None"):
        create_model("xmem", checkout=CHECKOUT)
    with pytest.raises(ValueError, match="checkout must be the folder of a clone of XMem, got None"):
        create_model("xmem", weights=tmp_path / "XMem.pth")
    with pytest.raises(ValueError, match="got .*, without model/network.py"):
        create_model("xmem", weights=tmp_path / "XMem.pth", checkout=tmp_path)
    torch.save({"other": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="weights must be XMem's, got .*other.pth"):
        create_model("xmem", weights=tmp_path / "other.pth", checkout=CHECKOUT)
    tracker = xmem()
    with pytest.raises(ValueError, match="at least one object"):
        tracker.initialize(frame(0), labels())
    with pytest.raises(ValueError, match="state must be of model 'xmem'"):
        tracker.load_state_dict({"model": "cutie"})


def test_weights_of_another_model_are_refused(cutie_weights, tmp_path):
    torch.save({"other": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="weights must be Cutie's, got .*other.pth, without"):
        create_model("cutie", weights=tmp_path / "other.pth")


@pytest.fixture
def segment(xmem, checkout, tmp_path, monkeypatch, capsys):
    """Runs `vosops segment` with XMem from the checkout; returns (exit code, what it printed, masks by name)."""
    pytest.importorskip("typer")
    clips = pytest.importorskip("tests.clips")
    from vosops import cli

    boxes = clips.moving(24, ids=(1, 2))
    frames = clips.write_folder(tmp_path / "frames", [clips.picture(b) for b in boxes])
    mask = clips.write_mask(tmp_path / "mask.png", clips.truth(boxes[0]))

    def run(out, *more, budget="1MB"):
        arguments = [frames, "--mask", mask, "--out", tmp_path / out, "--model", "xmem", "--size", -1]
        arguments += ["--weights", tmp_path / "XMem.pth", "--checkout", checkout, "--memory-budget", budget]
        monkeypatch.setattr(sys, "argv", ["vosops", "segment", *map(str, arguments), *more])
        try:
            with pytest.raises(SystemExit) as exit:
                cli.main()
        finally:
            acceleration = accelerated.pop() if accelerated else None
            if acceleration is not None:
                acceleration.undo()
        captured = capsys.readouterr()
        masks = {path.name: path.read_bytes() for path in (tmp_path / out).glob("0*.png")}
        return exit.value.code or 0, captured.out + captured.err, masks

    accelerated = []
    monkeypatch.setattr(
        "vosops.integrations.xmem.accelerate",
        lambda core: accelerated.append(accelerate(core)) or accelerated[-1],
    )
    return run


def test_segment_command(segment, tmp_path):
    pytest.importorskip("PIL")
    code, printed, masks = segment("masks")
    assert code == 0, printed
    assert len(masks) == 24
    names = {path.name for path in (tmp_path / "masks").iterdir()}
    assert {"contact_sheet.png", "report.json"} <= names


def test_segment_command_with_too_small_a_budget(segment, tmp_path):
    code, printed, masks = segment("masks", budget="1kB")
    assert (code, masks) == (1, {})
    assert "--memory-budget is too small at frame 0: budget must be at least" in " ".join(printed.split())
    assert not list((tmp_path / "masks").iterdir()), "the folder can be used at once"
    assert segment("masks")[0] == 0
