"""The choice among implementations: in the order of the device class, which a result file vouches for."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import vosops
from vosops import backends

ROOT = Path(__file__).parents[1]
DEVICE_CLASSES = ("cpu", "cuda")


@pytest.fixture
def toy(monkeypatch):
    """An op whose CPU order differs from that of other devices; "cpp" takes float32 only."""

    def only_float32(call: backends.Call) -> list[str]:
        return [] if call.dtype == torch.float32 else [f"{call.dtype} is not float32"]

    implementations = {
        "cpp": backends.Implementation("cpp", {"toy": lambda x: x + 1}, only_float32),
        "triton": backends.Implementation("triton", {"toy": lambda x: x + 2}, lambda call: []),
        "reference": backends.Implementation("reference", {"toy": lambda x: x + 3}, lambda call: []),
    }
    orders = {"cpu": backends.Order(("triton", "cpp"), "benchmarks/results/toy.json")}
    op = backends.Op("toy", {"toy": resolve, "toy_prepare": resolve}, implementations, orders)
    monkeypatch.setattr(backends, "_ops", {"toy": op})


def call(device: str = "cpu", dtype: torch.dtype = torch.float32, **more) -> backends.Call:
    return backends.Call(torch.device(device), dtype, **more)


def resolve(x: torch.Tensor, **more) -> Resolved:
    return Resolved(backends.Call(x.device, x.dtype, **more))


class Resolved(NamedTuple):
    call: backends.Call


def test_each_device_class_has_its_order(toy):
    assert backends.choose("toy", call()).name == "triton"
    assert backends.choose("toy", call("meta")).name == "cpp"


def test_the_next_one_serves_what_the_first_cannot(toy):
    assert backends.choose("toy", call("meta", torch.half)).name == "triton"


def test_the_op_may_refuse_for_one_implementation(toy):
    refused = call(refusals=(("triton", "too long"),))
    assert backends.choose("toy", refused).name == "cpp"
    with backends.use_backend("triton"), pytest.raises(RuntimeError, match="triton: too long"):
        backends.choose("toy", refused)


def test_what_only_plain_pytorch_computes_it_computes_under_every_choice(toy):
    for forced in (None, "cpp", "triton"):
        with backends.use_backend(forced):
            assert backends.choose("toy", call("meta", plain="no kernel")).name == "reference"
            told = backends.explain("toy", torch.ones(1, device="meta"), plain="no kernel").splitlines()
            assert told[0].startswith("toy: reference")
            assert told[1].split(maxsplit=1) == ["cpp", "no kernel"]


def test_a_chosen_implementation_runs_its_kernels_by_name(toy):
    assert backends.choose("toy", call()).run("toy", torch.ones(1)).item() == 3


def test_explain_names_the_result_that_the_order_comes_from(toy):
    on_cpu = backends.explain("toy", torch.ones(1)).splitlines()
    assert on_cpu[0] == "toy: triton (order on cpu: benchmarks/results/toy.json)"
    assert [line.split()[0] for line in on_cpu[1:]] == ["triton", "cpp"]
    assert "(order on meta: not measured yet)" in backends.explain("toy", torch.ones(1, device="meta"))


def test_a_forced_implementation_that_cannot_serve_says_why(toy):
    with backends.use_backend("cpp"), pytest.raises(RuntimeError, match=r"torch\.float16 is not float32"):
        backends.choose("toy", call(dtype=torch.half))
    with backends.use_backend("reference"), pytest.raises(RuntimeError, match="It has no such backend"):
        backends.choose("toy", call())


def test_an_op_that_nothing_can_serve_is_told_apart_from_one_that_is_unknown(toy):
    nothing = {"refusals": tuple((name, "no") for name in backends.BACKENDS)}
    with pytest.raises(RuntimeError, match="toy cannot run on any backend. triton: no | cpp: no"):
        backends.choose("toy", call(**nothing))
    assert backends.explain("toy", torch.ones(1), **nothing).startswith("toy: nothing can serve this call")
    with pytest.raises(ValueError, match="op must be one of toy, toy_prepare, got 'tay'"):
        backends.explain("tay", torch.ones(1))


def test_functions_that_share_an_op_are_explained_by_their_own_name(toy):
    assert backends.explain("toy_prepare", torch.ones(1)).startswith("toy_prepare: triton")
    assert backends.list_ops() == ["toy"]


def test_an_unknown_backend_is_refused():
    message = "backend must be one of cpp, triton, reference or None, got 'cuda'"
    with pytest.raises(ValueError, match=message), backends.use_backend("cuda"):
        pass


@pytest.mark.parametrize("op", vosops.list_ops())
def test_every_op_says_for_each_device_class_what_its_order_rests_on(op):
    orders = backends.orders(op)
    assert set(orders) == set(DEVICE_CLASSES)
    for order in orders.values():
        assert set(order.names) == set(backends.BACKENDS)
        if order.measured is not None:
            assert (ROOT / order.measured).is_file(), f"{op} names {order.measured}, which is not there"


@pytest.mark.parametrize("op", vosops.list_ops())
def test_all_implementations_of_an_op_have_the_kernels_of_the_compiled_one(op):
    implementations = backends._ops[op].implementations
    compiled = implementations["cpp"].kernels
    assert compiled.keys() == implementations["triton"].kernels.keys()
    assert compiled.keys() <= implementations["reference"].kernels.keys()


@pytest.mark.parametrize("op", vosops.list_ops())
def test_a_gpu_order_is_not_called_measured_without_a_result_of_a_gpu(op):
    measured = backends.orders(op)["cuda"].measured
    assert measured is None or Path(measured).name.startswith("gpu_")
