"""ConvLSTM and ConvLSTMCell: layers, states, streaming, and the variables of the TensorFlow original."""

import pytest
import torch

from vosops.nn import ConvLSTM, ConvLSTMCell
from vosops.reference.conv_lstm import VARIANTS


def naive(x, gate_inputs, bias, forget_bias):
    """LSTM-ICNet's cell, gate by gate in the order i, g, f, o; gate_inputs(gate, x, h) is what a gate sees."""
    n, t, c, h, w = x.shape
    hidden = cell = torch.zeros(n, bias.shape[0] // 4, h, w, dtype=x.dtype)
    outputs = []
    for frame in x.unbind(1):
        i, g, f, o = (
            gate_inputs(gate, frame, hidden) + part.view(-1, 1, 1) for gate, part in enumerate(bias.chunk(4))
        )
        cell = torch.sigmoid(f + forget_bias) * cell + torch.sigmoid(i) * torch.tanh(g)
        hidden = torch.sigmoid(o) * torch.tanh(cell)
        outputs.append(hidden)
    return torch.stack(outputs, 1), cell


def filters(kernel, rows, columns):
    """TensorFlow's HWIO to PyTorch's layout."""
    return kernel[:, :, rows, columns].permute(3, 2, 0, 1)


@pytest.mark.parametrize("variant", VARIANTS)
def test_from_tensorflow_is_the_original_written_gate_by_gate(variant):
    c, k = 3, 3
    sizes = {
        "convolution": {"kernel": (k, k, 2 * c, 4 * c)},
        "spatial": {"kernel_h": (k, 1, 2 * c, 4 * c), "kernel_w": (1, k, 2 * c, 4 * c)},
        "depthwise": {"kernel_depth": (k, k, 2 * c, 4)},
        "separable": {"kernel_depth": (k, k, 2 * c, 4), "kernel_sep": (1, 1, 2 * c, 4 * c)},
    }[variant]
    kernels = {name: torch.randn(size, dtype=torch.float64) for name, size in sizes.items()}
    bias = torch.randn(4 * c, dtype=torch.float64)

    def conv(x, weight, groups=1):
        padding = (weight.shape[2] // 2, weight.shape[3] // 2)
        return torch.nn.functional.conv2d(x, weight, padding=padding, groups=groups)

    def part(gate, x, rows):
        columns = slice(gate * c, (gate + 1) * c)
        if variant == "convolution":
            return conv(x, filters(kernels["kernel"], rows, columns))
        if variant == "spatial":
            tall = conv(x, filters(kernels["kernel_h"], rows, columns))
            return conv(tall, filters(kernels["kernel_w"], rows, columns))
        depth = kernels["kernel_depth"][:, :, rows, gate].permute(2, 0, 1).unsqueeze(1)
        filtered = conv(x, depth, groups=c)
        if variant == "depthwise":
            return filtered
        return conv(filtered, filters(kernels["kernel_sep"], rows, columns))

    def gate_inputs(gate, x, hidden):
        return part(gate, x, slice(0, c)) + part(gate, hidden, slice(c, 2 * c))

    scoped = {f"lstm/rnn/lstm/{name}:0": value for name, value in {**kernels, "biases": bias}.items()}
    lstm = ConvLSTM.from_tensorflow(scoped, forget_bias=0.7, dtype=torch.float64)
    assert lstm.layers[0].variant == variant
    x = torch.randn(2, 3, c, 5, 4, dtype=torch.float64)
    output, (h, cell) = lstm(x)
    want, want_cell = naive(x, gate_inputs, bias, 0.7)
    torch.testing.assert_close(output, want)
    torch.testing.assert_close(h[0], want[:, -1])
    torch.testing.assert_close(cell[0], want_cell)


def test_from_tensorflow_accepts_arrays_and_no_biases():
    kernel = torch.randn(3, 3, 6, 8)
    lstm = ConvLSTM.from_tensorflow({"kernel": kernel.numpy()}, batch_first=False)
    assert lstm.layers[0].bias is None and not lstm.batch_first
    assert (lstm.layers[0].input_size, lstm.layers[0].hidden_size) == (4, 2)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"weights": torch.zeros(3, 3, 4, 8)}, "variables must be biases and kernel or kernel_h"),
        ({"kernel": torch.zeros(3, 3, 4)}, "kernel must have 4 dimensions"),
        ({"kernel": torch.zeros(3, 3, 4, 8), "biases": torch.zeros(4)}, "variables must fit"),
        ({"kernel": torch.zeros(2, 2, 4, 8)}, "kernel_size must be an odd int"),
        (
            dict.fromkeys(("a/kernel", "b/kernel"), torch.zeros(3, 3, 4, 8)),
            "variables must be those of one layer",
        ),
    ],
)
def test_from_tensorflow_refuses_what_does_not_fit(variables, message):
    with pytest.raises(ValueError, match=message):
        ConvLSTM.from_tensorflow(variables)


