"""``run.extend``: the same bits as a run that had the longer schedule from the start."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from megatron_progressive import cli
from megatron_progressive.checkpoints.checkpoint import checkpoint_path, checkpoints, step_of
from megatron_progressive.checkpoints.index import stored_tensors
from megatron_progressive.checkpoints.streamed import TensorReader
from megatron_progressive.config import RunConfig, from_dict, load, to_yaml
from megatron_progressive.optim.schedule import last_stable_step, learning_rate, warmup_steps
from megatron_progressive.runs.decisive import decisive
from megatron_progressive.runs.extension import resolved
from megatron_progressive.runs.folder import read_metrics
from megatron_progressive.runs.reading import read_run
from tests.jobs import Job, Jobs
from tests.runs.test_ends import contents, summary
from tests.train.small_runs import run_values

OLD, NEW, DECAY = 20, 30, 0.25  # decays of steps 16 to 20, and 23 to 30
EXPANSION = {"at": 0.4, "to_layers": 2, "init": "copying"}


def values_of(folder: Path, corpus: Path, name: str = "run", **train: Any) -> dict[str, Any]:
    values = run_values(folder, corpus, name, expansion=[dict(EXPANSION)])
    values["train"].update(micro_batch=8, eval_every=4, eval_samples=8, save_every=4,
                           keep_checkpoints=1, **{"steps": OLD, **train})  # fmt: skip
    values["schedule"] = {"warmup": 0.2, "decay": DECAY}
    return values


def file_of(values: dict[str, Any], folder: Path) -> Path:
    path = folder / f"{values['run']['name']}.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def go(jobs: Jobs, file: Path, *words: str, prepare: Any = None) -> Job:
    return jobs.run(1, file.parent, ["train", str(file), *words], prepare)


def longer(steps: int = NEW) -> list[str]:
    return [f"train.steps={steps}", "run.extend=true"]


@pytest.fixture(scope="module")
def finished(jobs: Jobs, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of OLD steps."""
    folder = tmp_path_factory.mktemp("finished")
    job = go(jobs, file_of(values_of(folder, corpus), folder))
    assert job.codes == [0], job.output
    # the newest, the one before the expansion, and the one before the decay
    assert [step_of(path) for path in checkpoints(folder / "run")] == [8, 12, 20]
    return folder / "run"


def reference(jobs: Jobs, corpus: Path, folder: Path, steps: int, **changes: Any) -> Path:
    """A run that has had ``steps`` from the start, with OLD's warmup and τ."""
    values = values_of(folder, corpus, f"reference{steps}", steps=steps)
    values["schedule"]["warmup"] = 0.2 * OLD / steps
    values["expansion"][0]["at"] = round(EXPANSION["at"] * OLD)  # type: ignore[operator]
    values["expansion"] += changes.get("more", [])
    job = go(jobs, file_of(values, folder))
    assert job.codes == [0], job.output
    return folder / f"reference{steps}"


