"""Whole systems by their own entry points, before and after `accelerate`: the same masks, what a frame takes.

    python benchmarks/bench_clones.py sam2 DIR --json FILE   # or sam3, edgetam, efficienttam, aot, cfbi

DIR is a clone, which is not changed: its scripts and builders run on a clip made here, with seeded weights, in a folder
of their own; a file COMMIT may say which it is. Each case runs as it is, accelerated, and with its memory emptied,
which has to change the result by 100 times what is tolerated, or the weights would hide an error. Reads that are too
small to gain on a CPU are replaced as well, so that they are compared. Times are those of the process on one thread, of
the calls that track a frame, without reading pictures and building networks. CFBI's scripts and SAM 3 ask for a GPU;
here what they put there stays on the CPU. --case TEXT: only the cases whose title holds it.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import itertools
import json
import os
import platform
import runpy
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from vosops import compat, info
from vosops.benchmarking.measure import peak_bytes
from vosops.integrations import accelerate
from vosops.integrations.recipes import replace_small_ones
from vosops.io.outputs import write_text

TOLERANCE = 1e-4  # of logits
MEMORY_COUNTS = 100  # times that, at least, is what an emptied memory changes
SCALE = 3  # of seeded weights of AOT, so that what is remembered changes the logits
SCALES_OF_RESNET = {
    "encoder_projector": 0.05,
    "patch_wise_id_bank": 30,
}  # whose features are 20 times as large
SIZES = {
    "128": (128, 128),
    "120p": (120, 216),
    "480p": (480, 854),
    "1008": (1008, 1008),
    "1024": (1024, 1024),
}
LATER, CORRECTED = (
    2,
    3,
)  # frames of a session of SAM 2 in which an object comes, and in which one is corrected
EXACT_CHUNKS = 8  # times as many in float64, or 16 objects at 480p would take 23 GB
_MIB = 1 << 20
_NO_OBJECT = -1e9  # logits below are those of objects that there are not


class Watch:
    """Counts the seconds in a method, and keeps what it returns, while it is entered."""

    def __init__(self, owner: Any, name: str, keep: Callable[[Any], list[Tensor]] | None = None) -> None:
        self._owner, self._name, self._keep = owner, name, keep
        self.seconds, self.results = 0.0, []  # type: float, list[Tensor]

    def __enter__(self) -> Watch:
        method = getattr(self._owner, self._name)

        @functools.wraps(method)
        def watched(*args: Any, **kwargs: Any) -> Any:
            start = time.process_time()
            result = method(*args, **kwargs)
            self.seconds += time.process_time() - start
            if self._keep is not None:
                self.results += [each.detach().clone() for each in self._keep(result)]
            return result

        self._put_back = replaced(self._owner, **{self._name: watched})
        self._put_back.__enter__()
        self.seconds, self.results = 0.0, []
        return self

    def __exit__(self, *error: object) -> None:
        self._put_back.__exit__(None, None, None)


@contextlib.contextmanager
def replaced(owner: Any, **values: Any) -> Iterator[None]:
    """Give attributes of an object, class or module other values for a while."""
    own = {name: vars(owner)[name] for name in values if name in vars(owner)}
    for name, value in values.items():
        setattr(owner, name, value)
    try:
        yield
    finally:
        for name in values:
            if name in own:
                setattr(owner, name, own[name])
            else:
                delattr(owner, name)


@contextlib.contextmanager
def _without_gpu() -> Iterator[None]:
    """Let what a script puts on a GPU stay where it is."""

    def stays(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self

    def nothing(*args: Any, **kwargs: Any) -> None:
        return None

    def load(file: Any, *args: Any, map_location: Any = None, **kwargs: Any) -> Any:
        return from_file(file, map_location="cpu", **kwargs)

    from_file = torch.load
    with (
        replaced(torch.Tensor, cuda=stays, pin_memory=stays),
        replaced(nn.Module, cuda=stays),
        replaced(torch, load=load),
        replaced(torch.cuda, set_device=nothing, empty_cache=nothing),
    ):
        yield


class Clone(NamedTuple):
    """A system that is ready to run.

    track runs its entry point; watches count what a frame takes, and the first of them may keep what was found; forget
    empties the memory for a while; modules are those whose share of the time is told apart. exact lets the original
    compute in float64 what is replaced, where its own rounding is above what is tolerated: then that is the judge.
    """

    target: Any
    track: Callable[[], list[Tensor]]
    watches: Sequence[Watch]
    forget: Callable[[], contextlib.AbstractContextManager[Any]]
    modules: Callable[[], Sequence[type]]
    frames: int
    exact: Callable[[], contextlib.AbstractContextManager[Any]] | None = None


class Case(NamedTuple):
    """What to run: make(folder of the clone, case) gives a Clone."""

    title: str
    make: Callable[[str, Case], Clone]
    model: str
    size: tuple[int, int]
    objects: int
    frames: int


# ---- The clip: a square for each object on noise, all of which move.


def _squares(case: Case, t: int) -> Iterator[tuple[int, int, int, int]]:
    """Yield top, left, bottom, right of the objects in a frame."""
    height, width = case.size
    rows = max(1, round(case.objects**0.5))
    columns = -(-case.objects // rows)
    high, wide = height // rows, width // columns
    for n in range(case.objects):
        top, left = n // columns * high + high // 8 + t, n % columns * wide + wide // 8 + 2 * t
        yield top, left, min(height, top + high * 5 // 8), min(width, left + wide * 5 // 8)


def _write_clip(case: Case, frames: Path, masks: Path | None = None) -> None:
    """Write numbered JPEG files, and the first frame's objects as a PNG file."""
    frames.mkdir(parents=True)
    random = np.random.default_rng(0)
    for t in range(case.frames):
        picture = random.integers(0, 100, (*case.size, 3), np.uint8)
        for n, (top, left, bottom, right) in enumerate(_squares(case, t)):
            picture[top:bottom, left:right] += np.array([120, 20 + 8 * n, 140 - 8 * n], np.uint8)
        Image.fromarray(picture).save(frames / f"{t:05d}.jpg", quality=95)
    if masks is not None:
        masks.mkdir(parents=True)
        labels = Image.fromarray(_labels(case))
        labels.putpalette(list(itertools.islice(itertools.cycle(range(256)), 768)))
        labels.save(masks / "00000.png")


