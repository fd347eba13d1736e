"""What an attached model refuses before anything runs, and that it works as before afterwards."""

import copy

import pytest
import torch
from transformers import DynamicCache, GenerationConfig, StaticCache

import kvdock
from kvdock.errors import UnsupportedError
from kvdock.testing_models import tiny_model

pytestmark = pytest.mark.filterwarnings("ignore:.*return_dict_in_generate.*:UserWarning")


@pytest.fixture
def policy(policies):
    return policies.Votes()


@pytest.fixture
def refused(docked, row, generate, monkeypatch):
    """Check that a call is refused before a forward and leaves model and dock as they were."""
    model, expected = docked.model, generate(docked.model, row, 4)

    def check(call, text, *, before_forward=True):
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        rng, forwards = torch.get_rng_state(), []
        hook = model.register_forward_pre_hook(lambda *_: forwards.append(1))
        with pytest.raises(UnsupportedError, match=text):
            call(model)
        hook.remove()
        assert not (before_forward and forwards), "the model ran before the refusal"
        assert torch.equal(torch.get_rng_state(), rng)
        assert all(torch.equal(state[name], now) for name, now in model.state_dict().items())
        assert generate(model, row, 4) == expected, "the dock is no longer usable"

    return check


def test_assisted_decoding(refused, row, generate):
    text = "assistant_model is not possible on a docked model: it takes tokens back"
    refused(lambda m: generate(m, row, assistant_model=tiny_model("llama", seed=1)), text)


@pytest.mark.parametrize("how", ["argument", "configuration", "the model's configuration"])
def test_prompt_lookup(refused, row, generate, how):
    def call(model):
        if how == "argument":
            generate(model, row, prompt_lookup_num_tokens=3)
        elif how == "configuration":
            settings = GenerationConfig(prompt_lookup_num_tokens=3, max_new_tokens=4)
            model.generate(**row, generation_config=settings)
        else:
            model.generation_config.prompt_lookup_num_tokens = 3
            try:
                generate(model, row)
            finally:
                model.generation_config.prompt_lookup_num_tokens = None

    refused(call, "prompt_lookup_num_tokens is not possible")


@pytest.mark.parametrize("kind", ["static", "offloaded", "dynamic", "quantized"])
def test_caches_transformers_would_make(refused, row, generate, kind):
    text = "cache_implementation is not possible .* the dock brings its own cache"
    refused(lambda m: generate(m, row, cache_implementation=kind), text)


def test_cache_implementation_in_a_configuration(refused, row):
    settings = GenerationConfig(cache_implementation="static", max_new_tokens=4)
    refused(lambda m: m.generate(**row, generation_config=settings), "cache_implementation is not")


def test_a_cache_object_of_another_kind(refused, row, generate):
    def dynamic(model):
        generate(model, row, past_key_values=DynamicCache())

    def static(model):
        generate(model, row, past_key_values=StaticCache(model.config, max_cache_len=200))

    refused(dynamic, "past_key_values is a DynamicCache that this dock did not make")
    refused(static, "past_key_values is a StaticCache that this dock did not make")


def test_a_cache_object_of_another_kind_in_a_direct_call(refused, row):
    text = "called with .* instead of the dock's cache"
    refused(lambda m: m(**row, past_key_values=DynamicCache()), text, before_forward=False)
    refused(lambda m: m(**row, use_cache=False), text, before_forward=False)
    refused(lambda m: m(**row), text, before_forward=False)
    text = "a static cache|instead of the dock's cache"
    refused(
        lambda m: m(**row, past_key_values=StaticCache(m.config, max_cache_len=200)),
        text,
        before_forward=False,
    )


def test_a_cache_of_another_model(refused, row, generate, policies):
    other = tiny_model("llama", seed=1)
    with kvdock.attach(other, [policies.Votes()], budget=48) as dock:
        cache = dock.new_cache()
        refused(lambda m: generate(m, row, past_key_values=cache), "this dock did not make")
        refused(lambda m: m(**row, past_key_values=cache), "made for another", before_forward=False)


def test_a_cache_of_a_detached_dock(model, policies, row, generate):
    dock = kvdock.attach(model, [policies.Votes()], budget=48)
    cache = dock.new_cache()
    generate(model, row, past_key_values=cache)
    dock.detach()
    dock.detach()  # a second call does nothing
    with pytest.raises(UnsupportedError, match="a dock that was detached"):
        model(**row, past_key_values=cache)
    with pytest.raises(UnsupportedError, match=r"this dock was detached. Call kvdock\.attach"):
        dock.new_cache()
    with pytest.raises(UnsupportedError, match="this dock was detached"), dock:
        pass
    with kvdock.attach(model, [policies.Votes()], budget=48) as again:
        with pytest.raises(UnsupportedError, match="this dock did not make"):
            generate(model, row, past_key_values=cache)
        with pytest.raises(UnsupportedError, match="a dock that was detached"):
            model(**row, past_key_values=cache)
        generate(model, row, past_key_values=again.new_cache())


