"""accelerate: a checkout of XMem's kind reads by vosops after one call, and by itself again after undo."""

from __future__ import annotations

import sys
import types
import warnings
from contextlib import nullcontext

import pytest
import torch

from tests.integrations.conftest import assert_agree
from vosops.integrations import Acceleration, accelerate
from vosops.integrations import affinity as affinity_module

CONFIG = {
    "mem_every": 2,
    "top_k": 20,
    "enable_long_term": True,
    "max_mid_term_frames": 5,
    "min_mid_term_frames": 3,
    "num_prototypes": 16,
    "max_long_term_elements": 64,
}
FRAMES, HEIGHT, WIDTH = 30, 64, 96
APPEARING = {0: 1, 7: 2, 13: 3}  # frame -> objects known from there on: three groups


@pytest.fixture
def core(checkout, monkeypatch):
    """An inference core of the checkout with a seeded network."""
    import model.resnet

    for name in ("resnet18", "resnet50"):
        original = getattr(model.resnet, name)
        monkeypatch.setattr(
            model.resnet, name, lambda pretrained, f=original, **options: f(pretrained=False, **options)
        )
    from inference.inference_core import InferenceCore
    from model.network import XMem

    torch.manual_seed(0)
    return InferenceCore(XMem(dict(CONFIG)).eval(), dict(CONFIG))


