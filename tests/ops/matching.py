"""The abstract tester of the matching ops: one specification, run for each op on each backend."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import vosops
from tests.effort import leave_out
from tests.ops.backends import EVERY_BACKEND, EVERY_BACKEND_AND_DTYPE, INTERPRETED

LAYOUTS = ("contiguous", "channels_last", "transposed", "slice")


def embeddings(shape: tuple[int, ...], dtype: torch.dtype, layout: str = "contiguous") -> Tensor:
    """Random embeddings (N,C,...) in one of several memory layouts."""
    values = torch.randn(shape).to(dtype)
    if layout == "channels_last":
        return values.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout == "transposed":
        return values.transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout == "slice":
        room = torch.full([2 * size + 1 for size in shape], torch.nan, dtype=dtype)
        view = room[tuple(slice(1, None, 2) for _ in shape)]
        return view.copy_(values)
    return values.contiguous()


def blobs(shape: tuple[int, ...], density: float = 0.4) -> Tensor:
    """Boolean masks in which pixels come and go in runs, unlike plain noise."""
    return torch.rand(shape).cumsum(-1).sin() > 1 - 2 * density


def direct_distance(query: Tensor, key: Tensor, index: Tensor) -> Tensor:
    """|q - k[index]|^2 in float64 for index (N,O,K,H,W); +inf where the index is -1."""
    n, c = query.shape[:2]
    q = query.double().reshape(n, c, 1, 1, -1)
    slots = index.flatten(3)
    matched = key.double().flatten(2).gather(2, slots.clamp(min=0).reshape(n, 1, -1).expand(-1, c, -1))
    distance = (q - matched.reshape(n, c, *slots.shape[1:])).square().sum(1)
    return distance.masked_fill(slots < 0, torch.inf).view(index.shape)


# A backend may choose the best by |k|^2 - 2 q.k, whose rounding error scales with the squared norms, and on
# tensor cores with the reduced precision; the distance that it returns is exact for the pixel that it chose.
SELECTION_ERROR = {"ieee": 4e-6, "tf32x3": 2e-5, "tf32": 4e-3}
DISTANCE_ERROR = 4e-6
GRADIENT_ERROR = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def assert_matches(
    distance: Tensor, index: Tensor, query: Tensor, key: Tensor, oracle: Tensor, precision: str = "ieee"
) -> None:
    """The distance is that of the pixel chosen, and no pixel is noticeably nearer than the chosen one."""
    query, key = query.detach().cpu(), key.detach().cpu()
    distance, index = distance.detach().double().cpu(), index.cpu()
    found = oracle.isfinite()
    assert torch.equal(distance.isnan(), oracle.isnan())
    assert torch.equal(distance.isposinf(), oracle.isposinf())
    assert torch.equal(index >= 0, found)
    chosen = direct_distance(query, key, index)
    exact = 1e-12 if query.dtype == torch.float64 else DISTANCE_ERROR
    torch.testing.assert_close(distance[found], chosen[found], rtol=exact, atol=exact * 1e-3)
    if found.any():
        scale = sum(side.double().nan_to_num().square().sum(1).amax() for side in (query, key))
        selection = 1e-13 if query.dtype == torch.float64 else SELECTION_ERROR[precision]
        assert (chosen - oracle)[found].max() <= selection * scale


class MatchingTester:
    """Subclasses name the op and its cases; every test below then holds for it."""

    name: ClassVar[str]
    cases: ClassVar[dict[str, tuple[tuple[int, ...], tuple[int, ...], int, tuple[Any, ...]]]]
    """(N,C,H,W) of the query, the key's sizes after (N,C), O, the core's options."""
    variants: ClassVar[list[dict[str, Any]]]
    """Options of the public op; the first one is small."""

    @staticmethod
    def oracle(query: Tensor, key: Tensor, mask: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
        """The core in plain PyTorch: (query, key, mask, *options, query_mask) -> distance, index."""
        raise NotImplementedError

    # ---- Helpers

    def inputs(self, case, dtype, device="cpu", layout="contiguous"):
        query_shape, pixels, objects, options = self.cases[case]
        query = embeddings(query_shape, dtype, layout).to(device)
        key = embeddings((*query_shape[:2], *pixels), dtype, layout).to(device)
        return query, key, blobs((query_shape[0], objects, *pixels)).to(device), options

    def expected(self, query, key, mask, options, query_mask=None):
        query_mask = None if query_mask is None else query_mask.cpu()
        query, key = query.detach().cpu().double(), key.detach().cpu().double()
        return self.oracle(query, key, mask.cpu(), *options, query_mask)

    def core(self, backend, query, key, mask, options, query_mask=None, precision="ieee"):
        return backend.op(self.name)(query, key, mask, *options, query_mask, precision)

    @property
    def op(self):
        return getattr(vosops, self.name)

    @pytest.fixture
    def problem(self):
        """A small problem in float64 with gradients: query, key, mask, bias."""
        query, key, mask, _ = self.inputs("small", torch.float64)
        bias = torch.randn(mask.shape[1], dtype=torch.float64, requires_grad=True)
        return query.requires_grad_(), key.requires_grad_(), mask, bias

    # ---- The core of every backend

    @EVERY_BACKEND_AND_DTYPE
    def test_core_finds_the_nearest_pixels(self, backend, dtype, case):
        leave_out(
            backend is INTERPRETED and dtype.itemsize == 2 and case not in ("plain", "wide"),
            "the interpreter differs between dtypes in how values are loaded alone",
        )
        leave_out(
            backend is INTERPRETED and case == "dilation beyond a word of mask",
            "its window of 133 x 133 takes the interpreter 90 seconds, and no word of mask is in its kernel",
        )
        query, key, mask, options = self.inputs(case, dtype, backend.device)
        distance, index = self.core(backend, query, key, mask, options)
        assert distance.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert_matches(distance, index, query, key, self.expected(query, key, mask, options)[0])

    @EVERY_BACKEND
    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_core_reads_any_stride(self, backend, layout):
        query, key, mask, options = self.inputs("batch", torch.float32, layout=layout)
        mask = mask.transpose(-1, -2).contiguous().transpose(-1, -2)
        distance, index = self.core(backend, *(t.to(backend.device) for t in (query, key, mask)), options)
        assert_matches(distance, index, query, key, self.expected(query, key, mask, options)[0])

    @EVERY_BACKEND
    @pytest.mark.parametrize("precision", ["tf32", "tf32x3"])
    def test_core_in_reduced_precision(self, backend, precision):
        query, key, mask, options = self.inputs("plain", torch.float32, backend.device)
        distance, index = self.core(backend, query, key, mask, options, precision=precision)
        assert_matches(distance, index, query, key, self.expected(query, key, mask, options)[0], precision)

    @EVERY_BACKEND
    def test_core_first_pixel_wins_a_tie(self, backend):
        # Small integers: every distance is exact in every implementation, and ties abound.
        query, key, mask, options = self.inputs("batch", torch.float32, backend.device)
        query, key = (side.clamp(-1, 1).round() for side in (query, key))
        got = self.core(backend, query, key, mask, options)
        for have, want in zip(got, self.expected(query, key, mask, options), strict=True):
            assert torch.equal(have.cpu().double(), want.double())

    @EVERY_BACKEND
    def test_core_absent_objects_and_skipped_queries(self, backend):
        query, key, mask, options = self.inputs("plain", torch.float32, backend.device)
        mask[:, 1] = False
        query_mask = blobs((query.shape[0], *query.shape[2:])).to(backend.device)
        distance, index = self.core(backend, query, key, mask, options, query_mask)
        assert distance[:, 1].isposinf().all() and (index[:, 1] == -1).all()
        assert distance.movedim((0, 3, 4), (0, 1, 2))[~query_mask].isposinf().all()
        assert_matches(distance, index, query, key, self.expected(query, key, mask, options, query_mask)[0])

    @EVERY_BACKEND
    def test_core_nan_query_gives_nan_and_nan_key_never_wins(self, backend):
        query, key, mask, options = self.inputs("plain", torch.float32, backend.device)
        query[0, 2, 3, 4] = torch.nan
        key.flatten(2)[0, 1, 40] = torch.nan
        key.flatten(2)[0, 3, 51] = torch.inf
        distance, index = self.core(backend, query, key, mask, options)
        assert distance[0, :, :, 3, 4].isnan().all() and (index[0, :, :, 3, 4] == -1).all()
        assert not torch.isin(index, torch.tensor([40, 51], device=index.device)).any()
        usable = mask & key.isfinite().all(1, keepdim=True)
        finite = key.nan_to_num(posinf=0)
        assert_matches(distance, index, query, finite, self.expected(query, finite, usable, options)[0])

    @EVERY_BACKEND
    @pytest.mark.parametrize("dim", ["batch", "objects", "rows"])
    def test_core_empty(self, backend, dim):
        query, key, mask, options = self.inputs("plain", torch.float32, backend.device)
        if dim == "batch":
            query, key, mask = query[:0], key[:0], mask[:0]
        elif dim == "objects":
            mask = mask[:, :0]
        else:
            query, key, mask = query[..., :0, :], key[..., :0, :], mask[..., :0, :]
        distance, index = self.core(backend, query, key, mask, options)
        assert distance.shape == index.shape == self.expected(query, key, mask, options)[0].shape

    @EVERY_BACKEND_AND_DTYPE
    def test_core_backward(self, backend, dtype):
        leave_out(
            backend is INTERPRETED and dtype == torch.bfloat16,
            "the interpreter differs between float16 and bfloat16 in how values are loaded alone",
        )
        query, key, mask, options = self.inputs("batch", dtype, backend.device)
        distance, index = self.core(backend, query, key, mask, options)
        grad = torch.randn_like(distance)
        grad[index < 0] = torch.nan  # must not be read
        q, k = (side.cpu().double().requires_grad_() for side in (query, key))
        n, c = query.shape[:2]
        slots = index.cpu().reshape(n, -1, query.shape[2:].numel())
        matched = k.flatten(2).gather(2, slots.clamp(min=0).flatten(1).unsqueeze(1).expand(-1, c, -1))
        squared = (q.flatten(2).unsqueeze(2) - matched.view(n, c, *slots.shape[1:])).square().sum(1)
        weights = grad.cpu().double().view(slots.shape).nan_to_num() * (slots >= 0)
        (squared * weights).sum().backward()
        got = backend.op("matching_backward")(
            grad.view(slots.shape), query.flatten(2), key.flatten(2), index.view(slots.shape)
        )
        tolerance = GRADIENT_ERROR[dtype]
        for have, want in zip(got, (q.grad, k.grad), strict=True):
            assert have.dtype == dtype
            torch.testing.assert_close(have.cpu().double(), want.flatten(2), rtol=tolerance, atol=tolerance)

    @EVERY_BACKEND
    def test_core_backward_is_deterministic(self, backend):
        query, key, _, _ = self.inputs("plain", torch.float32, backend.device)
        grad = torch.randn(1, 3, query.shape[2:].numel(), device=backend.device)
        index = torch.full(grad.shape, 7, device=backend.device)  # everything flows to one pixel
        run = [
            backend.op("matching_backward")(grad, query.flatten(2), key.flatten(2), index) for _ in range(3)
        ]
        for again in run[1:]:
            assert all(torch.equal(a, b) for a, b in zip(run[0], again, strict=True))

    # ---- The public op

    def test_is_the_reference(self, problem):
        query, key, mask, bias = problem
        for kwargs in ({}, {"bias": bias}, {"normalize": False}, {"query_mask": blobs(query[:, 0].shape)}):
            for variant in self.variants:
                options = {**variant, **kwargs, "return_indices": True}
                ours = self.op(query, key, mask, **options)
                theirs = getattr(vosops.reference, self.name)(query, key, mask, **options)
                torch.testing.assert_close(ours[0], theirs[0])
                assert torch.equal(ours[1], theirs[1])

    def test_normalizes_as_feelvos(self, problem):
        query, key, mask, bias = problem
        raw = self.op(query, key, mask, normalize=False, bias=bias, **self.variants[0])
        normalized = self.op(query, key, mask, bias=bias, **self.variants[0])
        torch.testing.assert_close(normalized, 1 - 2 / (1 + raw.exp()))
        assert (self.op(query, key, torch.zeros_like(mask)) == 1).all()

    def test_masks_of_every_kind_agree(self, problem):
        query, key, mask, _ = problem
        labels = torch.randint(0, 3, (mask.shape[0], *mask.shape[2:]))
        labels[0, ..., 0, 0] = 255
        one_hot = torch.stack([labels == v for v in range(3)], 1)
        want = self.op(query, key, one_hot)
        for dtype in (torch.uint8, torch.int32, torch.int64):
            assert torch.equal(self.op(query, key, labels.to(dtype), num_objects=3), want)
        assert torch.equal(self.op(query, key, one_hot * 0.51), want)
        assert (self.op(query, key, one_hot * 0.5) == 1).all()

    def test_gradients_to_second_order(self, problem):
        query, key, mask, bias = problem
        for variant in self.variants:

            def op(q, k, b, variant=variant):
                return self.op(q, k, mask, bias=b, **variant)

            assert torch.autograd.gradcheck(op, (query, key, bias), check_batched_grad=True)
            assert torch.autograd.gradgradcheck(op, (query, key, bias))

    def test_gradients_stay_finite_without_a_match_or_at_large_distance(self, problem):
        query, key, mask, _ = problem
        mask[:, 1] = False
        self.op(query * 1e3, key, mask).sum().backward()
        assert query.grad.isfinite().all() and key.grad.isfinite().all()

    def test_opcheck(self, problem):
        query, key, mask, _ = problem
        options = self.cases["small"][3]
        core = getattr(torch.ops.vosops, self.name)
        torch.library.opcheck(core.default, (query, key, mask, *options, None, "ieee"))
        distance, index = core(query, key, mask, *options, None, "ieee")
        slots = (index.shape[0], -1, query.shape[2:].numel())
        grad = torch.randn_like(distance).detach().reshape(slots).requires_grad_()
        sides = [side.detach().flatten(2).requires_grad_() for side in (query, key)]
        torch.library.opcheck(
            torch.ops.vosops.matching_backward.default, (grad, *sides, index.reshape(slots))
        )

    def test_compiles_without_graph_breaks(self, problem):
        query, key, mask, bias = problem

        def op(q, k, m, b):
            return self.op(q, k, m, bias=b, **self.variants[0])

        compiled = torch.compile(op, fullgraph=True)
        torch.testing.assert_close(compiled(query, key, mask, bias), op(query, key, mask, bias))
        inputs = (query, key, bias)
        grads = torch.autograd.grad(compiled(query, key, mask, bias).sum(), inputs)
        torch.testing.assert_close(grads, torch.autograd.grad(op(query, key, mask, bias).sum(), inputs))

    def test_exports(self, problem):
        query, key, mask, _ = (t.detach() for t in problem)
        op, variant, name = self.op, self.variants[0], self.name

        class Module(torch.nn.Module):
            def forward(self, q, k, m):
                return op(q, k, m, **variant)

        program = torch.export.export(Module(), (query, key, mask))
        torch.testing.assert_close(program.module()(query, key, mask), Module()(query, key, mask))
        assert f"vosops.{name}" in str(program.graph)

    def test_vmap_folds_into_the_batch(self, problem):
        query, key, mask, _ = (t.detach() for t in problem)
        queries = torch.stack([query, query + 1, query - 1])
        got = torch.vmap(lambda q: self.op(q, key, mask))(queries)
        assert torch.equal(got, torch.stack([self.op(q, key, mask) for q in queries]))

    def test_forward_mode_is_refused(self, problem):
        query, key, mask, _ = (t.detach() for t in problem)
        with pytest.raises(NotImplementedError, match="forward-mode"):
            torch.func.jvp(lambda q: self.op(q, key, mask), (query,), (query,))

    def test_autocast_promotes_mixed_dtypes_only(self, problem):
        query, key, mask, _ = (t.detach() for t in problem)
        low = query.bfloat16()
        with pytest.raises(TypeError, match="key must have the dtype of query"):
            self.op(low, key.float(), mask)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            mixed = self.op(low, key.float(), mask)
        assert torch.equal(mixed, self.op(low.float(), key.float(), mask))

    def test_every_output_is_written(self, problem, deterministic):
        query, key, mask, _ = problem
        options = self.cases["small"][3]
        distance, index = getattr(torch.ops.vosops, self.name)(query, key, mask, *options, None, "ieee")
        assert not distance.isnan().any() and (index >= -1).all() and (index < key[0, 0].numel()).all()
        self.op(query, key, mask).sum().backward()
        assert not query.grad.isnan().any() and not key.grad.isnan().any()

    def test_threads_do_not_change_the_result(self):
        query, key, mask, options = self.inputs("batch", torch.float32)
        threads, results = torch.get_num_threads(), []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(getattr(torch.ops.vosops, self.name)(query, key, mask, *options, None, "ieee"))
        torch.set_num_threads(threads)
        for result in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], result, strict=True))

    def test_wrong_input_names_the_argument(self, wrong):
        change, error, message = wrong
        query, key, mask, _ = self.inputs("small", torch.float32)
        with pytest.raises(error, match=message):
            self.op(**{"query": query, "key": key, "mask": mask, **change(query, key, mask)})


WRONG_ARGUMENTS = [
    (lambda q, k, m: {"query": q[0]}, ValueError, r"query must have shape \(N, C, H, W\), got"),
    (lambda q, k, m: {"query": "frame"}, TypeError, "query must be a tensor, got str"),
    (lambda q, k, m: {"query": q.long()}, TypeError, "query must be float32.*got torch.int64"),
    (lambda q, k, m: {"key": k[:, :3]}, ValueError, r"key must have shape .*got"),
    (lambda q, k, m: {"key": k.half()}, TypeError, r"key must have the dtype of query \(torch.float32\)"),
    (
        lambda q, k, m: {"key": k.to("meta")},
        ValueError,
        r"key must be on the device of query \(cpu\), got meta",
    ),
    (lambda q, k, m: {"mask": m[..., :-1]}, ValueError, "mask must have shape"),
    (lambda q, k, m: {"mask": m.int()}, ValueError, "num_objects must be given"),
    (
        lambda q, k, m: {"mask": m[:, 0].int(), "num_objects": -1},
        ValueError,
        "num_objects must be at least 0",
    ),
    (
        lambda q, k, m: {"mask": m[:, 0].int(), "num_objects": 300},
        ValueError,
        "num_objects must be at most 255",
    ),
    (lambda q, k, m: {"num_objects": 7}, ValueError, r"num_objects must be mask.shape\[1\] \(2\)"),
    (lambda q, k, m: {"bias": torch.zeros(3)}, ValueError, r"bias must have shape \(2\), got \(3,\)"),
    (lambda q, k, m: {"query_mask": m}, ValueError, "query_mask must have shape"),
    (lambda q, k, m: {"query_mask": q[:, 0]}, TypeError, "query_mask must be bool, got torch.float32"),
    (lambda q, k, m: {"precision": "half"}, ValueError, "precision must be None, 'highest'.*got 'half'"),
]


def pytest_parameters(tester: type[MatchingTester], metafunc: pytest.Metafunc) -> None:
    """Parametrize `case` and `wrong` by what a tester's class says; called from the op's test module."""
    if metafunc.cls is tester and "case" in metafunc.fixturenames:
        metafunc.parametrize("case", tester.cases)
    if "wrong" in metafunc.fixturenames:
        metafunc.parametrize("wrong", tester.wrong_arguments, ids=lambda wrong: wrong[2][:40])


def channels_first(frame: Tensor) -> Tensor:
    """(H,W,C) of the original implementations to (1,C,H,W)."""
    return frame.permute(2, 0, 1)[None]
