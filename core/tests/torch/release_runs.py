"""Run the kernels that give entries up on small inputs and in tiny models; print JSON.

A program of its own: the interpreter, which stands in for a GPU, has to be chosen before Triton is
imported for the first time. `test_release.py` runs it.
"""

import json
import os
import sys
from types import SimpleNamespace

if "--interpret" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"
os.environ["KVDOCK_FROZEN"] = "1"

import torch

from kvdock import frozen, frozen_release
from kvdock.kernels import release_triton, slots, slots_triton
from kvdock.policy import AttentionParams
from kvdock.testing import Case, alone, generate, left_padded

DEVICE = torch.device("cpu" if "--interpret" in sys.argv else "cuda")
PROCESSORS = 3
"""Pretended number of multiprocessors, so that small rows are split as long ones are."""


def case(batch, kv_heads, group, n, gone, dim=16, seed=0):
    """Return queries, keys, positions with empty slots, in an order that is not theirs."""
    generator = torch.Generator().manual_seed(seed + n)
    query = torch.randn(batch, kv_heads * group, 1, dim, generator=generator)
    key = torch.randn(batch, kv_heads, n, dim, generator=generator)
    places = torch.rand(batch, kv_heads, 3 * n, generator=generator).argsort(2)[..., :n]
    position = places.masked_fill(torch.arange(n) >= n - torch.tensor(gone)[:, None, None], -1)
    newest = position.argmax(2, keepdim=True)
    position = position.scatter(2, newest, 3 * n).int()
    return tuple(tensor.to(DEVICE) for tensor in (query, key, position))


def received(query, key, position, mean):
    """Return what a step's query gives to every slot, summed over the group, float64."""
    batch, heads, _, dim = query.shape
    group = heads // key.shape[1]
    scores = query.double().view(batch, -1, group, dim) @ key.double().transpose(2, 3) * dim**-0.5
    weights = scores.masked_fill(position[:, :, None] < 0, float("-inf")).softmax(-1)
    return weights.mean(2) if mean else weights.sum(2)


def attention(query, key, position):
    """Return the logits that the attention kernel tells, and its output's error."""
    batch, heads, n = query.shape[0], query.shape[1], key.shape[2]
    told = (
        torch.full((batch, heads, n), float("nan"), device=DEVICE),
        torch.full((batch, heads), float("nan"), device=DEVICE),
    )
    arrived = torch.zeros(batch * key.shape[1], dtype=torch.int32, device=DEVICE)
    params = AttentionParams(query.shape[-1] ** -0.5)
    found = slots_triton.attend(query, key, key, params, arrived, position=position, told=told)
    plain = slots_triton.attend(query, key, key, params, arrived, position=position)
    assert torch.equal(found, plain)
    return told


