"""Networks that segment each frame alone into classes, a file each; `create_model` makes them by name.

Parameters bear the names of the implementation whose checkpoints load, which the docstring names; where a paper and
that implementation differ, the default is what the implementation computes.
"""
