"""Clips to work on: so far the one that `vosops demo` renders."""

from vosops.data.demo_clip import DemoClip, write_clip

__all__ = ["DemoClip", "write_clip"]
