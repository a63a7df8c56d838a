"""The table of the CUDA path against the CPU's: which cases it has, and what its page says."""

from __future__ import annotations

import sys
from itertools import combinations, product
from pathlib import Path
from typing import Any

import pytest

TOOLS = Path(__file__).resolve().parents[2] / "tools" / "gpu"
sys.path.insert(0, str(TOOLS))
import agreement  # noqa: E402
import agreement_page  # noqa: E402
from covering import covering  # noqa: E402

from megatron_progressive.plan.preflight import check_run  # noqa: E402


def test_every_two_values_meet_where_they_can() -> None:
    factors = {"a": "123", "b": "123", "c": "12", "d": "12"}
    cases, impossible = covering(factors, lambda case: (case["a"], case["b"]) != ("1", "2"))
    assert impossible == [(("a", "1"), ("b", "2"))]
    met = {(x, case[x], y, case[y]) for case in cases for x, y in combinations(factors, 2)}
    wanted = {
        (x, v, y, w)
        for x, y in combinations(factors, 2)
        for v, w in product(factors[x], factors[y])
    }
    assert wanted - met == {("a", "1", "b", "2")}
    assert len(cases) < 3 * 3 * 2 * 2 / 2
    assert cases == covering(factors, lambda case: (case["a"], case["b"]) != ("1", "2"))[0]


def test_each_case_is_a_run_through_three_layouts_and_two_engines() -> None:
    cases, _ = agreement.cases_of(2)
    assert {case["family"] for case in cases} == set(agreement.FACTORS["family"])
    for case in cases:
        config = agreement.config_of(case)
        check_run(config, 2)
        phases = [config.parallel_after(index) for index in range(3)]
        assert [phase.engine for phase in phases] == ["megatron", "deepspeed", "megatron"]


LINE: dict[str, Any] = {
    "name": "a case", "ranks": 2, "loss": 1e-7, "across": 2e-7, "norm": 1e-6, "tensors": 10,
    "initial_equal": True, "unequal": [[], []],
    "case": {"family": "gpt2", "layers": "local, fp32"},
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({}, ""),
        ({"loss": 1e-4}, "losses differ by more than"),
        ({"across": 1e-4}, "losses differ by more than"),
        ({"norm": 1e-3}, "gradient norms differ by more than"),
        ({"unequal": [[], ["head.weight/param"]]}, "not bit-equal: head.weight/param"),
        ({"initial_equal": False}, "not bit-equal: the state before the first step"),
        ({"error": "rank 1 failed"}, "rank 1 failed"),
    ],
)
def test_what_is_beyond_the_tolerances(change: dict[str, Any], says: str) -> None:
    line = {**LINE, **change}
    found = agreement_page.beyond(line)
    assert found.startswith(says)
    assert bool(found) == bool(says)
    text = agreement_page.page([LINE, line], [], 0)
    assert f"2 cases, {int('error' in change)} failed, {int(bool(says))} not as they" in text
