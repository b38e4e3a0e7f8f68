"""The weights of vosops-s, for ``vosops.models.create_model("vosops_s")``. Not for commercial use: see LICENCE."""

from __future__ import annotations

from pathlib import Path

__all__ = ["LICENCE", "TITLE", "weights_path"]

TITLE = "vosops-weights-s 0.1.0"
LICENCE = "CC BY-NC 4.0 (non-commercial)"


def weights_path() -> Path:
    """Return the safetensors file, float16."""
    return Path(__file__).with_name("vosops_s.safetensors")