def test_continuous_batching(refused, row):
    inputs = [row["input_ids"][0].tolist()]
    text = "continuous batching keeps its own paged cache"
    refused(lambda m: m.generate_batch(inputs), text)
    refused(lambda m: m.init_continuous_batching(), text)


def test_custom_masks(refused, row, generate, docked):
    mask = torch.ones(1, 1, 97, 97, dtype=torch.bool).tril()
    ids = row["input_ids"]
    text = "attention_mask has 4 dimensions"
    refused(lambda m: generate(m, {"input_ids": ids, "attention_mask": mask}), text)
    refused(
        lambda m: m(ids, attention_mask=mask, past_key_values=docked.new_cache()),
        "a custom 4-D mask",
        before_forward=False,
    )


def test_probabilities(refused, row, generate, docked):
    text = "output_attentions is not possible .* T×T"
    refused(lambda m: generate(m, row, output_attentions=True), text)
    settings = GenerationConfig(
        output_attentions=True, return_dict_in_generate=True, max_new_tokens=4
    )
    refused(lambda m: m.generate(**row, generation_config=settings), text)
    refused(
        lambda m: m(**row, past_key_values=docked.new_cache(), output_attentions=True),
        "output_attentions=True needs",
        before_forward=False,
    )


def test_probabilities_asked_for_by_the_model_config(policies, row, generate):
    model = tiny_model("llama", attn_implementation="eager")
    with kvdock.attach(model, [policies.Votes()], budget=48) as dock:
        expected = generate(model, row)
        model.config._output_attentions = True
        with pytest.raises(UnsupportedError, match="output_attentions"):
            generate(model, row)
        with pytest.raises(UnsupportedError, match="output_attentions"):
            model(**row, past_key_values=dock.new_cache())
        model.config._output_attentions = False
        assert generate(model, row) == expected


def test_training_mode_after_attach(refused, row, generate, docked):
    def call(run):
        def trained(model):
            model.train()
            try:
                run(model)
            finally:
                model.eval()

        return trained

    refused(call(lambda m: generate(m, row)), r"Call model\.eval\(\) first")
    direct = call(lambda m: m(**row, past_key_values=docked.new_cache()))
    refused(direct, r"call model\.eval\(\) first", before_forward=False)


def test_no_cache_at_all(refused, row, generate):
    refused(lambda m: generate(m, row, use_cache=False), "use_cache=False leaves nothing")
    settings = GenerationConfig(use_cache=False, max_new_tokens=4)
    refused(lambda m: m.generate(**row, generation_config=settings), "use_cache=False")


def test_a_history_that_changed(docked, batch, generate):
    cache = docked.new_cache()
    first = docked.model.generate(**batch, past_key_values=cache, max_new_tokens=4, do_sample=False)
    more = torch.full((3, 5), 7)
    history = torch.cat([first, more], dim=1)
    # says that the pads of the first turn are real
    changed = {"input_ids": history, "attention_mask": torch.ones_like(history)}
    with pytest.raises(UnsupportedError, match="marks .* real tokens .* unchanged"):
        generate(docked.model, changed, past_key_values=cache)
    fresh = docked.new_cache()
    assert generate(docked.model, batch, past_key_values=fresh)[0][:4] == first[0, 97:].tolist()


def test_a_history_that_changed_before_a_single_token(docked, batch):
    cache = docked.new_cache()
    model, mask = docked.model, batch["attention_mask"]
    model(**batch, past_key_values=cache)
    step = {"input_ids": torch.full((3, 1), 7), "position_ids": mask.sum(1, keepdim=True)}
    changed = torch.ones(3, 98, dtype=torch.long)
    with pytest.raises(UnsupportedError, match="marks .* real tokens .* unchanged"):
        model(**step, attention_mask=changed, past_key_values=cache)


def test_taking_tokens_back(docked, row, generate):
    cache = docked.new_cache()
    generate(docked.model, row, past_key_values=cache)
    cache.crop(0)
    with pytest.raises(UnsupportedError, match="cannot do"):
        cache.crop(-2)
    with pytest.raises(UnsupportedError, match="cannot be offloaded"):
        cache.layers[0].offload()


def test_an_attached_model_is_not_copied(policy):
    model = tiny_model("llama")
    with kvdock.attach(model, [policy], budget=48), pytest.raises(UnsupportedError, match="copied"):
        copy.deepcopy(model)
    assert copy.deepcopy(model) is not model
