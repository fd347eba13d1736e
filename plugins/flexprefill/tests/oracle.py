"""FlexPrefill written out in NumPy, float64, one head at a time; equal values: lower index first.

Shapes: q [Q, D], the last Q of N tokens; k [N, D]. Masks are bool [M, Nk] on the absolute grid.
"""

import numpy as np


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def descending(x):
    """Return indices from the largest to the smallest, equal ones by index."""
    return np.argsort(-x, kind="stable")


def representative(q, k, scale, block):
    """Return P [R, N] of the last queries and their absolute positions."""
    n, r = len(k), min(block, len(q))
    scores = q[-r:] @ k.T * scale
    positions = np.arange(n - r, n)
    scores[np.arange(n)[None] > positions[:, None]] = -np.inf
    return softmax(scores), positions


def block_means(x, start, block):
    """Average rows whose first stands at ``start`` over the blocks of the grid."""
    number = (start + np.arange(len(x))) // block
    return np.stack([x[number == b].mean(0) for b in range(number[0], number[-1] + 1)])


def divergence(p, q):
    def term(x, m):
        return sum(a * np.log(a / b) for a, b in zip(x, m, strict=True) if a > 0)

    m = (p + q) / 2
    return np.sqrt(max(0.0, 0.5 * term(p, m) + 0.5 * term(q, m)))


def published_count(mass, gamma):
    return int((np.cumsum(mass[descending(mass)]) <= gamma).sum()) + 1


def published_pick(shares, budget):
    """Keep the prefix of the flat, sorted shares whose inclusive sum is within the budget."""
    order = descending(shares.ravel())
    kept = np.zeros(shares.size, bool)
    kept[order[np.cumsum(shares.ravel()[order]) <= budget]] = True
    return kept.reshape(shares.shape)


def top(mass, count):
    """Mark entry 0 and the largest others, ``count`` in all."""
    mass = mass.copy()
    mass[0] = np.inf
    return set(descending(mass)[:count].tolist())


def union(first, blocks, vertical, slash):
    mask = np.zeros((blocks - first, blocks), bool)
    for i in range(first, blocks):
        for j in range(i + 1):
            mask[i - first, j] = j in vertical or i - j in slash
    return mask


def pooled_attention(q, k, scale, block):
    off = len(k) - len(q)
    scores = block_means(q, off, block) @ block_means(k, 0, block).T * scale
    first = off // block
    for m in range(len(scores)):
        scores[m, first + m + 1 :] = -np.inf
    return softmax(scores)


def bounds(blocks, block, least, most):
    high = blocks if most is None else min(-(-most // block), blocks)
    return min(-(-least // block), high), high


def compat(q, k, scale, *, gamma, tau, least, most=None, block=128):
    """Return (mask, query-aware) of card 3.2, the published selection."""
    n = len(k)
    blocks, first = -(-n // block), (n - len(q)) // block
    low, high = bounds(blocks, block, least, most)
    p, positions = representative(q, k, scale, block)
    r = len(p)
    v = p.mean(0)
    s = np.zeros(n)
    for row, position in enumerate(positions):
        s[: position + 1] += p[row, position::-1] / r
    n_v = int(np.clip(published_count(v, gamma) // 128 + 1, low, high))
    n_s = int(np.clip(published_count(s, gamma) // 128 + 1, low, high))
    pad = blocks * block - n
    v_blocks = np.array([v[j * block : (j + 1) * block].sum() for j in range(blocks)])
    s_blocks = np.array(
        [s[max(0, b * block - pad) : (b + 1) * block - pad].sum() for b in range(blocks)]
    )
    abar = softmax(block_means(k, 0, block) @ q[-r:].mean(0) * scale)
    aware = bool((abar > 0).all() and (v_blocks > 0).all() and divergence(abar, v_blocks) < tau)
    if aware:
        n_v = n_s = low
    mask = union(first, blocks, top(v_blocks, n_v), top(s_blocks, n_s))
    if aware:
        mask |= published_pick(pooled_attention(q, k, scale, block), gamma * len(mask))
    return mask, aware


def exact(q, k, scale, *, gamma, tau, least, most=None, block=128):
    """Return (mask, query-aware) with the corrections of card 3.3."""
    n = len(k)
    blocks, first = -(-n // block), (n - len(q)) // block
    low, high = bounds(blocks, block, least, most)
    p, positions = representative(q, k, scale, block)
    vertical, slash = np.zeros(blocks), np.zeros(blocks)
    for row, position in enumerate(positions):
        for j in range(position // block + 1):
            mass = p[row, j * block : (j + 1) * block].sum() / len(p)
            vertical[j] += mass
            slash[position // block - j] += mass
    abar = softmax(block_means(k, 0, block) @ q[-len(p) :].mean(0) * scale)
    aware = bool(divergence(abar, vertical) < tau)

    def count(mass):
        held, rest = mass[0], mass.copy()
        rest[0] = -1
        order = descending(rest)
        number = 1
        while held < gamma * mass.sum() and number < blocks:
            held += mass[order[number - 1]]
            number += 1
        return low if aware else int(np.clip(number, low, high))

    mask = union(first, blocks, top(vertical, count(vertical)), top(slash, count(slash)))
    if aware:
        for m, row in enumerate(pooled_attention(q, k, scale, block)):
            held = 0.0
            for j in descending(row):
                if held >= gamma:
                    break
                mask[m, j] = True
                held += row[j]
    return mask, aware
