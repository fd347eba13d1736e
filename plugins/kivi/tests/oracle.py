"""KIVI restated in float64 and Python loops, and the layout of the authors' code.

Shapes: K key/value heads, H query heads, T tokens, D head_dim, g group, R residual.
"""

import torch


def quantised(group, levels):
    """Return the codes, scale and zero of one group of numbers, by the stored scale and zero."""
    group = group.double()
    scale = ((group.max() - group.min()) / levels).float().half().double()
    zero = group.min().float().half().double()
    if scale == 0:
        return torch.zeros_like(group), scale, zero
    return ((group - zero) / scale).clamp(0, levels).round(), scale, zero


def restored(group, levels):
    codes, scale, zero = quantised(group, levels)
    return scale * codes + zero


def stored(keys, values, bits, g, residual, *, held=0):
    """Return what a cache holds of keys and values [K, T, D], float64."""
    keys, values, tokens = keys.double().clone(), values.double().clone(), keys.shape[1]
    levels = 2**bits - 1
    for head in range(keys.shape[0]):
        for start in range(0, (tokens - held) // residual * residual, g):
            for channel in range(keys.shape[2]):
                span = keys[head, start : start + g, channel]
                span.copy_(restored(span, levels))
        for token in range(max(tokens - residual, 0)):
            for start in range(0, values.shape[2], g):
                span = values[head, token, start : start + g]
                span.copy_(restored(span, levels))
    return keys, values


def attend(query, keys, values, scaling):
    """Return output [H, Q, D] and log-sum-exps [H, Q] of queries over all tokens, float64."""
    group = query.shape[0] // keys.shape[0]
    keys, values = keys.repeat_interleave(group, 0), values.repeat_interleave(group, 0)
    scores = query.double() @ keys.double().mT * scaling
    return scores.softmax(-1) @ values.double(), scores.logsumexp(-1)


def official_words(codes, bits):
    """Pack codes [..., n] as the authors do: int32 words, element i of a word at bit b·i."""
    each = 32 // bits
    words = []
    for run in codes.unflatten(-1, (-1, each)).flatten(0, -2).tolist():
        words.append(sum(code << (bits * place) for place, code in enumerate(run)))
    return words
