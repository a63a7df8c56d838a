"""``mprog init``, ``data``, ``train``, ``plan``, ``pilot`` and ``report``: a single run."""

from __future__ import annotations

import argparse

from megatron_progressive.cli.arguments import (
    Commands,
    command,
    config_of,
    count,
    out_of,
    positive,
    takes_config,
)
from megatron_progressive.config import ConfigError, from_dict
from megatron_progressive.config.places import check_writable, place


def _init(args: argparse.Namespace, arguments: list[str]) -> int:
    from megatron_progressive.config.first import first_configuration, size_for
    from megatron_progressive.config.yaml_text import parsed
    from megatron_progressive.data.corpus import open_corpus
    from megatron_progressive.models import TRANSFORMERS
    from megatron_progressive.runtime.environment import cuda_memory_gib
    from megatron_progressive.runtime.files import write_atomically

    if args.family not in TRANSFORMERS:
        raise ConfigError(f"--family: got {args.family!r}; accepted: {', '.join(TRANSFORMERS)}")
    file = place("FILE", args.file)
    if file.exists():
        raise ConfigError(f"FILE: {file} is there; accepted: a new file")
    check_writable("FILE", file.parent)
    memory = cuda_memory_gib()
    size = size_for(args.family, len(memory), min(memory, default=0.0))
    text = first_configuration(file.stem, args.family, args.corpus, size)
    config = from_dict(parsed(text.encode(), "FILE"))  # what cannot be is told now
    open_corpus(config.data)
    write_atomically(file, text)
    print(f"{file}: {args.family} {size.preset}, {size.steps:,} steps; next: mprog train {file}")
    return 0


def _train(args: argparse.Namespace, arguments: list[str]) -> int:
    from megatron_progressive.train.job import run_job

    return run_job(config_of(args), args.nproc, arguments)


def _plan(args: argparse.Namespace, arguments: list[str]) -> int:
    from megatron_progressive.cost.cluster import make_cluster
    from megatron_progressive.plan import dry_run
    from megatron_progressive.plan.plan import make_plan
    from megatron_progressive.plan.plan_text import render

    config = config_of(args)
    numbers = {
        name: getattr(args, name)
        for name in ("gpu_memory_gib", "peak_tflops", "mfu", "link_gb_per_s")
    }
    cluster = make_cluster(args.gpu, numbers)
    if args.dry_run:
        dry_run.check_available()
    plan = make_plan(config, args.nproc, args.link_gb_per_s, cluster, args.search)
    print(render(plan), flush=True)
    if args.dry_run:
        gib = cluster.memory_gib if cluster else dry_run.H100_GIB
        print("\n" + dry_run.render(dry_run.dry_run(plan.config, plan.world, gib=gib), gib))
    return 0


def _pilot(args: argparse.Namespace, arguments: list[str]) -> int:
    from megatron_progressive.compare.run_pilot import run_pilot

    return run_pilot(config_of(args), args.nproc, args.steps, args.at)


def _data_prepare(args: argparse.Namespace, arguments: list[str]) -> int:
    from megatron_progressive import data
    from megatron_progressive.runtime.distributed import prepare_imports

    config = config_of(args)
    shard = None if args.shard is None else data.shard_of(args.shard)
    data.check(config)
    prepare_imports()
    if shard is not None and config.data.mix:
        raise ConfigError(
            f"--shard: got {args.shard} with data.mix; accepted: a configuration of one corpus, as "
            "data.corpus, or --workers"
        )
    if not data.is_text(config):
        print("nothing to prepare: images are read as they are")
    elif shard is None:
        folder = data.prepare(config, workers=args.workers)
        several = config.data.mix or config.data.validation
        print(*(data.settle(config)[0].all_folders if several else [folder]), sep="\n")
    elif (folder := data.prepare_shard(config, shard, args.workers)) is not None:
        print(folder)
    return 0


def _data_merge(args: argparse.Namespace, arguments: list[str]) -> int:
    from megatron_progressive import data
    from megatron_progressive.runtime.distributed import prepare_imports

    config = config_of(args)
    prepare_imports()
    print(data.merge(config))
    return 0


def _report(args: argparse.Namespace, arguments: list[str]) -> int:
    from megatron_progressive.compare.report import make_report, record_verdicts, terminal_table

    report = make_report([place("RUN", run) for run in args.runs], out_of(args))
    record_verdicts(report)
    terminal_table(report)
    return 0


def add(commands: Commands) -> None:
    """Add the commands for a single run."""
    init = command(commands, "init", _init, "write a commented first configuration")
    init.add_argument("file", metavar="FILE", help="the YAML file to make")
    init.add_argument(
        "--family", metavar="NAME", default="llama3", help="model family (default: llama3)"
    )
    init.add_argument(
        "--corpus", metavar="PATH", default="stdlib",
        help="text to train on (default: the Python standard library's sources)",
    )  # fmt: skip
    data = commands.add_parser("data", help="prepare text for training").add_subparsers(
        dest="data_command", required=True, metavar="COMMAND"
    )
    prepare = command(data, "prepare", _data_prepare, "prepare the corpus for training")
    takes_config(prepare)
    prepare.add_argument(
        "--workers", type=count, metavar="N",
        help="tokenize in N processes of one thread each (default: one process with threads)",
    )  # fmt: skip
    prepare.add_argument(
        "--shard", metavar="I/N", help="prepare share I of N, from 0; the last one merges them"
    )
    merge = command(data, "merge", _data_merge, "put together shards that are all prepared")
    takes_config(merge)
    train = command(
        commands, "train", _train, "train a run, from its newest checkpoint if it has one"
    )
    takes_config(train)
    train.add_argument("--nproc", type=count, metavar="N", help="start N local workers")
    plan = command(commands, "plan", _plan, "show parameters, FLOPs, memory, time and saving")
    takes_config(plan)
    plan.add_argument(
        "--nproc", "--gpus", type=count, metavar="N", help="number of ranks of the job"
    )
    plan.add_argument(
        "--link-gb-per-s",
        type=positive,
        metavar="G",
        help="rate at which a rank sends and receives at an expansion, and to other nodes, in 1e9 "
        "bytes per second (default: the GPU's network adapter, or 25)",
    )
    plan.add_argument(
        "--gpu", metavar="NAME", help="plan memory and time for it: a100, h100, h800 or h200"
    )
    plan.add_argument(
        "--dry-run", action="store_true",
        help="run the first, a middle and the last rank without a GPU: memory by torch's allocator",
    )  # fmt: skip
    plan.add_argument(
        "--search", action="store_true", help="look for the quickest layouts that fit"
    )
    for name, what in (
        ("gpu-memory-gib", "memory of the GPU in GiB"),
        ("peak-tflops", "dense bf16 peak of the GPU in 1e12 FLOPs per second"),
        ("mfu", "assumed share of the peak that computing reaches (default: 0.4)"),
    ):
        plan.add_argument(f"--{name}", type=positive, metavar="X", help=what)
    pilot = command(commands, "pilot", _pilot, "measure the mixing time, which proposes τ")
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
        help="where one of them is expanded, in the same form (default: the end of the warmup)",
    )
    report = command(commands, "report", _report, "compare runs: report.html, figures, report.json")
    report.add_argument("runs", nargs="+", metavar="RUN", help="run folders of one comparison")
    report.add_argument(
        "--out", metavar="FOLDER", default="report", help="folder to write to (default: ./report)"
    )
