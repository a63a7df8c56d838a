"""The stand-in device itself: what it is, what it counts, how it is built."""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from megatron_progressive import standin
from megatron_progressive.standin import build
from tests.cuda.conftest import Run

COUNTED = """
import torch
a = torch.randn(1000, 1000, device="cuda")
b = a @ a
print(torch.cuda.get_device_name(), torch.cuda.device_count(), torch.cuda.memory_allocated())
print(float(b.sum()))
torch.cuda.synchronize()
try:
    torch.empty(3 << 30, dtype=torch.uint8, device="cuda:1")
except torch.cuda.OutOfMemoryError as error:
    print("out of memory")
"""

COMPUTED = """
import torch, torch.nn.functional as F
torch.manual_seed(1)
here = torch.randn(2, 4, 16, 8, device="cuda", requires_grad=True)
there = here.detach().cpu().requires_grad_()
worst = 0.0
for x in (here, there):
    y = F.scaled_dot_product_attention(x, x, x, is_causal=True)
    F.layer_norm(y @ y.mT, (16,)).square().sum().backward()
print(float((here.grad.cpu() - there.grad).abs().max()) < 1e-4, here.grad.device)
torch.cuda.manual_seed(3)
first = torch.rand(4, device="cuda")
state = torch.cuda.get_rng_state()
second = torch.rand(4, device="cuda")
torch.cuda.set_rng_state(state)
print(torch.equal(second, torch.rand(4, device="cuda")), torch.equal(first, second))
print(torch.tensor([1.5], device="cuda"))
"""


EAGER = """
import os, sys
rank = 0 if os.fork() else 1
import torch, torch.distributed as dist
device = torch.device("cuda", rank)
torch.cuda.set_device(device)
store = dist.FileStore(sys.argv[1], 2)
dist.init_process_group("nccl", rank=rank, world_size=2, store=store, device_id=device)
mine = [dist.new_group([r]) for r in range(2)][rank]
both = dist.new_group([0, 1])
sums = [torch.full((2,), rank + 1.0, device=device) for _ in range(3)]
for x, group in zip(sums, (None, both, mine)):
    dist.all_reduce(x, group=group)
if rank == 0:
    dist.send(sums[2], 1)
else:
    dist.recv(sums[2], 0)
dist.destroy_process_group()
os.write(1, f"{rank} {[x.tolist() for x in sums]}\\n".encode())  # whole, beside the other's
os._exit(os.waitstatus_to_exitcode(os.wait()[1]) if rank == 0 else 0)
"""


def test_memory_and_kernels_are_counted(on_device: Run, tmp_path: Path) -> None:
    done = on_device(
        "counting", "-c", COUNTED, STANDIN_REPORT=str(tmp_path / "r"), STANDIN_MIB="2048"
    )
    assert done.returncode == 0, done.stderr
    first, total, last = done.stdout.splitlines()
    assert "stand-in" in first
    assert int(first.split()[-1]) > 8_000_000
    assert total == "0.0"  # what did not run left nothing
    assert last == "out of memory"
    (report,) = tmp_path.glob("r.*.json")
    counts = json.loads(report.read_text())
    assert counts["kernels"]["cublasSgemm_v2"] == 1
    assert sum("reduce_kernel" in name for name in counts["kernels"]) == 1
    assert counts["host"]["cudaDeviceSynchronize"] == 1
    assert counts["numbers"]["memory_peak_bytes"] > 8_000_000


@pytest.mark.parametrize("mode", ["computing", "checking"])
def test_numbers_are_right(on_device: Run, mode: str) -> None:
    done = on_device(mode, "-c", COMPUTED)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "True cuda:0", "True False", "tensor([1.5000], device='cuda:0')",
    ]  # fmt: skip


def test_communicators_of_a_named_device(on_device: Run, tmp_path: Path) -> None:
    """With ``device_id`` communicators are made at once, those of groups by splitting the world's,
    and single messages go over them."""
    done = on_device("checking", "-c", EAGER, str(tmp_path / "store"))
    assert done.returncode == 0, done.stderr
    values = "[[3.0, 3.0], [3.0, 3.0], [1.0, 1.0]]"
    assert sorted(done.stdout.splitlines()) == [f"0 {values}", f"1 {values}"]


def test_built_once_by_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes that ask at the same time get one folder, of a name that the sources decide."""
    if reason := standin.available():
        pytest.skip(reason)
    monkeypatch.setenv("MPROG_STANDIN_CACHE", str(tmp_path))
    ask = "from megatron_progressive.standin.build import build; print(build())"

    def folder(_: int) -> str:
        command = [sys.executable, "-c", ask]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    with ThreadPoolExecutor(3) as threads:
        folders = set(threads.map(folder, range(3)))
    assert len(folders) == 1
    made = [path for path in tmp_path.iterdir() if path.name != "lock"]
    assert [str(path) for path in made] == [folders.pop().strip()]
    assert {build.PRELOADED, build.DRIVER} <= {path.name for path in made[0].iterdir()}


def test_no_header_of_a_toolkit(tmp_path: Path) -> None:
    """What is included comes from torch's wheels, the compiler and this folder."""
    if reason := standin.available():
        pytest.skip(reason)
    wheels = build._wheels()
    assert isinstance(wheels, build.Wheels)
    for source in build.NATIVE.glob("*.cpp"):
        command = ["g++", "-M", "-std=c++20", f"-I{build.NATIVE}", f"-isystem{wheels.headers}"]
        done = subprocess.run([*command, str(source)], capture_output=True, text=True, check=True)
        found = done.stdout
        assert "/cuda-" not in found
        assert "/usr/local/cuda" not in found


def test_missing_compiler_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    build.available.cache_clear()
    try:
        assert standin.available() == (
            "the stand-in CUDA device is built with g++, which is not installed"
        )
    finally:
        build.available.cache_clear()


def test_unknown_mode_is_refused() -> None:
    with pytest.raises(ValueError, match="mode: got real; accepted: counting, computing, checking"):
        standin.environment("real")
