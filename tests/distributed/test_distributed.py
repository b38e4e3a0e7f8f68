"""A memory over several ranks reads what one rank reads, moves as much however long it is, and notices who is dead."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import vosops.distributed
from tests.distributed import cases, sequences
from vosops.distributed import Exchange, ShardedMemoryBank, exchange

if not dist.is_available() or not dist.is_gloo_available():
    pytest.skip("this PyTorch has no gloo", allow_module_level=True)
from tests.distributed.worker import DEAD, HANGING, RANKS

ROOT = Path(__file__).parents[2]
SECONDS = 540
EXACT = 1e-6
SHARDED = {"usage": 1, "d key": 2, "d value": 3, "d shrinkage": 2, "d bias": 1}
"""Results of which each rank has its frames' part, along this dimension; everything else is alike on all ranks."""
long_term_of_one_bank = functools.cache(cases.long_term_case)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What the ranks found: by the name of the result, a list over the ranks that were asked for it."""
    folder = tmp_path_factory.mktemp("ranks")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, "-m", "tests.distributed.worker", str(folder)]
    with (folder / "log").open("wb") as log:
        ranks = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True
        )
        try:
            ranks.wait(SECONDS)
        except subprocess.TimeoutExpired:
            pass  # the assertion below shows how far each came
        finally:
            # The one that hangs is left, unless something failed.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(ranks.pid, signal.SIGKILL)
            ranks.wait()
    logs = "\n".join(f"{path.name}: {path.read_text()[-3000:]}" for path in sorted(folder.glob("log*")))
    assert all((folder / f"results-{r}.pt").exists() for r in range(RANKS)), logs
    results: dict[str, list] = {}
    for path in sorted(folder.glob("*.pt")):
        for name, value in torch.load(path, weights_only=False).items():
            results.setdefault(name, []).append(value)
    return results


def compare(parts, expected, bound, sharded=SHARDED):
    """Asserts that the ranks' results are those of one process, and alike where they are not parts."""
    for name, whole in expected.items():
        if name in sharded:
            merged = torch.cat([part[name] for part in parts], sharded[name])
        else:
            every = [part[name] for part in parts if name in part]
            numbers = [part.nan_to_num(nan=-12345.0) for part in every]
            assert every and all(torch.equal(numbers[0], other) for other in numbers[1:]), name
            merged = every[0]
        torch.testing.assert_close(
            merged,
            whole,
            rtol=bound,
            atol=bound * max(1, whole.float().nan_to_num().abs().max().item()),
            equal_nan=True,
        )


@pytest.mark.parametrize("size", cases.SIZES)
@pytest.mark.parametrize("name", cases.READS)
def test_ranks_read_what_one_reads(found, name, size):
    compare(found[f"read {name} {size}"], cases.read_case(name), EXACT)


@pytest.mark.parametrize("size", cases.SIZES)
def test_a_second_run_has_the_same_bits(found, size):
    assert found[f"again {size}"] == [True] * size


@pytest.mark.parametrize("size", cases.SIZES)
def test_half_precision_is_rounded_once_more(found, size):
    parts = found[f"bfloat16 {size}"]
    expected = cases.read_case("softmax", dtype=torch.bfloat16)
    compare(parts, {k: expected[k] for k in ("out", "lse")}, 2 * torch.finfo(torch.bfloat16).eps)


@pytest.mark.parametrize("size", cases.SIZES)
def test_groups_of_objects_and_segments(found, size):
    for i, expected in enumerate(cases.groups_case()):
        compare([part[i] for part in found[f"groups {size}"]], expected, EXACT)


@pytest.mark.parametrize("size", cases.SIZES)
@pytest.mark.parametrize("neighbors", [1, 3])
def test_global_matching_over_ranks(found, neighbors, size):
    expected = cases.matching_case(neighbors=neighbors)
    compare(found[f"matching {neighbors} {size}"], expected, EXACT, {"d key": 2})


