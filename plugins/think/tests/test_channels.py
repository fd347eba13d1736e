"""Which channels stay: how many, which ones, and what is refused."""

from types import SimpleNamespace

import pytest
import torch

import kvdock
from kvdock.errors import OptionError, UnsupportedError
from kvdock.policy import ModelFacts
from kvdock.testing_models import tiny_model
from kvdock_think.channels import channel_scores, kept_channels
from kvdock_think.options import ThinKOptions
from kvdock_think.policy import ThinKPolicy

from . import oracle


def choose(queries, keys, **options):
    view = SimpleNamespace(queries=queries, keys=keys)
    return ThinKPolicy(ThinKOptions(**options)).select_channels(view)


@pytest.mark.parametrize(
    ("head_dim", "ratio", "kept"),
    [
        (128, 0.375, 80), (128, 0.5, 64), (128, 0.25, 96), (128, 0.4, 80), (128, 0.0, 128),
        (128, 0.99, 16), (128, 0.05, 128), (96, 0.375, 64), (96, 0.5, 48), (64, 0.375, 48),
        (64, 0.5, 32), (80, 0.375, 64), (32, 0.375, 24), (32, 0.5, 16), (16, 0.375, 12),
        (16, 0.5, 8), (8, 0.9, 2),
    ],
)  # fmt: skip
def test_kept_channels_are_rounded_up_and_never_none(head_dim, ratio, kept):
    assert kept_channels(head_dim, ratio) == kept


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_ranking_is_that_of_the_products_norms(dtype):
    torch.manual_seed(0)
    scale = torch.linspace(0.2, 3, 16)[torch.randperm(16)]
    queries, keys = (torch.randn(2, h, n, 16) for h, n in ((6, 9), (2, 40)))
    queries, keys = queries.to(dtype), (keys * scale).to(dtype)
    scores = channel_scores(queries, keys)
    assert scores.dtype == torch.float32
    for row in range(2):
        norms = oracle.frobenius(queries[row], keys[row])
        assert torch.equal(scores[row].argsort(-1), norms.argsort(-1))
    # up to the constant number of products, the scores are the squared norms themselves
    assert torch.allclose(scores[1].double() * (3 * 9 * 40), norms.square(), rtol=1e-5)


def test_outlier_channels_do_not_overflow_half_precision():
    queries, keys = torch.full((1, 1, 4, 16), 300.0), torch.full((1, 1, 50, 16), 400.0)
    assert bool(channel_scores(queries.half(), keys.half()).isfinite().all())


def test_the_index_is_sorted_unique_and_its_own_for_every_row_and_head():
    torch.manual_seed(1)
    index = choose(torch.randn(3, 4, 5, 32), torch.randn(3, 2, 20, 32))
    assert index.shape == (3, 2, 24) and index.dtype == torch.int64
    assert bool((index.diff(dim=-1) > 0).all())
    assert int(index.min()) >= 0 and int(index.max()) < 32
    assert len({tuple(one.tolist()) for one in index.flatten(0, 1)}) == 6


def test_equal_scores_go_to_the_lower_channel():
    index = choose(torch.ones(1, 1, 2, 16), torch.ones(1, 1, 3, 16), ratio=0.5)
    assert index[0, 0].tolist() == list(range(8))


@pytest.mark.parametrize("where", ["keys", "queries"])
def test_zero_channels_are_dropped_first(where):
    torch.manual_seed(2)
    states = {"queries": torch.randn(1, 4, 6, 128), "keys": torch.randn(1, 2, 30, 128)}
    zero = torch.randperm(128)[:48].sort().values
    states[where][..., zero] = 0
    index = choose(**states)
    assert not set(index.flatten().tolist()) & set(zero.tolist())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ratio", 1.0), ("ratio", -0.1), ("ratio", float("nan")), ("window", 0), ("recent", -1),
        ("block", 0), ("window", 2.5),
    ],
)  # fmt: skip
def test_options_out_of_range_are_refused(name, value):
    with pytest.raises(OptionError, match=name):
        ThinKOptions(**{name: value})


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ({"dtype": torch.float64, "head_dim": 64}, "float64"),
        ({"dtype": torch.float32, "head_dim": 20}, "head sizes.*20"),
        ({"dtype": torch.float32, "head_dim": 512}, "head sizes.*512"),
    ],
)
def test_models_it_does_not_serve_are_refused(facts, words):
    with pytest.raises(UnsupportedError, match=words):
        ThinKPolicy(ThinKOptions()).bind(ModelFacts(1, None, **facts))


def test_a_ratio_that_drops_nothing_is_refused_before_anything_runs():
    model = tiny_model("llama")
    with pytest.raises(UnsupportedError, match=r"ratio=0\.1 drops no channel of a head of 16"):
        kvdock.attach(model, "think", ratio=0.1)
    with pytest.raises(OptionError, match=r"ratio.*1\.0.*< 1"):
        kvdock.attach(model, "think", ratio=1.0)
    assert model.config._attn_implementation != "kvdock"
