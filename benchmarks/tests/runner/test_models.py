import shutil

import pytest
import torch

from kvdock_bench import models
from kvdock_bench.errors import BenchError


@pytest.fixture
def copied(model_folder, tmp_path):
    return shutil.copytree(model_folder, tmp_path / "copy")


def test_the_fingerprint_follows_content_not_place(model_folder, copied):
    def mark(folder, dtype="float32"):
        return models.load(str(folder), dtype=dtype, device="cpu").fingerprint

    first = mark(model_folder)
    assert mark(copied) == first
    assert mark(copied, "bfloat16") != first
    weights = copied / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert mark(copied) != first


def test_a_pad_token_is_set(model_folder):
    loaded = models.load(str(model_folder), dtype="float32", device="cpu")
    assert loaded.tokenizer.pad_token_id is not None
    assert loaded.model.dtype == torch.float32
    assert not loaded.model.training
    assert models.peek_shape(str(model_folder)) == loaded.shape


@pytest.mark.parametrize(
    ("removed", "message"),
    [("config.json", "no config.json"), ("model.safetensors", r"no \.safetensors")],
)
def test_an_incomplete_folder_is_told(copied, removed, message):
    (copied / removed).unlink()
    with pytest.raises(BenchError, match=message):
        models.load(str(copied), dtype="float32", device="cpu")


def test_a_pickle_is_refused(copied):
    (copied / "model.safetensors").rename(copied / "pytorch_model.bin")
    with pytest.raises(BenchError, match="can run code"):
        models.load(str(copied), dtype="float32", device="cpu")


def test_a_broken_model_is_told(copied):
    (copied / "config.json").write_text('{"model_type": "nosuch"}')
    with pytest.raises(BenchError, match="cannot be loaded"):
        models.load(str(copied), dtype="float32", device="cpu")


def test_the_embedded_model_needs_no_fetch_to_be_planned(monkeypatch):
    monkeypatch.setattr(models, "prepare", None)
    assert models.peek_shape("SmolLM2-135M").slot_bytes(4) == 30 * 3 * 128 * 4


def test_dtypes():
    assert models.parse_dtype("torch.bfloat16", "cpu") == "bfloat16"
    assert models.parse_dtype(None, "cpu") == "float32"
    assert models.parse_dtype(None, "cuda:0") == "bfloat16"
