"""What `explain` says of a call is what happens: for every op, over devices, dtypes and mixed arguments."""

from __future__ import annotations

import dataclasses
import itertools
import warnings

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import vosops
from vosops import _library, backends

DTYPES = (torch.bfloat16, torch.float64)


def matching(**options):
    def case(make, query, key, bias):
        tensors = make(1, 4, 6, 6, dtype=query), make(1, 4, 6, 6, dtype=key), make(1, 2, 6, 6)
        return tensors, {"bias": make(2, dtype=bias), **options}

    return case


def attention(make, query, key, value):
    return tuple(make(1, 4, 6, 6, dtype=dtype) for dtype in (query, key, value)), {"radius": 1}


def correlation(**options):
    def case(make, query, key, _):
        return (make(1, 4, 6, 6, dtype=query), make(1, 4, 6, 6, dtype=key)), {"patch_size": 3, **options}

    return case


def sequence(make, x, weight, cell):
    state = (make(1, 3, 6, 6, dtype=x), make(1, 3, 6, 6, dtype=cell))
    return (make(1, 2, 4, 6, 6, dtype=x), make(12, 7, 3, 3, dtype=weight), None, state), {}


def lines(taps):
    def case(make, x, weight, bias):
        shapes = ((3, 4, taps, 1), (2, 3, 1, taps), (3, 4, 1, taps), (2, 3, taps, 1))
        weights = (make(*shape, dtype=weight) for shape in shapes)
        return (make(1, 4, 6, 6, dtype=x), *weights), {"l1_bias": make(3, dtype=bias)}

    return case


def prepared(make, x, weight, bias):
    weights = (make(3, 6, 5, 1, dtype=weight), make(3, 6, 1, 5, dtype=weight))
    return (make(1, 4, 6, 6, dtype=x), *weights), {"l1_bias": make(3, dtype=bias)}


def read(**options):
    def case(make, query, key, value):
        tensors = (
            make(1, 4, 6, 6, dtype=query),
            make(1, 4, 2, 6, 6, dtype=key),
            make(1, 2, 2, 6, 6, dtype=value),
        )
        return tensors, options

    return case


def read_in_segments(make, query, first, second):
    keys = [make(1, 4, 5, dtype=first), make(1, 4, 7, dtype=second)]
    values = [make(1, 2, size, dtype=torch.float32) for size in (5, 7)]
    return (make(1, 4, 6, 6, dtype=query), keys, values), {"similarity": "l2"}


def read_with_a_selection(make, query, key, selection):
    tensors = make(1, 4, 6, 6, dtype=query), make(1, 4, 9, dtype=key), make(1, 2, 9)
    return tensors, {"similarity": "l2", "selection": make(1, 4, 6, 6, dtype=selection)}


def read_for_groups(make, query, key, value):
    values = [make(1, 2, 9, dtype=value), make(1, 2, 9, dtype=value)]
    return (make(1, 4, 6, 6, dtype=query), make(1, 4, 9, dtype=key), values), {"groups": [None, (2, 9)]}


def selection(make, query, key, bias):
    tensors = make(1, 4, 6, 6, dtype=query), make(1, 4, 9, dtype=key)
    return (*tensors, 3), {"bias": make(1, 9, dtype=bias)}


def gathering(make, weights, first, second):
    chosen = vosops.MemoryWeights(
        make(1, 3, 6, 6, dtype=torch.int32), make(1, 3, 6, 6, dtype=weights), make(1, 6, 6, dtype=weights)
    )
    return (chosen, [make(1, 2, 5, dtype=first), make(1, 2, 4, dtype=second)]), {}


CASES = {
    "local_matching": (vosops.local_matching, matching(radius=0)),
    "global_matching": (vosops.global_matching, matching()),
    "local_attention": (vosops.local_attention, attention),
    "local_correlation": (vosops.local_correlation, correlation()),
    "local_correlation of a kernel": (vosops.local_correlation, correlation(kernel_size=3, stride=2)),
    "conv_lstm": (vosops.conv_lstm, sequence),
    "global_conv": (vosops.global_conv, lines(7)),
    "global_conv of long lines": (vosops.global_conv, lines(19)),
    "global_conv_prepare": (vosops.global_conv_prepare, prepared),
    "memory_read": (vosops.memory_read, read()),
    "memory_read with top_k": (vosops.memory_read, read(top_k=3, return_usage=True)),
    "memory_read with a prior": (vosops.memory_read, read(prior=2.0)),
    "memory_read in segments": (vosops.memory_read, read_in_segments),
    "memory_read with a selection": (vosops.memory_read, read_with_a_selection),
    "memory_read for groups": (vosops.memory_read, read_for_groups),
    "memory_select": (vosops.memory_select, selection),
    "memory_gather": (vosops.memory_gather, gathering),
}


