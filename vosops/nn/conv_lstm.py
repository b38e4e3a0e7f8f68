"""ConvLSTM as modules with parameters, like torch.nn.LSTM and torch.nn.LSTMCell."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vosops import _checks
from vosops.ops.conv_lstm import GATES, VARIANTS, conv_lstm

WEIGHT_NAMES = {
    "convolution": ("weight",),
    "spatial": ("weight_h", "weight_w"),
    "depthwise": ("weight_depth",),
    "separable": ("weight_depth", "weight_sep"),
}
"""Variant -> the names of its parameters, in the order in which `vosops.conv_lstm` takes them."""

TENSORFLOW_NAMES = {
    "convolution": ("kernel",),
    "spatial": ("kernel_h", "kernel_w"),
    "depthwise": ("kernel_depth",),
    "separable": ("kernel_depth", "kernel_sep"),
}
TENSORFLOW_GATES = [0, 2, 1, 3]
"""The original's gates are i, g, f, o."""

State = tuple[Tensor, Tensor]


class ConvLSTMCell(nn.Module):
    """One layer of a convolutional LSTM: `vosops.conv_lstm` with its parameters.

    Args:
        input_size: channels C of the input.
        hidden_size: channels of the hidden state and the cell.
        kernel_size: an odd number, or (kh, kw).
        bias: whether the gates have a bias; it starts at zero.
        variant: "convolution", "spatial", "depthwise" (which needs input_size = hidden_size) or "separable".
        forget_bias: added to the forget gate.
        precision: None, "exact" or "winograd", see `vosops.conv_lstm`.
        device: of the parameters.
        dtype: of the parameters.

    Parameters, packed in the gate order i, f, g, o: `weight` (4*hidden_size, input_size+hidden_size, kh, kw);
    "spatial": `weight_h` of kh x 1 and `weight_w` (4*hidden_size, 2*hidden_size, 1, kw); "depthwise" and "separable":
    `weight_depth` (4, input_size+hidden_size, kh, kw); "separable": `weight_sep` of 1 x 1; `bias` (4*hidden_size,).

    Raises:
        TypeError, ValueError: a size is not a positive int, a kernel size is even, the variant unknown, or "depthwise"
            comes with input_size != hidden_size.

    Examples:
        >>> import torch, vosops.nn
        >>> cell, state = vosops.nn.ConvLSTMCell(8, 16), None
        >>> for frame in torch.randn(3, 1, 8, 15, 27):  # a stream: one frame at a time
        ...     state = cell(frame, state)
        >>> state[0].shape
        torch.Size([1, 16, 15, 27])
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        kernel_size: int | tuple[int, int] = 3,
        bias: bool = True,
        *,
        variant: str = "convolution",
        forget_bias: float = 1.0,
        precision: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, size in (("input_size", input_size), ("hidden_size", hidden_size)):
            _checks.check_positive_int(name, size)
        sizes = [kernel_size] * 2 if isinstance(kernel_size, int) else list(kernel_size)
        if len(sizes) != 2 or any(size < 1 or size % 2 == 0 for size in sizes):
            raise ValueError(f"kernel_size must be an odd int or two of them, got {kernel_size!r}")
        kh, kw = sizes
        if variant not in VARIANTS:
            raise ValueError(f"variant must be one of {', '.join(VARIANTS)}, got {variant!r}")
        if variant == "depthwise" and input_size != hidden_size:
            raise ValueError(
                f"input_size must equal hidden_size with variant 'depthwise', got {input_size} and {hidden_size}"
            )
        self.input_size, self.hidden_size, self.kernel_size = input_size, hidden_size, (kh, kw)
        self.variant, self.forget_bias, self.precision = variant, forget_bias, precision
        rows, columns = GATES * hidden_size, input_size + hidden_size
        shapes = {
            "convolution": [(rows, columns, kh, kw)],
            "spatial": [(rows, columns, kh, 1), (rows, 2 * hidden_size, 1, kw)],
            "depthwise": [(GATES, columns, kh, kw)],
            "separable": [(GATES, columns, kh, kw), (rows, columns, 1, 1)],
        }
        for name, shape in zip(WEIGHT_NAMES[variant], shapes[variant], strict=True):
            self.register_parameter(name, nn.Parameter(torch.empty(shape, device=device, dtype=dtype)))
        self.register_parameter(
            "bias", nn.Parameter(torch.empty(rows, device=device, dtype=dtype)) if bias else None
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights uniformly from +-1/sqrt(inputs of a gate); the bias becomes zero."""
        for name, weight in zip(WEIGHT_NAMES[self.variant], self.weights, strict=True):
            fan_in = (2 if name == "weight_depth" else weight.shape[1]) * weight.shape[2] * weight.shape[3]
            nn.init.uniform_(weight, -1 / math.sqrt(fan_in), 1 / math.sqrt(fan_in))
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    @property
    def weights(self) -> list[Tensor]:
        """The weights as `vosops.conv_lstm` takes them."""
        return [getattr(self, name) for name in WEIGHT_NAMES[self.variant]]

    def run(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Run a whole sequence x (N,T,C,H,W) -> output (N,T,hidden,H,W), (h, c)."""
        return conv_lstm(
            x,
            self.weights,
            self.bias,
            state,
            variant=self.variant,
            forget_bias=self.forget_bias,
            precision=self.precision,
        )

    def forward(self, x: Tensor, state: State | None = None) -> State:
        """Run one step: x (N,C,H,W) and (h, c), each (N,hidden,H,W) or zeros -> the next (h, c)."""
        _checks.check_tensor("x", x, ("N", "C", "H", "W"))
        return self.run(x.unsqueeze(1), state)[1]

    def extra_repr(self) -> str:
        """Return the options in the module's repr."""
        parts = [f"{self.input_size}, {self.hidden_size}, kernel_size={self.kernel_size}"]
        parts += [f"variant={self.variant!r}, forget_bias={self.forget_bias}"]
        return ", ".join(parts)


class ConvLSTM(nn.Module):
    """A convolutional LSTM of one or more layers over sequences: `output, (h, c)` as in torch.nn.LSTM.

    Args:
        input_size: channels C of the input.
        hidden_size: channels of every layer's state.
        kernel_size: an odd number, or (kh, kw).
        num_layers: number of layers, each of which reads the outputs of the previous one.
        bias: whether the gates have a bias.
        batch_first: input and output are (N,T,C,H,W); False: (T,N,C,H,W).
        options: variant, forget_bias, precision, device and dtype, see `ConvLSTMCell`.

    The parameters are those of `layers.0`, `layers.1` ..., each a `ConvLSTMCell`.

        >>> import torch, vosops.nn
        >>> lstm = vosops.nn.ConvLSTM(8, 16, num_layers=2)
        >>> output, state = lstm(torch.randn(1, 4, 8, 15, 27))
        >>> output, state = lstm(torch.randn(1, 1, 8, 15, 27), state)  # the next frame
        >>> output.shape, state[0].shape
        (torch.Size([1, 1, 16, 15, 27]), torch.Size([2, 1, 16, 15, 27]))
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        kernel_size: int | tuple[int, int] = 3,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = True,
        **options: Any,
    ) -> None:
        super().__init__()
        if num_layers < 1:
            raise ValueError(f"num_layers must be at least 1, got {num_layers}")
        self.batch_first = batch_first
        sizes = [input_size] + [hidden_size] * (num_layers - 1)
        self.layers = nn.ModuleList(
            ConvLSTMCell(size, hidden_size, kernel_size, bias, **options) for size in sizes
        )

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Run the layers over a sequence.

        x: (N,T,C,H,W), or (T,N,C,H,W) without batch_first. state: (h, c), each (num_layers,N,hidden,H,W), zeros unless
        given. Returns the last layer's hidden states in the layout of x, and every layer's last (h, c) like `state`.
        """
        frames = x if self.batch_first else x.transpose(0, 1)
        if state is not None and (not isinstance(state, Sequence) or len(state) != 2):
            raise TypeError(f"state must be a pair (h, c) of tensors or None, got {type(state).__name__}")
        if state is not None and any(len(part) != len(self.layers) for part in state):
            raise ValueError(
                f"state must hold (h, c) of {len(self.layers)} layer(s), got {[len(part) for part in state]}"
            )
        hiddens, cells = [], []
        for i, layer in enumerate(self.layers):
            assert isinstance(layer, ConvLSTMCell)
            frames, (h, c) = layer.run(frames, None if state is None else (state[0][i], state[1][i]))
            hiddens.append(h)
            cells.append(c)
        output = frames if self.batch_first else frames.transpose(0, 1)
        return output, (torch.stack(hiddens), torch.stack(cells))

    @classmethod
    def from_tensorflow(
        cls, variables: Mapping[str, Any], forget_bias: float = 1.0, **options: Any
    ) -> ConvLSTM:
        """Return a layer with the variables of LSTM-ICNet's ConvLSTMCellAP.

        variables: arrays or tensors named `kernel` ("convolution"), `kernel_h` and `kernel_w` ("spatial"),
        `kernel_depth` ("depthwise"), with `kernel_sep` ("separable"), and `biases`; a scope before the name and a
        `:0` after it are ignored. Kernels are (kh, kw, C+hidden, 4*hidden), `kernel_depth` (kh, kw, C+hidden, 4), with
        the gates in the order i, g, f, o. options: other options of `ConvLSTM`.

        Raises:
            ValueError: the names are those of no variant, or a shape does not fit.

        Examples:
            >>> import torch, vosops.nn
            >>> names = {"lstm/rnn/lstm/kernel": torch.randn(3, 3, 16, 32), "lstm/rnn/lstm/biases": torch.zeros(32)}
            >>> lstm = vosops.nn.ConvLSTM.from_tensorflow(names)
            >>> lstm.layers[0]
            ConvLSTMCell(8, 8, kernel_size=(3, 3), variant='convolution', forget_bias=1.0)
        """
        given = {
            name.split("/")[-1].split(":")[0]: torch.as_tensor(value) for name, value in variables.items()
        }
        if len(given) != len(variables):
            raise ValueError(f"variables must be those of one layer, got {sorted(variables)}")
        biases = given.pop("biases", None)
        variant = next((v for v, names in TENSORFLOW_NAMES.items() if set(names) == set(given)), None)
        if variant is None:
            known = " or ".join("+".join(names) for names in TENSORFLOW_NAMES.values())
            raise ValueError(f"variables must be biases and {known}, got {sorted(variables)}")
        kernels = [given[name] for name in TENSORFLOW_NAMES[variant]]
        for name, kernel in zip(TENSORFLOW_NAMES[variant], kernels, strict=True):
            if kernel.dim() != 4 or kernel.shape[3] % GATES:
                raise ValueError(
                    f"{name} must have 4 dimensions, the last of the gates, got {_sizes(kernel)}"
                )
        kh, kw, columns, _ = kernels[0].shape
        if variant == "spatial":
            kw = kernels[1].shape[1]
        hidden = columns // 2 if variant == "depthwise" else kernels[-1].shape[3] // GATES
        lstm = cls(
            columns - hidden,
            hidden,
            (kh, kw),
            bias=biases is not None,
            variant=variant,
            forget_bias=forget_bias,
            **options,
        )
        layer = lstm.layers[0]
        assert isinstance(layer, ConvLSTMCell)
        targets: list[Tensor] = [*layer.weights, *([] if layer.bias is None else [layer.bias])]
        sources: list[Tensor] = [kernel.permute(3, 2, 0, 1) for kernel in kernels]
        sources += [] if biases is None else [biases]
        with torch.no_grad():
            for target, source in zip(targets, sources, strict=True):
                if source.shape != target.shape:
                    raise ValueError(
                        f"variables must fit (4*hidden, C+hidden, kh, kw) as {tuple(target.shape)}, got a kernel "
                        f"or biases that become {tuple(source.shape)}"
                    )
                gates = source.unflatten(0, (GATES, -1))[TENSORFLOW_GATES]
                target.copy_(gates.flatten(0, 1))
        return lstm


def _sizes(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))
