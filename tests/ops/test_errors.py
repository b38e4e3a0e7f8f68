"""Every error of the ops and modules, in one pattern: the argument, what it must be, and what came.

Each `raise` of these files is reached by a row below: the last test finds the rows that are missing.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import vosops
from vosops import backends, nn

FOLDER = Path(vosops.__file__).parent
FILES = [
    *sorted((FOLDER / "ops").glob("*.py")),
    *sorted((FOLDER / "nn").glob("*.py")),
    *sorted((FOLDER / "reference").glob("*.py")),
    FOLDER / "backends.py",
    FOLDER / "_checks.py",
]


class Case(NamedTuple):
    """A call, the error that it raises, and the whole message."""

    call: Callable[[], object]
    error: type[Exception]
    message: str


def zeros(*shape, dtype=torch.float32, device="cpu"):
    return torch.zeros(shape, dtype=dtype, device=device)


def changed(function, good, rows):
    """A row for each change of good arguments."""
    return [Case(partial(function, **{**good, **change}), error, message) for change, error, message in rows]


V, T = ValueError, TypeError
half, double, integer = torch.float16, torch.float64, torch.int64

MATCHING = changed(
    partial(vosops.local_matching, radius=1),
    {"query": zeros(1, 4, 5, 6), "key": zeros(1, 4, 5, 6), "mask": zeros(1, 2, 5, 6)},
    [
        ({"query": "frame"}, T, "query must be a tensor, got str"),
        ({"query": zeros(4, 5, 6)}, V, "query must have shape (N, C, H, W), got (4, 5, 6)"),
        (
            {"query": zeros(1, 4, 5, 6, dtype=integer)},
            T,
            "query must be float32, float16, bfloat16 or float64, got torch.int64",
        ),
        ({"key": zeros(1, 4, 5, 7)}, V, "key must have shape (1, 4, 5, 6), got (1, 4, 5, 7)"),
        (
            {"key": zeros(1, 4, 5, 6, dtype=half)},
            T,
            "key must have the dtype of query (torch.float32), got torch.float16",
        ),
        ({"key": zeros(1, 4, 5, 6, device="meta")}, V, "key must be on the device of query (cpu), got meta"),
        (
            {"query": zeros(1, 0, 5, 6), "key": zeros(1, 0, 5, 6)},
            V,
            "query and key must have at least one channel, got C = 0",
        ),
        ({"mask": None}, T, "mask must be a tensor, got NoneType"),
        (
            {"mask": zeros(1, 5, 6, dtype=integer)},
            V,
            "num_objects must be given with a label map of torch.int64, got None",
        ),
        (
            {"mask": zeros(1, 5, 6, dtype=integer), "num_objects": 256},
            V,
            "num_objects must be at most 255 with a label map, got 256",
        ),
        (
            {"mask": zeros(1, 2, 5, 6, dtype=torch.complex64)},
            T,
            "mask must be bool, floating or an integer label map, got torch.complex64",
        ),
        ({"num_objects": 3}, V, "num_objects must be mask.shape[1] (2) or None, got 3"),
        ({"query_mask": zeros(1, 5, 6)}, T, "query_mask must be bool, got torch.float32"),
        ({"radius": 1.5}, T, "radius must be an int, got float"),
        ({"radius": True}, T, "radius must be an int, got bool"),
        ({"dilation": 0}, V, "dilation must be at least 1, got 0"),
        ({"radius": [2, 2]}, V, "radius must be an int or an ascending sequence of ints, got [2, 2]"),
        (
            {"precision": "fp8"},
            V,
            "precision must be None, 'highest', 'high', 'medium', 'ieee', 'tf32x3' or 'tf32', got 'fp8'",
        ),
    ],
)

frame, masks = zeros(1, 4, 5, 6), zeros(1, 2, 5, 6)
GLOBAL_MATCHING = changed(
    vosops.global_matching,
    {"query": frame, "key": frame, "mask": masks},
    [
        ({"mask": [masks]}, T, "mask must be a tensor where key is one, got list"),
        ({"key": None}, T, "key must be a tensor or a sequence of frames, got NoneType"),
        (
            {"key": [frame]},
            V,
            "mask must be a sequence with one mask for each of the frames in key, at least one, got Tensor",
        ),
        ({"key": [frame, 3], "mask": [masks] * 2}, T, "key[1] must be a tensor, got int"),
        (
            {"key": [frame] * 2, "mask": [masks, masks[:, :1]]},
            V,
            "mask[1] must have the shape of mask[0] (1, 2, 5, 6), got (1, 1, 5, 6)",
        ),
        (
            {"key": [frame] * 2, "mask": [masks]},
            V,
            "mask must be a sequence with one mask for each of the frames in key, at least one, got 1 for 2",
        ),
        (
            {"key": [], "mask": []},
            V,
            "mask must be a sequence with one mask for each of the frames in key, at least one, got 0 for 0",
        ),
    ],
)

query_key, memory_key, memory_value = zeros(1, 8, 4), zeros(1, 8, 9), zeros(1, 5, 9)
MEMORY_READ = changed(
    vosops.memory_read,
    {"query_key": query_key, "memory_key": memory_key, "memory_value": memory_value},
    [
        ({"query_key": None}, T, "query_key must be a tensor, got NoneType"),
        (
            {"query_key": zeros(4, 8)},
            V,
            "query_key must have shape (N, Ck, ...) with a pixel dimension, got (4, 8)",
        ),
        (
            {"query_key": zeros(1, 7, 4)},
            V,
            "memory_key must have the channels of query_key (7), at least one, got 8",
        ),
        ({"memory_key": None}, T, "memory_key must be a tensor or a sequence of tensors, got NoneType"),
        ({"valid": "all"}, T, "valid must be a tensor or a sequence of tensors, got str of length 3"),
        ({"memory_key": []}, T, "memory_key must be a tensor or a sequence of tensors, got list of length 0"),
        ({"similarity": "cosine"}, V, "similarity must be 'dot' or 'l2', got 'cosine'"),
        ({"scale": "large"}, T, "scale must be a number, got str"),
        ({"selection": query_key}, V, "selection must be None unless similarity is 'l2', got 'dot'"),
        (
            {"memory_key": zeros(2, 8, 9), "query_key": zeros(3, 8, 4)},
            V,
            "memory_key must have batch 1 or 3, got 2",
        ),
        (
            {"shrinkage": [zeros(1, 1, 9)] * 2},
            V,
            "shrinkage must have one entry for each of the 1 segments of memory_key, got 2",
        ),
        ({"valid": zeros(1, 9)}, T, "valid must be bool or a range (start, stop), got torch.float32"),
        ({"valid": (0.0, 3.0)}, T, "valid must be bool or a range (start, stop) of ints, got (0.0, 3.0)"),
        ({"valid": (3, 1)}, V, "valid must be a range (start, stop) with 0 <= start <= stop, got (3, 1)"),
        ({"memory_lengths": zeros(1)}, T, "memory_lengths must be int64 or int32, got torch.float32"),
        ({"memory_lengths": 3}, T, "memory_lengths must be a tensor or a sequence of ints, got int"),
        ({"memory_lengths": [-1]}, V, "memory_lengths must be at least 0, got -1"),
        (
            {"groups": [None], "valid": (0, 3)},
            V,
            "valid must be None with groups, which hold one for each group, got tuple of length 2",
        ),
        ({"groups": 3}, T, "groups must be a sequence of what valid may be, one for each group, got int"),
        (
            {"groups": [None, None]},
            V,
            "memory_value must be a sequence with one entry for each of the 2 groups, got Tensor",
        ),
        ({"prior": "wide", "query_key": zeros(1, 8, 2, 2)}, T, "prior must be a number, got str"),
        ({"prior": 0.0}, V, "prior must be greater than 0, got 0.0"),
        ({"prior": 2.0}, V, "query_key must have shape (N,Ck,H,W) with a prior, got (1, 8, 4)"),
        (
            {
                "prior": 2.0,
                "query_key": zeros(1, 8, 2, 2),
                "memory_key": [memory_key],
                "memory_value": [memory_value],
            },
            V,
            "prior must be None with segments or several groups, got 2.0",
        ),
        (
            {"memory_key": [memory_key]},
            V,
            "memory_value must be a sequence with one entry for each segment of memory_key, got Tensor",
        ),
        ({"memory_value": ["x"]}, T, "memory_value must hold tensors, got str"),
        (
            {"memory_value": [zeros(1, 5, 9), zeros(1, 4, 9)]},
            V,
            "memory_value must hold objects of equal shape and dtype, got (1, 1, 5, 9) torch.float32, "
            "(1, 1, 4, 9) torch.float32",
        ),
        (
            {"memory_key": [memory_key] * 2, "memory_value": [memory_value, memory_value[:, :2]]},
            V,
            "memory_value must have equal (O,Cv) in all segments, got [(1, 5), (1, 2)]",
        ),
        (
            {"memory_value": zeros(1, 5, 9, dtype=double)},
            T,
            "memory_value must be float64 only if query_key or memory_key is, got torch.float64 with query_key "
            "torch.float32",
        ),
    ],
)

chosen = vosops.MemoryWeights(zeros(2, 3, 4, dtype=torch.int32), zeros(2, 3, 4), zeros(2, 4))
MEMORY_GATHER = changed(
    vosops.memory_gather,
    {"weights": chosen, "memory_value": zeros(2, 5, 9)},
    [
        ({"weights": chosen.weights}, T, "weights must be MemoryWeights of memory_select, got Tensor"),
        ({"memory_value": [3]}, T, "memory_value must hold tensors, got int"),
        ({"memory_value": zeros(5, 9)}, V, "memory_value must have shape (N,Cv,M) or (N,O,Cv,M), got (5, 9)"),
        (
            {"memory_value": [zeros(2, 5, 4), zeros(2, 4, 5)]},
            V,
            "memory_value must have equal objects and channels in all segments, got (2, 5, 4) and (2, 4, 5)",
        ),
    ],
)

out, lse = zeros(1, 5, 4), zeros(1, 4)
MERGE_READS = [
    Case(partial(vosops.merge_reads, [out], 3), T, "lses must be a sequence of tensors, got int"),
    Case(
        partial(vosops.merge_reads, [out], []),
        V,
        "outs and lses must be equally many, at least one, got 1 and 0",
    ),
    Case(partial(vosops.merge_reads, [out], ["lse"]), T, "lses must hold tensors, got str"),
    Case(
        partial(vosops.merge_reads, [out, out[:, :2]], [lse, lse]),
        V,
        "outs and lses must have equal shapes, got (1, 5, 4) and (1, 2, 4), (1, 4) and (1, 4)",
    ),
    Case(
        partial(vosops.merge_reads, [lse], [out]),
        V,
        "lses must have the shape (N,*Q) of outs (N,[O,]Cv,*Q), got (1, 5, 4) and (1, 4)",
    ),
]

LOCAL_ATTENTION = changed(
    partial(vosops.local_attention, radius=1, heads=2),
    {"query": zeros(1, 4, 5, 6), "key": zeros(1, 4, 5, 6), "value": zeros(1, 2, 5, 6)},
    [
        (
            {"value": zeros(1, 2, 5, 6, dtype=half)},
            T,
            "value must have the dtype of query (torch.float32), got torch.float16",
        ),
        ({"heads": 3}, V, "query must have a multiple of heads = 3 channels, got 4"),
        ({"scale": zeros(1)}, T, "scale must be a number, got Tensor"),
    ],
)

LOCAL_CORRELATION = changed(
    partial(vosops.local_correlation, patch_size=3),
    {"query": zeros(1, 4, 5, 6), "key": zeros(1, 4, 5, 6)},
    [
        ({"key": zeros(1, 4, 5, 7)}, V, "key must have shape (1, 4, 5, 6), got (1, 4, 5, 7)"),
        (
            {"key": zeros(1, 4, 5, 6, dtype=half)},
            T,
            "key must have the dtype of query (torch.float32), got torch.float16",
        ),
        (
            {"query": zeros(1, 0, 5, 6), "key": zeros(1, 0, 5, 6)},
            V,
            "query and key must have at least one channel, got C = 0",
        ),
        ({"patch_size": 0}, V, "patch_size must be at least 1, got 0"),
        ({"patch_size": (3, 3, 3)}, V, "patch_size must be an int or a pair of ints, got (3, 3, 3)"),
        ({"stride": 1.5}, T, "stride must be an int, got float"),
        ({"padding": -1}, V, "padding must be at least 0, got -1"),
        ({"dilation_patch": (1, 0)}, V, "dilation_patch must be at least 1, got 0"),
        (
            {"kernel_size": 3, "dilation": 4, "padding": 1},
            V,
            "kernel_size and dilation must fit the padded query, H = 5 + 2 * 1, got a kernel of 9",
        ),
    ],
)

weights = {
    "l1_weight": zeros(5, 4, 7, 1),
    "l2_weight": zeros(3, 5, 1, 5),
    "r1_weight": zeros(6, 4, 1, 5),
    "r2_weight": zeros(3, 6, 7, 1),
}
GLOBAL_CONV = changed(
    vosops.global_conv,
    {"x": zeros(2, 4, 8, 9), **weights},
    [
        ({"x": zeros(2, 0, 8, 9)}, V, "x must have at least one channel, got C = 0"),
        ({"x": zeros(2, 3, 8, 9)}, V, "l1_weight must read the 3 channels of x, got (5, 4, 7, 1)"),
        ({"l1_weight": None}, T, "l1_weight must be a tensor, got NoneType"),
        (
            {"r2_weight": zeros(3, 6, 7, 1, dtype=half)},
            T,
            "r2_weight must have the dtype of x (torch.float32), got torch.float16",
        ),
        ({"l1_weight": zeros(5, 4, 2, 1)}, V, "l1_weight must have an odd kernel size, got 2"),
        (
            {"prepared": zeros(1, 11, 8, 9), "r1_bias": zeros(6)},
            V,
            "l1_bias and r1_bias must be None with prepared, which holds them already, got r1_bias",
        ),
        (
            {"prepared": zeros(1, 11, 8, 9), "x": zeros(2, 9, 8, 9)},
            V,
            "x must have at most the 4 channels of l1_weight, got 9",
        ),
        (
            {"precision": "half"},
            V,
            "precision must be None or one of exact, winograd, ieee, tf32x3, tf32, got 'half'",
        ),
        (
            {name: t.to("meta") for name, t in {"x": zeros(2, 4, 8, 9), **weights}.items()}
            | {"precision": "winograd"},
            V,
            "precision must be one of exact, ieee, tf32x3, tf32 on meta, got 'winograd'",
        ),
        (
            {name: t.double() for name, t in {"x": zeros(2, 4, 8, 9), **weights}.items()}
            | {"precision": "winograd"},
            V,
            "precision must be None or 'exact' with float64, got 'winograd'",
        ),
    ],
)
GLOBAL_CONV += changed(
    vosops.global_conv_prepare,
    {"reference": zeros(1, 2, 8, 9), "l1_weight": zeros(5, 4, 7, 1), "r1_weight": zeros(6, 4, 1, 5)},
    [
        (
            {"reference": zeros(1, 5, 8, 9)},
            V,
            "l1_weight and r1_weight must have the same channels, at least the 5 of reference, got 4 and 4",
        )
    ],
)

state = (zeros(2, 3, 5, 6), zeros(2, 3, 5, 6))
CONV_LSTM = changed(
    vosops.conv_lstm,
    {"x": zeros(2, 3, 4, 5, 6), "weights": zeros(12, 7, 3, 3), "state": state},
    [
        ({"x": zeros(2, 0, 4, 5, 6)}, V, "x must have at least one step, got T = 0"),
        (
            {"x": zeros(2, 3, 0, 5, 6)},
            V,
            "x must have at least one channel and one pixel, got (2, 3, 0, 5, 6)",
        ),
        (
            {"variant": "dense"},
            V,
            "variant must be one of convolution, spatial, depthwise, separable, got 'dense'",
        ),
        ({"variant": "spatial"}, V, "weights of variant 'spatial' must be 2 tensor(s), got 1"),
        ({"weights": None}, T, "weights must be a tensor or a sequence of tensors, got NoneType"),
        ({"weights": zeros(13, 7, 3, 3)}, V, "weights[0] must have 4*hidden rows, got (13, 7, 3, 3)"),
        ({"weights": zeros(12, 7, 2, 3)}, V, "weights[0] must have odd kernel sizes, got (2, 3)"),
        (
            {"weights": zeros(12, 7, 3, 3, dtype=half)},
            T,
            "weights[0] must have the dtype of x (torch.float32), got torch.float16",
        ),
        ({"state": 5}, T, "state must be a pair (h, c) of tensors or None, got int"),
        ({"state": state * 2}, T, "state must be a pair (h, c) of tensors or None, got tuple of length 4"),
        ({"forget_bias": "one"}, T, "forget_bias must be a number, got str"),
        ({"precision": "tf32"}, V, "precision must be None, 'exact' or 'winograd', got 'tf32'"),
        (
            {"precision": "winograd", "weights": zeros(12, 7, 5, 5)},
            V,
            "precision='winograd' must come with float32 tensors on the CPU and a 3x3 'convolution', got torch.float32 "
            "on cpu and 'convolution' of (5, 5)",
        ),
    ],
)

SOFT_AGGREGATE = [
    Case(partial(vosops.soft_aggregate, 0.5), T, "probabilities must be a tensor, got float"),
    Case(
        partial(vosops.soft_aggregate, zeros(4, 4)),
        V,
        "probabilities must have shape (..., O, H, W), got (4, 4)",
    ),
]

pairs = zeros(1, 1, 3, 4, 4), zeros(1, 1, 3, 4, 4)
from_tensorflow = nn.ConvLSTM.from_tensorflow
MODULES = [
    Case(partial(nn.MemoryRead, 6, kernel_size=2), V, "kernel_size must be odd, got 2"),
    Case(partial(nn.MemoryRead, 6, similarity="cosine"), V, "similarity must be 'dot' or 'l2', got 'cosine'"),
    Case(
        partial(nn.GlobalConv2d, 8, 8, (3, 4)), V, "kernel_size must be an odd int or two of them, got (3, 4)"
    ),
    Case(partial(nn.ConvLSTMCell, 3, 5, 4), V, "kernel_size must be an odd int or two of them, got 4"),
    Case(
        partial(nn.ConvLSTMCell, 3, 5, variant="dense"),
        V,
        "variant must be one of convolution, spatial, depthwise, separable, got 'dense'",
    ),
    Case(
        partial(nn.ConvLSTMCell, 3, 5, variant="depthwise"),
        V,
        "input_size must equal hidden_size with variant 'depthwise', got 3 and 5",
    ),
    Case(partial(nn.ConvLSTM, 3, 5, num_layers=0), V, "num_layers must be at least 1, got 0"),
    Case(
        lambda: nn.ConvLSTM(3, 3)(zeros(1, 1, 3, 4, 4), 7),
        T,
        "state must be a pair (h, c) of tensors or None, got int",
    ),
    Case(
        lambda: nn.ConvLSTM(3, 3, num_layers=2)(zeros(1, 1, 3, 4, 4), pairs),
        V,
        "state must hold (h, c) of 2 layer(s), got [1, 1]",
    ),
    Case(
        partial(from_tensorflow, dict.fromkeys(("a/kernel", "b/kernel"), zeros(3, 3, 4, 8))),
        V,
        "variables must be those of one layer, got ['a/kernel', 'b/kernel']",
    ),
    Case(
        partial(from_tensorflow, {"weights": zeros(3, 3, 4, 8)}),
        V,
        "variables must be biases and kernel or kernel_h+kernel_w or kernel_depth or kernel_depth+kernel_sep, got "
        "['weights']",
    ),
    Case(
        partial(from_tensorflow, {"kernel": zeros(3, 3, 4)}),
        V,
        "kernel must have 4 dimensions, the last of the gates, got (3, 3, 4)",
    ),
    Case(
        partial(from_tensorflow, {"kernel": zeros(3, 3, 4, 8), "biases": zeros(4)}),
        V,
        "variables must fit (4*hidden, C+hidden, kh, kw) as (8,), got a kernel or biases that become (4,)",
    ),
]


def forced_on_the_wrong_device():
    with vosops.use_backend("cpp"):
        vosops.local_matching(*(t.to("meta") for t in (frame, frame, masks)))


def forced_by_a_wrong_name():
    with vosops.use_backend("cuda"):
        raise AssertionError


FUNCTIONS = ", ".join(sorted(name for op in backends._ops.values() for name in op.resolve))
CHOICE = [
    Case(forced_by_a_wrong_name, V, "backend must be one of cpp, triton, reference or None, got 'cuda'"),
    Case(partial(vosops.explain, 3), V, f"op must be one of {FUNCTIONS}, got 3"),
    Case(partial(vosops.explain, "matching"), V, f"op must be one of {FUNCTIONS}, got 'matching'"),
    Case(
        forced_on_the_wrong_device,
        RuntimeError,
        "local_matching cannot run on backend 'cpp'. cpp: no compiled kernels for device meta",
    ),
]


def differentiated_forward():
    torch.func.jvp(lambda q: vosops.local_matching(q, frame, masks), (frame,), (frame,))


FORWARD_MODE = [
    Case(
        differentiated_forward,
        NotImplementedError,
        "local_matching has no forward-mode derivative; use reverse mode (torch.autograd.grad), which is "
        "differentiable to any order",
    )
]
ARGUMENTS = [
    *MATCHING,
    *GLOBAL_MATCHING,
    *MEMORY_READ,
    *MEMORY_GATHER,
    *MERGE_READS,
    *LOCAL_ATTENTION,
    *LOCAL_CORRELATION,
    *GLOBAL_CONV,
    *CONV_LSTM,
    *SOFT_AGGREGATE,
    *MODULES,
]
CASES = [*ARGUMENTS, *CHOICE, *FORWARD_MODE]


def caught(case: Case) -> Exception:
    with pytest.raises(case.error) as info:
        case.call()
    return info.value


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.message[:60])
def test_the_message_is(case):
    assert str(caught(case)) == case.message


@pytest.mark.parametrize("case", ARGUMENTS, ids=lambda case: case.message[:60])
def test_the_message_names_the_argument_what_it_must_be_and_what_came(case):
    assert (
        re.match(r"[a-z_0-9]\S*.* (must|must not) .*, got ", case.message)
        or " must be given " in case.message
    )


def test_no_error_is_without_its_row():
    raised = set()
    for case in CASES:
        trace = caught(case).__traceback__
        while trace.tb_next is not None:
            trace = trace.tb_next
        raised.add((trace.tb_frame.f_code.co_filename, trace.tb_lineno))
    unseen = []
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Raise):
                lines = range(node.lineno, node.end_lineno + 1)
                if not any((str(path), line) in raised for line in lines):
                    unseen.append(f"{path.relative_to(FOLDER)}:{node.lineno}")
    assert unseen == []
