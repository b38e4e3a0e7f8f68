"""The memory read and the usage by Intel's matrix engine, or by its twin in plain C++: exactness and fallbacks."""

import math

import pytest
import torch

import vosops
from vosops import _library
from vosops.reference.memory_read import memory_read_core, memory_usage_core

pytestmark = pytest.mark.skipif(
    _library.CPU_CAPABILITY != "amx" or torch.ops.vosops.amx_refusal() != "",
    reason="needs the amx library, on its processor or as VOSOPS_AMX_TWIN=1",
)

SCALE = 128**-0.5
NONE = (None, None, None)  # shrinkage, query_bias, key_bias


def counts() -> dict[str, int]:
    return {name: int(n) for name, n in (c.split("=") for c in torch.ops.vosops.amx_counts().split())}


class Counted:
    """How often each counter of the read and the usage rose."""

    def __enter__(self):
        self.before = counts()
        return self

    def __exit__(self, *_):
        after = counts()
        self.rose = {n: after[n] - self.before[n] for n in after if after[n] != self.before[n]}


def read(*arguments, precision="highest"):
    """A read by tiles, and nothing else."""
    *tensors, scale = arguments
    with Counted() as counted:
        result = torch.ops.vosops.memory_read(*tensors, scale, precision)
    assert counted.rose == {"memory_read": 1}
    return result


def normal(*size, seed=0, dtype=torch.float32):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed)).to(dtype)


def problem(n=1, o=1, c=128, v=48, p=130, m=1620, dtype=torch.float32):
    return [normal(*size, seed=i, dtype=dtype) for i, size in enumerate([(n, c, p), (n, c, m), (n, o, v, m)])]


def exact(query, key, value, *vectors):
    """(out, lse) in float64."""
    *vectors, scale = vectors
    wide = [None if t is None else t.double() for t in (query, key, value, *vectors)]
    return memory_read_core(*wide, scale)


def rms_error(got, want):
    """Root mean square of the error relative to that of the result, which may be beyond float32's squares."""
    unit = want.abs().max()
    return (((got.double() - want) / unit).square().mean() / (want / unit).square().mean()).sqrt().item()


# ---- Errors: what facts of float32 from pieces promise, each case in the range of its pieces.

CASES = {
    "normal": (1.0, 1.0, 1.0),
    "keys x4, logits to 20": (1.0, 4.0, 1.0),
    "keys and queries x4, logits to 80": (4.0, 4.0, 1.0),
    "values x1e30": (1.0, 1.0, 1e30),
    "values x1e-24": (1.0, 1.0, 1e-24),
    "keys x1e-20, queries x1e20": (1e20, 1e-20, 1.0),
}


