"""Decode in fixed shapes gives the tokens, bytes and callbacks of eager decode."""

import copy
import gc
import logging
import math
import weakref

import pytest
import torch
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

import kvdock
from kvdock import available, decode
from kvdock.errors import UnsupportedError
from kvdock.frozen import FrozenCache
from kvdock.ledger import Ledger
from kvdock.testing import FAMILIES, Case, alone, generate, left_padded, tiny_model

LENGTHS = (97, 70, 33)


@pytest.fixture
def frozen(monkeypatch):
    """Decode in fixed shapes on the CPU, with little room; count what was frozen."""
    monkeypatch.setenv("KVDOCK_FROZEN", "1")
    monkeypatch.setattr(decode, "ROOM", 16)
    rooms = []

    class Counted(FrozenCache):
        def __init__(self, stores, room):
            rooms.append(room)
            super().__init__(stores, room)

    monkeypatch.setattr(decode, "FrozenCache", Counted)
    return rooms


def both(case, batch, frozen, **settings):
    """Return eager tokens, tokens of fixed shapes and both reports."""
    model, runs, reports = case.model(), [], []
    for graph in (False, "auto"):
        assert not frozen or graph == "auto"
        with case.attach(model, graph=graph) as dock:
            runs.append(generate(model, batch, **settings))
            reports.append(dock.report())  # raises when held and predicted bytes differ
    return *runs, reports


def growth(method):
    """Say whether a method's cache grows with every new token."""
    with Case(method).attach(Case(method).model()) as dock:
        return not Ledger(dock.plan.cache_policy).bounded


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", available())
def test_tokens_of_a_padded_batch(frozen, method, family):
    batch, _ = left_padded(LENGTHS)
    eager, fixed, reports = both(Case(method, family), batch, frozen, max_new_tokens=24)
    assert torch.equal(fixed, eager)
    assert [layer.logical_length for layer in reports[0].layers] == [
        layer.logical_length for layer in reports[1].layers
    ]
    assert [layer.slots for layer in reports[0].layers] == [
        layer.slots for layer in reports[1].layers
    ]
    assert len(frozen) == (2 if growth(method) else 1), "24 tokens do not fit into room for 16"


FORMS = [
    form
    for form in ("snapkv+kivi", "snapkv+think", "think+kivi", "snapkv+think+kivi")
    if set(form.split("+")) <= set(available())
]


@pytest.mark.parametrize(
    ("method", "new"),
    [
        *((name, 120) for name in available()),
        *((form, 80) for form in FORMS),
        *(pytest.param(name, 300, marks=pytest.mark.slow) for name in available()),
    ],
)
def test_long_answers_of_a_padded_batch_with_rows_that_stop(frozen, method, new, monkeypatch):
    """Rooms are filled one after the other; rows that stopped go on with pads."""
    monkeypatch.setattr(decode, "ROOM", 55)
    case, (batch, _) = Case(method), left_padded(LENGTHS[::2])
    wide = {"head_dim": 32} if case.kinds & {"quantisation", "channel-pruning"} else {}
    model = tiny_model("llama", num_hidden_layers=2, num_key_value_heads=1, **wide)
    runs = []
    for graph in (False, "auto"):
        with case.attach(model, graph=graph) as dock:
            stopping = StoppingCriteriaList([Stop(LENGTHS[0], (7, 10**6))])
            settings = {"max_new_tokens": new, "eos_token_id": 999}  # which no row ever says
            runs.append(generate(model, batch, stopping_criteria=stopping, **settings))
            report = dock.report()
            runs.append([layer.logical_length for layer in report.layers])
    assert torch.equal(runs[0], runs[2]) and runs[1] == runs[3]
    assert runs[0].shape == (2, new) and not runs[0][0, 7:].any()
    assert len(frozen) == (math.ceil((new - 1) / 55) if growth(method) else 1)


