"""``mprog checkpoint …``, ``eval``, ``export`` and ``import``: models on disk."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace

from megatron_progressive.cli.arguments import (
    Commands,
    batch,
    checkpoint_of,
    command,
    least_zero,
    limit,
)
from megatron_progressive.config import ConfigError, ExpansionSection, expansion_from_words
from megatron_progressive.config.places import place


def _checkpoint_inspect(args: argparse.Namespace, arguments: list[str]) -> int:
    from megatron_progressive.checkpoints.inspection import inspect_checkpoint, render

    found = inspect_checkpoint(checkpoint_of(args))
    print(json.dumps(found) if args.json else render(found))
    return 0


def _checkpoint_expand(args: argparse.Namespace, arguments: list[str]) -> int:
    from megatron_progressive.expansion.offline import expand_checkpoint, plan_expansion

    fields = ("to_layers", "init", "order", "insert", "optimizer_state")
    block = None if args.block is None else args.block.split(",")
    words = {field: getattr(args, field) for field in fields}
    expansion = expansion_from_words({**words, "block": block})
    plan = plan_expansion(checkpoint_of(args), place("OUT", args.out), expansion)
    expand_checkpoint(plan)
    print(f"{args.out}: {plan.from_layers} → {plan.position.num_layers} layers")
    return 0


def _eval(args: argparse.Namespace, arguments: list[str]) -> int:
    from megatron_progressive.evaluation.names import check_tasks
    from megatron_progressive.evaluation.results import read_result, table

    tasks = [word for word in args.tasks.split(",") if word]
    check_tasks("--tasks", tasks)  # before anything of a model is read
    from megatron_progressive.evaluation.harness import Settings, evaluate, plan_evaluation

    settings = Settings(args.num_fewshot, args.limit, args.batch_size, args.device)
    tokenizer = None if args.tokenizer is None else place("--tokenizer", args.tokenizer)
    model = place("CHECKPOINT", args.checkpoint)
    written = evaluate(plan_evaluation(model, tasks, settings, args.dtype, tokenizer))
    print(table([read_result(file) for file in written]))
    print("\n".join(str(file) for file in written))
    return 0


def _export_hf(args: argparse.Namespace, arguments: list[str]) -> int:
    from megatron_progressive.hub.card import model_card
    from megatron_progressive.hub.push import PushFailed, check_push, push
    from megatron_progressive.huggingface.exporting import export_checkpoint, plan_export

    tokenizer = None if args.tokenizer is None else place("--tokenizer", args.tokenizer)
    checkpoint, out = checkpoint_of(args), place("OUT", args.out)
    if args.private and args.push is None:
        raise ConfigError("--private: got it without --push; accepted: with --push REPO")
    plan = plan_export(checkpoint, out, args.dtype, tokenizer)
    if args.push is not None:
        check_push(args.push)
    card = model_card(checkpoint, out.resolve().name if args.push is None else args.push)
    export_checkpoint(replace(plan, card=card))
    for note in plan.notes:
        print(note, file=sys.stderr)
    print(f"{args.out}: {plan.config['architectures'][0]}, {plan.config['dtype']}")
    if args.push is not None:
        try:
            print(push(out, args.push, args.private))
        except PushFailed as error:
            print(f"mprog: {error}", file=sys.stderr)
            return 1
    return 0


def _import_hf(args: argparse.Namespace, arguments: list[str]) -> int:
    from megatron_progressive.huggingface.importing import import_folder, opened_import

    source, out = place("FOLDER", args.folder), place("OUT", args.out)
    with opened_import(source, out, args.allow) as plan:
        import_folder(plan)
    for note in plan.notes:
        print(note, file=sys.stderr)
    print(f"{args.out}: {plan.shape.family}, {plan.shape.num_layers} layers, {plan.dtype}")
    return 0


def add(commands: Commands) -> None:
    """Add the commands for models on disk."""
    checkpoint = commands.add_parser(
        "checkpoint", help="inspect a checkpoint, or expand it on disk"
    )
    verbs = checkpoint.add_subparsers(dest="checkpoint_command", required=True, metavar="COMMAND")
    inspect = command(verbs, "inspect", _checkpoint_inspect, "show what a checkpoint holds")
    inspect.add_argument("checkpoint", metavar="CHECKPOINT", help="RUN/checkpoints/step_0001200")
    inspect.add_argument("--json", action="store_true", help="print one JSON object")
    expand = command(verbs, "expand", _checkpoint_expand, "make a deeper checkpoint, without a job")
    expand.add_argument("checkpoint", metavar="CHECKPOINT", help="RUN/checkpoints/step_0001200")
    expand.add_argument("out", metavar="OUT", help="folder of the new checkpoint")
    expand.add_argument(
        "--to-layers", metavar="N", required=True, help="depth of the new checkpoint"
    )
    defaults = ExpansionSection()
    for field, what in (
        ("init", "new layers' weights: random, copying, zero, copying_zeroL, copying_zeroN"),
        ("order", "order of copied layers: stack, inter, last"),
        ("insert", "where new layers go: bottom, top, middle"),
        ("optimizer_state", "optimizer state after it: inherit, copy, reset"),
    ):
        default = getattr(defaults, field)
        option = f"--{field.replace('_', '-')}"
        expand.add_argument(
            option, metavar="WORD", default=default, help=f"{what} (default: {default})"
        )
    expand.add_argument(
        "--block", metavar="FIRST,LAST",
        help="the layers to copy, without LAST (default: all; with --insert middle those in the "
        "middle)",
    )  # fmt: skip
    evaluating = command(
        commands, "eval", _eval, "evaluate a checkpoint on tasks of lm-evaluation-harness"
    )
    evaluating.add_argument(
        "checkpoint", metavar="CHECKPOINT",
        help="RUN/checkpoints/step_0001200, a run's folder, or a folder that export made",
    )  # fmt: skip
    evaluating.add_argument(
        "--tasks", metavar="NAME,NAME,…", required=True,
        help="tasks, groups or tags of the harness, or YAML files of tasks",
    )  # fmt: skip
    evaluating.add_argument(
        "--num-fewshot", type=least_zero, metavar="N",
        help="number of examples before each question (default: the task's)",
    )  # fmt: skip
    evaluating.add_argument(
        "--limit", type=limit, metavar="N",
        help="number of questions of each task, or below 1 the fraction of them (default: all)",
    )  # fmt: skip
    evaluating.add_argument(
        "--batch-size", type=batch, metavar="N", default="1",
        help="number of requests in a forward pass, or auto (default: 1)",
    )  # fmt: skip
    evaluating.add_argument(
        "--device", metavar="DEVICE", help="cpu, cuda, cuda:1 (default: cuda where it is there)"
    )
    evaluating.add_argument("--dtype", metavar="TYPE", help="as of export hf")
    evaluating.add_argument("--tokenizer", metavar="FOLDER", help="as of export hf")
    exporting = commands.add_parser("export", help="make a Hugging Face folder of a checkpoint")
    exports = exporting.add_subparsers(dest="export_command", required=True, metavar="FORMAT")
    export = command(exports, "hf", _export_hf, "make a Hugging Face model folder")
    export.add_argument("checkpoint", metavar="CHECKPOINT", help="RUN/checkpoints/step_0001200")
    export.add_argument("out", metavar="OUT", help="the folder to make")
    export.add_argument(
        "--dtype",
        metavar="TYPE",
        help="type of the weights: float32 (the master weights, where there are any) or bfloat16 "
        "(default: the model's)",
    )
    export.add_argument(
        "--tokenizer", metavar="FOLDER", help="default: the tokenizer that the checkpoint keeps"
    )
    export.add_argument(
        "--push", metavar="REPO", help="upload it to the Hugging Face hub, as NAME/MODEL"
    )
    export.add_argument("--private", action="store_true", help="make that repository a private one")
    importing = commands.add_parser("import", help="make a checkpoint of a Hugging Face folder")
    imports = importing.add_subparsers(dest="import_command", required=True, metavar="FORMAT")
    imported = command(imports, "hf", _import_hf, "make a checkpoint of a model folder")
    imported.add_argument(
        "folder", metavar="FOLDER", help="a folder with config.json and safetensors, or a .gguf"
    )
    imported.add_argument("out", metavar="OUT_CHECKPOINT", help="folder of the new checkpoint")
    imported.add_argument(
        "--allow", action="append", default=[], metavar="KEY",
        help="pass over this key of config.json (or of a GGUF), which the family does not have; "
        "may be given several times",
    )  # fmt: skip
