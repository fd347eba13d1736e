"""The log-sum-exps of dense attention: right, free of side effects, shown to who reads them."""

import pytest
import torch

import kvdock
from kvdock.kernels.flash import FlashBackend
from kvdock.kernels.reference import ReferenceBackend
from kvdock.kernels.sdpa import SDPABackend
from kvdock.policy import AttentionParams, CachePolicy
from kvdock.testing_models import left_padded, tiny_model


def states(heads, kv_heads, length, dim, dtype):
    generator = torch.Generator().manual_seed(length)
    shapes = [(2, n, length, dim) for n in (heads, kv_heads, kv_heads)]
    return [torch.randn(*shape, generator=generator).to(dtype) for shape in shapes]


def exact(query, key, scaling):
    key = key.double().repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    logits = query.double() @ key.transpose(-1, -2) * scaling
    future = torch.ones(logits.shape[-2:], dtype=torch.bool).triu(1)
    return logits.masked_fill(future, float("-inf")).logsumexp(-1)


@pytest.mark.parametrize("length", [1, 2, 129, 600])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sdpa_gives_them_with_the_same_output(length, heads, kv_heads, dtype):
    query, key, value = states(heads, kv_heads, length, 64, dtype)
    params = AttentionParams(0.2)
    output, lse = SDPABackend().attend_lse(query, key, value, params)
    assert torch.equal(output, SDPABackend().attend(query, key, value, params))
    assert output.is_contiguous()
    assert lse.dtype == torch.float32
    assert lse.shape == query.shape[:3]
    assert torch.allclose(lse.double(), exact(query, key, 0.2), rtol=0, atol=2e-4)


@pytest.mark.parametrize("backend", [SDPABackend(), ReferenceBackend()])
def test_where_they_are_not_free_there_are_none(backend):
    query, key, value = states(4, 2, 40, 64, torch.float32)
    output, lse = backend.attend_lse(query[:, :, 7:], key, value, AttentionParams(0.2))
    assert lse is None
    assert torch.equal(output, backend.attend(query[:, :, 7:], key, value, AttentionParams(0.2)))


def test_flash_attention_is_asked_by_its_own_switch():
    asked = {}

    def dense(query, key, value, softmax_scale, causal, **switch):
        asked.update(switch)
        return query, torch.zeros(2, 4, 9), "more"

    query, key, value = states(4, 2, 9, 64, torch.float32)
    backend = FlashBackend("flash", dense, dense, "return_lse")
    output, lse = backend.attend_lse(query, key, value, AttentionParams(0.2))
    assert asked == {"return_lse": True}
    assert output.shape == (2, 9, 4, 64)
    assert lse.shape == (2, 4, 9)


class Spy(CachePolicy):
    """Keep everything and note what is shown."""

    observes_prompt = True

    def __init__(self, reads_lse):
        self.reads_lse = reads_lse
        self.seen = []

    def select(self, view):
        return None

    def observe_prompt(self, view):
        self.seen.append((view.queries, view.keys, view.lse, view.params.scaling))
        return {}


@pytest.mark.parametrize("reads", [False, True])
@pytest.mark.parametrize("lengths", [(30, 30), (30, 21)])
def test_a_policy_sees_them_when_it_reads_them(reads, lengths):
    model, (batch, _) = tiny_model("llama"), left_padded(lengths)
    policy = Spy(reads)
    with kvdock.attach(model, [policy], budget=8) as dock, torch.no_grad():
        model(**batch, past_key_values=dock.new_cache())
    padded = len(set(lengths)) > 1
    assert len(policy.seen) == 3 * (len(lengths) if padded else 1)
    for queries, keys, lse, scaling in policy.seen:
        if reads and not padded:
            assert torch.allclose(lse.double(), exact(queries, keys, scaling), atol=1e-5)
        else:
            assert lse is None


def test_a_prompt_in_pieces_shows_what_its_kernel_gives(monkeypatch):
    """Flash attention knows them for every piece; each row gets its own."""
    given = []

    def attend_lse(self, query, key, value, params):
        given.append(torch.randn(query.shape[:3]))
        return self.attend(query, key, value, params), given[-1]

    monkeypatch.setattr(SDPABackend, "attend_lse", attend_lse)
    model, (batch, _) = tiny_model("llama", num_hidden_layers=1), left_padded((30, 30))
    policy = Spy(True)
    with kvdock.attach(model, [policy], budget=8) as dock, torch.no_grad():
        cache = dock.new_cache(prompt_length=30)
        for part in (slice(0, 12), slice(12, 30)):
            model(batch["input_ids"][:, part], past_key_values=cache)
    seen = [lse for _, _, lse, _ in policy.seen]
    assert len(given) == 2
    assert torch.equal(torch.cat(seen[:2]), given[0])
    assert torch.equal(torch.cat(seen[2:]), given[1])
