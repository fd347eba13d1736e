"""Run a docked tiny model, or one bare layer of the core, step by step.

Shapes: B rows, H query heads, K key/value heads, T columns, D head_dim.
"""

import torch

import kvdock
from kvdock.budget import Budget
from kvdock.kernels.reference import ReferenceBackend
from kvdock.layer import LayerStore
from kvdock.layout import BatchLayout
from kvdock.plan import DockPlan
from kvdock.policy import AttentionParams, ModelFacts
from kvdock.rope import make_rotation
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


def make_store(budget, *, rotate=None, **options):
    """Return one layer of the core with the policy, without a model around it."""
    policy = StreamingLLMPolicy(StreamingLLMOptions(**options))
    facts = ModelFacts(1, rotate)
    policy.bind(facts)
    plan = DockPlan(
        methods=("streamingllm",),
        cache_policy=policy,
        attention_policy=None,
        budget=Budget.parse(budget),
        backend=ReferenceBackend(),
        fallback=ReferenceBackend(),
        facts=facts,
        config=None,
        managed=(0,),
    )
    return LayerStore(plan, 0)


def rotation(head_dim):
    """Return the core's rotation of cached keys for a plain RoPE of base 10000."""
    rotate, _ = make_rotation(make_model(head_dim=head_dim), (0,))
    return rotate


def prefill(store, q, k, v):
    """Feed a whole prompt without padding."""
    layout = BatchLayout(None, q.shape[0], q.shape[2], 0)
    return store.extend(
        q, k, v, layout, AttentionParams(q.shape[-1] ** -0.5),
        turn=0, last=True, prompt_columns=q.shape[2],
    )  # fmt: skip


def step(store, q, k, v):
    """Feed one token per row."""
    return store.step(q, k, v, AttentionParams(q.shape[-1] ** -0.5))


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
    """Return the positions a dock's layer (or a bare one) holds per row; its heads must agree."""
    bare = isinstance(source, LayerStore)
    positions = source.storage.kept_positions() if bare else source.kept_positions(layer)
    rows = []
    for heads in positions.tolist():
        assert all(head == heads[0] for head in heads)
        rows.append([position for position in heads[0] if position >= 0])
    return rows
