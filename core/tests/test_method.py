import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvdock import Capabilities, Method, Paper
from kvdock.errors import MethodLoadError, OptionError
from kvdock.method import KINDS, canonical

PAPER = Paper("A title", "ICML 2026", "https://example.org")


def make(**changes):
    fields = {
        "id": "fakekv",
        "name": "FakeKV",
        "kind": "eviction",
        "factory": "fake_fakekv_policy:Policy",
        "options": "fake_fakekv_policy:PolicyOptions",
        "paper": PAPER,
    }
    return Method(**{**fields, **changes})


@pytest.mark.parametrize(
    ("spelling", "id"),
    [
        ("SnapKV", "snapkv"),
        ("Snap-KV", "snapkv"),
        ("StreamingLLM", "streamingllm"),
        ("Streaming LLM", "streamingllm"),
        ("H2O", "h2o"),
        ("L2Compress", "l2compress"),
        ("PyramidKV", "pyramidkv"),
        ("CakeKV", "cakekv"),
        ("ThinK", "think"),
        ("CaM", "cam"),
        ("KIVI", "kivi"),
        ("FlexPrefill", "flexprefill"),
        (" x_Attention ", "xattention"),
    ],
)
def test_the_papers_spellings_lead_to_the_id(spelling, id):
    assert canonical(spelling) == id


@given(st.text())
def test_an_id_stays_as_it_is(name):
    assert canonical(canonical(name)) == canonical(name)


def test_a_record_is_frozen_and_has_safe_defaults():
    method = make()
    with pytest.raises(AttributeError):
        method.id = "other"
    assert method.capabilities == Capabilities()
    assert method.capabilities.phases == {"prefill"}
    assert method.default_budget == 2048
    assert not method.needs.gpu


@pytest.mark.parametrize(
    ("changes", "found", "expected"),
    [
        ({"id": "Fake-KV"}, "'Fake-KV'", "'fakekv'"),
        ({"id": ""}, "''", "lower-case"),
        ({"kind": "magic"}, "'magic'", "eviction"),
        ({"factory": "fake_policy"}, "'fake_policy'", "module:attribute"),
        ({"options": ":Options"}, "':Options'", "module:attribute"),
    ],
)
def test_a_wrong_record_says_what_was_found_and_expected(changes, found, expected):
    with pytest.raises(ValueError) as caught:
        make(**changes)
    assert found in str(caught.value)
    assert expected in str(caught.value)


def test_every_kind_is_accepted():
    assert [make(kind=kind).kind for kind in KINDS] == list(KINDS)


def test_build_imports_the_policy_only_when_asked(site):
    import sys

    site.add_method("fakekv")
    method = site.host().load("fakekv")
    assert "fake_fakekv_policy" not in sys.modules
    policy = method.build(window=8)
    assert policy.options == method.options_type()(window=8)


def test_an_option_error_names_the_method(site):
    site.add_method("fakekv")
    with pytest.raises(OptionError, match="fakekv: option 'window' is 0"):
        site.host().load("fakekv").build(window=0)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"factory": "fake_missing:Policy"}, "ModuleNotFoundError"),
        ({"factory": "fake_fakekv_policy:Missing"}, "AttributeError"),
        ({"options": "fake_fakekv_policy:Policy"}, "not a subclass"),
    ],
)
def test_a_reference_that_leads_nowhere_is_named(site, changes, reason):
    site.add_method("fakekv")
    with pytest.raises(MethodLoadError, match=reason) as caught:
        make(**changes).build()
    assert "'fakekv'" in str(caught.value)
    assert repr(*changes.values()) in str(caught.value)
