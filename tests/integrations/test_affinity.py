"""The affinity handle: what it answers equals the affinity's own answer, and anything else builds it."""

from __future__ import annotations

import warnings

import pytest
import torch

from vosops.integrations import affinity as module
from vosops.integrations.affinity import Affinity, Handle, Similarity

B, C, M, P = 1, 8, 40, 12


@pytest.fixture(autouse=True)
def fresh_warnings(monkeypatch):
    monkeypatch.setattr(module, "_warned", set())


@pytest.fixture
def never_built(monkeypatch):
    """Makes it an error to build an affinity."""

    def refuse(self, operation, **_):
        raise AssertionError(f"{operation} built the affinity")

    monkeypatch.setattr(Handle, "dense", refuse)


def scores(batch=B, positions=M, **options) -> Similarity:
    key, query = torch.randn(batch, C, positions), torch.randn(batch, C, P)
    return Similarity.of(
        key,
        query,
        shrinkage=torch.rand(batch, 1, positions) + 1,
        selection=torch.rand(batch, C, P),
        **options,
    )


def close(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def test_a_handle_looks_like_its_tensor(never_built):
    handle = scores(batch=2)
    assert isinstance(handle, torch.Tensor)
    assert handle.shape == handle.size() == (2, M, P)
    assert (handle.dim(), handle.ndim, handle.size(1)) == (3, 3, M)
    assert (handle.dtype, handle.device.type) == (torch.float32, "cpu")


@pytest.mark.parametrize(
    "index",
    [
        (slice(None), slice(10, None)),
        (slice(None), slice(None, -5)),
        (slice(None), slice(-7, None), torch.arange(P) % 3 == 0),
        (slice(None), slice(None), torch.tensor([3, 1])),
        (slice(None), slice(0, 0)),
        (slice(None), slice(None), torch.zeros(P, dtype=torch.bool)),
    ],
)
def test_slices_of_the_scores(index, monkeypatch):
    handle = scores()
    expected = handle.build()[index]
    monkeypatch.setattr(Handle, "dense", None)
    close(handle[index].build(), expected)


def test_concatenated_parts_of_the_scores(never_built):
    handle = scores()
    built = handle.build()
    parts = torch.cat([handle[:, :30], handle[:, 30:]], 1)
    assert len(parts.columns) == 1, "adjacent parts are one again"
    close(parts.build(), built)
    gap = torch.cat([handle[:, :5], handle[:, 20:]], dim=1)
    close(gap.build(), torch.cat([built[:, :5], built[:, 20:]], 1))


@pytest.mark.parametrize("top_k", [None, 5, 100])
def test_reads_of_an_affinity(top_k, never_built):
    handle = scores()
    for part in (handle, torch.cat([handle[:, :7], handle[:, 15:]], 1)):
        affinity = Affinity.of(part, top_k)
        dense, size = affinity.build(), part.shape[1]
        close(dense.sum(1), torch.ones(B, P))
        close(affinity.sum(dim=2), dense.sum(2))
        close(affinity.sum(-1, keepdim=True), dense.sum(-1, keepdim=True))
        objects = torch.randn(3, 4, size)
        close(objects @ affinity, objects @ dense)
        close(torch.randn(0, 4, size) @ affinity, torch.empty(0, 4, P))
        close(torch.bmm(objects, affinity.expand(3, -1, -1)), objects @ dense)
        many = torch.randn(1, 3, 4, size)
        close(torch.matmul(many, affinity), many @ dense)
        close(many[0, 0] @ affinity, many[0, 0] @ dense)
        mask = torch.arange(P) < 4
        close(objects @ affinity[:, :, mask], objects @ dense[:, :, mask])


@pytest.mark.parametrize("top_k", [None, 5])
def test_reads_of_a_batch(top_k, never_built):
    affinity = Affinity.of(scores(batch=2), top_k)
    dense = affinity.build()
    value, shared = torch.randn(2, 4, M), torch.randn(1, 4, M)
    close(torch.bmm(value, affinity), torch.bmm(value, dense))
    close(shared @ affinity, shared @ dense)
    close(affinity.sum(dim=2), dense.sum(2))


@pytest.mark.parametrize("top_k", [None, 5])
@pytest.mark.parametrize("equation", ["ocm,bmq->obcq", "bcm,bmq->bcq", "bmoc,bmq->bqoc", "cm,bmq->bcq"])
def test_einsum(equation, top_k, never_built):
    sizes = dict(o=3, c=4, m=M, b=2)
    affinity = Affinity.of(scores(batch=2), top_k)
    value = torch.randn([sizes[name] for name in equation.split(",")[0]])
    close(torch.einsum(equation, value, affinity), torch.einsum(equation, value, affinity.build()))
    left, right = equation.split("->")[0].split(",")
    swapped = f"{right},{left}->{equation.split('->')[1]}"
    close(torch.einsum(swapped, affinity, value), torch.einsum(swapped, affinity.build(), value))


@pytest.mark.parametrize(
    "softmax",
    [
        lambda s: s.softmax(1),
        lambda s: torch.softmax(s, dim=1),
        lambda s: torch.nn.functional.softmax(s, dim=1),
    ],
)
def test_softmax_of_the_scores(softmax, never_built):
    handle = scores()
    affinity = softmax(handle)
    assert isinstance(affinity, Affinity)
    close(affinity.build(), handle.build().softmax(1))


@pytest.mark.parametrize("top_k", [None, 5])
def test_gradients(top_k):
    torch.manual_seed(1)
    leaves = [
        torch.randn(s, requires_grad=True) for s in ((2, C, M), (2, C, P), (2, 1, M), (2, C, P), (2, 4, M))
    ]
    key, query, shrinkage, selection, value = leaves
    weight = torch.randn(2, 4, P)

    def gradients(read):
        handle = Similarity.of(key, query, shrinkage=shrinkage.square(), selection=selection.sigmoid())
        return torch.autograd.grad((read(value, Affinity.of(handle, top_k)) * weight).sum(), leaves)

    got = gradients(lambda value, affinity: value @ affinity)
    expected = gradients(lambda value, affinity: value @ affinity.build())
    for a, b in zip(got, expected):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "use",
    [
        lambda h: h * 2,
        lambda h: h + torch.ones(M, 1),
        lambda h: h.transpose(1, 2),
        lambda h: h[:, 3],
        lambda h: h[..., :4],
        lambda h: h.max(2)[1],
        lambda h: torch.cat([h, torch.zeros(B, 1, P)], 1),
        lambda h: torch.topk(h, 3, dim=1).values,
        lambda h: h.half(),
    ],
)
def test_any_other_use_builds_the_tensor_with_one_warning(use):
    for handle in (scores(), Affinity.of(scores(), 5)):
        module._warned.clear()
        with pytest.warns(RuntimeWarning, match="builds it"):
            got = use(handle)
        assert not isinstance(got, Handle)
        close(got, use(handle.build()))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            use(handle)


