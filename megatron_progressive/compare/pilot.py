"""The pilot: two short runs that measure the mixing time, and with it τ. What they are, and what
they say.

One run is fixed-size, the other progressive with its expansion at the end of the warmup: the mixing
time depends neither on τ nor on the source's depth as long as the learning rate is constant (arXiv
2511.04981). Both have the schedule of the whole run and stop early, before its decay. Where the
warmup is so short that the source has not fallen behind by its end, a later expansion can be asked
for.
"""

from __future__ import annotations

import json
import math
import shlex
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from megatron_progressive.compare.mixing import (
    CONSECUTIVE,
    MixingTime,
    Proposal,
    TrainReading,
    mixing_time,
    propose,
)
from megatron_progressive.config import ConfigError, RunConfig
from megatron_progressive.config.places import check_run_name
from megatron_progressive.cost.flops import total_flops
from megatron_progressive.data import DataIdentity, differ
from megatron_progressive.optim.schedule import decay_steps, warmup_steps
from megatron_progressive.plan.controls import fixed_size
from megatron_progressive.runs.reading import Run, read_run
from megatron_progressive.runtime.files import write_json
from megatron_progressive.runtime.text import flops_text, short_counts

PILOT_FILE = "pilot.json"

SHARE = 0.25
"""The share of the run's steps after which a pilot stops by default."""

_EVERY = 0.005
"""The largest share of the run's steps that lies between two validations of a pilot."""

_LEAST = 20
"""The fewest steps after the expansion that say anything."""


@dataclass(frozen=True)
class Pilot:
    """The two runs of a pilot, and the folder for its findings."""

    fixed: RunConfig
    progressive: RunConfig
    folder: Path

    @property
    def files(self) -> list[tuple[RunConfig, Path]]:
        """Each run, and the file to which its configuration is written."""
        names = ("fixed", "progressive")
        arms = (self.fixed, self.progressive)
        return [(arm, self.folder / f"{name}.yaml") for arm, name in zip(arms, names, strict=True)]


def plan_pilot(config: RunConfig, steps: float | None = None, at: float | None = None) -> Pilot:
    """The two runs that measure the mixing time of ``config``.

    Args:
        steps: where the two runs stop: a fraction of the run's steps below 1, or a step (default:
            :data:`SHARE`).
        at: where the progressive run is expanded, in the same form (default: the end of the
            warmup).

    Raises:
        ConfigError: the run has not exactly one expansion, its schedule has no stable phase, or it
            has a stop of its own; ``at`` lies outside of the stable phase, or ``steps`` too soon
            after ``at`` or beyond that phase; or the run's name leaves no room for those of the
            pilot.
    """
    if len(config.expansion) != 1:
        raise ConfigError(
            f"expansion: got {len(config.expansion) or 'none'}; accepted: one, whose mixing time "
            f"is measured"
        )
    if config.schedule.name != "wsd":
        raise ConfigError(
            f"schedule.name: got {config.schedule.name}; accepted: wsd (the mixing time depends on "
            f"τ under the others)"
        )
    if config.train.stop_after is not None:
        raise ConfigError(
            f"train.stop_after: got {config.train.stop_after}; accepted: none (--steps says where "
            f"the pilot stops)"
        )
    # Closer validations change no weights and say more exactly when the losses meet. They must
    # not depend on where the pilot stops, or it could not go on.
    every = min(config.train.eval_every, max(1, round(_EVERY * config.train.steps)))
    least = max(_LEAST, (CONSECUTIVE + 1) * every)
    tau = _expansion_step(at, least, config)
    stop = _stop(SHARE if steps is None else steps, tau, least, config)
    train = replace(config.train, stop_after=stop, eval_every=every)
    name = config.run.name + "_pilot"
    # the fixed-size run serves any τ
    grown = name if at is None else f"{name}_at{tau}"
    expansion = [replace(config.expansion[0], at=float(tau))]
    fixed = fixed_size(config)
    check_run_name("run.name of a pilot", f"{grown}_progressive")
    return Pilot(
        replace(fixed, run=replace(config.run, name=f"{name}_fixed"), train=train),
        replace(
            config, run=replace(config.run, name=f"{grown}_progressive"), train=train,
            expansion=expansion,
        ),
        Path(config.run.dir) / grown,
    )  # fmt: skip


