"""Modules with parameters, made of the operators."""

from vosops.nn.global_conv import GlobalConv2d

__all__ = ["GlobalConv2d"]
