"""Storage policies in the flow: prompts stay exact, rows stay their own, misfits are refused."""

import pytest
import torch
import transformers

import kvdock
from kvdock.errors import AccountingError, CompositionError, UnsupportedError
from kvdock.kernels.merge import attend_lse, merge_states
from kvdock.kernels.reference import ReferenceBackend
from kvdock.kernels.sdpa import SDPABackend
from kvdock.policy import AttentionParams
from kvdock.storage import PolicyStorage, RowGroup
from kvdock.storage_policy import ChannelPolicy, FormatPolicy
from kvdock.testing import alone
from kvdock.testing_models import left_padded, tiny_model

CHUNKED_TURNS = pytest.mark.skipif(
    tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 23),
    reason="transformers 5.4 and 5.17 cut the mask of a second turn's chunks as of a first one's",
)


class Lists(PolicyStorage):
    """Keep every row's entries in tensors of its own, keys without their unchosen channels."""

    def __init__(self, rounding):
        self.rounding, self.rows, self.capacity, self.live = rounding, [], 0, []
        self.fills = []

    @property
    def empty(self):
        return not self.rows

    def _kept(self, key, channels):
        if channels is None:
            return self.rounding(key)
        mask = torch.zeros_like(key[:, :, :1]).scatter_(3, channels[:, :, None], 1.0)
        return self.rounding(key * mask)

    def fill(self, groups, capacity, *, ordered):
        self.fills.append([group.channels for group in groups])
        self.rows = [None] * sum(len(group.rows) for group in groups)
        for group in groups:
            for i, row in enumerate(group.rows):
                channels = None if group.channels is None else group.channels[i : i + 1]
                one = slice(i, i + 1)
                self.rows[row] = [
                    self._kept(group.keys[one], channels),
                    self.rounding(group.values[one]),
                    group.positions[one],
                ]
        self._count(capacity)

    def append(self, groups, capacity):
        for group in groups:
            for i, row in enumerate(group.rows):
                one = slice(i, i + 1)
                new = [group.keys[one], group.values[one], group.positions[one]]
                pairs = zip(self.rows[row], new, strict=True)
                self.rows[row] = [torch.cat(pair, dim=2) for pair in pairs]
        self._count(capacity)

    def append_step(self, key, value, positions, capacity):
        groups = []
        for row, position in enumerate(positions):
            one = slice(row, row + 1)
            where = torch.full(key[one, :, :, 0].shape, position)
            groups.append(RowGroup((row,), key[one], value[one], where))
        self.append(groups, capacity)

    def _count(self, capacity):
        self.live = [row[0].shape[2] for row in self.rows]
        assert capacity >= max(self.live)
        self.capacity = capacity

    def attend_past(self, query, rows, params):
        outputs, sums = [], []
        for i, row in enumerate(rows):
            key, value, _ = self.rows[row]
            group = query.shape[1] // key.shape[1]
            scores = query[i : i + 1] @ key.repeat_interleave(group, 1).mT * params.scaling
            sums.append(scores.logsumexp(-1))
            outputs.append(scores.softmax(-1) @ value.repeat_interleave(group, 1))
        return torch.cat(outputs), torch.cat(sums)

    def attend_step(self, query, params):
        return self.attend_past(query, range(len(self.rows)), params)[0].transpose(1, 2)

    def row(self, index):
        return RowGroup((index,), *self.rows[index])

    def select_rows(self, index, order):
        self.rows = [list(self.rows[row]) for row in index.tolist()]
        self.live = [row[0].shape[2] for row in self.rows]

    @property
    def even(self):
        return len(set(self.live)) == 1

    def kept_positions(self):
        kept = torch.full((len(self.rows), self.rows[0][2].shape[1], max(self.live)), -1)
        for index, row in enumerate(self.rows):
            kept[index, :, : self.live[index]] = row[2][0]
        return kept

    def tensors(self):
        return {
            f"{i}.{name}": row[at]
            for i, row in enumerate(self.rows)
            for at, name in enumerate("kv")
        }

    @property
    def nbytes(self):
        heads, dim = self.rows[0][0].shape[1], self.rows[0][0].shape[3]
        return 2 * 4 * dim * heads * len(self.rows) * self.capacity

    state_nbytes = 0


