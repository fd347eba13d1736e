import pytest

from kvdock.errors import MethodLoadError

HELLO = """
    from kvdock import hookimpl

    @hookimpl
    def kvdock_commands(app):
        @app.command()
        def hello():
            "Greet."
            print("hello from outside")
"""


class App:
    """Stands for typer's application: collects the names of the commands."""

    def __init__(self):
        self.names = []

    def command(self):
        return lambda function: self.names.append(function.__name__)


def test_a_package_adds_its_commands(site):
    site.add("kvdock-extra", modules={"fake_extra": HELLO}, commands={"extra": "fake_extra"})
    app = App()
    assert site.host().add_commands(app) == {}
    assert app.names == ["hello"]


def test_a_broken_package_is_reported_and_the_others_still_add_theirs(site):
    site.add("kvdock-extra", modules={"fake_extra": HELLO}, commands={"extra": "fake_extra"})
    raises = HELLO.replace("@app.command()", "raise KeyError('boom')")
    site.add("kvdock-bad", modules={"fake_bad": "import not_there"}, commands={"bad": "fake_bad"})
    site.add("kvdock-sad", modules={"fake_sad": raises}, commands={"sad": "fake_sad"})
    app = App()
    failed = site.host().add_commands(app)
    assert app.names == ["hello"]
    assert sorted(failed) == ["bad", "sad"]
    assert "not_there" in failed["bad"]
    assert "kvdock-sad 1.0" in failed["sad"]
    assert "boom" in failed["sad"]


def test_strict_raises(site):
    site.add("kvdock-bad", modules={"fake_bad": "1 / 0"}, commands={"bad": "fake_bad"})
    with pytest.raises(MethodLoadError, match="kvdock-bad"):
        site.host(KVDOCK_STRICT="1").add_commands(App())


def test_a_disabled_package_is_not_imported(site):
    site.add("kvdock-bad", modules={"fake_bad": "1 / 0"}, commands={"bad": "fake_bad"})
    assert site.host(KVDOCK_DISABLE="bad").add_commands(App()) == {}
