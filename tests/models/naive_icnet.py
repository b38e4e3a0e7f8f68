"""LSTM-ICNet written again, naively: numpy, float64, maps as TensorFlow has them, straight from its variables."""

import numpy as np

MEAN = np.array([72.392, 82.909, 73.158])  # blue, green, red


def pad_same(size, kernel, stride):
    total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2


def conv(x, weights, stride=1, dilation=1, same=True):
    """x (N,H,W,C), weights (kh,kw,C,D)."""
    kh, kw, _, _ = weights.shape
    if same:
        rows = pad_same(x.shape[1], (kh - 1) * dilation + 1, stride)
        columns = pad_same(x.shape[2], (kw - 1) * dilation + 1, stride)
        x = np.pad(x, ((0, 0), rows, columns, (0, 0)))
    height = (x.shape[1] - (kh - 1) * dilation - 1) // stride + 1
    width = (x.shape[2] - (kw - 1) * dilation - 1) // stride + 1
    total = 0
    for i in range(kh):
        for j in range(kw):
            top, left = i * dilation, j * dilation
            part = x[
                :,
                top : top + (height - 1) * stride + 1 : stride,
                left : left + (width - 1) * stride + 1 : stride,
            ]
            total = total + part @ weights[i, j]
    return total


def depthwise(x, weights):
    """x (N,H,W,C), weights (kh,kw,C,1): each channel by its own filter."""
    kh, kw, _, _ = weights.shape
    padded = np.pad(x, ((0, 0), (kh // 2, kh // 2), (kw // 2, kw // 2), (0, 0)))
    height, width = x.shape[1:3]
    return sum(
        padded[:, i : i + height, j : j + width] * weights[i, j, :, 0] for i in range(kh) for j in range(kw)
    )


def resize(x, size, align_corners):
    """Bilinear along one axis after the other, as TensorFlow 1 computes source positions."""
    for axis, out in ((1, size[0]), (2, size[1])):
        n = x.shape[axis]
        scale = (n - 1) / (out - 1) if align_corners and out > 1 else n / out
        at = np.arange(out) * scale
        low = np.floor(at).astype(int).clip(max=n - 1)
        high = np.minimum(low + 1, n - 1)
        share = (at - low).reshape([-1 if a == axis else 1 for a in range(4)])
        x = np.take(x, low, axis) * (1 - share) + np.take(x, high, axis) * share
    return x


def interp(x, shrink=1.0, zoom=1.0):
    sizes = []
    for n in x.shape[1:3]:
        n = (n - 1) * shrink + 1
        sizes.append(int(n + (n - 1) * (zoom - 1)))
    return resize(x, sizes, align_corners=True)


def add(first, *others):
    return sum(others, resize(first, others[0].shape[1:3], align_corners=False))


def relu(x):
    return np.maximum(x, 0)


def mean_pool(x, kh, kw):
    height, width = (x.shape[1] - kh) // kh + 1, (x.shape[2] - kw) // kw + 1
    rows = [x[:, i * kh : (i + 1) * kh].mean(1) for i in range(height)]
    return np.stack(
        [np.stack([r[:, j * kw : (j + 1) * kw].mean(1) for j in range(width)], 1) for r in rows], 1
    )


def max_pool(x):
    x = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    height, width = (x.shape[1] - 3) // 2 + 1, (x.shape[2] - 3) // 2 + 1
    views = [x[:, i : i + 2 * height - 1 : 2, j : j + 2 * width - 1 : 2] for i in range(3) for j in range(3)]
    return np.max(views, axis=0)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


class Naive:
    """variables: by TensorFlow's names. positions: the layers that are recurrent. kind: of their convolutions."""

    def __init__(self, variables, kind="convolution", forget_bias=1.0):
        self.v = {name: np.asarray(x, dtype=np.float64) for name, x in variables.items()}
        self.kind = kind
        self.forget_bias = forget_bias

    def has(self, name):
        return any(n.startswith(f"{name}/") for n in self.v)

    def norm(self, name, x):
        gamma, beta, mean, variance = (
            self.v[f"{name}/{part}"] for part in ("gamma", "beta", "moving_mean", "moving_variance")
        )
        return (x - mean) / np.sqrt(variance + 1e-5) * gamma + beta

    def conv(self, name, x, stride=1, dilation=1):
        return conv(x, self.v[f"{name}/weights"], stride, dilation)

    def unit(self, name, x, stride=1, dilation=1):
        return self.norm(f"{name}_bn", self.conv(name, x, stride, dilation))

    def block(self, name, x, stride, dilation):
        shortcut = x
        if self.has(f"{name}_1x1_proj"):
            shortcut = self.unit(f"{name}_1x1_proj", x, stride)
        y = relu(self.unit(f"{name}_1x1_reduce", x, stride))
        y = relu(self.unit(f"{name}_3x3", y, 1, dilation))
        return relu(add(shortcut, self.unit(f"{name}_1x1_increase", y)))

    def gate(self, scope, x, part, gate, channels, out):
        """One gate's share of x, which meets rows [part, part + channels) of the kernels."""
        rows, columns = slice(part, part + channels), slice(gate * out, (gate + 1) * out)
        if self.kind == "convolution":
            return conv(x, self.v[f"{scope}kernel"][:, :, rows, columns])
        if self.kind == "spatial":
            x = conv(x, self.v[f"{scope}kernel_h"][:, :, rows, columns])
            return conv(x, self.v[f"{scope}kernel_w"][:, :, rows, columns])
        x = depthwise(x, self.v[f"{scope}kernel_depth"][:, :, rows, gate : gate + 1])
        return x if self.kind == "depthwise" else conv(x, self.v[f"{scope}kernel_sep"][:, :, rows, columns])

    def lstm(self, name, x):
        """x (T,H,W,C) of one clip."""
        scope = f"{name}/rnn/{name}/"
        biases = self.v[f"{scope}biases"]
        out, channels = len(biases) // 4, x.shape[3]
        h = c = np.zeros((1, *x.shape[1:3], out))
        steps = []
        for frame in x[:, None]:
            i, g, f, o = (
                self.gate(scope, frame, 0, n, channels, out)
                + self.gate(scope, h, channels, n, out, out)
                + biases[n * out : (n + 1) * out]
                for n in range(4)
            )
            c = sigmoid(f + self.forget_bias) * c + sigmoid(i) * np.tanh(g)
            h = sigmoid(o) * np.tanh(c)
            steps.append(h)
        return np.concatenate(steps)

    def recurrent(self, name, skip, x):
        if not self.has(name):
            return x
        inputs = self.conv(f"{name}_input_reduction", x) if self.has(f"{name}_input_reduction") else x
        hidden = self.lstm(name, inputs)
        return np.concatenate([hidden, self.conv(skip, x)], -1) if self.has(skip) else hidden

    def __call__(self, clip):
        """clip (T,H,W,3) uint8 RGB -> logits, sub24, sub4, each (T,h,w,K)."""
        data = clip[..., ::-1].astype(np.float64) - MEAN
        x = interp(data, shrink=0.5)
        x = relu(self.unit("conv1_1_3x3_s2", x, 2))
        x = relu(self.unit("conv1_2_3x3", x))
        x = max_pool(relu(self.unit("conv1_3_3x3", x)))
        for n in (1, 2, 3):
            x = self.block(f"conv2_{n}", x, 1, 1)
        medium = self.block("conv3_1", x, 2, 1)
        x = interp(medium, shrink=0.5)
        for n in (2, 3, 4):
            x = self.block(f"conv3_{n}", x, 1, 1)
        for n in range(1, 7):
            x = self.block(f"conv4_{n}", x, 1, 2)
        for n in range(1, 4):
            x = self.block(f"conv5_{n}", x, 1, 4)
        h, w = x.shape[1:3]
        pools = [mean_pool(x, h // n, w // n) for n in (4, 3, 2, 1)]
        x = add(x, *(resize(p, (h, w), align_corners=True) for p in pools))
        pooled = interp(relu(self.unit("conv5_4_k1", x)), zoom=2.0)
        low = self.conv("conv_sub4", pooled, dilation=2)
        low = self.recurrent("convlstm5_4_sub4", "convlstm5_4_sub4_1x1_reduce", low)
        medium = self.conv("conv3_1_sub2_proj", medium)
        medium = self.recurrent("convlstm3_1_sub2", "conv3_1_sub2_proj_1x1_reduce", medium)
        x = relu(add(self.norm("conv_sub4_bn", low), self.norm("conv3_1_sub2_proj_bn", medium)))
        sub24 = interp(x, zoom=2.0)
        x = self.unit("conv_sub2", sub24, dilation=2)
        high = data
        for name in ("conv1_sub1", "conv2_sub1", "conv3_sub1"):
            high = relu(self.unit(name, high, 2))
        high = self.conv("conv3_sub1_proj", high)
        high = self.recurrent("convlstm3_sub1", "conv3_sub1_proj_1x1_reduce", high)
        x = relu(add(x, self.norm("conv3_sub1_proj_bn", high)))
        if self.has("convlstm6_cls"):
            x = self.recurrent("convlstm6_cls", "conv_sub12_sum_1x1_reduce", x)
            x = relu(self.norm("convlstm6_cls_bn", x))
        x = interp(x, zoom=2.0)
        heads = ((x, "conv6_cls"), (sub24, "sub24_out"), (pooled, "sub4_out"))
        return [self.conv(name, y) + self.v[f"{name}/biases"] for y, name in heads]
