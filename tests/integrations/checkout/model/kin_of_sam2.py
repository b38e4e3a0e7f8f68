"""Attention to a memory as EfficientTAM and EdgeTAM compute it, written from their descriptions, one step at a time."""

import math

import torch
from torch import nn


def angles(width, height, channels):
    """Complex numbers (height*width, channels/2): half of them turn by x, half by y."""
    frequencies = 10000.0 ** (-torch.arange(0, channels, 4) / channels)
    x = torch.arange(width).repeat(height)[:, None] * frequencies
    y = torch.arange(height).repeat_interleave(width)[:, None] * frequencies
    turned = torch.cat([x, y], 1)
    return torch.polar(torch.ones_like(turned), turned)


def turn(x, rotation):
    """Turn adjacent channels of x (B,r*P,C)."""
    pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    repeats = x.shape[1] // rotation.shape[0]
    return torch.view_as_real(pairs * rotation.repeat(repeats, 1)).flatten(2)


class Projections(nn.Module):
    def __init__(self, embedding_dim, num_heads, dropout=0.0, kv_in_dim=None):
        super().__init__()
        self.num_heads, self.dropout_p = num_heads, dropout
        memory = kv_in_dim or embedding_dim
        self.q_proj = nn.Linear(embedding_dim, embedding_dim)
        self.k_proj = nn.Linear(memory, embedding_dim)
        self.v_proj = nn.Linear(memory, embedding_dim)
        self.out_proj = nn.Linear(embedding_dim, embedding_dim)

    def read(self, q, k, v, bias=0.0):
        scores = q @ k.transpose(1, 2) / math.sqrt(q.shape[2]) + bias
        return self.out_proj(scores.softmax(2) @ v)


class Pooled(Projections):
    """EfficientTAM: means of 2 x 2 keys and values, whose scores are raised by the logarithm of how many they are."""

    def __init__(self, *args, rope_k_repeat=False, feat_sizes=(4, 4), **kwargs):
        super().__init__(*args, **kwargs)
        self.freqs_cis = self.compute_cis(*feat_sizes)

    def compute_cis(self, end_x, end_y):
        return angles(int(end_x), int(end_y), self.q_proj.out_features)

    def pool(self, x, side):
        frames = x.reshape(x.shape[0], -1, side, side, x.shape[2]).movedim(4, 2).flatten(0, 1)
        pooled = nn.functional.avg_pool2d(frames, 2)
        return pooled.flatten(2).transpose(1, 2).reshape(x.shape[0], -1, x.shape[2])

    def parts(self, q, k, v, excluded):
        q, k, v = self.q_proj(q), self.k_proj(k), self.v_proj(v)
        side = math.isqrt(q.shape[1])
        if self.freqs_cis.shape[0] != q.shape[1]:
            self.freqs_cis = self.compute_cis(side, side)
        count = k.shape[1] - excluded
        frames, pointers = turn(k[:, :count], self.freqs_cis), k[:, count:]
        if count <= q.shape[1]:
            return turn(q, self.freqs_cis), frames, pointers, v
        v = torch.cat([self.pool(v[:, :count], side), v[:, count:]], 1)
        return turn(q, self.freqs_cis), self.pool(frames, side), pointers, v


class PooledByScore(Pooled):
    def forward(self, q, k, v, num_k_exclude_rope=0):
        longer = k.shape[1] - num_k_exclude_rope > q.shape[1]
        q, frames, pointers, v = self.parts(q, k, v, num_k_exclude_rope)
        bias = torch.zeros(frames.shape[1] + pointers.shape[1])
        bias[: frames.shape[1]] = math.log(4) if longer else 0.0
        return self.read(q, torch.cat([frames, pointers], 1), v, bias)


class PooledByKey(Pooled):
    """The same, where the logarithm is added to each channel of the keys."""

    def forward(self, q, k, v, num_k_exclude_rope=0):
        longer = k.shape[1] - num_k_exclude_rope > q.shape[1]
        q, frames, pointers, v = self.parts(q, k, v, num_k_exclude_rope)
        return self.read(q, torch.cat([frames + (math.log(4) if longer else 0.0), pointers], 1), v)


class Summaries(Projections):
    """EdgeTAM: a frame is summaries without a position, then a small grid of summaries with positions of their own."""

    def __init__(self, *args, q_sizes=(4, 4), k_sizes=(2, 2), **kwargs):
        super().__init__(*args, **kwargs)
        channels = self.q_proj.out_features
        self.freqs_cis_q, self.freqs_cis_k = angles(*q_sizes, channels), angles(*k_sizes, channels)

    def forward(self, q, k, v, num_k_exclude_rope=0, rope_k_repeat=-1):
        q, k, v = self.q_proj(q), self.k_proj(k), self.v_proj(v)
        count = k.shape[1] - num_k_exclude_rope
        turned = []
        for frame in k[:, :count].chunk(rope_k_repeat, 1):
            still = frame.shape[1] - self.freqs_cis_k.shape[0]
            turned += [frame[:, :still], turn(frame[:, still:], self.freqs_cis_k)]
        return self.read(turn(q, self.freqs_cis_q), torch.cat([*turned, k[:, count:]], 1), v)


class TurnedByParts(Projections):
    """SAM 3's tracker: real and imaginary part of the rotation are kept beside it, and made again with it."""

    def __init__(self, *args, rope_k_repeat=False, feat_sizes=(4, 4), **kwargs):
        super().__init__(*args, **kwargs)
        self.make(*feat_sizes)

    def compute_cis(self, end_x, end_y):
        return angles(int(end_x), int(end_y), self.q_proj.out_features)

    def make(self, width, height):
        self.freqs_cis = self.compute_cis(width, height)
        self.freqs_cis_real, self.freqs_cis_imag = self.freqs_cis.real, self.freqs_cis.imag

    def forward(self, q, k, v, num_k_exclude_rope=0):
        q, k, v = self.q_proj(q), self.k_proj(k), self.v_proj(v)
        side = math.isqrt(q.shape[1])
        if self.freqs_cis.shape[0] != q.shape[1]:
            self.make(side, side)
        rotation = torch.complex(self.freqs_cis_real, self.freqs_cis_imag)
        count = k.shape[1] - num_k_exclude_rope
        keys = torch.cat([turn(k[:, :count], rotation), k[:, count:]], 1)
        return self.read(turn(q, rotation), keys, v)
