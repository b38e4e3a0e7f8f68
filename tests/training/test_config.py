"""Configurations: recipes, files, overrides, and what is said about wrong ones."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("pydantic")
pytest.importorskip("yaml")

from vosops.io.errors import InputError  # noqa: E402
from vosops.models import list_models  # noqa: E402
from vosops.training.config import Clips, Gap, list_recipes, load_config  # noqa: E402

EXAMPLES = Path(__file__).parents[2] / "examples"
SMALL = """
model: unet
steps: 10
data:
  train: [{kind: stills, images: a, masks: b}]
"""


@pytest.fixture
def small(tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text(SMALL)
    return path


def test_every_network_has_a_recipe():
    assert set(list_recipes()) >= {*list_models("mask network"), *list_models("semantic network")}
    for name in list_recipes():
        assert load_config(name).model == name


@pytest.mark.parametrize("file", sorted(EXAMPLES.glob("*.yaml")), ids=lambda file: file.name)
def test_examples_are_configurations(file):
    config = load_config(file)
    assert config.data.held_out.sources and config.model in list_recipes()


def test_an_alias_stands_for_its_model():
    assert load_config("unet++").model == "unetplusplus"


def test_overrides_reach_keys_and_items(small):
    config = load_config(
        small,
        [
            "optimizer.rate=1e-2",
            "data.train.0.weight=2",
            "data.train.1={kind: videos, root: c}",
            "data.clips.crop=[32, 48]",
            "options.num_classes=5",
        ],
    )
    assert config.optimizer.rate == 0.01 and config.options == {"num_classes": 5}
    assert [source.weight for source in config.data.train] == [2, 1]
    assert config.data.clips.size == (32, 48)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.rat=1", r"optimizer\.rat is unknown: did you mean rate\?"),
        ("stepps=1", r"stepps is unknown: did you mean steps\?"),
        ("data.train.0.rooot=x", r"data\.train\.0\.rooot is unknown: did you mean root\?"),
        ("data.held_out.source=[]", r"data\.held_out\.source is unknown: did you mean sources\?"),
        ("steps=0", r"steps: .*greater than or equal to 1, got 0"),
        ("data.train.0.kind=films", r"data\.train\.0\.kind: .*'stills' or 'videos', got 'films'"),
        ("data.train.0.masks=null", "images and masks must be given for stills"),
        ("data.train.3.kind=stills", "'3' must be a number up to 1"),
        ("steps", "--set must be KEY=VALUE, got 'steps'"),
        ("steps.of=3", "'of' is a key of 10, which has none"),
        ("steps=[", "--set steps must be a value in YAML"),
    ],
)
def test_what_cannot_be_is_named(small, override, message):
    with pytest.raises(InputError, match=message):
        load_config(small, [override])


def test_files_and_models_that_there_are_not(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        load_config(tmp_path / "none.yaml")
    with pytest.raises(InputError, match=r"did you mean 'unet'"):
        load_config("unnet")
    (tmp_path / "list.yaml").write_text("[1]")
    with pytest.raises(InputError, match="must hold keys and values, got list"):
        load_config(tmp_path / "list.yaml")
    (tmp_path / "broken.yaml").write_text("a: [")
    with pytest.raises(InputError, match="is not valid YAML"):
        load_config(tmp_path / "broken.yaml")
    with pytest.raises(InputError, match="has no recipe"):
        load_config("propagate")


def test_gaps_grow():
    gap = Gap(first=5, last=25, steps=100)
    assert [gap.at(step) for step in (0, 50, 100, 1000)] == [5, 15, 25, 25]
    assert Gap(last=7).at(0) == 7
    assert Clips(crop=40).size == (40, 40)
