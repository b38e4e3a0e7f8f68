"""`vosops check` finds implementations that are wrong, crash or hang, and they are not chosen again."""

import json
import os
import re
import subprocess
import warnings
from dataclasses import replace

import pytest
import torch

import vosops
from tests.cli import commands
from vosops import _library, _verdicts, backends
from vosops.benchmarking import gpu_cases
from vosops.benchmarking.memory_read import MemoryInputs
from vosops.checking import Candidate, check_device, problems, runner, store, tuning
from vosops.checking.judge import judge
from vosops.checking.problems import PROBLEMS, candidates, quick_problems

CPU = torch.device("cpu")
needs_library = pytest.mark.skipif(
    _library.CPU_CAPABILITY is None or os.environ.get("VOSOPS_AMX_TWIN") == "1",
    reason="needs a CPU library that this processor runs",
)


def of_op(op, mode="ieee", backward=False):
    found = [p for p in quick_problems() if (p.op, p.mode, p.backward) == (op, mode, backward)]
    assert found
    return found[:1]


def loaded():
    """The library of this process."""
    return [candidate for candidate in candidates(CPU) if candidate.stored and candidate.backend == "cpp"]


@pytest.fixture
def run(monkeypatch, capsys):
    """The command: (exit code, what it printed)."""
    return lambda *arguments: commands.run_command(monkeypatch, capsys, "check", *arguments)


def call(op):
    frame, mask = torch.rand(1, 8, 6, 6), torch.ones(1, 1, 6, 6, dtype=torch.bool)
    options = {"radius": 2} if op == "local_matching" else {}
    return getattr(vosops, op)(frame, frame, mask, **options)


@needs_library
@pytest.mark.slow
def test_planted_faults_are_found_and_not_chosen_again(cache):
    planted = {
        "local_matching": "wrong_in_one_element",
        "global_matching": "aborting",
        "conv_lstm": "raising",
    }
    chosen = [p for op in [*planted, "memory_read"] for p in of_op(op)]
    imports = [f"tests.checking.{name}" for name in planted.values()]
    cells = check_device(CPU, chosen, who=loaded(), imports=imports, seconds=60)
    found = {cell.problem.op: cell for cell in cells}
    assert {op: cell.verdict for op, cell in found.items()} == {
        "local_matching": "wrong",
        "global_matching": "crashed",
        "conv_lstm": "failed",
        "memory_read": "right",
    }
    assert found["local_matching"].reason.startswith("result: relative error")
    assert "SIGABRT" in found["global_matching"].reason
    assert "illegal memory access" in found["conv_lstm"].reason

    store(CPU, cells)
    frame, mask = torch.rand(1, 8, 6, 6), torch.ones(1, 1, 6, 6, dtype=torch.bool)
    with pytest.warns(UserWarning, match=r"local_matching: cpp is not used on .*found it wrong here"):
        call("local_matching")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # Triton's interpreter has warnings of its own
        call("local_matching")  # one warning is enough
    explained = vosops.explain("local_matching", frame, frame, mask, radius=2)
    assert re.match("local_matching: (triton|reference) ", explained), "Triton where it is interpreted"
    assert "vosops check found it wrong here" in explained
    assert vosops.explain("memory_read", frame, frame, frame[:, None, :1]).startswith("memory_read: cpp")
    with vosops.use_backend("cpp"):
        call("local_matching")  # who forces an implementation gets it


@needs_library
@pytest.mark.slow
def test_what_hangs_is_ended_and_the_rest_goes_on(cache):
    chosen = of_op("local_attention") + of_op("global_conv")
    imports = ["tests.checking.hanging"]
    cells = check_device(CPU, chosen, who=loaded(), imports=imports, seconds=20)
    assert [cell.verdict for cell in cells] == ["hung", "right"]
    assert cells[0].reason == "no result after 20 s"


@needs_library
@pytest.mark.slow
def test_a_process_that_cannot_start_is_said():
    [cell] = check_device(CPU, of_op("global_conv"), who=loaded(), imports=["tests.checking.absent"])
    assert cell.verdict == "cannot"
    assert "No module named 'tests.checking.absent'" in cell.reason