def _step_of(share_or_step: float, total: int) -> float:
    return round(share_or_step * total) if 0 < share_or_step < 1 else share_or_step


def _got(share_or_step: float, total: int) -> str:
    step = f" (step {_step_of(share_or_step, total)} of {total})" if 0 < share_or_step < 1 else ""
    return f"{share_or_step:g}{step}"


def _expansion_step(at: float | None, least: int, config: RunConfig) -> int:
    first, total = max(1, warmup_steps(config)), config.train.steps
    last = total - decay_steps(config) - least
    if at is None or last < first:  # no room for any: _stop says so
        return first
    step = _step_of(at, total)
    if not (math.isfinite(step) and step == int(step) and first <= step <= last):
        raise ConfigError(
            f"--at: got {_got(at, total)}; accepted: a fraction below 1, or a step, from {first} "
            f"(the end of the warmup) to {last} ({least} before the decay)"
        )
    return int(step)


def _stop(steps: float, tau: int, least: int, config: RunConfig) -> int:
    total, last_stable = config.train.steps, config.train.steps - decay_steps(config)
    if last_stable < tau + least:
        raise ConfigError(
            f"train.steps: got {total}, whose stable phase has {max(0, last_stable - tau)} steps; "
            f"accepted: enough for {least} of them"
        )
    stop = _step_of(steps, total)
    if not (math.isfinite(stop) and stop == int(stop) and tau + least <= stop <= last_stable):
        raise ConfigError(
            f"--steps: got {_got(steps, total)}; accepted: a fraction below 1, or a step, from "
            f"{tau + least} ({least} after the expansion at step {tau}) to {last_stable} (before "
            f"the decay)"
        )
    return int(stop)


def measure(config: RunConfig, pilot: Pilot) -> tuple[MixingTime, Proposal | None]:
    """What the two finished runs say of ``config``, which is also written as ``pilot.json`` and
    ``mixing.png`` into the pilot's folder (created).

    Raises:
        ConfigError: a run is not there or cannot be read, or the runs are on different data.
    """
    progressive, fixed = (read_run(arm.folder) for arm in (pilot.progressive, pilot.fixed))
    if differ(progressive.trained_on, fixed.trained_on):
        raise ConfigError(
            f"RUN: {progressive.folder} and {fixed.folder} were trained on different data; "
            "accepted: a pilot on one (delete one of them to run it anew)"
        )
    mixing = mixing_time(progressive, fixed)
    proposal = propose(config, mixing, progressive.step_tokens)
    pilot.folder.mkdir(parents=True, exist_ok=True)
    _write(pilot, progressive, fixed, mixing, proposal)
    return mixing, proposal


def recorded(pilot: Pilot, trained_on: DataIdentity | None = None) -> MixingTime | None:
    """The mixing time in the pilot's ``pilot.json``. None where there is none of these two runs,
    where it is of runs that stopped earlier, or where their data is not ``trained_on``."""
    path = pilot.folder / PILOT_FILE
    if not path.is_file():
        return None
    values = json.loads(path.read_text())
    same = Path(values["progressive"]).name == pilot.progressive.run.name
    if not same or values["stop_after"] < pilot.fixed.last_step:
        return None
    if differ(DataIdentity.from_values(values.get("trained_on")), trained_on):
        return None
    mixing = values["mixing"]
    if mixing["gap_left_percent"] is None:  # not a number: a run had diverged
        mixing["gap_left_percent"] = math.nan
    return MixingTime(**{**mixing, "train": TrainReading(**mixing["train"])})


def tau_words(tau: int) -> list[str]:
    """The ``key=value`` words that expand a run after step ``tau``."""
    return [f"expansion.0.at={tau}"]


