"""Names that changed: they work for one more release, and say what to write in their place."""

import importlib
import warnings

import pytest

import vosops.inference

MOVED = {
    "io": "coco datasets files frames masks picture_stack resize rle streams video video_writer",
    "runs": "checkpoint drawing drawing_pass job progress report run",
}


@pytest.mark.parametrize(
    ("room", "name"), [(room, name) for room, names in MOVED.items() for name in names.split()]
)
def test_a_module_that_moved(room, name):
    old, new = f"vosops.inference.{name}", importlib.import_module(f"vosops.{room}.{name}")
    module = importlib.import_module(old)
    assert getattr(vosops.inference, name) is module
    public = next(n for n, value in vars(new).items() if getattr(value, "__module__", "") == new.__name__)
    with pytest.warns(DeprecationWarning) as caught:
        assert getattr(module, public) is getattr(new, public)
    [warning] = caught
    assert str(warning.message) == f"{old}.{public} is deprecated, use vosops.{room}.{name}.{public}"
    assert warning.filename == __file__


def test_statements_that_import_from_a_module_that_moved():
    with pytest.warns(DeprecationWarning, match=r"frames\.ArraySource is deprecated, use vosops\.io\.frames"):
        from vosops.inference.frames import ArraySource
    import vosops.inference.frames as frames

    from vosops.io.frames import ArraySource as moved

    assert ArraySource is moved
    with pytest.warns(DeprecationWarning):
        assert frames.ArraySource is moved
    with pytest.raises(ImportError, match="cannot import name 'Nothing' from 'vosops.inference.frames'"):
        from vosops.inference.frames import Nothing  # noqa: F401


def test_who_looks_at_every_module_is_not_warned():
    module = vosops.inference.frames
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not hasattr(module, "__file__") and not hasattr(module, "__warningregistry__")