def test_a_candidate_that_cannot_run_needs_no_process():
    who = [Candidate("CUDA C++", "cpp", "cuda:0", reason_not="no CUDA driver on this machine")]
    cells = check_device(CPU, of_op("conv_lstm"), who=who)
    assert [(cell.verdict, cell.reason) for cell in cells] == [("cannot", "no CUDA driver on this machine")]


def cell(op="local_matching", verdict="wrong", backward=False, mode="ieee", **changes):
    problem = of_op(op, mode, backward)[0]
    who = Candidate("C++", "cpp", "cpu", **changes)
    return runner.Cell(who, problem, verdict, "relative error 1e-1", (0.1,))


def test_a_later_check_of_another_op_keeps_the_earlier_verdicts(cache):
    store(CPU, [cell()])
    path = store(CPU, [cell("global_conv", "right")])
    found = json.loads(path.read_text())["found"]
    assert found["local_matching"]["cpp"]["ieee forward"]["verdict"] == "wrong"
    assert found["global_conv"]["cpp"]["ieee forward"]["verdict"] == "right"
    assert [each.name for each in cache.iterdir()] == [path.name], "no partial file is left"


def test_verdicts_of_another_library_are_shown_but_not_stored(cache):
    path = store(CPU, [cell(stored=False), cell("conv_lstm", "cannot")])
    assert json.loads(path.read_text())["found"] == {}


def test_a_gradient_that_is_wrong_rules_out_training_alone(cache):
    store(CPU, [cell("local_matching", "right"), cell("local_matching", "wrong", backward=True)])
    frame, mask = torch.rand(1, 8, 6, 6), torch.ones(1, 1, 6, 6, dtype=torch.bool)
    assert vosops.explain("local_matching", frame, frame, mask, radius=1).startswith("local_matching: cpp")
    with pytest.warns(UserWarning, match="forward . backward"):
        explained = vosops.explain("local_matching", frame.requires_grad_(), frame, mask, radius=1)
    assert re.match("local_matching: (triton|reference) ", explained), "Triton where it is interpreted"


@pytest.mark.parametrize("content", ["", "{", "[]", '{"schema": 1}', '{"schema": 99}', "\0\1"])
def test_a_corrupt_file_is_ignored_with_one_line(cache, content):
    path = store(CPU, [cell()])
    path.write_text(content)
    _verdicts.reload()
    with pytest.warns(UserWarning, match="was ignored: not a file of vosops check") as caught:
        call("local_matching")
        call("local_matching")
    assert len(caught) == 1
    assert "\n" not in str(caught[0].message)
    store(CPU, [cell("global_conv", "right")])
    assert _verdicts.of(CPU) is not None


def test_a_file_of_other_versions_is_not_read(cache, monkeypatch):
    store(CPU, [cell()])
    monkeypatch.setattr(_verdicts, "versions", lambda: {"vosops": "9", "torch": "9", "triton": "9"})
    _verdicts.reload()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert _verdicts.of(CPU) is None
        call("local_matching")


def test_a_file_that_was_renamed_to_another_device_is_not_believed(cache, monkeypatch):
    path = store(CPU, [cell()])
    monkeypatch.setattr(_verdicts, "processor", lambda: "Another Processor")
    other = _verdicts.path_of(_verdicts.identity(CPU))
    path.rename(other)
    _verdicts.reload()
    with pytest.warns(UserWarning, match="it belongs to"):
        assert _verdicts.of(CPU) is None


def test_a_compiled_function_does_not_choose_it_either(cache):
    store(CPU, [cell()])
    frame, mask = torch.rand(1, 8, 6, 6), torch.ones(1, 1, 6, 6, dtype=torch.bool)
    compiled = torch.compile(
        lambda q: vosops.local_matching(q, q, mask, radius=2), fullgraph=True, backend="eager"
    )
    with pytest.warns(UserWarning, match="cpp is not used"):
        result = compiled(frame)
    with vosops.use_backend("reference"):
        assert torch.equal(result, vosops.local_matching(frame, frame, mask, radius=2))


