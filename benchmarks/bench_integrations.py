"""The reads and matchings of SAM 2, XMem, Cutie, STCN, AOT and CFBI before and after `accelerate`: time, peak memory.

    python benchmarks/bench_integrations.py aot sam2 cutie stcnbuf xmem=DIR stcn=DIR mask-propagation=DIR cfbi=DIR

Installed packages by their names, checkouts with their folders. Each system runs in a process of its own, before and
after in turn, at 480p (30 x 54 positions) with random keys unless the case names another size; training reads are those
of 4 clips of 3 frames of 24 x 24. The calls of `accelerate` are timed apart from the reads. --case TEXT: only the cases
whose title holds it. --rounds N: timed runs of each, of which the median counts; 0 takes the time of the run that
measures memory. --limit GB: memory that a case may take beyond what its inputs do; where an original asks for more, its
row says how much in place of its time, and only the accelerated run is measured.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import platform
import re
import resource
import statistics
import sys
import time
import types
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from vosops import info
from vosops.benchmarking.fresh import run_fresh
from vosops.benchmarking.measure import Clock, peak_bytes
from vosops.integrations import accelerate
from vosops.io.outputs import write_text

FRAME = (30, 54)
SQUARE = (64, 64)  # positions at 1024 x 1024
AOT_FRAMES, AOT_TOP_K, AOT_OBJECTS = 5, 30, 10
FRAMES, OBJECTS, LONG = 20, 3, 10_000
SEQUENCE = 60
WORKING = 10  # frames, beside a full long-term memory
CHUNK_BATCH, CHUNK_FRAMES, CHUNK_SIDE = 4, 3, 24  # of the training reads
ROUNDS = 3
TOLERANCE = 1e-5
_MIB = 1 << 20

SAM2_FRAMES, SAM2_POINTERS = 7, 16  # of its memory
SAM2_KEPT = 4  # objects whose keys are kept, of 470 MiB each at 1024 x 1024
Read = Callable[[], list[torch.Tensor]]
Case = (
    tuple[str, Any, Read] | tuple[str, Any, Read, dict[str, Any]]
)  # title, target, read, options of accelerate


class _Case(NamedTuple):
    title: str
    target: Any
    read: Read
    options: dict[str, Any] = {}  # noqa: RUF012


def sam2(wanted: str = "") -> Iterator[Case]:
    """Its predictor's attention to a full memory, in all layers: what a tracked frame and object costs.

    wanted: sizes without a case whose title holds it are not built.
    """
    from sam2.build_sam import build_sam2_video_predictor

    for side, objects in ((512, 1), (512, 4), (512, 16), (1024, 1), (1024, 4), (1024, 16)):
        reads = f"{SAM2_FRAMES} frames and {SAM2_POINTERS} pointers, {side}x{side}, {objects} at once"
        tracks = f"a tracked frame, {side}x{side}, {objects} objects of 1 to {SAM2_FRAMES} frames"
        of_reads = any(wanted in title for title in (reads, f"{reads}, keys kept"))
        of_tracks = objects > 1 and any(wanted in title for title in (tracks, f"{tracks}, objects together"))
        if not (of_reads or of_tracks):
            continue
        small = {"image_size": side, "image_encoder.trunk.embed_dim": 16, "image_encoder.trunk.stages": [1, 1, 2, 1],
                 "image_encoder.trunk.global_att_blocks": [3],
                 "image_encoder.neck.backbone_channel_list": [128, 64, 32, 16]}  # fmt: skip
        predictor = build_sam2_video_predictor(
            "configs/sam2.1/sam2.1_hiera_t.yaml",
            None,
            device="cpu",
            hydra_overrides_extra=[f"++model.{name}={value}" for name, value in small.items()],
        )
        with torch.no_grad():  # else no object is ever seen, and little of the memory
            predictor.sam_mask_decoder.pred_obj_score_head.layers[-1].bias.fill_(10)
            for layer in predictor.memory_attention.layers:
                layer.cross_attn_image.v_proj.weight.mul_(10)
        if of_reads:
            read = _read_of_sam2(predictor, side // 16, objects)
            yield reads, predictor, read
            if objects <= SAM2_KEPT:
                yield f"{reads}, keys kept", predictor, read, {"cache_keys": True}
        if of_tracks:
            track = _frame_of_sam2(predictor, side, objects)
            yield tracks, predictor, track
            yield f"{tracks}, objects together", predictor, track, {"objects_together": True}


def _outputs_of_sam2(predictor: Any, side: int, objects: int, first: int) -> dict[str, Any]:
    """Return outputs of objects that came at frame `first`, up to SAM2_POINTERS."""
    positions = predictor.memory_encoder.position_encoding(torch.zeros(1, 64, side, side))
    positions = positions.expand(objects, -1, -1, -1)
    outputs = [
        {
            "maskmem_features": torch.randn(objects, 64, side, side).bfloat16(),
            "maskmem_pos_enc": [positions],
            "obj_ptr": torch.randn(objects, 256),
        }
        for _ in range(first, SAM2_POINTERS)
    ]
    others = dict(enumerate(outputs[1:], first + 1))
    return {"cond_frame_outputs": {first: outputs[0]}, "non_cond_frame_outputs": others}


def _frame_of_sam2(predictor: Any, side: int, objects: int) -> Read:
    """Track objects that came at different frames in one frame, whose features are known."""
    predictor.fill_hole_area = 0  # needs a compiled extension
    image = torch.randn(1, 3, side, side)
    with torch.inference_mode():
        features = predictor.forward_image(image)
    came = [SAM2_POINTERS - 1 - n % SAM2_FRAMES for n in range(objects)]
    state = {
        "cached_features": {SAM2_POINTERS: (image, features)},
        "num_frames": 1000,
        "device": torch.device("cpu"),
        "storage_device": torch.device("cpu"),
        "constants": {},
        "output_dict_per_obj": {
            n: _outputs_of_sam2(predictor, side // 16, 1, first) for n, first in enumerate(came)
        },
    }

    def track() -> list[torch.Tensor]:
        masks = []
        with torch.inference_mode():
            for outputs in state["output_dict_per_obj"].values():
                _, mask = predictor._run_single_frame_inference(
                    inference_state=state,
                    output_dict=outputs,
                    frame_idx=SAM2_POINTERS,
                    batch_size=1,
                    is_init_cond_frame=False,
                    point_inputs=None,
                    mask_inputs=None,
                    reverse=False,
                    run_mem_encoder=True,
                )
                masks.append(mask.clone())
        return masks

    return track


def _read_of_sam2(predictor: Any, side: int, objects: int) -> Read:
    past = _outputs_of_sam2(predictor, side, objects, 0)
    features, places = torch.randn(2, side * side, 1, 256).expand(-1, -1, objects, -1)

    def read() -> list[torch.Tensor]:
        with torch.inference_mode():
            out = predictor._prepare_memory_conditioned_features(
                frame_idx=SAM2_POINTERS,
                is_init_cond_frame=False,
                current_vision_feats=[features],
                current_vision_pos_embeds=[places],
                feat_sizes=[(side, side)],
                output_dict=past,
                num_frames=1000,
            )
        return [out.clone()]

    return read


def xmem() -> list[Case]:
    """Its memory manager with a full long-term memory, and the read of its training."""
    import inference.memory_manager as module
    import model.memory_util as util

    config = {"hidden_dim": 64, "top_k": 30, "enable_long_term": True, "enable_long_term_count_usage": True,
              "max_mid_term_frames": 1000, "min_mid_term_frames": 5, "num_prototypes": 128,
              "max_long_term_elements": LONG}  # fmt: skip
    manager = module.MemoryManager(config)
    for _ in range(WORKING):
        key, shrinkage, selection, value = _frame(512)
        manager.add_memory(key, shrinkage, value, list(range(1, OBJECTS + 1)), selection=selection)
    key, shrinkage, value = (
        torch.randn(1, 64, LONG),
        torch.rand(1, 1, LONG) + 1,
        torch.randn(OBJECTS, 512, LONG),
    )
    manager.long_mem.add(key, [value], shrinkage, selection=None, objects=None)
    query, _, selection, _ = _frame(1)
    title = f"{LONG} long-term and {WORKING} frames, {OBJECTS} objects"
    small = {**config, "max_mid_term_frames": 6, "min_mid_term_frames": 3, "num_prototypes": 32}
    return [
        (title, module, lambda: [manager.match_memory(query, selection)]),
        (
            f"sequence of {SEQUENCE} frames of 6 x 8, 3 groups",
            module,
            lambda: _sequence_of_xmem(module, small),
        ),
        ("training, 3 objects", module, _training_of_xmem(util, 3 * 512)),
    ]


def _sequence_of_xmem(module: Any, config: dict[str, Any]) -> list[torch.Tensor]:
    """All reads of a new manager's life: objects appear twice, frames are consolidated many times."""
    generator = torch.Generator().manual_seed(0)
    manager, reads = module.MemoryManager(config), []

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(1, *shape, 6, 8, generator=generator)

    for t in range(SEQUENCE):
        key, shrinkage, selection = random(64), random(1).square() + 1, random(64).sigmoid()
        if t > 0:
            reads.append(manager.match_memory(key, selection))
        objects = 1 + (t >= SEQUENCE // 6) + (t >= SEQUENCE // 3)
        if t % 2 == 0:
            manager.add_memory(
                key, shrinkage, random(objects, 512), list(range(1, objects + 1)), selection=selection
            )
    return reads


def cutie() -> list[Case]:
    """Its memory manager with a full long-term memory, all objects at once and one by one."""
    import cutie.inference.memory_manager as module
    import cutie.model.utils.memory_utils as util
    from cutie.inference.object_manager import ObjectManager
    from omegaconf import OmegaConf

    network = types.SimpleNamespace(
        pixel_fusion=lambda features, pixel, *_: pixel, readout_query=lambda pixel, *_: (pixel, None)
    )
    features, masks = torch.zeros(1, 1, *FRAME), torch.zeros(1, OBJECTS, *FRAME)
    cases: list[Case] = []
    for chunk in (-1, 1):
        config = OmegaConf.create(
            {"model": {"sensory_dim": 1}, "top_k": 30, "chunk_size": chunk, "save_aux": False, "use_long_term": True,
             "long_term": {"count_usage": True, "max_mem_frames": 1000, "min_mem_frames": 5, "num_prototypes": 128,
                           "max_num_tokens": LONG, "buffer_tokens": 2000}}
        )  # fmt: skip
        objects, ids = ObjectManager(), list(range(1, OBJECTS + 1))
        objects.add_new_objects(ids)
        manager = module.MemoryManager(config, objects)
        for _ in range(WORKING):
            key, shrinkage, selection, value = _frame(256)
            manager.add_memory(key, shrinkage, value, None, ids, selection=selection, as_permanent="first")
        key, shrinkage = torch.randn(1, 64, LONG), torch.rand(1, 1, LONG) + 1
        values = {i: torch.randn(1, 256, LONG) for i in ids}
        manager.long_mem.add(key, values, shrinkage, selection=None, supposed_bucket_id=0)
        query, _, selection, _ = _frame(1)
        manager.initialize_sensory_if_needed(query, ids)

        def read(
            manager: Any = manager, query: Any = query, selection: Any = selection
        ) -> list[torch.Tensor]:
            return list(manager.read(features, query, selection, masks, network).values())

        ways = "" if chunk < 0 else ", chunk_size=1"
        cases.append((f"{LONG} long-term and {WORKING} frames, {OBJECTS} objects{ways}", module, read))
    return [*cases, ("training, 3 objects", module, _training_of_xmem(util, 3 * 256))]


def stcn() -> list[Case]:
    """Its memory bank, and the read of its training."""
    import inference_memory_bank as module
    from model.network import MemoryReader

    bank = module.MemoryBank(OBJECTS, top_k=20)
    bank.add_memory(torch.randn(1, 64, FRAMES, *FRAME), torch.randn(OBJECTS, 512, FRAMES, *FRAME))
    query, reader = torch.randn(1, 64, *FRAME), MemoryReader()
    leaves, weight = _training_tensors(512)

    def train() -> list[torch.Tensor]:
        key, query, value = leaves[2], leaves[0], leaves[4]
        out = reader.readout(reader.get_affinity(key, query), value, query)[:, :512]
        return [out, *torch.autograd.grad((out * weight).sum(), [key, query, value])]

    return [
        (f"{FRAMES} frames, {OBJECTS} objects", bank, lambda: [bank.match_memory(query)]),
        ("training, 1 object", bank, train),
    ]


def stcnbuf() -> list[Case]:
    """Its memory bank."""
    import stcnbuf.inference_memory_bank as module

    bank = module.MemoryBank(OBJECTS, top_k=20)
    height, width = FRAME
    bank.add_memory(
        torch.randn(64, FRAMES * height, width), torch.randn(OBJECTS, 512, FRAMES * height, width)
    )
    query = torch.randn(1, 64, *FRAME)
    return [(f"{FRAMES} frames, {OBJECTS} objects", bank, lambda: [bank.match_memory(query)])]


def mask_propagation() -> list[Case]:
    """Its reader, object by object with keys of their own, and the read of its training."""
    import model.eval_network as module
    from model.network import MemoryReader

    reader, trained = module.EvalMemoryReader(50, None), MemoryReader()
    keys = torch.randn(OBJECTS, 128, FRAMES, *FRAME)
    values = torch.randn(OBJECTS, 512, FRAMES, *FRAME)
    query = torch.randn(1, 128, *FRAME)
    leaves, weight = _training_tensors(512)

    def read() -> list[torch.Tensor]:
        return [reader(keys[i : i + 1], values[i : i + 1], query) for i in range(OBJECTS)]

    def train() -> list[torch.Tensor]:
        key, query, value = leaves[2], leaves[0], leaves[4]
        out = trained(key, value, query, query)[:, :512]
        return [out, *torch.autograd.grad((out * weight).sum(), [key, query, value])]

    return [(f"{FRAMES} frames, {OBJECTS} objects", module, read), ("training, 1 object", module, train)]


def aot() -> Iterator[Case]:
    """Layers of AOT-L (8 heads of 32) and DeAOT-L (a head of 128, values of 1024): the package deaotpy.

    Up to ten objects share one map, and are read at once: 16 objects are two reads.
    """
    from vosops import compat

    compat.install("spatial_correlation_sampler")
    for frame, objects in ((FRAME, 1), (FRAME, 16), (SQUARE, 1)):
        more = "" if frame == FRAME else ", 1024x1024"
        more += "" if objects == 1 else f", {objects} objects"
        yield from _layers_of_aot(frame, -(-objects // AOT_OBJECTS), more)


def _layers_of_aot(frame: tuple[int, int], reads: int, more: str) -> list[Case]:
    from aot.networks.layers import attention as module

    pixels = frame[0] * frame[1]
    long_term = module.MultiheadAttention(256, 8, use_linear=False).eval()
    top_k = module.MultiheadAttention(256, 8, use_linear=False, top_k=AOT_TOP_K).eval()
    short_term = module.MultiheadLocalAttentionV2(256, 8, use_linear=False).eval()
    gated = module.GatedPropagation(256, 512, 1, use_linear=False, d_att=128).eval()
    gated_locally = module.LocalGatedPropagation(256, 512, 1, use_linear=False, d_att=128).eval()
    query, key, value = (torch.randn(n * pixels, 1, 256) for n in (1, AOT_FRAMES, AOT_FRAMES))
    maps = torch.randn(3, 1, 256, *frame)
    slim, wide = torch.randn(2, 1, 128, *frame), torch.randn(1, 1024, *frame)
    gate, values = torch.randn(pixels, 1, 1024), value.repeat(1, 1, 4)
    layers: list[tuple[str, Callable[[], torch.Tensor]]] = [
        (f"long-term attention, {AOT_FRAMES} frames", lambda: long_term(query, key, value)[0]),
        (f"long-term attention, top {AOT_TOP_K}", lambda: top_k(query, key, value)[0]),
        ("short-term attention", lambda: short_term(*maps)[0]),
        (
            f"gated propagation, {AOT_FRAMES} frames",
            lambda: gated(query[..., :128], key[..., :128], values, gate, frame)[0],
        ),
        ("local gated propagation", lambda: gated_locally(*slim, wide, gate, frame)[0]),
    ]

    def of_engines(layer: Callable[[], torch.Tensor]) -> Read:
        return lambda: [layer() for _ in range(reads)]

    return [(f"{title}{more}", module, of_engines(layer)) for title, layer in layers]


def cfbi() -> Iterator[Case]:
    """Its matching at stride 4, as its configuration calls it: local at half that, global in four chunks."""
    from networks.layers import matching as module

    for frame in ((121, 213), (257, 257)):
        for objects in (1, 4, 16):
            yield from _matching_of_cfbi(module, frame, objects)


def _matching_of_cfbi(module: Any, frame: tuple[int, int], objects: int) -> list[Case]:
    """Return the two matchings of some objects and the background."""
    height, width = frame
    count = objects + 1
    query, previous, first = torch.rand(3, height, width, 100) * 0.25
    labels = torch.nn.functional.one_hot(torch.arange(width) * count // width).float().expand(height, -1, -1)
    plain = {"dis_bias": torch.zeros(count), "use_float16": False}
    windows = [2, 4, 6, 8, 10, 12]
    more = f"{objects} object{'s' * (objects > 1)}" + (", 1024x1024" if width == height else ", 480p")
    return [
        (
            f"local matching, {more}",
            module,
            lambda: [module.local_matching(previous, query, labels, multi_local_distance=windows, **plain)],
        ),
        (
            f"global matching, {more}",
            module,
            lambda: [module.global_matching_for_eval([first], query, [labels.clone()], 4, **plain)],
        ),
    ]


SYSTEMS: dict[str, Callable[[], Iterable[Case]]] = {
    "aot": aot, "cfbi": cfbi, "sam2": sam2, "xmem": xmem, "cutie": cutie, "stcn": stcn, "stcnbuf": stcnbuf,
    "mask-propagation": mask_propagation,
}  # fmt: skip


def _frame(value_channels: int) -> tuple[torch.Tensor, ...]:
    """Key, shrinkage, selection (1,C,H,W) and value (1,O,Cv,H,W) of a frame."""
    return (
        torch.randn(1, 64, *FRAME),
        torch.rand(1, 1, *FRAME) + 1,
        torch.rand(1, 64, *FRAME),
        torch.randn(1, OBJECTS, value_channels, *FRAME),
    )


def _training_tensors(value_channels: int) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Query, selection, key, shrinkage, value of a batch of clips, and the gradient of the output."""
    side = (CHUNK_SIDE, CHUNK_SIDE)
    shapes = (
        (64, *side), (64, *side), (64, CHUNK_FRAMES, *side), (1, CHUNK_FRAMES, *side),
        (value_channels, CHUNK_FRAMES, *side),
    )  # fmt: skip
    leaves = [torch.rand(CHUNK_BATCH, *shape).requires_grad_() for shape in shapes]
    return leaves, torch.randn(CHUNK_BATCH, value_channels, *side)


def _training_of_xmem(util: Any, value_channels: int) -> Callable[[], list[torch.Tensor]]:
    leaves, weight = _training_tensors(value_channels)
    query, selection, key, shrinkage, value = leaves

    def train() -> list[torch.Tensor]:
        out = util.readout(util.get_affinity(key, shrinkage, query, selection), value)
        return [out, *torch.autograd.grad((out * weight).sum(), leaves)]

    return train


def measure(
    name: str, folder: str | None, wanted: str, rounds: int, limit: int | None
) -> list[dict[str, Any]]:
    """Return the cases of a system whose title contains `wanted`: seconds, peak bytes, difference of the outputs.

    limit: the bytes that an original may take beyond what is in use before it.
    """
    if folder is not None:
        sys.path.insert(0, folder)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    made: Iterable[Case] = sam2(wanted) if name == "sam2" else SYSTEMS[name]()
    cases = (_Case(*case) for case in made)
    return [{"system": name, **_measure(case, rounds, limit)} for case in cases if wanted in case.title]


def _measure(case: _Case, rounds: int, limit: int | None) -> dict[str, Any]:
    """Measure a case: a first run of each for results and memory, then the timed ones in turn."""
    title, target, read, options = case
    clock, cpu = Clock(), torch.device("cpu")
    results: list[list[torch.Tensor]] = []
    first: list[float] = []
    times: tuple[list[float], ...] = ([], [], [])
    load = os.getloadavg()[0]

    def run() -> None:
        first.append(clock.seconds(lambda: results.append(read())))

    with torch.set_grad_enabled(title.startswith("training")):
        peaks: list[int | None] = []
        with _limited(limit):
            refused = _refused(lambda: peaks.append(peak_bytes(run, cpu)))
        with accelerate(target, **options):
            peaks.append(peak_bytes(run, cpu))
        differences = _differences(results) if refused is None else None
        results.clear()
        for _ in range(rounds):
            gc.collect()
            if refused is None:
                times[0].append(clock.seconds(read))
            started = time.process_time()
            with accelerate(target, **options):
                times[2].append(time.process_time() - started)
                gc.collect()
                times[1].append(clock.seconds(read))
    row: dict[str, Any] = {
        "torch": torch.__version__,
        "processor": info.collect()["cpu"]["processor"],
        "library": torch.ops.vosops.cpu_capability(),
        "load": load,
        "case": title,
        "seconds": [statistics.median(runs) for runs in times[:2] if runs] if rounds else first,
    }
    if rounds:
        row["seconds_of_accelerate"] = statistics.median(times[2])
    row["peak_bytes"] = peaks
    if differences is None:
        for name in ("seconds", "peak_bytes"):
            row[name] = [None, *row[name]]
        return {**row, "limit_bytes": limit, "bytes_refused": refused}
    return {
        **row,
        "greatest_difference": differences.max().item(),
        "share_above_1e-5": differences.gt(TOLERANCE).float().mean().item(),
    }


def _differences(results: list[list[torch.Tensor]]) -> torch.Tensor:
    return torch.cat([(a - b).abs().flatten() for a, b in zip(*results, strict=True)])


@contextlib.contextmanager
def _limited(limit: int | None) -> Iterator[None]:
    """Let this process take no more than `limit` bytes beyond what it has (Linux only)."""
    if limit is None:
        yield
        return
    before = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def _refused(run: Callable[[], object]) -> int | None:
    """Run; return the bytes of the tensor that could not be allocated, None where all could be."""
    try:
        run()
    except RuntimeError as error:
        wanted = re.search(r"you tried to allocate (\d+) bytes", str(error))
        if wanted is None:
            raise
        return int(wanted[1])
    return None


def _line(name: str, row: dict[str, Any]) -> str:
    (a, b), (x, y) = row["seconds"], row["peak_bytes"]
    if a is None:
        asked = f"a tensor of {row['bytes_refused'] / _MIB:.0f} MiB is refused"
        return f"| {name} | {row['case']} | {asked}, {b * 1e3:.0f} ms | , {y / _MIB:.0f} MiB | |"
    return (
        f"| {name} | {row['case']} | {a * 1e3:.0f} ms, {b * 1e3:.0f} ms ({a / b:.1f}x) "
        f"| {x / _MIB:.0f} MiB, {y / _MIB:.0f} MiB | {row['greatest_difference']:.0e} |"
    )


def main() -> None:
    """Measure what the command line names, print the table, keep the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("systems", nargs="+", metavar="NAME[=FOLDER]")
    parser.add_argument("--case", default="", help="only cases whose title holds this")
    parser.add_argument(
        "--rounds", type=int, default=ROUNDS, help="timed runs of each; 0: the one that measures memory"
    )
    parser.add_argument("--limit", type=float, help="GB that an original may take; without it, what there is")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows = []
    print("| system | read | time before, after | peak memory before, after | greatest difference |")
    print("|---|---|---|---|---|")
    for system in arguments.systems:
        name, _, folder = system.partition("=")
        limit = arguments.limit and int(arguments.limit * 1e9)
        wanted = (name, folder or None, arguments.case, arguments.rounds, limit)
        for row in run_fresh("benchmarks.bench_integrations", "measure", *wanted):
            rows.append(row)
            print(_line(name, row), flush=True)
    if arguments.json:
        if arguments.json.exists():  # keep what was not measured now
            named = {(row["system"], row["case"]) for row in rows}
            before = json.loads(arguments.json.read_text())["rows"]
            rows = [row for row in before if (row["system"], row["case"]) not in named] + rows
        facts = {"python": platform.python_version(), "threads": 1, "rows": rows}
        write_text(arguments.json, json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    main()
