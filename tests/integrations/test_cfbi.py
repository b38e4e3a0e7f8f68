"""accelerate on CFBI's matching: the goldens of the original, a small checkout with its calls, and back again."""

from __future__ import annotations

import importlib
import sys

import pytest
import torch

from vosops.integrations import accelerate
from vosops.integrations.cfbi import CFBI_RECIPES

NAMES = ("local_matching", "global_matching", "global_matching_for_eval")


@pytest.fixture
def matching(checkout):
    yield importlib.import_module("networks.layers.matching")
    for name in [name for name in sys.modules if name.split(".")[0] == "networks"]:
        del sys.modules[name]


@pytest.fixture
def cfbi(golden):
    return golden("cfbi_matching.pt")["basic"]


def replacement(name):
    recipe = next(recipe for recipe in CFBI_RECIPES if recipe.name == name)
    return recipe.replace(lambda *_: pytest.fail("the original is not needed"))


@pytest.mark.parametrize(
    ("windows", "downsample", "atrous", "half"),
    [
        ([2, 4, 6], False, 1, False),
        ([2, 4, 6], False, 1, True),
        ([4], False, 1, False),
        ([4, 8], False, 2, False),
    ]
    + [([2, 4, 6, 8, 10, 12], True, 1, False)],
)
def test_golden_local_matching(cfbi, windows, downsample, atrous, half):
    expected = cfbi[f"local/dist={windows}/down={downsample}/atrous={atrous}/fp16={half}"]
    options = {"atrous_rate": atrous, "use_float16": half, "allow_downsample": downsample}
    got = replacement("local_matching")(
        cfbi["prev"], cfbi["query"], cfbi["labels"], cfbi["dis_bias"], windows, **options
    )
    # With fp16=True the original rounds its distances to half precision.
    torch.testing.assert_close(got, expected.float(), rtol=0, atol=5e-3 if half else 1e-5)


@pytest.mark.parametrize(("atrous", "half"), [(1, False), (2, False), (1, True)])
@pytest.mark.parametrize("frames", [1, 2])
def test_golden_global_matching(cfbi, frames, atrous, half):
    expected = cfbi[f"global{'_eval2' if frames == 2 else ''}/atrous={atrous}/fp16={half}"]
    options = {"dis_bias": cfbi["dis_bias"], "atrous_rate": atrous, "use_float16": half}
    if frames == 1:
        got = replacement("global_matching")(cfbi["ref"], cfbi["query"], cfbi["labels"], **options)
    else:
        labels = [cfbi["labels"], cfbi["labels"].flip(0)]  # the case mirrors those of its second frame
        references = [cfbi["ref"], cfbi["prev"]]
        got = replacement("global_matching_for_eval")(references, cfbi["query"], labels, **options)
    torch.testing.assert_close(got, expected.float(), rtol=0, atol=5e-3 if half else 1e-5)


def test_golden_frame_without_a_label(cfbi):
    got = replacement("global_matching")(
        cfbi["ref"],
        cfbi["query"],
        torch.zeros_like(cfbi["labels"]),
        dis_bias=cfbi["dis_bias"],
        use_float16=False,
    )
    torch.testing.assert_close(got, cfbi["global_nolabel"], rtol=0, atol=0)


def calls(module):
    """What a frame computes, with every option that CFBI's and CFBI+'s configurations set."""
    generator = torch.Generator().manual_seed(3)
    query, previous, first = torch.rand(3, 9, 12, 5, generator=generator)
    labels = torch.nn.functional.one_hot((previous[..., 0] * 3).long(), 3).float()
    bias = torch.tensor([-0.3, 0.1, 0.2]).view(3, 1, 1, 1)
    plain = {"dis_bias": bias, "use_float16": False}
    windows = {"multi_local_distance": [1, 3, 5], "allow_downsample": False}
    lists = [first, previous], query, [labels, labels.flip(1)]
    return [
        module.local_matching(previous, query, labels, **plain, **windows),
        module.local_matching(
            previous, query, labels, **plain, multi_local_distance=[2, 4], ori_size=(20, 17)
        ),
        module.local_matching(
            previous, query, labels, **plain, **windows, atrous_rate=2, allow_parallel=False
        ),
        module.global_matching(first, query, labels, 20, **plain),
        module.global_matching(first, query, labels, 20, **plain, atrous_rate=2, ori_size=(18, 23)),
        module.global_matching_for_eval(*lists, 4, **plain),
        module.global_matching_for_eval(*lists, 4, **plain, atrous_rate=2, atrous_obj_pixel_num=8),
    ]


def test_a_checkout_computes_the_same_and_gets_its_functions_back(matching):
    originals = [getattr(matching, name) for name in NAMES]
    expected = calls(matching)
    with accelerate(matching) as acceleration:
        assert acceleration.replaced == [f"networks.layers.matching.{name}" for name in NAMES]
        got = calls(matching)
    assert [getattr(matching, name) for name in NAMES] == originals
    for ours, theirs in zip(got, expected, strict=True):
        assert theirs.std() > 0.05, "distances, not ones"
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_a_fork_with_another_distance_is_refused(matching, monkeypatch):
    monkeypatch.setattr(matching, "FAR", 0.5)
    with pytest.raises(ValueError, match=r"networks\.layers\.matching\.\w+ does not compute the same"):
        accelerate(matching)


def test_gradients_reach_both_embeddings(matching):
    def gradients(module):
        torch.manual_seed(4)
        query, key, labels = (t.requires_grad_() for t in torch.rand(3, 6, 7, 4))
        labels = (labels.detach()[..., :2] > 0.5).float()
        out = (
            module.local_matching(
                key, query, labels, torch.zeros(2), [1, 2], use_float16=False, allow_downsample=False
            )
            .square()
            .sum()
            + module.global_matching(key, query, labels, 1, torch.zeros(2), use_float16=False).sum()
        )
        return torch.autograd.grad(out, (query, key))

    expected = gradients(matching)
    with accelerate(matching):
        got = gradients(matching)
    for ours, theirs in zip(got, expected, strict=True):
        assert theirs.abs().max() > 0.1
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
