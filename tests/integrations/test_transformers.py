"""transformers' Sam2VideoModel, as it is installed, with seeded weights: the same masks, and streams in fixed bytes."""

from __future__ import annotations

import pytest
import torch

from vosops.integrations import accelerate
from vosops.integrations.rotary import KeyCache
from vosops.integrations.sessions import reachable_bytes

SIDE, FRAMES = 128, 7
TOLERANCE = 1e-4  # of logits


@pytest.fixture(scope="module")
def model():
    sam2 = pytest.importorskip("transformers.models.sam2_video", reason="transformers is not installed")
    grid = SIDE // 4
    config = sam2.Sam2VideoConfig(
        vision_config={
            "model_type": "sam2_vision_model",
            "backbone_config": {
                "model_type": "sam2_hiera_det_model",
                "hidden_size": 16,
                "image_size": [SIDE, SIDE],
                "blocks_per_stage": [1, 1, 2, 1],
                "embed_dim_per_stage": [16, 32, 64, 128],
                "num_attention_heads_per_stage": [1, 2, 4, 8],
                "global_attention_blocks": [3],
            },
            "backbone_channel_list": [128, 64, 32, 16],
            "backbone_feature_sizes": [[grid, grid], [grid // 2, grid // 2], [grid // 4, grid // 4]],
        },
        prompt_encoder_config={"image_size": SIDE},
        memory_attention_rope_feat_sizes=[SIDE // 16, SIDE // 16],
        image_size=SIDE,
    )
    torch.manual_seed(0)
    model = sam2.modeling_sam2_video.Sam2VideoModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():  # codes that checkpoints have and a new model has not
                parameter.normal_(std=0.1)
        model.mask_decoder.pred_obj_score_head.proj_out.bias.fill_(10)  # else no object is ever seen
        for layer in model.memory_attention.layers:
            layer.cross_attn_image.v_proj.weight.mul_(10)
            layer.cross_attn_image.k_proj.weight.mul_(10)
    return model


def frame(t):
    generator = torch.Generator().manual_seed(7)
    image = torch.randn(3, SIDE, SIDE, generator=generator)
    image[:, 30:80, 20 + 2 * t : 70 + 2 * t] += 2
    return image


@torch.inference_mode()
def stream(model, frames=FRAMES, used=None):
    """A mask in the first frame, a second object by a mask in the third, frame by frame -> logits."""
    from transformers.models.sam2_video.modeling_sam2_video import Sam2VideoInferenceSession

    session = Sam2VideoInferenceSession(video_height=SIDE, video_width=SIDE, dtype=torch.float32)
    results = []
    for t in range(frames):
        if t in (0, 2):
            index = session.obj_id_to_idx(t + 1)
            mask = torch.zeros(1, 1, SIDE, SIDE)
            mask[..., 30:80, 20 + 20 * t : 70 + 20 * t] = 1
            session.add_mask_inputs(index, t, mask)
            session.obj_with_new_inputs.append(t + 1)
        out = model(inference_session=session, frame=frame(t))
        results.append(out.pred_masks.clone())
        if used is not None:
            used.append(reachable_bytes(session))
    return results


@pytest.mark.parametrize("cache_keys", [False, True])
def test_the_same_masks(model, cache_keys):
    want = stream(model)
    layer = model.memory_attention.layers[0].cross_attn_image
    before = KeyCache.of(layer).hits
    with accelerate(model, cache_keys=cache_keys) as acceleration:
        got = stream(model)
    assert any(name.endswith("Sam2VideoRoPEAttention.forward") for name in acceleration.replaced)
    for a, b in zip(want, got):
        torch.testing.assert_close(b, a, rtol=0, atol=TOLERANCE)
    assert (KeyCache.of(layer).hits - before > FRAMES) == cache_keys


def test_the_memory_is_read(model, monkeypatch):
    want = stream(model)
    encoder = model.memory_encoder.forward
    monkeypatch.setattr(
        model.memory_encoder,
        "forward",
        lambda *args, **kwargs: (lambda out: (0 * out[0], *out[1:]))(encoder(*args, **kwargs)),
    )
    got = stream(model)
    tracked = [(a - b)[:1].abs().max().item() for a, b in zip(want, got)]
    assert min(tracked[1:]) > 100 * TOLERANCE


def test_a_stream_does_not_grow(model):
    frames, plain, used = 30, [], []
    want = stream(model, frames, plain)
    window = max(model.num_maskmem, model.config.max_object_pointers_in_encoder)
    growth = (plain[-1] - plain[-5]) / 4
    frame_bytes = 3 * SIDE**2 * 4
    assert growth > frame_bytes
    budget = int((growth - frame_bytes) * (window + 6)) + frame_bytes
    with accelerate(model, memory_budget=budget):
        got = stream(model, frames, used)
    assert len(set(used[window + 8 :])) == 1 and len(used[window + 8 :]) > 4
    for a, b in zip(want, got):
        torch.testing.assert_close(b, a, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", ["sam3_tracker_video", "edgetam_video"])
def test_models_of_the_same_form(name):
    """Each model's memory attention, with a memory of two frames and object pointers."""
    import importlib

    pytest.importorskip("transformers", reason="transformers is not installed")
    folder = f"transformers.models.{name}"
    module = importlib.import_module(f"{folder}.modeling_{name}")
    configs = importlib.import_module(f"{folder}.configuration_{name}")
    title = {"sam3_tracker_video": "Sam3TrackerVideo", "edgetam_video": "EdgeTamVideo"}[name]
    config = getattr(configs, f"{title}Config")()
    config._attn_implementation = "sdpa"
    config.memory_attention_rope_feat_sizes = [4, 4]
    config.memory_attention_rope_q_sizes, config.memory_attention_rope_k_sizes = [4, 4], [2, 2]
    torch.manual_seed(0)
    attention = getattr(module, f"{title}MemoryAttention")(config).eval()
    for layer in attention.layers:
        torch.nn.init.normal_(layer.cross_attn_image.v_proj.weight)
    options = {} if name.startswith("sam3") else {"num_spatial_memory_tokens": 2}
    frame = 16 if name.startswith("sam3") else 4 + 3  # three summaries without a position
    query, place = torch.randn(2, 16, 1, 256)
    memory, codes = torch.randn(2, 2 * frame + 4, 1, 64)

    @torch.no_grad()
    def attend(memory):
        names = ("current_vision_features", "memory", "current_vision_position_embeddings")
        arguments = dict(zip(names, (query, memory, place)))
        return attention(
            **arguments, memory_posision_embeddings=codes, num_object_pointer_tokens=4, **options
        )

    want = attend(memory)
    with accelerate(attention) as acceleration:
        got = attend(memory)
    assert any(title in replaced for replaced in acceleration.replaced)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
    assert (attend(0 * memory) - want).abs().max() > 1e-3
