"""``mprog pilot``: the two runs of a pilot on this machine, then what they say."""

from __future__ import annotations

from megatron_progressive.compare.pilot import Pilot, measure, plan_pilot, render
from megatron_progressive.config import ConfigError, RunConfig, to_yaml
from megatron_progressive.config.places import check_writable
from megatron_progressive.data import DATA_FILE, as_settled, read_identity
from megatron_progressive.plan.preflight import check_run
from megatron_progressive.runtime.distributed import place_from_environment
from megatron_progressive.runtime.files import write_atomically
from megatron_progressive.train.job import run_job


def run_pilot(
    config: RunConfig, nproc: int | None, steps: float | None = None, at: float | None = None
) -> int:
    """Run what is not finished of the pilot, then measure, print and write; returns the exit code.

    Raises:
        ConfigError: see :func:`.pilot.plan_pilot`; also where a run cannot start, and in a job of
            several ranks.
    """
    pilot = plan_pilot(config, steps, at)
    place = place_from_environment()
    for arm, _ in pilot.files:
        check_run(arm, place.world if place else 1 if nproc is None else nproc)
    check_writable("run.dir", pilot.folder)
    if place is None or place.rank == 0:
        pilot.folder.mkdir(parents=True, exist_ok=True)
        for arm, path in pilot.files:
            write_atomically(path, to_yaml(arm))
    if place is not None:
        files = " and ".join(str(path) for _, path in pilot.files)
        raise ConfigError(
            f"environment: got a job of {place.world} ranks; accepted: none here (in the job, "
            f"`mprog train` on {files}; then this command outside of it)"
        )
    for arm, path in pilot.files:
        arm = _on_the_same(arm, pilot)
        write_atomically(path, to_yaml(arm))
        code = run_job(arm, nproc, ["train", str(path)], apart=True)
        if code:
            return code
    print("\n".join(render(config, pilot, *measure(config, pilot))))
    return 0


def _on_the_same(arm: RunConfig, pilot: Pilot) -> RunConfig:
    """An arm, on the prepared corpus on which the first arm to begin was trained."""
    if arm.data.prepared is not None:
        return arm
    for other, _ in pilot.files:
        begun = read_identity(other.folder / DATA_FILE)
        folders = [] if begun is None else begun.all_folders
        if begun is not None and folders and all(folder.is_dir() for folder in folders):
            return as_settled(arm, begun)
    return arm
