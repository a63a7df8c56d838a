"""Advice: what counts, what is said of it, and the pilot that would tell."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_progressive import cli
from megatron_progressive.compare import drawing, mixing
from megatron_progressive.compare.advise.advice import Advice, advise
from megatron_progressive.compare.advise.distance import alike, distance, parts
from megatron_progressive.compare.advise.evidence import Evidence
from megatron_progressive.compare.advise.regime import Growth, regime_of
from megatron_progressive.compare.advise.text import render
from megatron_progressive.compare.decision import against
from megatron_progressive.config import RunConfig, from_dict, load
from megatron_progressive.grid.grid import load_grid
from megatron_progressive.laws import fits
from megatron_progressive.laws.rollout import rollout
from megatron_progressive.models import active_parameter_count, model_shape
from tests.grid.report.planted import set_loss
from tests.runs.synthetic import write_study

ROOT = Path(__file__).resolve().parents[3]
VALUES: dict[str, Any] = {
    "model": {"family": "llama3", "preset": "tiny", "num_layers": 4},
    "data": {"vocab_size": 512},
    "train": {"steps": 2000},
    "expansion": [{"at": 0.5, "to_layers": 8, "init": "copying"}],
}
BELOW, ABOVE, NONE = [-1.0, -1.1, -0.9], [1.0, 1.1, 0.9], [-0.5, 0.6, 0.1]


@pytest.fixture(autouse=True, scope="module")
def _few_draws() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drawing, "DPI", 30)
        for function in (fits.fit_compute, fits.fit_size_tokens, rollout, mixing.mixing_time):
            patch.setitem(function.__kwdefaults__, "draws", 5)
        yield


def plan(*words: str) -> RunConfig:
    return from_dict(VALUES, words)


def finding(config: RunConfig, short: list[float], never: list[float], **changes: Any) -> Evidence:
    """A finding in the regime of ``config``, but for ``changes``."""
    pairs = {"the short control": short, "the source never grown": never}
    controls = [against(name, list(enumerate(found, 1))) for name, found in pairs.items()]
    return Evidence("planted", "page", replace(regime_of(config), **changes), controls, 0.6)


@pytest.mark.parametrize(
    ("found", "answer", "to_short", "to_never"),
    [
        ([(BELOW, BELOW)], "pays", "below", "below"),
        ([(BELOW, ABOVE)], "does not pay", "below", "not below"),
        ([(ABOVE, BELOW)], "does not pay", "not below", "below"),
        ([(BELOW, NONE)], "open", "below", "open"),
        ([(BELOW, [])], "open", "below", "unknown"),
        ([([-9.0], [-9.0])], "open", "open", "open"),  # one seed, whatever the difference
        ([(BELOW, BELOW), (NONE, NONE)], "pays", "below", "below"),
        ([(BELOW, BELOW), (ABOVE, BELOW)], "open", "open", "below"),  # they contradict each other
        ([], "unknown", "unknown", "unknown"),
    ],
)
def test_the_answer_is_what_decided_findings_say(
    found: list[tuple[list[float], list[float]]], answer: str, to_short: str, to_never: str
) -> None:
    config = plan()
    advice = advise(config, [finding(config, *one) for one in found])
    assert advice.answer == answer
    assert list(advice.controls.values()) == [to_short, to_never]
    text = render(advice, "pilot.yaml", ["config.yaml"])
    said = " ".join(text.split())
    assert ("growing is expected to pay" in said) is (answer == "pays")
    assert ("growing is not expected to pay" in said) is (answer == "does not pay")
    assert ("nothing known for this regime" in said) is (answer == "unknown")
    assert (advice.pilot is None) is (answer in ("pays", "does not pay"))
    assert max(map(len, text.splitlines())) <= 100
    if answer == "pays":  # at which factor and τ, against which control
        assert "depth x 2: 4 → 8 layers at 0.5 T, copying, bottom insert" in said
        assert "to the short control below, -1.00 % (95 % -1.25 to -0.75 over 3 pairs" in said


@pytest.mark.parametrize(
    ("changes", "octaves"),
    [
        ({}, 0.0),
        ({"tokens_per_param": 4.0}, 1.0),  # of 8 in the plan
        ({"tokens_per_param": 16.0}, 1.0),
        ({"params": 1e8}, 1.0),  # of 1e6
        ({"params": 1e3}, 1.5),
        ({"family": "gpt2"}, 0.5),
        ({"experts": True}, 1.0),
        ({"optimizer": "adamw"}, 1.0),
        ({"optimizer": None}, 1.0),
        ({"schedule": "cosine", "width": 1}, 0.0),
        ({"tokens_per_param": 2.0, "params": 1e4, "family": "x"}, 3.5),
        ({"tokens_per_param": None}, math.inf),
    ],
)
def test_the_distance_is_the_rule(changes: dict[str, Any], octaves: float) -> None:
    mine = replace(regime_of(plan()), tokens_per_param=8.0, params=1e6)
    other = replace(mine, **changes)
    assert distance(mine, other) == distance(other, mine) == pytest.approx(octaves)
    sizes = [part for part, _ in parts(mine, other)]
    assert sizes == sorted(sizes, reverse=True)


def test_only_what_is_near_and_grows_alike_counts() -> None:
    config = plan()
    tokens = regime_of(config).tokens_per_param
    assert tokens is not None
    near = finding(config, BELOW, BELOW, tokens_per_param=3.9 * tokens)
    far = finding(config, BELOW, BELOW, tokens_per_param=4.1 * tokens)
    other = finding(config, BELOW, BELOW, growth=Growth([1, 8], [0.5]))
    assert advise(config, [near]).answer == "pays"
    for one in (far, other):
        advice = advise(config, [one])
        assert advice.answer == "unknown"
        assert advice.best is not None  # within reach: a factor and a τ to try
        assert [weighed.evidence for weighed in advice.others] == [one]
    beyond = finding(config, BELOW, BELOW, tokens_per_param=17 * tokens)
    assert advise(config, [beyond]).best is None
    # what ended above a control is no advice
    for short, never in ((BELOW, ABOVE), ([-1.0], [0.2])):
        assert advise(config, [finding(config, short, never)]).best is None


@pytest.mark.parametrize(
    ("other", "same"),
    [
        (Growth([4, 8], [0.5]), True),
        (Growth([12, 18], [0.7]), True),  # a factor of 1.5 for 2
        (Growth([4, 8], [0.71]), False),
        (Growth([2, 8], [0.5]), False),
        (Growth([0, 8], [0.5]), False),
        (Growth([2, 4, 8], [0.3, 0.5]), False),
        (None, False),
    ],
)
def test_what_grows_alike(other: Growth | None, same: bool) -> None:
    assert alike(Growth([4, 8], [0.5]), other) is same
    assert alike(None, other)  # a plan that does not grow yet asks for any growth
    assert alike(Growth([0, 4], [0.8]), Growth([0, 24], [0.8]))
    assert alike(Growth([2, 4, 8], [0.1, 0.5]), Growth([2, 4, 8], [0.4, 0.6]))  # the last τ counts


def test_growth_that_pays_is_named_before_growth_that_may() -> None:
    config = plan()
    may = finding(config, [-5.0], [-5.0])
    pays = finding(config, BELOW, BELOW, growth=Growth([6, 8], [0.4]))
    half = finding(config, [-7.0], [], growth=Growth([1, 8], [0.4]))
    for found, best in (([may, half, pays], pays), ([half, may], may), ([half], half)):
        advice = advise(config, found)
        assert advice.best is not None
        assert advice.best.evidence is best


PLANS = [
    "configs/llama3/1b_progressive.yaml", "configs/gpt2/124m_progressive.yaml",
    "configs/deepseek_v3/671b_progressive.yaml", "configs/gpt2/124m_fixed.yaml",
]  # fmt: skip


@pytest.mark.parametrize("path", PLANS)
def test_the_pilot_can_be_planned(tmp_path: Path, capsys: Any, path: str) -> None:
    """As printed: the grid loads, its cells can run, in the plan's regime and near to it."""
    file = tmp_path / "pilot.yaml"
    assert cli.main(["advise", str(ROOT / path), "--pilot", str(file)]) == 0
    text = capsys.readouterr().out
    assert text.endswith(file.read_text())
    assert f"mprog grid plan {file}" in text
    words = [f"study.dir={tmp_path}", "seeds=[1]"]
    assert cli.main(["grid", "plan", str(file), *words]) == 0
    grid = load_grid(file, words)
    assert {"short_control", "never_grown", "gradual_stack"} <= {cell.arm for cell in grid.cells}
    config = load(ROOT / path)
    mine = regime_of(config)
    for cell in grid.cells:
        assert cell.config.optim.name == config.optim.name
        assert cell.config.schedule.name == config.schedule.name
        if cell.config.expansion:
            other = regime_of(cell.config)
            assert other.tokens_per_param == pytest.approx(mine.tokens_per_param, rel=0.01)
            assert distance(mine, other) <= 2
    own = [c for c in grid.cells if alike(mine.growth, regime_of(c.config).growth)]
    assert any(cell.config.expansion for cell in own)


