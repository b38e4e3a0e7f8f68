"""Every network of the registry learns: a step on small data, and a clip by heart."""

from __future__ import annotations

import math

import pytest

pytest.importorskip("pydantic")
pytest.importorskip("lightning_fabric")
pytest.importorskip("av")
import torch  # noqa: E402

from tests.effort import leave_out  # noqa: E402
from tests.training.conftest import changed  # noqa: E402
from vosops.io.errors import InputError  # noqa: E402
from vosops.models import find_model, list_models  # noqa: E402
from vosops.training.config import parse_config  # noqa: E402
from vosops.training.loading import Batch  # noqa: E402
from vosops.training.loop import train  # noqa: E402
from vosops.training.optimizing import create_optimizer  # noqa: E402
from vosops.training.task import Shard, create_task  # noqa: E402

OPTIONS = {
    "deeplabv3plus": {"backbone": "mobilenet_v2"},
    "lstm_segnet": {"width": 8},
    "rfcn": {"width": 8, "hidden": 16},
    "feelvos": {"backbone": "efficientnet_lite0"},
    "unetplusplus": {"deep_supervision": True},
}
HEAVY = {
    "deconvnet": "250 million parameters, and SegNet has its layers",
    "hrnet_w32": "a wider hrnet_w18",
    "hrnet_w48": "a wider hrnet_w18",
    "hrnet_w48_ocr": "a wider hrnet_w18 with two outputs, as pspnet has",
    "danet": "the ResNet of pspnet and icnet",
}
NETWORKS = [*list_models("mask network"), *list_models("semantic network")]  # without those of a test


@pytest.fixture(autouse=True, scope="module")
def serial(one_thread):
    """Every test here runs in one thread."""


def config_of(name, davis, **changes):
    options = dict(OPTIONS.get(name, {}))
    if find_model(name).kind == "semantic network" and not name.startswith("resunet"):
        options["num_classes"] = 3
    content = {
        "model": name,
        "options": options,
        "steps": 1,
        "batch": 2,
        "data": {
            "train": [{"kind": "videos", "root": str(davis)}],
            "clips": {"frames": 3, "crop": 32, "gap": {"first": 1, "last": 1}},
            "workers": 0,
        },
        "loss": {"share": 0.5, "dice": 0.5},
        "optimizer": {"kind": "sgd", "rate": 1e-3},
        "freeze_batch_norm": find_model(name).kind == "mask network",
    }
    return parse_config(changed(content, changes))


@pytest.mark.parametrize("name", NETWORKS)
def test_a_step_changes_what_is_trained(name, davis):
    leave_out(name in HEAVY, HEAVY.get(name, ""))
    tracks = find_model(name).kind == "mask network"
    frames = 3 if tracks or name in ("rfcn", "lstm_segnet", "lstm_icnet") else 1
    config = config_of(name, davis, data__clips__frames=frames, optimizer__weight_decay=0.0)
    task = create_task(config, Shard())
    optimizer = create_optimizer(task.network, config.optimizer)
    task.network.train()
    trained = {n: p for n, p in task.network.named_parameters() if p.requires_grad}
    before = {n: p.detach().clone() for n, p in trained.items()}
    loss, _ = task.loss(task.network, next(task.batches(0)))
    loss.backward()
    assert loss.ndim == 0 and math.isfinite(float(loss.detach()))
    reached = {n for n, p in trained.items() if p.grad is not None and p.grad.abs().max() > 0}
    optimizer.step()
    moved = {n for n, p in trained.items() if not torch.equal(p, before[n])}
    assert len(reached) > len(before) / 2 and moved and moved <= reached


def test_a_recurrent_network_learns_from_clips(davis):
    config = config_of("unet", davis, options={"num_classes": 3, "recurrent": "head"})
    task = create_task(config, Shard())
    loss, _ = task.loss(task.network.train(), next(task.batches(0)))
    loss.backward()
    gradients = [p.grad for p in task.network.lstms.parameters()]
    assert gradients and all(gradient.abs().sum() > 0 for gradient in gradients)