def test_what_is_written_into_a_handle_is_read_from_it():
    handle = scores()
    expected = handle.build()
    expected[:, 5:] = -torch.inf
    with pytest.warns(RuntimeWarning, match="__setitem__"):
        handle[:, 5:] = -torch.inf
    close(handle.softmax(1), expected.softmax(1))
    value = torch.randn(2, 4, M)
    affinity = Affinity.of(scores(), 5)
    with pytest.warns(RuntimeWarning, match="mul_"):
        affinity.mul_(2)
    close(value @ affinity, 2 * (value @ affinity.build()))


@pytest.mark.filterwarnings("ignore:.*builds it")
@pytest.mark.parametrize(
    "write",
    [
        lambda h: h[:, 3:9].mul_(2),
        lambda h: h[:, 3:9][:, 2:4].fill_(1),
        lambda h: h[:, :, 1:].__iadd__(1),
        lambda h: h[:, 3:9].__setitem__((0, 0), 7.0),
    ],
)
def test_a_slice_of_a_handle_is_a_view(write):
    handle = scores()
    before = handle[:, 2:8]
    expected = handle.build()
    write(expected), write(handle)
    close(handle.softmax(1), expected.softmax(1))
    close(before.softmax(1), expected[:, 2:8].softmax(1))


@pytest.mark.parametrize(
    "call",
    [
        lambda h, v: torch.bmm(input=v, mat2=h),
        lambda h, v: h.sum(axis=2),
        lambda h, v: torch.sum(input=h, dim=2),
        lambda h, v: h.expand(size=(3, -1, -1)),
        lambda h, v: torch.softmax(input=h, dim=1),
        lambda h, v: torch.cat([h, h], axis=1),
    ],
)
@pytest.mark.filterwarnings("ignore:.*builds it")
def test_arguments_by_names_that_pytorch_knows(call):
    value = torch.randn(B, 4, M)
    for handle in (scores(), Affinity.of(scores(), 5)):
        got = call(handle, value)
        close(got.build() if isinstance(got, Handle) else got, call(handle.build(), value))