class Stop(StoppingCriteria):
    """Stop every row after some tokens of its own; note what was seen."""

    def __init__(self, start, after=(5, 9, 10**6)):
        self.start, self.after, self.lengths = start, torch.tensor(after), []

    def __call__(self, input_ids, scores, **kwargs):
        self.lengths.append(input_ids.shape[1])
        return input_ids.shape[1] - self.start >= self.after


class Heard(BaseStreamer):
    def __init__(self):
        self.pieces = []

    def put(self, value):
        self.pieces.append(value.tolist())

    def end(self):
        self.pieces.append("end")


@pytest.mark.parametrize("method", ["snapkv", "streamingllm", "h2o"])
def test_rows_that_stop_early_and_callbacks(frozen, method):
    if method not in available():
        pytest.skip(f"{method} is not installed")
    batch, (row, *_) = left_padded(LENGTHS)
    case, seen = Case(method), []
    model = case.model()
    for graph in (False, "auto"):
        with case.attach(model, graph=graph):
            stop, heard = Stop(LENGTHS[0]), Heard()
            stopping = StoppingCriteriaList([stop])
            tokens = generate(model, batch, stopping_criteria=stopping, eos_token_id=159)
            generate(model, alone(row), streamer=heard)
            seen.append((tokens.tolist(), stop.lengths, heard.pieces))
    assert frozen and seen[0] == seen[1]
    assert seen[0][2][-1] == "end"


@pytest.mark.parametrize("method", ["snapkv", "h2o"])
def test_sampling_with_a_seed_and_scores(frozen, method):
    if method not in available():
        pytest.skip(f"{method} is not installed")
    batch, _ = left_padded(LENGTHS)
    case, runs = Case(method), []
    model = case.model()
    for graph in (False, "auto"):
        with case.attach(model, graph=graph), torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            runs.append(
                model.generate(
                    **batch, do_sample=True, top_k=20, max_new_tokens=20, num_return_sequences=2,
                    output_scores=True, output_hidden_states=True, return_dict_in_generate=True,
                )
            )  # fmt: skip
    assert frozen and torch.equal(runs[0].sequences, runs[1].sequences)
    for left, right in zip(runs[0].scores, runs[1].scores, strict=True):
        torch.testing.assert_close(left, right, atol=1e-3, rtol=1e-3)
    assert len({id(step[-1]) for step in runs[1].hidden_states}) == 20


def test_beams_run_eagerly_and_say_so(frozen, model, policies, batch, generate, caplog):
    with kvdock.attach(model, [policies.Ring()], budget=48, graph=False):
        wanted = generate(model, batch, num_beams=2)
    with kvdock.attach(model, [policies.Ring()], budget=48), caplog.at_level(logging.WARNING):
        assert generate(model, batch, num_beams=2) == wanted
        generate(model, batch, num_beams=2)
    assert not frozen
    (told,) = [r.getMessage() for r in caplog.records if r.name == "kvdock"]
    assert "beam search reorders the rows" in told


def test_full_cache_of_a_sparse_prefill(frozen, model, policies, batch, generate):
    with kvdock.attach(model, [policies.Counting()], graph=False):
        wanted = generate(model, batch, 40)
    with kvdock.attach(model, [policies.Counting()]) as dock:
        assert generate(model, batch, 40) == wanted
        assert dock.report().ratio >= 1
    assert len(frozen) == 3


def test_short_answers_hold_no_more_room_than_they_need(frozen, model, policies, row, generate):
    with kvdock.attach(model, [policies.Votes()], budget=48) as dock:
        generate(model, row, 7)
        assert frozen == [6]
        assert dock.cache.session.stores[0].ledger.capacity == 48 + 6


