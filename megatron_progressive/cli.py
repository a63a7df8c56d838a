"""``mprog``: parse, call, print; no logic."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_progressive import __version__
from megatron_progressive.config import (
    ConfigError,
    ExpansionSection,
    RunConfig,
    expansion_from_words,
    load,
)
from megatron_progressive.config.places import PLACE_ERRORS, check_paths, check_writable, place
from megatron_progressive.runtime.arguments import Parser, count, positive
from megatron_progressive.runtime.files import WriteFailed
from megatron_progressive.runtime.signals import INTERRUPTED
from megatron_progressive.runtime.terminal import write_plainly

if TYPE_CHECKING:
    from megatron_progressive.study.grid_state import Study


def _config(args: argparse.Namespace) -> RunConfig:
    from megatron_progressive.state.initial import with_initial_model
    from megatron_progressive.train.extension import resolved

    config = load(place("CONFIG", args.config), args.overrides)
    check_paths(config)
    return resolved(with_initial_model(config))


def _checkpoint(args: argparse.Namespace) -> Path:
    from megatron_progressive.state.checkpoint import newest_checkpoint

    return newest_checkpoint(place("CHECKPOINT", args.checkpoint))


def _out(args: argparse.Namespace) -> Path:
    """The folder of ``--out``, which is made where it is not there."""
    out = place("--out", args.out)
    check_writable("--out", out)
    return out


def _train(args: argparse.Namespace, arguments: list[str]) -> int:
    from megatron_progressive.train.job import run_job

    return run_job(_config(args), args.nproc, arguments)


def _plan(args: argparse.Namespace, arguments: list[str]) -> int:
    from megatron_progressive.study.cluster import make_cluster
    from megatron_progressive.study.plan import make_plan, render

    config = _config(args)
    numbers = {
        name: getattr(args, name)
        for name in ("gpu_memory_gib", "peak_tflops", "mfu", "link_gb_per_s")
    }
    cluster = make_cluster(args.gpu, numbers)
    print(render(make_plan(config, args.nproc, args.link_gb_per_s, cluster, args.search)))
    return 0


def _pilot(args: argparse.Namespace, arguments: list[str]) -> int:
    from megatron_progressive.train.pilot import run_pilot

    return run_pilot(_config(args), args.nproc, args.steps, args.at)


def _data_prepare(args: argparse.Namespace, arguments: list[str]) -> int:
    from megatron_progressive import data
    from megatron_progressive.runtime.distributed import prepare_imports

    config = _config(args)
    data.check(config)
    prepare_imports()
    folder = data.prepare(config)
    print("nothing to prepare: images are read as they are" if folder is None else folder)
    return 0


def _report(args: argparse.Namespace, arguments: list[str]) -> int:
    from megatron_progressive.study.report import make_report, record_verdicts, terminal_table

    report = make_report([place("RUN", run) for run in args.runs], _out(args))
    record_verdicts(report)
    terminal_table(report)
    return 0


def _grid(args: argparse.Namespace, arguments: list[str]) -> int:
    from megatron_progressive.study import grid_run, grid_text
    from megatron_progressive.study.grid import load_grid
    from megatron_progressive.study.grid_launch import Launch
    from megatron_progressive.study.grid_state import Study

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
        from megatron_progressive.runtime.progress import show_stages
        from megatron_progressive.study.grid_report import make_grid_report

        with show_stages(f"report of {study.grid.name}") as show:
            report = make_grid_report(study, show)
        print(report.text)
    else:
        print(grid_text.results(study.collect(), study.folder))
    return 0


def _grid_submit(args: argparse.Namespace, study: Study) -> int:
    from megatron_progressive.study import grid_submit

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


def _coordcheck(args: argparse.Namespace, arguments: list[str]) -> int:
    from megatron_progressive.runtime.distributed import Place, prepare_imports, world_group
    from megatron_progressive.study import coordinate

    config = _config(args)
    widths, depths = (
        coordinate.sizes_from_text(f"--{name}", getattr(args, name), [])
        for name in ("widths", "depths")
    )
    out = _out(args)
    shapes = coordinate.shapes_of(config, widths, depths)
    coordinate.check_sizes(config, shapes)
    prepare_imports()
    with world_group(Place(0, 0, 1)):
        check = coordinate.coordinate_check(config, shapes, args.steps, args.slope)
    from megatron_progressive.study.coordinate_figure import text, write

    write(check, shapes, out)
    print(text(check))
    return 0 if check.passed else 1


def _env(args: argparse.Namespace, arguments: list[str]) -> int:
    from megatron_progressive.runtime.environment import environment, render

    print(render(environment()))
    return 0


def _checkpoint_inspect(args: argparse.Namespace, arguments: list[str]) -> int:
    from megatron_progressive.state.inspection import inspect_checkpoint, render

    found = inspect_checkpoint(_checkpoint(args))
    print(json.dumps(found) if args.json else render(found))
    return 0


def _checkpoint_expand(args: argparse.Namespace, arguments: list[str]) -> int:
    from megatron_progressive.expansion.offline import expand_checkpoint, plan_expansion

    fields = ("to_layers", "init", "order", "insert", "optimizer_state")
    expansion = expansion_from_words({field: getattr(args, field) for field in fields})
    plan = plan_expansion(_checkpoint(args), place("OUT", args.out), expansion)
    expand_checkpoint(plan)
    print(f"{args.out}: {plan.from_layers} → {plan.progress.num_layers} layers")
    return 0


def _export_hf(args: argparse.Namespace, arguments: list[str]) -> int:
    from megatron_progressive.state.huggingface.exporting import export_checkpoint, plan_export

    tokenizer = None if args.tokenizer is None else place("--tokenizer", args.tokenizer)
    plan = plan_export(_checkpoint(args), place("OUT", args.out), args.dtype, tokenizer)
    export_checkpoint(plan)
    for note in plan.notes:
        print(note, file=sys.stderr)
    print(f"{args.out}: {plan.config['architectures'][0]}, {plan.config['dtype']}")
    return 0


def _import_hf(args: argparse.Namespace, arguments: list[str]) -> int:
    from megatron_progressive.state.huggingface.importing import import_folder, plan_import

    plan = plan_import(place("FOLDER", args.folder), place("OUT", args.out), args.allow)
    import_folder(plan)
    for note in plan.notes:
        print(note, file=sys.stderr)
    print(f"{args.out}: {plan.shape.family}, {plan.shape.num_layers} layers, {plan.dtype}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="mprog", description="Zero/one-layer progressive training on Megatron-core."
    )
    parser.add_argument("--version", action="version", version=f"mprog {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(parent: argparse._SubParsersAction, name: str, call: object, text: str):  # type: ignore[type-arg, no-untyped-def]
        sub = parent.add_parser(name, help=text, description=text)
        sub.set_defaults(call=call)
        return sub

    def takes_config(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("config", metavar="CONFIG", help="a YAML file")
        sub.add_argument("overrides", nargs="*", metavar="key=value", help="replace fields of it")

    train = command(commands, "train", _train, "train; resumes where a checkpoint is")
    takes_config(train)
    train.add_argument("--nproc", type=count, metavar="N", help="start N local workers")
    plan = command(commands, "plan", _plan, "parameters, FLOPs, memory and saving; trains nothing")
    takes_config(plan)
    plan.add_argument("--nproc", "--gpus", type=count, metavar="N", help="ranks of the job")
    plan.add_argument(
        "--link-gb-per-s",
        type=positive,
        metavar="G",
        help="1e9 bytes per second that a rank sends and receives at an expansion, and to other "
        "nodes (default: the GPU's network adapter, or 25)",
    )
    plan.add_argument("--gpu", metavar="NAME", help="a100, h100 or h200: memory and time as well")
    plan.add_argument(
        "--search", action="store_true", help="look for the quickest layouts that fit"
    )
    for name, what in (
        ("gpu-memory-gib", "memory of a GPU"),
        ("peak-tflops", "its dense bf16 peak, 1e12 FLOPs per second"),
        ("mfu", "assumed share of the peak that computing reaches (default: 0.4)"),
    ):
        plan.add_argument(f"--{name}", type=positive, metavar="X", help=what)
    pilot = command(commands, "pilot", _pilot, "measure the mixing time; proposes τ")
    takes_config(pilot)
    pilot.add_argument("--nproc", type=count, metavar="N", help="start N local workers")
    pilot.add_argument(
        "--steps",
        type=positive,
        metavar="S",
        help="where its two runs stop: a fraction of the run's steps, or a step (default: 0.25)",
    )
    pilot.add_argument(
        "--at",
        type=positive,
        metavar="T",
        help="where one of them is expanded, likewise (default: the end of the warmup)",
    )
    command(commands, "env", _env, "versions, devices, and what the fast path lacks")
    coordcheck = command(
        commands, "coordcheck", _coordcheck, "activations and updates against width and depth"
    )
    takes_config(coordcheck)
    for name, what in (("widths", "1, 2, 4 times the model's"), ("depths", "1,2,4,8")):
        coordcheck.add_argument(f"--{name}", metavar="N,N,…", help=f"default: {what}")
    coordcheck.add_argument("--steps", type=count, default=16, metavar="N", help="default: 16")
    coordcheck.add_argument(
        "--slope",
        type=positive,
        default=0.2,
        metavar="S",
        help="largest that passes (default: 0.2)",
    )
    coordcheck.add_argument(
        "--out", metavar="FOLDER", default="coordcheck", help="where to write (default: it)"
    )
    data = commands.add_parser("data", help="corpora").add_subparsers(
        dest="data_command", required=True, metavar="COMMAND"
    )
    takes_config(command(data, "prepare", _data_prepare, "corpus to Megatron's indexed dataset"))
    checkpoint = commands.add_parser("checkpoint", help="checkpoints on disk").add_subparsers(
        dest="checkpoint_command", required=True, metavar="COMMAND"
    )
    inspect = command(checkpoint, "inspect", _checkpoint_inspect, "what a checkpoint holds")
    inspect.add_argument("checkpoint", metavar="CHECKPOINT", help="RUN/checkpoints/step_0001200")
    inspect.add_argument("--json", action="store_true", help="one JSON object")
    expand = command(checkpoint, "expand", _checkpoint_expand, "a deeper checkpoint, without a job")
    expand.add_argument("checkpoint", metavar="CHECKPOINT", help="RUN/checkpoints/step_0001200")
    expand.add_argument("out", metavar="OUT", help="folder of the new checkpoint")
    expand.add_argument("--to-layers", metavar="N", required=True, help="depth of the new one")
    defaults = ExpansionSection()
    for field, what in (
        ("init", "new layers' weights: random, copying, zero, copying_zeroL, copying_zeroN"),
        ("order", "of copied layers: stack, inter, last"),
        ("insert", "new layers go to the bottom or the top"),
        ("optimizer_state", "inherit, copy, reset"),
    ):
        default = getattr(defaults, field)
        option = f"--{field.replace('_', '-')}"
        expand.add_argument(
            option, metavar="WORD", default=default, help=f"{what} (default: {default})"
        )
    exports = commands.add_parser("export", help="a checkpoint for others").add_subparsers(
        dest="export_command", required=True, metavar="FORMAT"
    )
    export = command(exports, "hf", _export_hf, "a Hugging Face model folder of a checkpoint")
    export.add_argument("checkpoint", metavar="CHECKPOINT", help="RUN/checkpoints/step_0001200")
    export.add_argument("out", metavar="OUT", help="folder to make")
    export.add_argument(
        "--dtype",
        metavar="TYPE",
        help="float32 (master weights where there are) or bfloat16 (default: the model's)",
    )
    export.add_argument(
        "--tokenizer", metavar="FOLDER", help="default: the one that the checkpoint keeps"
    )
    imports = commands.add_parser("import", help="others' models").add_subparsers(
        dest="import_command", required=True, metavar="FORMAT"
    )
    imported = command(imports, "hf", _import_hf, "a checkpoint of a Hugging Face model folder")
    imported.add_argument("folder", metavar="FOLDER", help="with config.json and safetensors")
    imported.add_argument("out", metavar="OUT_CHECKPOINT", help="folder of the new checkpoint")
    imported.add_argument(
        "--allow", action="append", default=[], metavar="KEY",
        help="pass over this key of config.json, which the family does not have; may be given "
        "several times",
    )  # fmt: skip
    grid = commands.add_parser("grid", help="scaling studies").add_subparsers(
        dest="grid_command", required=True, metavar="COMMAND"
    )
    for name, text in (
        ("plan", "the cells of a grid and what they cost; trains nothing"),
        ("pilot", "measure the grid's mixing time, which gives cells with tau: pilot their τ"),
        ("run", "the pilot, then the cells that are not finished"),
        ("submit", "the pilot, the cells and the report as jobs of Slurm"),
        ("status", "how far every cell is, and how long the rest takes"),
        ("collect", "results of the finished cells, also as results.json"),
        ("report", "report.html, figures and report.json of the finished cells"),
    ):
        sub = command(grid, name, _grid, text)
        sub.add_argument("grid", metavar="GRID", help="a YAML file")
        sub.add_argument(
            "overrides", nargs="*", metavar="key=value",
            help="replace values of the grid (study.dir=…, seeds=[1,2]) or of all its runs",
        )  # fmt: skip
        if name in ("pilot", "run"):
            sub.add_argument(
                "--workers", type=count, default=1, metavar="N", help="cells at a time"
            )
            sub.add_argument("--nproc", type=count, default=1, metavar="N", help="ranks of a cell")
            sub.add_argument(
                "--srun", default="", metavar="COMMAND",
                help="inside a Slurm job: srun and its options, to run a cell on the job's tasks",
            )  # fmt: skip
        if name == "submit":
            sub.add_argument("--nodes", type=count, default=1, metavar="N", help="nodes of a cell")
            sub.add_argument(
                "--sbatch", default="", metavar="OPTIONS",
                help="more options of sbatch for every job: --sbatch='--time=4:00:00 …'",
            )  # fmt: skip
            sub.add_argument("--array-limit", type=count, metavar="K", help="cells at a time")
            sub.add_argument("--dry-run", action="store_true", help="print the commands alone")
        if name == "run":
            sub.add_argument(
                "--cell", action="append", default=[], metavar="NAME_OR_INDEX",
                help="run this cell alone, of those that plan prints; may be given several times",
            )  # fmt: skip
        if name == "status":
            sub.add_argument("--watch", action="store_true", help="on a terminal: until all ended")
    report = command(commands, "report", _report, "report.html, figures and report.json of runs")
    report.add_argument("runs", nargs="+", metavar="RUN", help="run folders of one comparison")
    report.add_argument(
        "--out", metavar="FOLDER", default="report", help="where to write (default: ./report)"
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code (0, 1, 2 or 75; 130 after Ctrl-C)."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    write_plainly()
    try:
        args = _parsed(words)
        code = int(args.call(args, words))
        sys.stdout.flush()
        return code
    except ConfigError as error:
        print(f"mprog: {error}", file=sys.stderr)
        return 2
    except WriteFailed as error:
        print(f"mprog: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("mprog: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader (head, say) has seen enough: nothing to report
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
        return 1
    except OSError as error:  # what no check has seen coming
        if error.filename is None:
            raise
        print(f"mprog: {error.filename}: {error.strerror}", file=sys.stderr)
        return 2 if error.errno in PLACE_ERRORS else 1


def _parsed(words: list[str]) -> argparse.Namespace:
    # argparse cannot put an option among a sub-command's open-ended words: options go first
    parser = _parser()
    args, rest = parser.parse_known_args(_options_first(words))
    if any(word.startswith("-") for word in rest) or (rest and "overrides" not in args):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:  # key=value words after an option
        args.overrides += rest
    return args


_FLAGS = ("--search",)
_OPTIONS = (
    "--nproc", "--gpus", "--link-gb-per-s", "--gpu", "--gpu-memory-gib", "--peak-tflops", "--mfu",
    "--widths", "--depths", "--steps", "--slope", "--out",
)  # fmt: skip


def _options_first(words: list[str]) -> list[str]:
    if words[:1] not in (["train"], ["plan"], ["pilot"], ["coordcheck"]):
        return words
    options, rest, at = [], words[1:], 0
    while at < len(rest):
        if rest[at] in _OPTIONS:
            options += rest[at : at + 2]
            del rest[at : at + 2]
        elif rest[at] in _FLAGS:
            options.append(rest.pop(at))
        else:
            at += 1
    return [words[0], *options, *rest]


if __name__ == "__main__":
    sys.exit(main())
