"""The threshold rules: published vectors, literal loops, and what every list must hold."""

from types import SimpleNamespace

import pytest
import torch

from kvdock.errors import OptionError
from kvdock.kernels.blocks import density, mask_from_lists
from kvdock.policy import AttentionParams, ModelFacts
from kvdock.shard import HeadShard
from kvdock_xattention.options import XAttentionOptions
from kvdock_xattention.policy import XAttentionPolicy
from kvdock_xattention.reference import chosen_blocks
from kvdock_xattention.select import score_chunk, select_reference

from . import oracle
from .test_scores import draw

ROW = [0.1, 0.5, 0.05, 0.2, 0.15]
PARAMS = AttentionParams(0.125)


def kept(mask):
    return mask.nonzero().flatten().tolist()


def choose(weights, own, thresholds, loose=0):
    """Return the kept blocks per head for one row of W, alike in all heads."""
    mass = torch.tensor(weights, dtype=torch.float64).expand(1, len(thresholds), 1, -1)
    table = torch.tensor(thresholds, dtype=torch.float64)
    mask = chosen_blocks(mass, own, table, loose)
    return [kept(mask[0, head, 0]) for head in range(len(thresholds))]


def select(query, key, **options):
    lists = select_reference(query, key, PARAMS, XAttentionOptions(**{"mode": "exact", **options}))
    return mask_from_lists(lists, -(-key.shape[2] // 128)), lists


@pytest.mark.parametrize(
    ("thresholds", "wanted"),
    [
        ((0.0, 0.2), [0, 4]),
        ((0.5, 0.7), [0, 1, 4]),
        ((0.76, 0.9), [0, 1, 3, 4]),
        ((0.96, 1.0), [0, 1, 2, 3, 4]),
    ],
)
def test_published_vectors_of_the_exact_rule(thresholds, wanted):
    assert choose(ROW, 4, thresholds) == [wanted, wanted]


@pytest.mark.parametrize(
    ("thresholds", "wanted"),
    [
        ((0.0,), [[0, 4]]),
        ((0.5, 0.7, 0.76), [[0, 1, 3, 4]] * 3),
        ((0.9, 0.95, 1.0), [[0, 1, 2, 3, 4]] * 3),
        ((0.5, 0.9), [[0, 1, 3, 4], [0, 1, 2, 3, 4]]),
    ],
)
def test_published_vectors_of_the_compat_rule(thresholds, wanted):
    assert choose(ROW, 4, thresholds, loose=5) == wanted


@pytest.mark.parametrize("rule", ["exact", "compat"])
def test_rules_are_those_of_literal_loops_even_with_ties(rule):
    generator = torch.Generator().manual_seed(1)
    literal = oracle.exact_rule if rule == "exact" else oracle.compat_rule
    for own in (0, 1, 2, 7, 12):
        for _ in range(20):
            weights = torch.randint(0, 5, (13,), generator=generator) / 16.0
            weights[own] += 0.25
            for threshold in (0.0, 0.25, 0.5, 0.75, 0.9375):
                found = choose(weights.tolist(), own, (threshold,), 13 if rule == "compat" else 0)
                assert found == [literal(weights.tolist(), own, threshold)], (own, weights)


@pytest.mark.parametrize(("n", "stride"), [(384, 4), (1000, 8), (4096, 16), (4097, 8)])
def test_lists_are_those_of_the_oracle_index_for_index(n, stride):
    query, key = draw(2, 1, n, n, 64, seed=n)
    # as the tables are kept: in float32
    thresholds = tuple(torch.tensor([0.5, 0.9]).tolist())
    masks = {
        mode: select(query, key, stride=stride, threshold=thresholds, mode=mode)[0]
        for mode in ("exact", "compat")
    }
    chunk = oracle.score_chunk(n) // 128
    for head, threshold in enumerate(thresholds):
        mass = oracle.block_mass(query[0, head], key[0, 0], 0.125, stride, 128)
        for own, weights in enumerate(mass.tolist()):
            exact = oracle.exact_rule(weights, own, threshold)
            compat = oracle.compat_rule(weights, own, threshold) if own < chunk else exact
            assert kept(masks["exact"][0, head, own]) == exact, (head, own)
            assert kept(masks["compat"][0, head, own]) == compat, (head, own)


def test_compat_ends_with_the_first_score_chunk():
    assert [score_chunk(n) for n in (1, 2048, 4097, 16_384, 32_768, 65_536, 131_072, 10**6)] == [
        2048, 2048, 8192, 16_384, 8192, 4096, 2048, 2048,
    ]  # fmt: skip
    mass = torch.rand(1, 1, 12, 12, dtype=torch.float64)
    exact, mixed, compat = (chosen_blocks(mass, 0, torch.tensor([0.6]), n) for n in (0, 5, 12))
    assert torch.equal(mixed[:, :, :5], compat[:, :, :5])
    assert torch.equal(mixed[:, :, 5:], exact[:, :, 5:])
    assert not torch.equal(exact, compat)


def test_lists_hold_causal_blocks_with_sink_and_diagonal():
    query, key = draw(4, 2, 500, 900, 64)
    for threshold in (0.0, 0.3, 0.9, 1.0):
        mask, lists = select(query, key, threshold=threshold)
        own = torch.arange(3, 8)
        assert mask[..., 0].all()
        assert mask[:, :, torch.arange(5), own].all()
        assert not (mask & (torch.arange(8) > own[:, None])).any()
        assert torch.equal(lists.count, mask.sum(-1, dtype=torch.int32))


def test_threshold_zero_keeps_the_forced_blocks_and_one_keeps_all():
    query, key = draw(2, 1, 900, 900, 64)
    count = torch.arange(1, 9, dtype=torch.int32)
    assert (select(query, key, threshold=0.0)[1].count == count.clamp(max=2)).all()
    assert (select(query, key, threshold=0.0, mode="compat")[1].count == count.clamp(max=2)).all()
    assert (select(query, key, threshold=1.0)[1].count == count).all()
    assert (select(query, key, threshold=(1.0, 0.0))[1].count[0, 0] == count).all()


def test_density_grows_with_the_threshold_and_compat_keeps_more():
    query, key = draw(2, 1, 2000, 2000, 64)
    last = torch.zeros(1, 2)
    for threshold in (0.0, 0.3, 0.6, 0.8, 0.9, 0.97, 1.0):
        mask, lists = select(query, key, threshold=threshold)
        loose, _ = select(query, key, threshold=threshold, mode="compat")
        assert (loose >= mask).all()
        now = density(lists, 2000, 2000)
        assert (now >= last).all()
        last = now
    assert (last == 1).all()


def test_a_table_of_thresholds_is_one_threshold_per_head():
    query, key = draw(4, 2, 1000, 1000, 64)
    table = (0.2, 0.9, 0.5, 0.7)
    mask, _ = select(query, key, threshold=table)
    for head, threshold in enumerate(table):
        assert torch.equal(mask[:, head], select(query, key, threshold=threshold)[0][:, head])


def test_a_shared_list_adds_the_masses_of_the_group():
    query, key = draw(4, 2, 1000, 1000, 64)
    mask, _ = select(query, key, threshold=0.6, share_group=True)
    assert torch.equal(mask[:, 0], mask[:, 1])
    assert torch.equal(mask[:, 2], mask[:, 3])
    assert not torch.equal(mask[:, 0], mask[:, 2])
    mass = sum(oracle.block_mass(query[0, h], key[0, 0], 0.125, 8, 128) for h in (0, 1))
    for own, weights in enumerate(mass.tolist()):
        assert kept(mask[0, 0, own]) == oracle.exact_rule(weights, own, float(torch.tensor(0.6)))


@pytest.mark.parametrize("stride", [4, 8, 16])
def test_a_needle_in_a_far_block_is_chosen(stride):
    query, key = (x * 0.3 for x in draw(1, 1, 2048, 2048, 64))
    direction = torch.nn.functional.normalize(torch.ones(64, dtype=torch.float64), dim=0)
    key[0, 0, 5 * 128 + 37] += 40 * direction
    query[0, 0, 1920:] += 40 * direction
    mask, lists = select(query, key, stride=stride, threshold=0.9)
    assert mask[0, 0, 15, 5]
    assert lists.count[0, 0, 15] < 5


@pytest.mark.parametrize("stride", [4, 8, 16])
@pytest.mark.parametrize("q", [1472, 517, 129])
def test_a_chunk_keeps_the_rows_of_the_whole(stride, q):
    """The block that a chunk enters in its middle has fewer rows, so it alone may differ."""
    query, key = draw(2, 1, 1600, 1600, 64)
    whole, _ = select(query, key, stride=stride, threshold=0.8)
    chunk, _ = select(query[:, :, -q:], key, stride=stride, threshold=0.8)
    first = (1600 - q) // 128
    inner = 0 if (1600 - q) % 128 == 0 else 1
    assert torch.equal(chunk[:, :, inner:], whole[:, :, first + inner :])
    for head in range(2):
        mass = oracle.block_mass(query[0, head, -q:], key[0, 0], 0.125, stride, 128)
        wanted = oracle.exact_rule(mass[0].tolist(), first, float(torch.tensor(0.8)))
        assert kept(chunk[0, head, 0]) == wanted


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"stride": 5}, "stride.*4, 8, 16"),
        ({"threshold": 1.5}, "threshold.*1.5.*<= 1"),
        ({"threshold": -0.1}, "threshold.*>= 0"),
        ({"threshold": (0.5, float("nan"))}, "threshold.*nan"),
        ({"threshold": ()}, "threshold is ()"),
        ({"threshold": (0.5, 0.9), "share_group": True}, "share_group"),
        ({"block": 100}, "block.*16, 32, 64, 128"),
        ({"mode": "fast"}, "mode.*compat, exact"),
        ({"dense_below": -1}, "dense_below"),
    ],
)
def test_bad_options_are_refused(options, words):
    with pytest.raises(OptionError, match=words):
        XAttentionOptions(**options)


def test_a_table_that_does_not_fit_the_heads_is_refused():
    query, key = draw(4, 2, 200, 200, 64)
    with pytest.raises(OptionError, match="2 values.*4 query heads"):
        select(query, key, threshold=(0.5, 0.9))


def test_a_part_of_the_heads_has_the_thresholds_of_those_heads():
    config = SimpleNamespace(num_attention_heads=8)
    table = tuple(n / 10 for n in range(1, 9))
    policy = XAttentionPolicy(XAttentionOptions(threshold=table))
    policy.bind(ModelFacts(2, None, config=config, shard=HeadShard(1, 2)), None)
    assert policy.chosen.thresholds == table[4:]
    policy.bind(ModelFacts(2, None, config=config), None)
    assert policy.chosen.thresholds == table
