"""CaM written naively from the paper's equations: float64, explicit loops, Python integers.

Shapes: H query heads, K key/value heads, T queries, N keys, D head_dim; always one clean sequence.
"""

import torch

WORD = (1 << 64) - 1
CLOSE = 1e-4  # relative: what float32 may not be able to tell apart


def votes(queries, keys, window, scaling):
    """Return Ā[k][j]: the window's probabilities of key j, summed, averaged over the group."""
    n, kv_heads = keys.shape[1], keys.shape[0]
    group = queries.shape[0] // kv_heads
    q, k = queries[:, -window:].double(), keys.double().repeat_interleave(group, dim=0)
    logits = q @ k.transpose(1, 2) * scaling
    future = torch.arange(n) > torch.arange(n - window, n)[:, None]
    a = logits.masked_fill(future, float("-inf")).softmax(-1)
    return a.sum(dim=1).view(kv_heads, group, n).mean(dim=1).tolist()


def top(scores, count):
    """Return the best positions ascending, and whether the choice is clear."""
    order = sorted(range(len(scores)), key=lambda j: (-scores[j], j))
    clear = True
    if 0 < count < len(scores):
        last, first = scores[order[count - 1]], scores[order[count]]
        clear = last - first > CLOSE * last
    return sorted(order[:count]), clear


def mixed(state):
    """Return SplitMix64's next output for a state."""
    state = (state + 0x9E3779B97F4A7C15) & WORD
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & WORD
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & WORD
    return state ^ (state >> 31)


def uniform(seed, layer, head, position):
    """Return the draw in [0, 1) of one entry."""
    stream = (seed * 0x9E3779B97F4A7C15 + layer) * 0xBF58476D1CE4E5B9
    return (mixed((stream + head * 0x94D049BB133111EB + position) & WORD) >> 40) / 2**24


def merge(values, attention, kept, m, weight):
    """Return the kept values [C, D] with evicted ones merged in, one entry and target at a time.

    Args:
        weight: called with (position, p); what part of the value is merged.
    """
    merged = {j: values[j].double().clone() for j in kept}
    for i in range(len(attention)):
        if i in merged:
            continue
        targets = [j for j in kept if j > i][:m]
        mean = sum(attention[j] for j in targets) / len(targets)
        p = min(max(attention[i] / mean if mean else 0.0, 0.0), 1.0)
        for j in targets:
            merged[j] = merged[j] + weight(i, p) / len(targets) * values[i].double()
    return torch.stack([merged[j] for j in kept])


def select(q, k, v, *, slots, window, m, base, sample, seed, layer, scaling):
    """Return (kept positions [K][C], values [K, C, D], whether every choice was clear)."""
    kv_heads, n, _ = k.shape
    if n <= slots:
        return [list(range(n))] * kv_heads, v.double(), True
    window, sure = max(1, min(window, slots - 1)), True
    positions, values = [], []
    for head, attention in enumerate(votes(q, k, window, scaling)):
        if base == "streaming":
            kept = [*range(slots // 2), *range(n - slots + slots // 2, n)]
        else:
            prefix, clear = top(attention[: n - window], slots - window)
            kept, sure = [*prefix, *range(n - window, n)], sure and clear
        unclear = []

        def weight(position, p, head=head, unclear=unclear):
            if not sample:
                return p
            draw = uniform(seed, layer, head, position)
            unclear.extend([position] if abs(draw - p) < CLOSE * max(p, 1e-4) else [])
            return float(draw < p)

        positions.append(kept)
        values.append(merge(v[head], attention, kept, m, weight))
        sure = sure and not unclear
    return positions, torch.stack(values), sure
