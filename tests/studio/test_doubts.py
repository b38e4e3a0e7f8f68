"""What the page says is to be looked at."""

from vosops.runs.report import FrameRecord
from vosops.studio.doubts import look_at

PIXELS = 10_000


def record(index, area=100, confidence=0.99, number="1"):
    return FrameRecord(index, f"{index:05d}", index / 24, False, {number: area}, {number: confidence})


def records_of(areas):
    return {frame: record(frame, area) for frame, area in enumerate(areas)}


def frames_of(found, kind):
    return [entry["frame"] for entry in found if entry["kind"] == kind]


def test_lost_objects_and_low_confidence_are_to_be_looked_at():
    records = {i: record(i) for i in range(200)}
    records[50] = record(50, confidence=0.4)
    records[51] = record(51, confidence=0.45)  # the same passage
    records[120] = record(120, area=0)
    found = look_at(records, set(), PIXELS)
    assert [entry["frame"] for entry in found] == [120, 50]
    assert found[0] == {"frame": 120, "kind": "lost", "why": "object 1 is lost"}
    assert found[1] == {"frame": 50, "kind": "confidence", "why": "confidence 0.40"}


def test_marked_frames_need_no_look():
    records = {i: record(i, confidence=0.1 if i == 5 else 0.9) for i in range(10)}
    assert look_at(records, set(), PIXELS)[0]["frame"] == 5
    assert all(entry["frame"] != 5 for entry in look_at(records, {5}, PIXELS))
    jump = records_of([100, 100, 300])
    assert look_at(jump, set(), PIXELS)
    assert not look_at(jump, {2}, PIXELS)


def test_an_object_that_suddenly_grows_or_shrinks_is_to_be_looked_at_the_most_sudden_first():
    records = records_of([1000] * 20 + [1600] * 20 + [400] * 20)
    assert look_at(records, set(), PIXELS) == [
        {"frame": 40, "kind": "size", "why": "object 1 is suddenly at 25% of its size"},
        {"frame": 20, "kind": "size", "why": "object 1 is suddenly 1.6 times as large"},
    ]


def test_what_grows_slowly_or_by_a_few_pixels_does_not_jump():
    assert not look_at(records_of([1000, 1490, 2200, 1500, 1010]), set(), PIXELS)
    assert frames_of(look_at(records_of([1000, 1510]), set(), PIXELS), "size") == [1]
    assert not look_at(records_of([4, 13, 4]), set(), PIXELS)
    assert frames_of(look_at(records_of([4, 15]), set(), PIXELS), "size") == [1]


def test_an_object_that_comes_or_is_lost_does_not_jump():
    found = look_at(records_of([1000] * 5 + [0] * 5 + [1000] * 5), set(), PIXELS)
    assert [(entry["frame"], entry["kind"]) for entry in found] == [(5, "lost")]


def test_only_frames_that_follow_each_other_are_compared():
    records = {frame: record(frame, area) for frame, area in ((0, 1000), (1, 1000), (7, 5000), (8, 5000))}
    assert not look_at(records, set(), PIXELS)


def test_a_flickering_object_is_a_few_entries_and_leaves_room_for_others():
    records = records_of([1000, 3000] * 100)
    records[150] = record(150, 1000, confidence=0.3)
    records[151] = record(151, 1000, confidence=0.3)
    found = look_at(records, set(), PIXELS)
    assert len(frames_of(found, "size")) == 6
    assert frames_of(found, "confidence") == [150]