class Form(FormatPolicy):
    """Store what `Lists` stores; exact unless a rounding is given."""

    def __init__(self, rounding=lambda x: x, wrong=0):
        self.rounding, self.wrong, self.made = rounding, wrong, []

    def bind(self, facts):
        assert facts.head_dim == 16

    def make_storage(self):
        self.made.append(Lists(self.rounding))
        return self.made[-1]

    def predicted_nbytes(self, shape, capacity):
        return shape.dense_entry * capacity + self.wrong


class Channels(ChannelPolicy):
    """Keep the channels of largest energy."""

    query_window = 3

    def __init__(self, kept=16, active=True):
        self.kept, self.views, self._active = kept, [], active

    @property
    def active(self):
        return self._active

    def bind(self, facts):
        pass

    def kept_channels(self, head_dim):
        return self.kept

    def select_channels(self, view):
        self.views.append((view.queries.shape[2], view.length))
        energy = view.keys.square().mean(dim=2)
        return energy.topk(self.kept).indices.sort().values

    def make_storage(self):
        return Lists(lambda x: x)

    def predicted_nbytes(self, shape, capacity):
        return shape.dense_entry * capacity


def coarse(x):
    return (x * 4).round() / 4


@pytest.mark.parametrize("chunk", [None, 16, 96])
@pytest.mark.parametrize("methods", [lambda: [Form()], lambda: [Channels(), Form()]])
def test_an_exact_form_changes_nothing(model, batch, generate, methods, chunk):
    chunks = {} if chunk is None else {"prefill_chunk_size": chunk}
    plain = generate(model, batch)
    with kvdock.attach(model, methods()) as dock:
        assert generate(model, batch, **chunks) == plain
        report = dock.report()
        assert report.bytes_held == report.bytes_predicted
        assert dock.kept_positions(0).tolist()[2][0][:45] == [*range(33 + 11), -1]


def test_a_prompt_is_exact_whatever_the_form(model, row):
    plain = model(**row).logits
    with torch.no_grad(), kvdock.attach(model, [Form(coarse)]) as dock:
        assert torch.equal(model(**row, past_key_values=dock.new_cache()).logits, plain)
        cache = dock.new_cache(prompt_length=97)
        ids = row["input_ids"]
        first = model(ids[:, :40], past_key_values=cache).logits
        rest = model(ids[:, 40:], past_key_values=cache).logits
    assert torch.allclose(torch.cat([first, rest], 1), plain, atol=2e-5)


@pytest.mark.parametrize("chunk", [None, pytest.param(4, marks=CHUNKED_TURNS)])
def test_a_later_turn_reads_the_form_and_its_own_tokens_exactly(model, policies, generate, chunk):
    """Every row alone equals the padded batch, and an exact form equals the dense cache."""
    first, rows = left_padded((97, 70, 33))
    more, more_rows = left_padded((9, 5, 7), seed=1)
    chunks = {} if chunk is None else {"prefill_chunk_size": chunk}

    def two_turns(methods, head, tail):
        with kvdock.attach(model, methods) as dock:
            cache = dock.new_cache()
            answer = torch.tensor(generate(model, head, past_key_values=cache))
            whole = {
                "input_ids": torch.cat([head["input_ids"], answer, tail["input_ids"]], 1),
                "attention_mask": torch.cat(
                    [head["attention_mask"], torch.ones_like(answer), tail["attention_mask"]], 1
                ),
            }
            result = generate(model, whole, past_key_values=cache, **chunks)
            dock.report()
            return result

    dense = two_turns([policies.Counting()], first, more)
    assert two_turns([Form()], first, more) == dense
    assert two_turns([policies.Counting(), Form()], first, more) == dense
    together = two_turns([Form(coarse)], first, more)
    for index in range(3):
        single = two_turns([Form(coarse)], alone(rows[index]), alone(more_rows[index]))
        assert single[0] == together[index]


