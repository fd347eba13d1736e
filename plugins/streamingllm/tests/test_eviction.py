"""Which tokens StreamingLLM holds: after the prompt, at every decode step, after every turn."""

import pytest
import torch

from kvdock.budget import Budget
from kvdock.errors import BudgetError, OptionError
from kvdock_streamingllm.options import StreamingLLMOptions
from kvdock_streamingllm.policy import StreamingLLMPolicy

from .harness import Batch, attach, held, make_layer, make_model, rotation, tokens
from .oracle import kept

BOTH = pytest.mark.parametrize("positions", ["cache", "original"])


@pytest.fixture(scope="module")
def model():
    return make_model(layers=2)


@pytest.fixture(scope="module")
def rotate():
    return rotation(8)


@BOTH
@pytest.mark.parametrize("sinks", [0, 1, 4, 11])
@pytest.mark.parametrize("prompt", [1, 3, 11, 12, 13, 40])
def test_one_layer_at_every_step(rotate, positions, sinks, prompt):
    slots, layer = 12, make_layer(12, rotate=rotate, sinks=sinks, positions=positions)
    layer.prompt(tuple(torch.randn(3, 2, 2, prompt, 8)))
    for seen in range(prompt, prompt + 3 * slots):
        assert held(layer) == [kept(seen, slots, sinks)] * 2
        layer.step(tuple(torch.randn(3, 2, 2, 1, 8)))


@BOTH
@pytest.mark.parametrize("prompt", [3, 30])
def test_every_layer_of_a_model_at_every_step(model, positions, prompt):
    slots = 8
    with attach(model, slots, positions=positions) as dock:
        batch = Batch(model, dock.new_cache())
        batch.feed([tokens(prompt)])
        for seen in range(prompt, prompt + 3 * slots):
            for layer in range(2):
                assert held(dock, layer) == [kept(seen, slots, 4)]
            assert dock.report().layers[0].slots == min(seen, slots)
            batch.feed([tokens(1, seed=seen)])


@BOTH
def test_rows_that_start_evicting_at_different_steps(model, positions):
    slots, lengths = 8, [30, 5, 8, 1]
    with attach(model, slots, positions=positions) as dock:
        batch = Batch(model, dock.new_cache())
        batch.feed([tokens(n, seed=n) for n in lengths])
        for done in range(12):
            assert held(dock, 1) == [kept(n + done, slots, 4) for n in lengths]
            dock.report()
            batch.feed([tokens(1, seed=done)] * len(lengths))


@BOTH
@pytest.mark.parametrize("share", ["5%", "10%", "20%", "50%"])
def test_a_share_that_does_not_hold_the_sinks_keeps_the_last_token(model, positions, share):
    lengths, percent = [40, 20, 9], int(share[:-1])
    slots = [max(1, n * percent // 100) for n in lengths]
    with attach(model, share, sinks=7, positions=positions) as dock:
        batch = Batch(model, dock.new_cache())
        batch.feed([tokens(n, seed=n) for n in lengths])
        for done in range(12):
            wanted = [kept(n + done, c, 7) for n, c in zip(lengths, slots, strict=True)]
            assert held(dock) == wanted
            batch.feed([tokens(1, seed=done)] * len(lengths))


@BOTH
def test_a_prompt_in_chunks_is_evicted_once_it_is_complete(model, positions):
    with attach(model, 12, positions=positions) as dock:
        batch = Batch(model, dock.new_cache(prompt_length=40))
        prompt = tokens(40)
        for start, stop in ((0, 15), (15, 39), (39, 40)):
            assert held(dock) == [list(range(start))] if start else True
            batch.feed([prompt[start:stop]])
        assert held(dock) == [kept(40, 12, 4)]


@BOTH
def test_every_turn_ends_with_the_sinks_and_the_recent_tokens(model, positions):
    lengths = [5, 30, 12]
    with attach(model, 12, positions=positions) as dock:
        batch = Batch(model, dock.new_cache())
        batch.feed([tokens(n, seed=n) for n in lengths])
        for turn, more in enumerate(([3, 3, 3], [9, 2, 1], [1, 1, 1], [20, 4, 4])):
            batch.feed([tokens(n, seed=100 * turn + n) for n in more])
            lengths = [n + m for n, m in zip(lengths, more, strict=True)]
            assert held(dock, 1) == [kept(n, 12, 4) for n in lengths]
            dock.report()


@BOTH
def test_beam_search_keeps_every_beam_within_the_budget(model, positions):
    with attach(model, 12, positions=positions) as dock:
        output = model.generate(
            tokens(30)[None], attention_mask=torch.ones(1, 30), num_beams=3, max_new_tokens=20,
            do_sample=False,
        )  # fmt: skip
        assert output.shape == (1, 50)
        assert held(dock, 1) == [kept(49, 12, 4)] * 3
        dock.report()


@pytest.mark.parametrize(("name", "value"), [("sinks", -1), ("positions", "slot"), ("sinks", 1.5)])
def test_options_out_of_range_are_refused(name, value):
    with pytest.raises(OptionError, match=name):
        StreamingLLMOptions(**{name: value})


@pytest.mark.parametrize("slots", [1, 4])
def test_a_budget_the_sinks_fill_is_refused(slots):
    policy = StreamingLLMPolicy(StreamingLLMOptions())
    with pytest.raises(BudgetError, match="sinks"):
        policy.check_budget(Budget.parse(slots))
    policy.check_budget(Budget.parse(5))
    policy.check_budget(Budget.parse("1%"))  # known only with the prompt: the sinks shrink