def test_the_pilot_grows_as_the_plan_does(tmp_path: Path, capsys: Any) -> None:
    """Whatever way of growing a plan has is among its arms; commands repeat the plan's words."""
    config = tmp_path / "my config.yaml"
    config.write_text(yaml.safe_dump({**VALUES, "model": {"family": "qwen3", "num_layers": 4}}))
    for number, (words, wanted) in enumerate(
        (
            (["expansion.0.init=copying_zeroL", "expansion.0.insert=top",
              "expansion.0.optimizer_state=copy", "schedule.rewarm=0.02"],
             ("4_layers", "copying_zeroL", "top", "copy", 0.02)),
            (["model.num_layers=1"], ("one_layer", "copying", "bottom", "inherit", None)),
            (["model.num_layers=6", "expansion.0.init=random"],
             ("6_layers", "random", "bottom", "inherit", None)),
        )
    ):  # fmt: skip
        file = tmp_path / f"pilot{number}.yaml"
        assert cli.main(["advise", str(config), *words, "--pilot", str(file)]) == 0
        said = capsys.readouterr().out
        assert f"mprog advise '{config}' {' '.join(words)} --pilot {file}\n" in said
        cells = load_grid(file, ["seeds=[1]", f"study.dir={tmp_path}"]).cells
        found = {
            (cell.arm, last.init, last.insert, last.optimizer_state, cell.config.schedule.rewarm)
            for cell in cells
            if cell.config.expansion and (last := cell.config.expansion[-1])
        }
        assert wanted in found