def test_tokens_are_selected_before_channels_and_channels_before_the_form(model, batch, policies):
    class Once(policies.Votes):
        acts_on_later_turns = False

    channels, form = Channels(kept=12), Form()
    with kvdock.attach(model, [Once(), channels, form], budget=48):
        model.generate(**batch, max_new_tokens=4)
    assert channels.views == [(3, 48), (3, 48), (3, 33)] * 3
    chosen = form.made[0].fills[0]
    assert [tuple(index.shape) for index in chosen] == [(1, 2, 12)] * 3


def test_an_inactive_policy_leaves_the_dense_path(model, batch, generate):
    plain = generate(model, batch)
    with kvdock.attach(model, [Channels(active=False)]) as dock:
        assert generate(model, batch) == plain
        assert dock.plan.storage_policy is None


def test_steps_of_fixed_shape_are_the_forms_to_offer(model, row, monkeypatch):
    monkeypatch.setenv("KVDOCK_FROZEN", "1")
    form = Form()
    with kvdock.attach(model, [form]) as dock:
        assert dock.plan.decode is None
    form.fixed_steps = True
    with kvdock.attach(model, [form]), pytest.raises(NotImplementedError, match=r"freeze\(\)"):
        model.generate(**row, max_new_tokens=4)


def test_beams_reorder_the_form(model, batch, generate):
    plain = generate(model, batch, num_beams=3)
    with kvdock.attach(model, [Form()]):
        assert generate(model, batch, num_beams=3) == plain


def test_a_formula_that_is_wrong_is_found(model, row):
    with kvdock.attach(model, [Form(wrong=4)]) as dock:
        model.generate(**row, max_new_tokens=2)
        with pytest.raises(AccountingError, match="predicts"):
            dock.report()


def test_what_does_not_compose_is_refused_with_the_reason(model, policies):
    refusals = [
        ([policies.Ring(), Form()], {}, "at every decode step"),
        ([policies.Votes(), Form()], {}, "end of a later turn"),
        ([Form(), Channels()], {}, r"Write 'Channels\+Form'"),
        ([Form(), Form()], {}, "both choose the number format"),
        ([Form()], {"budget": 64}, "keeps every token"),
    ]
    for methods, settings, reason in refusals:
        with pytest.raises(CompositionError, match=reason):
            kvdock.attach(model, methods, **settings)


def test_scores_a_form_cannot_compute_are_refused():
    model = tiny_model("gemma2", attn_logit_softcapping=5.0, sliding_window=4096)
    model.config.layer_types = ["full_attention"] * 3
    with kvdock.attach(model, [Form()]), pytest.raises(UnsupportedError, match="caps its scores"):
        model.generate(torch.randint(3, 160, (1, 20)), max_new_tokens=2)


@pytest.mark.parametrize("backend", [ReferenceBackend(), SDPABackend()])
@pytest.mark.parametrize(("q", "n"), [(1, 1), (300, 300), (7, 300)])
def test_merged_states_equal_one_softmax(backend, q, n):
    generator = torch.Generator().manual_seed(n)
    query = torch.randn(2, 4, q, 16, generator=generator)
    key, value = (torch.randn(2, 2, n + 50, 16, generator=generator) for _ in range(2))
    params = AttentionParams(0.25)
    whole = ReferenceBackend().attend(query, key, value, params).transpose(1, 2)
    past = query @ key[:, :, :50].repeat_interleave(2, 1).mT * 0.25
    left = past.softmax(-1) @ value[:, :, :50].repeat_interleave(2, 1)
    right, lse = attend_lse(backend, query, key[:, :, 50:], value[:, :, 50:], params)
    merged = merge_states(left, past.logsumexp(-1), right, lse)
    assert torch.allclose(merged, whole, atol=2e-6)
