"""The registry: what a line must hold, who may join, and what is imported when."""

from __future__ import annotations

import importlib
import sys

import pytest
import torch
from torch import nn

from tests.clips import ColourTracker
from tests.forked import run_after_torch
from vosops import models
from vosops.models import (
    FrameNetwork,
    ModelEntry,
    create_model,
    find_model,
    list_models,
    register_model,
    registry,
)

pytestmark = pytest.mark.usefixtures("own_registry")


class Small(FrameNetwork):
    def __init__(self, num_classes: int, *, width: int = 2) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.layer = nn.Conv2d(3, num_classes, 1)

    def forward(self, images):
        return self.layer(images)


def entry(**changes) -> ModelEntry:
    line = {"name": "small", "factory": Small, "kind": "semantic network", "summary": "one convolution"}
    return ModelEntry(**{**line, **changes})


class TestBuiltIn:
    def test_every_kind_is_listed_and_together_they_are_all(self):
        kinds = ["tracker", "mask network", "semantic network"]
        assert [len(list_models(kind)) > 1 for kind in kinds] == [True] * 3
        assert sorted(name for kind in kinds for name in list_models(kind)) == list_models()
        with pytest.raises(ValueError, match="kind must be one of tracker, mask network.*, got 'network'"):
            list_models("network")

    @pytest.mark.parametrize("name", list_models())
    def test_every_line_leads_to_what_it_says(self, name):
        model = find_model(name)
        made = model.load()
        assert made.__name__ in models.__all__ and getattr(models, made.__name__) is made
        if model.kind == "tracker":
            methods = {name for name in vars(models.VideoTracker) if not name.startswith("_")} - {
                "object_ids"
            }
            assert not [method for method in methods if not hasattr(made, method)]
            assert model.takes("memory_budget")
        else:
            base = models.Network if model.kind == "mask network" else models.SemanticNetwork
            assert issubclass(made, base)
        assert set(model.defaults) <= set(model.options)

    def test_nothing_is_imported_before_it_is_asked_for(self):
        code = """
import sys
import vosops.models
from vosops.models import find_model, list_models
list_models(), find_model("stm"), vosops.models.register_model
heavy = [name for name in list_models() if find_model(name).target.split(":")[0] in sys.modules]
print(heavy, [name for name in ("torchvision", "timm", "vosops.inference", "cutie") if name in sys.modules])
assert vosops.models.STM is vosops.models.stm.STM and "vosops.models.rgmp" not in sys.modules
"""
        result = run_after_torch(code)
        assert result.returncode == 0, result.stderr
        assert result.stdout == "[] []\n"

    def test_names_that_do_not_exist(self):
        with pytest.raises(AttributeError, match=r"module 'vosops\.models' has no attribute 'Nothing'"):
            models.Nothing  # noqa: B018
        assert set(dir(models)) == set(models.__all__)


class TestFinding:
    def test_an_unknown_name_is_answered_by_the_nearest(self):
        with pytest.raises(
            ValueError, match=r"must be one of cutie, .*, got 'lstm_icnett': did you mean 'lstm_icnet'"
        ):
            find_model("lstm_icnett")
        with pytest.raises(ValueError, match="got 'zzz'$"):
            find_model("zzz")

    def test_aliases_lead_to_the_model(self):
        register_model("small", Small, kind="semantic network", summary="one", aliases=("small+", "s"))
        assert find_model("small+") is find_model("s") is find_model("small")
        assert "small+" not in list_models()


