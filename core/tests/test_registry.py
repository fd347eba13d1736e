import sys

import pytest

from kvdock import Host, Method, Paper, hookimpl
from kvdock.errors import (
    MethodConflictError,
    MethodLoadError,
    UnknownMethodError,
)
from kvdock.registry import default_host


class InProcess:
    """A plugin object, as one is written in a notebook."""

    def __init__(self, id="notebook"):
        self.id = id
        self.settings = []

    @hookimpl
    def kvdock_methods(self):
        paper = Paper("None", "2026", "https://example.org")
        return [
            Method(id=self.id, name="N", kind="merge", factory="a:b", options="a:c", paper=paper)
        ]

    @hookimpl
    def kvdock_configure(self, settings):
        self.settings.append(settings)


def test_available_lists_ids_and_imports_nothing(site):
    site.add_method("fakekv")
    site.add_broken("brokenkv")
    assert site.host().available() == ["brokenkv", "fakekv"]
    assert not [name for name in sys.modules if name.startswith("fake_")]


def test_loading_one_method_imports_only_its_plugin(site):
    site.add_method("fakekv")
    site.add_method("otherkv")
    host = site.host()
    method = host.load("fakekv")
    assert (method.id, method.kind) == ("fakekv", "eviction")
    assert "fake_otherkv" not in sys.modules
    assert host.load("fakekv") is method


@pytest.mark.parametrize("spelling", ["fakekv", "FakeKV", "Fake-KV", "fake_kv", " FAKE KV "])
def test_a_method_answers_to_its_spellings(site, spelling):
    site.add_method("fakekv", name="FakeKV")
    host = site.host()
    assert host.resolve(spelling) == "fakekv"
    assert host.load(spelling).name == "FakeKV"


def test_an_entry_point_may_be_written_with_separators(site):
    site.add_method("fakekv")
    site.add("kvdock-dashed", methods={"fake-kv2": "fake_fakekv"})
    assert site.host().available() == ["fakekv", "fakekv2"]


def test_sources_name_the_distribution_and_version(site):
    site.add_method("fakekv", version="3.1")
    assert site.host().sources("fakekv") == ["kvdock-fakekv 3.1"]


def test_an_unknown_method_gets_suggestion_list_and_pip_line(site):
    site.add_method("fakekv")
    site.add_method("otherkv")
    with pytest.raises(UnknownMethodError) as caught:
        site.host().load("FakKV")
    message = str(caught.value)
    assert "'FakKV'" in message
    assert "Did you mean 'fakekv'?" in message
    assert "Installed: fakekv, otherkv." in message
    assert "pip install kvdock-fakkv" in message


def test_an_unknown_method_where_none_is_installed(site):
    with pytest.raises(UnknownMethodError, match=r"Installed: none\..*pip install kvdock-adakv"):
        site.host().load("AdaKV")


@pytest.mark.parametrize(
    "source",
    ["raise ImportError('no kernel library')", "import sys; sys.exit(3)", "1 / 0", "def broken(:"],
)
def test_a_plugin_that_fails_on_import_is_reported_and_harms_nobody(site, source):
    site.add_method("fakekv")
    site.add_broken("brokenkv", source)
    methods, failed = site.host().load_all()
    assert [method.id for method in methods] == ["fakekv"]
    assert list(failed) == ["brokenkv"]
    assert "kvdock-brokenkv 1.0" in failed["brokenkv"]


def test_a_broken_plugin_asked_for_by_name_raises_with_the_cause_and_the_way_out(site):
    site.add_broken("brokenkv")
    with pytest.raises(MethodLoadError) as caught:
        site.host().load("brokenkv")
    assert isinstance(caught.value.__cause__, ImportError)
    assert "no kernel library" in str(caught.value)
    assert "pip install --upgrade kvdock-brokenkv" in str(caught.value)
    assert "KVDOCK_DISABLE=brokenkv" in str(caught.value)


def test_a_repaired_plugin_loads_on_the_next_try(site):
    site.add_broken("brokenkv")
    host = site.host()
    with pytest.raises(MethodLoadError):
        host.load("brokenkv")
    (site.root / "fake_brokenkv.py").unlink()
    site.add("repair", modules={"fake_brokenkv": GOOD})
    assert host.load("brokenkv").id == "brokenkv"


GOOD = """
    from kvdock import Method, Paper, hookimpl

    @hookimpl
    def kvdock_methods():
        paper = Paper("None", "2026", "https://example.org")
        return [
            Method(id=id, name=id, kind="merge", factory="a:b", options="a:c", paper=paper)
            for id in ("brokenkv", "secondkv")
        ]
"""


def test_one_plugin_may_bring_several_methods(site):
    site.add(
        "kvdock-pair",
        modules={"fake_pair": GOOD},
        methods={"brokenkv": "fake_pair", "secondkv": "fake_pair"},
    )
    host = site.host()
    assert [method.id for method in host.load_all().methods] == ["brokenkv", "secondkv"]


