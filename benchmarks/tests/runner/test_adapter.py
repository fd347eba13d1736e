"""An adapter's answers are those of PEFT's own merged model."""

import json
import os
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from kvdock_bench import models
from kvdock_bench.errors import BenchError
from kvdock_bench.session import bench

peft = pytest.importorskip("peft")

# PEFT 0.21 asks for what transformers 5.23 has renamed
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


@pytest.fixture(scope="module")
def adapter_folder(model_folder, tmp_path_factory):
    torch.manual_seed(3)
    shape = peft.LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"])
    tuned = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(model_folder), shape)
    with torch.no_grad():
        for name, weight in tuned.named_parameters():
            if "lora_B" in name:  # zero in a new adapter, which would change nothing
                weight.normal_(std=0.3)
    folder = tmp_path_factory.mktemp("adapter") / "lora"
    tuned.save_pretrained(folder)
    return folder


def predictions(folder):
    return {
        (record["task"], record["length"], record["index"]): record["prediction"]
        for path in (folder / "pred").glob("*/*.jsonl")
        for record in map(json.loads, path.read_text().splitlines())
    }


def test_answers_are_those_of_the_merged_model(arguments, adapter_folder, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(arguments.model_path)
    merged = peft.PeftModel.from_pretrained(base, str(adapter_folder)).merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    AutoTokenizer.from_pretrained(arguments.model_path).save_pretrained(tmp_path / "merged")
    bench(replace(arguments, save_tag="base"))
    bench(replace(arguments, save_tag="tuned", adapter_path=str(adapter_folder)))
    bench(replace(arguments, save_tag="merged", model_path=str(tmp_path / "merged")))
    runs = (predictions(arguments.output_dir / tag) for tag in ("base", "tuned", "merged"))
    base_says, tuned_says, merged_says = runs
    assert len(tuned_says) == 12
    assert tuned_says == merged_says
    assert all(tuned_says[place] != text for place, text in base_says.items())
    with pytest.raises(BenchError, match="model was"):
        bench(replace(arguments, save_tag="base", adapter_path=str(adapter_folder), resume=True))


def test_the_fingerprint_follows_the_weights(model_folder, adapter_folder, tmp_path):
    def mark(adapter):
        where = None if adapter is None else str(adapter)
        loaded = models.load(str(model_folder), dtype="float32", device="cpu", adapter_path=where)
        return loaded.fingerprint

    other = tmp_path / "other"
    other.mkdir()
    for path in adapter_folder.iterdir():
        content = bytearray(path.read_bytes())
        if path.suffix == ".safetensors":
            content[-1] ^= 1
        (other / path.name).write_bytes(content)
    assert len({mark(None), mark(adapter_folder), mark(other)}) == 3


def test_a_bad_adapter_is_told(arguments, adapter_folder, tmp_path):
    def refuse(folder, message):
        with pytest.raises(BenchError, match=message):
            bench(replace(arguments, adapter_path=str(folder)))

    refuse(tmp_path / "nowhere", r"--adapter_path .*nowhere: no folder with adapter_config\.json")
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    config = json.loads((adapter_folder / "adapter_config.json").read_text())
    (pickled / "adapter_config.json").write_text(json.dumps(config))
    refuse(pickled, r"no adapter_model\.safetensors.*can run code")
    os.link(adapter_folder / "adapter_model.safetensors", pickled / "adapter_model.safetensors")
    config["r"] = 5
    (pickled / "adapter_config.json").write_text(json.dumps(config))
    refuse(pickled, "does not fit the model")
    (pickled / "adapter_config.json").write_text("{broken")
    refuse(pickled, "--adapter_path .*pickled")
