"""Expanding a checkpoint on disk: the hook's depth map, one tensor at a time.

This takes one process without a job, and little memory: at most one tensor is held (twice while it
is cut into boxes or read). The result is what :func:`.hook.expand` makes of the same state.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_progressive.checkpoints.checkpoint import TrainingPosition, read_whole, seal
from megatron_progressive.checkpoints.index import Slots, StoredTensor, stored_tensors
from megatron_progressive.checkpoints.new_folder import check_new_folder, new_folder
from megatron_progressive.checkpoints.record import ModelRecord
from megatron_progressive.checkpoints.tokenizer_files import FOLDER, copy_tokenizer
from megatron_progressive.config import ConfigError, ExpansionSection, OptimSection
from megatron_progressive.expansion.depth_map import COPY, INIT, TensorRule, check_growth, rules_of
from megatron_progressive.models import tensor_table
from megatron_progressive.models.base import TensorSpec, layer_number, with_layer_number
from megatron_progressive.optim.rules import ADAMW, STATE_SLOTS, STEP, rule_of
from megatron_progressive.reshard.boxes import MASTER, PARAM, Key, whole
from megatron_progressive.runtime.progress import show_bytes

if TYPE_CHECKING:  # bad input is refused without loading torch
    import torch

    from megatron_progressive.checkpoints.streamed import TensorReader

LAYOUT = "offline"
"""The layout that an expanded checkpoint names, since no job has saved it."""


@dataclass(frozen=True)
class OfflineExpansion:
    """Everything that is to be written, after it has been checked."""

    checkpoint: Path
    out: Path
    position: TrainingPosition
    """The position of the result."""
    model: ModelRecord
    """The description of the result's model."""
    from_layers: int
    tensors: dict[Key, StoredTensor]
    """The tensors and slots of the result."""
    rules: dict[str, TensorRule]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())


def plan_expansion(checkpoint: Path, out: Path, expansion: ExpansionSection) -> OfflineExpansion:
    """Check everything, and derive what the deeper checkpoint will hold. Nothing is created.

    Args:
        expansion: the expansion as in a configuration; ``at`` and ``parallel`` are not read.

    Raises:
        ConfigError: there is no whole checkpoint, a depth or a policy does not fit it, or ``out``
            exists or has no room.
    """
    position, model = read_whole(checkpoint)
    depth, target = position.num_layers, expansion.to_layers
    shape = replace(model.shape, num_layers=target)
    check_growth(expansion, model.shape, shape, "expansion", f"of {checkpoint}")
    table = tensor_table(shape)
    rules = rules_of(expansion, model.shape, shape)
    stored = stored_tensors(checkpoint)
    plan = OfflineExpansion(
        checkpoint=checkpoint,
        out=out,
        position=replace(position, expansions=position.expansions + 1, num_layers=target),
        model=replace(
            model,
            shape=shape,
            layout=LAYOUT,
            depth_history=(*model.depth_history, (position.step, target)),
        ),
        from_layers=depth,
        tensors={
            (name, slot): tensor
            for name, spec in table.items()
            for slot, tensor in _slots(name, spec, rules[name], stored, model).items()
        },
        rules=rules,
    )
    for (name, slot), tensor in plan.tensors.items():
        if rules[name].action(slot) == COPY:
            source = rules[name].source or name
            if stored.get(source, {}).get(slot) != tensor:
                raise ConfigError(
                    f"checkpoint: {checkpoint} has {source}/{slot} as "
                    f"{stored.get(source, {}).get(slot)}; accepted: {tensor}"
                )
    check_new_folder(out, plan.nbytes)
    return plan


def _slots(
    name: str, spec: TensorSpec, rule: TensorRule, stored: dict[str, Slots], model: ModelRecord
) -> Slots:
    """The slots of a target tensor: those of its kind in the source, or else those that the
    optimizer has."""
    alike = rule.source or (name if layer_number(name) is None else with_layer_number(name, 0))
    if alike in stored:
        return {
            slot: replace(tensor, shape=spec.shape if slot != STEP else tensor.shape)
            for slot, tensor in stored[alike].items()
        }
    if not spec.trainable:
        return {PARAM: StoredTensor(spec.shape, "float32")}
    rule_name = rule_of(spec, OptimSection(name=model.optimizer, embeddings=model.embeddings))
    full = StoredTensor(spec.shape, "float32")
    slots = {PARAM: full}
    if model.precision == "bf16":
        slots = {PARAM: StoredTensor(spec.shape, "bfloat16"), MASTER: full}
    slots |= dict.fromkeys(STATE_SLOTS[rule_name], full)
    if rule_name == ADAMW:
        slots[STEP] = StoredTensor((1,), "float32")
    return slots


def expand_checkpoint(plan: OfflineExpansion) -> None:
    """Write the deeper checkpoint; ``plan.out`` appears once all of it is on disk.

    The files go to a hidden folder beside ``plan.out``, which an error removes.
    """
    from megatron_progressive.checkpoints.streamed import TensorReader, TensorWriter

    with new_folder(plan.out) as temporary:
        reader = TensorReader(plan.checkpoint)
        with (
            TensorWriter(temporary, reader) as writer,
            show_bytes("expand", plan.nbytes) as advance,
        ):
            for key, tensor in plan.tensors.items():
                writer.write(key, _value(plan, reader, key))
                advance(tensor.nbytes)
        copy_tokenizer(plan.checkpoint / FOLDER, temporary / FOLDER)
        seal(temporary, plan.position, plan.model)


def _value(plan: OfflineExpansion, reader: TensorReader, key: Key) -> torch.Tensor:
    """One slot of one target tensor, filled as its rule says."""
    import torch

    from megatron_progressive.reshard.initial_values import initial_values

    name, slot = key
    rule, tensor = plan.rules[name], plan.tensors[key]
    action, dtype = rule.action(slot), getattr(torch, tensor.dtype)
    if action == COPY:
        return reader.read((rule.source or name, slot))
    if action == INIT:
        spec = tensor_table(plan.model.shape)[name]
        box, generation = whole(tensor.shape), plan.position.expansions
        return initial_values(plan.model.seed, generation, name, spec, box).to(dtype)
    return torch.zeros(tensor.shape, dtype=dtype)
