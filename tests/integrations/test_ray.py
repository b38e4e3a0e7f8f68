"""Data sets and videos on a local Ray cluster, where a worker dies half-way."""

from __future__ import annotations

import json
import os
import signal
import sys
import time

import pytest

from tests.clips import moving, picture, read_png, truth, write_folder, write_mask
from vosops.integrations.ray import Segmenter, segment_dataset
from vosops.io.errors import InputError, VosopsError
from vosops.runs.job import Job, Settings

SETTINGS = {"size": 32, "device": "cpu"}
LENGTHS = {"bear": 60, "camel": 5, "dog": 8, "goat": 4}


def dataset(root, lengths=LENGTHS):
    for name, count in lengths.items():
        boxes = moving(count, ids=(1, 2))
        write_folder(root / "JPEGImages" / name, [picture(b) for b in boxes])
        write_mask(root / "Annotations" / name / "00000.png", truth(boxes[0]))
    return root


def masks(out):
    return {path.relative_to(out): read_png(path) for path in sorted(out.glob("*/[0-9]*.png"))}


def same(ours, theirs):
    assert ours.keys() == theirs.keys()
    assert all((ours[name] == theirs[name]).all() for name in theirs)


def rows_of(root, names):
    """A batch as Ray Data makes it."""
    return {
        "name": list(names),
        "video": [str(root / "JPEGImages" / name) for name in names],
        "mask": [str(root / "Annotations" / name / "00000.png") for name in names],
    }


def test_the_function_of_ray_data_without_ray(tmp_path):
    root = dataset(tmp_path / "d", {"a": 4, "b": 3})
    segmenter = Segmenter(tmp_path / "out", **SETTINGS)
    batch = rows_of(root, ["a", "b"])
    batch["mask"][1] = str(tmp_path / "absent.png")
    found = segmenter(batch)
    assert found["frames"] == [4, 0] and found["problem"][0] == "" and "absent.png" in found["problem"][1]
    again = segmenter(rows_of(root, ["a"]))
    assert again["frames"] == [4] and len(list((tmp_path / "out/a").glob("0*.png"))) == 4
    with pytest.raises(InputError, match="name must be the name of a folder"):
        segmenter({**rows_of(root, ["a"]), "name": ["../a"]})


def test_inputs_and_outputs_by_url(tmp_path):
    fsspec = pytest.importorskip("fsspec")
    from tests.clips import write_video

    boxes = moving(4)
    video = write_video(tmp_path / "v.mp4", [picture(b) for b in boxes])
    mask = write_mask(tmp_path / "m.png", truth(boxes[0]))
    store = fsspec.filesystem("memory")
    for path in (video, mask):
        store.pipe(f"/in/{path.name}", path.read_bytes())
    batch = {"name": ["v"], "video": ["memory://in/v.mp4"], "mask": ["memory://in/m.png"]}
    segmenter = Segmenter("memory://out", **SETTINGS)
    found = segmenter(batch)
    assert found["problem"] == [""] and found["out"] == ["memory://out/v"]
    names = {path.rpartition("/")[2] for path in store.ls("/out/v", detail=False)}
    assert {"report.json", "0000000.png", "0000003.png"} <= names
    before = store.info("/out/v/report.json")["created"]
    segmenter(batch)  # is complete
    assert store.info("/out/v/report.json")["created"] == before
    assert (
        "cannot be read"
        in segmenter({**batch, "name": ["w"], "video": ["memory://in/none.mp4"]})["problem"][0]
    )


def test_errors(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="--ray-workers must be at least 1, got 0"):
        segment_dataset(Job(tmp_path), tmp_path, workers=0)
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(VosopsError, match=r"ray is not installed: pip install 'vosops\[ray\]'"):
        segment_dataset(Job(tmp_path), dataset(tmp_path / "d", {"a": 2}), workers=1)


@pytest.mark.exhaustive
@pytest.mark.timeout(1800)  # a cluster starts a dozen processes
def test_a_worker_that_is_killed_loses_nothing(tmp_path):
    ray = pytest.importorskip("ray")
    root = dataset(tmp_path / "d")
    Job(tmp_path / "one", settings=Settings(**SETTINGS)).dataset(root)
    out = tmp_path / "out"
    job = Job(out, settings=Settings(**SETTINGS), lease_seconds=3.0)
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        import threading

        def kill():
            leases = out / ".vosops/fleet"
            until = time.monotonic() + 120
            while time.monotonic() < until:
                if len(list((out / "bear").glob("0*.png"))) > 5:
                    worker = (leases / "bear.lease.0").read_text().splitlines()[0]
                    os.kill(int(worker.rpartition(":")[2]), signal.SIGKILL)
                    return
                time.sleep(0.02)

        killer = threading.Thread(target=kill, daemon=True)
        killer.start()
        assert segment_dataset(job, root, workers=2, gpus=0) == sorted(LENGTHS)
        killer.join()
        report = json.loads((out / "report.json").read_text())
        assert report["complete"] and report["sequences"]["bear"]["takeovers"] >= 1
        same(masks(out), masks(tmp_path / "one"))

        rows = [
            dict(zip(("name", "video", "mask"), row, strict=True))
            for row in zip(*rows_of(root, ["goat"]).values(), strict=True)
        ]
        data = ray.data.from_items(rows).map_batches(
            Segmenter,
            fn_constructor_kwargs={"out": str(tmp_path / "data"), **SETTINGS},
            batch_size=1,
            concurrency=1,
        )
        assert [row["frames"] for row in data.take_all()] == [LENGTHS["goat"]]
    finally:
        ray.shutdown()


@pytest.mark.exhaustive
@pytest.mark.timeout(1800)
def test_a_memory_over_two_actors(tmp_path):
    """Actors that form a group with gloo read together, with gradients, what one process reads."""
    ray = pytest.importorskip("ray")
    torch = pytest.importorskip("torch")
    from tests.distributed import cases
    from tests.distributed.test_distributed import EXACT, compare

    class Reader:
        def __init__(self, rank, store):
            import torch.distributed as dist

            torch.set_num_threads(1)
            dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
            self.rank, self.group = rank, dist.group.WORLD

        def read(self, name):
            return cases.read_case(name, 2, self.rank, self.group)

        def long_term(self, name):
            return cases.long_term_case(name, self.group)["reads"]

    environment = {"PYTHONPATH": os.pathsep.join(sys.path), "GLOO_SOCKET_IFNAME": "lo"}
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env={"env_vars": environment})
    try:
        actors = [ray.remote(Reader).remote(rank, str(tmp_path / "store")) for rank in range(2)]
        for name in ("softmax", "top_k l2", "from rank 0"):
            parts = ray.get([actor.read.remote(name) for actor in actors], timeout=600)
            compare(parts, cases.read_case(name), EXACT)
        ours, theirs = ray.get([actor.long_term.remote("top_k") for actor in actors], timeout=600)
        for one, other, whole in zip(ours, theirs, cases.long_term_case("top_k")["reads"], strict=True):
            assert torch.equal(one, other)
            torch.testing.assert_close(one, whole, rtol=5 * EXACT, atol=5 * EXACT)
    finally:
        ray.shutdown()