def test_a_plugin_that_does_not_bring_what_its_entry_point_promises(site):
    site.add("kvdock-liar", modules={"fake_liar": GOOD}, methods={"liar": "fake_liar"})
    with pytest.raises(MethodLoadError, match=r"promises 'liar'.*brings brokenkv, secondkv"):
        site.host().load("liar")


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("from kvdock import hookimpl\n@hookimpl\ndef kvdock_method(): return []", "kvdock_method"),
        ("from kvdock import hookimpl\n@hookimpl\ndef kvdock_methods(x): return []", "x"),
        ("from kvdock import hookimpl\n@hookimpl\ndef kvdock_methods(): return ['a']", "'a'"),
        ("from kvdock import hookimpl\n@hookimpl\ndef kvdock_methods(): return 3", "not iterable"),
        (
            "from kvdock import hookimpl\n@hookimpl\ndef kvdock_methods(): raise KeyError('k')",
            "'k'",
        ),
        ("", "brings none"),
    ],
)
def test_a_wrong_hook_is_reported_and_leaves_no_trace(site, source, reason):
    site.add_method("fakekv")
    site.add_broken("brokenkv", source)
    host = site.host()
    for _ in range(2):
        with pytest.raises(MethodLoadError) as caught:
            host.load("brokenkv")
        assert reason in str(caught.value)
    assert host.load("fakekv").id == "fakekv"
    assert sys.modules.get("fake_brokenkv") not in host.manager.get_plugins()


def test_two_distributions_that_claim_one_id_are_both_named(site):
    site.add_method("fakekv", version="1.0")
    site.add_method("otherkv")
    site.add_method("fakekv", dist="rival", version="2.5")
    host = site.host()
    with pytest.raises(MethodConflictError) as caught:
        host.load("fakekv")
    assert "kvdock-fakekv 1.0" in str(caught.value)
    assert "rival 2.5" in str(caught.value)
    methods, failed = host.load_all()
    assert [method.id for method in methods] == ["otherkv"]
    assert list(failed) == ["fakekv"]


def test_a_plugin_for_another_specification_names_both_versions(site):
    site.add_broken("brokenkv", "SPEC_VERSION = 99")
    with pytest.raises(MethodLoadError, match="specification 99, this kvdock has 1"):
        site.host().load("brokenkv")


def test_a_disabled_method_is_hidden_and_says_so_when_asked_for(site):
    site.add_method("fakekv")
    site.add_method("otherkv")
    site.add_broken("brokenkv")
    host = site.host(KVDOCK_DISABLE="Broken-KV, fakekv,")
    assert host.available() == ["otherkv"]
    assert host.load_all().failed == {}
    with pytest.raises(UnknownMethodError, match="hidden: KVDOCK_DISABLE"):
        host.load("FakeKV")


def test_strict_turns_a_failure_into_an_error(site):
    site.add_broken("brokenkv")
    with pytest.raises(MethodLoadError):
        site.host(KVDOCK_STRICT="1").load_all()
    assert "brokenkv" in site.host(KVDOCK_STRICT="0").load_all().failed


def test_strict_refuses_a_collision_already_in_the_list(site):
    site.add_method("fakekv")
    site.add_method("fakekv", dist="rival")
    assert site.host().available() == ["fakekv"]
    with pytest.raises(MethodConflictError):
        site.host(KVDOCK_STRICT="1").available()


def test_a_plugin_of_this_process_comes_and_goes():
    host, plugin = Host(discover=False, environ={}), InProcess()
    assert host.register(plugin)[0].id == "notebook"
    assert host.available() == ["notebook"]
    assert host.load("Notebook").kind == "merge"
    assert host.sources("notebook") == []
    host.unregister(plugin)
    assert host.available() == []
    assert Host(discover=False, environ={}).available() == []


def test_the_same_id_twice_in_one_process_is_refused():
    host = Host(discover=False, environ={})
    host.register(InProcess())
    second = InProcess()
    with pytest.raises(MethodConflictError):
        host.register(second)
    assert not host.manager.is_registered(second)


def test_settings_reach_plugins_that_come_later():
    host, early, late = Host(discover=False, environ={}), InProcess(), InProcess("late")
    host.register(early)
    host.configure({"seed": 1})
    host.register(late)
    assert early.settings == late.settings == [{"seed": 1}]


def test_the_core_builds_a_policy_after_the_plugins_had_their_say(site):
    class Wrapper:
        @hookimpl(wrapper=True)
        def kvdock_build_policy(self, method, options):
            return (method.id, (yield))

    site.add_method("fakekv")
    host = site.host()
    method = host.load("fakekv")
    options = method.make_options(window=3)
    assert host.build_policy(method, options).options is options
    host.manager.register(Wrapper())
    id, policy = host.build_policy(method, options)
    assert (id, policy.options) == ("fakekv", options)


def test_the_first_plugin_with_an_opinion_selects_the_kernel():
    class Chooser:
        @hookimpl
        def kvdock_select_kernel(self, op, device):
            return "mine" if (op, device) == ("prefill", "cpu") else None

    host = Host(discover=False, environ={})
    assert host.select_kernel("prefill", "cpu", "float32") is None
    host.manager.register(Chooser())
    assert host.select_kernel("prefill", "cpu", "float32") == "mine"
    assert host.select_kernel("decode", "cpu", "float32") is None


def test_tracing_is_off_unless_asked_for(caplog):
    caplog.set_level("INFO", logger="kvdock")
    Host(discover=False, environ={}).select_kernel("prefill", "cpu", "float32")
    assert not caplog.records
    Host(discover=False, environ={"KVDOCK_TRACE": "1"}).select_kernel("prefill", "cpu", "float32")
    assert any("kvdock_select_kernel" in record.message for record in caplog.records)


def test_the_default_host_is_made_once():
    assert default_host() is default_host()