def test_an_order_that_was_timed_here_is_followed_and_named(cache):
    orders = {"local_matching": {"ieee forward": {"order": ["reference", "cpp"], "seconds": {}}}}
    store(CPU, [cell("local_matching", "right")], orders)
    frame, mask = torch.rand(1, 8, 6, 6), torch.ones(1, 1, 6, 6, dtype=torch.bool)
    explained = vosops.explain("local_matching", frame, frame, mask, radius=2)
    assert explained.startswith("local_matching: reference (order on cpu: vosops check --tune on ")
    assert [line.split()[0] for line in explained.splitlines()[1:]] == ["reference", "cpp", "triton"]
    half = frame.bfloat16()
    assert vosops.explain("local_matching", half, half, mask, radius=2).startswith("local_matching: cpp")
    store(CPU, [cell("global_conv", "right")])
    assert _verdicts.of(CPU).orders == orders, "a check without --tune keeps the orders"
    timed = {"global_conv": {"bf16 forward": {"order": ["reference", "cpp"], "seconds": {}}}}
    store(CPU, [cell("global_conv", "right")], timed)
    assert _verdicts.of(CPU).orders == orders | timed, "one op that is timed keeps the orders of the others"


def test_a_run_remembers_what_the_check_changed(cache):
    assert _verdicts.arguments(CPU) == {}
    store(CPU, [cell("local_matching", "right")])
    assert _verdicts.arguments(CPU) == {}, "nothing is chosen otherwise"
    store(CPU, [cell("local_matching", "wrong")])
    first = _verdicts.arguments(CPU)
    assert list(first) == ["vosops check"]
    store(CPU, [cell("global_conv", "wrong")])
    assert _verdicts.arguments(CPU) != first


@needs_library
@pytest.mark.slow
def test_tuning_times_only_what_is_right_and_orders_it(cache):
    sizes = [size for size in tuning.CPU_SIZES if size.op == "local_matching"][:1]
    cells = [cell("local_matching", "right"), cell("local_matching", "wrong", mode="bf16")]
    came = {}
    orders = tuning.tune_device(CPU, cells, sizes=sizes, progress=came.__setitem__)
    assert list(orders) == ["local_matching"]
    assert came == orders
    assert list(orders["local_matching"]) == ["ieee forward"]
    timed = orders["local_matching"]["ieee forward"]
    assert sorted(timed["order"]) == ["cpp", "reference"]
    [seconds] = timed["seconds"].values()
    assert timed["order"] == sorted(seconds, key=seconds.get)


def test_what_was_timed_before_the_time_ran_out_is_kept(monkeypatch):
    def run(command, *, timeout, **more):
        line = b'{"seconds": {"a": {"cpp": 1.0, "reference": 2.0}}, "entries": ["ieee forward"]}\n'
        raise subprocess.TimeoutExpired(command, timeout, output=line + line[:20])

    monkeypatch.setattr(tuning.subprocess, "run", run)
    sizes = [size for size in tuning.CPU_SIZES if size.op == "local_matching"][:1]
    orders = tuning.tune_device(CPU, [cell("local_matching", "right")], sizes=sizes)
    assert orders["local_matching"]["ieee forward"]["order"] == ["cpp", "reference"]


def test_the_order_is_by_all_sizes_and_of_what_ran_on_all():
    seconds = {"a": {"cpp": 1.0, "triton": 2.0, "reference": 9.0}, "b": {"cpp": 5.0, "triton": 1.0}}
    assert tuning._order(seconds)["order"] == ["triton", "cpp"]


def test_it_is_not_tuned_while_a_graph_is_captured(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="cannot be part of a CUDA graph"):
        tuning.tune_device(torch.device("cuda", 0), [])


# ---- The judge


@pytest.mark.parametrize("mode", ["ieee", "tf32x3", "tf32", "bf16", "f16"])
def test_one_element_that_is_off_by_a_third_of_the_greatest_is_wrong(mode):
    [problem] = of_op("global_conv", mode)
    wanted = torch.randn(3, 50_000, dtype=torch.float64)
    assert judge([wanted.float()], [wanted], problem)[0] == "right"
    faulty = wanted.clone()
    faulty[1, 77] += wanted.abs().max() / 3
    verdict, reason, _ = judge([faulty], [wanted], problem)
    assert verdict == "wrong"
    assert mode not in ("bf16", "tf32") or "(1, 77)" in reason, "too few to be seen in the error of all"


