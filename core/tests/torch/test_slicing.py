"""Token-wise layers in slices: the same result, and instances given back as they were."""

from types import SimpleNamespace

import pytest
import torch

import kvdock
from kvdock.long_forms import LongForms
from kvdock.slicing import token_wise
from kvdock.testing_models import left_padded, tiny_model


@pytest.fixture(autouse=True)
def _small_slices(monkeypatch):
    monkeypatch.setattr("kvdock.slicing.SLICE", 16)


def logits(model, batch, dock):
    with torch.no_grad():
        return model(**batch, past_key_values=dock.new_cache()).logits


@pytest.mark.parametrize("family", ["llama", "glm4"])
def test_sliced_logits_are_close(family, policies, batch):
    model = tiny_model(family)
    results = []
    for above in (None, 20, 96, 97):
        with kvdock.attach(model, [policies.Votes()], budget=48, slice_above=above) as dock:
            results.append(logits(model, batch, dock))
    assert torch.equal(results[3], results[0]), "97 tokens are not longer than 97"
    for found in results[1:3]:
        torch.testing.assert_close(found, results[0], atol=1e-4, rtol=1e-4)


def test_no_call_gets_more_than_a_slice(model, policies, row, generate):
    lengths = []
    modules = list(token_wise(model))
    assert len(modules) == 3 * 3 + 1, "an MLP and two norms a layer, and the last norm"
    with kvdock.attach(model, [policies.Votes()], budget=48):
        expected = generate(model, row, 4)
    act = model.model.layers[0].mlp.act_fn
    hook = act.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    with kvdock.attach(model, [policies.Votes()], budget=48, slice_above=20):
        assert generate(model, row, 4) == expected
    hook.remove()
    assert lengths == [16, 16, 16, 16, 16, 16, 1, 1, 1, 1]


@pytest.mark.parametrize("wrong", ["", "rms_norm", "gated"])
@pytest.mark.parametrize("family", ["llama", "glm4"])
def test_fused_forms_take_the_place_of_slices(family, wrong, policies, batch, monkeypatch):
    """Plain torch stands in for the kernels; a form that is wrong is not taken."""
    calls = []

    def rms_norm(states, weight, eps):
        calls.append(("rms_norm", states.shape[1]))
        scale = (states.pow(2).mean(-1, keepdim=True) + eps).rsqrt()
        return weight * states * scale * (1.1 if wrong == "rms_norm" else 1)

    def gated(gate, up):
        calls.append(("gated", gate.shape[1]))
        return torch.nn.functional.silu(gate) * up * (1.1 if wrong == "gated" else 1)

    model = tiny_model(family)
    with kvdock.attach(model, [policies.Votes()], budget=48, slice_above=None) as dock:
        expected = logits(model, batch, dock)
    kernels = SimpleNamespace(rms_norm=rms_norm, gated=gated)
    monkeypatch.setattr("kvdock.slicing.long_forms", lambda: LongForms(kernels, "cpu"))
    with kvdock.attach(model, [policies.Votes()], budget=48, slice_above=20) as dock:
        found = logits(model, batch, dock)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert {name for name, size in calls if size > 1} == {"rms_norm", "gated"} - {wrong}
    assert {size for name, size in calls if name == "gated"} <= {1, 16}
    assert {size for name, size in calls if name == "rms_norm"} <= {1, 97}


def test_with_gradients_no_fused_form_is_taken(model):
    def silent(*args):
        pytest.fail("a kernel has no gradient")

    forms = LongForms(SimpleNamespace(rms_norm=silent, gated=silent), "cpu")
    with torch.enable_grad():
        for module in token_wise(model):
            states = torch.randn(1, 30, model.config.hidden_size)
            assert forms.norm(module, states) is None
            assert forms.mlp(module, states) is None


def test_instances_are_restored(model, policies):
    before = [dict(vars(module)) for module in model.modules()]
    dock = kvdock.attach(model, [policies.Votes()], slice_above=20)
    assert all("forward" in vars(module) for module in token_wise(model))
    dock.detach()
    for module, attributes in zip(model.modules(), before, strict=True):
        assert vars(module).keys() == attributes.keys()
    with kvdock.attach(model, [policies.Votes()], slice_above=None):
        assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.filterwarnings("ignore:You are calling .generate.. with the `input_ids`:UserWarning")
@pytest.mark.parametrize("how", ["cpu_offload", "disk_offload"])
def test_under_hooks_of_accelerate(policies, batch, generate, tmp_path, how):
    """Layers spread over devices: hooks move weights in and out around each forward."""
    accelerate = pytest.importorskip("accelerate")
    plain, model = tiny_model("llama"), tiny_model("llama")
    settings = {"budget": 48, "slice_above": 20}
    with kvdock.attach(plain, [policies.Votes()], **settings):
        expected = generate(plain, batch, 6)
    if how == "cpu_offload":
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    else:
        accelerate.disk_offload(model, str(tmp_path), execution_device=torch.device("cpu"))
    before = [vars(module).get("forward") for module in model.modules()]
    assert any(before), "the hooks stand on the instances"
    with kvdock.attach(model, [policies.Votes()], **settings) as dock:
        assert generate(model, batch, 6) == expected
        dock.report()
    assert [vars(module).get("forward") for module in model.modules()] == before
    generate(model, batch, 2)


def test_a_device_map(policies, batch, generate, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    plain, model = tiny_model("llama"), tiny_model("llama")
    with kvdock.attach(plain, [policies.Ring()], budget=48):
        expected = generate(plain, batch, 6)
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu"}
    layers = {f"model.layers.{i}": "cpu" if i == 0 else "disk" for i in range(3)}
    model = accelerate.dispatch_model(
        model, {**places, **layers, "lm_head": "cpu"}, main_device="cpu", offload_dir=str(tmp_path)
    )
    with kvdock.attach(model, [policies.Ring()], budget=48) as dock:
        assert generate(model, batch, 6) == expected
        dock.report()


def test_half_the_rows_are_padded(model, policies, generate):
    batch = left_padded((97, 33))[0]
    with kvdock.attach(model, [policies.Ring()], budget=48):
        expected = generate(model, batch, 4)
    with kvdock.attach(model, [policies.Ring()], budget=48, slice_above=20):
        assert generate(model, batch, 4) == expected