def _labels(case: Case, t: int = 0) -> np.ndarray[Any, Any]:
    labels = np.zeros(case.size, np.uint8)
    for n, (top, left, bottom, right) in enumerate(_squares(case, t)):
        labels[top:bottom, left:right] = n + 1
    return labels


def _run_script(path: Path, *arguments: object) -> None:
    """Run a script of a clone as its user would, in this process; its words are not shown."""
    with (
        replaced(sys, argv=[str(path), *map(str, arguments)]),
        contextlib.redirect_stdout(open(os.devnull, "w")),
    ):
        runpy.run_path(str(path), run_name="__main__")


# ---- SAM 2, EdgeTAM, EfficientTAM: a session of the video predictor.


def _session(predictor: Any, case: Case, frames: Path, *, later: bool = True) -> list[Tensor]:
    """Mark objects by clicks, boxes and masks, correct the first, let one come later, remove it -> all logits."""
    torch.manual_seed(0)
    found: list[Tensor] = []
    boxes, first = list(_squares(case, 0)), case.objects - (1 if later and case.objects > 1 else 0)
    with torch.inference_mode():
        state = predictor.init_state(str(frames))

        def propagate(start: int, end: int) -> None:
            for *_, logits in predictor.propagate_in_video(state, start, end - start - 1):
                found.append(logits.clone())

        for n, (top, left, bottom, right) in enumerate(boxes[:first]):
            if n % 3 == 0:
                points = np.array([[(left + right) / 2, (top + bottom) / 2], [left + 4, top + 4]], np.float32)
                predictor.add_new_points_or_box(
                    state, 0, n + 1, points=points, labels=np.array([1, 1], np.int32)
                )
            elif n % 3 == 1:
                predictor.add_new_points_or_box(
                    state, 0, n + 1, box=np.array([left, top, right, bottom], np.float32)
                )
            else:
                predictor.add_new_mask(state, 0, n + 1, torch.from_numpy(_labels(case) == n + 1))
        propagate(0, CORRECTED + 1)
        if first < case.objects:
            marked = torch.from_numpy(_labels(case, LATER) == case.objects)
            predictor.add_new_mask(state, LATER, case.objects, marked)
        top, left, bottom, right = next(iter(_squares(case, CORRECTED)))
        points = np.array([[(left + right) / 2, top + 6]], np.float32)
        predictor.add_new_points_or_box(state, CORRECTED, 1, points=points, labels=np.array([1], np.int32))
        propagate(LATER, case.frames - 1)
        if case.objects > 1:
            predictor.remove_object(state, 2)
        propagate(case.frames - 1, case.frames)
    return found


