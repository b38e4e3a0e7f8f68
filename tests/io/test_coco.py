"""Masks as COCO JSON."""

import json
from dataclasses import dataclass

import numpy as np

from tests.clips import truth
from tests.io.test_rle import decode
from vosops.io.coco import CocoFile

LABELS = truth({1: (4, 4, 20, 20), 2: (26, 30, 10, 30)})


@dataclass(frozen=True)
class Frame:
    index: int
    name: str
    confidences: dict


def test_coco(tmp_path):
    CocoFile(tmp_path / "m.json", LABELS.shape, [2, 1]).write(
        [
            (Frame(0, "00000", {"1": 0.9, "2": 0.8}), LABELS),
            (Frame(1, "00001", {"1": 0.7, "2": 0.7}), LABELS * 0),
        ]
    )
    data = json.loads((tmp_path / "m.json").read_text())
    assert [c["id"] for c in data["categories"]] == [1, 2]
    assert [i["file_name"] for i in data["images"]] == ["00000.png", "00001.png"]
    assert [(a["image_id"], a["category_id"], a["area"]) for a in data["annotations"]] == [
        (0, 1, 400),
        (0, 2, 300),
    ]
    for annotation in data["annotations"]:
        mask = decode(annotation["segmentation"])
        np.testing.assert_array_equal(mask, annotation["category_id"] == LABELS)
    assert data["annotations"][1]["bbox"] == [30, 26, 30, 10]
    assert [a["score"] for a in data["annotations"]] == [0.9, 0.8]