@pytest.fixture
def ran(monkeypatch):
    """The names of the implementations whose kernels were called."""
    names: set[str] = set()

    def recorded(implementation):
        def record(kernel):
            def call(*args):
                names.add(implementation.name)
                return kernel(*args)

            return call

        kernels = {name: record(kernel) for name, kernel in implementation.kernels.items()}
        return dataclasses.replace(implementation, kernels=kernels)

    for name, op in list(backends._ops.items()):
        implementations = {key: recorded(each) for key, each in op.implementations.items()}
        monkeypatch.setitem(backends._ops, name, dataclasses.replace(op, implementations=implementations))
    return names


def outcome(call):
    """What a call gives, or the error that it raises."""
    try:
        return call()
    except (TypeError, ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"


needs_cuda_build = pytest.mark.skipif(
    torch.version.cuda is None, reason="a CPU build of torch indexes no tensor on a GPU, a fake one neither"
)


@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param("cuda", marks=needs_cuda_build),
        pytest.param("cuda with the compiled library", marks=needs_cuda_build),
    ],
)
@pytest.mark.parametrize("name", CASES)
def test_explain_names_the_implementation_that_runs(name, device, ran, monkeypatch):
    function, case = CASES[name]
    if "compiled" in device:
        monkeypatch.setattr(_library, "CUDA_REASONS", ())
    place = device.split()[0]

    def make(*shape, dtype=torch.float32):
        return torch.ones(shape, dtype=dtype, device=place)

    told = set()
    every, few = itertools.product(DTYPES, repeat=3), [DTYPES[:1] * 3, (DTYPES[0], DTYPES[1], DTYPES[0])]
    for forced, combinations in ((None, every), ("cpp", few), ("reference", few)):
        for dtypes in combinations:
            # The tensors are fake: nothing is computed, and the device need not exist.
            with FakeTensorMode(), vosops.use_backend(forced), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                args, options = case(make, *dtypes)
                said = outcome(lambda: vosops.explain(function, *args, **options))
                ran.clear()
                result = outcome(lambda: function(*args, **options))
            header = said.splitlines()[0]
            if isinstance(result, str) and not result.startswith(("RuntimeError", "CannotRunError")):
                assert header == result  # wrong arguments are told alike
                continue
            named = header.split(" ")[1] if "nothing can serve" not in header else None
            assert ran == ({named} if named else set()), f"{dtypes} under {forced}: {header}, but {ran} ran"
            told.add(named)
    assert told - {None}, "no combination was legal"


@needs_cuda_build
def test_one_float64_tensor_among_others_is_read_by_plain_pytorch_on_a_gpu():
    """Kernels for GPUs have no float64: what the query alone would say is wrong."""

    def told(function, *args):
        return vosops.explain(function, *args).splitlines()[0].split(" ")[1]

    with FakeTensorMode():
        narrow, wide = (torch.ones(1, 4, 9, device="cuda", dtype=d) for d in (torch.float32, torch.float64))
        indices = torch.ones(1, 3, 9, dtype=torch.int32, device="cuda")
        chosen = vosops.MemoryWeights(indices, narrow[:, :3], narrow[:, 0])
        assert told(vosops.memory_read, narrow, wide, narrow) == "reference"
        assert told(vosops.memory_read, wide, narrow, narrow) == "reference"
        assert told(vosops.memory_select, narrow, [narrow, wide], 3) == "reference"
        assert told(vosops.memory_gather, chosen, wide) == "reference"
        assert (
            told(vosops.memory_gather, chosen._replace(weights=wide[:, :3]), [narrow, narrow]) == "reference"
        )
        assert told(vosops.memory_read, narrow, narrow, narrow) != "reference"


def test_autocast_decides_what_is_told(ran):
    """Under autocast mixed dtypes become one before anything is chosen."""
    query, key, mask = torch.randn(1, 4, 6, 6), torch.randn(1, 4, 6, 6).bfloat16(), torch.ones(1, 1, 6, 6)
    with pytest.raises(TypeError, match="key must have the dtype of query"):
        vosops.explain(vosops.local_matching, query, key, mask, radius=2)
    with torch.autocast("cpu", torch.bfloat16):
        told = vosops.explain(vosops.local_matching, query, key, mask, radius=2)
        vosops.local_matching(query, key, mask, radius=2)
    assert ran == {told.split()[1]}


@pytest.mark.parametrize("op", [vosops.local_matching, vosops.global_matching])
def test_autocast_does_not_reach_the_reference(op):
    query, key, mask = torch.randn(1, 30, 6, 6), torch.randn(1, 30, 6, 6), torch.ones(1, 1, 6, 6)
    with vosops.use_backend("reference"):
        want = op(query, key, mask, normalize=False)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(op(query, key, mask, normalize=False), want)


@pytest.mark.parametrize("name", CASES)
def test_shapes_alone_are_computed_by_the_reference(name, ran):
    """Tensors on the meta device, of which autocast knows nothing."""
    function, case = CASES[name]
    args, options = case(
        lambda *shape, dtype=None: torch.ones(shape, dtype=dtype, device="meta"), *[torch.half] * 3
    )
    assert "nothing" not in vosops.explain(function, *args, **options)
    function(*args, **options)
    assert ran == {"reference"}
