"""Every contender computes what the op computes: distances, gradients, and the work that is counted."""

import dataclasses
import itertools
from dataclasses import replace

import pytest
import torch

from vosops import reference
from vosops.benchmarking import BENCHMARKS, Case, Inputs, Variant
from vosops.benchmarking.conv_lstm import LstmCase
from vosops.benchmarking.memory_read import MemoryCase, MemorySize
from vosops.benchmarking.runner import _compare

CPU = torch.device("cpu")
MATCHINGS = {op: BENCHMARKS[op] for op in ("local_matching", "global_matching")}
PEERS = {"faiss flat": "faiss", "KeOps": "pykeops"}
CONTENDERS = [
    pytest.param(op, v, id=f"{op}-{v.name}")
    for op, benchmark in MATCHINGS.items()
    for v in benchmark.variants
    if v.name != "torch.compile"
]
CASES = {
    "bands": Case("bands", 17, 23, objects=3, radius=4),
    "disk": Case("disk", 20, 19, objects=1, radius=3, coverage=0.1),
}


def expected(op, inputs):
    """The op's definition in plain PyTorch."""
    window = {"radius": inputs.radius} if op == "local_matching" else {}
    return getattr(reference, op)(inputs.query, inputs.key, inputs.mask, **window)


@pytest.mark.parametrize("case", CASES.values(), ids=str)
@pytest.mark.parametrize(("op", "variant"), CONTENDERS)
def test_contenders_compute_the_same_distances(op, variant, case):
    if variant.package:
        pytest.importorskip(variant.package, reason=f"{variant.name} needs {variant.package}")
    inputs = variant.prepare(Inputs.of(case, CPU))
    found = variant.formulation(inputs.query, inputs.key, inputs.mask, inputs.radius)
    torch.testing.assert_close(found, expected(op, inputs), rtol=0, atol=2e-6)


@pytest.mark.parametrize(("op", "variant"), [p for p in CONTENDERS if p.values[1].differentiable])
def test_contenders_compute_the_same_gradients(op, variant):
    inputs = variant.prepare(Inputs.of(CASES["bands"], CPU))
    gradients = []
    for function in (lambda q, k: variant.formulation(q, k, inputs.mask, inputs.radius), None):
        query, key = (t.clone().requires_grad_() for t in (inputs.query, inputs.key))
        if function is None:
            window = {"radius": inputs.radius} if op == "local_matching" else {}
            output = getattr(reference, op)(query, key, inputs.mask, **window)
        else:
            output = function(query, key)
        gradients.append(torch.autograd.grad(output, (query, key), inputs.weight))
    for found, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", CASES.values(), ids=str)
@pytest.mark.parametrize("op", MATCHINGS)
def test_useful_operations_are_counted_pair_by_pair(op, case):
    inputs = Inputs.of(case, CPU)
    belongs = inputs.mask[0].any(0)
    pixels = list(itertools.product(range(case.height), range(case.width)))
    near = case.radius if op == "local_matching" else max(case.height, case.width)
    pairs = sum(
        bool(belongs[ky, kx]) and abs(ky - qy) <= near and abs(kx - qx) <= near
        for (ky, kx), (qy, qx) in itertools.product(pixels, pixels)
    )
    assert BENCHMARKS[op].work(case, inputs)[0] == 2 * inputs.query.shape[1] * pairs


def test_embeddings_are_told_apart_by_the_normalised_distance():
    """Otherwise comparing results would prove nothing: tanh(d / 2) is 1 for every large d."""
    inputs = Inputs.of(CASES["bands"], CPU)
    for op in MATCHINGS:
        found = expected(op, inputs)
        near = found[found < 1]  # 1 is an object outside of the window
        assert near.min() > 0.1 and near.max() < 0.99


def test_the_masks_cover_what_the_case_says():
    assert Inputs.of(CASES["bands"], CPU).mask.sum() == 17 * 23
    disk = Inputs.of(Case("disk", 120, 214, objects=1, coverage=0.05), CPU).mask
    assert disk.float().mean() == pytest.approx(0.05, rel=0.02)


def test_results_that_differ_in_one_pixel_are_not_the_same():
    from vosops.benchmarking import DisagreementError

    a = torch.rand(1, 2, 5, 5)
    b = a.clone()
    b[0, 1, 2, 3] += 1e-3
    _compare("vosops", [a], "other", [a.clone()], torch.float32)
    with pytest.raises(DisagreementError, match="other and vosops disagree in 1 of 50 distances"):
        _compare("vosops", [a], "other", [b], torch.float32)
    b[0, 0, 0, 0] = torch.nan
    with pytest.raises(DisagreementError, match="2 of 50"):
        _compare("vosops", [a], "other", [b], torch.float32)


