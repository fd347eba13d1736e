"""SnapKV written naively from the paper's equations: float64, explicit T×T softmax, Python loops.

Shapes: H query heads, K key/value heads, T queries, N keys, D head_dim; always one clean sequence.
"""

import torch


def probabilities(queries, keys, *, scaling, softcap=None, sinks=None):
    """Return A [H, T, N] in float64; query r stands at position N − T + r."""
    q, k = queries.double(), keys.double()
    heads, rows, _ = q.shape
    k = k.repeat_interleave(heads // k.shape[0], dim=0)
    n = k.shape[1]
    logits = q @ k.transpose(1, 2) * scaling
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    position = torch.arange(n - rows, n)
    logits = logits.masked_fill(torch.arange(n) > position[:, None], float("-inf"))
    if sinks is None:
        return logits.softmax(-1)
    column = sinks.double()[:, None, None].expand(heads, rows, 1)
    return torch.cat([logits, column], dim=-1).softmax(-1)[..., :-1]


def votes(a, kv_heads, window):
    """Return v[k][j]: the window's probabilities of key j, summed, averaged over the group."""
    heads, rows, n = a.shape
    group = heads // kv_heads
    result = []
    for k in range(kv_heads):
        sums = [
            a[k * group + g, rows - window :, : n - window].sum(dim=0).tolist()
            for g in range(group)
        ]
        result.append([sum(column) / group for column in zip(*sums, strict=True)])
    return result


def pooled(values, kernel, pooling):
    """Return one pooled row; "avg" counts the zeros beyond the ends, "max" ignores them."""
    half = kernel // 2
    out = []
    for j in range(len(values)):
        near = [values[i] for i in range(j - half, j + half + 1) if 0 <= i < len(values)]
        out.append(max(near) if pooling == "max" else sum(near) / kernel)
    return out


def top(scores, count):
    """Return the ``count`` best positions, ascending: higher score, then lower position."""
    order = sorted(range(len(scores)), key=lambda j: (-scores[j], j))
    return sorted(order[:count])


def clear(scores, count, margin=1e-5):
    """Say whether float32 can tell the last kept from the first dropped score.

    Exactly equal scores are clear (pooling makes plateaus of one value): the tie rule decides.
    """
    if not 0 < count < len(scores):
        return True
    ranked = sorted(scores, reverse=True)
    last, first = ranked[count - 1], ranked[count]
    return last == first or last - first > margin * last


def select(a, *, kv_heads, slots, window, kernel, pooling):
    """Return (kept positions per key/value head, whether every choice was clear)."""
    rows, n = a.shape[1:]
    if n <= slots:
        return [list(range(n))] * kv_heads, True
    window = max(1, min(window, rows, slots - 1))
    kept, sure = [], True
    for row in votes(a, kv_heads, window):
        scores = pooled(row, kernel, pooling)
        kept.append(top(scores, slots - window) + list(range(n - window, n)))
        sure = sure and clear(scores, slots - window)
    return kept, sure


class NaiveRow:
    """Keep one sequence's whole text and, per key/value head, the positions SnapKV holds of it."""

    def __init__(self, kv_heads, **options):
        self.keys = self.values = None
        self.seen = 0
        self.held = [[] for _ in range(kv_heads)]
        self.options = options
        self.sure = True

    def copy(self):
        """Return a row that goes on by itself."""
        other = NaiveRow(len(self.held), **self.options)
        other.__dict__.update(self.__dict__, held=[list(head) for head in self.held])
        return other

    def forward(self, queries, keys, values, *, scaling, slots=None):
        """Attend with new tokens over what is held and themselves; then keep ``slots`` if given."""
        first = self.keys is None
        self.keys = keys if first else torch.cat([self.keys, keys], dim=1)
        self.values = values if first else torch.cat([self.values, values], dim=1)
        new = range(self.seen, self.seen + keys.shape[1])
        self.seen += keys.shape[1]
        outputs = []
        for head, grouped in enumerate(queries.split(len(queries) // len(keys))):
            attended = [*self.held[head], *new]
            a = probabilities(grouped, self.keys[head, attended][None], scaling=scaling)
            outputs.append(a @ self.values[head, attended].double())
            self.held[head] = attended
            if slots is not None:
                (kept,), sure = select(a, kv_heads=1, slots=slots, **self.options)
                self.held[head] = [attended[i] for i in kept]
                self.sure = self.sure and sure
        return torch.cat(outputs)