def _ready_predictor(case: Case, predictor: Any, session: Callable[..., list[Tensor]] = _session) -> Clone:
    attention = getattr(predictor, "memory_attention", None) or predictor.transformer.encoder  # SAM 3
    with torch.no_grad():
        predictor.sam_mask_decoder.pred_obj_score_head.layers[-1].bias.fill_(
            10
        )  # else no object is ever seen
        for layer in attention.layers:
            layer.cross_attn_image.v_proj.weight.mul_(10)
    _write_clip(case, Path("frames"))
    encode = predictor._encode_new_memory

    def nothing(*args: Any, **kwargs: Any) -> Any:
        features, positions = encode(*args, **kwargs)
        return torch.zeros_like(features), positions

    return Clone(
        predictor,
        lambda: session(predictor, case, Path("frames")),
        [Watch(predictor, "_run_single_frame_inference")],
        lambda: replaced(predictor, _encode_new_memory=nothing),
        lambda: [type(attention)],
        2 * case.frames,  # at most: some are tracked twice
    )


def sam2(folder: str, case: Case) -> Clone:
    """Meta's repository, or the package of the same name."""
    from sam2.build_sam import build_sam2_video_predictor

    torch.manual_seed(0)
    return _ready_predictor(
        case,
        build_sam2_video_predictor(
            f"configs/sam2.1/sam2.1_hiera_{case.model}.yaml",
            None,
            device="cpu",
            hydra_overrides_extra=[f"++model.image_size={case.size[0]}"],
        ),
    )


