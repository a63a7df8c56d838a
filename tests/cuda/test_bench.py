"""The benchmarks of the pause at τ and of Muon, from end to end on the stand-in CUDA device."""

from __future__ import annotations

from tests.cuda.conftest import Run

MUON = """
import argparse, sys
sys.path.insert(0, "tools/bench")
import torch, muon
seen = []
muon_of = __import__("megatron_progressive.optim.newton_schulz", fromlist=["newton_schulz"])
original = muon_of.newton_schulz
def noted(matrices, *given, **named):
    seen.append((matrices.device.type, named.get("dtype")))
    return original(matrices, *given, **named)
muon_of.newton_schulz = noted
sys.argv = ["muon.py", "--layers", "1"]
print(muon.newton_schulz(muon.arguments()).title)
print(sorted(set(map(str, seen))))
"""


def test_the_pause_at_tau_on_two_ranks(on_device: Run) -> None:
    """Checking refuses a CPU tensor that is handed to NCCL."""
    words = ["--ranks", "2", "--hidden", "64", "--layers", "2", "--tensor", "2", "--pipeline", "1"]
    done = on_device("checking", "tools/bench/expansion.py", *words)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "least possible" in done.stdout
    assert "ratio 1.000" in done.stdout


def test_newton_schulz_is_timed_on_the_device_and_in_the_runs_type(on_device: Run) -> None:
    done = on_device("computing", "-c", MUON)
    assert done.returncode == 0, done.stderr[-2000:]
    title, seen = done.stdout.splitlines()
    assert title == "Newton-Schulz in fp16 on cuda, ms"
    assert seen == str(["('cuda', torch.float16)"])
