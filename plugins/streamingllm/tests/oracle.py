"""StreamingLLM written naively: every key of the text is kept, before RoPE, in float64.

A `NaiveModel` attends over the positions that the method holds and rotates them anew at every
forward: by their place in the cache (the paper) or by their place in the text.

Shapes: H query heads, K key/value heads, Q new tokens, N attended keys, D head_dim; one sequence.
"""

import copy
import sys

import torch


def kept(seen, slots, sinks):
    """Return the positions held after ``seen`` tokens: the sinks and the most recent ones."""
    if seen <= slots:
        return list(range(seen))
    sinks = min(sinks, slots - 1)
    return [*range(sinks), *range(seen - (slots - sinks), seen)]


def rope(states, positions, theta=10000.0):
    """Rotate [heads, N, D]: pair i of D/2 turns by position · theta^(−2i/D)."""
    half = states.shape[-1] // 2
    frequency = theta ** (-torch.arange(half, dtype=torch.float64) / half)
    angle = torch.as_tensor(positions, dtype=torch.float64)[:, None] * frequency
    first, second = states.double()[..., :half], states.double()[..., half:]
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def attend(query, key, value, scaling):
    """Attend causally, the last query aligned with the last key; explicit float64 softmax."""
    group = query.shape[0] // key.shape[0]
    key, value = key.repeat_interleave(group, dim=0), value.repeat_interleave(group, dim=0)
    rows, n = query.shape[1], key.shape[1]
    future = torch.arange(n) > torch.arange(n - rows, n)[:, None]
    logits = (query @ key.transpose(1, 2) * scaling).masked_fill(future, float("-inf"))
    return logits.softmax(-1) @ value


class NaiveLayer:
    """Keep the raw keys and the values of one layer's whole text."""

    def __init__(self, slots, sinks, positions, rotate):
        self.slots, self.sinks, self.positions = slots, sinks, positions
        self.rotate = rotate
        self.keys = self.values = None
        self.seen = 0
        self.held = []

    def forward(self, query, key, value, scaling):
        """Attend with new tokens over what is held and themselves, then evict."""
        first = self.keys is None
        self.keys = key if first else torch.cat([self.keys, key], dim=1)
        self.values = value if first else torch.cat([self.values, value], dim=1)
        new = query.shape[1]
        attended = [*self.held, *range(self.seen, self.seen + new)]
        place = list(range(len(attended))) if self.positions == "cache" else attended
        output = attend(
            self.rotate(query, place[len(place) - new :]),
            self.rotate(self.keys[:, attended], place),
            self.values[:, attended],
            scaling,
        )
        self.seen += new
        self.evict()
        return output

    def evict(self):
        """Keep the sinks and the most recent tokens."""
        self.held = kept(self.seen, self.slots, self.sinks)


class NaiveModel:
    """Run a llama-like or glm4 model by hand, one sequence, in float64."""

    def __init__(self, model, slots, sinks, positions):
        self.model = copy.deepcopy(model).double()
        self.apply = sys.modules[type(model).__module__].apply_rotary_pos_emb
        self.layers = [
            NaiveLayer(slots, sinks, positions, self.rotate) for _ in self.model.model.layers
        ]

    def rotate(self, states, positions):
        """Rotate [heads, N, D] with the model's own frequencies."""
        cos, sin = self.model.model.rotary_emb(states, torch.tensor([positions]))
        return self.apply(states[None], states[None], cos, sin)[0][0]

    @torch.no_grad()
    def __call__(self, ids):
        """Return the logits [Q, V] of the next tokens ``ids`` [Q]."""
        x = self.model.model.embed_tokens(ids)
        for block, layer in zip(self.model.model.layers, self.layers, strict=True):
            x = x + self._attention(block, layer, block.input_layernorm(x))
            h = block.mlp(block.post_attention_layernorm(x))
            x = x + getattr(block, "post_mlp_layernorm", torch.nn.Identity())(h)
        return self.model.lm_head(self.model.model.norm(x))

    def _attention(self, block, layer, x):
        module = block.self_attn
        split = [
            project(x).view(len(x), -1, module.head_dim)
            for project in (module.q_proj, module.k_proj, module.v_proj)
        ]
        if hasattr(module, "q_norm"):
            split[0], split[1] = module.q_norm(split[0]), module.k_norm(split[1])
        query, key, value = (part.transpose(0, 1) for part in split)
        output = layer.forward(query, key, value, module.scaling)
        out = module.o_proj(output.transpose(0, 1).flatten(1))
        return getattr(block, "post_self_attn_layernorm", torch.nn.Identity())(out)