READS = [v for v in BENCHMARKS["memory_read"].variants if not v.compiles]
READ_SIZE = MemorySize("tiny", 18, 3, objects=2, key_channels=8, value_channels=16)


@pytest.mark.parametrize("top_k", [None, 4])
@pytest.mark.parametrize("variant", READS, ids=lambda v: v.name)
def test_reads_compute_the_same_values_and_gradients(variant, top_k):
    if (top_k is None) == (variant.name == "embedding_bag") or (top_k and "SDPA" in variant.name):
        pytest.skip("computes the other kind of read")
    case = MemoryCase("tiny", dataclasses.replace(READ_SIZE, top_k=top_k), backward=True)
    inputs = case.inputs(CPU)

    def read(query, key, value, inputs):
        return reference.memory_read(query, key, value, top_k=inputs.top_k)

    wanted = Variant("reference", read).call(inputs, backward=True)()
    found = variant.call(inputs, backward=True)()
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_the_work_of_a_read_is_two_products():
    case = MemoryCase("tiny", READ_SIZE)
    assert BENCHMARKS["memory_read"].work(case, case.inputs(CPU))[0] == 2 * 18 * 54 * (8 + 2 * 16)


def test_layouts_of_values_are_what_the_case_says():
    for channel_major in (False, True):
        size = dataclasses.replace(READ_SIZE, top_k=4, channel_major=channel_major)
        value = MemoryCase("tiny", size).inputs(CPU).value
        assert value.is_contiguous() == channel_major and value.shape == (1, 2, 16, 54)


STEPS = [v for v in BENCHMARKS["conv_lstm"].variants if not v.compiles]


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("variant", STEPS, ids=lambda v: v.name)
def test_lstm_steps_compute_the_same_states_and_gradients(variant, steps):
    inputs = LstmCase("tiny", 4, 6, 7, steps, backward=True).inputs(CPU)

    def sequence(x, kernel, bias, inputs):
        return reference.conv_lstm(x, kernel, bias, inputs.state)[0]

    wanted = Variant("reference", sequence).call(inputs, backward=True)()
    found = variant.call(inputs, backward=True)()
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_the_work_of_lstm_steps_is_that_of_their_algorithm():
    direct = 2 * 3 * (6 * 7) * (4 * 4) * (2 * 4) * 9
    for dtype, share in ((torch.float32, 36 / 144), (torch.bfloat16, 1)):
        case = LstmCase("tiny", 4, 6, 7, 3, dtype=dtype)
        assert BENCHMARKS["conv_lstm"].work(case, case.inputs(CPU))[0] == direct * share


CONVOLUTIONS = [v for v in BENCHMARKS["global_conv"].variants if not v.compiles]


@pytest.mark.parametrize("variant", CONVOLUTIONS, ids=lambda v: v.name)
def test_convolutions_compute_the_same_values_and_gradients(variant):
    case = BENCHMARKS["global_conv"].case("4096x15x27-backward").small()
    inputs = case.inputs(CPU)
    plain = next(v for v in CONVOLUTIONS if v.name == "four convolutions")
    found, wanted = (v.call(inputs, backward=True)() for v in (variant, plain))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * float(b.abs().max()))


@pytest.mark.parametrize("variant", BENCHMARKS["local_attention"].variants, ids=lambda v: v.name)
def test_windows_give_the_same_values_and_gradients(variant):
    inputs = BENCHMARKS["local_attention"].case("training").small().inputs(CPU)
    plain = next(v for v in BENCHMARKS["local_attention"].variants if v.name == "unfold")
    found, wanted = (v.call(inputs, backward=True)() for v in (variant, plain))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "variant",
    [v for v in BENCHMARKS["local_correlation"].variants if v.package is None],
    ids=lambda v: v.name,
)
def test_correlations_give_the_same_values_and_gradients(variant):
    for case in ("training", "FlowNetC"):
        inputs = replace(BENCHMARKS["local_correlation"].case(case), backward=True).small().inputs(CPU)
        found, wanted = (
            v.call(inputs, backward=True)() for v in (variant, BENCHMARKS["local_correlation"].variants[0])
        )
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_prepared_half_gives_the_values_of_the_whole():
    case = BENCHMARKS["global_conv"].case("4096x15x27-prepared").small()
    inputs = case.inputs(CPU)
    found, wanted = (v.call(inputs, backward=False)() for v in CONVOLUTIONS[:2])
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