def test_a_finished_pilot_gives_the_answer(tmp_path: Path, capsys: Any) -> None:
    """From nothing known to what several seeds of the user's own study decide."""
    config = tmp_path / "config.yaml"
    values = {**VALUES, "run": {"name": "mine", "dir": str(tmp_path)}, "train": {"steps": 100},
              "optim": {"name": "adamw", "lr": 0.001}}  # fmt: skip
    config.write_text(yaml.safe_dump(values))
    pilot = tmp_path / "pilot.yaml"
    assert cli.main(["advise", str(config), "--json", "--pilot", str(pilot)]) == 0
    before = json.loads(capsys.readouterr().out)
    assert before["answer"] == "unknown"
    assert before["pilot"] == pilot.read_text()
    words = [f"study.dir={tmp_path}", "arms=[4_layers,short_control,never_grown]", "tau=[0.5]",
             "train.eval_every=10"]  # fmt: skip
    grid = load_grid(pilot, words)
    assert {(cell.config.optim.name, cell.config.optim.lr) for cell in grid.cells} == {
        ("adamw", 0.001)
    }
    write_study(grid)
    for cell in grid.cells:
        grown = cell.arm == "4_layers"
        set_loss_of(grid, cell.name, (2.9 if grown else 3.0) + 0.001 * cell.seed * (1 + grown))
    assert cli.main(["grid", "report", str(pilot), *words]) == 0
    study = str(grid.folder)
    capsys.readouterr()
    assert cli.main(["advise", str(config), "--studies", study]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert (
        "growing is expected to pay: 2 runs near enough and grown alike, 2 of which decided" in said
    )
    assert "short control below never grown below" in said
    assert f"[{study}; " in said
    assert f"Studies of yours that were read: {study}." in said
    assert "Pilot" not in said
    # the answer is known: there is no pilot to write
    assert cli.main(["advise", str(config), "--studies", study, "--pilot", "new.yaml"]) == 2
    assert "--pilot: got new.yaml, but the answer is known (pays)" in capsys.readouterr().err
    assert not Path("new.yaml").exists()


def set_loss_of(grid: Any, name: str, loss: float) -> None:
    from megatron_progressive.grid.state import Study

    set_loss(Study(grid), name, loss)


def test_advice_as_values_is_json(capsys: Any) -> None:
    assert cli.main(["advise", str(ROOT / PLANS[0]), "--json"]) == 0

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    values = json.loads(capsys.readouterr().out, parse_constant=refuse)
    assert values["answer"] == "unknown"
    assert values["headroom_percent"] == pytest.approx(5.14, abs=0.01)
    assert {one["evidence"]["outcome"] for one in values["others"]} == {"open"}
    assert set(values) == set(Advice.__dataclass_fields__)


def test_the_parameters_of_experts_are_those_of_one_token() -> None:
    config = load(ROOT / "configs/deepseek_v3/0.5b_progressive.yaml")
    regime = regime_of(config)
    assert regime.experts
    assert regime.params == active_parameter_count(model_shape(config, 20))
    assert regime.tokens_per_param == pytest.approx(100, rel=0.01)


@pytest.mark.parametrize(
    ("report", "said"),
    [
        (None, "where no report.json is; accepted: the folder of a study, after mprog grid report"),
        ("{", "whose report.json cannot be read (it is not JSON)"),
        ("[]", "whose report.json is of another version or of no study"),
        ('{"findings": [{"size": "a"}]}', "whose report.json is of another version or of no st"),
    ],
)
def test_bad_studies_are_one_line(
    tmp_path: Path, capsys: Any, report: str | None, said: str
) -> None:
    if report is not None:
        (tmp_path / "report.json").write_text(report)
    words = ["advise", str(ROOT / PLANS[0]), "--studies", str(tmp_path), "--pilot",
             str(tmp_path / "new.yaml")]  # fmt: skip
    assert cli.main(words) == 2
    error = capsys.readouterr().err
    assert said in error
    assert f"--studies: got '{tmp_path}'" in error
    assert len(error.strip().splitlines()) == 1
    assert not (tmp_path / "new.yaml").exists()


def test_other_bad_input_is_one_line(tmp_path: Path, capsys: Any) -> None:
    there = tmp_path / "there.yaml"
    there.write_text("kept")
    for words, said in (
        ([PLANS[0], "--pilot", str(there)], "is there; accepted: a new file"),
        (["configs/resnet/50_progressive.yaml"], "model.family: got resnet; accepted: a language"),
        ([PLANS[0], "expansion.0.at=49289"], "expansion[0].at: got 49289"),
        ([PLANS[0], "--pilot", str(tmp_path / "a" / "b" / "c.yaml"), "optim.lr=x"], "optim.lr"),
        ([PLANS[0], "train.steps=0"], "train.steps: got 0"),
    ):
        code = cli.main(["advise", str(ROOT / words[0]), *words[1:]])
        error = capsys.readouterr().err
        assert (code, len(error.strip().splitlines())) == (2, 1)
        assert said in error
    assert there.read_text() == "kept"