@torch.inference_mode()
def run(core, frames=FRAMES, long_term=True) -> list[torch.Tensor]:
    """All probabilities and the memory's content at the end."""
    core.config["enable_long_term"] = long_term
    core.clear_memory()
    generator = torch.Generator().manual_seed(1)
    results = []
    for t in range(frames):
        image, mask = torch.rand(3, HEIGHT, WIDTH, generator=generator), None
        if t in APPEARING:
            labels = list(range(1, APPEARING[t] + 1))
            core.set_all_labels(labels)
            mask = torch.stack(
                [(torch.arange(HEIGHT)[:, None] // 16 == i).repeat(1, WIDTH) for i in labels]
            ).float()
            results.append(core.step(image, mask, labels))
        else:
            results.append(core.step(image))
    memory = core.memory
    for store in (memory.work_mem, memory.long_mem):
        results += [x for x in (store.k, store.s, store.use_count, *store.v) if x is not None]
    return results


@pytest.mark.parametrize("long_term", [True, False])
def test_outputs_agree_with_object_groups(core, long_term):
    expected = run(core, long_term=long_term)
    with accelerate(core), warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing builds an affinity
        got = run(core, long_term=long_term)
    assert (core.memory.long_mem.size > 0) == long_term
    assert_agree(expected, got)


def test_every_namespace_gets_the_replacements(core):
    import inference.memory_manager
    import model.memory_util
    import model.network

    namespaces = (inference.memory_manager, model.memory_util, model.network)
    originals = [(n.get_similarity, n.do_softmax) for n in namespaces]
    acceleration = accelerate(core)
    assert isinstance(acceleration, Acceleration)
    assert acceleration.replaced == ["model.memory_util.get_similarity", "model.memory_util.do_softmax"]
    accelerated = {(n.get_similarity, n.do_softmax) for n in namespaces}
    assert len(accelerated) == 1 and accelerated.isdisjoint(originals)
    late = types.ModuleType("late")  # imported while accelerated
    late.do_softmax = model.memory_util.do_softmax
    sys.modules["late"] = late
    try:
        acceleration.undo()
        acceleration.undo()
        assert [(n.get_similarity, n.do_softmax) for n in namespaces] == originals
        assert late.do_softmax is originals[0][1]
    finally:
        del sys.modules["late"]


@pytest.mark.parametrize(
    "target",
    [
        lambda core: core,
        lambda core: core.network,
        lambda core: core.memory,
        lambda core: type(core),
        lambda core: torch.nn.DataParallel(core.network),
        lambda core: types.SimpleNamespace(core=core),
        lambda core: "inference.memory_manager",
        lambda core: sys.modules["model.memory_util"],
    ],
)
def test_targets(core, target):
    with accelerate(target(core)) as acceleration:
        assert len(acceleration.replaced) == 2


def test_undone_by_an_error(core):
    import model.memory_util

    original = model.memory_util.do_softmax
    with pytest.raises(KeyError), accelerate(core):
        raise KeyError
    assert model.memory_util.do_softmax is original


def test_accelerating_twice_changes_nothing_and_undoes_nothing(core):
    import model.memory_util

    with accelerate(core) as outer:
        with accelerate(core.network) as inner:
            assert inner.replaced == []
        assert len(outer.replaced) == 2
        assert hasattr(model.memory_util.do_softmax, "_vosops_original")


def test_training_read(core):
    """The read of whole clips, with gradients of everything."""
    torch.manual_seed(2)
    shapes = ((2, 8, 4, 6), (2, 8, 4, 6), (2, 8, 3, 4, 6), (2, 1, 3, 4, 6), (2, 2, 16, 3, 4, 6))
    leaves = [torch.rand(shape, requires_grad=True) for shape in shapes]
    weight = torch.randn(2, 2, 16, 4, 6)

    def read():
        out = core.network.read_memory(*leaves)
        return [out, *torch.autograd.grad((out * weight).sum(), leaves)]

    expected = read()
    with accelerate(core.network), warnings.catch_warnings():
        warnings.simplefilter("error")
        got = read()
    for a, b in zip(expected, got):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5)


def test_a_memory_smaller_than_top_k_is_read_whole(core):
    core.config["top_k"] = 1000
    with pytest.raises(RuntimeError, match="out of range"):
        run(core, frames=3)
    with accelerate(core):
        run(core, frames=3)


def test_a_fork_that_looks_at_the_affinity_still_works(core, monkeypatch):
    monkeypatch.setattr(affinity_module, "_warned", set())
    import inference.memory_manager as manager

    match_memory = manager.MemoryManager.match_memory

    def forked(self, key, selection):
        scores = manager.get_similarity(self.work_mem.k, self.work_mem.s, key, selection)
        self.best = scores.max(1).values
        return match_memory(self, key, selection)

    monkeypatch.setattr(manager.MemoryManager, "match_memory", forked)
    expected = [*run(core, frames=6), core.memory.best]
    with accelerate(core), pytest.warns(RuntimeWarning, match="max on an accelerated affinity") as caught:
        got = [*run(core, frames=6), core.memory.best]
    assert len(caught) == 1
    assert_agree(expected, got)


@pytest.mark.filterwarnings("ignore:.*builds it")
def test_a_fork_that_edits_the_scores_gets_its_edits(core, monkeypatch):
    import inference.memory_manager as manager

    get_similarity = manager.get_similarity

    def forked(*args):
        scores = manager.memory_util_similarity(*args)
        scores[:, : scores.shape[1] // 2] -= 2
        scores[:, -3:].mul_(0.5)
        return scores

    monkeypatch.setattr(manager, "memory_util_similarity", get_similarity, raising=False)
    monkeypatch.setattr(manager, "get_similarity", forked)
    expected = run(core, frames=6)
    with accelerate(core):
        assert manager.memory_util_similarity is not get_similarity
        assert_agree(expected, run(core, frames=6))


@pytest.mark.filterwarnings("ignore")  # of torch.compile, about what breaks the graph
def test_compiled_callers_get_the_replacements_and_the_originals_back(core):
    import model.memory_util as util

    def read(mk, ms, qk, qe, mv):
        affinity, usage = util.do_softmax(util.get_similarity(mk, ms, qk, qe), top_k=3, return_usage=True)
        return mv @ affinity, usage

    torch._dynamo.reset()
    compiled = torch.compile(read, backend="aot_eager")
    inputs = [
        torch.rand(1, 4, 20),
        torch.rand(1, 1, 20),
        torch.rand(1, 4, 6),
        torch.rand(1, 4, 6),
        torch.rand(3, 5, 20),
    ]
    expected = read(*inputs)
    for context in (nullcontext, lambda: accelerate(core), nullcontext):
        with context():
            for a, b in zip(expected, compiled(*inputs)):
                torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def test_a_fork_with_other_maths_is_refused(core, monkeypatch):
    import model.memory_util

    original = model.memory_util.get_similarity

    def get_similarity(mk, ms, qk, qe):
        return 2 * original(mk, ms, qk, qe)

    get_similarity.__module__ = "model.memory_util"
    monkeypatch.setattr(model.memory_util, "get_similarity", get_similarity)
    softmax = model.memory_util.do_softmax
    with pytest.raises(ValueError, match="get_similarity does not compute the same as"):
        accelerate(core)
    assert model.memory_util.do_softmax is softmax, "all or nothing"


@pytest.mark.parametrize("target", [torch, torch.nn.Linear(2, 2), "json", 3])
def test_nothing_to_replace(target):
    with pytest.raises(ValueError, match="nothing to replace"):
        accelerate(target)
