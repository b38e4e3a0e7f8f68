"""The loop: what a run writes, that it goes on to the bit, and that processes share a batch."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("pydantic")
pytest.importorskip("yaml")
pytest.importorskip("lightning_fabric")
pytest.importorskip("av")
pytest.importorskip("safetensors")
import torch  # noqa: E402
import yaml  # noqa: E402

from tests.training.conftest import break_file, changed  # noqa: E402
from vosops.io.errors import InputError, InterruptedRunError, ResumeError, VosopsError  # noqa: E402
from vosops.models import create_model, load_weights  # noqa: E402
from vosops.training.config import parse_config  # noqa: E402
from vosops.training.loop import train  # noqa: E402
from vosops.training.optimizing import create_average  # noqa: E402
from vosops.training.records import Table  # noqa: E402

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True, scope="module")
def serial(one_thread):
    """Every test here runs in one thread, as the processes that it begins do."""


class Notes:
    """Keeps what it is told."""

    def __init__(self):
        self.notes, self.steps = [], []

    def begin(self, steps, done):
        self.begun = (steps, done)

    def advance(self, step, figures):
        self.steps.append(step)

    def note(self, text):
        self.notes.append(text)


def rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def untimed(path):
    """The rows of a table without the times."""
    return [{name: x for name, x in row.items() if name not in ("seconds", "wait")} for row in rows(path)]


def weights(out, name="weights"):
    from safetensors.torch import load_file

    return load_file(out / f"{name}.safetensors")


def assert_same(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_run_writes_weights_logs_scores_pictures_and_two_checkpoints(classes_config, tmp_path):
    out, notes = tmp_path / "run", Notes()
    result = train(classes_config(ema=0.9), out, progress=notes)
    assert result.steps == 6 and notes.begun == (6, 0) and notes.steps == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in rows(out / "log.csv")] == [str(n) for n in range(1, 7)]
    scores = rows(out / "scores.csv")
    assert [row["step"] for row in scores] == ["3", "6"]
    assert result.best == pytest.approx(max(float(row["score"]) for row in scores), abs=1e-4)
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == [
        "step_0000004.pt",
        "step_0000006.pt",
    ]
    assert [path.name for path in (out / "pictures").iterdir()] == ["step_0000006.png"]
    network = create_model("stranger_classes", out / "weights.safetensors")
    load_weights(network, out / "best.safetensors")


def test_the_average_is_what_is_saved(classes_config, tmp_path):
    for name, decay in (("plain", None), ("average", 0.9)):
        train(classes_config(ema=decay), tmp_path / name)
    plain, average = (weights(tmp_path / name) for name in ("plain", "average"))
    begin = dict(create_model("stranger_classes").state_dict())
    for name in plain:
        far, near = (float((x[name] - begin[name]).norm()) for x in (plain, average))
        assert 0 < near < far


@pytest.mark.parametrize("clip_norm", [None, 0.1])
def test_accumulated_passes_are_one_batch(classes_config, tmp_path, clip_norm):
    for name, batch, accumulate in (("one", 4, 1), ("four", 1, 4)):
        config = classes_config(batch=batch, accumulate=accumulate, optimizer__clip_norm=clip_norm)
        train(config, tmp_path / name)
    one, four = (weights(tmp_path / name) for name in ("one", "four"))
    assert all(torch.allclose(one[name], four[name], atol=1e-5) for name in one)


def test_the_average_forgets_where_a_short_run_began():
    network = torch.nn.Linear(1, 1, bias=False)
    average = create_average(network, 0.99)
    expected = 0.0
    for n in range(200):
        with torch.no_grad():
            network.weight.fill_(float(n > 0))  # 0 after the first step, then 1
        average.update_parameters(network)
        share = min(0.99, (1 + n) / (10 + n))
        expected = share * expected + (1 - share) * float(n > 0)
        assert average.module.weight.item() == pytest.approx(expected, abs=1e-6), n
    assert expected > 1 - 1e-6  # with 0.99 from the beginning it would be 0.86


@pytest.mark.parametrize("changes", [{"ema": 0.9, "accumulate": 2}, {"channels_last": True}])
def test_a_run_that_is_stopped_goes_on_to_the_bit(classes_config, tmp_path, changes):
    config = classes_config(**changes)
    train(config, tmp_path / "whole")
    answers = iter([False, False, True])
    with pytest.raises(InterruptedRunError, match="stopped after step 3"):
        train(config, tmp_path / "parts", should_stop=lambda: next(answers))
    notes = Notes()
    train(config, tmp_path / "parts", resume=True, progress=notes)
    assert notes.begun == (6, 3)
    assert_same(weights(tmp_path / "whole"), weights(tmp_path / "parts"))
    for file in ("log.csv", "scores.csv"):
        whole, parts = (untimed(tmp_path / name / file) for name in ("whole", "parts"))
        assert whole == parts


def command(config, out, *options):
    return [sys.executable, "-m", "vosops.cli", "train", str(config), "--out", str(out), *options]


def environment(**further):
    own = {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    return {**os.environ, **own, **further}


def video_config(davis, path, **changes):
    """A configuration of a small recurrent network whose batch norm is fixed, as a file."""
    content = {
        "model": "lstm_segnet",
        "options": {"num_classes": 3, "width": 4},
        "steps": 4,
        "batch": 1,
        "data": {
            "train": [{"kind": "videos", "root": str(davis)}],
            "clips": {"frames": 2, "crop": 32},
            "workers": 1,
        },
        "optimizer": {"rate": 0.001},
        "every": {"log": 1, "score": 4, "save": 1, "pictures": 4},
        "freeze_batch_norm": True,
        "tensorboard": False,
    }
    path.write_text(yaml.safe_dump(changed(content, changes)))
    return path


def test_a_killed_run_goes_on_to_the_bit(davis, tmp_path):
    """The schedule is constant, so that the run that is killed can be one that is longer than it will be."""
    file = video_config(davis, tmp_path / "run.yaml", schedule={"kind": "constant"})
    config = parse_config(yaml.safe_load(file.read_text()))
    train(config, tmp_path / "whole")
    out = tmp_path / "killed"
    long = video_config(
        davis, tmp_path / "long.yaml", schedule={"kind": "constant"}, steps=10_000, every__save=2
    )
    process = subprocess.Popen(command(long, out), env=environment(), stderr=subprocess.PIPE)
    first = out / "checkpoints" / "step_0000002.pt"
    try:
        deadline = time.monotonic() + 240
        while not first.exists() and time.monotonic() < deadline:
            assert process.poll() is None, process.stderr.read().decode()
            time.sleep(0.02)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stderr.close()
    for later in set(first.parent.glob("step_*.pt")) - {first}:
        later.unlink()
    assert first.exists() and len(rows(out / "log.csv")) >= 2
    settings = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**settings, "steps": config.steps}))
    notes = Notes()
    train(config, out, resume=True, progress=notes)
    assert notes.begun == (4, 2)
    assert_same(weights(tmp_path / "whole"), weights(out))
    assert [row["step"] for row in rows(out / "log.csv")] == ["1", "2", "3", "4"]


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def test_two_processes_do_what_one_with_the_double_batch_does(davis, tmp_path):
    double = video_config(davis, tmp_path / "double.yaml", batch=2, data__workers=0)
    train(parse_config(yaml.safe_load(double.read_text())), tmp_path / "one")
    single = video_config(davis, tmp_path / "single.yaml", data__workers=0)
    common = {
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    common |= {"TORCHELASTIC_RUN_ID": "test", "GROUP_RANK": "0"}
    processes = [
        subprocess.Popen(
            command(single, tmp_path / "two"),
            env=environment(**common, RANK=str(rank), LOCAL_RANK=str(rank)),
            stderr=subprocess.PIPE,
        )
        for rank in (0, 1)
    ]
    errors = [process.communicate(timeout=500)[1].decode() for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    one, two = (rows(tmp_path / name / "log.csv") for name in ("one", "two"))
    assert [float(a["loss"]) for a in one] == pytest.approx([float(b["loss"]) for b in two], abs=1e-5)
    one, two = (weights(tmp_path / name) for name in ("one", "two"))
    assert all(torch.allclose(one[name], two[name], atol=1e-5) for name in one)


def test_a_folder_that_holds_something_is_refused(classes_config, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match="is not empty: give another --out"):
        train(classes_config(), tmp_path)
    with pytest.raises(ResumeError, match="holds no run to resume"):
        train(classes_config(), tmp_path, resume=True)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_only_what_changes_nothing_may_change_on_resuming(classes_config, tmp_path):
    train(classes_config(steps=2), tmp_path / "run")
    with pytest.raises(ResumeError, match="of a run with another optimizer, steps"):
        train(classes_config(steps=3, optimizer__rate=1.0), tmp_path / "run", resume=True)
    assert (
        train(classes_config(steps=2, data__workers=1, every__log=2), tmp_path / "run", resume=True).steps
        == 2
    )


def test_a_damaged_checkpoint_gives_way_to_the_one_before(classes_config, tmp_path):
    config = classes_config()
    train(config, tmp_path / "run")
    expected = weights(tmp_path / "run")
    break_file(tmp_path / "run" / "checkpoints" / "step_0000006.pt")
    notes = Notes()
    train(config, tmp_path / "run", resume=True, progress=notes)
    assert notes.begun == (6, 4)
    assert_same(expected, weights(tmp_path / "run"))


def test_files_that_are_skipped_are_counted(classes_config, stills, tmp_path):
    root = shutil.copytree(stills, tmp_path / "stills")
    break_file(root / "images" / "00002.png")
    source = {"kind": "stills", "images": str(root / "images"), "masks": str(root / "masks")}
    notes = Notes()
    result = train(classes_config(data__train=[source]), tmp_path / "run", progress=notes)
    assert len(result.problems) == 1 and "00002.png" in result.problems[0]
    assert [note for note in notes.notes if note.startswith("skipped (1): ")]


def test_a_held_out_file_that_cannot_be_read_ends_nothing(classes_config, stills, tmp_path):
    root = shutil.copytree(stills, tmp_path / "stills")
    break_file(root / "masks" / "00000.png")
    source = {"kind": "stills", "images": str(root / "images"), "masks": str(root / "masks")}
    notes = Notes()
    result = train(classes_config(data__held_out={"sources": [source]}), tmp_path / "run", progress=notes)
    assert result.steps == 6 and result.score is None
    assert any("no score" in note and "00000.png" in note for note in notes.notes)


def test_a_loss_that_is_no_number_ends_the_run(classes_config, tmp_path):
    with pytest.raises(VosopsError, match="the loss is not a number in the steps up to"):
        train(classes_config(optimizer={"kind": "sgd", "rate": 1e30}), tmp_path / "run")


def test_float16_needs_a_gpu(classes_config, tmp_path):
    with pytest.raises(VosopsError, match="must be float32 or bfloat16 on a CPU, got float16"):
        train(classes_config(precision="float16", device="cpu"), tmp_path / "run")


def test_tensorboard_has_what_the_tables_have(classes_config, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(classes_config(tensorboard=True), tmp_path / "run")
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    losses = [event.value for event in events.Scalars("train/loss")]
    assert losses == pytest.approx(
        [float(row["loss"]) for row in rows(tmp_path / "run" / "log.csv")], rel=1e-4
    )
    assert events.Tags()["images"] == ["pictures"]


def test_a_table_drops_half_a_line_and_later_steps(tmp_path):
    path = tmp_path / "log.csv"
    path.write_text("step,loss\n1,0.5\n2,0.25\n3,0.1\n1")
    table = Table(path)
    table.keep_until(2)
    table.add({"step": 3, "loss": 0.125, "other": 1.0})
    assert path.read_text() == "step,loss\n1,0.5\n2,0.25\n3,0.125\n"
