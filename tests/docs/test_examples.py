"""The Python examples of README.md and docs/ run, and the drop-in functions give the originals' numbers."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    page for page in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md")) if "```python" in page.read_text()
)
BLOCK = re.compile(r"(?:<!-- test: (\w+) -->\n)?```python\n(.*?)```", re.DOTALL)


def run(source: str, page: Path, line: int) -> dict:
    """Execute the blocks' source with the page's own line numbers; the names that it defines."""
    names: dict = {"__name__": "example"}
    exec(compile("\n" * line + source, page, "exec"), names)
    return names


def function(page: str, test: str, name: str):
    """A function that the marked block of a page defines, after all blocks before it."""
    path = ROOT / "docs" / page
    source = ""
    for marker, block in BLOCK.findall(path.read_text()):
        source += block
        if marker == test:
            return run(source, path, 0)[name]
    raise AssertionError(f"{page} has no block marked {test}")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with the files that the examples name, video.mp4 and first.png with its first mask, and the names
    that they take for granted: first_frame (3,H,W), labels (H,W), frames.
    """
    av = pytest.importorskip("av")
    pytest.importorskip("skimage")
    pillow = pytest.importorskip("PIL.Image")
    from vosops.data import DemoClip

    clip = DemoClip(frames=3, size=(96, 128))
    with av.open(str(tmp_path / "video.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.height, stream.width, stream.pix_fmt = 96, 128, "yuv420p"
        for image, _ in clip:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
    pillow.fromarray(clip[0][1]).save(tmp_path / "first.png")
    monkeypatch.chdir(tmp_path)
    first_frame, *frames = (torch.from_numpy(image).permute(2, 0, 1) for image, _ in clip)
    return {"first_frame": first_frame, "labels": torch.from_numpy(clip[0][1]), "frames": frames}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_examples_run(page, folder):
    text = page.read_text()
    # A page's blocks share their names; each keeps its own line numbers in a traceback.
    names = {"__name__": "example", **folder}
    for match in BLOCK.finditer(text):
        line = text[: match.start(2)].count("\n")
        exec(compile("\n" * line + match[2], page, "exec"), names)


@pytest.fixture
def cfbi(golden):
    return golden("cfbi_matching.pt")["basic"]


@pytest.mark.parametrize(
    ("windows", "downsample", "atrous", "half"),
    [
        ([2, 4, 6], False, 1, False),
        ([2, 4, 6], False, 1, True),
        ([4], False, 1, False),
        ([4, 8], False, 2, False),
        ([2, 4, 6, 8, 10, 12], True, 1, False),
    ],
)
def test_local_matching_of_cfbi(cfbi, windows, downsample, atrous, half):
    expected = cfbi[f"local/dist={windows}/down={downsample}/atrous={atrous}/fp16={half}"]
    got = function("ops/local_matching.md", "cfbi_local", "local_matching")(
        cfbi["prev"], cfbi["query"], cfbi["labels"], cfbi["dis_bias"], windows,
        atrous_rate=atrous, use_float16=half, allow_downsample=downsample,
    )  # fmt: skip
    # With fp16=True the original rounds its distances to half precision.
    torch.testing.assert_close(got, expected.float(), rtol=0, atol=5e-3 if half else 1e-5)


@pytest.mark.parametrize(("atrous", "half"), [(1, False), (2, False), (1, True)])
@pytest.mark.parametrize("frames", [1, 2])
def test_global_matching_of_cfbi(cfbi, frames, atrous, half):
    expected = cfbi[f"global{'_eval2' if frames == 2 else ''}/atrous={atrous}/fp16={half}"]
    options = {"dis_bias": cfbi["dis_bias"], "atrous_rate": atrous, "use_float16": half}
    if frames == 1:
        matching = function("ops/global_matching.md", "cfbi_global", "global_matching")
        got = matching(cfbi["ref"], cfbi["query"], cfbi["labels"], **options)
    else:
        matching = function("ops/global_matching.md", "cfbi_global", "global_matching_for_eval")
        labels = [cfbi["labels"], cfbi["labels"].flip(0)]  # the case mirrors those of its second frame
        got = matching([cfbi["ref"], cfbi["prev"]], cfbi["query"], labels, **options)
    torch.testing.assert_close(got, expected.float(), rtol=0, atol=5e-3 if half else 1e-5)


def test_global_matching_of_cfbi_without_a_label(cfbi):
    matching = function("ops/global_matching.md", "cfbi_global", "global_matching")
    labels = torch.zeros_like(cfbi["labels"])
    got = matching(cfbi["ref"], cfbi["query"], labels, dis_bias=cfbi["dis_bias"], use_float16=False)
    torch.testing.assert_close(got, cfbi["global_nolabel"], rtol=0, atol=0)


@pytest.mark.parametrize("case", ["feelvos_basic", "feelvos_empty"])
def test_functions_of_feelvos(golden, case):
    data = golden("feelvos_tf_matching.pt")[case]
    labels, ids = data["labels"][..., None], data["gt_ids"]
    local = function(
        "ops/local_matching.md",
        "feelvos_local",
        "local_previous_frame_nearest_neighbor_features_per_object",
    )
    got = local(data["prev"], data["query"], labels, ids, int(data["max_distance"]))
    torch.testing.assert_close(got, data["local_out"], rtol=0, atol=1e-5)
    nearest = function("ops/global_matching.md", "feelvos_global", "nearest_neighbor_features_per_object")
    raw, _ = nearest(data["first"], data["query"][None], labels, gt_ids=ids)
    torch.testing.assert_close(torch.tanh(raw / 2), data["global_out"], rtol=0, atol=1e-5)


def test_local_attention_of_aot(golden):
    case = golden("aot_attention.pt")["local_v2_d2"]
    parameters = case["params"]
    embedding, projection = torch.nn.Conv2d(32, 100, 1, groups=4), torch.nn.Linear(32, 32)
    for name, module in (("relative_emb_k", embedding), ("projection", projection)):
        module.load_state_dict({leaf: parameters[f"{name}.{leaf}"] for leaf in ("weight", "bias")})
    layer = SimpleNamespace(
        num_head=4, max_dis=2, dilation=1, use_linear=False, relative_emb_k=embedding,
        relative_emb_v=parameters["relative_emb_v"], projection=projection,
    )  # fmt: skip
    out, weights = function("ops/local_attention.md", "aot", "local_attention_of")(layer, *case["inputs"])
    torch.testing.assert_close(out, case["out"], rtol=0, atol=1e-5)
    torch.testing.assert_close(weights, case["attn"], rtol=0, atol=1e-5)
