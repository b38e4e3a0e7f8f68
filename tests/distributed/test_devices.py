"""What a group with NCCL alone is given: tensors on the GPU, in collectives that NCCL has.

There is no GPU here: the tensors pretend to be on one, and of the two ranks one is the echo of the other, so that the
memory is read twice as long and says the same.
"""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

import vosops
from tests.distributed.pretend import Devices, OnGpu, on_gpu
from vosops.distributed import Exchange, RankError, ShardedMemoryBank, global_matching, memory_read

fake = pytest.importorskip("torch.testing._internal.distributed.fake_pg")
NOT_OF_NCCL_HERE = ("isend", "irecv", "send", "recv", "all_gather_object", "broadcast_object_list", "gather")
PIXELS = 12
HALF = PIXELS // 2


class Done:
    def wait(self, *_):
        return True

    def is_completed(self):
        return True


@pytest.fixture
def used(monkeypatch):
    """The names of the collectives that are called, in a group of two ranks with a backend for the GPU alone."""
    names = set()

    def spy(name, act):
        def call(*tensors, group=None, async_op=False):
            assert async_op
            names.add(name)
            flat = [t for each in tensors for t in (each if isinstance(each, list) else [each])]
            wrong = [t for t in flat if isinstance(t, torch.Tensor) and not isinstance(t, OnGpu)]
            assert not wrong, f"{name} got a tensor of the CPU"
            act(*tensors)
            return Done()

        monkeypatch.setattr(dist, name, call)

    def all_gather(taken, given):
        for each in taken:
            each.copy_(given)

    spy("all_gather", all_gather)
    spy(
        "all_to_all_single", lambda taken, given: taken.copy_(given.view(2, -1)[:1].expand(2, -1).reshape(-1))
    )
    spy("broadcast", lambda tensor, source: None)
    monkeypatch.setattr(dist, "barrier", lambda group, async_op: names.add("barrier") or Done())
    for name in NOT_OF_NCCL_HERE:
        monkeypatch.setattr(dist, name, lambda *_, _name=name, **__: pytest.fail(f"{_name} was called"))
    dist.init_process_group("cuda:fake", store=fake.FakeStore(), rank=0, world_size=2)
    try:
        with Devices(), vosops.use_backend("reference"):
            yield names
    finally:
        dist.destroy_process_group()


def rand(*shape):
    return on_gpu(torch.randn(*shape))


def test_the_group_serves_the_gpu_alone(used):
    exchange = Exchange()
    assert exchange.size == 2 and exchange._speaks("cuda") and not exchange._speaks("cpu")
    assert exchange.numbers([3, 5], torch.device("cuda", 0)) == [[3, 5]] * 2
    exchange.check()
    assert used == {"all_gather", "barrier"}


@pytest.mark.parametrize("top_k", [None, 4])
def test_a_read(used, top_k):
    query, key, value = rand(1, 8, PIXELS), rand(1, 8, 10), rand(1, 2, 3, 10)
    out, usage, lse = memory_read(query, key, value, top_k=top_k, return_usage=True, return_lse=True)
    assert all(isinstance(each, OnGpu) for each in (out, usage, lse))
    assert used == {"all_gather", "all_to_all_single"}
    whole = vosops.memory_read(query, key, value, top_k=None if top_k is None else top_k // 2)
    torch.testing.assert_close(out[..., :HALF], whole[..., :HALF])  # the first rank's slice of the pixels


def test_a_query_of_one_rank(used):
    memory_read(rand(1, 8, PIXELS), rand(1, 8, 10), rand(1, 3, 10), query_from=0)
    assert used == {"all_gather", "all_to_all_single", "broadcast"}


def test_the_sum_of_gradients(used):
    given = rand(1, 8, 3, 4)
    summed = Exchange().sum(given)
    torch.testing.assert_close(summed.flatten()[:48], 2 * given.flatten()[:48])
    assert used == {"all_gather", "all_to_all_single"}


def test_matching(used):
    query, key = rand(1, 4, 3, 4), rand(1, 4, 2, 3, 4)
    out = global_matching(query, key, on_gpu(torch.rand(1, 2, 2, 3, 4) > 0.5), neighbors=2)
    assert isinstance(out, OnGpu) and used == {"all_gather", "all_to_all_single"}


@pytest.mark.parametrize("top_k", [None, 4])
@pytest.mark.parametrize("policy", ["window", "long_term"])
def test_a_bank(used, policy, top_k):
    options = {
        "max_mid_term_frames": 3,
        "min_mid_term_frames": 2,
        "num_prototypes": 5,
        "max_long_term_elements": 9,
    }
    bank = ShardedMemoryBank(policy=policy, top_k=top_k, max_mem_frames=3, device="cuda:0", **options)
    for frame in range(8):
        objects = [1] if frame < 3 else [1, 2]
        shrinkage = 1 + rand(1, 1, 3, 4).abs()
        bank.add(frame, rand(1, 8, 3, 4), rand(1, len(objects), 6, 3, 4), objects, shrinkage=shrinkage)
        if frame == 3:
            bank.add(9, rand(1, 8, 3, 4), rand(1, 1, 6, 3, 4), [2], shrinkage=shrinkage, permanent=True)
        assert isinstance(bank.read(rand(1, 8, 3, 4)), OnGpu)
    assert policy == "window" or bank.num_prototypes > 0
    bank.remove_objects([2])
    bank.set_budget(40_000)
    bank.read(rand(1, 8, 3, 4))
    assert used == {"all_gather", "all_to_all_single"}


def test_who_died_is_not_known(used, monkeypatch):
    def time_out(*_, **__):
        raise RuntimeError("Watchdog caught collective operation timeout")

    monkeypatch.setattr(dist, "all_gather", time_out)
    with pytest.raises(
        RankError, match="the backend cannot tell which, did not take part in a gathering"
    ) as error:
        memory_read(rand(1, 8, PIXELS), rand(1, 8, 10), rand(1, 3, 10))
    assert error.value.ranks == ()


def test_tensors_of_the_cpu_are_refused(used):
    with pytest.raises(
        ValueError, match=r"memory_key must be on one of the group's devices \(cuda\), got cpu"
    ):
        memory_read(torch.randn(1, 8, 4), torch.randn(1, 8, 4), torch.randn(1, 3, 4))
    with pytest.raises(ValueError, match=r"query must be on one of the group's devices \(cuda\), got cpu"):
        global_matching(torch.randn(1, 4, 3, 4), torch.randn(1, 4, 3, 4), torch.ones(1, 1, 3, 4, dtype=bool))
    with pytest.raises(ValueError, match=r"device must be one of the group's devices \(cuda\), got cpu"):
        ShardedMemoryBank()
