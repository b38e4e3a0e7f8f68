"""accelerate on AOT and DeAOT: the goldens of the original, and the package deaotpy with seeded weights."""

from __future__ import annotations

import inspect
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from vosops import compat
from vosops.integrations import accelerate, recipes
from vosops.integrations.aot import AOT_RECIPES, AttentionMap, LocalMap

SAMPLER = "spatial_correlation_sampler"


def replacement(owner):
    recipe = next(recipe for recipe in AOT_RECIPES if recipe.owner == owner)
    return recipe.replace(lambda *_: pytest.fail("the original is not needed"))


def layer(case, **attributes):
    """What the layers of a golden case have: options, and parameters of linear maps or grouped 1x1 convolutions."""
    self = SimpleNamespace(training=False, dropout=nn.Dropout(0), **attributes)
    for name in {key.rsplit(".", 1)[0] for key in case["params"] if "." in key}:
        weight, bias = (case["params"][f"{name}.{kind}"] for kind in ("weight", "bias"))
        part = nn.Linear(*reversed(weight.shape)) if weight.dim() == 2 else SimpleNamespace()
        part.weight, part.bias = nn.Parameter(weight), nn.Parameter(bias)
        setattr(self, name, part)
    return self


def test_golden_long_term_attention(golden):
    case = golden("aot_attention.pt")["mha_top20"]
    self = layer(case, num_head=8, T=8**0.5, use_linear=True, top_k=20)
    out, weights = replacement("MultiheadAttention")(self, *case["inputs"])
    torch.testing.assert_close(out, case["out"], rtol=0, atol=1e-5)
    assert isinstance(weights, AttentionMap) and not weights.is_built
    assert weights.shape == (2, 8, 88, 264)


def test_golden_short_term_attention(golden):
    case = golden("aot_attention.pt")["local_v2_d2"]
    self = layer(
        case,
        num_head=4,
        T=8**0.5,
        use_linear=False,
        max_dis=2,
        window_size=5,
        dilation=1,
        relative_emb_v=case["params"]["relative_emb_v"],
    )
    out, weights = replacement("MultiheadLocalAttentionV2")(self, *case["inputs"])
    torch.testing.assert_close(out, case["out"], rtol=0, atol=1e-5)
    assert isinstance(weights, LocalMap) and not weights.is_built
    torch.testing.assert_close(weights.build(), case["attn"], rtol=0, atol=1e-6)


# ---- The package. Its short-term layers import the sampler when they are made: the drop-in takes its place.


@pytest.fixture(scope="module")
def attention():
    """The package's module of attention layers."""
    pytest.importorskip("aot", reason="the package deaotpy is not installed")
    compat.install(SAMPLER)
    from aot.networks.layers import attention

    yield attention
    sys.modules.pop(SAMPLER, None)


def filled(module: nn.Module) -> nn.Module:
    """The module with random numbers in every parameter, those included that start as zeros."""
    for parameter in module.parameters():
        parameter.data = torch.randn_like(parameter) * 0.3
    return module.eval()


HEIGHT, WIDTH, CHANNELS, HEADS = 6, 7, 16, 4
LENGTH = HEIGHT * WIDTH
LONG = {
    "all": {},
    "top-k": {"top_k": 9},
    "a distance": {"use_dis": True},
    "a longer memory": {"max_mem_len_ratio": 2},
    "chunks": {"qk_chunks": 3},
}


@pytest.mark.parametrize("options", LONG.values(), ids=LONG)
@pytest.mark.parametrize("kind", ["MultiheadAttention", "GatedPropagation"])
def test_long_term_layers(attention, kind, options):
    gated = kind == "GatedPropagation"
    sizes = (CHANNELS, CHANNELS, HEADS) if gated else (CHANNELS, HEADS)
    module = filled(getattr(attention, kind)(*sizes, use_linear=False, **options))
    width = module.hidden_dim * HEADS
    query, key, value = (
        torch.randn(length, 2, channels)
        for length, channels in ((LENGTH, CHANNELS), (3 * LENGTH, CHANNELS), (3 * LENGTH, width))
    )
    more = (torch.randn(LENGTH, 2, width), (HEIGHT, WIDTH)) if gated else ()
    expected, weights = module(query, key, value, *more)
    without = module(query, key, value * 0, *more)[0]
    with accelerate(attention):
        got, lazy = module(query, key, value, *more)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(lazy.build(), weights, rtol=0, atol=1e-5)
    assert (expected - without).abs().max() > 0.01, "the memory counts"


@pytest.mark.parametrize("options", [{}, {"use_dis": True}, {"enable_corr": False}], ids=str)
@pytest.mark.parametrize("kind", ["MultiheadLocalAttentionV2", "LocalGatedPropagation"])
def test_short_term_layers(attention, kind, options):
    gated = kind == "LocalGatedPropagation"
    sizes = (CHANNELS, CHANNELS, HEADS) if gated else (CHANNELS, HEADS)
    module = filled(getattr(attention, kind)(*sizes, max_dis=2, **options))
    maps = torch.randn(4 if gated else 3, 2, CHANNELS, HEIGHT, WIDTH)
    more = ((HEIGHT, WIDTH),) if gated else ()
    expected, weights = module(*maps, *more)
    with accelerate(attention):
        got, ours = module(*maps, *more)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert not ours.is_built and ours.shape == weights.shape
    torch.testing.assert_close(ours.build(), weights, rtol=0, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"use_linear": False}], ids=str)
