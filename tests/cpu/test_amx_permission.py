"""AMX needs the system's permission for a whole process: when it is asked for, and what serves without it."""

import subprocess
from pathlib import Path

import pytest
import torch

from tests.forked import run_after_torch
from vosops import _library

LIBRARY = Path(_library.__file__).parent / "libvosops_cpu_amx.so"
on_amx = pytest.mark.skipif(
    not _library._has_amx() or not LIBRARY.exists(), reason="needs AMX and the library that was built for it"
)
SMALL_STACK = 8192
"""Bytes of a signal stack that hold no tiles (these alone have 8192), and all other state of a processor."""

SIGNAL_STACKS = f"""
import ctypes, threading
class Stack(ctypes.Structure):
    _fields_ = [("start", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t)]
memory = ctypes.create_string_buffer({SMALL_STACK})
def set_signal_stack():
    stack = Stack(ctypes.addressof(memory), 0, {SMALL_STACK})
    return ctypes.CDLL(None).sigaltstack(ctypes.byref(stack), None) == 0
def another_thread_can_have_one():
    result = []
    def work():
        result.append(set_signal_stack())
        ctypes.CDLL(None).sigaltstack(ctypes.byref(Stack(None, 2, 0)), None)  # SS_DISABLE
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    return result[0]
"""

READ = """
import torch, vosops
from vosops.reference import memory_read as in_plain_pytorch
generator = torch.Generator().manual_seed(0)
query, key, value = (
    torch.randn(shape, generator=generator) for shape in [(1, 64, 20, 30), (1, 64, 3, 20, 30), (1, 1, 128, 3, 20, 30)]
)
def error():
    return (vosops.memory_read(query, key, value) - in_plain_pytorch(query, key, value)).abs().max().item()
"""


def run(code: str) -> subprocess.CompletedProcess:
    return run_after_torch(code, VOSOPS_CPU_CAPABILITY="amx")


def answers(code: str) -> list[str]:
    done = run(code)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@on_amx
def test_importing_asks_for_nothing_and_the_first_use_does():
    code = f"""
{SIGNAL_STACKS}
import torch, vosops
x = torch.zeros(1, 16, 8, 8, dtype=torch.bfloat16).float()
vosops.explain("memory_read", x, x.unsqueeze(2), x.unsqueeze(1).unsqueeze(3))
print(torch.ops.vosops.cpu_capability(), another_thread_can_have_one())
print(repr(torch.ops.vosops.amx_refusal()), another_thread_can_have_one())
"""
    assert answers(code) == ["amx True", "'' False"]


@on_amx
def test_without_permission_the_library_serves_without_tiles_and_info_says_why():
    code = f"""
{SIGNAL_STACKS}
{READ}
assert set_signal_stack()
print(error() < 1e-5)
print(torch.ops.vosops.amx_refusal())
print(torch.ops.vosops.peak_amx_operations(1, 1))
from vosops import info
print(*[line for line in info.describe(info.collect()).splitlines() if line.startswith("AMX ")])
"""
    right, refusal, operations, said = answers(code)
    assert (right, operations) == ("True", "0")
    assert refusal.startswith("the system refused AMX: a thread's signal stack")
    assert said.endswith(f"not used, the library's AVX-512 code serves: {refusal}")


@on_amx
def test_a_forked_process_uses_tiles_too():
    code = f"""
{READ}
import os
def result():
    assert torch.ops.vosops.peak_amx_operations(3, 3) > 0
    return vosops.memory_read(query, key, value)
before = result()
child = os.fork()
if child == 0:
    os._exit(0 if torch.equal(result(), before) else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), torch.equal(result(), before))
"""
    assert answers(code) == ["0 True"]


def test_amx_is_refused_where_the_processor_has_none():
    code = "import torch; torch.cpu._is_amx_tile_supported = lambda: False; import vosops"
    done = run(code)
    assert done.returncode != 0
    assert "VOSOPS_CPU_CAPABILITY=amx must come with a processor that has AMX" in done.stderr


def test_without_amx_the_next_library_is_loaded(monkeypatch):
    monkeypatch.delenv("VOSOPS_CPU_CAPABILITY", raising=False)
    monkeypatch.setattr(_library.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    for has, expected in [
        (True, ("amx", "avx512", "avx2", "baseline")),
        (False, ("avx512", "avx2", "baseline")),
    ]:
        monkeypatch.setattr(_library, "_has_amx", lambda has=has: has)
        assert _library._usable_capabilities() == expected
