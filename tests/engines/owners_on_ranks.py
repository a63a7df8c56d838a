"""What ranks do in the tests of Muon's owners: count Newton-Schulz and the bytes of a step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import param_and_grad_buffer as buffers

from megatron_progressive.config import RunConfig
from megatron_progressive.engines.base import GlobalBatch
from megatron_progressive.optim import muon
from tests.engines import on_ranks


@contextmanager
def replaced(module: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


@contextmanager
def counted_matrices() -> Iterator[list[int]]:
    """How many matrices each call of Newton-Schulz on this rank had."""
    calls: list[int] = []
    newton_schulz = muon.newton_schulz

    def count(matrices: torch.Tensor, *rest: Any, **more: Any) -> torch.Tensor:
        calls.append(matrices.shape[:-2].numel())
        return newton_schulz(matrices, *rest, **more)

    with replaced(muon, "newton_schulz", count):
        yield calls


def matrices_of_steps(config: RunConfig, steps: int) -> list[int]:
    """Matrices that this rank orthogonalised in each step; with an expansion, in those after it
    as well."""
    engine = on_ranks.start(config)
    found = []
    for number in range(2 * steps):
        if number == steps:
            if not config.expansion:
                break
            engine, _ = on_ranks._expand(engine, config)
        with counted_matrices() as calls:
            size = config.train.global_batch
            engine.train_step(GlobalBatch(on_ranks.tokens, size * number, size), 0.01)
        found.append(sum(calls))
    engine.close()
    return found


def weights_after(config: RunConfig, steps: int) -> dict[str, Any]:
    """Every weight, as an array of rank 0, after some steps."""
    engine = on_ranks.start(config)
    for number in range(steps):
        on_ranks.step(engine, number)
    state = on_ranks.gather(engine.state())
    engine.close()
    if dist.get_rank():
        return {}
    return {name: t.numpy() for (name, slot), t in state.items() if slot == "param"}


def one_step(config: RunConfig, lr: float) -> tuple[dict[Any, Any], dict[Any, Any]]:
    """The whole state before and after the first step, as arrays of rank 0."""
    engine = on_ranks.start(config)
    before = on_ranks.gather(engine.state())
    on_ranks.step(engine, 0, lr)
    after = on_ranks.gather(engine.state())
    engine.close()
    if dist.get_rank():
        return {}, {}
    return tuple({key: t.numpy() for key, t in state.items()} for state in (before, after))  # type: ignore[return-value]


@contextmanager
def counted_bytes(groups: list[Any]) -> Iterator[dict[str, int]]:
    """Bytes that this rank sends over some groups, by collective: what a ring or a direct exchange
    has to, nothing of which is to itself."""
    sent: dict[str, int] = {}

    def wrapped(name: str, size: Any, call: Any) -> Any:
        def collective(*args: Any, **kwargs: Any) -> Any:
            group = kwargs.get("group")
            if any(group is g for g in groups) and group.size() > 1:
                sent[name] = sent.get(name, 0) + int(size(group.size(), *args))
            return call(*args, **kwargs)

        return collective

    def nbytes(tensor: torch.Tensor) -> int:
        return tensor.numel() * tensor.element_size()

    def exchanged(n: int, received: Any, tensor: Any, arriving: Any, out: list[int]) -> int:
        return (sum(out) - out[groups[0].rank()]) * tensor.element_size()

    sizes = {
        (buffers, "dist_reduce_scatter_func"): lambda n, out, full, *_: nbytes(full) * (n - 1) / n,
        (buffers, "dist_all_gather_func"): lambda n, full, part, *_: nbytes(part) * (n - 1),
        (dist, "all_to_all_single"): exchanged,
        (dist, "all_reduce"): lambda n, t, *_: 2 * nbytes(t) * (n - 1) / n,
        (dist, "broadcast"): lambda n, t, *_: nbytes(t),
    }
    before = {(module, name): getattr(module, name) for module, name in sizes}
    for (module, name), size in sizes.items():
        setattr(module, name, wrapped(name, size, before[module, name]))
    try:
        yield sent
    finally:
        for (module, name), call in before.items():
            setattr(module, name, call)


def traffic_and_state(config: RunConfig) -> tuple[dict[str, int], int]:
    """Of a step: bytes that this rank sends over its data-parallel groups; and the bytes of the
    optimizer state that it holds."""
    engine: Any = on_ranks.start(config)
    on_ranks.step(engine, 0)
    groups = [engine.groups.replica_group, engine.groups.expert_data_group]
    with counted_bytes(groups) as sent:
        on_ranks.step(engine, 1)
    held = sum(p.nbytes for p in engine.state().pieces if p.slot != "param")
    engine.close()
    return sent, held
