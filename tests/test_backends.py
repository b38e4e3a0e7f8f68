"""The choice among implementations: in the order of the device class, which a result file vouches for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import vosops
from vosops import backends

ROOT = Path(__file__).parents[1]
DEVICE_CLASSES = ("cpu", "cuda")


@pytest.fixture
def toy(monkeypatch):
    """An op whose CPU order differs from that of other devices; "cpp" takes float32 only."""

    def only_float32(x: torch.Tensor) -> list[str]:
        return [] if x.dtype == torch.float32 else [f"{x.dtype} is not float32"]

    implementations = (
        backends.Implementation("cpp", lambda x: "cpp", only_float32),
        backends.Implementation("triton", lambda x: "triton", lambda x: []),
    )
    order = backends.Order(("triton", "cpp"), "benchmarks/results/toy.json")
    monkeypatch.setattr(
        backends, "_ops", {"toy": backends.Op("toy", lambda x: (x,), implementations, {"cpu": order})}
    )


def test_each_device_class_has_its_order(toy):
    assert backends.choose("toy", (torch.ones(1),)).name == "triton"
    assert backends.choose("toy", (torch.ones(1, device="meta"),)).name == "cpp"


def test_the_next_one_serves_what_the_first_cannot(toy):
    assert backends.choose("toy", (torch.ones(1, device="meta", dtype=torch.half),)).name == "triton"


def test_explain_names_the_result_that_the_order_comes_from(toy):
    on_cpu = backends.explain("toy", torch.ones(1)).splitlines()
    assert on_cpu[0] == "toy: triton (order on cpu: benchmarks/results/toy.json)"
    assert [line.split()[0] for line in on_cpu[1:]] == ["triton", "cpp"]
    assert "(order on meta: not measured yet)" in backends.explain("toy", torch.ones(1, device="meta"))


def test_a_forced_implementation_that_cannot_serve_says_why(toy):
    with backends.use_backend("cpp"), pytest.raises(RuntimeError, match=r"torch\.float16 is not float32"):
        backends.choose("toy", (torch.ones(1, dtype=torch.half),))


@pytest.mark.parametrize("op", vosops.list_ops())
def test_every_op_says_for_each_device_class_what_its_order_rests_on(op):
    orders = backends.orders(op)
    assert set(orders) == set(DEVICE_CLASSES)
    for order in orders.values():
        assert set(order.names) == set(backends.BACKENDS)
        if order.measured is not None:
            assert (ROOT / order.measured).is_file(), f"{op} names {order.measured}, which is not there"


@pytest.mark.parametrize("op", vosops.list_ops())
def test_a_gpu_order_is_not_called_measured_without_a_result_of_a_gpu(op):
    measured = backends.orders(op)["cuda"].measured
    assert measured is None or Path(measured).name.startswith("gpu_")
