"""What scripts need of the plain model: its shape, the moments of its tokens, its cache's bytes.

Nothing here imports kvdock, so that other libraries can be timed alike where it is not installed.
"""

from __future__ import annotations

import itertools
import statistics
import time
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, LogitsProcessor

GIB = 2**30
WARM_UP = 5
"""Steps left out of a median: libraries warm up and a graph is captured in them."""


def llama_8b(layers: int, device: str = "cuda") -> LlamaForCausalLM:
    """Return a model of Llama-3.1-8B's shape with random bfloat16 weights."""
    config = LlamaConfig(
        vocab_size=128_256,
        hidden_size=4096,
        intermediate_size=14_336,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=131_072 + 1024,
        rope_theta=500_000.0,
        eos_token_id=None,
        pad_token_id=0,
        attn_implementation="sdpa",
    )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        model = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    return model.eval()


def weight_bytes(model: LlamaForCausalLM) -> int:
    """Return the bytes of weights that a decode step reads: of the embeddings only a row."""
    total = sum(p.numel() * p.element_size() for p in model.parameters())
    embeddings = model.get_input_embeddings().weight
    return total - embeddings.numel() * embeddings.element_size()


def cache_bytes(cache: Any) -> int:
    """Return the bytes of keys and values that one of transformers' caches has allocated."""
    tensors = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


class Marks(LogitsProcessor):
    """Note the beginning and the moment of every new token: the GPU's if there is one."""

    def __init__(self) -> None:
        self.moments = [_now()]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return the scores untouched."""
        self.moments.append(_now())
        return scores

    def every_ms(self) -> list[float]:
        """Return the milliseconds to every new token, the first one's prefill included."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return [_ms(start, stop) for start, stop in itertools.pairwise(self.moments)]

    def step_ms(self) -> float:
        """Return the median milliseconds of a step once everything is warm."""
        return statistics.median(self.every_ms()[1 + WARM_UP :])

    def start_seconds(self) -> float | None:
        """Return what the first three steps took beyond three steps: compiling, capturing."""
        times = self.every_ms()
        if len(times) < 8:
            return None
        return round((sum(times[1:4]) - 3 * self.step_ms()) / 1e3, 3)


def _now() -> Any:
    if not torch.cuda.is_available():
        return time.perf_counter()
    moment = torch.cuda.Event(enable_timing=True)
    moment.record()
    return moment


def _ms(start: Any, stop: Any) -> float:
    if isinstance(start, float):
        return float(stop - start) * 1e3
    return float(start.elapsed_time(stop))