def edgetam(folder: str, case: Case) -> Clone:
    """EdgeTAM, whose encoder comes from timm: its weights would be downloaded, and are seeded here.

    Of one object: with more its own summaries of frames raise (`view` of expanded latents).
    """
    import timm.models
    from sam2.build_sam import build_sam2_video_predictor

    create = timm.models.create_model
    untrained = functools.wraps(create)(
        lambda name, **options: create(name, **{**options, "pretrained": False})
    )
    side = case.size[0]
    grid = side // 64  # of a frame's summaries, 16 at 1024
    sizes = {
        "image_size": side,
        "memory_attention.layer.cross_attention.q_sizes": [side // 16] * 2,
        "memory_attention.layer.cross_attention.k_sizes": [grid] * 2,
        "spatial_perceiver.num_latents_2d": grid**2,
        "spatial_perceiver.num_latents": grid**2,
    }
    torch.manual_seed(0)
    with replaced(timm.models, create_model=untrained):
        predictor = build_sam2_video_predictor(
            "configs/edgetam.yaml",
            None,
            device="cpu",
            hydra_overrides_extra=[f"++model.{name}={value}" for name, value in sizes.items()],
        )
    return _ready_predictor(case, predictor, functools.partial(_session, later=False))


def efficienttam(folder: str, case: Case) -> Clone:
    """EfficientTAM, with and without its pooled memory; its builder forgets overrides where there is no GPU."""
    module = importlib.import_module("efficient_track_anything.build_efficienttam")
    compose = module.compose

    def compose_small(config_name: str, overrides: list[str]) -> Any:
        return compose(config_name=config_name, overrides=[*overrides, f"++model.image_size={case.size[0]}"])

    torch.manual_seed(0)
    with replaced(module, compose=compose_small):
        predictor = module.build_efficienttam_video_predictor(
            f"configs/efficienttam/efficienttam_{case.model}.yaml", None, device="cpu"
        )
    return _ready_predictor(case, predictor)


class _FewFeatures(nn.Module):
    """Features of pictures of 1008 x 1008 at strides of 3.5, 7 and 14, in place of SAM 3's image encoder."""

    def __init__(self, positions: nn.Module) -> None:
        super().__init__()
        self.middle, self.low, self.positions = nn.Conv2d(3, 256, 7, 7), nn.Conv2d(3, 256, 14, 14), positions

    def forward_image(self, images: Tensor) -> dict[str, dict[str, list[Tensor]]]:
        middle, low = self.middle(images), self.low(images)
        features = [nn.functional.interpolate(middle, scale_factor=2.0), middle, low]
        places = [self.positions(each) for each in features]
        return {"sam2_backbone_out": {"backbone_fpn": features, "vision_pos_enc": places}}


def sam3(folder: str, case: Case) -> Clone:
    """SAM 3's tracker as its repository builds it, but for the image encoder of 450 million parameters."""
    builder = importlib.import_module("sam3.model_builder")
    zeros = torch.zeros
    torch.manual_seed(0)
    with (
        _without_gpu(),
        replaced(torch, zeros=lambda *size, device=None, **options: zeros(*size, **options)),
    ):
        predictor = builder.build_tracker(apply_temporal_disambiguation=False).eval()
    predictor.backbone = _FewFeatures(builder._create_position_encoding())
    return _ready_predictor(case, predictor, _session_of_sam3)


def _session_of_sam3(predictor: Any, case: Case, frames: Path) -> list[Tensor]:
    """Mark an object by clicks and others by boxes, correct the first, remove the second -> all logits."""
    found: list[Tensor] = []
    height, width = case.size
    corrected = case.frames - 2
    torch.manual_seed(0)
    with torch.inference_mode(), _without_gpu():
        kept_here = {"offload_video_to_cpu": True, "offload_state_to_cpu": True}
        state = predictor.init_state(video_path=str(frames), **kept_here)

        def propagate(start: int, end: int) -> None:
            for _, _, _, logits, _ in predictor.propagate_in_video(
                state, start, end - start - 1, False, propagate_preflight=True
            ):
                found.append(logits.clone())

        for n, (top, left, bottom, right) in enumerate(_squares(case, 0)):
            corners = [[left / width, top / height], [right / width, bottom / height]]
            marked: dict[str, Any] = {"box": torch.tensor(corners)}
            if n == 0:
                marked = {"points": torch.tensor(corners).mean(0, keepdim=True), "labels": [1]}
            predictor.add_new_points_or_box(state, 0, n + 1, **marked)
        propagate(0, corrected + 1)
        top, left, _, right = next(iter(_squares(case, corrected)))
        points = [[(left + right) / 2 / width, (top + 6) / height]]
        predictor.add_new_points_or_box(state, corrected, 1, points=points, labels=[1])
        propagate(corrected, case.frames)
        if case.objects > 1:
            predictor.remove_object(state, 2)
            propagate(case.frames - 1, case.frames)
    return found


# ---- AOT, DeAOT: tools/demo.py.


def aot(folder: str, case: Case) -> Clone:
    """Run the repository's demonstration on a folder with a clip, with a file of weights.

    Without spatial-correlation-sampler its short-term attention raises in today's PyTorch: vosops' drop-in takes its
    place before `accelerate` too.
    """
    compat.install("spatial_correlation_sampler")
    from networks.models import build_vos_model

    config = importlib.import_module("configs.pre_ytb_dav").EngineConfig("seeded", case.model)
    torch.manual_seed(0)
    network = build_vos_model(config.MODEL_VOS, config).eval()
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "relative_emb" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.1)
            elif parameter.dim() > 1 and any(part in name for part in ("LSTT", "id", "decoder")):
                parameter *= SCALE
            if case.model.startswith("r50") and parameter.dim() > 1:
                parameter *= SCALES_OF_RESNET.get(name.split(".")[0], 1)
    torch.save({"state_dict": network.state_dict()}, "weights.pth")
    _write_clip(case, Path("clip/images/clip"), Path("clip/masks/clip"))
    module = importlib.import_module("networks.engines.aot_engine")
    gated = importlib.import_module("networks.engines.deaot_engine")
    engine = gated.DeAOTInferEngine if "deaot" in case.model else module.AOTInferEngine
    one = module.AOTEngine
    decode = Watch(engine, "decode_current_logits", lambda logits: [logits])
    others = [Watch(engine, name) for name in ("match_propogate_one_frame", "update_memory")]
    identity = one.assign_identity

    def track() -> list[Tensor]:
        script = Path(folder, "tools/demo.py")
        options = {
            "model": case.model,
            "data_path": "clip",
            "output_path": "masks",
            "ckpt_path": "weights.pth",
        }
        _run_script(script, *itertools.chain(*((f"--{name}", value) for name, value in options.items())))
        return decode.results

    def nobody(self: Any, mask: Tensor) -> Any:
        return identity(self, torch.zeros_like(mask))

    return Clone(
        importlib.import_module("networks.layers.attention"),
        track,
        [decode, *others],
        lambda: replaced(one, assign_identity=nobody),
        lambda: [type(network.LSTT)],
        case.frames - 1,
    )


