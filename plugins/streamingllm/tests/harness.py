"""Run a docked tiny model, or one bare layer of the core, step by step."""

import functools

import torch

import kvdock
from kvdock.rope import make_rotation
from kvdock.testing_layers import LayerDriver
from kvdock.testing_models import tiny_model
from kvdock_streamingllm.options import StreamingLLMOptions
from kvdock_streamingllm.policy import StreamingLLMPolicy

ROPE = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
}  # fmt: skip


def make_model(family="llama", *, layers=1, rope="default", **overrides):
    parameters = {"rope_theta": 10000.0, **ROPE[rope]}
    if family == "glm4":
        parameters["partial_rotary_factor"] = 0.5
    return tiny_model(family, num_hidden_layers=layers, rope_parameters=parameters, **overrides)


def make_layer(budget, *, rotate=None, layers=1, **options):
    """Return the policy on bare layers of the core, without a model around them."""
    policy = StreamingLLMPolicy(StreamingLLMOptions(**options))
    return LayerDriver(policy, budget, layers, rotate=rotate)


@functools.cache
def rotation(head_dim):
    """Return the core's rotation of cached keys, two layers, for a plain RoPE of base 10000."""
    rotate, _ = make_rotation(make_model(head_dim=head_dim, layers=2), (0, 1))
    return rotate


def attach(model, budget, **options):
    return kvdock.attach(model, "streamingllm", budget=budget, **options)


def tokens(count, seed=0):
    return torch.randint(3, 160, (count,), generator=torch.Generator().manual_seed(seed))


class Batch:
    """Feed rows of unequal length through one cache: a left-padded prompt, then steps or turns."""

    def __init__(self, model, cache):
        self.model, self.cache = model, cache
        self.mask = None

    @torch.no_grad()
    def feed(self, rows):
        """Feed the rows' next tokens, padded on the left; returns each row's logits."""
        width = max(len(row) for row in rows)
        ids = torch.zeros(len(rows), width, dtype=torch.long)
        new = torch.zeros(len(rows), width, dtype=torch.long)
        for index, row in enumerate(rows):
            ids[index, width - len(row) :] = row
            new[index, width - len(row) :] = 1
        self.mask = new if self.mask is None else torch.cat([self.mask, new], dim=1)
        positions = (self.mask.cumsum(dim=1) - 1).clamp(min=0)[:, -width:]
        logits = self.model(
            ids, attention_mask=self.mask, position_ids=positions, past_key_values=self.cache
        ).logits
        return [logits[index, width - len(row) :] for index, row in enumerate(rows)]


def held(source, layer=0):
    """Return the positions a dock (or a bare layer) holds per row; all heads must agree."""
    bare = isinstance(source, LayerDriver)
    positions = source.kept(layer) if bare else source.kept_positions(layer).tolist()
    rows = []
    for heads in positions:
        assert all(head == heads[0] for head in heads)
        rows.append([position for position in heads[0] if position >= 0])
    return rows
