"""What `attach` refuses, with a message that says what to do, leaving the model as it was."""

import importlib
import importlib.util

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.modeling_utils import AttentionInterface

import kvdock
from kvdock.errors import (
    BudgetError,
    CompositionError,
    OptionError,
    UnknownMethodError,
    UnsupportedError,
)
from kvdock.testing_models import tiny_model


class Isolated(PreTrainedModel):
    """A decoder that computes attention on its own."""

    config_class = PretrainedConfig

    def __init__(self, config):
        super().__init__(config)
        self.layer = torch.nn.Linear(4, 4)


def small(kind, **settings):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings)).eval()


def traces(model):
    """Return what an attachment that was given up half-way could leave behind."""
    modules = [sorted(vars(module)) for module in model.modules()]
    rng = torch.get_rng_state().tolist()
    return modules, sorted(AttentionInterface()), model.config.to_json_string(), rng


def refused(model, methods, error, text, **settings):
    """Check the refusal and that nothing stayed behind."""
    before = traces(model) if isinstance(model, PreTrainedModel) else None
    with pytest.raises(error, match=text):
        kvdock.attach(model, methods, **settings)
    if before is not None:
        assert traces(model) == before
        assert model.config._attn_implementation != "kvdock"


@pytest.mark.parametrize("budget", [0, -5, "0", "-5", "12parsecs", "0%", "140%", "", True, 1.5])
def test_a_budget_that_cannot_be_read(model, policies, budget):
    refused(model, [policies.Votes()], BudgetError, "Accepted: 2048 or", budget=budget)


@pytest.mark.parametrize("budget", [3, 4])
def test_a_budget_the_policy_cannot_meet(model, policies, budget):
    refused(model, [policies.Votes()], BudgetError, "beside window=4", budget=budget)


@pytest.mark.parametrize("methods", ["", "  ", "snapkv+", [], [""]])
def test_no_method(model, methods):
    refused(model, methods, CompositionError, "expected an id such as")


def test_something_that_is_no_method(model):
    refused(model, [42], CompositionError, "42 is neither a method id nor a configured policy")


def test_a_method_that_is_not_installed_names_its_package(model):
    refused(model, "Warp-KV", UnknownMethodError, "pip install kvdock-warpkv")


def test_an_unknown_option_suggests_the_near_one(model, site, monkeypatch):
    site.add_method("fake")
    monkeypatch.setattr(importlib.import_module("kvdock.attach"), "default_host", site.host)
    text = "unknown option 'windw'. Did you mean 'window'.*pooling, window"
    refused(model, "fake", OptionError, text, windw=3)
    refused(model, "fake", OptionError, "unknown option 'other.window'", **{"other.window": 3})
    refused(model, "fake", OptionError, "fake: .*window.*0", window=0)


def test_options_for_policies_that_are_ready(model, policies):
    refused(model, [policies.Votes()], OptionError, "take no options", window=3)


def test_two_policies_that_choose_what_is_kept(model, policies):
    both = [policies.Votes(), policies.Ring()]
    refused(model, both, CompositionError, "Votes and Ring cannot be combined: both choose")


def test_two_policies_that_compute_the_prefill(model, policies):
    both = [policies.Counting(), policies.Counting()]
    refused(model, both, CompositionError, "both compute the prefill's attention")


def test_the_default_budget_is_checked_too(model, policies):
    class Wide(policies.Votes):
        query_window = 4096

    refused(model, [Wide()], BudgetError, "beside window=4096")


def test_a_graph_without_a_gpu(model, policies):
    refused(model, [policies.Votes()], UnsupportedError, "graphs need a CUDA device", graph=True)
    refused(model, [policies.Votes()], UnsupportedError, "expected 'auto'", graph="maybe")


def test_an_unknown_backend(model, policies):
    text = "unknown attention backend 'turbo'; choose one of sdpa"
    refused(model, [policies.Votes()], UnsupportedError, text, backend="turbo")


@pytest.mark.skipif(importlib.util.find_spec("flash_attn") is not None, reason="it is installed")
@pytest.mark.parametrize("backend", ["flash-attn-2", "flash-attn-4"])
def test_a_backend_that_is_not_installed(model, policies, backend):
    text = f"'{backend}' is not usable here: No module named 'flash_attn'.*backend='auto'"
    refused(model, [policies.Votes()], UnsupportedError, text, backend=backend)


def test_a_dtype_the_method_does_not_support(site, monkeypatch):
    site.add_method("fake")
    monkeypatch.setattr(importlib.import_module("kvdock.attach"), "default_host", site.host)
    text = "fake supports float32, float16, bfloat16; the model is float64"
    refused(tiny_model("llama").double(), "fake", UnsupportedError, text)


def test_training_mode(model, policies):
    refused(model.train(), [policies.Votes()], UnsupportedError, r"Call model\.eval\(\) first")


def test_an_encoder_decoder(policies):
    config = T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    model = T5ForConditionalGeneration(config).eval()
    refused(model, [policies.Votes()], UnsupportedError, "is an encoder-decoder")


@pytest.mark.parametrize("found", [torch.nn.Linear(2, 2), "llama", None])
def test_something_that_is_no_transformers_model(policies, found):
    text = "expected a transformers PreTrainedModel, found"
    refused(found, [policies.Votes()], UnsupportedError, text)


def test_a_model_without_the_attention_interface(policies):
    settings = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 8}
    model = Isolated(PretrainedConfig(**settings)).eval()
    refused(model, [policies.Votes()], UnsupportedError, "attention interface.*llama")


@pytest.mark.parametrize("kind", ["bloom", "mamba"])
def test_an_architecture_that_computes_attention_itself(policies, kind):
    settings = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 1, "n_layer": 1}
    extra = {"state_size": 4} if kind == "mamba" else {"n_head": 2}
    text = "attention interface.*llama|no full-attention layer"
    refused(small(kind, **settings, **extra), [policies.Votes()], UnsupportedError, text)


def test_chunked_attention(policies):
    settings = {
        "vocab_size": 32,
        "hidden_size": 16,
        "intermediate_size": 16,
        "intermediate_size_mlp": 16,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "num_local_experts": 2,
        "pad_token_id": 0,
    }
    model = small("llama4_text", **settings)
    refused(model, [policies.Votes()], UnsupportedError, "chunked_attention need masks")


def test_a_model_of_sliding_layers_only(policies):
    model = tiny_model("mistral", sliding_window=16)
    refused(model, [policies.Votes()], UnsupportedError, "no full-attention layer")


def test_a_model_that_is_attached_already(model, policies, row, generate):
    with kvdock.attach(model, [policies.Votes()], budget=48):
        expected = generate(model, row)
        with pytest.raises(UnsupportedError, match="attached already. Detach its dock first"):
            kvdock.attach(model, [policies.Ring()])
        assert generate(model, row) == expected


def test_a_policy_that_refuses_the_model(model, policies):
    class Fussy(policies.Votes):
        def bind(self, facts):
            raise UnsupportedError(f"Fussy needs one layer, found {facts.layers}.")

    refused(model, [Fussy()], UnsupportedError, "found 3")