# ---- CFBI, CFBI+: tools/eval_net.py.


def cfbi(folder: str, case: Case) -> Clone:
    """Run the repository's evaluation on a data set of one clip, with a file of weights."""
    from networks.deeplab.deeplab import DeepLab

    _write_clip(
        case, Path("datasets/DAVIS/JPEGImages/480p/clip"), Path("datasets/DAVIS/Annotations/480p/clip")
    )
    Path("datasets/DAVIS/ImageSets/2017").mkdir(parents=True)
    Path("datasets/DAVIS/ImageSets/2017/val.txt").write_text("clip\n")
    with replaced(torch.cuda, is_available=lambda: True):  # the configuration asks
        config = importlib.import_module(f"configs.resnet101_{case.model}").cfg
    caller, matchings = (
        importlib.import_module(config.MODEL_MODULE),
        ("global_matching_for_eval", "local_matching"),
    )
    network = caller.get_module()
    importlib.import_module("networks.engine.eval_manager")
    torch.manual_seed(0)
    seeded = network(config, DeepLab(backbone=config.MODEL_BACKBONE, freeze_bn=config.MODEL_FREEZE_BN))
    torch.save({"state_dict": seeded.state_dict()}, "weights.pth")
    step, forward = Watch(network, "forward_for_eval"), network.forward_for_eval
    logits = Watch(network, "before_seghead_process", lambda result: list(result[0]))

    def track() -> list[Tensor]:
        with logits, _without_gpu():
            _run_script(
                Path(folder, "tools/eval_net.py"),
                *(
                    "--config",
                    f"configs.resnet101_{case.model}",
                    "--dataset",
                    "davis2017",
                    "--ckpt_path",
                    "weights.pth",
                ),
            )
        return logits.results

    def forgetful(self: Any, references: Any, masks: Any, previous: Any, *args: Any, **kwargs: Any) -> Any:
        past = _zeros(references), masks, _zeros(previous)
        return forward(self, *past, *args, **kwargs)

    return Clone(
        importlib.import_module("networks.layers.matching"),
        track,
        [step],
        lambda: replaced(network, forward_for_eval=forgetful),
        lambda: [],
        case.frames,
        lambda: replaced(caller, **{name: _in_float64(getattr(caller, name)) for name in matchings}),
    )


