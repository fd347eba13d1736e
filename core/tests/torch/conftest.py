"""Small policies of two kinds, tiny models and helpers, shared by the tests that need torch."""

from types import SimpleNamespace

import pytest
import torch

import kvdock
from kvdock.errors import BudgetError
from kvdock.kernels import choose_backend
from kvdock.kernels.selection import top_positions
from kvdock.kernels.window_scores import window_votes
from kvdock.policy import AttentionPolicy, CachePolicy, Release, Selection
from kvdock.testing_models import left_padded, tiny_model


class Votes(CachePolicy):
    """Keep what the last queries look at; decide once, at the end of the prompt."""

    query_window = 4
    acts_on_later_turns = True

    def check_budget(self, budget):
        if budget.kind == "tokens" and budget.amount <= self.query_window:
            raise BudgetError(f"budget {budget} leaves nothing beside window={self.query_window}.")

    def select(self, view):
        return Selection(
            top_positions(window_votes(view.queries, view.keys, view.params), view.slots)
        )


class Ring(CachePolicy):
    """Keep the last tokens, at decode too."""

    acts_on_decode = True
    acts_on_later_turns = True

    def select(self, view):
        last = torch.arange(view.length - view.slots, view.length)
        return Selection(last.expand(*view.keys.shape[:2], view.slots))

    def release(self, view):
        return Release(view.positions.masked_fill(view.positions < 0, 2**30).argmin(dim=2))


class Counting(AttentionPolicy):
    """Attend densely and count the calls."""

    def __init__(self):
        self.calls = 0
        self.dense = choose_backend("sdpa", "sdpa", torch.device("cpu"), torch.float32)

    def prefill(self, query, key, value, params, *, layer):
        self.calls += 1
        return self.dense.attend(query, key, value, params)


@pytest.fixture
def policies():
    return SimpleNamespace(Votes=Votes, Ring=Ring, Counting=Counting)


@pytest.fixture(params=[Votes, Ring], ids=["votes", "ring"])
def policy(request):
    return request.param()


@pytest.fixture
def model():
    return tiny_model("llama")


@pytest.fixture
def batch():
    """Three left-padded prompts of 97, 70 and 33 tokens."""
    return left_padded((97, 70, 33))[0]


@pytest.fixture
def row():
    """One prompt of 97 tokens."""
    return left_padded((97,))[0]


@pytest.fixture
def docked(model, policy):
    """A model under one of the two policies, 48 slots."""
    with kvdock.attach(model, [policy], budget=48) as dock:
        yield dock


@pytest.fixture
def generate():
    """Return the greedy continuation as a list of rows."""

    def run(model, batch, count=12, **kwargs):
        output = model.generate(**batch, max_new_tokens=count, do_sample=False, **kwargs)
        start = batch["input_ids"].shape[1] if "input_ids" in batch else 0
        return output[:, start:].tolist()

    return run