@pytest.mark.parametrize("variant", VARIANTS)
def test_layers_carry_their_states(variant):
    lstm = ConvLSTM(4, 4, num_layers=2, variant=variant)
    x = torch.randn(2, 5, 4, 6, 7)
    with torch.no_grad():
        output, state = lstm(x)
        assert output.shape == (2, 5, 4, 6, 7) and all(s.shape == (2, 2, 4, 6, 7) for s in state)
        assert torch.equal(output[:, -1], state[0][1])
        first, carried = lstm(x[:, :3])
        second, carried = lstm(x[:, 3:], carried)
        torch.testing.assert_close(torch.cat([first, second], 1), output)
        torch.testing.assert_close(carried, state)
        turned = ConvLSTM(4, 4, num_layers=2, variant=variant, batch_first=False)
        turned.load_state_dict(lstm.state_dict())
        torch.testing.assert_close(turned(x.transpose(0, 1))[0].transpose(0, 1), output)


def test_a_cell_is_one_step_of_a_layer():
    cell = ConvLSTMCell(3, 5, (3, 5))
    lstm = ConvLSTM(3, 5, (3, 5))
    lstm.layers[0].load_state_dict(cell.state_dict())
    x, state = torch.randn(2, 3, 3, 6, 7), None
    for frame in x.unbind(1):
        state = cell(frame, state)
    torch.testing.assert_close(state[0], lstm(x)[0][:, -1])


def test_it_learns():
    torch.manual_seed(1)
    lstm = ConvLSTM(2, 4)
    x, target = torch.randn(1, 3, 2, 6, 6), torch.rand(1, 3, 4, 6, 6) / 2
    optimizer = torch.optim.Adam(lstm.parameters(), 0.05)
    losses = []
    for _ in range(25):
        loss = (lstm(x)[0] - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 3


def test_parameters_are_those_that_are_documented():
    names = {
        "convolution": {"weight": (20, 8, 3, 5), "bias": (20,)},
        "spatial": {"weight_h": (20, 8, 3, 1), "weight_w": (20, 10, 1, 5), "bias": (20,)},
        "separable": {"weight_depth": (4, 8, 3, 5), "weight_sep": (20, 8, 1, 1), "bias": (20,)},
    }
    for variant, shapes in names.items():
        cell = ConvLSTMCell(3, 5, (3, 5), variant=variant)
        assert {name: tuple(p.shape) for name, p in cell.named_parameters()} == shapes
    assert dict(ConvLSTMCell(3, 5, bias=False).named_parameters()).keys() == {"weight"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel_size": 4}, "kernel_size must be an odd int or two of them, got 4"),
        ({"kernel_size": (3,)}, r"kernel_size must be an odd int or two of them, got \(3,\)"),
        ({"variant": "dense"}, "variant must be one of"),
        ({"variant": "depthwise"}, "input_size must equal hidden_size"),
        ({"num_layers": 0}, "num_layers must be at least 1"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        ConvLSTM(3, 5, **options)


def test_wrong_sizes():
    with pytest.raises(ValueError, match="hidden_size must be at least 1, got 0"):
        ConvLSTM(3, 0)
    with pytest.raises(ValueError, match=r"x must have shape \(N, C, H, W\), got \(1, 1, 3, 4, 4\)"):
        ConvLSTMCell(3, 3)(torch.zeros(1, 1, 3, 4, 4))


def test_wrong_number_of_states():
    with pytest.raises(TypeError, match=r"state must be a pair \(h, c\)"):
        ConvLSTM(3, 3)(torch.zeros(1, 1, 3, 4, 4), (torch.zeros(1, 1, 3, 4, 4),))
    with pytest.raises(ValueError, match=r"state must hold \(h, c\) of 2 layer"):
        ConvLSTM(3, 3, num_layers=2)(torch.zeros(1, 1, 3, 4, 4), (torch.zeros(1, 1, 3, 4, 4),) * 2)
