"""PyramidKV written naively from the paper: float64, explicit T×T softmax, Python loops.

Shapes: H query heads, K key/value heads, T tokens, D head_dim; always one clean sequence.
"""

from fractions import Fraction

import torch


def pyramid(total, layers, cap, beta):
    """Return whole numbers of mean ``total / layers`` by largest remainder.

    Unlike the policy, which divides, this steps in the common denominator of the whole sequence.
    """
    base = Fraction(total, layers)
    low = base / Fraction(beta)
    high = 2 * base - low
    if high > cap:
        high, low = Fraction(cap), 2 * base - cap
    spans = max(layers - 1, 1)
    shares = [(high * (spans - i) + low * i) / spans for i in range(layers)]
    if layers == 1:
        shares = [base]
    counts = [int(share) for share in shares]
    while sum(counts) < total:
        lacking = [share - count for share, count in zip(shares, counts, strict=True)]
        counts[lacking.index(max(lacking))] += 1
    return counts


def probabilities(q, k):
    """Return A [H, T, T] in float64."""
    q, k = q.double(), k.double()
    k = k.repeat_interleave(q.shape[0] // k.shape[0], dim=0)
    logits = q @ k.transpose(1, 2) * q.shape[2] ** -0.5
    future = torch.ones(logits.shape[1:], dtype=torch.bool).triu(1)
    return logits.masked_fill(future, float("-inf")).softmax(-1)


def pooled(values, kernel, pooling):
    """Return one pooled row; "avg" counts the zeros beyond the ends, "max" ignores them."""
    out = []
    for j in range(len(values)):
        near = values[max(0, j - kernel // 2) : j + kernel // 2 + 1]
        out.append(max(near) if pooling == "max" else sum(near) / kernel)
    return out


def select(q, k, slots, window, kernel, pooling):
    """Return (kept positions per key/value head, whether float32 can make every choice)."""
    kv_heads, n = k.shape[:2]
    if n <= slots:
        return [list(range(n))] * kv_heads, True
    prefix = n - window
    a = probabilities(q, k)[:, prefix:, :prefix]
    kept, clear = [], True
    for of_head in a.unflatten(0, (kv_heads, -1)):
        scores = pooled(of_head.sum(dim=1).mean(dim=0).tolist(), kernel, pooling)
        order = sorted(range(prefix), key=lambda j, s=scores: (-s[j], j))
        chosen, dropped = order[: slots - window], order[slots - window :]
        kept.append(sorted(chosen) + list(range(prefix, n)))
        last, first = scores[chosen[-1]], scores[dropped[0]]
        # pooling makes plateaus of one value, which the tie rule decides
        clear = clear and (last == first or last - first > 1e-5 * last)
    return kept, clear
