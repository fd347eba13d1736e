"""`kvdock new`: what it makes, and what it refuses without leaving anything behind."""

import os
import sys

import pytest
from typer.testing import CliRunner

from kvdock.cli_app import app
from kvdock.scaffold import Names, NameTakenError, create, template_files


@pytest.fixture
def folder(tmp_path, monkeypatch):
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    return work


@pytest.mark.parametrize(
    ("name", "id", "title"),
    [
        ("demo-method", "demomethod", "DemoMethod"),
        ("valuenorm", "valuenorm", "Valuenorm"),
        ("SnapKV2", "snapkv2", "SnapKV2"),
        ("my_KV-cache", "mykvcache", "MyKVCache"),
    ],
)
def test_a_name_in_all_its_spellings(name, id, title):
    assert Names.of(name) == Names(id, title)


def test_the_package_is_the_template_under_its_name(site, folder):
    made = create("demo-method", host=site.host())
    assert made.resolve() == folder / "demo-method"
    texts = {p.relative_to(made).as_posix(): p.read_text() for p in made.rglob("*") if p.is_file()}
    places = {place.replace("l2compress", "demomethod") for place in template_files()}
    assert set(texts) == places
    assert {"pyproject.toml", "src/kvdock_demomethod/policy.py", "LICENSE"} <= places
    assert [name for name, text in texts.items() if "l2compress" in text.lower()] == []
    assert 'demomethod = "kvdock_demomethod"' in texts["pyproject.toml"]
    for name, text in texts.items():
        if name.endswith(".py"):
            compile(text, name, "exec")
    assert os.listdir(folder) == ["demo-method"]


def test_the_record_is_found_and_loads(site, folder):
    """The package's folder and an entry point are all that an installer would add."""
    made = create("demo-method", folder / "deep" / "er", host=site.host())
    sys.path.insert(0, str(made / "src"))
    try:
        site.add("kvdock-demomethod", methods={"demomethod": "kvdock_demomethod"})
        record = site.host().load("Demo-Method")
        assert (record.id, record.name) == ("demomethod", "DemoMethod")
        assert record.make_options(recent=3).recent == 3
    finally:
        sys.path.remove(str(made / "src"))
        for name in [name for name in sys.modules if name.startswith("kvdock_demomethod")]:
            del sys.modules[name]


BAD = [
    "",
    "-x",
    "9lives",
    "a b",
    "../x",
    "a/b",
    "snap+kv",
    "a\0",
    "-",
    "x-",
    "a--b",
    "ünit",
    "a" * 41,
]


@pytest.mark.parametrize("name", BAD)
def test_a_malformed_name_is_refused(site, folder, name):
    with pytest.raises(NameTakenError, match=r"found the name .*expected.*Try: kvdock new"):
        create(name, host=site.host())
    assert os.listdir(folder) == []


@pytest.mark.parametrize("name", ["kvdock-mine", "bench", "Be-nch"])
def test_a_name_of_our_own_is_refused(site, folder, name):
    with pytest.raises(NameTakenError, match=r"kvdock"):
        create(name, host=site.host())
    assert os.listdir(folder) == []


def test_an_installed_name_is_refused_in_any_spelling_also_when_hidden(site, folder):
    site.add_method("fakekv", version="2.0")
    for host in (site.host(), site.host(KVDOCK_DISABLE="fakekv")):
        with pytest.raises(NameTakenError, match=r"'fakekv' is installed already, by .*fakekv 2.0"):
            create("Fake-KV", host=host)
    site.add("kvdock-other")
    with pytest.raises(NameTakenError, match="kvdock-other belongs to something else"):
        create("other", host=site.host())
    assert os.listdir(folder) == []


@pytest.mark.parametrize("kind", ["folder", "file", "dangling link"])
def test_what_exists_stays_as_it_is(site, folder, kind):
    place = folder / "mine"
    if kind == "folder":
        place.mkdir()
    elif kind == "file":
        place.write_text("precious")
    else:
        place.symlink_to("nowhere")
    with pytest.raises(NameTakenError, match="'mine' exists already.*--path"):
        create("mine", host=site.host())
    assert os.listdir(folder) == ["mine"]
    assert kind != "file" or place.read_text() == "precious"


def test_a_folder_that_cannot_be_written_is_refused(site, folder):
    (folder / "file").write_text("")
    with pytest.raises(NameTakenError, match="cannot be made: .*--path"):
        create("mine", folder / "file" / "mine", host=site.host())


@pytest.mark.parametrize("place", [None, "deep/er/mine"])
@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("after", [0, 5, 11])
def test_a_failure_half_way_leaves_nothing(site, folder, monkeypatch, place, failure, after):
    real, left = Names.apply, iter(range(after))

    def fails(self, text):
        if next(left, None) is None:
            raise failure
        return real(self, text)

    monkeypatch.setattr(Names, "apply", fails)
    error = NameTakenError if isinstance(failure, OSError) else KeyboardInterrupt
    with pytest.raises(error, match="No space left" if error is NameTakenError else None):
        create("mine", place and folder / place, host=site.host())
    assert os.listdir(folder) == []


def test_a_failure_leaves_what_others_put_into_a_parent(site, folder, monkeypatch):
    def fails(self, text):
        (folder / "deep" / "note").touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Names, "apply", fails)
    with pytest.raises(NameTakenError):
        create("mine", folder / "deep" / "er" / "mine", host=site.host())
    assert os.listdir(folder / "deep") == ["note"]


def test_the_command_says_what_comes_next(folder):
    result = CliRunner().invoke(app, ["new", "demo-method", "--path", "a dir/demo"])
    assert result.exit_code == 0, result.output
    assert "pip install -e './a dir/demo'" in result.output
    assert "kvdock doctor demo-method" in result.output
    assert (folder / "a dir" / "demo" / "pyproject.toml").is_file()
