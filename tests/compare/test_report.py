"""The report and what is written of it, on run folders with made-up curves (``synthetic``)."""

from __future__ import annotations

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from megatron_progressive.compare.judged import Report
from megatron_progressive.compare.report import (
    make_report,
    record_verdicts,
    terminal_table,
    verdict_fields,
)
from megatron_progressive.config import ConfigError, load
from megatron_progressive.plan.controls import fixed_size, never_grown, short_control
from megatron_progressive.runtime.folder_lock import LOCK_NAME, FolderLock
from tests.runs.synthetic import four_arms, progressive_config, write_run


class _Resources(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.sources: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.sources += [v or "" for k, v in attrs if k in ("src", "href", "data", "srcset")]
        assert tag not in ("script", "link", "iframe")


def test_the_page_is_self_contained(losing: tuple[dict[str, Path], Path, Report]) -> None:
    _, out, report = losing
    text = (out / "report.html").read_text()
    parser = _Resources()
    parser.feed(text)
    prefix = "data:image/png;base64,"
    assert len(parser.sources) == 2
    for source, path in zip(parser.sources, report.files[2:], strict=True):
        assert source.startswith(prefix)
        data = base64.b64decode(source[len(prefix) :])
        assert data == path.read_bytes()
        assert Image.open(io.BytesIO(data)).width > 1000
    assert not re.search(r"url\(|@import|https?://", text)


def test_json_has_the_fixed_keys_and_no_nan(losing: tuple[dict[str, Path], Path, Report]) -> None:
    arms, out, report = losing

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    values = json.loads((out / "report.json").read_text(), parse_constant=refuse)
    fields = verdict_fields(report, arms["progressive"])
    assert set(fields) == {"speedup_flops", "speedup_wall", "loss_gap_percent", "verdict"}
    assert {key: values[key] for key in fields} == fields
    assert values["verdicts"][0]["outcome"] == "open"
    assert values["verdicts"][0]["controls"][0]["control"] == "the short control"
    assert len(values["runs"]) == 4
    assert verdict_fields(report, arms["fixed"]) == {}


def test_missing_controls_come_with_the_commands_that_make_them(tmp_path: Path) -> None:
    config = progressive_config(tmp_path / "runs")
    folder = write_run(config, 2.5)
    report = make_report([folder], tmp_path / "out")
    assert not report.complete
    assert report.verdicts[0].loss_gap_percent is None
    assert "Incomplete: no fixed-size" in report.verdicts[0].verdict
    page = (tmp_path / "out" / "report.html").read_text()
    for missing, control in zip(
        report.missing,
        (fixed_size(config), short_control(config), *never_grown(config)),
        strict=True,
    ):
        program, verb, path, *words = missing.command.replace("'", "").split()
        assert (program, verb) == ("mprog", "train")
        assert load(path, words) == control
        assert f"run.name={control.run.name}" in page
    assert not (tmp_path / "out" / "gap.png").exists()
    console = Console(width=60, file=io.StringIO(), record=True)
    terminal_table(report, console)
    assert report.missing[0].command in console.export_text()  # whole, to be copied


def test_unfinished_runs_are_shown_and_not_judged(tmp_path: Path) -> None:
    config = progressive_config(tmp_path / "runs")
    folders = [
        write_run(config, 2.5, stop_at=140),
        write_run(fixed_size(config), 2.4),
        write_run(short_control(config), 2.6, stop_at=20),
    ]
    report = make_report(folders, tmp_path / "out")
    assert [row.finished for row in report.rows] == [False, True, False]
    assert "unfinished at step 140 of 300" in report.title
    assert report.verdicts[0].speedup_flops is None
    assert [m.arm for m in report.missing] == ["short control", "never-grown"]
    assert report.missing[0].command == f"mprog train {folders[2] / 'config.yaml'}"


def test_recorded_warnings_are_shown(tmp_path: Path) -> None:
    folder = write_run(progressive_config(tmp_path / "runs"), 2.5, warning="loss <spike> > 2x")
    make_report([folder], tmp_path / "out")
    assert "step 1: loss &lt;spike&gt; &gt; 2x" in (tmp_path / "out" / "report.html").read_text()


def test_flops_that_the_configuration_does_not_count_to_are_noted(tmp_path: Path) -> None:
    folder = write_run(progressive_config(tmp_path / "runs"), 2.5)
    summary = json.loads((folder / "summary.json").read_text())
    summary["total_flops"] *= 1.5
    (folder / "summary.json").write_text(json.dumps(summary))
    report = make_report([folder], tmp_path / "out")
    assert any("another version of the code" in note for note in report.notes)


def test_diverged_run_is_no_result(tmp_path: Path) -> None:
    arms = four_arms(tmp_path / "runs")
    summary = json.loads((arms["progressive"] / "summary.json").read_text())
    summary["final_eval_loss"] = float("nan")
    (arms["progressive"] / "summary.json").write_text(json.dumps(summary))
    metrics = arms["progressive"] / "metrics.jsonl"
    *lines, last = metrics.read_text().splitlines()
    last = json.dumps({**json.loads(last), "loss": float("nan")})
    metrics.write_text("\n".join([*lines, last, ""]))
    report = make_report(list(arms.values()), tmp_path / "out")
    assert report.title == "tiny: diverged"
    assert verdict_fields(report, arms["progressive"]).keys() == {"verdict"}
    assert "NaN" not in (tmp_path / "out" / "report.json").read_text()


def test_terminal_table_fits_80_columns(losing: tuple[dict[str, Path], Path, Report]) -> None:
    console = Console(width=80, file=io.StringIO(), record=True)
    terminal_table(losing[2], console)
    text = console.export_text()
    assert max(len(line) for line in text.splitlines()[:8]) <= 80
    assert "0.99 % above the short control" in " ".join(text.split())
    for cell in ("progressive", "fixed-size", "short control", "0 → 6", "2.5250", "+2.00 %"):
        assert cell in text


def test_a_metrics_line_that_a_kill_cut_is_left_out(tmp_path: Path) -> None:
    folder = write_run(progressive_config(tmp_path / "runs"), 2.5, stop_at=60)
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"event": "train", "step": 61, "lo')
    (row,) = make_report([folder], tmp_path / "out").rows
    assert row.steps_done == 60


def test_a_damaged_line_takes_no_other_with_it(tmp_path: Path) -> None:
    folder = write_run(progressive_config(tmp_path / "runs"), 2.5)
    metrics = folder / "metrics.jsonl"
    lines = metrics.read_bytes().splitlines()
    metrics.write_bytes(b"\n".join([*lines[:9], lines[9][:20], *lines[10:], b""]))
    report = make_report([folder], tmp_path / "out")
    assert report.rows[0].steps_done == 300
    assert any("line 10 of metrics.jsonl" in text for text in report.rows[0].warnings)
    console = Console(width=80, file=io.StringIO(), record=True)
    terminal_table(report, console)
    assert "line 10 of metrics.jsonl cannot be read" in " ".join(console.export_text().split())


@pytest.mark.parametrize("text", ["", '{"final_ev', "[]", "null", '{"final_eval_loss": NaN}'])
def test_a_summary_without_a_result_is_of_an_unfinished_run(tmp_path: Path, text: str) -> None:
    folder = write_run(progressive_config(tmp_path / "runs"), 2.5)
    (folder / "summary.json").write_text(text)
    report = make_report([folder], tmp_path / "out")
    record_verdicts(report)
    assert not report.rows[0].finished
    assert report.rows[0].final_eval_loss is None
    assert any("summary.json" in warning for warning in report.rows[0].warnings)
    assert (folder / "summary.json").read_text() == text


def test_no_verdict_is_written_where_a_job_trains_on(tmp_path: Path) -> None:
    folder = write_run(progressive_config(tmp_path / "runs"), 2.5)
    report = make_report([folder], tmp_path / "out")
    before = (folder / "summary.json").read_text()
    with FolderLock(folder / LOCK_NAME):
        record_verdicts(report)
        assert (folder / "summary.json").read_text() == before
    record_verdicts(report)
    assert (folder / "summary.json").read_text() != before


def _break(folder: Path, how: str) -> Path:
    metrics = folder / "metrics.jsonl"
    if how == "no folder":
        return folder / "nowhere"
    if how == "no config.yaml":
        (folder / "config.yaml").unlink()
    elif how == "no metrics.jsonl":
        metrics.unlink()
    elif how == "is empty":
        metrics.write_text("")
    elif how == "has no line that can be read":
        metrics.write_text('{"event": "tr\n')
    elif how == "model.family: missing":
        (folder / "config.yaml").write_text("run: {name: x}\n")
    return folder


@pytest.mark.parametrize(
    "how",
    [
        "no folder", "no config.yaml", "no metrics.jsonl", "is empty",
        "has no line that can be read", "model.family: missing",
    ],
)  # fmt: skip
def test_bad_folders_are_refused_in_one_line_before_anything_is_written(
    tmp_path: Path, how: str
) -> None:
    folder = _break(write_run(progressive_config(tmp_path / "runs"), 2.5, stop_at=12), how)
    with pytest.raises(ConfigError, match=re.escape(how)) as caught:
        make_report([folder], tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert "accepted" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_no_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="got none"):
        make_report([], tmp_path / "out")


def test_importing_the_room_is_light() -> None:
    import subprocess
    import sys

    code = "import sys, megatron_progressive.compare as s; print('numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
