"""Both modes against the naive selection, and what holds for every selection."""

import pytest
import torch

from kvdock.errors import OptionError, UnsupportedError
from kvdock.kernels.blocks import BlockGrid, density
from kvdock.policy import AttentionParams
from kvdock_flexprefill import reference
from kvdock_flexprefill.options import FlexPrefillOptions
from kvdock_flexprefill.selection import select

from . import oracle
from .harness import mask_of, options, planted, states

NAIVE = {"exact": oracle.exact, "compat": oracle.compat}


def naive(query, key, chosen):
    """Return masks [b, H, M, Nk] and query-aware heads [b, H] of the naive selection."""
    group = query.shape[1] // key.shape[1]
    found = [
        [
            NAIVE[chosen.mode](
                query[b, h].numpy(), key[b, h // group].numpy(), query.shape[-1] ** -0.5,
                gamma=chosen.gamma, tau=chosen.tau, least=chosen.min_budget,
                most=chosen.max_budget, block=chosen.block,
            )
            for h in range(query.shape[1])
        ]
        for b in range(len(query))
    ]  # fmt: skip
    masks = torch.stack([torch.stack([torch.from_numpy(m) for m, _ in row]) for row in found])
    return masks, torch.tensor([[aware for _, aware in row] for row in found])


@pytest.mark.parametrize("mode", ["exact", "compat"])
@pytest.mark.parametrize("keys", [384, 1000, 4096, 4097])
def test_index_for_index(mode, keys):
    query, key = states(keys, keys=keys)
    kinds = []
    for gamma, tau in ((0.7, 0.0), (0.5, 1.0), (0.9, 0.1), (0.95, 0.2), (0.6, 0.3)):
        chosen = options(mode=mode, gamma=gamma, tau=tau)
        wanted, aware = naive(query, key, chosen)
        assert torch.equal(mask_of(query, key, chosen), wanted)
        found = reference.find_pattern(query, key, query.shape[-1] ** -0.5, chosen)
        assert torch.equal(found.aware, aware)
        kinds.append(int(aware.sum()))
    assert kinds[:2] == [0, 4]
    assert any(0 < kind < 4 for kind in kinds)  # heads of both kinds side by side


@pytest.mark.parametrize("mode", ["exact", "compat"])
@pytest.mark.parametrize(
    ("queries", "keys", "block", "changes"),
    [
        (300, 1000, 128, {}),
        (1, 700, 64, {}),
        (129, 129, 128, {}),
        (333, 333, 16, {"tau": 0.15}),
        (200, 777, 32, {"max_budget": 160}),
        (640, 640, 64, {"min_budget": 500, "max_budget": 500, "tau": 0.0}),
    ],
)
def test_chunks_blocks_and_budgets(mode, queries, keys, block, changes):
    query, key = states(queries, rows=2, queries=queries, keys=keys)
    chosen = options(mode=mode, block=block, gamma=0.8, **{"min_budget": block, **changes})
    assert torch.equal(mask_of(query, key, chosen), naive(query, key, chosen)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_half_precision_loses_almost_nothing(dtype):
    query, key = (x.to(dtype) for x in states(1, keys=1500, head_dim=64))
    chosen = options(block=16, min_budget=16)
    wanted = naive(query.double(), key.double(), chosen)[0]
    assert (mask_of(query, key, chosen) ^ wanted).float().mean() < 1e-3


def test_published_counts_are_the_published_ones():
    mass = torch.tensor([0.5, 0.3, 0.15, 0.05])
    assert reference.published_count(mass, 0.8) == 3
    assert reference.published_count(mass, 0.81) == 3
    assert reference.published_count(torch.tensor([0.5, 0.25, 0.15, 0.1]), 0.75) == 3
    kept = reference._cover_all(torch.tensor([[0.4, 0.1, 0.3, 0.2]]), 0.75)
    assert kept.tolist() == [[True, False, True, False]]


def test_verticals_and_slashes_are_joined_as_published():
    pattern = reference.Pattern(*(torch.zeros(1, 1, 5, dtype=torch.bool) for _ in range(2)), None)
    pattern.vertical[..., [0, 2]] = True
    pattern.slash[..., [0, 3]] = True
    flat = reference._spread(pattern, BlockGrid(5 * 128, 5 * 128)).flatten().nonzero().flatten()
    assert flat.tolist() == [0, 5, 6, 10, 12, 15, 17, 18, 20, 21, 22, 24]


def test_the_divergence_is_zero_for_equals_and_its_most_for_disjoint_shares():
    p, q = torch.tensor([0.5, 0.5, 0.0, 0.0]), torch.tensor([0.0, 0.0, 0.25, 0.75])
    assert reference.jensen_shannon(p, p) == 0
    assert abs(reference.jensen_shannon(p, q) - 0.8326) < 1e-4


@pytest.mark.parametrize("mode", ["exact", "compat"])
@pytest.mark.parametrize("tau", [0.0, 0.1, 1.0])
def test_what_holds_for_every_selection(mode, tau):
    query, key = states(5, rows=2, keys=1100, queries=700)
    chosen = options(mode=mode, tau=tau, block=64, min_budget=192, max_budget=400, gamma=0.99)
    mask = mask_of(query, key, chosen)
    grid = BlockGrid(700, 1100, 64)
    i, j = torch.arange(grid.first, grid.key_blocks)[:, None], torch.arange(grid.key_blocks)
    assert not mask[..., i < j].any()
    assert mask[..., i == j].all()
    assert mask[..., 0].all()
    assert torch.equal(mask[1:], mask_of(query[1:], key[1:], chosen))
    pattern = reference.find_pattern(query, key, 0.25, chosen)
    for part in (pattern.vertical, pattern.slash):
        assert ((part.sum(-1) >= 3) & (part.sum(-1) <= 7)).all()
    assert {0.0: pattern.aware.sum() == 0, 1.0: pattern.aware.all()}.get(tau, True)


@pytest.mark.parametrize("mode", ["exact", "compat"])
def test_permuted_heads_permute_the_masks(mode):
    query, key = states(3, heads=6, kv_heads=3, keys=600)
    chosen = options(mode=mode, block=32, min_budget=32)
    mask = mask_of(query, key, chosen)
    swapped = mask_of(query[:, [4, 5, 0, 1, 2, 3]], key[:, [2, 0, 1]], chosen)
    assert torch.equal(swapped, mask[:, [4, 5, 0, 1, 2, 3]])


def covered(query, key, chosen):
    """Return the share of the last queries' attention that the lists hold, row by row averaged."""
    n, block = key.shape[2], chosen.block
    mask = mask_of(query, key, chosen)[0, 0]
    p, positions = oracle.representative(query[0, 0].numpy(), key[0, 0].numpy(), 0.125, block)
    rows = mask[positions // block - (n - query.shape[2]) // block]
    seen = rows.repeat_interleave(block, 1)[:, :n]
    return (torch.from_numpy(p) * seen).sum(1).mean().item()


@pytest.mark.parametrize("keys", [2048, 2000])
@pytest.mark.parametrize(
    "plan", [{"rho": 0}, {"rho": 64}, {"rho": 127}, {"verticals": (300, 900, 1500)}]
)
def test_exact_covers_gamma_of_planted_patterns(keys, plan):
    query, key = planted(**plan, keys=keys)
    chosen = options(tau=0.0, gamma=0.9)
    assert covered(query, key, chosen) >= 0.9 - 1e-6
    assert mask_of(query, key, chosen).float().mean() < 0.4


def test_a_slash_between_two_diagonals_is_covered_in_every_row():
    query, key = planted(rho=64)
    mask = mask_of(query, key, options(tau=0.0, gamma=0.9))[0, 0]
    i = torch.arange(3, 16)
    assert mask[i, i - 2].all()
    assert mask[i, i - 3].all()


def test_compat_covers_half_of_such_a_slash_and_too_few_verticals():
    """What `exact` corrects is there to be corrected."""
    chosen = options(tau=0.0, gamma=0.9, mode="compat")
    assert covered(*planted(rho=64), chosen) < 0.6
    verticals = range(3, 1900, 150)
    assert covered(*planted(verticals=verticals), options(tau=0.0, gamma=0.9)) >= 0.9
    mass = torch.zeros(2048).scatter(0, torch.tensor(verticals), 1 / len(verticals))
    assert reference.published_count(mass, 0.9) // 128 + 1 == 1


def test_every_row_of_a_query_aware_head_covers_gamma():
    query, key = states(9, keys=1000)
    chosen = options(tau=1.0, block=32, min_budget=32, gamma=0.8)
    mask = mask_of(query, key, chosen)
    for head in range(4):
        share = oracle.pooled_attention(query[0, head].numpy(), key[0, head // 2].numpy(), 0.25, 32)
        assert ((torch.from_numpy(share) * mask[0, head]).sum(-1) >= 0.8 - 1e-9).all()


@pytest.mark.parametrize("mode", ["exact", "compat"])
@pytest.mark.parametrize("tau", [0.0, 1.0])
def test_density_grows_with_gamma_to_one(mode, tau):
    query, key = states(2, keys=900)
    params, last = AttentionParams(0.25), torch.zeros(1, 4)
    for gamma in (0.2, 0.5, 0.8, 0.95, 0.999, 1.0):
        chosen = options(mode=mode, tau=tau, gamma=gamma, block=16, min_budget=16)
        share = density(select(query, key, params, chosen), 900, 900)
        assert (share >= last).all()
        last = share
    assert (last == 1).all()


@pytest.mark.parametrize("mode", ["exact", "compat"])
def test_the_scale_of_the_model_counts(mode):
    query, key = states(4, keys=800)
    chosen = options(mode=mode, block=32, min_budget=32)
    wanted = mask_of(query * 3, key, chosen, scaling=0.25)
    assert torch.equal(mask_of(query, key, chosen, scaling=0.75), wanted)
    assert not torch.equal(mask_of(query, key, chosen, scaling=0.25), wanted)


def test_nothing_depends_on_the_name_of_the_device(monkeypatch):
    for name in ("get_device_name", "get_device_properties", "get_device_capability"):
        monkeypatch.setattr(torch.cuda, name, lambda *args: pytest.fail("asked for the device"))
    query, key = states(4, keys=400)
    assert mask_of(query, key, options()).any()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"gamma": 0.0}, "gamma.*> 0"),
        ({"gamma": 1.01}, "gamma.*<= 1"),
        ({"tau": -0.1}, "tau.*>= 0"),
        ({"tau": 1.5}, "tau.*<= 1"),
        ({"min_budget": 0}, "min_budget.*>= 1"),
        ({"max_budget": 0}, "max_budget.*>= 1"),
        ({"min_budget": 512, "max_budget": 256}, "min_budget is 512.*max_budget 256"),
        ({"block": 100}, "block.*128"),
        ({"mode": "published"}, "mode.*exact, compat"),
        ({"dense_below": -1}, "dense_below.*>= 0"),
    ],
)
def test_options_out_of_range_are_refused(changes, words):
    with pytest.raises(OptionError, match=words):
        FlexPrefillOptions(**changes)


def test_capped_scores_are_refused_by_the_selector():
    query, key = states(0)
    with pytest.raises(UnsupportedError, match="Attend densely"):
        select(query, key, AttentionParams(0.25, softcap=30.0), options())