@pytest.mark.parametrize("size", cases.SIZES)
@pytest.mark.parametrize("name", cases.BANKS)
def test_a_bank_over_ranks_reads_what_one_bank_reads(found, name, size):
    parts, expected = found[f"bank {name} {size}"], cases.bank_case(name)
    bound = 1e-3 if name == "dot" else 5 * EXACT  # stored and merged in float16
    for part in parts:
        assert part["stored"] == expected["stored"] and part["frames"] == expected["frames"]
        for ours, theirs, one in zip(part["reads"], parts[0]["reads"], expected["reads"], strict=True):
            assert torch.equal(ours, theirs)
            torch.testing.assert_close(ours, one, rtol=bound, atol=bound)
    assert sum(part["bytes"] for part in parts) >= expected["bytes"]


@pytest.mark.parametrize(
    ("name", "size"), [(n, size) for n in cases.LONG_TERMS for size in cases.sizes_of_long_term(n)]
)
def test_a_long_term_memory_over_ranks_is_that_of_one_bank(found, name, size):
    parts, expected = found[f"long term {name} {size}"], long_term_of_one_bank(name)
    bound = 2e-3 if name == "half" else 5 * EXACT  # stored and merged in float16
    assert max(expected["sizes"]) > 10 and len({tuple(p) for p in expected["prototypes"]}) > 2
    for part in parts:
        assert part["frames"] == expected["frames"]
        for ours, theirs, one in zip(part["reads"], parts[0]["reads"], expected["reads"], strict=True):
            assert torch.equal(ours, theirs)
            torch.testing.assert_close(ours, one, rtol=bound, atol=bound)
    for step, keys in enumerate(
        expected["prototypes"]
    ):  # the same positions, each on one rank, in the same order
        ours = {n: key for part in parts for n, key in part["prototypes"][step].items()}
        assert sum(len(part["prototypes"][step]) for part in parts) == len(ours) == len(keys)
        ordered = [ours[n] for n in sorted(ours)]
        assert all(torch.equal(a, b) for a, b in zip(ordered, keys.values(), strict=True))
    for sizes in zip(*(part["sizes"] for part in parts), strict=True):
        assert max(sizes) <= -(-cases.LONG_TERM["max_long_term_elements"] // size)


@pytest.mark.parametrize("size", cases.sizes_of_long_term("softmax"))
def test_the_budget_of_a_long_term_memory_is_each_ranks_own(found, size):
    parts = found[f"bounded long term {size}"]
    assert all(part["bytes"] <= part["reserved"] <= 9000 for part in parts)
    assert all(torch.equal(*both) for p in parts for both in zip(p["reads"], parts[0]["reads"], strict=True))


@pytest.mark.exhaustive
@pytest.mark.parametrize("size", cases.SIZES)
@pytest.mark.parametrize("seed", sequences.SEEDS)
def test_any_sequence_of_calls(found, seed, size):
    """All ranks say the same, and without budgets what one bank says."""
    first, *others = (logs[seed] for logs in found[f"sequences {size}"])
    whole = first if seed % 2 else sequences.Sequence(seed).run()
    assert all(len(log) == len(first) for log in [*others, whole])
    for ours, *theirs, one in zip(first, *others, whole, strict=True):
        if isinstance(ours, str):
            assert [*theirs, one] == [ours] * (len(theirs) + 1)
        else:
            assert all(torch.equal(ours, each) for each in theirs)
            torch.testing.assert_close(ours, one, rtol=5 * EXACT, atol=5 * EXACT)


@pytest.mark.parametrize("size", cases.SIZES)
def test_budgets_are_each_ranks_own(found, size):
    parts = found[f"bounded {size}"]
    assert all(part["bytes"] <= 6000 for part in parts)
    kept = [len(part["frames"]) for part in parts]
    assert kept == [kept[0]] * size
    assert kept[0] >= len(found["bounded 1"][0]["frames"])


def test_more_ranks_keep_more_under_the_same_budget(found):
    assert len(found["bounded 4"][0]["frames"]) > len(found["bounded 1"][0]["frames"])


@pytest.mark.parametrize("top_k", [None, 3])
@pytest.mark.parametrize("size", cases.SIZES)
def test_traffic_is_independent_of_the_memorys_length(found, size, top_k):
    short, long = zip(*found[f"traffic {top_k} {size}"], strict=True)
    assert short == long
    assert all((sent > 0) == (size > 1) and sent == received for sent, received in short)


def test_traffic_is_what_the_documentation_says(found):
    """2 (O Cv + 1) P for the read, (k + 1) P for the selection, 2 Ck P for the query's gradient, times (W - 1) / W."""
    pixels = cases.Q[0] * cases.Q[1]
    read = 2 * (cases.OBJECTS * cases.CV + 1) * pixels + 2 * cases.CK * pixels
    agreement = 3 * (1 + 7) * 8  # hashes of seven arguments to three others
    for top_k, more in ((None, 0), (3, 4 * pixels)):
        ((sent, _), _) = found[f"traffic {top_k} 4"][0]
        assert sent == (read + more) * 4 * 3 // 4 + agreement


def test_tensors_of_a_mesh(found):
    expected = mesh_case()
    for part in found["mesh"]:
        for name, whole in expected.items():
            torch.testing.assert_close(part[name], whole, rtol=EXACT, atol=5 * EXACT)
        kind, text = part["wrong"]
        assert kind == "ValueError" and "memory_key must be placed as S(2)" in text


def mesh_case():
    random = torch.Generator().manual_seed(len("top_k"))
    query = torch.randn(cases.N, cases.CK, *cases.Q, generator=random).requires_grad_()
    key = torch.randn(cases.N, cases.CK, cases.T, cases.H, cases.W, generator=random).requires_grad_()
    value = torch.randn(cases.N, cases.OBJECTS, cases.CV, cases.T, cases.H, cases.W, generator=random)
    out, usage = vosops.memory_read(query, key, value, top_k=5, return_usage=True)
    out.sum().backward()
    return {"out": out.detach(), "usage": usage, "d query": query.grad, "d key": key.grad}


def test_ranks_that_disagree_are_named(found):
    for rank, errors in enumerate(found["disagreements"]):
        assert errors["top_k"] == (
            "ValueError",
            "top_k must be equal on all ranks, got other ones on rank 1 than on rank 0",
        )
        assert errors["query"][0] == "ValueError" and "query_key must be equal" in errors["query"][1]
        assert errors["source"][0] == "ValueError" and "query_from must be a rank" in errors["source"][1]
        wrong = (
            ("ValueError", "key_channels must be 4")
            if rank == 0
            else ("RankError", "rank 0 cannot store frame 0")
        )
        assert errors["wrong key"][0] == wrong[0] and wrong[1] in errors["wrong key"][1]
        assert errors["budget"][0] == "MemoryBudgetError"
        assert ("budget must be at least" if rank == 0 else "rank 0 cannot") in errors["budget"][1]


def test_a_dead_rank_is_noticed_and_named(found):
    assert len(found["dead"]) == RANKS - 1
    for noticed in found["dead"]:
        assert noticed["ranks"] == (DEAD,)
        assert f"rank {DEAD} does not answer" in noticed["text"]
        assert noticed["seconds"] < 60


def test_a_hanging_rank_is_noticed_and_named(found):
    assert len(found["hanging"]) == RANKS - 2
    for noticed in found["hanging"]:
        assert noticed["ranks"] == (HANGING,)


def test_what_needs_no_other_rank(tmp_path):
    with pytest.raises(RuntimeError, match="init_process_group first"):
        Exchange()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(ValueError, match="timeout must be above 0"):
            Exchange(timeout=0)
        with pytest.raises(TypeError, match="query_key must be a tensor unless query_from"):
            vosops.distributed.memory_read(None, torch.randn(1, 2, 3), torch.randn(1, 2, 3))
        bank = ShardedMemoryBank()
        with pytest.raises(RuntimeError, match="empty"):
            bank.read(torch.randn(1, 2, 3))
        with pytest.raises(ValueError, match="state must be of rank 0 of 1, got one of rank 1 of 2"):
            bank.load_state_dict({"rank": 1, "ranks": 2})
    finally:
        dist.destroy_process_group()


def test_a_rank_whose_messages_are_lost_is_alive(monkeypatch):
    """gloo closes a rank's connections to all others once it waited in vain for one."""

    def lost(*args, **kwargs):
        raise RuntimeError("Connection closed by peer")

    monkeypatch.setattr(exchange, "_PROBE_SECONDS", 0.5)
    monkeypatch.setattr(dist, "isend", lost)
    store = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        asking, answering = Exchange(), Exchange()
        asking.size, asking.global_rank, answering.rank = 3, lambda rank: rank, 1
        assert asking._missing() == [1, 2]
        answering._answer()
        assert asking._missing() == [2]

        class Stopped:
            def check(self, keys):
                time.sleep(20)

        monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", Stopped)
        began = time.monotonic()
        assert not asking._is_asked() and not asking._has_answered(1)
        assert time.monotonic() - began < 10, "a store that hangs is asked once"
    finally:
        dist.destroy_process_group()


TORCHRUN = """
import sys, torch, torch.distributed as dist
from tests.distributed import cases
torch.set_num_threads(1)
dist.init_process_group("gloo")
rank, size = dist.get_rank(), dist.get_world_size()
torch.save(cases.read_case("top_k l2", size, rank, dist.group.WORLD), f"{sys.argv[1]}/{rank}.pt")
dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.exhaustive
def test_ranks_of_torchrun(tmp_path):
    (tmp_path / "read.py").write_text(TORCHRUN)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo"}
    subprocess.run(
        [*command, str(tmp_path / "read.py"), str(tmp_path)],
        cwd=ROOT,
        env=environment,
        check=True,
        timeout=500,
    )
    compare([torch.load(tmp_path / f"{r}.pt") for r in range(3)], cases.read_case("top_k l2"), EXACT)


HOST = """
import sys, torch, torch.distributed as dist
from tests.distributed import cases
rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method="tcp://10.77.0.1:29511", rank=rank, world_size=2)
torch.save(cases.read_case("top_k l2", 2, rank, dist.group.WORLD), f"{folder}/{rank}.pt")
dist.barrier()
"""


@pytest.fixture
def hosts():
    """Two network namespaces with a cable between them, and the names of its ends; skips where none can be made."""
    names = [f"vosops-{os.getpid()}-{i}" for i in range(2)]
    ends = [f"vo{os.getpid() % 10**6}-{i}" for i in range(2)]

    def ip(*arguments):
        subprocess.run(["ip", *arguments], check=True, capture_output=True)

    made = []
    try:
        try:
            for name in names:
                ip("netns", "add", name)
                made.append(name)
            ip(
                "link",
                "add",
                ends[0],
                "netns",
                names[0],
                "type",
                "veth",
                "peer",
                "name",
                ends[1],
                "netns",
                names[1],
            )
            for i, (name, end) in enumerate(zip(names, ends, strict=True)):
                ip("-n", name, "addr", "add", f"10.77.0.{i + 1}/24", "dev", end)
                ip("-n", name, "link", "set", end, "up")
                ip("-n", name, "link", "set", "lo", "up")
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"network namespaces need root and iproute2 ({error})")
        yield list(zip(names, ends, strict=True))
    finally:
        for name in made:
            subprocess.run(["ip", "netns", "delete", name], check=False)


@pytest.mark.exhaustive
def test_ranks_on_separate_hosts(hosts, tmp_path):
    ranks = []
    for rank, (name, end) in enumerate(hosts):
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": end}
        command = ["ip", "netns", "exec", name, sys.executable, "-c", HOST, str(rank), str(tmp_path)]
        ranks.append(subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True))
    try:
        ends = [rank.communicate(timeout=500)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], ends
    compare([torch.load(tmp_path / f"{r}.pt") for r in range(2)], cases.read_case("top_k l2"), EXACT)
