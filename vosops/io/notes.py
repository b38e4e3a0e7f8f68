"""What a user should hear of an input that is used all the same: Python warnings, which the command line prints."""

from __future__ import annotations

import warnings


class InputWarning(UserWarning):
    """An input was used, but it may not mean what it seems to."""


def warn(text: str) -> None:
    """Warn of an input, in one line; Python shows the same text once."""
    warnings.warn(text, InputWarning, stacklevel=3)