def _in_float64(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(function)
    def exact(**options: Any) -> Tensor:
        chunks = {"n_chunks": options["n_chunks"] * EXACT_CHUNKS} if "n_chunks" in options else {}
        return function(**{name: _doubled(value) for name, value in {**options, **chunks}.items()}).float()

    return exact


def _doubled(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.double()
    return [_doubled(each) for each in value] if isinstance(value, list) else value


def _zeros(value: Any) -> Any:
    if isinstance(value, Tensor):
        return torch.zeros_like(value)
    return type(value)(map(_zeros, value)) if isinstance(value, (list, tuple)) else value


def _case(make: Any, model: str, size: str, objects: int, frames: int) -> Case:
    count = f"{objects} object{'s' * (objects > 1)}"
    return Case(f"{model}, {size}, {count}", make, model, SIZES[size], objects, frames)


SYSTEMS: dict[str, list[Case]] = {
    "sam2": [
        *(_case(sam2, model, "128", 3, 7) for model in ("t", "s", "b+", "l")),
        *(_case(sam2, "t", "1024", objects, 6) for objects in (1, 4)),
    ],
    "sam3": [_case(sam3, "tracker", "1008", 2, 3)],
    "edgetam": [_case(edgetam, "edgetam", size, 1, 5) for size in ("128", "1024")],
    "efficienttam": [
        *(_case(efficienttam, model, "128", 2, 5) for model in ("ti", "s", "ti_1", "ti_2")),
        *(_case(efficienttam, model, "1024", 1, 5) for model in ("ti", "ti_1", "ti_2")),
    ],
    "aot": [
        *(
            _case(aot, model, "120p", 3, 7)
            for model in ("aott", "aots", "aotb", "aotl", "r50_aotl", "deaott", "deaotl", "r50_deaotl")
        ),
        *(_case(aot, model, "480p", n, 4) for model in ("r50_aotl", "r50_deaotl") for n in (1, 4, 16)),
    ],
    "cfbi": [
        *(_case(cfbi, model, "120p", 2, 3) for model in ("cfbi", "cfbip")),
        *(_case(cfbi, model, "480p", objects, 2) for model in ("cfbi", "cfbip") for objects in (1, 4, 16)),
    ],
}


class _Run(NamedTuple):
    found: list[Tensor]
    seconds: float  # of what is watched
    seconds_of_modules: float
    peak_bytes: int | None


def _run(clone: Clone) -> _Run:
    """Run the entry point once."""
    found: list[list[Tensor]] = []
    spent, started = [0.0], [0.0]
    kinds = tuple(clone.modules())

    def starts(module: nn.Module, _: Any) -> None:
        if isinstance(module, kinds):
            started[0] = time.process_time()

    def ends(module: nn.Module, _: Any, __: Any) -> None:
        if isinstance(module, kinds):
            spent[0] += time.process_time() - started[0]

    with contextlib.ExitStack() as stack:
        if kinds:
            hooks = nn.modules.module
            for handle in (
                hooks.register_module_forward_pre_hook(starts),
                hooks.register_module_forward_hook(ends),
            ):
                stack.callback(handle.remove)
        for watch in clone.watches:
            stack.enter_context(watch)
        peak = peak_bytes(lambda: found.append(list(clone.track())), torch.device("cpu"))
    return _Run(found[0], sum(watch.seconds for watch in clone.watches), spent[0], peak)


def _difference(first: Sequence[Tensor], second: Sequence[Tensor]) -> float:
    """Return the greatest difference; objects that there are not are the same in both."""
    return max(
        (a - b).abs()[(a > _NO_OBJECT) | (b > _NO_OBJECT)].max().item()
        for a, b in zip(first, second, strict=True)
    )


def measure(name: str, folder: str, case: Case) -> dict[str, Any]:
    """Run one case of a system in a folder of its own."""
    with tempfile.TemporaryDirectory() as scratch, _inside(scratch):
        with contextlib.redirect_stdout(open(os.devnull, "w")):
            clone = case.make(folder, case)
        before = _run(clone)
        exact = None
        if clone.exact is not None:
            with clone.exact():
                exact = _run(clone)
        with accelerate(clone.target) as acceleration, replace_small_ones():
            after = _run(clone)
            replacements = list(acceleration.replaced)
            with clone.forget():
                forgotten = _run(clone)
    return {
        "system": name,
        "case": case.title,
        "commit": _commit(folder),
        "torch": torch.__version__,
        "processor": info.collect()["cpu"]["processor"],
        "library": torch.ops.vosops.cpu_capability(),
        "load": os.getloadavg()[0],
        "frames": case.frames,
        "replaced": replacements,
        "seconds": [before.seconds, after.seconds],
        "seconds_of_attention": [before.seconds_of_modules, after.seconds_of_modules],
        "peak_bytes": [before.peak_bytes, after.peak_bytes],
        "greatest_logit": max(each[each > _NO_OBJECT].abs().max().item() for each in before.found),
        "greatest_difference": _difference(before.found, after.found),
        "differences_from_exact": exact and [_difference(run.found, exact.found) for run in (before, after)],
        "difference_without_memory": _difference(before.found, forgotten.found),
        "same_masks": _masks(before.found, after.found),
    }


@contextlib.contextmanager
def _inside(folder: str) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def _masks(first: Sequence[Tensor], second: Sequence[Tensor]) -> float:
    """Return the share of pixels whose sign, or greatest logit, is the same."""
    same = []
    for a, b in zip(first, second, strict=True):
        alike = (a > 0) == (b > 0) if a.shape[1] == 1 else a.argmax(1) == b.argmax(1)
        same.append(alike.float().mean().item())
    return min(same)


def _commit(folder: str) -> str | None:
    """Return what a clone's folder says of its commit: git's, or a file COMMIT."""
    note = Path(folder, "COMMIT")
    if note.exists():
        return note.read_text().strip()
    done = subprocess.run(
        ["git", "-C", folder, "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or None


def main() -> None:
    """Measure what the command line names, print the table, keep the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("system", choices=SYSTEMS)
    parser.add_argument("folder", type=Path, help="of the clone")
    parser.add_argument("--case", default="", help="only cases whose title holds this")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    folder, name = str(arguments.folder.resolve()), arguments.system
    results = arguments.json and arguments.json.resolve()
    sys.path.insert(0, folder)
    rows = []
    print("| case | a clip before, after | attention | peak memory | greatest difference | without memory |")
    print("|---|---|---|---|---|---|")
    for case in SYSTEMS[name]:
        if arguments.case in case.title:
            rows.append(measure(name, folder, case))
            print(_line(rows[-1]), flush=True)
            if results:
                _keep(results, rows)
    if any(_judged(row) > TOLERANCE for row in rows):
        raise SystemExit(f"logits differ by more than {TOLERANCE:g}")
    if any(row["difference_without_memory"] < MEMORY_COUNTS * TOLERANCE for row in rows):
        raise SystemExit("with these weights an empty memory changes too little")


def _judged(row: dict[str, Any]) -> float:
    """Return the difference that has to be small: from the exact result where there is one."""
    exact = row["differences_from_exact"]
    return float(exact[1] if exact else row["greatest_difference"])


def _line(row: dict[str, Any]) -> str:
    (a, b), (c, d), (x, y) = row["seconds"], row["seconds_of_attention"], row["peak_bytes"]
    attention = f"{c:.1f} s, {d:.1f} s ({c / d:.1f}x)" if d else ""
    return (
        f"| {row['case']} | {a:.1f} s, {b:.1f} s ({a / b:.2f}x) | {attention} "
        f"| {x / _MIB:.0f} MiB, {y / _MIB:.0f} MiB | {row['greatest_difference']:.0e} of {row['greatest_logit']:.0e} "
        f"| {row['difference_without_memory']:.0e} |"
    )


def _keep(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write the rows, with those of before that were not measured now."""
    named = {(row["system"], row["case"]) for row in rows}
    before = json.loads(path.read_text())["rows"] if path.exists() else []
    kept = [row for row in before if (row["system"], row["case"]) not in named] + rows
    facts = {"python": platform.python_version(), "threads": 1, "rows": kept}
    write_text(path, json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    main()
