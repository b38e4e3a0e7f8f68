"""Running the code of other projects on vosops' ops: SAM 2, XMem, Cutie, STCN, AOT, CFBI and their forks."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any, NamedTuple

import torch

from vosops.integrations.aot import AOT_RECIPES
from vosops.integrations.cfbi import CFBI_RECIPES
from vosops.integrations.memory_attention import ATTENTION_RECIPES, KEY_RECIPES
from vosops.integrations.recipes import RECIPES, Recipe, find_recipe, original_of, replacement_for
from vosops.integrations.rotary import KeyCache
from vosops.integrations.sessions import session_recipes
from vosops.integrations.together import TOGETHER_RECIPES
from vosops.memory import parse_bytes

__all__ = ["Acceleration", "accelerate"]

_INSTALLED = ("site-packages", "dist-packages")
_FOREIGN = ("torch", "vosops", "builtins")  # where no checkout's functions are


class _Replaced(NamedTuple):
    original: Callable[..., Any]
    replacement: Callable[..., Any]
    owner: type | None  # the class, for a method


class Acceleration:
    """What `accelerate` replaced; a context manager that puts it back at its end.

    replaced: the full names of the functions that were replaced.
    """

    def __init__(self, replaced: list[_Replaced]) -> None:
        self._replaced = replaced
        self.replaced = [f"{r.original.__module__}.{r.original.__qualname__}" for r in replaced]

    def undo(self) -> None:
        """Put the original functions back, wherever the replacements are now; a second call does nothing."""
        if self._replaced:
            KeyCache.clear_all()
        while self._replaced:
            original, replacement, owner = self._replaced.pop()
            _swap(replacement, original, owner)

    def __enter__(self) -> Acceleration:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.undo()

    def __repr__(self) -> str:
        return f"Acceleration(replaced={self.replaced})"


def accelerate(
    target: Any,
    *,
    memory_budget: int | str | None = None,
    cache_keys: bool | None = None,
    objects_together: bool | None = None,
) -> Acceleration:
    """Make SAM 2 and related models, XMem, Cutie, STCN, Mask-Propagation, AOT, DeAOT or CFBI use vosops' ops.

    SAM 2 (`sam2`, a clone or a fork), EdgeTAM, EfficientTAM and transformers' Sam2VideoModel: the attention to the
    memory reads the 64 channels of the memory itself, and projects what it read; see `vosops.integrations.rotary`.

    AOT and DeAOT: the layers of long-term attention read by `vosops.memory_read`, those of short-term attention by
    `vosops.local_attention`; the long-term weights come back as a tensor that is built where something looks at it.
    CFBI and CFBI+: local and global matching by `vosops.local_matching` and `vosops.global_matching`.

    XMem, Cutie, STCN, Mask-Propagation:
    The functions that compute similarity, softmax and readout are replaced in every loaded module that holds
    them, and so for memory managers that are made later too. Their replacements return a description of the
    affinity in its place. Slices, boolean masks, `torch.cat`, `expand`, `sum`, `@`, `bmm` and `einsum` of it run on
    vosops; any other use builds the affinity, with one warning. No method of the managers is copied: forks keep
    their ways.

    Args:
        target: a network, an inference core, a memory manager or bank, a class, or a module or package (or its name).
            Import the checkout's modules first: what is not loaded cannot be replaced. Of an installed package all its
            loaded modules count, of a checkout all that are loaded from its folder.
        memory_budget: of SAM 2 and transformers' Sam2VideoModel: the bytes, or a text such as "2GB", that the outputs
            of past frames and their keys may take in a session. What no later frame reads leaves when they are
            exceeded, the oldest first, and frames of a folder are read when they are needed; see
            `vosops.integrations.sessions`. None: sessions grow as they do without vosops.
        cache_keys: of SAM 2 and transformers' Sam2VideoModel: keep the projected and rotated keys of each frame that is
            still read, of every layer: 16.8 MB in float32 for an object's frame of 64 x 64 positions. None: no.
        objects_together: of SAM 2's video predictor: read the memories of all objects of a frame in one call a layer,
            whatever their lengths, in place of one object after the other; takes the memory of all objects' attention
            at once. Not with cache_keys. None: no.

    Returns:
        An :class:`Acceleration`: ``with accelerate(core): ...`` ends with the originals in place, and so does
        its ``undo()``.

    Raises:
        ValueError: nothing to replace was found; a function of a known name computes something else than its
            replacement on a small random input; or memory_budget, cache_keys or objects_together is given for a
            system without them (then nothing at all is replaced).
        vosops.memory.MemoryBudgetError: later, from the session: the budget does not hold what the next frame reads.

    Gradients reach keys, shrinkage, selection and values, as before; usage is not differentiable. With top_k
    above the size of the memory all of it is used, where the originals raise.

        >>> import torch
        >>> from vosops.integrations import accelerate
        >>> core = InferenceCore(network, config)  # doctest: +SKIP
        >>> with accelerate(core):  # doctest: +SKIP
        ...     prob = core.step(image, mask)
    """
    sessions = session_recipes(parse_bytes(memory_budget)) if memory_budget is not None else ()
    others = (*ATTENTION_RECIPES, *AOT_RECIPES, *CFBI_RECIPES)
    if cache_keys and objects_together:
        raise ValueError("cache_keys must be None with objects_together, got True")
    options = (*(KEY_RECIPES if cache_keys else ()), *(TOGETHER_RECIPES if objects_together else ()))
    wanted = (*RECIPES, *others, *options, *sessions)
    found: dict[int, tuple[Callable[..., Any], Recipe, type | None]] = {}
    known = False
    modules = _modules(target)
    for function, owner in _functions(modules):
        known = known or original_of(function) is not None
        recipe = None if original_of(function) is not None else find_recipe(function, wanted)
        if recipe is not None:
            found.setdefault(id(function), (function, recipe, owner))
    if not found and not known:
        names = ", ".join(sorted(module.__name__ for module in modules)[:5]) or "no module"
        raise ValueError(
            "target must contain the memory read of SAM 2, XMem, Cutie, STCN, Mask-Propagation, AOT or CFBI, "
            f"got {target!r:.80}: nothing to replace in {names}; import the checkout's modules first"
        )
    recipes = [recipe for _, recipe, _ in found.values()]
    for option, own, value in (
        ("memory_budget", sessions, memory_budget),
        ("cache_keys", KEY_RECIPES, cache_keys),
        ("objects_together", TOGETHER_RECIPES, objects_together),
    ):
        if value and not known and not any(recipe in own for recipe in recipes):
            raise ValueError(
                f"{option} must be None except for SAM 2 and related models, got {value!r} for {target!r:.80}"
            )
    replaced = [
        _Replaced(function, replacement_for(recipe, function), owner)
        for function, recipe, owner in found.values()
    ]
    for original, replacement, owner in replaced:
        _swap(original, replacement, owner)
    return Acceleration(replaced)


def _modules(target: Any) -> list[ModuleType]:
    """Return the loaded modules of the checkouts or packages that target belongs to."""
    starts = {name for name in _module_names(target) if name.split(".")[0] not in _FOREIGN}
    found: dict[str, ModuleType] = {}
    for start in starts:
        module = sys.modules.get(start)
        if module is None:
            continue
        found[start] = module
        package, root = start.split(".")[0], _root(module)
        installed = root is None or any(part in _INSTALLED for part in root.parts)
        inside: dict[str, bool] = {}  # whether a folder is the checkout's: they are fewer than modules
        for name, other in list(sys.modules.items()):
            if name.split(".")[0] == package:
                found[name] = other
            elif root is not None and not installed:
                file = getattr(other, "__file__", None)
                if not file or name.split(".")[0] in _FOREIGN:
                    continue
                folder = os.path.dirname(file)
                if folder not in inside:
                    inside[folder] = _is_inside(Path(folder).resolve(), root)
                if inside[folder]:
                    found[name] = other
    return list(found.values())


def _is_inside(folder: Path, root: Path) -> bool:
    """Return whether a folder is a checkout's, and not of the packages installed in it."""
    if not folder.is_relative_to(root):
        return False
    return not any(part in _INSTALLED for part in folder.relative_to(root).parts)


