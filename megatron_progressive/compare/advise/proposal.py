"""The pilot that would tell: a grid of small runs in the plan's regime, written out.

It has the plan's family, optimizer, schedule, corpus and tokens a parameter, its way of growing
and two others that stand well elsewhere, both controls and several seeds; the model is the family's
``tiny`` one, as wide as makes it at most :data:`SMALLEST` times smaller than the plan's.
"""

from __future__ import annotations

import math
import textwrap
from dataclasses import asdict, fields
from typing import Any

import yaml

from megatron_progressive.compare.advise.distance import number_text, size_text
from megatron_progressive.compare.advise.regime import Growth, Regime
from megatron_progressive.config import RunConfig, from_dict
from megatron_progressive.cost.flops import step_tokens
from megatron_progressive.models import active_parameter_count, model_shape

LAYERS = 8
SMALLEST = 5_000
"""A pilot that is smaller than that would not be near (:mod:`.distance`), by its size alone."""
SEEDS = [1, 2, 3]
_FOLDER = "studies"
_WIDTH, _HEADS = 48, 4
"""The least width, which is doubled until the pilot is large enough, and its heads."""
_MOST_WIDTH = 3072
_SAMPLES, _LENGTH, _VOCABULARY = 16, 128, 512
_BYTES_PER_TOKEN = 4  # of a vocabulary of 512: some 2, so that the corpus is not read twice
_VALIDATIONS = 50
_EVAL_SAMPLES = 1600
_KEPT_AWAY = ("rewarm", "rewarm_from", "rewarm_layers")


def pilot_folder(name: str) -> str:
    """The folder of the pilot's study, of a run called ``name``."""
    return f"{_FOLDER}/{_study(name)}"


def _study(name: str) -> str:
    return f"{name[:80]}_pilot"


def pilot_grid(config: RunConfig, regime: Regime) -> str:
    """The pilot as the text of a grid file, which ``mprog grid plan`` prices."""
    model, params, steps = _sized(config, regime)
    schedule = _set(config.schedule)
    knobs = {key: [schedule.pop(key)] for key in _KEPT_AWAY if key in schedule}
    own = regime.growth if regime.growth and regime.growth.depths[0] else None
    insert, init = ([own.insert], [own.init]) if own else ([], [])
    if config.expansion and config.expansion[-1].optimizer_state != "inherit":
        knobs["optimizer_state"] = [config.expansion[-1].optimizer_state]
    every = max(1, steps // _VALIDATIONS)
    tokens = steps * _SAMPLES * _LENGTH
    values = {
        "study": {"name": _study(config.run.name), "dir": _FOLDER},
        "run": {
            "model": model,
            "data": _data(config, tokens),
            "train": {
                "steps": steps, "global_batch": _SAMPLES, "micro_batch": _SAMPLES,
                "eval_every": every, "eval_samples": _EVAL_SAMPLES, "save_every": 10 * every,
            },
            "optim": _set(config.optim, ("name", "lr", "weight_decay")),
            "schedule": {"name": config.schedule.name, **schedule},
        },
        "sizes": [{"name": f"w{model['hidden_size']}", "to_layers": LAYERS}],
        "arms": _arms(regime.growth),
        "tau": _taus(regime.growth),
        "init": list(dict.fromkeys([*init, "copying"])),
        "expansion": {"insert": list(dict.fromkeys([*insert, "middle"])), **knobs},
        "seeds": SEEDS,
    }  # fmt: skip
    size = f"{size_text(regime.params / params)} than {config.run.name}"
    size = size.replace("as large than", "as large as")
    told = (
        f"{config.model.family} at {number_text(regime.tokens_per_param or 0.0)} tokens a "
        f"parameter, {size}: does growing end below both controls of equal FLOPs? "
        f"{number_text(tokens / 1e6)}M tokens a run of fixed size."
    )
    if config.data.corpus == "stdlib":
        told += " Of the sources of packages, since those of the standard library would repeat."
    head = textwrap.fill(told, 98, initial_indent="# ", subsequent_indent="# ") + "\n"
    lines = [
        yaml.safe_dump({key: value}, sort_keys=False, default_flow_style=None, width=92)
        for key, value in values.items()
    ]
    return head + "".join(lines)


def _sized(config: RunConfig, regime: Regime) -> tuple[dict[str, Any], int, int]:
    """The model, its parameters at full depth that one token is computed with, and the steps that
    give each of these as many tokens as the plan does."""
    assert regime.tokens_per_param is not None
    width = _WIDTH
    while True:
        heads = _HEADS * width // _WIDTH
        model = {"family": config.model.family, "preset": "tiny", "hidden_size": width,
                 "num_attention_heads": heads}  # fmt: skip
        if config.model.mup:
            model["mup"] = True
        data = {"vocab_size": _VOCABULARY, "sequence_length": _LENGTH}
        small = from_dict({"model": model, "data": data, "train": {"global_batch": _SAMPLES}})
        shape = model_shape(small, LAYERS)
        params = active_parameter_count(shape)
        if params * SMALLEST >= regime.params or 2 * width > _MOST_WIDTH:
            steps = math.ceil(regime.tokens_per_param * params / step_tokens(shape, small))
            return model, params, max(100, steps)
        width *= 2


def _data(config: RunConfig, tokens: int) -> dict[str, Any]:
    """The plan's corpus under a small vocabulary, as much of it as the runs read."""
    corpus = "packages" if config.data.corpus == "stdlib" else config.data.corpus
    found = {"corpus": corpus, "tokenizer": "bpe", "vocab_size": _VOCABULARY,
             "sequence_length": _LENGTH}  # fmt: skip
    if config.data.text_field != "text":
        found["text_field"] = config.data.text_field
    if corpus != "packages":
        found["max_bytes"] = _BYTES_PER_TOKEN * tokens
    return found


def _set(section: Any, always: tuple[str, ...] = ()) -> dict[str, Any]:
    """The fields of a section that differ from their defaults, and those that are always told."""
    values = asdict(section)
    return {
        one.name: values[one.name]
        for one in fields(section)
        if one.name in always or (one.name != "name" and values[one.name] != one.default)
    }


def _arms(growth: Growth | None) -> list[str]:
    """The plan's way of growing at the pilot's depth, half of the depth, doubling twice, and the
    controls."""
    found = []
    if growth is not None and growth.depths[0] == 0:
        found.append("multi_stage" if len(growth.taus) > 1 else "zero_layer")
    elif growth is not None and growth.factor is not None and len(growth.taus) == 1:
        source = min(LAYERS - 1, max(1, round(LAYERS / growth.factor)))
        found.append("one_layer" if source == 1 else f"{source}_layers")
    found += [f"{LAYERS // 2}_layers", "gradual_stack"]
    return list(dict.fromkeys(["fixed", *found, "short_control", "never_grown"]))


def _taus(growth: Growth | None) -> list[float]:
    """The plan's last τ, and the half of the steps."""
    own = [] if growth is None else [growth.taus[-1]]
    return sorted({0.5, *own})
