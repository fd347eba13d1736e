"""ThinK in float64 and Python loops, one row at a time."""

import torch


def frobenius(queries, keys):
    """Return ‖q_i k_iᵀ‖_F of every channel, [K, D], the products really formed."""
    heads, group = keys.shape[0], queries.shape[0] // keys.shape[0]
    found = torch.zeros(heads, keys.shape[-1], dtype=torch.float64)
    for head in range(heads):
        q = queries[head * group : (head + 1) * group].double().flatten(0, 1)
        for i in range(keys.shape[-1]):
            found[head, i] = torch.outer(q[:, i], keys[head, :, i].double()).norm()
    return found


def zero_filled(keys, channels, start):
    """Return float64 keys [K, N, D] whose tokens before ``start`` have only their channels."""
    filled = torch.zeros_like(keys, dtype=torch.float64)
    for head in range(keys.shape[0]):
        filled[head][:, channels[head]] = keys[head][:, channels[head]].double()
    filled[:, start:] = keys[:, start:].double()
    return filled


def attend(query, keys, values, scaling):
    """Attend with [H, Q, D] over all of [K, N, D] in float64; return output and log-sum-exps."""
    group = query.shape[0] // keys.shape[0]
    keys, values = (x.double().repeat_interleave(group, dim=0) for x in (keys, values))
    scores = query.double() @ keys.transpose(1, 2) * scaling
    return scores.softmax(-1) @ values, scores.logsumexp(-1)


def whole_from(prompt, live, recent, block=128):
    """Return the first whole token of a row, moving one block after another."""
    start = max(prompt - recent, 0)
    for seen in range(prompt, live + 1):
        if seen - start > recent + block:
            start += block
    return start
