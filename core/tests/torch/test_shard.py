"""What a process knows of its part of the heads; `tests/contract` splits real models."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from kvdock.decode import _obstacle
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


def attention(**parts):
    """A layer whose parts carry the marks that transformers 5.4 leaves where it splits weights."""
    whole = torch.nn.Module()
    whole.attention = type("SomeAttention", (torch.nn.Module,), {})()
    for name, style in parts.items():
        part = torch.nn.Linear(2, 2)
        part._hf_tp_plan, part._hf_device_mesh = style, Mesh(None)
        whole.attention.add_module(name, part)
    whole.tp_size = 2
    return whole


CONFIG = SimpleNamespace(num_attention_heads=8, num_key_value_heads=4)


@pytest.fixture
def _together(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)


@pytest.mark.usefixtures("_together")
@pytest.mark.parametrize(
    ("styles", "size"),
    [
        ({"q_norm": "replicated_with_grad_allreduce", "q_proj": "colwise"}, 2),
        ({"qkv_proj": "packed_colwise", "o_proj": "rowwise"}, 2),
        ({"q_proj": "colwise_gather_output", "o_proj": "rowwise_split_input"}, 1),
    ],
)
def test_marked_plain_weights_are_found(styles, size):
    found = find_shard(attention(**styles), CONFIG)
    assert (found.rank, found.size, found.kv_heads) == (size - 1, size, 4 // size)


@pytest.mark.usefixtures("_together")
def test_a_model_that_is_not_split_is_whole_among_other_processes():
    model = attention()
    model.tp_size = None
    assert find_shard(model, CONFIG) is WHOLE


@pytest.mark.usefixtures("_together")
def test_a_split_that_nobody_marked_is_refused_when_its_heads_arrive():
    found = find_shard(attention(), CONFIG)
    found.check(4)
    with pytest.raises(UnsupportedError, match="2 key/value heads .* 4 were expected.*device_map"):
        found.check(2)


def test_a_layer_compares_the_heads_it_gets(docked, model, row, monkeypatch):
    plan = docked.new_cache().plan
    monkeypatch.setattr(plan, "facts", replace(plan.facts, shard=HeadShard(0, 2, None, 1)))
    with pytest.raises(UnsupportedError, match="2 key/value .* and 1 were expected of part 1 of 2"):
        model.generate(**row, max_new_tokens=2)


def test_a_split_model_is_not_captured(docked, model):
    plan = docked.new_cache().plan
    assert _obstacle(model, plan, False) is None
    split = replace(plan, facts=replace(plan.facts, shard=HeadShard(kv_heads=2)))
    assert "split over processes" in _obstacle(model, split, False)


def test_heads_that_cannot_be_split_evenly_are_refused():
    config = SimpleNamespace(num_attention_heads=8, num_key_value_heads=2)
    assert _checked(HeadShard(0, 2), config).size == 2
    with pytest.raises(UnsupportedError, match=r"8 query heads and 2 key/value heads.*4 processes"):
        _checked(HeadShard(0, 4), config)