@pytest.mark.parametrize("version", ["V1", "V3"])
def test_short_term_layers_that_do_not_run(attention, version, options):
    """Both raise in today's PyTorch; accelerated they compute what `V2` does with their parameters."""
    kind = getattr(attention, f"MultiheadLocalAttention{version}")
    more = {"enable_corr": False} if version == "V1" else {}
    module = filled(kind(CHANNELS, HEADS, max_dis=2, **options, **more))
    kin = attention.MultiheadLocalAttentionV2(CHANNELS, HEADS, max_dis=2, enable_corr=False, **options).eval()
    kin.load_state_dict(module.state_dict())
    maps = torch.randn(3, 2, CHANNELS, HEIGHT, WIDTH)
    expected, weights = kin(*maps)
    with pytest.raises(RuntimeError):
        module(*maps)
    with accelerate(attention):
        got, ours = module(*maps)
        module.dilation = 2
        with pytest.raises(RuntimeError):
            module(*maps)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    weights = weights if version == "V1" else weights.mT
    assert ours.shape == weights.shape
    torch.testing.assert_close(ours.build(), weights, rtol=0, atol=1e-5)


def test_a_fork_whose_first_layer_runs_is_its_own_judge(attention, monkeypatch):
    """Of a fork that repaired the mask the replacement is compared with the fork, which may compute something else."""
    source = inspect.getsource(attention.MultiheadLocalAttentionV1).replace(".bool()", "")
    for change, agrees in (("", True), ("qk = qk * 1.1\n        ", False)):
        name = "MultiheadLocalAttentionV1"
        changed = source.replace("local_attn = torch.softmax", f"{change}local_attn = torch.softmax")
        monkeypatch.setattr(attention, name, None)
        exec(compile(changed, attention.__file__, "exec"), vars(attention))
        module = filled(getattr(attention, name)(CHANNELS, HEADS, max_dis=2, enable_corr=False))
        maps = torch.randn(3, 2, CHANNELS, HEIGHT, WIDTH)
        expected, _ = module(*maps)
        if agrees:
            with accelerate(attention):
                torch.testing.assert_close(module(*maps)[0], expected, rtol=1e-4, atol=1e-4)
        else:
            with pytest.raises(ValueError, match=f"{name}.forward does not compute the same"):
                accelerate(attention)


def test_dropout_runs_as_before(attention):
    module = filled(attention.MultiheadAttention(CHANNELS, HEADS, dropout=0.5)).train()
    query = torch.randn(LENGTH, 1, CHANNELS)
    torch.manual_seed(1)
    expected = module(query, query, query)[0]
    with accelerate(attention):
        torch.manual_seed(1)
        assert torch.equal(module(query, query, query)[0], expected)


@pytest.mark.parametrize("kind", ["MultiheadAttention", "GatedPropagation"])
def test_few_scores_are_left_to_the_original(attention, kind, monkeypatch):
    """Below 100,000 scores of a head, on a CPU, `memory_read` does not pay."""
    monkeypatch.setattr(recipes, "_few_scores", [recipes._FEW_SCORES])
    gated = kind == "GatedPropagation"
    module = filled(getattr(attention, kind)(*((8, 8, 1) if gated else (8, 1)), use_linear=False))
    width = module.hidden_dim

    def run(length, memory):
        query, key = torch.randn(length, 1, 8), torch.randn(memory, 1, 8)
        more = (torch.randn(length, 1, width), (length, 1)) if gated else ()
        return module(query, key, torch.randn(memory, 1, width), *more)[1]

    with accelerate(attention):
        assert not isinstance(run(99, 1000), AttentionMap)
        assert isinstance(run(100, 1000), AttentionMap)


SCALE, TOLERANCE = 3, 2e-5
"""Of the seeded weights, so that the masks that they remember change the logits, and of those logits."""


@pytest.mark.parametrize("name", ["aott", pytest.param("r50_deaotl", marks=pytest.mark.exhaustive)])
def test_networks_segment_the_same(attention, name):
    """A reference frame and a few more, by the package's own engine."""
    from aot.configs.default import DefaultEngineConfig
    from aot.networks.engines import build_engine
    from aot.networks.models import build_vos_model

    config = DefaultEngineConfig(model=name)
    torch.manual_seed(0)
    network = build_vos_model(config.MODEL_VOS, config).eval()
    for parameter_name, parameter in network.named_parameters():
        if "relative_emb" in parameter_name:
            parameter.data = torch.randn_like(parameter) * 0.1
        elif parameter.dim() > 1 and any(part in parameter_name for part in ("LSTT", "id", "decoder")):
            parameter.data *= SCALE

    @torch.inference_mode()
    def run(forget=False):
        engine = build_engine(
            config.MODEL_ENGINE, phase="eval", aot_model=network, gpu_id="cpu", long_term_mem_gap=2
        )
        generator = torch.Generator().manual_seed(3)
        images = torch.rand(4, 1, 3, 97, 113, generator=generator)
        mask = torch.zeros(1, 1, 97, 113)
        mask[..., 20:60, 10:50] = 1
        mask[..., 50:90, 60:110] = 2
        engine.restart_engine()
        engine.add_reference_frame(images[0], mask * 0 if forget else mask, obj_nums=[2], frame_step=0)
        logits = []
        for image in images[1:]:
            engine.match_propogate_one_frame(image)
            logits.append(engine.decode_current_logits((97, 113)))
            engine.update_memory(logits[-1].argmax(1, keepdim=True).float())
        return torch.stack(logits)

    expected, forgotten = run(), run(forget=True)
    with accelerate(network) as acceleration:
        got = run()
    assert len(acceleration.replaced) == 6
    torch.testing.assert_close(got, expected, rtol=0, atol=TOLERANCE)
    assert (expected - forgotten).abs().max() > 100 * TOLERANCE
