"""Small corpora and configurations for the tests of ``data``."""

from __future__ import annotations

import contextlib
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_progressive import config as configuration
from megatron_progressive.config import ConfigError, RunConfig
from megatron_progressive.data.megatron import indexed_dataset

WORDS = ["the", "a", "tree", "river", "κόσμος", "世界", "🙂", "naïve", "return", "x=1\n\tdef f():"]
WORDS += ["<|endoftext|>"]  # in a text it is text, not a token


def quiet(stage: str, done: int, total: int | None) -> None:
    """Show nothing of a preparation."""


def make_config(tmp_path: Path, corpus: object, **data: Any) -> RunConfig:
    """A tiny run on ``corpus``, in ``tmp_path/runs``."""
    values: dict[str, Any] = {"corpus": str(corpus), "vocab_size": 300, "sequence_length": 8}
    values |= {k: str(v) if isinstance(v, Path) else v for k, v in data.items()}
    return configuration.from_dict(
        {"model": {"family": "gpt2"}, "run": {"dir": str(tmp_path / "runs")}, "data": values}
    )


def make_documents(count: int = 40, seed: int = 0) -> list[str]:
    """Different documents of some words, in several scripts."""
    rng = random.Random(seed)
    return [f"{n}: " + " ".join(rng.choices(WORDS, k=30)) for n in range(count)]


def write_json_lines(path: Path, texts: list[str], field: str = "text") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"id": n, field: t}) + "\n" for n, t in enumerate(texts)))
    return path


@contextlib.contextmanager
def config_error(field: str, *parts: str) -> Iterator[None]:
    """Expect one line ``field: ...; accepted: ...`` that has each of ``parts``."""
    with pytest.raises(ConfigError) as caught:
        yield
    line = str(caught.value)
    assert "\n" not in line
    assert line.startswith(f"{field}: got "), line
    assert "; accepted: " in line, line
    for part in parts:
        assert part in line, (part, line)


def listing(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def preprocess(
    prefix: Path, tokens: Path, texts: list[str], append_eod: bool = True, sentences: bool = False
) -> None:
    """Write what Megatron-LM's ``tools/preprocess_data.py`` does: a document is its sentences, or
    one sequence; ``--append-eod`` appends to the last one."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tokens / "tokenizer.json"))
    tokenizer.encode_special_tokens = True
    eod = tokenizer.token_to_id("<|endoftext|>")
    module = indexed_dataset()
    dtype = module.DType.optimal_dtype(tokenizer.get_vocab_size())
    builder = module.IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for text in texts:
        ids = tokenizer.encode(text, add_special_tokens=False).ids + [eod] * append_eod
        lengths = [len(ids) // 3, len(ids) - len(ids) // 3] if sentences else [len(ids)]
        builder.add_document(ids, lengths)
    builder.finalize(f"{prefix}.idx")
