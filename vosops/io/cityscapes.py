"""The classes of Cityscapes: their names, colours and two numberings."""

from typing import NamedTuple


class CityscapesClass(NamedTuple):
    """One of the classes that are trained and scored; its place in `CITYSCAPES` is its train id."""

    label_id: int
    """Its number in `*_labelIds.png`."""
    colour: tuple[int, int, int]


CITYSCAPES = {
    "road": CityscapesClass(7, (128, 64, 128)),
    "sidewalk": CityscapesClass(8, (244, 35, 232)),
    "building": CityscapesClass(11, (70, 70, 70)),
    "wall": CityscapesClass(12, (102, 102, 156)),
    "fence": CityscapesClass(13, (190, 153, 153)),
    "pole": CityscapesClass(17, (153, 153, 153)),
    "traffic light": CityscapesClass(19, (250, 170, 30)),
    "traffic sign": CityscapesClass(20, (220, 220, 0)),
    "vegetation": CityscapesClass(21, (107, 142, 35)),
    "terrain": CityscapesClass(22, (152, 251, 152)),
    "sky": CityscapesClass(23, (70, 130, 180)),
    "person": CityscapesClass(24, (220, 20, 60)),
    "rider": CityscapesClass(25, (255, 0, 0)),
    "car": CityscapesClass(26, (0, 0, 142)),
    "truck": CityscapesClass(27, (0, 0, 70)),
    "bus": CityscapesClass(28, (0, 60, 100)),
    "train": CityscapesClass(31, (0, 80, 100)),
    "motorcycle": CityscapesClass(32, (0, 0, 230)),
    "bicycle": CityscapesClass(33, (119, 11, 32)),
}

LAST_LABEL_ID = 33
"""Label ids go from 0 to this; those of no class here are not scored, nor is 255, the license plate."""
