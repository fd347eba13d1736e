"""A small run folder and a small model, for others to spoil."""

import json

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from kvdock_bench.record import MemoryUse, Record, Timings

METHODS = {"full": ("Full cache", []), "snapkv-1": ("SnapKV", ["snapkv"])}


def record(method_id="full", task="vt", length=512, index=0, **changes):
    given = {
        "key": f"{method_id}-{task}-{length}-{index}",
        "method_id": method_id,
        "method": METHODS.get(method_id, (method_id,))[0],
        "task": task,
        "length": length,
        "index": index,
        "seed": 1,
        "prompt_sha": f"{task}-{length}-{index}",
        "n_prompt_tokens": 500,
        "units": 3,
        "references": ["4711"],
        "data_source": "as RULER: generated",
        "device": "a device",
        "batch_size": 1,
        "prediction": "an answer",
        "score": 1.0,
        "n_new_tokens": 4,
        "finish_reason": "stop",
        "timings": Timings(0.1, 0.1, 0.1, 0.02, 0.4),
        "memory": MemoryUse(None, 512, 1024, 0.5),
        "protocol": {"template": "chat:1"},
        "protocol_id": "id",
        "meta": {"depths": [0.5]},
    }
    return Record(**given | changes)


def info(**changes):
    """What run.json holds."""
    content = {
        "schema_version": 1,
        "status": "finished",
        "command": "kvdock bench",
        "started": "2026-01-01T00:00:00Z",
        "ended": "2026-01-01T01:00:00Z",
        "sessions": [{"started": "2026-01-01T00:00:00Z", "command": "kvdock bench"}],
        "config": {
            "benchmark_name": "RULER",
            "task_names": ["vt", "cwe"],
            "length": [512, 1024],
            "num_samples": 2,
            "seed": 1,
            "answer_prefix": "after_header",
        },
        "counts": {},
        "methods": [
            {
                "label": label,
                "method_id": name,
                "methods": ids,
                "budget": "64" if ids else None,
                "options": {method: {"window": 8} for method in ids},
            }
            for name, (label, ids) in METHODS.items()
        ],
        "identity": {"template": "chat:1", "model": "m", "data": {}},
        "model": {"name": "model", "fingerprint": "m", "dtype": "float32"},
        "versions": {"python": "3"},
        "git": {"sha": "abc", "dirty": False},
        "hardware": {"device": "a device", "cores": 2},
    }
    return content | changes


def lines(**changes):
    """All records of the run, by file."""
    return {
        f"{name}/{task}_{length}.jsonl": [
            record(name, task, length, index, **changes) for index in range(2)
        ]
        for name in METHODS
        for task in ("vt", "cwe")
        for length in (512, 1024)
    }


def write_run(folder, content=None, found=None):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.json").write_text(json.dumps(info() if content is None else content))
    for name, records in (lines() if found is None else found).items():
        path = folder / "pred" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"".join(one.to_line() for one in records))
    return folder


@pytest.fixture
def stored():
    """The functions that make records and run folders."""
    from types import SimpleNamespace

    return SimpleNamespace(record=record, info=info, lines=lines, write=write_run)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny") / "tiny-llama"
    raw = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "a": 2}, unk_token="<s>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>")
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    config = LlamaConfig(vocab_size=3, num_attention_heads=2, num_key_value_heads=1, **sizes)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder
