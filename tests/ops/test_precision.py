"""`precision`: its names on each device, and PyTorch's setting, which None follows, in traced programs too."""

from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import vosops
from vosops import _checks

SETTINGS = ("highest", "high", "medium")
PIECES = {"highest": 33, "high": 32, "medium": 11, "ieee": 33, "tf32x3": 32, "tf32": 32}
"""bfloat16 pieces of a float32 that is compared, times 10, and of a value, where AMX multiplies."""

AMX = (
    torch.ops.vosops.cpu_capability().startswith("amx")
    if hasattr(torch.ops.vosops, "cpu_capability")
    else False
)
FRAME, MASK = torch.rand(1, 8, 6, 7), torch.ones(1, 1, 6, 7, dtype=torch.bool)
OPS = {
    "local_matching": partial(vosops.local_matching, FRAME, FRAME, MASK, radius=2),
    "global_matching": partial(vosops.global_matching, FRAME, FRAME.unsqueeze(2), MASK.unsqueeze(2)),
    "memory_read": partial(vosops.memory_read, FRAME, FRAME.unsqueeze(2), FRAME.unsqueeze(1).unsqueeze(3)),
    "memory_select": partial(vosops.memory_select, FRAME, FRAME.unsqueeze(2), 3),
}


@pytest.fixture(autouse=True)
def setting():
    """Restores PyTorch's setting."""
    before = torch.get_float32_matmul_precision()
    yield torch.set_float32_matmul_precision
    torch.set_float32_matmul_precision(before)


class Strings(TorchDispatchMode):
    """Collects the precision that reaches the ops of vosops: the only string among their arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "vosops":
            self.seen |= {arg for arg in args if isinstance(arg, str)}
        return func(*args, **(kwargs or {}))


def reaches(call) -> str:
    with Strings() as strings:
        call()
    (precision,) = strings.seen
    return precision


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("name", SETTINGS)
def test_none_is_the_setting_of_pytorch(op, name, setting):
    setting(name)
    assert reaches(OPS[op]) == name
    setting("highest")
    assert reaches(partial(OPS[op], precision=name)) == name


@pytest.mark.parametrize("name", _checks.PRECISIONS)
def test_every_name_serves_on_every_device(name):
    for call in OPS.values():
        call(precision=name)
    on_gpu = torch.empty(0, device="meta")
    expected = {"highest": "ieee", "high": "tf32", "medium": "tf32"}.get(name, name)
    assert _checks.resolve_precision(name, on_gpu) == expected


def test_settings_of_single_backends_do_not_raise(setting):
    """Since torch 2.9 they can be set one by one; torch.get_float32_matmul_precision() then refuses to answer."""
    cuda = torch.backends.cuda.matmul
    before = cuda.fp32_precision
    try:
        cuda.fp32_precision = "tf32"
        assert reaches(OPS["memory_read"]) == "highest"
    finally:
        cuda.fp32_precision = before


def test_another_name_is_refused():
    message = "precision must be None, 'highest', 'high', 'medium', 'ieee', 'tf32x3' or 'tf32', got 'half'"
    for call in OPS.values():
        with pytest.raises(ValueError, match=message):
            call(precision="half")


def test_explain_tells_it(setting):
    setting("high")
    query = FRAME, FRAME.unsqueeze(2), FRAME.unsqueeze(1).unsqueeze(3)
    assert "; precision of float32 products: high)" in vosops.explain(vosops.memory_read, *query)
    halves = (each.half() for each in query)
    assert "precision" not in vosops.explain(vosops.memory_read, *halves).splitlines()[0]


@pytest.mark.parametrize("op", OPS)
def test_a_compiled_function_follows_later_changes(op, setting):
    """It asks when it runs: PyTorch lets no traced function read the setting."""
    programs = []

    def backend(graph, _):
        programs.append(graph)
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(lambda: OPS[op](), fullgraph=True, backend=backend)
    for name in SETTINGS:
        setting(name)
        compiled()
        assert torch.ops.vosops.float32_precision() == SETTINGS.index(name)
    for program in programs:
        assert "default" in {arg for node in program.graph.nodes for arg in node.args if isinstance(arg, str)}


def test_an_exported_program_follows_it_too():
    class Module(torch.nn.Module):
        def forward(self, query, key, value):
            return vosops.memory_read(query, key, value)

    arguments = FRAME, FRAME.unsqueeze(2), FRAME.unsqueeze(1).unsqueeze(3)
    program = torch.export.export(Module(), arguments).module()
    assert reaches(lambda: program(*arguments)) == "default"


@pytest.mark.skipif(not AMX, reason="the loaded CPU library does not multiply by AMX")
def test_the_library_resolves_the_names_when_it_runs(setting):
    pieces = torch.ops.vosops.amx_pieces
    for name, expected in PIECES.items():
        assert pieces(name) == expected
    for name in SETTINGS:
        setting(name)
        assert pieces("default") == PIECES[name]
    with pytest.raises(RuntimeError, match="precision must be"):
        pieces("half")


@pytest.mark.skipif(not AMX, reason="the loaded CPU library does not multiply by AMX")
def test_a_compiled_function_computes_as_the_setting_says_when_it_runs(setting):
    """The gradient of the query, of a problem as large as the engine takes: errors tell bfloat16 from float32."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(shape, generator=generator) for shape in [(1, 64, 340), (1, 64, 300), (1, 1, 160, 300)]
    )

    def gradient(query, key, value):
        query = query.detach().requires_grad_()
        return torch.autograd.grad(vosops.memory_read(query, key, value).square().sum(), query)[0]

    compiled = torch.compile(lambda q: vosops.memory_read(q, key, value), fullgraph=True, backend="eager")

    def compiled_gradient():
        leaf = query.detach().requires_grad_()
        return torch.autograd.grad(compiled(leaf).square().sum(), leaf)[0]

    with vosops.use_backend("reference"):
        exact = gradient(query.double(), key.double(), value.double())
    errors = {}
    for name in (*SETTINGS, "highest again"):
        setting(name.split()[0])
        found = compiled_gradient()
        errors[name] = ((found - exact).square().mean() / exact.square().mean()).sqrt().item()
    assert errors["medium"] > 100 * errors["highest"], errors
    assert errors["highest again"] == errors["highest"] < 1e-5
