"""Proves on this machine every implementation of every op that can run here, and times those that are right.

`check_device` runs them in processes of their own against the reference in float64; what it finds is stored for
`vosops.backends`, which from then on does not choose what was wrong. `tune_device` times what is right.
"""

from vosops.checking.problems import PROBLEMS, Candidate, candidates
from vosops.checking.runner import Cell, check_device, store
from vosops.checking.tuning import tune_device

__all__ = ["PROBLEMS", "Candidate", "Cell", "candidates", "check_device", "store", "tune_device"]
