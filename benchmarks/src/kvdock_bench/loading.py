"""Put a model's weights on one device, layer by layer on several, or split over processes."""

from __future__ import annotations

import datetime
import importlib.util
import os
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from kvdock.shard import find_shard
from kvdock_bench.errors import BenchError
from kvdock_bench.placement import Place

_PATIENCE = datetime.timedelta(minutes=10)


def load_weights(source: str, dtype: str, place: Place, *, trust_remote_code: bool) -> Any:
    """Return the model at ``source`` (a folder or a hub id) where ``place`` wants it."""
    given: dict[str, Any] = {
        "dtype": getattr(torch, dtype),
        "use_safetensors": True,
        "trust_remote_code": trust_remote_code,
    }
    if place.devices[0] != "cpu":
        # what names no device must not open a context on another model's GPU
        torch.cuda.set_device(place.devices[0])
    if place.ranks > 1:
        _check_heads(source, place.ranks, trust_remote_code)
        _meet(place)
        split = _tensor_parallel(place.ranks)
        model: Any = AutoModelForCausalLM.from_pretrained(source, **given, **split)
        if find_shard(model, model.config.get_text_config(decoder=True)).size != place.ranks:
            raise BenchError(
                f"--parallel tp: transformers has no plan that splits the heads of"
                f" {model.config.model_type} models over {place.ranks} processes, so that every"
                " one would hold the whole cache. Use --parallel map."
            )
        return model
    if len(place.devices) > 1:
        _check_accelerate(len(place.devices))
        config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
        with torch.device("meta"):
            skeleton = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
        spread = even_map(skeleton, place.devices)
        return AutoModelForCausalLM.from_pretrained(source, device_map=spread, **given)
    model = AutoModelForCausalLM.from_pretrained(source, **given)
    return model.to(place.devices[0])


def even_map(model: Any, devices: tuple[str, ...]) -> dict[str, str]:
    """Give every device as many decoder layers as the others, in order.

    What comes before the layers goes to the first device and what follows them to the last;
    weights that both ends share go to the first.
    """
    decoder = model.get_decoder()
    names = {id(module): name for name, module in model.named_modules()}
    layers = decoder.layers
    if len(devices) > len(layers):
        raise BenchError(
            f"--gp_num {len(devices)}: the model has {len(layers)} layers, so at most"
            f" {len(layers)} GPUs can share it."
        )
    spread = {
        names[id(layer)]: devices[place * len(devices) // len(layers)]
        for place, layer in enumerate(layers)
    }
    tied = model.get_output_embeddings() is not None and _tied(model)
    for module in (*decoder.children(), *model.children()):
        name = names[id(module)]
        if module is layers or any(child is decoder for child in module.modules()):
            continue
        embeds = isinstance(module, nn.Embedding) or "Rotary" in type(module).__name__
        first = embeds or (tied and module is model.get_output_embeddings())
        spread[name] = devices[0 if first else -1]
    return spread


def _tied(model: Any) -> bool:
    return bool(model.config.get_text_config(decoder=True).tie_word_embeddings)


def _check_accelerate(devices: int) -> None:
    if importlib.util.find_spec("accelerate") is None:
        raise BenchError(
            f"--gp_num {devices}: layers are spread by accelerate, which is not installed. Install"
            " it (pip install accelerate), or split every layer with --parallel tp."
        )


def _check_heads(source: str, ranks: int, trust_remote_code: bool) -> None:
    """Refuse a split that would cut a head, which transformers meets only while it runs."""
    config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
    text = config.get_text_config(decoder=True)
    heads = text.num_attention_heads
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    if heads % ranks or kv_heads % ranks:
        raise BenchError(
            f"--parallel tp --gp_num {ranks}: the model has {heads} query heads and {kv_heads}"
            f" key/value heads, which {ranks} processes cannot share evenly. Choose a divisor of"
            f" {kv_heads}, or --parallel map."
        )


def _meet(place: Place) -> None:
    """Join the processes of one model."""
    device = torch.device(place.devices[0])
    # transformers binds the process to the GPU of this number
    os.environ["LOCAL_RANK"] = str(device.index or 0)
    on_gpu = device.type == "cuda"
    torch.distributed.init_process_group(
        "nccl" if on_gpu else "gloo",
        init_method=place.meeting,
        rank=place.rank,
        world_size=place.ranks,
        timeout=_PATIENCE,
        device_id=device if on_gpu else None,
    )


def _tensor_parallel(ranks: int) -> dict[str, Any]:
    """Return the arguments that this version of transformers knows for its own plan.

    Without the size, newer ones read it from WORLD_SIZE, and split nothing where that is missing.
    """
    plan: dict[str, Any] = {"tp_plan": "auto", "tp_size": ranks}
    try:
        from transformers.distributed import DistributedConfig
    except ImportError:
        return plan
    if "tp_plan" not in DistributedConfig.__dataclass_fields__:
        return plan
    return {"distributed_config": DistributedConfig(**plan)}
