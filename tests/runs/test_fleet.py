"""Several workers on one data set: every sequence is done once, whoever dies, and the report is of all."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.cli.commands import error_line, run_command
from tests.clips import moving, picture, read_png, truth, write_folder, write_mask
from vosops.io.errors import InputError, InterruptedRunError
from vosops.runs.fleet import Fleet, LeaseLostError, Outcome, Shard, divide
from vosops.runs.job import Job, Settings

ROOT = Path(__file__).parents[2]
SETTINGS = Settings(size=-1, device="cpu")
LENGTHS = {"bear": 9, "camel": 5, "dog": 7, "goat": 4, "horse": 6, "swan": 3}


def dataset(root, lengths=LENGTHS):
    """A data set in the manner of YouTube-VOS with sequences of these lengths."""
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


class TestShard:
    def test_by_hand(self):
        assert Shard.parse("2/5") == Shard(2, 5)

    @pytest.mark.parametrize("text", ["5/5", "1", "a/b", "-1/2", "1/0", ""])
    def test_what_is_no_shard(self, text):
        with pytest.raises(InputError, match=r"--shard must be auto or i/n with i from 0 to n - 1, got "):
            Shard.parse(text)

    @pytest.mark.parametrize(
        "environment",
        [
            {"RANK": "1", "WORLD_SIZE": "3", "SLURM_PROCID": "0", "SLURM_NTASKS": "9"},
            {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "3"},
            {"SLURM_ARRAY_TASK_ID": "8", "SLURM_ARRAY_TASK_COUNT": "3", "SLURM_ARRAY_TASK_MIN": "7"},
            {
                "SLURM_ARRAY_TASK_ID": "3",
                "SLURM_ARRAY_TASK_COUNT": "3",
                "SLURM_ARRAY_TASK_MIN": "1",
                "SLURM_ARRAY_TASK_MAX": "5",
                "SLURM_ARRAY_TASK_STEP": "2",
            },
            {"SLURM_PROCID": "1", "SLURM_NTASKS": "3"},
        ],
    )
    def test_of_a_launcher(self, environment):
        assert Shard.parse("auto", environment) == Shard(1, 3)

    @pytest.mark.parametrize(
        ("environment", "error"),
        [
            ({}, "finds none of RANK/WORLD_SIZE"),
            ({"RANK": "3", "WORLD_SIZE": "3"}, "RANK=3 must be one of WORLD_SIZE=3"),
            ({"RANK": "one", "WORLD_SIZE": "3"}, "must be numbers"),
            (
                {
                    "SLURM_ARRAY_TASK_ID": "5",
                    "SLURM_ARRAY_TASK_COUNT": "3",
                    "SLURM_ARRAY_TASK_MIN": "1",
                    "SLURM_ARRAY_TASK_MAX": "7",
                },
                "must be a range such as 0-9 or 1-9:2, got 3 tasks from 1 to 7 in steps of 1",
            ),
        ],
    )
    def test_of_none(self, environment, error):
        with pytest.raises(InputError, match=error):
            Shard.parse("auto", environment)


class TestDivision:
    def test_every_sequence_is_in_one_share(self):
        shares = divide(LENGTHS, 3)
        assert sorted(name for share in shares for name in share) == sorted(LENGTHS)

    def test_by_frames_and_not_by_count(self):
        shares = divide({"long": 100, **{f"short{i}": 10 for i in range(10)}}, 2)
        assert sorted(map(len, shares)) == [1, 10]

    def test_more_workers_than_sequences(self):
        assert divide({"a": 3, "b": 5}, 4) == [["b"], ["a"], [], []]


class TestLease:
    @pytest.fixture
    def fleet(self, tmp_path):
        fleet = Fleet(tmp_path, lease_seconds=0.4)
        fleet.join({"model": "propagate"})
        return fleet

    def other(self, fleet):
        return Fleet(fleet.out, fleet.lease_seconds, "other")

    def test_one_worker_has_a_sequence_at_a_time(self, fleet):
        lease = fleet.take("bear")
        assert self.other(fleet).take("bear") is None
        time.sleep(0.8)  # it is renewed meanwhile
        assert self.other(fleet).take("bear") is None and not lease.lost
        lease.release()
        taken = self.other(fleet).take("bear")
        assert taken.number == 1
        taken.release()

    def test_who_stands_still_loses_it(self, fleet):
        lease = fleet.take("bear")
        lease._ended.set()  # no renewals, as of a process that is stopped
        time.sleep(0.6)
        taken = self.other(fleet).take("bear")
        assert taken is not None and lease.lost and not taken.lost
        with pytest.raises(LeaseLostError, match="bear was taken over by another worker"):
            lease.check()
        lease.release()  # does not give away what another has now
        assert not taken.lost and fleet.take("bear") is None
        assert fleet.lease_path("bear", 0).stat().st_mtime == 0  # who was late did not die
        taken.release()

    def test_of_two_that_saw_it_expire_one_gets_it(self, fleet, monkeypatch):
        fleet.take("bear").release()
        other = self.other(fleet)
        first = other.take("bear")
        monkeypatch.setattr(fleet, "_latest", lambda name: 0)  # looked before the other took it
        assert fleet.take("bear") is None
        first.release()

    def test_clocks_of_workers_do_not_matter(self, fleet, monkeypatch):
        lease = fleet.take("bear")
        monkeypatch.setattr(time, "time", lambda: 4e9)
        assert self.other(fleet).take("bear") is None
        lease.release()

    def die(self, fleet, number, checkpoint="none"):
        """What a worker leaves that died at a sequence, a second ago."""
        path = fleet.lease_path("bear", number)
        path.write_text(f"host:{number}\n{checkpoint}\n")
        os.utime(path, (1, path.stat().st_mtime - 1))

    def test_a_sequence_that_kills_its_workers_is_left_alone(self, fleet):
        for number in range(2):
            self.die(fleet, number)
        lease = fleet.take("bear")
        assert lease.number == 2 and fleet.trouble("bear", 2) is None
        lease._ended.set()
        self.die(fleet, 2)
        lease = fleet.take("bear")
        said = "3 workers died at it without a checkpoint between: host:0, host:1, host:2; --resume tries it again"
        assert fleet.trouble("bear", lease.number) == said
        lease.release()
        assert fleet.trouble("bear", fleet.take("bear").number) is None  # whoever is asked to try it again

    def test_a_checkpoint_is_progress(self, fleet):
        for number in range(3):
            self.die(fleet, number)
        checkpoint = fleet.out / "bear/.vosops/checkpoint.pt"
        checkpoint.parent.mkdir(parents=True)
        checkpoint.touch()
        lease = fleet.take("bear")
        assert fleet.trouble("bear", lease.number) is None
        lease.release()

    def test_other_arguments_are_refused(self, fleet):
        Fleet(fleet.out).join({"model": "propagate"})
        with pytest.raises(InputError, match="other arguments: --model was propagate, is stm"):
            Fleet(fleet.out).join({"model": "stm"})

    def test_a_worker_that_only_waits_can_be_stopped(self, fleet):
        lease = self.other(fleet).take("bear")
        noted = []
        with pytest.raises(InterruptedRunError):
            list(fleet.each(["bear"], should_stop=lambda: True, note=noted.append))
        assert not noted
        lease.release()

    def test_a_finished_sequence_is_taken_by_nobody(self, fleet):
        fleet.finish("bear", Outcome(9, 1.0, [], None, "w", 0))
        assert list(fleet.each(["bear"])) == []


class TestShards:
    def test_all_into_one_folder_as_one_worker_makes_it(self, tmp_path):
        root = dataset(tmp_path / "d")
        Job(tmp_path / "one", settings=SETTINGS).dataset(root)
        for i in range(3):
            Job(tmp_path / "out", settings=SETTINGS, shard=Shard(i, 3)).dataset(root)
            report = json.loads((tmp_path / "out/report.json").read_text())
            assert report["complete"] == (i == 2)
        same(masks(tmp_path / "out"), masks(tmp_path / "one"))
        assert report["unfinished"] == [] and set(report["sequences"]) == set(LENGTHS)
        assert {name: s["frames"] for name, s in report["sequences"].items()} == LENGTHS

    def test_a_shard_again_does_nothing(self, tmp_path, monkeypatch):
        root = dataset(tmp_path / "d", {"bear": 3, "dog": 2})
        Job(tmp_path / "out", settings=SETTINGS, shard=Shard(0, 1)).dataset(root)
        monkeypatch.setattr("vosops.runs.job.make_tracker", lambda *args: pytest.fail("a model was made"))
        assert Job(tmp_path / "out", settings=SETTINGS, shard=Shard(0, 1)).dataset(root) == []

    def test_stealing_does_the_shares_of_all(self, tmp_path):
        root = dataset(tmp_path / "d", {"bear": 3, "dog": 2})
        Job(tmp_path / "out", settings=SETTINGS, shard=Shard(1, 4), steal=True).dataset(root)
        assert json.loads((tmp_path / "out/report.json").read_text())["complete"]

    def test_a_broken_sequence_is_reported_once_and_stops_nobody(self, tmp_path):
        root = dataset(tmp_path / "d", {"bear": 3, "dog": 2})
        (root / "JPEGImages/dog/00001.png").write_bytes(b"no picture")
        with pytest.raises(Exception, match="dog: "):
            Job(tmp_path / "out", settings=SETTINGS, steal=True).dataset(root)
        report = json.loads((tmp_path / "out/report.json").read_text())
        assert (
            not report["complete"] and len(report["problems"]) == 1 and set(report["sequences"]) == {"bear"}
        )
        Job(tmp_path / "out", settings=SETTINGS, steal=True).dataset(root)  # is not tried again

    def test_what_kills_its_workers_is_a_problem_until_it_is_resumed(self, tmp_path):
        root, out = dataset(tmp_path / "d", {"bear": 3, "dog": 2}), tmp_path / "out"
        Job(out, settings=SETTINGS, shard=Shard(1, 2)).dataset(root)
        for number in range(3):
            path = Fleet(out).lease_path("bear", number)
            path.write_text(f"host:{number}\nnone\n")
            os.utime(path, (1, 1))
        with pytest.raises(Exception, match="bear: 3 workers died at it"):
            Job(out, settings=SETTINGS, shard=Shard(0, 2)).dataset(root)
        report = json.loads((out / "report.json").read_text())
        assert set(report["sequences"]) == {"dog"} and "bear: 3 workers died" in report["problems"][0]
        Job(out, "resume", SETTINGS, shard=Shard(0, 2)).dataset(root)
        assert json.loads((out / "report.json").read_text())["complete"]

    def test_overwrite_is_refused(self, tmp_path):
        with pytest.raises(InputError, match="--overwrite cannot be combined with --shard"):
            Job(tmp_path / "out", "overwrite", SETTINGS, steal=True).dataset(
                dataset(tmp_path / "d", {"bear": 2})
            )

    def test_somebody_elses_folder_is_refused(self, tmp_path):
        (tmp_path / "out").mkdir()
        (tmp_path / "out/mine.txt").write_text("mine")
        with pytest.raises(InputError, match="is not empty"):
            Job(tmp_path / "out", settings=SETTINGS, steal=True).dataset(dataset(tmp_path / "d", {"bear": 2}))

    def test_a_lost_sequence_is_left_to_who_has_it(self, tmp_path, monkeypatch):
        root = dataset(tmp_path / "d", {"bear": 6})
        out, frames = tmp_path / "out", []

        def stop():
            frames.append(1)
            if len(frames) == 3:  # another worker believes this one dead, and finishes the sequence
                fleet = Fleet(out)
                fleet.lease_path("bear", 1).touch()
                fleet.finish("bear", Outcome(6, 1.0, [], None, "other", 1))
            return False

        Job(out, settings=SETTINGS, steal=True, should_stop=stop).dataset(root)
        assert len(frames) == 3
        assert json.loads((out / "report.json").read_text())["sequences"]["bear"]["worker"] == "other"


def test_four_workers_of_which_two_are_killed(tmp_path):
    """Nothing is lost and nothing done twice when one dies between two frames and one while it writes a mask."""
    root, out = dataset(tmp_path / "d"), tmp_path / "out"
    Job(tmp_path / "one", settings=SETTINGS).dataset(root)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.runs.fleet_worker", str(root), str(out)]
    plans = ["write:4", "hold:3", "0", "0"]
    workers = [
        subprocess.Popen(
            [*command, f"{i}/4", plan, "0.05"], cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True
        )
        for i, plan in enumerate(plans)
    ]
    try:
        ends = [worker.communicate(timeout=240) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers] == [-9, -9, 0, 0], ends
    same(masks(out), masks(tmp_path / "one"))
    report = json.loads((out / "report.json").read_text())
    assert report["complete"] and not report["unfinished"]
    assert {name: s["frames"] for name, s in report["sequences"].items()} == LENGTHS
    taken_over = [name for name, s in report["sequences"].items() if s["takeovers"]]
    assert len(taken_over) >= 2  # more where a worker that lives waits for a processor
    for name, count in LENGTHS.items():  # each frame is recorded once, in order
        lines = (out / name / ".vosops/frames.jsonl").read_text().splitlines()
        assert [json.loads(line)["index"] for line in lines] == list(range(count))
        assert not list((out / name).glob(".vosops-part-*"))


class TestCommand:
    def run(self, monkeypatch, capsys, *arguments):
        return run_command(monkeypatch, capsys, "segment", *arguments, "--size", "-1", "--device", "cpu")

    def test_workers_by_the_command(self, tmp_path, monkeypatch, capsys):
        root, out = dataset(tmp_path / "d", {"bear": 3, "dog": 2, "goat": 2}), tmp_path / "out"
        monkeypatch.setenv("RANK", "0")
        monkeypatch.setenv("WORLD_SIZE", "2")
        assert self.run(monkeypatch, capsys, root, "--out", out, "--shard", "auto")[0] == 0
        report = json.loads((out / "report.json").read_text())
        assert list(report["sequences"]) == ["bear"] and report["unfinished"] == ["dog", "goat"]
        assert self.run(monkeypatch, capsys, root, "--out", out, "--steal")[0] == 0
        assert json.loads((out / "report.json").read_text())["complete"]

    def test_chunks_by_the_command(self, tmp_path, monkeypatch, capsys):
        root, out = dataset(tmp_path / "d", {"bear": 6}), tmp_path / "out"
        chunks = ("--chunk-frames", "3", "--chunk-overlap", "1")
        assert self.run(monkeypatch, capsys, root, "--out", out, *chunks)[0] == 0
        recorded = json.loads((out / "bear/.vosops/arguments.json").read_text())
        assert recorded["chunk-frames"] == 3 and recorded["chunk-overlap"] == 1

    @pytest.mark.parametrize("flag", [("--shard", "0/2"), ("--steal",), ("--ray", "local")])
    def test_a_single_video_has_no_workers(self, flag, tmp_path, monkeypatch, capsys):
        clip = write_folder(tmp_path / "clip", [picture(b) for b in moving(2)])
        code, printed = self.run(
            monkeypatch, capsys, clip, "--out", tmp_path / "out", "--mask", "m.png", *flag
        )
        assert code == 2 and "--shard, --steal and --ray require the root of a data set" in error_line(
            printed
        )