@pytest.fixture(scope="module")
def whole(jobs: Jobs, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return reference(jobs, corpus, tmp_path_factory.mktemp("whole"), NEW)


@pytest.fixture
def file(finished: Path, corpus: Path, tmp_path: Path) -> Path:
    """The configuration file of a copy of the run of OLD steps."""
    shutil.copytree(finished, tmp_path / "run")
    return file_of(values_of(tmp_path, corpus), tmp_path)


def numbers(folder: Path) -> list[tuple[Any, ...]]:
    keys = ("event", "step", "loss", "lr", "grad_norm", "flops", "tokens", "num_layers",
            "loss_before", "loss_after")  # fmt: skip
    events = [e for e in read_metrics(folder) if e["event"] in ("train", "eval", "expansion")]
    return [tuple(e.get(key) for key in keys) for e in events]


def assert_same_bits(folder: Path, other: Path, step: int) -> None:
    paths = [checkpoint_path(run, step) for run in (folder, other)]
    tables = [stored_tensors(path) for path in paths]
    assert tables[0] == tables[1]
    readers = [TensorReader(path) for path in paths]
    count = 0
    for name, slots in tables[0].items():
        for slot in slots:
            one, two = (reader.read((name, slot)) for reader in readers)
            assert torch.equal(one, two), (name, slot)
            count += 1
    assert count > 20


def assert_as_from_the_start(folder: Path, whole: Path, step: int = NEW) -> None:
    assert numbers(folder) == numbers(whole)
    assert_same_bits(folder, whole, step)
    mine, theirs = summary(folder), summary(whole)
    for key in ("final_eval_loss", "total_flops", "total_tokens", "steps", "num_layers"):
        assert mine[key] == theirs[key]
    configs = [decisive(load(run / "config.yaml")) for run in (folder, whole)]
    for config in configs:
        del config["run.name"]
    assert configs[0] == configs[1]
    assert not list(folder.glob(".*"))


def test_the_same_bits_as_from_the_start(
    jobs: Jobs, file: Path, whole: Path, finished: Path
) -> None:
    folder = file.parent / "run"
    job = go(jobs, file, *longer())
    assert job.codes == [0], job.output
    assert f"extended from {OLD} to {NEW} steps; what came after step 12 is in" in job.output[0]
    assert_as_from_the_start(folder, whole)
    assert [e["step"] for e in read_metrics(folder) if e["event"] == "resume"] == [12]
    assert [step_of(path) for path in checkpoints(folder)] == [8, 20, 30]
    # what was there before is a run folder of its own
    aside = folder / "until_0000020"
    assert numbers(aside) == numbers(finished)
    assert summary(aside) == summary(finished)
    assert read_run(aside).final_loss == summary(finished)["final_eval_loss"]
    assert_same_bits(aside, finished, OLD)
    # once more, and with what is in the folder now: nothing to do
    before = contents(folder)
    recorded = file.with_name("recorded.yaml")
    shutil.copy(folder / "config.yaml", recorded)
    for again in (go(jobs, file, *longer()), go(jobs, recorded), go(jobs, recorded, *longer())):
        assert again.codes == [0]
        assert "finished before" in again.output[0]
    assert contents(folder) == before


def test_twice_with_the_first_file(jobs: Jobs, file: Path, corpus: Path, tmp_path: Path) -> None:
    assert go(jobs, file, *longer()).codes == [0]
    job = go(jobs, file, *longer(40))
    assert job.codes == [0], job.output
    folder = tmp_path / "run"
    assert_as_from_the_start(folder, reference(jobs, corpus, tmp_path, 40), 40)
    assert {path.name for path in folder.glob("until_*")} == {"until_0000020", "until_0000030"}


def test_a_run_that_was_stopped(jobs: Jobs, corpus: Path, whole: Path, tmp_path: Path) -> None:
    """In the middle of its decay, after 18 steps."""
    file = file_of(values_of(tmp_path, corpus), tmp_path)
    assert go(jobs, file, "train.stop_after=18").codes == [0]
    job = go(jobs, file, *longer())
    assert job.codes == [0], job.output
    assert_as_from_the_start(tmp_path / "run", whole)


def test_an_expansion_that_was_still_to_come_stays_at_its_step(
    jobs: Jobs, corpus: Path, tmp_path: Path
) -> None:
    values = values_of(tmp_path, corpus)
    values["expansion"].append({"at": 0.9, "to_layers": 3})
    file = file_of(values, tmp_path)
    assert go(jobs, file).codes == [0]
    job = go(jobs, file, *longer())
    assert job.codes == [0], job.output
    more = [{"at": 18, "to_layers": 3}]
    assert_as_from_the_start(tmp_path / "run", reference(jobs, corpus, tmp_path, NEW, more=more))


def kill_at(number: int) -> None:
    """At the ``number``-th file or folder that gets its name."""
    rename, replace, calls = os.rename, os.replace, [0]

    def counted(wanted: Any) -> Any:
        def call(source: Any, target: Any) -> None:
            if not Path(target).name.startswith(".lock"):
                calls[0] += 1
                if calls[0] == number:
                    os.kill(os.getpid(), signal.SIGKILL)
            wanted(source, target)

        return call

    os.rename, os.replace = counted(rename), counted(replace)


@pytest.mark.parametrize("number", [1, 2, 3, 4, 6])
def test_killed_while_it_is_extended(jobs: Jobs, file: Path, whole: Path, number: int) -> None:
    """As the checkpoint of the end moves away, its folder gets its name, the configuration and the
    metrics are written, and at the end of the first save."""
    folder = file.parent / "run"
    job = go(jobs, file, *longer(), prepare=(__name__, "kill_at", (number,)))
    assert job.codes == [-signal.SIGKILL], job.output
    job = go(jobs, file, *longer())
    assert job.codes == [0], job.output
    assert_as_from_the_start(folder, whole)
    assert [path.name for path in folder.glob("until_*")] == ["until_0000020"]
    assert summary(folder / "until_0000020")["steps"] == OLD
    assert (folder / "until_0000020" / "checkpoints" / "step_0000020").is_dir()


def test_killed_and_then_not_extended(jobs: Jobs, file: Path, finished: Path, whole: Path) -> None:
    """The old run is still finished, or finishes again; and can still be extended."""
    folder = file.parent / "run"
    go(jobs, file, *longer(), prepare=(__name__, "kill_at", (3,)))
    (folder / "summary.json").unlink()
    job = go(jobs, file)
    assert job.codes == [0], job.output
    assert numbers(folder) == numbers(finished)
    assert go(jobs, file, *longer()).codes == [0]
    assert_as_from_the_start(folder, whole)


def no_checkpoint(folder: Path) -> None:
    for step in (8, 12):
        shutil.rmtree(checkpoint_path(folder, step))


def no_checkpoints(folder: Path) -> None:
    shutil.rmtree(folder / "checkpoints")


def no_run(folder: Path) -> None:
    shutil.rmtree(folder)


def cosine(folder: Path) -> None:
    values = yaml.safe_load((folder / "config.yaml").read_text())
    values["schedule"]["name"] = "cosine"
    (folder / "config.yaml").write_text(yaml.safe_dump(values))


REFUSED: list[tuple[str, Any, list[str], list[str]]] = [
    ("fewer steps", None, longer(15), ["train.steps: got 15", "more than the 20"]),
    ("as many steps", None, longer(20), ["train.steps: got 20", "more than the 20"]),
    ("no extension", None, ["train.steps=30"],
     ["run.name", "train.steps=20, got 30", "run.extend=true"]),
    ("another learning rate", None, [*longer(), "optim.lr=0.02"],
     ["run.name", "optim.lr=0.01, got 0.02", "all else as it was"]),
    ("another decay", None, [*longer(), "schedule.decay=0.5"], ["schedule.decay=0.25, got 0.5"]),
    ("another depth", None, [*longer(), "expansion.0.to_layers=4"],
     ["expansion.0.to_layers=2, got 4"]),
    ("another τ", None, [*longer(), "expansion.0.at=9"], ["expansion.0.at=0.4, got 9"]),
    ("no expansion", None, [*longer(), "expansion=[]"], ["expansion"]),
    ("a schedule that falls all along", cosine, [*longer(), "schedule.name=cosine"],
     ["run.extend", "schedule.name cosine", "accepted: wsd"]),
    ("the checkpoint before the decay is gone", no_checkpoint, longer(),
     ["run.extend", "checkpoints of steps: 20", "after step 15", "train.save_every"]),
    ("no checkpoints", no_checkpoints, longer(), ["run.extend", "checkpoints of steps: none"]),
    ("no run", no_run, longer(), ["run.extend: got true", "no run is in"]),
    ("no word", None, ["train.steps=30", "run.extend=7"], ["run.extend", "true or false"]),
]  # fmt: skip


@pytest.mark.parametrize("case", REFUSED, ids=[case[0] for case in REFUSED])
def test_refused_in_one_line(file: Path, capfd: Any, case: tuple[Any, ...]) -> None:
    _, prepare, words, needed = case
    if prepare is not None:
        prepare(file.parent / "run")
    before = contents(file.parent)
    assert cli.main(["train", str(file), *words]) == 2
    (line,) = capfd.readouterr().err.strip().splitlines()
    for text in needed:
        assert text in line, line
    assert contents(file.parent) == before


@pytest.mark.parametrize("old", [10, 57, 300, 1499])
@pytest.mark.parametrize(("new", "warmup"), [(1.001, 1 / 3), (1.5, 0.0), (7.3, 0.02)])
def test_both_schedules_are_one_until_the_decay(
    tmp_path: Path, old: int, new: float, warmup: float
) -> None:
    def config(steps: int) -> RunConfig:
        values: dict[str, Any] = {
            "run": {"name": "run", "dir": str(tmp_path)}, "model": {"family": "gpt2"},
            "train": {"steps": steps},
            "schedule": {"warmup": warmup, "decay": 0.3, "rewarm": 0.1, "rewarm_from": 0.1},
            "expansion": [{"at": 0.5, "to_layers": 20}],
        }  # fmt: skip
        return from_dict(values)

    short = config(old)
    short.folder.mkdir()
    (short.folder / "config.yaml").write_text(to_yaml(short))
    wanted = from_dict(yaml.safe_load(to_yaml(config(max(old + 1, int(new * old))))),
                       ["run.extend=true"])  # fmt: skip
    extended = resolved(wanted)
    assert resolved(extended) == extended
    assert warmup_steps(extended) == warmup_steps(short)
    assert extended.expansion_steps() == short.expansion_steps()
    last = last_stable_step(short)
    assert last_stable_step(extended) >= last
    for step in range(1, last + 1):
        assert learning_rate(extended, step) == learning_rate(short, step)