@pytest.mark.parametrize("fault", [float("nan"), float("inf")])
def test_what_is_not_finite_where_the_oracle_is_is_wrong(fault):
    [problem] = of_op("memory_read", "bf16")
    wanted = torch.randn(2, 9, dtype=torch.float64)
    faulty = wanted.clone()
    faulty[1, 3] = fault
    assert judge([faulty], [wanted], problem)[:2] == ("wrong", "result: 1 of 18 elements are not finite")


def test_a_result_of_another_shape_is_wrong():
    [problem] = of_op("memory_read")
    wanted = torch.randn(2, 9, dtype=torch.float64)
    assert judge([wanted.t()], [wanted], problem)[1] == "result: shape (9, 2) instead of (2, 9)"


def test_a_wrong_gradient_is_named():
    [problem] = of_op("memory_read", backward=True)
    wanted = [torch.randn(4, 9, dtype=torch.float64) for _ in range(3)]
    verdict, reason, errors = judge([wanted[0], wanted[1], 2 * wanted[2]], wanted, problem)
    assert verdict == "wrong"
    assert reason.startswith("gradient 2: relative error")
    assert errors == [0.0, 0.0, pytest.approx(1.0)]


def test_tf32_may_exchange_few_candidates_of_a_matching_but_not_many():
    [problem] = of_op("local_matching", "tf32")
    wanted = torch.rand(1000, dtype=torch.float64)
    few, many = wanted.clone(), wanted.clone()
    few[:15] += 1
    many[:40] += 1
    assert judge([few], [wanted], problem)[0] == "right"
    assert judge([many], [wanted], problem)[0] == "wrong"
    assert judge([few], [wanted], replace(problem, mode="ieee"))[0] == "wrong"


# ---- What is checked, and the command


def test_every_op_is_checked_in_every_arithmetic_and_direction():
    checked = {(p.op, p.mode, p.backward) for p in PROBLEMS}
    modes = ("ieee", "tf32", "tf32x3", "bf16", "f16")
    assert checked == {(op, mode, b) for op in vosops.list_ops() for mode in modes for b in (False, True)}
    assert len({p.key for p in PROBLEMS}) == len(PROBLEMS)
    timed = {size.op for size in tuning.GPU_SIZES}
    assert timed == {size.op for size in tuning.CPU_SIZES} == set(vosops.list_ops())


@needs_library
def test_the_loaded_library_is_the_one_whose_verdicts_are_stored():
    found = candidates(CPU)
    assert [c.environment.get("VOSOPS_CPU_CAPABILITY") for c in found if c.stored][:1] == [
        _library.CPU_CAPABILITY
    ]


@needs_library
@pytest.mark.slow
def test_the_command_shows_stores_and_forgets(run, cache, monkeypatch, tmp_path):
    monkeypatch.setattr(problems._library, "runnable_capabilities", lambda: [_library.CPU_CAPABILITY])
    monkeypatch.setattr("vosops.checking.problems.TRITON_INTERPRETED", False)
    file = tmp_path / "c.json"
    code, printed = run("--op", "conv_lstm", "--quick", "--device", "cpu", "--json", file)
    assert code == 0, printed
    assert f"C++ {_library.CPU_CAPABILITY}" in printed
    assert "right" in printed
    report = json.loads(file.read_text())
    assert report["right"] is True
    assert {c["verdict"] for c in report["devices"]["cpu"]["cells"]} == {"right"}
    assert len(list(cache.iterdir())) == 1
    assert run("--reset", "--device", "cpu")[1].startswith("cpu: removed ")
    assert list(cache.iterdir()) == []
    assert run("--reset", "--device", "cpu") == (0, "cpu: nothing was stored\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--op", "convolution"], "op must be one of conv_lstm"),
        (["--device", "tpu"], "--device must be cpu, cuda, cuda:N or all, got 'tpu'"),
        (["--device", "cuda:7"], "--device cuda:7: there is no such device here"),
    ],
)
def test_a_wrong_option_is_one_line(run, cache, arguments, message):
    code, printed = run(*arguments)
    assert code == 2
    assert message in printed
    assert len(printed.splitlines()) == 1


