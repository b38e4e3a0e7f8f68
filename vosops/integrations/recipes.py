"""Which functions of a checkout read a memory, what takes their place, and the proof that it computes the same."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from types import FunctionType, SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vosops.integrations.affinity import Affinity, Handle, Similarity
from vosops.ops.memory_read import memory_read

_PROBE_TOP_K = 3
_PROBE_TOLERANCE = 1e-4
_FEW_SCORES = 100_000  # of one head: on a CPU, building fewer takes less time than the call of an op does
_few_scores = [_FEW_SCORES]

Function = Callable[..., Any]
Probe = tuple[tuple[Any, ...], dict[str, Any]]
"""Arguments of a function, by position and by name."""


class Recipe(NamedTuple):
    """A function known by its name and first parameters, and a method by its class where others have the same.

    replace(original) makes what takes its place; probes(original) yields the arguments on which both must agree.
    judge(original): with what the replacement is compared, where the original itself does not run.
    """

    name: str
    parameters: tuple[str, ...]
    replace: Callable[[Function], Function]
    probes: Callable[[Function], Iterator[Probe]]
    owner: str | None = None
    judge: Callable[[Function], Function] | None = None


def find_recipe(function: Any, recipes: Sequence[Recipe]) -> Recipe | None:
    """Return the recipe for a function of this name and these first parameters."""
    if type(function) is not FunctionType:
        return None
    for recipe in recipes:
        owned = recipe.owner is None or function.__qualname__ == f"{recipe.owner}.{recipe.name}"
        if function.__name__ == recipe.name and owned:
            given = tuple(inspect.signature(function).parameters)
            exact = recipe.name == "forward"  # a name that tells nothing
            if given == recipe.parameters or (
                not exact and given[: len(recipe.parameters)] == recipe.parameters
            ):
                return recipe
    return None


def are_few(scores: int, like: Tensor) -> bool:
    """Return whether an original that builds this number of scores is left in place: a small one, on the CPU."""
    return like.device.type == "cpu" and scores < _few_scores[-1]


@contextlib.contextmanager
def replace_small_ones() -> Iterator[None]:
    """Let no read be too small for a while, as those that replacements are compared on."""
    _few_scores.append(0)
    try:
        yield
    finally:
        _few_scores.pop()


def original_of(function: Any) -> Any:
    """Return what a replacement replaced; None for any other object."""
    # Not isinstance: some modules hold objects that warn or load things when they are asked for their class.
    return getattr(function, "_vosops_original", None) if type(function) is FunctionType else None


def replacement_for(recipe: Recipe, original: Function) -> Function:
    """Return the replacement of a function.

    Raises ValueError if the two disagree on a small random input: a fork may compute something else under the
    same name.
    """
    replacement = functools.wraps(original)(recipe.replace(original))
    replacement._vosops_original = original  # type: ignore[attr-defined]
    title = f"{original.__module__}.{original.__qualname__}"
    judge = original if recipe.judge is None else recipe.judge(original)
    with torch.no_grad(), torch.autocast("cpu", enabled=False), replace_small_ones():
        for args, kwargs in recipe.probes(original):
            plain = [a.build() if isinstance(a, Handle) else a for a in args]
            try:
                expected = judge(*plain, **kwargs)
            except Exception as error:
                raise ValueError(
                    f"{title} cannot be checked on a small input ({error}): not replaced"
                ) from error
            got = replacement(*args, **kwargs)
            for a, b in zip(_tensors(expected), _tensors(got), strict=True):
                if a.shape != b.shape or not torch.allclose(a, b, rtol=0, atol=_PROBE_TOLERANCE):
                    raise ValueError(f"{title} does not compute the same as its replacement: not replaced")
    return replacement


def _tensors(result: Any) -> list[Tensor]:
    """Return the tensors of a result, handles built."""
    results = result if isinstance(result, tuple) else (result,)
    return [r.build() if isinstance(r, Handle) else r for r in results if r is not None]


# ---- XMem, Cutie: model/memory_util.py, cutie/model/utils/memory_utils.py.


def _similarity(original: Function) -> Function:
    def get_similarity(
        mk: Tensor, ms: Tensor | None, qk: Tensor, qe: Tensor | None, *args: Any, **kwargs: Any
    ) -> Any:
        given = dict(kwargs)
        add_batch_dim = args[0] if args else given.pop("add_batch_dim", False)
        if len(args) > 1 or given:
            return original(mk, ms, qk, qe, *args, **kwargs)
        if add_batch_dim:
            mk, ms, qk, qe = (None if t is None else t.unsqueeze(0) for t in (mk, ms, qk, qe))  # type: ignore[assignment]
        return Similarity.of(mk, qk, shrinkage=ms, selection=qe)

    return get_similarity


def _similarity_probes(_: Function) -> Iterator[Probe]:
    mk, ms, qk, qe = random_tensors((1, 4, 7), (1, 1, 7), (1, 4, 5), (1, 4, 5))
    yield (mk, ms, qk, qe), {}
    yield (mk, ms, qk, None), {}


def _softmax(original: Function) -> Function:
    def do_softmax(
        similarity: Tensor,
        top_k: int | None = None,
        inplace: bool = False,
        return_usage: bool = False,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        if isinstance(similarity, Handle) and similarity.is_built:  # something may have been written into it
            similarity = similarity.dense("do_softmax")
        if not isinstance(similarity, Similarity) or args or kwargs:
            return original(similarity, top_k, inplace, return_usage, *args, **kwargs)
        affinity = Affinity.of(similarity, top_k)
        return (affinity, affinity.sum(dim=2)) if return_usage else affinity

    return do_softmax


def _softmax_probes(_: Function) -> Iterator[Probe]:
    mk, ms, qk, qe = random_tensors((1, 4, 7), (1, 1, 7), (1, 4, 5), (1, 4, 5))
    for top_k in (None, _PROBE_TOP_K):
        yield (Similarity.of(mk, qk, shrinkage=ms, selection=qe),), {"top_k": top_k, "return_usage": True}


# ---- STCN: inference_memory_bank.py, model/network.py.


def _global_matching(original: Function) -> Function:
    def _global_matching(self: Any, mk: Tensor, qk: Tensor) -> Affinity:
        return Affinity.of(Similarity.of(mk, qk), self.top_k)

    return _global_matching


def _global_matching_probes(_: Function) -> Iterator[Probe]:
    mk, qk = random_tensors((1, 4, 7), (1, 4, 5))
    yield (SimpleNamespace(top_k=_PROBE_TOP_K), mk, qk), {}


def _l2_affinity(original: Function) -> Function:
    def get_affinity(self: Any, mk: Tensor, qk: Tensor) -> Affinity:
        return Affinity.of(Similarity.of(mk, qk))

    return get_affinity


def _l2_affinity_probes(_: Function) -> Iterator[Probe]:
    mk, qk = random_tensors((2, 4, 3, 1, 5), (2, 4, 1, 5))
    yield (SimpleNamespace(), mk, qk), {}


# ---- Mask-Propagation: model/eval_network.py, model/network.py, model/corr_network.py.


def _dot_read(original: Function) -> Function:
    def forward(self: Any, mk: Tensor, mv: Tensor, qk: Tensor) -> Any:
        if self.km is not None:  # needs the whole affinity
            return original(self, mk, mv, qk)
        return memory_read(qk, mk, mv, top_k=self.top_k)

    return forward


def _dot_read_probes(_: Function) -> Iterator[Probe]:
    mk, mv, qk = random_tensors((1, 4, 2, 1, 5), (1, 3, 2, 1, 5), (1, 4, 1, 5))
    for top_k in (None, _PROBE_TOP_K):
        yield (SimpleNamespace(top_k=top_k, km=None), mk, mv, qk), {}


def _dot_read_and_query(original: Function) -> Function:
    def forward(self: Any, mk: Tensor, mv: Tensor, qk: Tensor, qv: Tensor) -> Tensor:
        return torch.cat([memory_read(qk, mk, mv), qv], 1)

    return forward


def _dot_read_and_query_probes(_: Function) -> Iterator[Probe]:
    mk, mv, qk, qv = random_tensors((2, 4, 2, 1, 5), (2, 3, 2, 1, 5), (2, 4, 1, 5), (2, 3, 1, 5))
    yield (SimpleNamespace(), mk, mv, qk, qv), {}


def _dot_affinity(original: Function) -> Function:
    def forward(self: Any, Mk: Tensor, Qk: Tensor) -> Affinity:
        return Affinity.of(Similarity.of(Mk, Qk, similarity="dot"))

    return forward


def _dot_affinity_probes(_: Function) -> Iterator[Probe]:
    mk, qk = random_tensors((2, 4, 1, 5), (2, 4, 1, 5))
    yield (SimpleNamespace(), mk, qk), {}


RECIPES = (
    Recipe("get_similarity", ("mk", "ms", "qk", "qe"), _similarity, _similarity_probes),
    Recipe("do_softmax", ("similarity", "top_k", "inplace", "return_usage"), _softmax, _softmax_probes),
    Recipe("_global_matching", ("self", "mk", "qk"), _global_matching, _global_matching_probes),
    Recipe("get_affinity", ("self", "mk", "qk"), _l2_affinity, _l2_affinity_probes),
    Recipe("forward", ("self", "mk", "mv", "qk"), _dot_read, _dot_read_probes),
    Recipe("forward", ("self", "mk", "mv", "qk", "qv"), _dot_read_and_query, _dot_read_and_query_probes),
    Recipe("forward", ("self", "Mk", "Qk"), _dot_affinity, _dot_affinity_probes),
)


def random_tensors(*shapes: tuple[int, ...]) -> list[Tensor]:
    """Positive numbers, always the same; the global generator stays as it is."""
    generator = torch.Generator("cpu").manual_seed(0)
    return [torch.rand(shape, generator=generator, device="cpu") for shape in shapes]
