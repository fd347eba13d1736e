"""CAKE written naively from the paper's equations: float64, one-shot allocation, Python loops.

Shapes: H query heads, K key/value heads, W window queries, N keys, D head_dim; one clean sequence.
"""

import math

import torch

CLOSE = 1e-4  # relative: what float32 may not be able to tell apart


def attention(queries, keys, scaling):
    """Return A [H, W, N] in float64; the queries are the last ones."""
    q, k = queries.double(), keys.double()
    rows, n = q.shape[1], k.shape[1]
    k = k.repeat_interleave(q.shape[0] // k.shape[0], dim=0)
    logits = q @ k.transpose(1, 2) * scaling
    future = torch.arange(n) > torch.arange(n - rows, n)[:, None]
    return logits.masked_fill(future, float("-inf")).softmax(-1)


def dispersion(prefix):
    """Return H = −Σ P·log(P + 1e−10) of P [H, W, P]."""
    return -(prefix * (prefix + 1e-10).log()).sum().item()


def variance(prefix):
    """Return the variance over the queries, [H, P]."""
    if prefix.shape[1] == 1:
        return torch.zeros_like(prefix[:, 0])
    mean = prefix.mean(dim=1, keepdim=True)
    return ((prefix - mean) ** 2).sum(dim=1) / (prefix.shape[1] - 1)


def preference(prefix, tau1, tau2):
    """Return H^(1/τ1) · V^(1/τ2)."""
    return dispersion(prefix) ** (1 / tau1) * variance(prefix).sum().item() ** (1 / tau2)


def indicator(prefix, kv_heads, gamma, kernel):
    """Return e[k][j]: mean + γ·variance, averaged over neighbours, then over the group."""
    scores = prefix.mean(dim=1) + gamma * variance(prefix)
    group, half = scores.shape[0] // kv_heads, kernel // 2
    rows = []
    for head in scores:
        values = [0.0] * half + head.tolist() + [0.0] * half
        rows.append([sum(values[j : j + kernel]) / kernel for j in range(head.shape[0])])
    return [
        [sum(column) / group for column in zip(*rows[k * group : (k + 1) * group], strict=True)]
        for k in range(kv_heads)
    ]


def water_level(preferences, total, cap):
    """Return clamp(λ·p, 1, cap) with sum ``total``, λ found by halving an interval."""
    if max(preferences) == 0:
        preferences = [1.0] * len(preferences)
    low, high = 1e-3 / max(preferences), 1e3 * cap / min(preferences)
    for _ in range(400):
        middle = math.sqrt(low) * math.sqrt(high)
        if sum(min(max(middle * p, 1), cap) for p in preferences) < total:
            low = middle
        else:
            high = middle
    return [min(max(high * p, 1), cap) for p in preferences]


def budgets(preferences, total, cap):
    """Return whole prefix budgets, and whether float32 statistics can make every choice."""
    level = water_level(preferences, total, cap)
    near = [abs(x - round(x)) < 1e-7 * cap for x in level]
    counts = [round(x) if sure else math.floor(x) for x, sure in zip(level, near, strict=True)]
    rests = [0.0 if sure else x - math.floor(x) for x, sure in zip(level, near, strict=True)]
    order = sorted(range(len(level)), key=lambda layer: (-rests[layer], layer))
    up = total - sum(counts)
    for layer in order[:up]:
        counts[layer] += 1
    free = [x for x in level if 1 < x < cap]
    if max(preferences) == min(preferences) or len(free) == 1:
        return counts, True  # whole numbers by themselves
    clear = all(0.02 < x - math.floor(x) < 0.98 for x in free)
    if up:
        clear = clear and rests[order[up - 1]] - rests[order[up]] > 0.02
    return counts, clear


def top(scores, count):
    """Return the best positions ascending, and whether the choice is clear."""
    order = sorted(range(len(scores)), key=lambda j: (-scores[j], j))
    clear = True
    if 0 < count < len(scores):
        last, first = scores[order[count - 1]], scores[order[count]]
        clear = last == first or last - first > CLOSE * last
    return sorted(order[:count]), clear


def prompt(layers, *, slots, window, gamma, kernel, tau, scaling):
    """Return kept positions [layer][k][...] of one prompt, and whether every choice was clear.

    Args:
        layers: (queries [H, N, D], keys [K, N, D]) per layer.
    """
    n = layers[0][1].shape[1]
    if n <= slots:
        return [[list(range(n))] * k.shape[0] for _, k in layers], True
    window = max(1, min(window, slots - 1))
    prefix = [attention(q[:, n - window :], k, scaling)[..., : n - window] for q, k in layers]
    wanted = [preference(p, *tau) for p in prefix]
    if min(wanted) == 0:
        wanted = [1.0] * len(wanted)
    counts, clear = [0] * len(layers), True
    if slots > window:
        counts, clear = budgets(wanted, len(layers) * (slots - window), n - window)
    kept = []
    for (_, k), p, count in zip(layers, prefix, counts, strict=True):
        heads = [top(row, count) for row in indicator(p, k.shape[0], gamma, kernel)]
        kept.append([[*positions, *range(n - window, n)] for positions, _ in heads])
        clear = clear and all(sure for _, sure in heads)
    return kept, clear


def step(query, keys, held, *, slots, window, kernel, scaling):
    """Return what each head holds after one decode step, and whether every choice was clear.

    Args:
        query: [H, 1, D]; keys: [K, everything seen, D]; held: positions [k][...] with the new one.
    """
    if len(held[0]) <= slots:
        return held, True
    window = max(1, min(window, slots - 1))
    group, kept, clear = query.shape[0] // keys.shape[0], [], True
    for k, positions in enumerate(held):
        q = query[k * group : (k + 1) * group]
        scores = attention(q, keys[k : k + 1, positions], scaling)[:, 0].mean(dim=0).tolist()
        old = scores[: len(scores) - window]
        half = kernel // 2
        padded = [0.0] * half + old + [0.0] * half
        pooled = [sum(padded[j : j + kernel]) / kernel for j in range(len(old))]
        chosen, sure = top(pooled, len(old) - 1)
        clear = clear and sure
        kept.append([positions[j] for j in chosen] + positions[len(positions) - window :])
    return kept, clear
