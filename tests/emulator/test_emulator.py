"""The emulator finds every fault that is planted in cases.cu, and runs the correct twins without a complaint."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.emulator import build

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the emulator needs Linux and g++")

CORRECT = [
    "async_copy",
    "async_groups",
    "block_sum",
    "global_in_bounds",
    "ldmatrix",
    "ldmatrix_transposed",
    "mma_bfloat16",
    "mma_float16",
    "mma_tf32",
    "shared_in_bounds",
    "shuffles",
    "small_terms_kept",
    "terms_of_25_bits_kept",
    "tf32",
    "visits",
    "warp_exchange",
]
TESTED_ELSEWHERE = ["fragments", "small_terms_lost"]  # test_tensor_cores.py

# case -> what the report must say
FOUND_IN_EVERY_MODE = {
    "async_without_wait": "",  # the copy is not there yet, so the values are wrong where nothing is checked
    "block_too_large": "block size 1025 is over the limit of 1024 of sm_80",
    "divergent_barrier": "divergent barrier: .* thread (40,0,0) waits at the __syncthreads",
    "divergent_shuffle": "divergent warp: .* lane 7 has ended",
    "early_exit": "divergent barrier: .* thread (40,0,0) has ended",
    "grid_too_large": "grid.y 65536 is over the limit of 65535",
    "missing_barrier": "",
    "never_waits": "never waited for",
    "shared_164k": "dynamic shared memory 167936 is over the limit of 166912 of sm_80",
}
FOUND_IN_CHECKED = {
    "async_without_barrier": "race: .* shared byte 4 was written by thread 0 with no barrier in between",
    "async_without_wait": "pending: .* is touched while a cp.async of thread 0 to it is under way",
    "block_race": "blocks: .* another block of this launch wrote",
    "global_race": "race: .* global memory was written by thread 0",
    "misaligned": "misaligned access",
    "missing_barrier": "race: .* with no barrier in between at cases.cu",
    "missing_syncwarp": "race: .* with no barrier in between",
    "shared_overflow": "bounds: .* access out of bounds of shared memory: byte 1024 of 1024",
    "stale_read": "unwritten: block (1,0,0) .* which nothing wrote",
    "unwritten_read": "unwritten: .* thread (3,0,0): read of shared byte 12, which nothing wrote",
    "write_after_read": "race: .* was read by thread 0 with no barrier in between",
}
FOUND_IN_ADDRESS = {
    "global_overflow": "heap-buffer-overflow .*write_everywhere",
    "shared_overflow": "heap-buffer-overflow .*shared_overflow",
}


@pytest.fixture(
    scope="module", params=["checked", pytest.param("address", marks=pytest.mark.exhaustive), "plain"]
)
def mode(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def run(mode: str, case: str, **environment: str) -> tuple[int, str]:
    """Run one case in a process of its own."""
    result = subprocess.run(
        [build.build_cases(mode), case],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        timeout=300,
    )
    return result.returncode, result.stdout + result.stderr


def matches(pattern: str, text: str) -> bool:
    """Whether the parts of `pattern` between `.*` occur in `text` in this order."""
    position = 0
    for part in pattern.split(".*"):
        position = text.find(part.strip(), position)
        if position < 0:
            return False
    return True


@pytest.mark.parametrize("case", CORRECT)
def test_correct_kernels_run_without_a_complaint(mode: str, case: str) -> None:
    assert run(mode, case) == (0, "ok\n")


@pytest.mark.parametrize("case", ["block_sum", "warp_exchange", "async_copy", "shuffles", "mma_tf32"])
@pytest.mark.parametrize("seed", ["1", "2"])
def test_correct_kernels_do_not_depend_on_the_order_of_threads(mode: str, case: str, seed: str) -> None:
    assert run(mode, case, VOSOPS_EMULATOR_SHUFFLE=seed) == (0, "ok\n")


@pytest.mark.parametrize("case", sorted(FOUND_IN_EVERY_MODE))
def test_fault_is_found_in_every_mode(mode: str, case: str) -> None:
    status, text = run(mode, case)
    assert status == 1
    assert matches(FOUND_IN_EVERY_MODE[case], text), text


@pytest.mark.parametrize("case", sorted(FOUND_IN_CHECKED))
def test_fault_is_found_by_the_memory_hooks(case: str) -> None:
    status, text = run("checked", case)
    assert status == 1
    assert matches(FOUND_IN_CHECKED[case], text), text


@pytest.mark.exhaustive  # beside test_bounds.py, in which the kernels run in this mode
@pytest.mark.parametrize("case", sorted(FOUND_IN_ADDRESS))
def test_access_out_of_bounds_is_found_by_address_sanitizer(case: str) -> None:
    status, text = run("address", case)
    assert status == 1
    assert matches(FOUND_IN_ADDRESS[case], text), text


def test_limits_follow_the_architecture() -> None:
    assert run("plain", "shared_164k", VOSOPS_EMULATOR_ARCH="90") == (0, "ok\n")
    assert "limit of 101376 of sm_86" in run("plain", "shared_164k", VOSOPS_EMULATOR_ARCH="86")[1]


def test_the_trace_counts_the_visits_of_warps(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    for _ in range(2):
        assert run("plain", "visits", VOSOPS_EMULATOR_TRACE=str(trace)) == (0, "ok\n")
    first, second = (json.loads(line) for line in trace.read_text().splitlines())
    assert first == second
    assert (first["blocks"], first["threads"], first["shared_bytes"]) == (1, 64, 1024)
    assert first["visits"] == {
        "uniform": [6, 1],  # two warps, three times
        "few_lanes": [6, 2],  # lanes that come together count once; the code has two copies
        "second_warp": [3, 1],
        "twice_at_most": [12, 1],  # a warp comes as often as its busiest lane
        "three_places": [18, 4],  # lanes come to three of the four copies
    }


def test_a_dry_run_only_says_what_would_be_launched(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    status, text = run("plain", "block_sum", VOSOPS_EMULATOR_TRACE=str(trace), VOSOPS_EMULATOR_DRY="1")
    assert (status, "wrong: block sum" in text) == (1, True)  # nothing was added up
    assert json.loads(trace.read_text())["blocks"] == 4


def test_every_case_is_tested() -> None:
    listing = subprocess.run(
        [build.build_cases("plain")], capture_output=True, text=True, timeout=300
    ).stdout.split()
    assert set(listing) == {
        *CORRECT,
        *TESTED_ELSEWHERE,
        *FOUND_IN_EVERY_MODE,
        *FOUND_IN_CHECKED,
        *FOUND_IN_ADDRESS,
    }