class TestRegistering:
    def test_by_decorator_by_call_and_by_name_of_a_module(self):
        decorate = register_model("decorated", kind="semantic network", summary="one")
        assert decorate(Small) is Small
        called = register_model("called", Small, kind="semantic network", summary="one")
        named = register_model("named", f"{__name__}:Small", kind="semantic network", summary="one")
        assert called.load() is named.load() is Small
        assert [create_model(n, num_classes=2).num_classes for n in ("decorated", "called", "named")] == [
            2
        ] * 3

    def test_a_function_may_make_it(self):
        @register_model("wide", kind="semantic network", summary="one")
        def wide(num_classes=3, **options):
            return Small(num_classes, width=8, **options)

        assert create_model("wide").num_classes == 3
        with pytest.raises(TypeError, match="unexpected keyword argument 'depth'"):
            create_model("wide", depth=3)

    def test_a_name_belongs_to_one_model(self):
        with pytest.raises(
            ValueError, match=r"name must be new, got 'stm', which is vosops\.models\.stm:STM"
        ):
            register_model("stm", Small, kind="semantic network", summary="one")
        with pytest.raises(ValueError, match="name must be new, got 'rgmp'"):
            register_model("small", Small, kind="semantic network", summary="one", aliases=("rgmp",))
        assert "small" not in list_models() and find_model("rgmp").name == "rgmp"

    def test_the_same_again_takes_its_own_place(self):
        register_model("small", Small, kind="semantic network", summary="first")
        register_model("small", Small, kind="semantic network", summary="second")
        assert find_model("small").summary == "second"

    @pytest.mark.parametrize(
        ("changes", "error", "message"),
        [
            ({"name": "u-net"}, ValueError, "name must be an identifier, got 'u-net'"),
            ({"kind": "network"}, ValueError, "kind must be one of tracker, mask network, .*, got 'network'"),
            ({"weights": "yes"}, ValueError, "weights must be one of required, optional, none, got 'yes'"),
            (
                {"factory": "vosops.models.stm"},
                ValueError,
                "factory must be a callable or 'module:attribute'",
            ),
            ({"factory": 3}, TypeError, "factory must be a callable or 'module:attribute', got 3"),
            ({"summary": ""}, ValueError, "summary must be one line of text, got ''"),
            ({"summary": "two\nlines"}, ValueError, "summary must be one line of text"),
        ],
    )
    def test_what_a_line_must_hold(self, changes, error, message):
        with pytest.raises(error, match=message):
            entry(**changes)

    def test_entry_points_of_other_packages(self, tmp_path, monkeypatch):
        (tmp_path / "some_package.py").write_text(
            "from vosops.models import register_model\n"
            "register_model('theirs', 'nowhere:Nothing', kind='mask network', summary='not imported')\n"
        )
        info = tmp_path / "some_package-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: some-package\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(
            f"[{registry.ENTRY_POINTS}]\nfine = some_package\nbroken = no_such_package\n"
        )
        monkeypatch.syspath_prepend(tmp_path)
        registry._load_entry_points.cache_clear()
        with pytest.warns(
            UserWarning, match=r"models of no_such_package cannot be registered \(ModuleNotFound"
        ):
            assert "theirs" in list_models()
        assert find_model("theirs").target == "nowhere:Nothing"


class TestCreating:
    def test_options_are_those_of_the_model(self):
        register_model("small", Small, kind="semantic network", summary="one")
        assert find_model("small").options == ("num_classes", "width")
        assert find_model("small").defaults == {"width": 2}
        assert find_model("xmem").options == ("checkout", "config", "size", "memory_budget")
        with pytest.raises(TypeError, match="options of small must be among num_classes, width, got depth"):
            create_model("small", num_classes=2, depth=3)

    @pytest.mark.parametrize("kind", ["tracker", "mask network", "semantic network"])
    def test_what_is_made_must_be_of_its_kind(self, kind):
        @register_model("wrong", kind=kind, summary="one")
        def wrong(**options):
            return nn.Linear(1, 1)

        with pytest.raises(TypeError, match=f"factory of wrong must make a {kind}, got Linear"):
            create_model("wrong")

    def test_a_tracker_gets_weights_and_device(self, tmp_path):
        @register_model("colours", kind="tracker", summary="follows colours")
        def colours(weights, device, drift=0.0):
            tracker = ColourTracker()
            tracker.given = (weights, device, drift)
            return tracker

        assert create_model("colours", "file", device="cpu", drift=1.0).given == ("file", "cpu", 1.0)

    def test_a_network_that_takes_no_weights(self, tmp_path):
        register_model("small", Small, kind="semantic network", summary="one", weights="none")
        with pytest.raises(ValueError, match=r"weights must be None: small takes none, got w\.pth"):
            create_model("small", "w.pth", num_classes=2)

    def test_random_weights_are_the_same_and_the_callers_generator_is_left_alone(self):
        register_model("small", Small, kind="semantic network", summary="one")
        torch.manual_seed(1)
        expected = torch.rand(1)
        torch.manual_seed(1)
        one = create_model("small", num_classes=2)
        assert torch.equal(torch.rand(1), expected)
        assert torch.equal(one.layer.weight, create_model("small", num_classes=2).layer.weight)

    def test_a_missing_package_is_known_without_importing(self):
        assert entry(package="no_such_package").missing_package == "no_such_package"
        assert entry(package="torch").missing_package == entry().missing_package == ""


def test_names_of_the_last_release():
    with pytest.warns(DeprecationWarning, match=r"tracks_by_itself is deprecated, use find_model"):
        assert models.tracks_by_itself("xmem") and not models.tracks_by_itself("stm")
    sys.modules.pop("vosops.models.semantic", None)
    with pytest.warns(
        DeprecationWarning, match=r"vosops\.models\.semantic is deprecated, use vosops\.models\.Sem"
    ):
        assert importlib.import_module("vosops.models.semantic").SemanticNetwork is models.SemanticNetwork
    with pytest.warns(DeprecationWarning, match=r"follows_objects is deprecated, use find_model"):
        assert models.follows_objects("stm") and not models.follows_objects("rfcn")