@pytest.mark.parametrize("positive", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_errors_of_float32(case, positive):
    tensors = [t * factor for t, factor in zip(problem(), CASES[case], strict=True)]
    if positive:
        tensors[2] = tensors[2].abs()
    query, key, value = tensors
    want, want_lse = exact(*tensors, *NONE, SCALE)
    affinity = (torch.bmm(key.mT, query) * SCALE).softmax(1)
    naive = rms_error(torch.matmul(value, affinity[:, None]), want)
    logits = want_lse.abs().max().item()
    errors = {}
    for precision in ("highest", "high", "medium"):
        out, lse = read(*tensors, *NONE, SCALE, precision=precision)
        errors[precision] = rms_error(out, want)
        assert (lse - want_lse).abs().max() <= {"highest": 1e-6, "high": 1e-6, "medium": 4e-2}[precision] * (
            2 + logits
        ), precision
    assert errors["highest"] <= naive
    assert errors["high"] <= 6e-6 + naive
    assert errors["highest"] < errors["high"] < errors["medium"] <= 3e-2
    assert errors["medium"] > 1e-4  # or it was not bfloat16 that multiplied


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_errors_of_halves(dtype):
    tensors = problem(dtype=dtype)
    want, want_lse = exact(*tensors, *NONE, SCALE)
    out, lse = read(*tensors, *NONE, SCALE)
    rounding = rms_error(want.to(dtype), want)
    assert out.dtype == dtype and lse.dtype == torch.float32
    assert rms_error(out, want) <= {torch.float16: 1.02, torch.bfloat16: 1.6}[dtype] * rounding
    assert (lse - want_lse).abs().max() <= {torch.float16: 3e-5, torch.bfloat16: 1e-4}[dtype]


def test_each_dtype_needs_its_own_pieces():
    # bfloat16 keys and values with a float32 query, as after a selection: the scores are float32's.
    query, key, value = problem()
    key, value = key.bfloat16(), value.bfloat16()
    want, want_lse = exact(query, key, value, *NONE, SCALE)
    out, lse = read(query, key, value, *NONE, SCALE)
    assert (lse - want_lse).abs().max() <= 2e-6 and rms_error(out, want) <= 4e-3
    wide, _ = read(query, key, value.float(), *NONE, SCALE)
    assert rms_error(wide, want) <= 3e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("c", [32, 50])  # whole steps of channels or not
def test_squares_are_exact(dtype, c):
    query, key, value = problem(c=c, v=100, p=140, m=1100, dtype=dtype)
    chosen = normal(1, c, 140, seed=9).sigmoid()
    wide = query.float()
    query_bias = -0.3 * (chosen * wide.square()).sum(1)
    query = torch.cat([2 * chosen * wide, -chosen], 1)
    vectors = (1 + normal(1, 1100, seed=8).square(), query_bias, None)
    want, want_lse = exact(query, key, value, *vectors, 0.3)
    out, lse = read(query, key, value, *vectors, 0.3)
    assert (lse - want_lse).abs().max() <= 1e-5 * want_lse.abs().max()
    bound = {torch.float32: 5e-6, torch.float16: 4e-4, torch.bfloat16: 4e-3}[dtype]
    assert rms_error(out, want) <= bound
    usage = torch.ops.vosops.memory_usage(query, key, *vectors, 0.3, "highest", lse)
    wide = [t.double() for t in (query, key, *vectors[:2])]
    want_usage = memory_usage_core(*wide, None, 0.3, want_lse)
    assert (usage - want_usage).abs().max() <= 3e-5 * want_usage.max()


# ---- The running maximum


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("slope", [0.4, 4.0, -4.0])
def test_scores_that_rise_and_fall_along_the_memory(dtype, slope):
    # By up to hundreds of powers of two: sums are scaled, and weights become 0, again and again.
    query, key, value = problem(p=140, m=1800, dtype=dtype)
    bias = (torch.arange(1800.0) * slope)[None]
    want, want_lse = exact(query, key, value, None, None, bias, SCALE)
    out, lse = read(query, key, value, None, None, bias, SCALE)
    rounding = 2**-24 * bias.abs().max().item()  # of the scores, by half a unit
    assert rms_error(out, want) <= rounding + (1e-6 if dtype == torch.float32 else 4e-3)
    assert (lse - want_lse).abs().max() <= 1e-4 + 2e-7 * want_lse.abs().max()
    rising = query.abs(), key.abs() * torch.linspace(0.1, 6, 1800).to(dtype), value  # without a bias
    want, want_lse = exact(*rising, *NONE, SCALE)
    out, lse = read(*rising, *NONE, SCALE)
    assert rms_error(out, want) <= (5e-6 if dtype == torch.float32 else 4e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_first_positions_that_nothing_may_read(dtype):
    query, key, value = problem(p=130, m=3000, dtype=dtype)
    bias = torch.zeros(1, 3000)
    bias[:, :1130] = -torch.inf  # more than two blocks
    out, lse = read(query, key, value, None, None, bias, SCALE)
    alone, alone_lse = read(query, key[..., 1130:], value[..., 1130:], *NONE, SCALE)
    torch.testing.assert_close(out, alone, rtol=0, atol=1e-6 if dtype == torch.float32 else 1e-2)
    torch.testing.assert_close(lse, alone_lse, rtol=0, atol=1e-5 if dtype == torch.float32 else 1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_excluded_positions_may_hold_anything(dtype):
    query, key, value = problem(n=2, o=2, p=130, m=1100, dtype=dtype)
    excluded = torch.rand(2, 1100, generator=torch.Generator().manual_seed(3)) < 0.3
    excluded[1] = True  # nothing to read
    bias = torch.zeros(2, 1100).masked_fill(excluded, -torch.inf)
    zeroed = key.masked_fill(excluded[:, None], 0), value.masked_fill(excluded[:, None, None], 0)
    want, want_lse = read(query, *zeroed, None, None, bias, SCALE)
    for anything in (torch.nan, torch.inf, 1e-38):
        held = (
            key.masked_fill(excluded[:, None], anything),
            value.masked_fill(excluded[:, None, None], anything),
        )
        out, lse = read(query, *held, None, None, bias, SCALE)
        assert torch.equal(out, want) and torch.equal(lse, want_lse)
    assert (out[1] == 0).all() and (lse[1] == -torch.inf).all() and (out[0] != 0).any()
    with Counted() as counted:
        usage = torch.ops.vosops.memory_usage(query, held[0], None, None, bias, SCALE, "highest", lse)
    assert counted.rose == {"memory_usage": 1}
    assert (usage[excluded] == 0).all() and abs(usage[0].sum().item() - 130) <= 1e-2


# ---- What pieces do not hold is read by the kernel without tiles, and counted


@pytest.mark.parametrize("which", ["query", "key", "value"])
@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf, 3.4e38, 1e-31, 1e-40])
def test_numbers_outside_of_the_range_fall_back(which, number):
    tensors = dict(zip(("query", "key", "value"), problem(c=64, v=70, p=130, m=1100), strict=True))
    tensors[which] = tensors[which].clone()
    tensors[which].view(-1)[-7] = number
    for precision in ("highest", "high"):
        with Counted() as counted:
            out, lse = torch.ops.vosops.memory_read(*tensors.values(), *NONE, SCALE, precision)
        assert counted.rose == {"memory_read_outside": 1}
        want, want_lse = memory_read_core(*tensors.values(), *NONE, SCALE)
        assert torch.equal(out.isnan(), want.isnan()) and torch.equal(lse.isnan(), want_lse.isnan())
        finite = want.isfinite()
        tolerance = 1e-5 * want[finite].abs().max().item() if finite.any() else 0
        torch.testing.assert_close(out, want, rtol=1e-5, atol=tolerance, equal_nan=True)
    if which != "value" and math.isfinite(number):
        with Counted() as counted:
            usage = torch.ops.vosops.memory_usage(
                tensors["query"], tensors["key"], *NONE, SCALE, "highest", lse
            )
        assert counted.rose == {"memory_usage_outside": 1}
        torch.testing.assert_close(
            usage,
            memory_usage_core(tensors["query"], tensors["key"], *NONE, SCALE, lse),
            rtol=1e-4,
            atol=1e-4,
            equal_nan=True,
        )


def test_bfloat16_reads_nan_and_infinity_as_numbers():
    query, key, value = problem(v=40, p=40, m=300, dtype=torch.bfloat16)
    value[0, 0, 3, 100], value[0, 0, 5, 200], value[0, 0, 7, 250] = torch.inf, torch.nan, -torch.inf
    query[0, 2, 11] = torch.nan
    out, lse = read(query, key, value, *NONE, SCALE)
    want, want_lse = exact(query, key, value, *NONE, SCALE)
    torch.testing.assert_close(out.double(), want, rtol=0, atol=1e-2, equal_nan=True)
    torch.testing.assert_close(lse.double(), want_lse, rtol=0, atol=1e-4, equal_nan=True)
    assert torch.equal(out.isnan(), want.isnan())


def test_float64_and_small_problems_are_not_for_tiles():
    with Counted() as counted:
        torch.ops.vosops.memory_read(*problem(p=120), *NONE, SCALE, "highest")
        torch.ops.vosops.memory_read(*problem(m=1000), *NONE, SCALE, "highest")
        torch.ops.vosops.memory_read(*problem(m=50, dtype=torch.bfloat16), *NONE, SCALE, "highest")
        torch.ops.vosops.memory_read(*problem(dtype=torch.float64), *NONE, SCALE, "highest")
        torch.ops.vosops.memory_read(*problem(m=0), *NONE, SCALE, "highest")
        torch.ops.vosops.memory_read(*problem(p=0), *NONE, SCALE, "highest")
    assert counted.rose == {}


# ---- What the result does not depend on


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_no_layout_changes_a_bit(dtype):
    query, key, value = problem(n=2, o=2, c=72, v=40, p=135, m=1111, dtype=dtype)
    bias = normal(2, 1111, seed=5)
    want = read(query, key, value, None, None, bias, SCALE)

    def spread(tensor):
        room = torch.full([2 * size + 1 for size in tensor.shape], torch.nan, dtype=tensor.dtype)
        return room[tuple(slice(1, None, 2) for _ in tensor.shape)].copy_(tensor)

    def last(tensor):
        return tensor.mT.contiguous().mT

    objects_inside = value.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    channels_outside = value.transpose(1, 2).contiguous().transpose(1, 2)
    for change in (spread, last):
        got = read(change(query), change(key), change(value), None, None, spread(bias), SCALE)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    for changed in (objects_inside, channels_outside):
        got = read(query, key, changed, None, None, bias, SCALE)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    with Counted() as counted:
        got = torch.ops.vosops.memory_read_list(
            query, key, [last(value[:, :1]), spread(value[:, 1:])], None, None, bias, SCALE, "highest"
        )
    assert counted.rose == {"memory_read": 1}
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("o", [1, 3, 19])
def test_values_of_one_channel(o):
    query, key, value = problem(o=o, c=140, v=1, p=140, m=1100)
    want, _ = exact(query, key, value, *NONE, SCALE)
    assert rms_error(read(query, key, value, *NONE, SCALE)[0], want) <= 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_number_of_threads_changes_a_bit(dtype):
    query, key, value = problem(o=2, c=72, v=70, p=300, m=1300, dtype=dtype)
    bias = normal(1, 1300, seed=5) * 20
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            out, lse = read(query, key, value, None, None, bias, SCALE)
            usage = torch.ops.vosops.memory_usage(query, key, None, None, bias, SCALE, "highest", lse)
            results.append((out, lse, usage))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_more_queries_than_sums_are_held_for():
    # 1536 channels of values: 12 MB of sums are those of 2048 queries.
    query, key, value = problem(o=3, c=8, v=512, p=2100, m=70, dtype=torch.bfloat16)
    out, lse = read(query, key, value, *NONE, SCALE)
    parts = [read(query[..., s], key, value, *NONE, SCALE) for s in (slice(1000), slice(1000, 2100))]
    assert torch.equal(out, torch.cat([part for part, _ in parts], 3))
    assert torch.equal(lse, torch.cat([part for _, part in parts], 1))


def test_the_public_read_is_by_tiles():
    with Counted() as counted:
        out, usage, lse = vosops.memory_read(
            normal(1, 64, 12, 12),
            normal(1, 64, 9, 12, 12),
            normal(1, 70, 9, 12, 12),
            return_usage=True,
            return_lse=True,
        )
    assert counted.rose == {"memory_read": 1, "memory_usage": 1}
    assert abs(usage.sum().item() - 144) < 1e-2
