"""Which stage and chunk holds which layers."""

from __future__ import annotations

import pytest

from megatron_progressive.runtime.layout import Layout


def pipeline(stages: int, chunks: int) -> Layout:
    return Layout(world=stages, pipeline=stages, virtual_pipeline=chunks)


@pytest.mark.parametrize("layers", [0, 1, 2, 3, 4, 5, 7, 8, 9, 12, 15, 16, 31])
@pytest.mark.parametrize(
    ("stages", "chunks"), [(1, 1), *((s, c) for s in (2, 3, 4) for c in (1, 2, 3))]
)
def test_layers_are_spread_evenly_in_the_order_of_virtual_stages(
    layers: int, stages: int, chunks: int
) -> None:
    placed = pipeline(stages, chunks).chunk_layers(layers)
    assert [len(stage) for stage in placed] == [chunks] * stages
    in_order = [placed[stage][chunk] for chunk in range(chunks) for stage in range(stages)]
    assert [number for numbers in in_order for number in numbers] == list(range(layers))
    for sizes in (
        [len(numbers) for numbers in in_order],
        [sum(len(numbers) for numbers in stage) for stage in placed],
    ):
        assert max(sizes) - min(sizes) <= 1
    # the head's chunk takes an extra layer only when nothing else is left
    extra = layers % (stages * chunks)
    if layers > stages * chunks and extra:
        assert len(in_order[-1]) == layers // (stages * chunks)


@pytest.mark.parametrize(
    ("stages", "chunks", "layers", "expected"),
    [
        (2, 2, 4, [["0", "2"], ["1", "3"]]),
        (2, 2, 5, [["0", "2 3"], ["1", "4"]]),  # neither beside the embedding nor the head
        (2, 2, 1, [["0", ""], ["", ""]]),
        (2, 2, 3, [["0", "2"], ["1", ""]]),
        (2, 1, 3, [["0 1"], ["2"]]),  # the embedding is a lookup, the head a large matrix
        (4, 1, 6, [["0"], ["1 2"], ["3 4"], ["5"]]),
        (4, 1, 7, [["0 1"], ["2 3"], ["4 5"], ["6"]]),
        (4, 1, 2, [["0"], ["1"], [""], [""]]),
    ],
)
def test_where_the_layers_go(
    stages: int, chunks: int, layers: int, expected: list[list[str]]
) -> None:
    placed = pipeline(stages, chunks).chunk_layers(layers)
    assert [[" ".join(map(str, chunk)) for chunk in stage] for stage in placed] == expected


def test_layouts_say_what_is_not_one() -> None:
    assert str(pipeline(2, 2)) == "DP=1 x PP=2 x VPP=2"
    assert str(Layout(world=8, tensor=2, pipeline=2)) == "DP=2 x TP=2 x PP=2"
