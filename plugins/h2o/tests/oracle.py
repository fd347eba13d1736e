"""H2O written naively from its algorithm: float64, explicit T×T softmax, Python loops.

Shapes: H query heads, K key/value heads, T queries, N keys, D head_dim; always one clean sequence.
"""

import torch


def probabilities(queries, keys, *, scaling, softcap=None, sinks=None, with_lse=False):
    """Return A [H, T, N] in float64 (and the log-sum-exps); query r is at position N − T + r."""
    q, k = queries.double(), keys.double()
    heads, rows, _ = q.shape
    k = k.repeat_interleave(heads // k.shape[0], dim=0)
    n = k.shape[1]
    logits = q @ k.transpose(1, 2) * scaling
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    position = torch.arange(n - rows, n)
    logits = logits.masked_fill(torch.arange(n) > position[:, None], float("-inf"))
    if sinks is not None:
        column = sinks.double()[:, None, None].expand(heads, rows, 1)
        return torch.cat([logits, column], dim=-1).softmax(-1)[..., :-1]
    return (logits.softmax(-1), logits.logsumexp(-1)) if with_lse else logits.softmax(-1)


def column_sums(a, kv_heads):
    """Return s [K, N]: what every key receives from all queries of its group."""
    heads, _, n = a.shape
    return a.sum(dim=1).view(kv_heads, heads // kv_heads, n).sum(dim=1)


def halves(slots, heavy=None, recent=None):
    """Return (H, R) for C slots."""
    if recent is None:
        recent = slots - slots // 2 if heavy is None else slots - heavy
    recent = max(1, min(recent, slots - 1))
    return slots - recent, recent


def top(scores, count):
    """Return the ``count`` best indices, ascending: higher score, then lower index."""
    order = sorted(range(len(scores)), key=lambda j: (-scores[j], j))
    return sorted(order[:count])


def clear(scores, count, margin=1e-5):
    """Say whether float32 can tell the last kept from the first dropped score."""
    if not 0 < count < len(scores):
        return True
    ranked = sorted(scores, reverse=True)
    last, first = ranked[count - 1], ranked[count]
    return last == first or last - first > margin * last


class NaiveHead:
    """Hold one key/value head of one row: every token's key, and the scores of those held."""

    def __init__(self, slots, recent, *, scaling, **attention):
        self.slots, self.recent = slots, recent
        self.attention = {"scaling": scaling, **attention}
        self.keys = None
        self.held, self.scores = [], []
        self.sure = True

    def feed(self, queries, keys):
        """Attend with new tokens [G, T, D] and [T, D]; accumulate, then evict down to C."""
        seen = 0 if self.keys is None else self.keys.shape[0]
        self.keys = keys if self.keys is None else torch.cat([self.keys, keys])
        new = keys.shape[0]
        self.held += range(seen, seen + new)
        self.scores += [0.0] * new
        a = probabilities(queries, self.keys[self.held][None], **self.attention)
        received = column_sums(a, 1)[0] / queries.shape[0]
        self.scores = [s + more for s, more in zip(self.scores, received.tolist(), strict=True)]
        self.evict()

    def evict(self):
        """Keep the H best of what is not recent, and the recent ones."""
        prefix = len(self.held) - self.recent
        if len(self.held) <= self.slots:
            return
        heavy = self.slots - self.recent
        self.sure = self.sure and clear(self.scores[:prefix], heavy)
        chosen = [*top(self.scores[:prefix], heavy), *range(prefix, len(self.held))]
        self.held = [self.held[i] for i in chosen]
        self.scores = [self.scores[i] for i in chosen]
