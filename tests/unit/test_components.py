from __future__ import annotations

import pytest
import torch

from rgft.components import Component, ParameterSlice, Partition
from rgft.errors import PartitionError


def rows(start: int, stop: int, name: str = "w") -> ParameterSlice:
    return ParameterSlice(parameter=name, shape=(6, 4), dim=0, start=start, stop=stop)


def component(name: str, *slices: ParameterSlice, depth: int = 1) -> Component:
    return Component(name=name, kind="other", slices=slices, depth=depth)


def split(*components: Component) -> Partition:
    return Partition(components=components, layers=("layers.0",), granularity="custom")


def test_slice_is_a_view_of_its_range():
    weight = torch.arange(24.0).reshape(6, 4)
    columns = ParameterSlice(parameter="w", shape=(6, 4), dim=1, start=1, stop=3)
    columns.of(weight).zero_()
    assert weight[:, 1:3].abs().sum() == 0
    assert weight[:, 0].tolist() == [0.0, 4.0, 8.0, 12.0, 16.0, 20.0]
    assert (columns.numel, columns.fraction, columns.is_whole) == (12, 0.5, False)


def test_whole_slice_is_the_tensor_itself():
    weight = torch.zeros(6, 4)
    whole = ParameterSlice(parameter="w", shape=(6, 4))
    assert whole.of(weight) is weight
    assert (whole.numel, whole.fraction, whole.is_whole) == (24, 1.0, True)


@pytest.mark.parametrize(("dim", "start", "stop"), [(2, 0, 1), (-1, 0, 1), (0, 3, 3), (0, 0, 7), (0, -1, 2)])
def test_slice_outside_the_parameter_is_refused(dim: int, start: int, stop: int):
    with pytest.raises(PartitionError, match="does not lie inside 'w'"):
        ParameterSlice(parameter="w", shape=(6, 4), dim=dim, start=start, stop=stop)


def test_scalar_parameter_has_one_element():
    assert ParameterSlice(parameter="gate", shape=()).numel == 1


def test_partition_looks_up_counts_and_cuts():
    partition = split(
        component("low", rows(0, 2), depth=0), component("mid", rows(2, 3)), component("high", rows(3, 6), depth=2)
    )
    assert partition["mid"].numel == 4
    assert partition.numel == 24
    assert partition.names == ("low", "mid", "high")
    assert partition.max_cut == 2
    assert [c.name for c in partition.above(1)] == ["mid", "high"]
    assert len(partition) == len(list(partition)) == 3


def test_repeated_names_are_refused():
    with pytest.raises(PartitionError, match="more than once: a"):
        split(component("a", rows(0, 3)), component("b", rows(3, 5)), component("a", rows(5, 6)))


def test_exact_cover_passes():
    whole = ParameterSlice(parameter="bias", shape=(6,))
    partition = split(component("a", rows(3, 6), whole), component("b", rows(0, 3)))
    partition.check_cover({"w": (6, 4), "bias": (6,)})


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([rows(0, 3)], "nothing owns 3:6 of dimension 0"),
        ([rows(1, 6)], "nothing owns 0:1 of dimension 0"),
        ([rows(0, 2), rows(4, 6)], "nothing owns 2:4 of dimension 0"),
        ([rows(0, 4), rows(3, 6)], "3:4 is owned twice"),
        ([rows(0, 6), rows(2, 3)], "2:3 is owned twice"),
        ([ParameterSlice(parameter="w", shape=(6, 4)), rows(0, 1)], "is in several"),
        ([rows(0, 3), ParameterSlice(parameter="w", shape=(6, 4), dim=1, start=0, stop=2)], "several dimensions"),
        ([rows(0, 6), rows(0, 6, "frozen")], "'frozen', which is no trainable parameter"),
        ([ParameterSlice(parameter="w", shape=(4, 6))], "has shape"),
    ],
)
def test_gaps_overlaps_and_strangers_are_named(parts: list[ParameterSlice], message: str):
    partition = split(*(component(f"c{index}", part) for index, part in enumerate(parts)))
    with pytest.raises(PartitionError, match=message):
        partition.check_cover({"w": (6, 4)})


def test_all_problems_are_reported_at_once():
    with pytest.raises(PartitionError) as caught:
        split(component("a", rows(0, 3))).check_cover({"w": (6, 4), "lost": (2,)})
    assert "nothing owns 3:6" in str(caught.value)
    assert "'lost' of shape (2,) is in no component" in str(caught.value)
    assert "granularity=" in str(caught.value)
