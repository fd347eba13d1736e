"""Tiny random models of every supported family, for tests: seconds on a CPU, no download."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "glm4")

_SMALL: dict[str, Any] = {
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 4096,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "tie_word_embeddings": False,
}
_FAMILY: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": None},
    "glm4": {"partial_rotary_factor": 0.5},
}


def tiny_model(family: str, *, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """Return a random float32 model of a family in evaluation mode; the same for the same seed.

    Norm weights are random too: with weights of one, keys of models with QK norms all have the same
    length, which norm-based methods cannot rank.
    """
    config = AutoConfig.for_model(family, **{**_SMALL, **_FAMILY.get(family, {}), **overrides})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for name, parameter in model.named_parameters():
            if "norm" in name:
                torch.nn.init.uniform_(parameter, 0.5, 1.5)
            elif parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.2)
        model.eval()
        return model


def left_padded(
    lengths: tuple[int, ...], *, vocabulary: int = 160, seed: int = 0
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Return a left-padded batch of random prompts and its rows alone.

    Returns:
        ({"input_ids" [B, T], "attention_mask" [B, T]}, [int64 [n_b], …]).
    """
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(3, vocabulary, (n,), generator=generator) for n in lengths]
    ids = torch.zeros(len(rows), max(lengths), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        ids[index, ids.shape[1] - len(row) :] = row
        mask[index, ids.shape[1] - len(row) :] = 1
    return {"input_ids": ids, "attention_mask": mask}, rows
