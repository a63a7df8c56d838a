"""What the arms of a run decide, on run folders with made-up curves (``synthetic``)."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from scipy.stats import ttest_1samp

from megatron_progressive.compare.judged import Report
from megatron_progressive.compare.report import (
    make_report,
)
from megatron_progressive.cost.flops import step_flops, total_flops
from megatron_progressive.models import model_shape
from megatron_progressive.plan.controls import fixed_size, never_grown, short_control
from tests.runs.synthetic import four_arms, progressive_config, with_seed, write_run


def test_verdict_is_the_arithmetic_of_the_arms(
    losing: tuple[dict[str, Path], Path, Report],
) -> None:
    arms, _, report = losing
    (verdict,) = report.verdicts
    config = progressive_config(arms["progressive"].parent)
    assert [row.arm for row in report.rows] == [
        "progressive", "fixed-size", "short control", "never-grown",
    ]  # fmt: skip
    assert report.complete
    assert verdict.speedup_flops == pytest.approx(
        total_flops(fixed_size(config)) / total_flops(config)
    )
    assert verdict.loss_gap_percent == pytest.approx(2.0)
    assert verdict.short_gap_percent == pytest.approx(100 * (2.55 / 2.525 - 1))
    assert verdict.never_gap_percent == pytest.approx(100 * (2.55 / 2.7 - 1))
    assert verdict.outcome == "open"  # one seed
    walls = {
        arm: json.loads((folder / "summary.json").read_text())["train_wall_s"]
        for arm, folder in arms.items()
    }
    pause = 0.5  # of the expansion event, which train_wall_s leaves out
    assert verdict.speedup_wall == pytest.approx(walls["fixed"] / (walls["progressive"] + pause))


# "whether growing pays at equal FLOPs is open" decides nothing
VERDICTS = re.compile(
    r"\b(pays|does not pay|wins?|loses?|beats?)\b(?! at equal FLOPs is open)", re.IGNORECASE
)


def test_one_seed_is_told_with_its_number_and_decides_nothing(
    losing: tuple[dict[str, Path], Path, Report],
) -> None:
    _, out, report = losing
    page = (out / "report.html").read_text()
    for text in (report.verdicts[0].verdict, page):
        assert "At equal FLOPs it ends 0.99 % above the short control" in text
        assert "Whether growing pays at equal FLOPs is open" in text
        assert "against the short control: +0.99 % (one seed" in text
        assert "against the source never grown: -5.56 % (one seed" in text
        assert "At equal FLOPs it ends 5.6 % below 0 layers that never grow" in text
        assert "did not mix" in text
        assert not VERDICTS.findall(text)
    assert (
        "0.99 % above the short control and 5.6 % below the source never grown: open (1 pair)"
        in report.title
    )


@pytest.mark.parametrize("end", [2.5, 2.59987, 2.6, 2.7])
def test_no_size_of_a_difference_is_enough_for_one_seed(tmp_path: Path, end: float) -> None:
    arms = four_arms(tmp_path / "runs", {"progressive": end, "fixed": 2.5, "short": 2.6})
    report = make_report(list(arms.values()), tmp_path / "out")
    verdict = report.verdicts[0]
    assert verdict.outcome == "open"
    for text in (verdict.verdict, report.title, (tmp_path / "out" / "report.html").read_text()):
        assert not VERDICTS.findall(text), text
    gap = 100 * (end / 2.6 - 1)
    assert f"{gap:+.2f} % (one seed" in verdict.verdict


LOWER, LEVEL, HIGHER = [2.50, 2.51, 2.49, 2.52], [2.57, 2.62, 2.56, 2.60], [2.66, 2.68, 2.65, 2.67]
"""Losses of four seeds below, level with and above those of the controls."""


CONTROL_LOSSES = [2.6, 2.61, 2.59, 2.62]
"""They differ more between seeds than runs do from their own."""


@pytest.mark.parametrize(
    ("ends", "never", "outcome"),
    [
        (LOWER, 1.01, "pays"),  # below both
        (LOWER, 0.9, "does not pay"),  # below the short control alone
        (HIGHER, 1.1, "does not pay"),  # below the source alone
        (LEVEL, 1.1, "open"),
        (HIGHER, 0.9, "does not pay"),
        (LOWER, None, "open"),  # the source was not trained
        (HIGHER, None, "does not pay"),
    ],
)
def test_seeds_decide_by_the_paired_differences_to_both_controls(
    tmp_path: Path, ends: list[float], never: float | None, outcome: str
) -> None:
    config = progressive_config(tmp_path / "runs")
    folders = []
    for seed, (end, short) in enumerate(zip(ends, CONTROL_LOSSES, strict=True), 1):
        seeded = with_seed(config, seed)
        folders += [write_run(seeded, end), write_run(short_control(seeded), short)]
        if never is not None:
            folders += [write_run(c, never * short) for c in never_grown(seeded)]
    report = make_report(folders, tmp_path / "out")
    for factor, index in ((1.0, 0), (never, 1)):
        if factor is None:
            continue
        pairs = zip(ends, CONTROL_LOSSES, strict=True)
        gaps = [100 * (end / (factor * loss) - 1) for end, loss in pairs]
        low, high = ttest_1samp(gaps, 0).confidence_interval(0.95)
        for verdict in report.verdicts:
            against = verdict.controls[index]
            assert against.values == pytest.approx(gaps)
            assert (against.low, against.high) == pytest.approx((low, high))
            said = "below" if high < 0 else "not below" if low > 0 else "open"
            assert against.outcome == said
            needed = f"over 4 pairs; {against.pairs_needed} needed for 80 % power at a spread of "
            assert needed in verdict.verdict
    assert {verdict.outcome for verdict in report.verdicts} == {outcome}
    words = f"Growing {outcome} at equal FLOPs" if outcome != "open" else "is open"
    assert words in report.verdicts[0].verdict
    lacking = "" if never is not None else ", without the source never grown"
    assert f": {outcome} (4 pairs{lacking})" in report.title
    if never is None:
        for text in (report.verdicts[0].verdict, (tmp_path / "out" / "report.html").read_text()):
            assert "Growing pays" not in text
            assert "no never-grown run of 0 layers (not among the runs)" in text


def test_of_a_run_in_stages_the_best_source_counts(tmp_path: Path) -> None:
    """It ends below the two-layer source and above the four-layer one."""
    config = progressive_config(tmp_path / "runs")
    first = replace(config.expansion[0], at=0.3, to_layers=4)
    stages = [first, replace(config.expansion[0], at=0.6, to_layers=8)]
    config = replace(config, model=replace(config.model, num_layers=2), expansion=stages)
    folders = []
    for seed in (1, 2, 3):
        seeded = with_seed(config, seed)
        two, four = never_grown(seeded)
        assert (two.model.num_layers, four.model.num_layers) == (2, 4)
        end = 2.5 + 0.001 * seed
        folders += [write_run(seeded, end), write_run(short_control(seeded), 1.05 * end + 0.01)]
        folders += [write_run(two, 1.04 * end + 0.01 * seed)]
        if seed != 2:
            folders += [write_run(four, 0.97 * end - 0.001 * seed)]
    report = make_report(folders, tmp_path / "out")
    first_verdict = report.verdicts[0]
    assert "% above 4 layers that never grow" in first_verdict.verdict
    assert "% below 2 layers that never grow" in first_verdict.verdict
    _, never = first_verdict.controls
    assert never.values[0] > 0 > never.values[1]
    assert never.lacking == ["seed 2: tiny_seed1_never_grown_4 has seed 1"]
    # two-layer sources alone are no proof, though each is undercut
    left = [f for f in folders if not f.name.endswith("never_grown_4")]
    report = make_report(left, tmp_path / "left")
    verdict = report.verdicts[0]
    words = "no never-grown run of 4 layers"
    assert verdict.controls[1].lacking == [f"seed {seed}: {words}" for seed in (1, 2, 3)]
    assert [f"no {m.words}" for m in report.missing if m.arm == "never-grown"] == [words] * 3
    assert verdict.controls[1].high is not None
    assert verdict.controls[1].high < 0
    assert verdict.outcome == "open"


def test_pairs_have_one_seed_and_one_set_of_validation_samples(tmp_path: Path) -> None:
    config = progressive_config(tmp_path / "runs")
    folders = []
    for seed in (1, 2, 3):
        folders.append(write_run(with_seed(config, seed), 2.4 + seed / 100))
    short = short_control(config)
    folders.append(write_run(short, 2.6))  # of seed 1 only
    other = with_seed(short, 3)
    other = replace(other, train=replace(other.train, eval_samples=64))
    folders.append(write_run(other, 2.6))
    verdict = make_report(folders, tmp_path / "out").verdicts[0]
    control, never = verdict.controls
    assert control.seeds == [1]
    assert never.mean is None
    assert verdict.outcome == "open"
    assert "left out seed 2: tiny_short" in verdict.verdict.replace("_seed3", "")
    assert "is validated on other samples" in verdict.verdict


def test_seeds_that_diverged_are_not_forgotten(tmp_path: Path) -> None:
    config = progressive_config(tmp_path / "runs")
    folders = []
    for seed in (1, 2, 3, 4):
        seeded = with_seed(config, seed)
        folders += [write_run(seeded, 2.4 + seed / 100), write_run(short_control(seeded), 2.6)]
    summary = json.loads((folders[0] / "summary.json").read_text())
    summary["final_eval_loss"] = None
    (folders[0] / "summary.json").write_text(json.dumps(summary))
    metrics = folders[0] / "metrics.jsonl"
    events = [json.loads(line) for line in metrics.read_text().splitlines()]
    next(e for e in reversed(events) if e["event"] == "eval")["loss"] = None
    metrics.write_text("".join(json.dumps(event) + "\n" for event in events))
    verdict = make_report(folders, tmp_path / "out").verdicts[-1]
    assert verdict.controls[0].high is not None
    assert verdict.controls[0].high < 0
    assert verdict.outcome == "open"
    assert "left out seed 1: it diverged" in verdict.verdict


def test_mixing_is_told_with_its_number(tmp_path: Path) -> None:
    arms = four_arms(tmp_path / "runs", {"progressive": 2.5, "fixed": 2.5, "short": 2.6})
    verdict = make_report(list(arms.values()), tmp_path / "out").verdicts[0]
    assert verdict.mixing is not None
    assert verdict.mixing.mixed
    assert "It mixed within 0.5 %" in verdict.verdict


def test_equal_loss_says_where_fixed_size_got_there_and_its_learning_rate(tmp_path: Path) -> None:
    arms = four_arms(tmp_path / "runs", {"progressive": 2.9, "fixed": 2.5, "short": 2.6})
    verdict = make_report(list(arms.values()), tmp_path / "out").verdicts[0]
    evals = [
        event
        for line in (arms["fixed"] / "metrics.jsonl").read_text().splitlines()
        if (event := json.loads(line))["event"] == "eval"
    ]
    first = next(event for event in evals if event["loss"] <= 2.9)
    total = json.loads((arms["progressive"] / "summary.json").read_text())["total_flops"]
    assert verdict.equal_loss is not None
    assert verdict.equal_loss.step == first["step"] < 270  # before the decay
    assert verdict.equal_loss.compute_ratio == pytest.approx(first["flops"] / total)
    assert "has not decayed there" in verdict.verdict
    assert "Failure signature: final loss >= 5 % worse" in verdict.verdict


def test_mixing_time_is_counted_in_tokens_after_tau(tmp_path: Path) -> None:
    config = progressive_config(tmp_path / "runs")
    fixed, ours = write_run(fixed_size(config), 2.5), write_run(config, 2.5)
    lines = [json.loads(line) for line in (fixed / "metrics.jsonl").read_text().splitlines()]
    same = {event["step"]: event["loss"] for event in lines if event["event"] == "eval"}
    events = []
    for line in (ours / "metrics.jsonl").read_text().splitlines():
        event = json.loads(line)
        if event["event"] == "eval":  # level at the start, at τ and once after
            step = event["step"]
            event["loss"] = same[step] * (1.004 if step >= 270 else 1.01)
            event["loss"] = same[step] if step < 40 or step in (240, 250) else event["loss"]
        events.append(json.dumps(event) + "\n")
    (ours / "metrics.jsonl").write_text("".join(events))
    mixing = make_report([ours, fixed], tmp_path / "out").verdicts[0].mixing
    assert mixing is not None
    assert mixing.tokens == (270 - 240) * config.train.global_batch * 128


def test_seeds_are_paired_and_summarised(tmp_path: Path) -> None:
    config = progressive_config(tmp_path / "runs")
    folders = []
    for seed, ours, theirs in ((1, 2.525, 2.5), (2, 2.58, 2.51)):
        seeded = with_seed(config, seed)
        runs = ((seeded, ours), (fixed_size(seeded), theirs))
        folders += [write_run(run, loss, content="a") for run, loss in runs]
    report = make_report(folders, tmp_path / "out")
    gaps = [verdict.loss_gap_percent for verdict in report.verdicts]
    assert gaps == pytest.approx([1.0, 100 * (2.58 / 2.51 - 1)])
    found = ttest_1samp(gaps, 0).confidence_interval(0.95)
    expected = f"Gap to fixed-size: +1.89 % (95 % {found.low:+.2f} to {found.high:+.2f} over 2"
    assert expected in report.verdicts[0].verdict
    assert report.notes == []


def test_controls_that_differ_are_noted_and_wrong_ones_not_taken(tmp_path: Path) -> None:
    config = progressive_config(tmp_path / "runs")
    fixed, short = fixed_size(config), short_control(config)
    other_rate = replace(fixed, optim=replace(fixed.optim, lr=0.02))
    too_short = replace(short, train=replace(short.train, steps=int(0.9 * short.train.steps)))
    other_data = replace(
        fixed, data=replace(fixed.data, corpus="x"), run=replace(fixed.run, name="other_data")
    )
    folders = [write_run(c, 2.5) for c in (config, other_rate, too_short, other_data)]
    report = make_report(folders, tmp_path / "out")
    assert [row.arm for row in report.rows] == ["progressive", "fixed-size", "other", "other"]
    assert any("optim.lr 0.02 (instead of 0.01)" in note for note in report.notes)
    assert [m.arm for m in report.missing] == ["short control", "never-grown"]


def test_a_source_that_never_grows_has_the_flops_to_one_of_its_steps(tmp_path: Path) -> None:
    config = progressive_config(tmp_path / "runs")
    (never,) = never_grown(config)

    def arms_with(name: str, steps: int, **model: int) -> list[str]:
        other = replace(
            never,
            run=replace(never.run, name=name),
            train=replace(never.train, steps=steps),
            model=replace(never.model, **model),
        )
        report = make_report([config.folder, write_run(other, 2.5)], tmp_path / f"{name}_out")
        assert ("never-grown" in [m.arm for m in report.missing]) is (report.rows[1].arm == "other")
        return [row.arm for row in report.rows]

    write_run(config, 2.5)
    steps = never.train.steps
    assert arms_with("same", steps) == ["progressive", "never-grown"]
    assert arms_with("longer", steps + 1) == ["progressive", "never-grown"]
    assert arms_with("too_long", steps + 2) == ["progressive", "other"]
    assert arms_with("too_short", steps - 1) == ["progressive", "other"]
    deeper = replace(never, model=replace(never.model, num_layers=1))
    equal = total_flops(config) // step_flops(model_shape(deeper), deeper)
    assert arms_with("deeper", equal, num_layers=1) == ["progressive", "other"]