def smallest_sum(n, kv_heads=2, group=3, recent=2, mean=True):
    batch = 3
    query, key, position = case(batch, kv_heads, group, n, (0, 1, 0))
    logits, total = attention(query, key, position)
    over = torch.tensor([True, False, True], device=DEVICE)
    score = torch.rand(position.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    score[2] = 0.0
    last = 3 * n
    fresh = torch.where(position == last, 0.0, score.double())
    wanted = fresh + received(query, key, position, mean)
    stay = torch.tensor([recent, 1, 3], device=DEVICE)
    may = (position >= 0) & (position <= last - stay[:, None, None])
    victim = wanted.masked_fill(~may, float("inf")).argmin(2)
    released = torch.full((batch, kv_heads), -5, device=DEVICE)
    after = position.clone()
    tokens = torch.full((batch,), last, device=DEVICE)
    release_triton.drop_smallest_sum(
        after, released, over, stay, tokens, logits, total, score, mean=mean
    )
    error = (score - wanted)[position >= 0].abs().max().item()
    return error, given_up(position, after, released, victim, over)


def given_up(before, after, released, victim, over):
    wanted = before.clone()
    for row in over.nonzero()[:, 0].tolist():
        wanted[row].scatter_(1, victim[row][:, None], -1)
    return torch.equal(wanted, after) and torch.equal(released[over], victim[over])


def least_attended(n, kv_heads=2, group=2, window=3, pool=5):
    batch = 2
    query, key, position = case(batch, kv_heads, group, n, (0, 2))
    logits, total = attention(query, key, position)
    far = torch.iinfo(torch.int32).max
    order = position.masked_fill(position < 0, far).argsort(dim=2, stable=True).int()
    over = torch.tensor([True, False], device=DEVICE)
    live = torch.tensor([n - 1, n - 3], device=DEVICE)
    stay = torch.tensor([window, 1], device=DEVICE)
    ranked = received(query, key, position, True).gather(2, order.long())
    count = (live + 1 - stay)[:, None, None]
    beyond = torch.arange(n, device=DEVICE) >= count
    ranked = torch.nn.functional.avg_pool1d(
        ranked.masked_fill(beyond, 0), pool, stride=1, padding=pool // 2
    )
    ranked = ranked.masked_fill(beyond, float("inf"))
    chosen = n - 1 - ranked.flip(2).argmin(2, keepdim=True)  # of equals the highest position
    victim = order.long().gather(2, chosen)[..., 0]
    released = torch.full((batch, kv_heads), -5, device=DEVICE)
    after, moved = position.clone(), order.clone()
    scratch = torch.empty(position.numel(), device=DEVICE)
    release_triton.drop_least_attended(
        after, released, over, stay, live, logits, total, moved, scratch, mean=True, pool=pool
    )
    shifted = order.clone()
    for head in range(kv_heads):
        left = [slot for slot in order[0, head].tolist() if slot != victim[0, head]]
        shifted[0, head] = torch.tensor([*left, int(victim[0, head])], device=DEVICE)
    same = torch.equal(shifted, moved)
    return 0.0, given_up(position, after, released, victim, over) and same


def kernel_runs():
    for n in (5, 37, 256, 1030):
        yield f"sum {n}", smallest_sum(n)
        yield f"step {n}", least_attended(n)
    yield "sum over the group", smallest_sum(61, kv_heads=1, group=8, mean=False)
    yield "one query head", smallest_sum(61, kv_heads=3, group=1, recent=20)
    yield "no neighbours", least_attended(61, pool=1)
    yield "wide window", least_attended(61, window=40, pool=9)


def model_run(method, family, tokens_alone=8, tokens_padded=4):
    """Say whether tokens and states of kernels equal those of the policy's own operations."""
    model_case = Case(method, family)
    model = model_case.model().to(DEVICE)
    texts = left_padded((70, 41))
    rows = {name: tensor.to(DEVICE) for name, tensor in texts[0].items()}
    one = {name: tensor.to(DEVICE) for name, tensor in alone(texts[1][0]).items()}
    runs, used = [], []
    original = frozen.fused_release
    for fused in (False, True):

        def counted(stores, held, fused=fused):
            made = original(stores, held) if fused else None
            used.append(made is not None)
            return made

        frozen.fused_release = counted
        with model_case.attach(model, graph="auto") as dock:
            tokens = [generate(model, one, max_new_tokens=tokens_alone)]
            tokens.append(generate(model, rows, max_new_tokens=tokens_padded))
            kept = [dock.kept_positions(layer) for layer in range(model.config.num_hidden_layers)]
        runs.append((tokens, kept))
    frozen.fused_release = original
    same = all(
        torch.equal(a, b)
        for left, right in zip(*runs, strict=True)
        for a, b in zip(left, right, strict=True)
    )
    return {"same": same, "used": used}


if DEVICE.type == "cpu":  # the interpreter serves where no kernel would be looked for
    slots.slot_kernel = lambda query, key, value, form: slots_triton.attend
    frozen.has_kernel = lambda store, form=None: True
slots_triton.multiprocessors = lambda device: PROCESSORS
kernels = dict(kernel_runs())
models = {
    f"{method} {family}": model_run(method, family)
    for method, family in (
        ("streamingllm", "llama"),
        ("h2o", "qwen3"),
        ("cakekv", "mistral"),
    )
}
# kernels that give nothing up must not be taken
frozen_release.release_kernels = lambda: SimpleNamespace(drop_oldest=lambda *given: None)
refused = model_run("streamingllm", "llama", 3, 2)
print(json.dumps({"kernels": kernels, "models": models, "refused": refused}))