def test_a_forward_of_ones_own_after_generate(frozen, model, policies, row):
    """The cache goes on eagerly, where it was left."""
    logits = []
    for graph in (False, "auto"):
        with kvdock.attach(model, [policies.Ring()], budget=48, graph=graph) as dock:
            out = model.generate(
                **row, max_new_tokens=20, do_sample=False, return_dict_in_generate=True
            )
            cache = out.past_key_values
            assert cache.session.decoder is None
            step = {"input_ids": out.sequences[:, -1:], "past_key_values": cache}
            for _ in range(3):
                logits.append(model(**step).logits)
            kept = dock.kept_positions(0)
            dock.report()
            logits.append(kept.float())
    for left, right in zip(logits[:4], logits[4:], strict=True):
        torch.testing.assert_close(left, right, atol=1e-4, rtol=1e-4)


def test_forwards_in_the_middle_thaw_the_layers(frozen, model, policies, row):
    """What a processor does with the cache between two steps is done eagerly, then it freezes."""

    def meddle(input_ids, scores):
        cache = dock.cache
        if input_ids.shape[1] == 97 + 6:
            copied = copy.deepcopy(cache)
            assert copied.session.decoder is None
            cache.batch_select_indices(torch.tensor([0]))
            assert cache.session.decoder.frozen is None
        return scores

    runs = []
    for graph in (False, "auto"):
        with kvdock.attach(model, [policies.Ring()], budget=48, graph=graph) as dock:
            cache = dock.new_cache()
            settings = {"past_key_values": cache, "max_new_tokens": 20, "do_sample": False}
            processors = [meddle] if graph else []
            runs.append(model.generate(**row, **settings, logits_processor=processors))
            dock.report()
    assert torch.equal(*runs) and len(frozen) == 2


def test_a_dropped_cache_frees_its_memory_at_once(frozen, model, policies, row):
    with kvdock.attach(model, [policies.Ring()], budget=48) as dock:
        cache = dock.new_cache()
        model.generate(**row, past_key_values=cache, max_new_tokens=20, do_sample=False)
        slots = weakref.ref(cache.session.stores[0].dense.table["key"])
        gc.disable()
        try:
            dock.new_cache()
            del cache
            assert slots() is None
        finally:
            gc.enable()
    assert frozen


def test_modes_on_a_cpu(model, policies, caplog):
    settings = {"budget": 48}
    with caplog.at_level(logging.INFO, logger="kvdock"):
        with kvdock.attach(model, [policies.Ring()], **settings) as dock:
            assert dock.plan.decode is None and "forward" not in model.__dict__
        assert ["graphs need a CUDA device" in r.getMessage() for r in caplog.records] == [True]
        with kvdock.attach(model, [policies.Ring()], graph=False, **settings) as dock:
            assert dock.plan.decode is None
    assert len(caplog.records) == 1
    with pytest.raises(UnsupportedError, match="graphs need a CUDA device"):
        kvdock.attach(model, [policies.Ring()], graph=True, **settings)
    assert not {"forward", "generate"} & set(model.__dict__)


def test_layers_with_a_cache_of_their_own(frozen, policies):
    model = tiny_model(
        "qwen2",
        use_sliding_window=True,
        sliding_window=32,
        layer_types=["full_attention", "sliding_attention", "full_attention"],
    )
    with kvdock.attach(model, [policies.Ring()], budget=48) as dock:
        assert dock.plan.decode is None


def test_a_cache_too_long_for_masked_attention_stays_eager(
    model, row, policies, caplog, monkeypatch
):
    with kvdock.attach(model, [policies.Counting()]) as dock:
        model.generate(**row, max_new_tokens=2)
        session = dock.cache.session
        auto = decode.Decoder(decode.DecodeMode(capture=True), 40)
        assert not auto._too_long(session)
        monkeypatch.setattr(decode, "LONGEST", 50)
        assert auto._too_long(session)
        assert "98 entries, over 50" in caplog.text
        with monkeypatch.context() as patch:
            patch.setattr(decode, "has_kernel", lambda store: True)
            assert not auto._too_long(session), "the kernel reads what is filled only"
        asked = decode.Decoder(decode.DecodeMode(capture=True, required=True), 40)
        assert not asked._too_long(session)