def test_something_wrong_ends_with_code_1(run, cache, monkeypatch):
    monkeypatch.setattr("vosops.checking.check_device", lambda *args, **options: [cell()])
    code, printed = run("--device", "cpu")
    assert code == 1
    assert "WRONG in 1 of 1" in printed
    assert "relative error 1e-1" in printed
    assert _verdicts.of(CPU).found["local_matching"]["cpp"]["ieee forward"]["verdict"] == "wrong"


def test_info_names_what_was_found(cache):
    from vosops import info

    assert "cpu" not in info.collect()["checks"]
    store(CPU, [cell()])
    with pytest.warns(UserWarning, match="cpp is not used"):
        info.collect()
    assert info.collect()["checks"]["cpu"].endswith("not used: local_matching by cpp")
    assert "check of cpu" in info.describe(info.collect())


def test_a_call_that_nobody_can_serve_has_an_error_of_its_own():
    frame, mask = torch.rand(1, 8, 6, 6).double(), torch.ones(1, 1, 6, 6, dtype=torch.bool)
    with vosops.use_backend("triton"), pytest.raises(backends.CannotRunError, match="on backend 'triton'"):
        vosops.local_matching(frame, frame, mask, radius=2)  # no Triton kernel takes float64


# ---- Kernels that serve only where they were found right


def descriptors(**changes) -> Candidate:
    who = Candidate(
        "Triton, descriptors", "triton", "cpu", {_verdicts.DESCRIPTORS: "1"}, variant="descriptors"
    )
    return replace(who, **changes)


def test_a_variant_is_used_only_where_it_was_found_right(cache):
    (problem, *_), who = problems.OF_DESCRIPTORS, descriptors()
    asked = ("memory_read", "triton descriptors", torch.bfloat16)
    assert problem.mode == "bf16"
    assert not _verdicts.proved(CPU, *asked)
    for verdict in ("wrong", "failed", "crashed", "hung"):
        store(CPU, [runner.Cell(who, problem, verdict, "a reason")])
        assert not _verdicts.proved(CPU, *asked)
    digest = _verdicts.of(CPU).digest
    store(CPU, [runner.Cell(who, problem, "right", errors=(1e-3,))])
    assert _verdicts.proved(CPU, *asked)
    assert not _verdicts.proved(CPU, *asked[:2], torch.float16)
    assert not _verdicts.proved(CPU, *asked[:2], torch.float64)
    assert not _verdicts.proved(CPU, "memory_read", "triton", torch.bfloat16)
    assert _verdicts.of(CPU).digest not in ("", digest)


def test_what_is_found_of_a_variant_says_nothing_of_the_other_kernels(cache):
    store(CPU, [runner.Cell(descriptors(), problems.OF_DESCRIPTORS[0], "wrong", "a reason")])
    assert _verdicts.refusal(CPU, "memory_read", "triton", torch.bfloat16, None, False) == ""


def test_a_variant_solves_its_own_problems():
    lacking = runner.check_device(CPU, PROBLEMS[-6:], who=[descriptors(reason_not="no GPU")])
    assert [cell.problem for cell in lacking] == list(problems.OF_DESCRIPTORS)
    assert {cell.verdict for cell in lacking} == {"cannot"}


def test_the_problems_of_descriptors_are_read_by_them():
    memory_descriptors = pytest.importorskip("vosops.triton.memory_descriptors")
    target = memory_descriptors.Target(9, 132)
    layouts = set()
    for problem in problems.OF_DESCRIPTORS:
        given = MemoryInputs.of(problem.size, gpu_cases.MODES[problem.mode].dtype, CPU)
        assert memory_descriptors.reason_not(given.query, given.key, given.value, target) == ""
        layouts.add((given.key.stride(1) == 1, given.value.stride(2) == 1))
        memory = given.key.shape[2]
        assert memory > 2 * 64 and memory % 64
    assert layouts == {(False, False), (True, True)}


@pytest.mark.exhaustive
def test_a_check_runs_the_variant_in_the_interpreter():
    pytest.importorskip("triton")
    who = descriptors(environment={_verdicts.DESCRIPTORS: "1", "TRITON_INTERPRET": "1"})
    cells = check_device(CPU, problems.OF_DESCRIPTORS, who=[who])
    assert [cell.verdict for cell in cells] == ["right"] * len(cells), [cell.reason for cell in cells]
