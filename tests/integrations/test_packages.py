"""The packages rf-cutie and stcnbuf, as they are installed, with seeded weights."""

from __future__ import annotations

import warnings

import pytest
import torch

from tests.integrations.conftest import assert_agree
from vosops.integrations import accelerate

FRAMES, HEIGHT, WIDTH = 10, 80, 96  # 5 x 6 positions, not fewer than Cutie's top_k of 30
LONG_TERM = {
    "use_long_term": True,
    "mem_every": 1,
    "long_term": {
        "max_mem_frames": 4,
        "min_mem_frames": 2,
        "num_prototypes": 16,
        "max_num_tokens": 50,
        "buffer_tokens": 10,
    },
}
CUTIE_CASES = {
    "long-term memory, objects one by one": {**LONG_TERM, "chunk_size": 1},
    "long-term memory, flip augmentation": {**LONG_TERM, "flip_aug": True},
    "first frames and the latest": {"use_long_term": False, "mem_every": 1, "max_mem_frames": 3},
}


@pytest.fixture(scope="module")
def cutie_core(cutie_weights):
    """Makes inference cores of one network."""
    from cutie.inference.inference_core import InferenceCore
    from cutie.model.cutie import CUTIE
    from cutie.model.utils import resnet

    from vosops.integrations.checkouts import without_pretraining
    from vosops.integrations.cutie import _configuration

    state = torch.load(cutie_weights, weights_only=True)
    with without_pretraining(resnet):
        network = CUTIE(_configuration(state, None)).eval()
    network.load_weights(state)
    return lambda changes: InferenceCore(network, _configuration(state, changes))


@torch.inference_mode()
def run_cutie(core):
    """Two objects, a third one later -> probabilities of each frame, then the content of the memory."""
    generator = torch.Generator().manual_seed(1)
    results = []
    for t in range(FRAMES):
        image, mask, objects = torch.rand(3, HEIGHT, WIDTH, generator=generator), None, None
        if t in (0, 4):
            mask = torch.zeros(HEIGHT, WIDTH, dtype=torch.long)
            mask[:30, :50], mask[40:70, 50:], objects = (1, 2, [1, 2]) if t == 0 else (3, 3, [3])
        results.append(core.step(image, mask, objects))
    memory = core.memory
    for store in [memory.work_mem, *([memory.long_mem] if memory.use_long_term else [])]:
        results += [*store.k.values(), *store.v.values(), *getattr(store, "use_cnt", {}).values()]
    return results


@pytest.mark.parametrize("case", CUTIE_CASES)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_cutie(cutie_core, case):
    core = cutie_core(CUTIE_CASES[case])
    expected = run_cutie(core)
    core = cutie_core(CUTIE_CASES[case])
    with accelerate(core) as acceleration, warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)  # nothing builds an affinity
        got = run_cutie(core)
    assert len(acceleration.replaced) == 2
    if core.memory.use_long_term:
        assert core.memory.long_mem.engaged()
    assert len(core.memory.work_mem.buckets) == 2
    assert_agree(expected, got)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_training_read_of_cutie(cutie_core):
    from cutie.model.utils import memory_utils

    torch.manual_seed(0)
    shapes = ((2, 8, 4, 6), (2, 8, 4, 6), (2, 8, 3, 4, 6), (2, 1, 3, 4, 6), (2, 10, 3, 4, 6))
    query, selection, key, shrinkage, value = leaves = [torch.rand(s, requires_grad=True) for s in shapes]
    weight = torch.randn(2, 10, 4, 6)

    def read():
        out = memory_utils.readout(memory_utils.get_affinity(key, shrinkage, query, selection), value)
        return [out, *torch.autograd.grad((out * weight).sum(), leaves)]

    expected = read()
    with accelerate(cutie_core({}).network), warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        got = read()
    for a, b in zip(expected, got):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("temporary", [False, True])
def test_stcnbuf(temporary):
    """Its bank, through which batches of frames are read by an einsum."""
    bank = pytest.importorskip("stcnbuf.inference_memory_bank", reason="the package stcnbuf is not installed")

    def run():
        torch.manual_seed(0)
        memory, results = bank.MemoryBank(2, top_k=20, memory_size=4), []
        for t in range(12):
            if t:
                results.append(memory.match_memory(torch.randn(3, 16, 5, 7)))
            memory.add_memory(
                torch.randn(16, 5, 7), torch.randn(2, 24, 5, 7), is_temp=temporary and t % 3 != 0
            )
        return results

    expected = run()
    with accelerate("stcnbuf.inference_memory_bank") as acceleration, warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        got = run()
    assert "stcnbuf.inference_memory_bank.MemoryBank._global_matching" in acceleration.replaced
    assert_agree(expected, got)
