"""Clicks with SAM 2: a small one with random weights, saved and read as a real one is."""

import numpy as np
import pytest

from vosops.io.errors import VosopsError
from vosops.studio.assist import Sam2Clicks

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
if not hasattr(transformers, "Sam2Model"):
    pytest.skip("this version of transformers has no SAM 2", allow_module_level=True)

SIDE = 128


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sam2")
    features = [[SIDE // stride] * 2 for stride in (4, 8, 16)]
    backbone = transformers.Sam2HieraDetConfig(
        hidden_size=16,
        image_size=[SIDE, SIDE],
        blocks_per_stage=[1, 1, 2, 1],
        embed_dim_per_stage=[16, 32, 64, 128],
        num_attention_heads_per_stage=[1, 1, 2, 2],
        global_attention_blocks=[3],
        window_positional_embedding_background_size=[7, 7],
    )
    vision = transformers.Sam2VisionConfig(
        backbone_config=backbone,
        backbone_channel_list=[128, 64, 32, 16],
        backbone_feature_sizes=features,
    )
    prompts = transformers.Sam2PromptEncoderConfig(image_size=SIDE)
    config = transformers.Sam2Config(vision_config=vision, prompt_encoder_config=prompts)
    transformers.Sam2Model(config).save_pretrained(folder)
    size = {"height": SIDE, "width": SIDE}
    pictures = transformers.Sam2ImageProcessor(size=size, mask_size={"height": 32, "width": 32})
    transformers.Sam2Processor(image_processor=pictures, target_size=SIDE).save_pretrained(folder)
    return folder


@pytest.fixture
def image():
    return np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)


def test_a_mask_of_the_frames_size(folder, image):
    tool = Sam2Clicks(folder)
    one = tool.select("a", image, [(20, 30, True)])
    assert (one.shape, one.dtype) == ((60, 90), bool)
    more = tool.select("a", image, [(20, 30, True), (70, 10, False)])
    assert more.shape == (60, 90)
    assert (tool.select("a", image, [(20, 30, True)]) == one).all()


def test_the_frame_is_encoded_once(folder, image, monkeypatch):
    tool, calls = Sam2Clicks(folder), []
    tool.select("a", image, [(20, 30, True)])
    model = tool._made[0]
    encode = model.get_image_embeddings
    monkeypatch.setattr(model, "get_image_embeddings", lambda *a, **k: calls.append(1) or encode(*a, **k))
    for key in ("a", "a", "b"):
        tool.select(key, image, [(20, 30, True)])
    assert len(calls) == 1


def test_a_folder_without_a_model_is_one_line(tmp_path, image):
    with pytest.raises(VosopsError, match="--sam2 .* cannot be used"):
        Sam2Clicks(tmp_path).select("a", image, [(1, 1, True)])
