"""XAttention as the paper and the authors' code have it, one head, float64, blocks of any size.

Shapes: Q queries at the end of N keys, S stride, A one score per pair of tiles.
"""

import torch


def tile_scores(query, key, stride):
    """Return A for [N, D] queries and keys: sums over the antidiagonals of S×S tiles of q·k."""
    n, tiles = len(query), -(-len(query) // stride)
    products = torch.zeros(tiles * stride, tiles * stride, dtype=torch.float64)
    products[:n, :n] = query.double() @ key.double().T
    scores = torch.zeros(tiles, tiles, dtype=torch.float64)
    for i in range(stride):
        scores += products[stride - 1 - i :: stride, i::stride]
    return scores


def block_mass(query, key, scaling, stride, block):
    """Return W for [Q, D] queries; rows of A before them do not count."""
    off = len(key) - len(query)
    missing = torch.zeros(off, query.shape[1], dtype=torch.float64)
    scores = tile_scores(torch.cat([missing, query.double()]), key, stride) * (scaling / stride)
    blocks, per_block = -(-len(key) // block), block // stride
    mass = torch.zeros(blocks, blocks, dtype=torch.float64)
    for m in range(off // stride, len(scores)):
        share = scores[m, : m + 1].softmax(0)
        for n, value in enumerate(share.split(per_block)):
            mass[m // per_block, n] += value.sum()
    return mass[off // block :]


def exact_rule(weights, own, threshold):
    """Return the blocks that row ``own`` keeps of W's row, ascending."""
    kept = {0, own}
    total = sum(weights[: own + 1])
    prefix = sum(weights[j] for j in kept)
    for j in sorted(range(1, own), key=lambda j: (-weights[j], j)):
        if prefix < threshold * total:
            kept.add(j)
        prefix += weights[j]
    return sorted(kept)


def compat_rule(weights, own, threshold):
    """Return what the authors' code keeps in its first score chunk."""
    others = sorted(range(own), key=lambda j: (-weights[j], j))
    total, kept = sum(weights[: own + 1]), {0, own}
    for rank, j in enumerate(others):
        before = weights[own] + sum(weights[i] for i in others[: rank - 1])
        if threshold > 0 and (rank == 0 or before < threshold * total):
            kept.add(j)
    return sorted(kept)


def score_chunk(keys):
    """Return the tokens of the authors' score chunk."""
    power = 2 ** len(bin(keys - 1)[2:])
    return max(2048, min(max(2048, power), 128 * 1024 * 2048 // power))
