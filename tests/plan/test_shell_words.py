"""Fields as words, and commands in lines: what is given to the shell comes out of it."""

import subprocess
from pathlib import Path

import pytest

from megatron_progressive.config import load
from megatron_progressive.plan.shell_words import command_lines, field_word

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("value", "word"),
    [(True, "true"), (None, "null"), (4, "4"), ("selective", "selective"), ([], "[]"),
     (["layernorm", "moe_act"], "[layernorm,moe_act]"), (["x"] * 90, "[" + "x," * 89 + "x]")],
)  # fmt: skip
def test_a_word_without_spaces(value: object, word: str) -> None:
    assert field_word("parallel.key", value) == f"parallel.key={word}"


def test_the_file_takes_the_words() -> None:
    words = [field_word("parallel.recompute", "selective"),
             field_word("parallel.recompute_modules", ["layernorm", "core_attn"])]  # fmt: skip
    parallel = load(ROOT / "configs/llama3/tiny_progressive.yaml", words).parallel
    assert (parallel.recompute, parallel.recompute_modules) == (
        "selective", ["layernorm", "core_attn"]
    )  # fmt: skip


@pytest.mark.parametrize("width", [30, 60, 100])
def test_lines_that_a_shell_reads(width: int) -> None:
    given = ["a b", "it's", "expansion[0].parallel.tensor=2", "x" * 70, "", "last"]
    lines = command_lines(["printf", "%s\\n", *given], width, "  ", "      ")
    short = [line for line in lines if "x" * 70 not in line]
    assert max(map(len, short)) <= max(width, 40)
    assert len(lines) > 1
    done = subprocess.run(["bash", "-c", "\n".join(lines)], capture_output=True, text=True)
    assert done.stdout.splitlines() == given