def _module_names(target: Any) -> Iterator[str]:
    """Yield the modules in which target, and what it holds, are defined."""
    if isinstance(target, str):
        yield importlib.import_module(target).__name__
    elif isinstance(target, ModuleType):
        yield target.__name__
    elif isinstance(target, type):
        yield target.__module__
    else:
        yield type(target).__module__
        if isinstance(target, torch.nn.Module):
            yield from {type(part).__module__ for part in target.modules()}
        else:
            yield from {type(part).__module__ for part in getattr(target, "__dict__", {}).values()}


def _root(module: ModuleType) -> Path | None:
    """Return the folder from which the module's top-level package is imported."""
    file = getattr(module, "__file__", None)
    if not file:
        return None
    depth = module.__name__.count(".") + hasattr(module, "__path__")
    return Path(file).resolve().parents[depth]


def _functions(modules: list[ModuleType]) -> Iterator[tuple[Any, type | None]]:
    """Functions of the modules, and of the classes that they define, with their class."""
    for module in modules:
        for value in list(vars(module).values()):
            yield value, None
            if isinstance(value, type) and value.__module__ == module.__name__:
                yield from ((member, value) for member in list(vars(value).values()))


def _swap(old: Callable[..., Any], new: Callable[..., Any], owner: type | None) -> None:
    """Put one function in the place of another, wherever it is."""
    if owner is not None:
        for name, value in list(vars(owner).items()):
            if value is old:
                setattr(owner, name, new)
        return
    for module in list(sys.modules.values()):
        names = getattr(module, "__dict__", None)
        if isinstance(names, dict):
            for name, value in list(names.items()):
                if value is old:
                    names[name] = new
