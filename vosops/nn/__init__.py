"""Modules with parameters, built on the operators."""

from vosops.nn.conv_lstm import ConvLSTM, ConvLSTMCell
from vosops.nn.global_conv import GlobalConv2d
from vosops.nn.local_matching import LocalMatching
from vosops.nn.memory_read import MemoryRead

__all__ = ["ConvLSTM", "ConvLSTMCell", "GlobalConv2d", "LocalMatching", "MemoryRead"]
