"""The name that `vosops.models.semantic_network` had in the last release."""

from __future__ import annotations

from vosops import _deprecation
from vosops.models.semantic_network import SemanticNetwork, State

__all__ = ["SemanticNetwork", "State"]

_deprecation.warn(__name__, "vosops.models.SemanticNetwork")
