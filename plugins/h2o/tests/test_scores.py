"""The column sums: mass, hand cases, and independence of blocks, chunks and data types."""

import pytest
import torch

import kvdock
from kvdock.policy import AttentionParams
from kvdock.testing_layers import LayerDriver, random_states
from kvdock.testing_models import left_padded, tiny_model
from kvdock_h2o import policy, scores
from kvdock_h2o.options import H2OOptions
from kvdock_h2o.policy import SCORE, H2OPolicy

from . import oracle


def drive(budget, params=None, **options):
    return LayerDriver(H2OPolicy(H2OOptions(**options)), budget, params=params)


def held_scores(driver):
    return [driver.store().storage.row(i).slot_state[SCORE][0] for i in range(_rows(driver))]


def _rows(driver):
    return len(driver.store().ledger.tokens)


@pytest.mark.parametrize(("reduce", "factor"), [("sum", 4), ("mean", 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_query_gives_one(reduce, factor, dtype):
    """Mass: the scores of a head sum to its valid queries (times its group, when summed)."""
    lengths = [90, 41, 1]
    states = [x.to(dtype) for x in random_states(0, 3, 2, 4, 90, 64)]
    driver = drive(200, reduce=reduce)
    driver.prompt(tuple(states), lengths=lengths)
    for found, length in zip(held_scores(driver), lengths, strict=True):
        assert torch.allclose(found.sum(-1), torch.full((2,), float(factor * length)), rtol=1e-5)


def test_uniform_attention_falls_with_the_position():
    """Zero queries: s_j = Σ_{i ≥ j} 1/(i + 1), so the heavy hitters are the first tokens."""
    q, k, v = random_states(0, 1, 2, 3, 40, 64)
    whole = drive(100)
    whole.prompt((torch.zeros_like(q), k, v))
    wanted = torch.tensor([sum(1 / (i + 1) for i in range(j, 40)) for j in range(40)])
    assert torch.allclose(held_scores(whole)[0], wanted.expand(2, -1), rtol=1e-5)
    driver = drive(12, heavy=7)
    driver.prompt((torch.zeros_like(q), k, v))
    assert driver.kept() == [[[*range(7), *range(35, 40)]] * 2]


def test_a_hot_key_is_kept_wherever_it_is():
    q, k, v = random_states(1, 1, 1, 2, 80, 64)
    q[..., 0], k[..., 0] = 8.0, 0.0
    k[0, 0, 31, 0] = 8.0
    driver = drive(2)
    driver.prompt((q, k, v))
    assert driver.kept() == [[[31, 79]]]


@pytest.mark.parametrize("block_bytes", [1, 5_000, 100_000, 2**40])
def test_sums_do_not_depend_on_the_blocks(block_bytes, monkeypatch):
    q, k, _ = random_states(2, 2, 3, 4, 97, 64)
    params = AttentionParams(0.2)
    q = q[:, :, -61:]
    a = [oracle.probabilities(q[row], k[row], scaling=0.2) for row in range(2)]
    wanted = torch.stack([oracle.column_sums(one, 3) for one in a])
    monkeypatch.setattr(scores, "BLOCK_BYTES", block_bytes)
    found = scores.column_sums(q, k, params)
    assert found.dtype == torch.float32
    assert torch.allclose(found.double(), wanted, rtol=1e-5, atol=1e-7)


def test_a_block_stays_within_its_bytes(monkeypatch):
    q, k, _ = random_states(3, 1, 4, 2, 300, 16)
    sizes, plain = [], scores._normalised
    monkeypatch.setattr(scores, "BLOCK_BYTES", 40_000)
    monkeypatch.setattr(
        scores, "_normalised", lambda x, sinks: sizes.append(x.numel() * 4) or plain(x, sinks)
    )
    scores.column_sums(q, k, AttentionParams(0.25))
    assert 20_000 < max(sizes) <= 40_000


@pytest.mark.parametrize("chunks", [(1,) * 90, (89, 1), (7, 40, 43), (64, 26)])
def test_chunks_do_not_matter(chunks):
    states = random_states(4, 2, 2, 4, 90, 64)
    whole, pieces = drive(30), drive(30)
    whole.prompt(states, lengths=[90, 55])
    pieces.prompt(states, lengths=[90, 55], chunks=chunks)
    assert pieces.kept() == whole.kept()
    for one, other in zip(held_scores(pieces), held_scores(whole), strict=True):
        assert torch.allclose(one, other, rtol=1e-5)


def test_token_by_token_gives_the_sums_of_the_prompt():
    """Within the budget, decoding accumulates exactly what a prompt would."""
    states = random_states(5, 2, 2, 3, 50, 64)
    whole, stepped = drive(50), drive(50)
    whole.prompt(states)
    stepped.prompt(tuple(x[:, :, :1] for x in states))
    for i in range(1, 50):
        stepped.step(tuple(x[:, :, i : i + 1] for x in states))
    assert stepped.kept() == whole.kept() == [[[*range(50)]] * 2] * 2
    for one, other in zip(held_scores(stepped), held_scores(whole), strict=True):
        assert torch.allclose(one, other, rtol=1e-5)


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("learned_sinks", [False, True])
def test_soft_capping_and_learned_sinks_enter_the_scores(softcap, learned_sinks):
    q, k, v = random_states(6, 1, 2, 2, 60, 64)
    q = q * 3
    sinks = torch.tensor([0.5, 4.0, -2.0, 1.0]) if learned_sinks else None
    driver = drive(100, AttentionParams(0.25, softcap, sinks), reduce="sum")
    driver.prompt(tuple(x[:, :, :50] for x in (q, k, v)))
    for i in range(50, 60):
        driver.step(tuple(x[:, :, i : i + 1] for x in (q, k, v)))
    a = oracle.probabilities(q[0], k[0], scaling=0.25, softcap=softcap, sinks=sinks)
    wanted = oracle.column_sums(a, 2)
    assert torch.allclose(held_scores(driver)[0].double(), wanted, rtol=1e-4, atol=1e-6)


def test_mean_and_sum_choose_alike():
    states = random_states(7, 2, 2, 4, 90, 64)
    drivers = [drive(20, reduce=reduce) for reduce in ("mean", "sum")]
    for driver in drivers:
        driver.prompt(states)
    assert drivers[0].kept() == drivers[1].kept()


def test_duplicated_query_heads_choose_as_one_head():
    q, k, v = random_states(8, 1, 2, 1, 70, 64)
    one, four = drive(20), drive(20)
    one.prompt((q, k, v))
    four.prompt((q.repeat_interleave(4, dim=1), k, v))
    assert one.kept() == four.kept()


def test_bfloat16_keeps_what_float32_keeps():
    states = random_states(9, 2, 4, 4, 512, 64)
    whole, half = drive(128), drive(128)
    whole.prompt(states)
    half.prompt(tuple(x.bfloat16() for x in states))
    both = zip(sum(whole.kept(), []), sum(half.kept(), []), strict=True)
    common = [len(set(one) & set(other)) for one, other in both]
    assert sum(common) >= 0.95 * 128 * len(common)


def test_padding_and_neighbours_do_not_change_the_choice():
    states, lengths = random_states(10, 3, 2, 2, 90, 96), [90, 61, 40]
    batch = drive(16)
    batch.prompt(states, lengths=lengths)
    for row, length in enumerate(lengths):
        alone = drive(16)
        alone.prompt(tuple(x[row : row + 1, :, -length:] for x in states))
        assert batch.kept()[row] == alone.kept()[0]
        assert torch.equal(held_scores(batch)[row], held_scores(alone)[0])


def test_the_log_sum_exps_of_dense_attention_reach_the_sums(monkeypatch):
    """Given ones spare the kernel a pass; a padded batch has none and is scored without."""
    given = []

    def spy(queries, keys, params, lse=None):
        given.append((queries.shape[:3], lse))
        return scores.column_sums(queries, keys, params, lse)

    monkeypatch.setattr(policy, "column_sums", spy)
    model = tiny_model("llama")
    with kvdock.attach(model, "h2o", budget=16) as dock, torch.no_grad():
        for lengths in ((40, 40), (40, 31)):
            batch, _ = left_padded(lengths)
            model(**batch, past_key_values=dock.new_cache())
    even, padded = given[:3], given[3:]
    assert len(padded) == 6
    assert all(lse.shape == shape and lse.dtype == torch.float32 for shape, lse in even)
    assert all(lse is None for _, lse in padded)
