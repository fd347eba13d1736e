"""What a process knows of its part of the heads; `tests/contract` splits real models."""

from types import SimpleNamespace

import pytest
import torch

from kvdock.errors import UnsupportedError
from kvdock.policy import ModelFacts
from kvdock.shard import WHOLE, HeadShard, _checked, _part, find_shard
from kvdock.testing_models import tiny_model


class Mesh:
    """Stand for a mesh of two processes in each dimension, seen from the second one."""

    def __init__(self, names):
        self.mesh_dim_names, self.ndim = names, len(names or "1")

    def __getitem__(self, name):
        return Mesh((name,))

    def get_local_rank(self):
        return 1

    def size(self):
        return 2

    def get_group(self):
        return f"group of {self.mesh_dim_names}"


def test_parts_follow_each_other():
    parts = [HeadShard(rank, 3).place(4) for rank in range(3)]
    assert [list(range(12))[part] for part in parts] == [
        list(range(start, start + 4)) for start in (0, 4, 8)
    ]
    assert WHOLE.place(4) == slice(0, 4)


def test_alone_the_sum_is_the_part():
    part = torch.ones(2)
    assert WHOLE.total(part) is part
    assert ModelFacts(1, None).shard is WHOLE
    assert find_shard(tiny_model("llama"), None) is WHOLE


@pytest.mark.parametrize("names", [None, ("tp",), ("pp", "fsdp", "tp")])
def test_the_dimension_that_splits_heads_is_found(names):
    group = f"group of {names and ('tp',)}"
    assert _part(Mesh(names), [0]) == HeadShard(1, 2, group)


def test_an_unnamed_mesh_of_several_dimensions_is_refused():
    with pytest.raises(UnsupportedError, match="Name it 'tp'"):
        _part(Mesh(("a", "b")), [1])


def test_heads_that_cannot_be_split_evenly_are_refused():
    config = SimpleNamespace(num_attention_heads=8, num_key_value_heads=2)
    assert _checked(HeadShard(0, 2), config).size == 2
    with pytest.raises(UnsupportedError, match=r"8 query heads and 2 key/value heads.*4 processes"):
        _checked(HeadShard(0, 4), config)
