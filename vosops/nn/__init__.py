"""Modules with parameters, made of the operators."""

from vosops.nn.conv_lstm import ConvLSTM, ConvLSTMCell
from vosops.nn.global_conv import GlobalConv2d

__all__ = ["ConvLSTM", "ConvLSTMCell", "GlobalConv2d"]
