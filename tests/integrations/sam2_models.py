"""A small SAM 2 with seeded weights, and frames for it."""

from __future__ import annotations

from pathlib import Path

import torch

SIDE = 128  # of the square that frames are resized to
SMALL = {
    "image_size": SIDE,
    "image_encoder.trunk.embed_dim": 16,
    "image_encoder.trunk.stages": [1, 1, 2, 1],
    "image_encoder.trunk.global_att_blocks": [3],
    "image_encoder.neck.backbone_channel_list": [128, 64, 32, 16],
}
CONFIG = "configs/sam2.1/sam2.1_hiera_t.yaml"


def small_predictor(seed: int = 0, side: int = SIDE):
    """Make SAM 2.1's video predictor with a small encoder; its memory changes what it finds."""
    from sam2.build_sam import build_sam2_video_predictor

    torch.manual_seed(seed)
    overrides = [f"++model.{name}={value}" for name, value in {**SMALL, "image_size": side}.items()]
    predictor = build_sam2_video_predictor(
        CONFIG, None, device="cpu", hydra_overrides_extra=overrides, apply_postprocessing=False
    )
    with torch.no_grad():
        predictor.sam_mask_decoder.pred_obj_score_head.layers[-1].bias.fill_(
            10
        )  # else no object is ever seen
        for layer in predictor.memory_attention.layers:
            layer.cross_attn_image.v_proj.weight.mul_(10)
    return predictor


def write_frames(folder: Path, count: int, height: int, width: int) -> Path:
    """Write numbered JPEG files: a bright square that moves over noise."""
    from PIL import Image

    generator = torch.Generator().manual_seed(0)
    for t in range(count):
        picture = torch.randint(0, 100, (height, width, 3), generator=generator, dtype=torch.uint8)
        picture[20 : 20 + height // 2, 10 + t : 10 + t + width // 3] += 120
        Image.fromarray(picture.numpy()).save(folder / f"{t:05d}.jpg", quality=95)
    return folder
