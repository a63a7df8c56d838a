"""Every command that README and docs show runs, page by page, as a reader would type it.

What a page shows is run in one folder, from top to bottom, by bash. ``mprog`` is the real one,
made short by words that the page's comments give. Jobs are run on the spot by small stand-ins for
Slurm's commands (tests/launch has the real ones). Dated experiments are records and not run again.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.docs import shown
from tests.docs.warm_mprog import WarmMprog

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PROGRAMS = {
    # a job's script at once, as the only task of its only node
    "sbatch": """
while [ $# -gt 0 ] && [ "${1#-}" != "$1" ]; do shift; done
export SLURM_JOB_ID=1 SLURM_NTASKS=1 SLURM_NNODES=1 SLURM_SUBMIT_DIR=$PWD
export SLURM_JOB_NODELIST=localhost
exec bash "$@"
""",
    "srun": """
while [ $# -gt 0 ] && [ "${1#-}" != "$1" ]; do shift; done
export SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_STEP_ID=0
exec "$@"
""",
    "scontrol": "echo localhost",
    # not again inside of itself: the target is there
    "make": f'exec {shutil.which("make")} --dry-run "$@" > /dev/null',
}
TAKES_WORDS = ("train", "pilot", "coordcheck", "data prepare", "grid run", "grid pilot",
               "grid report", "grid status", "grid collect")  # fmt: skip


@pytest.fixture(scope="module")
def mprog(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WarmMprog]:
    warm = WarmMprog(tmp_path_factory.mktemp("warm"))
    yield warm
    warm.close()


def _sandbox(folder: Path, mprog: WarmMprog) -> dict[str, str]:
    """A folder that looks like a clone, and the environment of a shell in it."""
    for name in ("configs", "launch", "tools", "docs", "Makefile", "pyproject.toml",
                 "constraints.txt"):  # fmt: skip
        (folder / name).symlink_to(ROOT / name)
    (folder / ".venv" / "bin").mkdir(parents=True)
    (folder / ".venv" / "bin" / "activate").touch()
    programs = folder / ".programs"
    programs.mkdir()
    for name, text in PROGRAMS.items():
        (programs / name).write_text(f"#!/usr/bin/env bash\n{text.strip()}\n")
        (programs / name).chmod(0o755)
    for name in ("python", "python3"):
        (programs / name).symlink_to(sys.executable)
    mprog.program(programs / "mprog-itself")
    python = f"""#!/usr/bin/env bash
if [ "${{1:-}} ${{2:-}}" = "-m megatron_progressive" ]; then shift 2; exec mprog "$@"; fi
exec {sys.executable} "$@"
"""
    (programs / "mprog-python").write_text(python)
    (programs / "mprog-python").chmod(0o755)
    text = f"""#!/usr/bin/env bash
set -f  # words like [fixed] are no patterns
for known in {" ".join(map(shlex.quote, TAKES_WORDS))}; do
    case "$1 $2" in "$known"*) exec mprog-itself "$@" $MPROG_WORDS ;; esac
done
exec mprog-itself "$@"
"""
    (programs / "mprog").write_text(text)
    (programs / "mprog").chmod(0o755)
    return {
        **os.environ,
        "PATH": f"{programs}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "MPROG_PYTHON": str(programs / "mprog-python"),
        "OMP_NUM_THREADS": "1",
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_shown_commands_run(page: Path, tmp_path: Path, mprog: WarmMprog) -> None:
    environment = _sandbox(tmp_path, mprog)
    for block in shown.blocks(page):
        if block.kind == "sh":
            done = subprocess.run(
                ["bash", "-euo", "pipefail", "-c", block.text],
                cwd=tmp_path,
                env={**environment, "MPROG_WORDS": block.words},
                capture_output=True,
                text=True,
                timeout=300,
                check=False,
            )
            told = f"{page.name}:{block.line}\n{block.text}\n{done.stdout}\n{done.stderr}"
            assert done.returncode == 0, told
            if block.prints is not None:
                assert done.stdout.strip() == block.prints.strip(), told


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_can_be_typed_is_run(page: Path) -> None:
    assert not shown.unrun(page)


def test_a_broken_command_is_noticed(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("```text\nmprog plan configs/demo.yaml\nmprog plan CONFIG\n```\n")
    assert shown.unrun(page) == ["page.md:1: mprog plan configs/demo.yaml"]
    page.write_text("<!-- run with: train.steps=3 -->\n```sh\nmprog train a.yaml\n```\n")
    (block,) = shown.blocks(page)
    assert (block.kind, block.words, block.text) == ("sh", "train.steps=3", "mprog train a.yaml\n")
    assert block.prints is None
    page.write_text("```sh\necho 1\n```\n\n<!-- what it prints -->\n```text\n1\n```\n")
    (block,) = shown.blocks(page)
    assert (block.text, block.prints) == ("echo 1\n", "1\n")
