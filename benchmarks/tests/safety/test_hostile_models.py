"""Model folders of strangers: safetensors only, one documented error for what is broken."""

import json
import pickle
import shutil

import pytest

from kvdock.errors import UnsupportedError
from kvdock.footprint import read_model
from kvdock_bench import models
from kvdock_bench.adapter import _identity
from kvdock_bench.errors import BenchError


@pytest.fixture
def spoiled(tiny, tmp_path):
    """A copy that may be spoiled."""
    return shutil.copytree(tiny, tmp_path / "copy")


def load(place):
    return models.load(str(place), dtype="float32", device="cpu")


class Bomb:
    """Leaves a file when it is unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return open, (str(self.mark), "w")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.ckpt", "weights.pth"])
def test_pickled_weights_are_refused_with_the_remedy_and_never_opened(spoiled, tmp_path, name):
    mark = tmp_path / "hacked"
    (spoiled / "model.safetensors").unlink()
    (spoiled / name).write_bytes(pickle.dumps(Bomb(mark)))
    with pytest.raises(BenchError, match=r"no \.safetensors file.*save_pretrained\(\) first"):
        load(spoiled)
    # a safetensors file that holds nothing does not open the way to the other one
    (spoiled / "model.safetensors").write_bytes(b"")
    with pytest.raises(BenchError, match="cannot be loaded"):
        load(spoiled)
    assert not mark.exists()


def test_a_pickle_beside_the_weights_is_left_alone(spoiled, tmp_path):
    mark = tmp_path / "hacked"
    (spoiled / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(mark)))
    load(spoiled)
    assert not mark.exists()


GARBAGE = {
    "empty": b"",
    "nul": b"\0" * 64,
    "text": b"not json",
    "not utf-8": b"\xff\xfe\x00",
    "list": b"[1, 2]",
    "number": b"3",
    "deep": b"[" * 100_000,
    "deep object": b'{"a":' * 50_000,
    "digits": b'{"hidden_size": ' + b"9" * 5000 + b"}",
    "kinds": b'{"model_type": "llama", "hidden_size": "x", "num_attention_heads": []}',
    "huge": b'{"model_type": "llama", "hidden_size": 4611686018427387904}',
    "negative": b'{"model_type": "llama", "num_hidden_layers": -3, "vocab_size": -1}',
    "type": b'{"model_type": ["llama"]}',
    "nan": b'{"model_type": "llama", "rms_norm_eps": NaN, "hidden_size": 1e400}',
}


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "generation_config.json"])
@pytest.mark.parametrize("raw", GARBAGE.values(), ids=GARBAGE)
def test_spoiled_files_end_in_one_error(spoiled, name, raw):
    (spoiled / name).write_bytes(raw)
    for use in (load, models.peek_shape, models.peek_context):
        try:
            use(str(spoiled))
        except BenchError as error:
            told = str(error)
            assert len(told) < 2000 and str(spoiled) in told


@pytest.mark.parametrize("raw", GARBAGE.values(), ids=GARBAGE)
def test_spoiled_weights_end_in_one_error(spoiled, raw):
    (spoiled / "model.safetensors").write_bytes(raw)
    with pytest.raises(BenchError, match="cannot be loaded"):
        load(spoiled)


@pytest.mark.parametrize("raw", GARBAGE.values(), ids=GARBAGE)
def test_the_estimate_takes_no_spoiled_config(spoiled, raw):
    (spoiled / "config.json").write_bytes(raw)
    with pytest.raises(UnsupportedError):
        read_model(spoiled)


@pytest.mark.parametrize(
    "path", ["x" * 300 + "/y", "~nobody-of-this-name/x", "a\0b", "", "../..", "a/b/c", "a b", "-x"]
)
@pytest.mark.parametrize("use", [load, models.peek_shape, models.locate])
def test_places_that_are_no_model_are_told(path, use, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BenchError):
        use(path)


def test_links_in_a_model_folder_are_followed_as_caches_need(spoiled, tmp_path):
    blob = tmp_path / "blob"
    (spoiled / "model.safetensors").rename(blob)
    (spoiled / "model.safetensors").symlink_to(blob)
    load(spoiled)
    blob.unlink()
    with pytest.raises(BenchError, match="cannot be loaded"):
        load(spoiled)


@pytest.mark.parametrize("raw", [b"[1]", b"[" * 100_000, b"\xff", b"{"], ids=range(4))
def test_a_spoiled_adapter_config_is_told(tmp_path, raw):
    (tmp_path / "adapter_config.json").write_bytes(raw)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(BenchError, match=r"adapter_config\.json"):
        _identity(tmp_path)


def test_what_a_config_names_is_no_place_elsewhere(spoiled, tmp_path):
    """A config may name a base model; only the folder given is read."""
    config = json.loads((spoiled / "config.json").read_text())
    config["_name_or_path"] = str(tmp_path / "elsewhere")
    (spoiled / "config.json").write_text(json.dumps(config))
    assert load(spoiled).name == "copy"