def _write(
    pilot: Pilot, progressive: Run, fixed: Run, mixing: MixingTime, proposal: Proposal | None
) -> None:
    from megatron_progressive.compare.figures import mixing_curve

    trained_on = progressive.trained_on or fixed.trained_on
    words = tau_words(proposal.tau) if proposal is not None and proposal.tau is not None else []
    write_json(
        pilot.folder / PILOT_FILE,
        {
            "progressive": str(progressive.folder),
            "fixed": str(fixed.folder),
            "stop_after": pilot.fixed.last_step,
            "trained_on": None if trained_on is None else trained_on.to_values(),
            "tokens": mixing.tokens,
            "mixing": asdict(mixing),
            "proposal": None if proposal is None else asdict(proposal),
            "words": words,
        },
    )
    mixing_curve(mixing, progressive, fixed, headline(mixing), pilot.folder / "mixing.png")


def _tokens(steps: int, mixing: MixingTime) -> str:
    count = short_counts([steps * mixing.tokens_per_step])[0]
    return f"{count} {mixing.unit} ({steps:,} steps)"


def headline(mixing: MixingTime) -> str:
    """The finding of a pilot in one line."""
    if mixing.steps is None:
        return (
            f"Not mixed within {_tokens(mixing.steps_after, mixing)} after the expansion: still "
            f"{mixing.gap_left_percent:.2f} % above fixed-size"
        )
    return f"Mixed {_tokens(mixing.steps, mixing)} after the expansion"


def reservation(mixing: MixingTime) -> str:
    """Why the finding says little of a later expansion; empty where nothing speaks against it."""
    if mixing.steps is None or not mixing.level_before:
        return ""
    return (
        f"the source had not fallen behind fixed-size when it was expanded "
        f"({mixing.gap_before_percent:+.2f} % at step {mixing.tau:,}), so this is the recovery "
        f"from the expansion, not catching up"
    )


def render(
    config: RunConfig, pilot: Pilot, mixing: MixingTime, proposal: Proposal | None
) -> list[str]:
    """The finding of a pilot, as lines for the terminal."""
    cost = total_flops(pilot.fixed) + total_flops(pilot.progressive)
    share = 100 * cost / total_flops(config)
    lines = [
        f"{headline(mixing)}.",
        f"  pilot     {pilot.fixed.last_step:,} of {config.train.steps:,} steps, expanded after "
        f"step {mixing.tau:,}; {flops_text(cost)} FLOPs, {share:.0f} % of the run's",
        f"  met       validation loss at most {mixing.threshold_percent:g} % above fixed-size's, "
        f"{mixing.consecutive} times in a row;",
        f"            training losses averaged over {mixing.train.window_steps} steps",
    ]
    if mixing.low is None or proposal is None:
        lines.append(
            f"  τ         none follows: t_mix is above {_tokens(mixing.steps_after, mixing)}; "
            f"--steps runs on"
        )
    else:
        high = "open: beyond the pilot" if mixing.high is None else _tokens(mixing.high, mixing)
        lines.append(f"  interval  95 %: from {_tokens(mixing.low, mixing)} to {high}")
        if mixing.low == 0:
            lines.append(
                f"            hardly ever more than {mixing.threshold_percent:g} % apart: they mix "
                f"between two validations,"
            )
            lines.append("            or had learnt too little at the expansion to differ")
        lines += _tau_lines(proposal)
    if doubt := reservation(mixing):
        lines.append(f"  but       {doubt};")
        lines.append("            a later τ needs longer, and --at measures how long")
    lines.append(f"  written   {pilot.folder}: pilot.json, mixing.png")
    return lines


def _tau_lines(proposal: Proposal) -> list[str]:
    found = f"last stable step {proposal.last_stable:,} - {proposal.mixing_steps:,} steps"
    if proposal.tau is None:
        return [f"  τ         none follows: {found} is not after the warmup; a longer run would"]
    lines = [f"  τ         {found}:", f"            {shlex.join(tau_words(proposal.tau))}"]
    if proposal.earliest is not None and proposal.earliest < proposal.tau:
        words = shlex.join(tau_words(proposal.earliest))
        lines.append(f"            {words} for the upper end of the interval")
    return lines
