"""vosops: fused, memory-efficient, differentiable operators for video object segmentation."""
