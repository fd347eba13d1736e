"""No T×T tensor in a prefill, and never more than one layer that is not compressed yet."""

import gc

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import kvdock
from kvdock.testing_models import left_padded, tiny_model


class Largest(TorchDispatchMode):
    """Record the most elements any operation's result has."""

    def __init__(self):
        super().__init__()
        self.elements, self.operation = 0, None

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.numel() > self.elements:
                self.elements, self.operation = leaf.numel(), str(func)
        return result


def largest(model, batch, **kwargs):
    with torch.no_grad(), Largest() as seen:
        model(**batch, **kwargs)
    return seen


@pytest.mark.parametrize("lengths", [(1500,), (1500, 900)], ids=["one row", "padded"])
def test_nothing_of_size_t_times_t(model, policy, lengths):
    batch = left_padded(lengths)[0]
    with kvdock.attach(model, [policy], budget=64) as dock:
        seen = largest(model, batch, past_key_values=dock.new_cache(), logits_to_keep=1)
    assert seen.elements < 1500 * 1500 / 4, seen.operation


def test_nothing_of_size_t_times_t_in_a_later_turn(model, policy):
    first, rest = left_padded((1500, 1500))[0]["input_ids"].split([900, 600], dim=1)
    with kvdock.attach(model, [policy], budget=2048) as dock, torch.no_grad():
        cache = dock.new_cache()
        model(first, past_key_values=cache)
        seen = largest(model, {"input_ids": rest}, past_key_values=cache, logits_to_keep=1)
    # an explicit mask of 512 queries is shared by all heads and rows
    assert seen.elements < 1500 * 1500 / 2, seen.operation


def test_the_recorder_sees_what_the_plain_model_builds():
    batch = left_padded((1500, 900))[0]
    assert largest(tiny_model("llama"), batch, logits_to_keep=1).elements >= 1500 * 1500


def full_size(length):
    """Count the live key or value tensors of a whole prompt, [1, 2, T, 16]."""
    gc.collect()
    found = {
        x.untyped_storage().data_ptr()
        for x in gc.get_objects()
        if type(x) is torch.Tensor and x.shape == (1, 2, length, 16)
    }
    return len(found)


def test_each_layer_is_freed_before_the_next(model, policy, row):
    """97 tokens come, 24 stay; the census looks at tensors, not at the books."""
    counts, held = [], []
    with kvdock.attach(model, [policy], budget=24) as dock, torch.no_grad():
        cache = dock.new_cache()

        def note(*_):
            counts.append(full_size(97))
            slots = [layer.store.storage.table for layer in cache.docked]
            held.append([table["key"].shape[2] for table in slots if table])

        hooks = [layer.register_forward_hook(note) for layer in model.model.layers]
        model(**row, past_key_values=cache)
        for hook in hooks:
            hook.remove()
    assert held == [[24], [24, 24], [24, 24, 24]]
    # cos and sin are [1, T, 16]; nothing of [1, 2, T, 16] outlives its layer
    assert counts == [0, 0, 0]


def test_a_dropped_cache_is_freed_at_once(model, policy, row):
    with kvdock.attach(model, [policy], budget=4096) as dock, torch.no_grad():
        gc.collect()
        gc.disable()
        try:
            cache = dock.new_cache()
            model(**row, past_key_values=cache)
            key = cache.docked[0].store.storage.table["key"]
            del cache
            dock.cache = None
            tensors = [x for x in gc.get_objects() if type(x) is torch.Tensor]
            alive = sum(key.shape == x.shape for x in tensors)
        finally:
            gc.enable()
    assert alive == 1, "only the test's own reference is left"
