"""Keys that say one thing in two ways, of which a configuration has one."""

from __future__ import annotations

from typing import Any

from megatron_progressive.config.errors import ConfigError
from megatron_progressive.config.values import is_null, shown


def one_way(values: Any) -> Any:
    """Nested values as they were given, in which a key that another one replaces has no value.

    With ``data.mix`` there is no ``data.corpus`` (it is empty), and with ``train.eval_tokens`` no
    ``train.eval_samples`` (it is null).

    Raises:
        ConfigError: both of two such keys are given, or none.
    """
    if not isinstance(values, dict):
        return values
    data, train = values.get("data"), values.get("train")
    if isinstance(data, dict):
        values = {**values, "data": _mixed(data)}
    if isinstance(train, dict):
        values = {**values, "train": _counted(train)}
    return values


def _given(values: dict[str, Any], key: str) -> bool:
    return not is_null(values.get(key))


def _mixed(data: dict[str, Any]) -> dict[str, Any]:
    mix = data.get("mix")
    if not _given(data, "mix"):
        if data.get("corpus") == "" and _given(data, "corpus"):
            raise ConfigError("data.corpus: got ''; accepted: a path, or data.mix")
        return data
    if isinstance(mix, list) and not mix:
        raise ConfigError("data.mix: got []; accepted: one part or more, or null")
    for key in ("corpus", "prepared"):
        if _given(data, key) and data[key] != "":
            raise ConfigError(
                f"data.{key}: got {shown(data[key])} beside data.mix; accepted: one of the two "
                f"(each part of a mixture has its own {key})"
            )
    return {**data, "corpus": ""}


def _counted(train: dict[str, Any]) -> dict[str, Any]:
    if _given(train, "eval_tokens"):
        if _given(train, "eval_samples"):
            raise ConfigError(
                f"train.eval_samples: got {shown(train['eval_samples'])} beside "
                "train.eval_tokens; accepted: null, or no train.eval_tokens"
            )
        return {**train, "eval_samples": None}
    if "eval_samples" in train and is_null(train["eval_samples"]):
        raise ConfigError(
            f"train.eval_samples: got {shown(train['eval_samples'])}; accepted: an integer, or "
            "null with train.eval_tokens"
        )
    return train
