"""The model card of an export: what the checkpoint, its run folder and its evaluations say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_progressive import __version__
from megatron_progressive.checkpoints.checkpoint import TrainingPosition, read_description
from megatron_progressive.checkpoints.record import ModelRecord
from megatron_progressive.config import CONFIG_FILE, ConfigError, RunConfig, load
from megatron_progressive.evaluation.results import (
    HEADER,
    Score,
    checksum_of,
    read_results,
    results_folder,
    rows,
    run_of,
    scores_of,
)
from megatron_progressive.huggingface.folder import CARD_TAG
from megatron_progressive.models import parameter_count
from megatron_progressive.models.base import TransformerShape
from megatron_progressive.runs.files import finite, read_metrics
from megatron_progressive.runtime.text import flops_text

_MOST_LOSSES = 12
"""The most validations that a card has; the last one is always among them."""


@dataclass(frozen=True)
class _Known:
    """What is known of a checkpoint."""

    name: str
    position: TrainingPosition
    model: ModelRecord
    shape: TransformerShape
    config: RunConfig | None
    """None for a checkpoint without a run."""
    events: list[dict[str, Any]]
    results: list[dict[str, Any]]
    """The evaluations of this checkpoint."""


def model_card(checkpoint: Path, name: str) -> str:
    """The text of a ``README.md`` for the export of a language model's checkpoint.

    Paths of this machine are not in it: of a corpus it has the name and the fingerprint.

    Args:
        checkpoint: a whole checkpoint.
        name: what the model is called.

    Raises:
        ConfigError: there is no checkpoint.
    """
    known = _known(checkpoint, name)
    parts = [_header(known), f"# {name}", _sentence(known), *_sections(known)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _known(checkpoint: Path, name: str) -> _Known:
    position, model = read_description(checkpoint)
    assert isinstance(model.shape, TransformerShape)
    run, config = run_of(checkpoint), None
    if run is not None:
        try:
            config = load(run / CONFIG_FILE, resolved=True)
        except ConfigError:  # of another version: the card goes without
            config = None
    events = [] if run is None else read_metrics(run).events
    now = checksum_of(checkpoint)
    results = [
        found
        for found in read_results(results_folder(checkpoint))
        if (found.get("checkpoint") or {}).get("checksum") == now
    ]
    reached = [event for event in events if event.get("step", 0) <= position.step]
    return _Known(name, position, model, model.shape, config, reached, results)


def _header(known: _Known) -> str:
    """The metadata that the hub reads."""
    from huggingface_hub import EvalResult, ModelCardData

    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=score.task,
            dataset_name=score.task,
            metric_type=score.metric,
            metric_value=score.value,
        )
        for found in known.results
        for score in scores_of(found)
    ]
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["megatron_progressive", CARD_TAG],
        model_name=known.name if results else None,
        eval_results=results or None,
    )
    return f"---\n{data.to_yaml()}\n---"


def _sentence(known: _Known) -> str:
    grown = [layers for _, layers in known.model.depth_history]
    growth = f" It grew in depth while it was trained: {' → '.join(map(str, grown))} layers."
    trained = f"trained for {known.position.step:,} steps" if known.position.step else "not trained"
    return (
        f"A language model of family {known.shape.family} with "
        f"{parameter_count(known.shape):,} parameters, {trained} with megatron_progressive "
        f"{__version__}.{growth if len(grown) > 1 else ''}"
    )


def _sections(known: _Known) -> list[str]:
    shape = known.shape
    model = [
        ("layers", str(shape.num_layers)),
        ("hidden size", str(shape.hidden_size)),
        ("attention heads", f"{shape.num_attention_heads} ({shape.num_query_groups} of keys)"),
        ("vocabulary", f"{shape.vocab_size:,}"),
        ("sequence length", f"{shape.sequence_length:,}"),
    ]
    parts = ["## Model", _table(("", ""), model)]
    if known.position.step:
        parts += ["## Training", _table(("", ""), _training(known))]
    parts += [_imported(known), *_depths(known), *_losses(known), *_tasks(known)]
    use = (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'model = AutoModelForCausalLM.from_pretrained("{known.name}")\n'
        f'tokenizer = AutoTokenizer.from_pretrained("{known.name}")'
    )
    return [*parts, "## Use", f"```python\n{use}\n```"]


def _training(known: _Known) -> list[tuple[str, str]]:
    position, model, config = known.position, known.model, known.config
    tokens = position.samples * known.shape.sample_units
    facts = [("steps", f"{position.step:,}"), ("tokens", f"{tokens:,}"),
             ("FLOPs", flops_text(position.flops))]  # fmt: skip
    if model.data is not None:
        corpus = model.data.corpus
        shown = corpus if corpus.startswith("hf:") else Path(corpus).name
        facts.append(("data", f"{shown} (content {model.data.fingerprint[:12]})"))
    facts.append(("optimizer", model.optimizer))
    if config is not None:
        facts += [("peak learning rate", f"{config.optim.lr:g}, {config.schedule.name}"),
                  ("global batch", f"{config.train.global_batch} samples")]  # fmt: skip
    return [*facts, ("precision", model.precision), ("seed", str(model.seed))]


def _imported(known: _Known) -> str:
    start = known.model.imported
    if start is None and known.config is not None and known.config.run.init_from is not None:
        try:
            start = read_description(Path(known.config.run.init_from))[1].imported
        except ConfigError:  # gone since
            return f"It started from the checkpoint {Path(known.config.run.init_from).name}."
    if start is None:
        return ""
    without = ", ".join(start.get("allowed", {}))
    passed = f"; passed over: {without}" if without else ""
    return f"It started from weights imported from {start['from']}{passed}."


def _depths(known: _Known) -> list[str]:
    history = known.model.depth_history
    if len(history) < 2:
        return []
    grown = {event["step"]: event for event in known.events if event["event"] == "expansion"}
    lines = []
    for step, layers in history:
        event = grown.get(step, {}) if step else {}
        before, after = finite(event.get("loss_before")), finite(event.get("loss_after"))
        change = "" if before is None or after is None else f"{before:.4f} → {after:.4f}"
        how = event.get("init", "" if step else "from the start")
        lines.append((f"{step:,}", str(layers), str(how), change))
    head = ("after step", "layers", "new layers' weights", "validation loss")
    return ["## Depth", _table(head, lines)]


def _losses(known: _Known) -> list[str]:
    found = [
        (event["step"], loss)
        for event in known.events
        if event["event"] == "eval" and (loss := finite(event.get("loss"))) is not None
    ]
    if not found:
        return []
    every = -(-len(found) // _MOST_LOSSES)
    shown = found[::-1][::every][::-1]
    lines = [(f"{step:,}", f"{loss:.4f}") for step, loss in shown]
    return ["## Validation loss (nats per token)", _table(("step", "loss"), lines)]


def _tasks(known: _Known) -> list[str]:
    scores: list[Score] = [score for found in known.results for score in scores_of(found)]
    if not scores:
        return []
    versions = sorted({f"{name} {version}" for found in known.results
                       for name, version in found.get("versions", {}).items()
                       if name == "lm_eval"})  # fmt: skip
    harness = f"By lm-evaluation-harness ({', '.join(versions)})."
    return ["## Downstream tasks", harness, _table(HEADER, rows(known.results))]


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    cells = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(text.replace("|", "\\|") for text in line) + " |"
                     for line in cells)  # fmt: skip
