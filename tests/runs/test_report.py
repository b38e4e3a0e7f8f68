"""The record of a run and its report."""

import json

import pytest

from vosops.runs.report import Events, FrameRecord, Record, write_report


def record(index, **areas):
    objects = {name[1:]: area for name, area in areas.items()}
    confidences = {i: 0.9 - index / 100 for i in objects}
    return FrameRecord(index, f"{index:05d}", index / 24, index == 0, objects, confidences)


class TestReport:
    def test_lost_and_returned(self):
        events = Events({"2": 1000})
        for index, area in enumerate([1000, 500, 10, 9, 0, 0, 11, 300, 0]):
            events.add(record(index, o2=area))
        assert [e["text"] for e in events.found] == [
            "object 2 lost at frame 3",
            "object 2 returned at frame 6",
            "object 2 lost at frame 8",
        ]

    def test_an_object_that_was_never_seen_is_not_lost(self):
        events = Events({"1": 10})
        events.add(record(0, o1=0))
        events.add(record(1, o1=20))
        assert events.found == []

    def test_frames_are_in_input_order_whatever_the_order_of_computation(self, tmp_path):
        frames = Record(tmp_path / "frames.jsonl")
        for index in (3, 4, 2, 1, 0):
            frames.append(record(index, o7=100 * (index != 1)))
        texts = write_report(tmp_path / "report.json", frames, {7: 100}, {"complete": True})
        report = json.loads((tmp_path / "report.json").read_text())
        assert [f["frame"] for f in report["frames"]] == [0, 1, 2, 3, 4]
        assert report["frames"][3]["objects"] == {"7": {"area": 100, "confidence": pytest.approx(0.87)}}
        assert texts == ["object 7 lost at frame 1", "object 7 returned at frame 2"]
        assert report["complete"] is True
        summary = report["objects"]["7"]
        assert summary["frames_visible"] == 4
        assert summary["mean_area"] == 100
        assert summary["least_confident_frames"][0]["frame"] == 4

    def test_a_record_can_be_cut_back(self, tmp_path):
        frames = Record(tmp_path / "frames.jsonl")
        frames.append(record(0, o1=1))
        size = frames.size
        frames.append(record(1, o1=1))
        frames.cut(size)
        assert frames.names() == [(0, "00000")]
