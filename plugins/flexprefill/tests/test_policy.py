"""When the policy attends densely, and what it hands to the kernel."""

import pytest
import torch

from kvdock.kernels.blocks import mask_from_lists
from kvdock.kernels.reference import ReferenceBackend
from kvdock.policy import AttentionParams, ModelFacts
from kvdock_flexprefill import policy as module
from kvdock_flexprefill.options import FlexPrefillOptions
from kvdock_flexprefill.policy import FlexPrefillPolicy

from .harness import mask_of, options, states

PLAIN = AttentionParams(0.25)


def prefill(chosen, *, queries, keys, params=PLAIN, policy=None):
    query, key = (x.float() for x in states(1, queries=queries, keys=keys))
    policy = policy or FlexPrefillPolicy(chosen)
    return policy.prefill(query, key, key.flip(2), params, layer=0)


@pytest.mark.parametrize(
    ("changes", "queries", "keys", "dense"),
    [
        ({}, 257, 257, False),
        ({}, 256, 256, True),  # two blocks
        ({"min_budget": 400}, 513, 513, False),
        ({"min_budget": 400}, 512, 512, True),  # all in the least budget
        ({"dense_below": 600}, 599, 599, True),
        ({"dense_below": 600}, 600, 600, False),
        ({}, 128, 900, True),  # a chunk of one block
        ({}, 129, 900, False),
        ({"block": 16, "min_budget": 16}, 33, 33, False),
        ({"gamma": 1.0}, 900, 900, True),
    ],
)
def test_what_is_too_short_to_gain_is_left_to_dense_attention(changes, queries, keys, dense):
    assert (prefill(options(**changes), queries=queries, keys=keys) is None) == dense


@pytest.mark.parametrize(
    "params", [AttentionParams(0.25, softcap=30.0), AttentionParams(0.25, sinks=torch.zeros(4))]
)
def test_scores_the_selector_does_not_know_are_left_to_dense_attention(params):
    assert prefill(options(), queries=500, keys=500, params=params) is None


def test_by_default_short_prompts_are_dense():
    assert FlexPrefillOptions().attends_densely(8191, 8191)
    assert not FlexPrefillOptions().attends_densely(16_384, 16_384)


@pytest.mark.parametrize("mode", ["exact", "compat"])
@pytest.mark.parametrize(("queries", "keys"), [(600, 600), (333, 777)])
def test_the_output_is_dense_attention_over_the_selected_blocks(mode, queries, keys):
    chosen = options(mode=mode, gamma=0.5)
    found = prefill(chosen, queries=queries, keys=keys)
    query, key = (x.float() for x in states(1, queries=queries, keys=keys))
    position = torch.arange(keys)
    rows = position[keys - queries :]
    mask = mask_of(query, key, chosen)[0]
    seen = mask[:, rows // 128 - (keys - queries) // 128][..., position // 128]
    seen = seen & (position <= rows[:, None])
    grouped = [x[0].repeat_interleave(2, 0).double() for x in (key, key.flip(2))]
    scores = query[0].double() @ grouped[0].transpose(1, 2) * 0.25
    wanted = scores.masked_fill(~seen, float("-inf")).softmax(-1) @ grouped[1]
    assert torch.allclose(found[0].transpose(0, 1).double(), wanted, atol=1e-5)
    dense = ReferenceBackend().attend(query, key, key.flip(2), PLAIN)
    assert (found - dense).abs().max() > 1e-3


def test_every_device_and_type_gets_a_kernel_of_its_own(monkeypatch):
    asked = []
    choose = module.choose_sparse_backend

    def spy(name, device, *rest):
        asked.append((name, str(device), *rest))
        return choose("reference", device, *rest)

    monkeypatch.setattr(module, "choose_sparse_backend", spy)
    policy = FlexPrefillPolicy(options())
    facts = ModelFacts(
        1, None, device=torch.device("cuda:1"), dtype=torch.bfloat16, head_dim=16
    )  # fmt: skip
    policy.bind(facts, "triton")
    for _ in range(2):
        prefill(None, queries=500, keys=500, policy=policy)
    assert asked == [
        ("triton", "cuda:1", torch.bfloat16, 16, 128), ("triton", "cpu", torch.float32, 16, 128),
    ]  # fmt: skip


def test_lists_hold_what_the_masks_hold():
    query, key = states(6, keys=700)
    lists = module.select(query, key, PLAIN, options(gamma=0.5))
    mask = mask_from_lists(lists, 6)
    assert torch.equal(lists.count, mask.sum(-1).int())
    assert lists.index.dtype == lists.count.dtype == torch.int32
    assert lists.count.is_contiguous()
