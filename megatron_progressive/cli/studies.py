"""``mprog grid …`` and ``coordcheck``: studies of many runs."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from megatron_progressive.cli.arguments import (
    Commands,
    command,
    config_of,
    count,
    out_of,
    positive,
    takes_config,
)
from megatron_progressive.config import ConfigError
from megatron_progressive.config.places import check_writable, place

if TYPE_CHECKING:
    from megatron_progressive.grid.state import Study


def _grid(args: argparse.Namespace, arguments: list[str]) -> int:
    from megatron_progressive.grid import run as grid_run
    from megatron_progressive.grid import text as grid_text
    from megatron_progressive.grid.grid import load_grid
    from megatron_progressive.grid.launch import Launch
    from megatron_progressive.grid.state import Study

    verb = args.grid_command
    study = Study(load_grid(place("GRID", args.grid), args.overrides))
    if verb not in ("plan", "status") and not vars(args).get("dry_run"):
        study.check_places()
    if verb in ("pilot", "run"):
        launch = Launch(args.nproc, args.srun)

        def say(line: str) -> None:
            print(line, flush=True)

        if verb == "pilot":
            return grid_run.run_pilot(study, args.workers, launch, say)
        return grid_run.run_grid(study, args.workers, launch, say, args.cell)
    if verb == "submit":
        return _grid_submit(args, study)
    if verb == "plan":
        print(grid_text.plan(study.grid))
    elif verb == "status":
        # read anew: once the pilot is done, cells know their τ
        grid_text.show_status(lambda: Study(study.grid.reloaded()).status(), args.watch)
    elif verb == "report":
        from megatron_progressive.grid.report.report import make_grid_report
        from megatron_progressive.runtime.progress import show_stages

        with show_stages(f"report of {study.grid.name}") as show:
            report = make_grid_report(study, show)
        print(report.text)
    else:
        print(grid_text.results(study.collect(), study.folder))
    return 0


def _grid_submit(args: argparse.Namespace, study: Study) -> int:
    from megatron_progressive.grid import submit as grid_submit

    options = grid_submit.JobOptions(args.nodes, args.sbatch, args.array_limit)
    if not args.dry_run:
        grid_submit.check_slurm()
    jobs = grid_submit.plan_jobs(study, options)
    if not jobs:
        print(f"{study.grid.name}: every cell has ended, nothing to submit")
    elif args.dry_run:
        print("\n".join(grid_submit.as_script(study, jobs)))
    else:
        try:
            numbers = grid_submit.submit(study, jobs)
        except grid_submit.SubmissionFailed as error:
            print(f"mprog: sbatch: {error}", file=sys.stderr)
            return 1
        for job in jobs:
            cells = f" ({len(job.cells)} cells)" if job.cells else ""
            print(f"{job.name}: {numbers[job.name]}{cells}")
    return 0


def _advise(args: argparse.Namespace, arguments: list[str]) -> int:
    import json

    from megatron_progressive.compare.advise import evidence, text
    from megatron_progressive.compare.advise.advice import advise
    from megatron_progressive.runtime.files import write_atomically

    config = config_of(args)
    folders = [place("--studies", folder) for folder in args.studies]
    known = [*evidence.shipped(), *(one for folder in folders for one in evidence.of_study(folder))]
    pilot = place("--pilot", args.pilot) if args.pilot else None
    if pilot is not None:
        if pilot.exists():
            raise ConfigError(f"--pilot: {pilot} is there; accepted: a new file")
        check_writable("--pilot", pilot.parent)
    found = advise(config, known, [str(folder) for folder in folders])
    if pilot is not None and found.pilot is None:
        raise ConfigError(
            f"--pilot: got {pilot}, but the answer is known ({found.answer}); accepted: no --pilot"
        )
    if pilot is not None and found.pilot is not None:
        write_atomically(pilot, found.pilot)
    if args.json:
        print(json.dumps(text.as_values(found), indent=1, ensure_ascii=False))
    else:
        name = str(pilot) if pilot is not None else f"{config.run.name}_pilot.yaml"
        print(text.render(found, name, [args.config, *args.overrides]))
    return 0


def _coordcheck(args: argparse.Namespace, arguments: list[str]) -> int:
    from megatron_progressive.coordcheck import check as coordinate
    from megatron_progressive.runtime.distributed import Place, prepare_imports, world_group

    config = config_of(args)
    widths, depths = (
        coordinate.sizes_from_text(f"--{name}", getattr(args, name), [])
        for name in ("widths", "depths")
    )
    out = out_of(args)
    shapes = coordinate.shapes_of(config, widths, depths)
    coordinate.check_sizes(config, shapes)
    prepare_imports()
    with world_group(Place(0, 0, 1)):
        check = coordinate.coordinate_check(config, shapes, args.steps, args.slope)
    from megatron_progressive.coordcheck.figure import text, write

    write(check, shapes, out)
    print(text(check))
    return 0 if check.passed else 1


def add(commands: Commands) -> None:
    """Add the commands for studies."""
    grid = commands.add_parser("grid", help="studies of many runs").add_subparsers(
        dest="grid_command", required=True, metavar="COMMAND"
    )
    for name, text in (
        ("plan", "show the cells of a grid and what they cost"),
        ("pilot", "measure the grid's mixing time, which gives cells with tau: pilot their τ"),
        ("run", "train the pilot or a crossing's depths alone, then what is not finished"),
        ("submit", "submit the pilot, the cells and the report as jobs of Slurm"),
        ("status", "show how far every cell is, and how long the rest takes"),
        ("collect", "print the results of the finished cells, and write results.json"),
        ("report", "write report.html, figures and report.json of the finished cells"),
    ):
        sub = command(grid, name, _grid, text)
        sub.add_argument("grid", metavar="GRID", help="a YAML file")
        sub.add_argument(
            "overrides", nargs="*", metavar="key=value",
            help="replace values of the grid (study.dir=…, seeds=[1,2]) or of all its runs",
        )  # fmt: skip
        if name in ("pilot", "run"):
            sub.add_argument(
                "--workers",
                type=count,
                default=1,
                metavar="N",
                help="number of cells that run at a time",
            )
            sub.add_argument(
                "--nproc", type=count, default=1, metavar="N", help="number of ranks of each cell"
            )
            sub.add_argument(
                "--srun", default="", metavar="COMMAND",
                help="inside a Slurm job: srun and its options, to run a cell on the job's tasks",
            )  # fmt: skip
        if name == "submit":
            sub.add_argument(
                "--nodes", type=count, default=1, metavar="N", help="number of nodes of each cell"
            )
            sub.add_argument(
                "--sbatch", default="", metavar="OPTIONS",
                help="more options of sbatch for every job: --sbatch='--time=4:00:00 …'",
            )  # fmt: skip
            sub.add_argument(
                "--array-limit", type=count, metavar="K", help="number of cells that run at a time"
            )
            sub.add_argument(
                "--dry-run", action="store_true", help="print the commands, submit nothing"
            )
        if name == "run":
            sub.add_argument(
                "--cell", action="append", default=[], metavar="NAME_OR_INDEX",
                help="run this cell alone, of those that plan prints; may be given several times",
            )  # fmt: skip
        if name == "status":
            sub.add_argument(
                "--watch",
                action="store_true",
                help="on a terminal, go on until all cells have ended",
            )
    advise = command(
        commands, "advise", _advise, "say whether growing is expected to pay for a plan, and why"
    )
    takes_config(advise)
    advise.add_argument(
        "--studies", nargs="+", default=[], metavar="DIR",
        help="folders of finished studies, beside what comes with the package",
    )  # fmt: skip
    advise.add_argument("--pilot", metavar="FILE", help="write the proposed pilot to this new file")
    advise.add_argument("--json", action="store_true", help="print plain values")
    coordcheck = command(
        commands, "coordcheck", _coordcheck, "check activations and updates against width and depth"
    )
    takes_config(coordcheck)
    for name, what in (("widths", "1, 2, 4 times the model's"), ("depths", "1,2,4,8")):
        coordcheck.add_argument(f"--{name}", metavar="N,N,…", help=f"default: {what}")
    coordcheck.add_argument(
        "--steps", type=count, default=16, metavar="N", help="number of steps (default: 16)"
    )
    coordcheck.add_argument(
        "--slope",
        type=positive,
        default=0.2,
        metavar="S",
        help="largest slope that passes (default: 0.2)",
    )
    coordcheck.add_argument(
        "--out",
        metavar="FOLDER",
        default="coordcheck",
        help="folder to write to (default: coordcheck)",
    )