@pytest.mark.parametrize("name", ["feelvos", "lstm_segnet"])
def test_a_clip_is_learned_by_heart(name, davis):
    config = config_of(name, davis, batch=1, loss={}, optimizer={"rate": 2e-3})
    task = create_task(config, Shard())
    optimizer = create_optimizer(task.network, config.optimizer)
    batch = next(task.batches(0))
    losses = []
    for _ in range(20):
        loss, _ = task.loss(task.network, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]


def test_clips_of_unequal_objects_are_averaged_alike(davis):
    task = create_task(config_of("rgmp", davis, loss={}), Shard())
    batch = next(task.batches(0))
    batch = Batch(
        batch.frames,
        batch.labels.where(torch.tensor([True, False])[:, None, None, None] | (batch.labels < 2), 0),
        (2, 1),
    )
    together, _ = task.loss(task.network, batch)
    alone = [
        task.loss(task.network, Batch(batch.frames[n : n + 1], batch.labels[n : n + 1], (batch.objects[n],)))[
            0
        ]
        for n in (0, 1)
    ]
    assert float(together.detach()) == pytest.approx(float(sum(alone).detach() / 2), rel=1e-5)


def test_what_is_computed_again_gives_the_same_gradients(davis):
    found = []
    for recompute in ([], ["Encoder.res*"]):
        config = config_of("rgmp", davis, recompute=recompute)
        task = create_task(config, Shard())
        loss, _ = task.loss(task.network, next(task.batches(0)))
        loss.backward()
        found.append({n: p.grad for n, p in task.network.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys() and len(found[0]) > 100
    assert all(torch.equal(found[0][n], found[1][n]) for n in found[0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"freeze": ["nothing*"]}, "freeze must match a parameter of unet, got 'nothing"),
        ({"freeze": ["*"]}, "freeze must leave at least one parameter to train"),
        ({"recompute": ["nothing*"]}, "recompute must match a module of the network, got"),
        ({"recompute": ["inc"]}, "recompute must not match batch norm in training mode"),
        ({"options": {"classes": 3}}, "unet cannot be created: options of unet must be among"),
        (
            {"model": "propagate", "options": {}},
            "model must be a network to be trained, got 'propagate', a tracker",
        ),
        ({"optimizer": {"factors": {"none*": 0.1}}}, "factors must match a trained parameter, got 'none"),
    ],
)
def test_what_cannot_be_trained_is_named(davis, changes, message):
    config = config_of("unet", davis, **changes)
    with pytest.raises(InputError, match=message):
        create_optimizer(create_task(config, Shard()).network, config.optimizer)


def test_held_out_sources_are_looked_at_first(davis, stills, tmp_path):
    nothing = {"kind": "stills", "images": str(tmp_path), "masks": str(tmp_path)}
    with pytest.raises(InputError, match="holds no image with a mask of the same name"):
        create_task(config_of("unet", davis, data__held_out={"sources": [nothing]}), Shard())
    still = {"kind": "stills", "images": str(stills / "images"), "masks": str(stills / "masks")}
    with pytest.raises(InputError, match="must be videos for a tracking network, got stills"):
        create_task(config_of("rgmp", davis, data__held_out={"sources": [still]}), Shard())


def test_a_network_that_does_not_say_how_it_is_trained(davis):
    task = create_task(config_of("stranger_masks", davis), Shard())
    with pytest.raises(
        InputError, match="stranger_masks cannot be trained: StrangerMasks has no clip_logits"
    ):
        task.loss(task.network, next(task.batches(0)))


def test_videos_are_scored_as_eval_does(davis, tmp_path):
    config = config_of("rgmp", davis, tensorboard=False)
    sources = [{"kind": "videos", "root": str(davis), "sequences": ["one", "two"]}]
    config = parse_config(
        {
            **config.model_dump(mode="json"),
            "data": {**config.data.model_dump(mode="json"), "held_out": {"sources": sources, "frames": 2}},
        }
    )
    result = train(config, tmp_path / "run")
    header = (tmp_path / "run" / "scores.csv").read_text().splitlines()[0]
    assert header == "step,score,J,F,one,two,seconds" and 0 <= result.score <= 1
