"""Attention within documents: the losses of one document at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_progressive.config import ConfigError, RunConfig, from_dict
from megatron_progressive.data.documents import DocumentTokens, with_documents
from megatron_progressive.engines.base import GlobalBatch, in_batches
from megatron_progressive.engines.megatron.context import SequencePart
from megatron_progressive.engines.megatron.inputs import model_inputs
from megatron_progressive.plan.preflight import check_run
from tests.engines import on_ranks
from tests.pool import Pool

END, COUNT = 7, 11


def tokens(first: int, count: int) -> torch.Tensor:
    """Samples in which documents of several lengths end, among them empty ones."""
    rows = on_ranks.tokens(first, count)
    for row, number in zip(rows, range(first, first + count), strict=True):
        row[row == END] = END + 1
        row[[place for place in range(16) if (place * 5 + number) % 7 in (0, 1)][: number % 4]] = (
            END
        )
    return rows


def known(first: int, count: int) -> DocumentTokens:
    return with_documents(tokens(first, count), END)


def config_of(family: str, *words: str) -> RunConfig:
    return on_ranks.family_config(family, ["data.attention=document", "model.num_layers=2", *words])


def whole_and_apart(config: RunConfig) -> tuple[float, float, float]:
    """The validation loss within documents; that of each document alone, from the same model as it
    is without documents; and that of whole samples."""
    engine: Any = on_ranks.start(config)
    within = engine.evaluate(in_batches(known, COUNT, 8))
    plain = engine.evaluate(in_batches(tokens, COUNT, 8))
    model, losses = engine.chunks[0].eval(), []
    for row in tokens(0, COUNT):
        ends = [n + 1 for n in range(16) if int(row[n]) == END]
        for begin, end in zip([0, *ends], [*ends, 16], strict=True):
            if begin < end:
                part = row[begin : end + 1][None]
                places = torch.arange(end - begin)[None]
                with torch.no_grad():
                    losses += model(part[:, :-1], places, None, labels=part[:, 1:])[0].tolist()
    engine.close()
    return within, sum(losses) / len(losses), plain


@pytest.mark.parametrize("family", ["gpt2", "llama3", "qwen3", "mixtral", "deepseek_v3"])
def test_losses_are_those_of_one_document_at_a_time(pool: Pool, family: str) -> None:
    within, apart, plain = pool.run(1, whole_and_apart, config_of(family))[0]
    assert within == pytest.approx(apart, rel=1e-5)
    assert abs(plain - apart) > 1e-4  # it matters


def trained(config: RunConfig, within: bool = True) -> list[float]:
    """Losses within documents, or of whole samples."""
    engine, read = on_ranks.start(config), known if within else tokens
    losses = [engine.train_step(GlobalBatch(read, 8 * n, 8), 0.01).loss for n in range(3)]
    losses.append(engine.evaluate(in_batches(read, COUNT, 8)))
    engine.close()
    return losses


def test_every_layout_and_engine_has_the_same_losses(pool: Pool) -> None:
    wanted = pool.run(1, trained, config_of("gpt2"))[0]
    for words in (["parallel.tensor=2"], ["parallel.pipeline=2"],
                  ["parallel.engine=deepspeed", "parallel.zero_stage=1"]):  # fmt: skip
        assert pool.run(2, trained, config_of("gpt2", *words))[0] == pytest.approx(wanted, rel=1e-5)


def test_positions_begin_anew_behind_the_end_of_a_document() -> None:
    rows = torch.tensor([[5, END, 6, 6, END, END, 4, 9], [END, 1, 2, 3, 4, 5, 6, END]])
    found = with_documents(rows, END)
    assert found.positions.tolist() == [[0, 1, 0, 1, 2, 0, 0], [0, 0, 1, 2, 3, 4, 5]]
    device = torch.device("cpu")
    inputs = model_inputs(found, SequencePart.of(7), device, packed=False)
    assert inputs.mask is not None
    assert inputs.mask[0, 0].sum(dim=1).tolist() == [1, 2, 1, 2, 3, 1, 1]
    # as Transformer Engine takes it: one row, and where its sequences end
    packed = model_inputs(found, SequencePart.of(7), device, packed=True)
    assert packed.tokens.tolist() == [rows[:, :-1].flatten().tolist()]
    assert packed.labels.tolist() == [rows[:, 1:].flatten().tolist()]
    assert packed.positions.tolist() == [found.positions.flatten().tolist()]
    packing = packed.more["packed_seq_params"]
    assert packing.cu_seqlens_q.tolist() == [0, 2, 5, 6, 7, 8, 14]
    assert (packing.max_seqlen_q, packing.qkv_format) == (6, "thd")


def test_where_it_cannot_be() -> None:
    with pytest.raises(ConfigError, match=r"data\.attention: got 'document' with model\.mtp_lay"):
        check_run(config_of("deepseek_v3", "model.mtp_layers=1"), 1)
    images = {"model": {"family": "resnet"}, "data": {"attention": "document"}}
    with pytest.raises(ConfigError, match=r"data\.attention: got 'document' for family resnet"):
        check_run(from_dict(images), 1)
