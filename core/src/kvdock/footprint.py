"""What a model holds, read from its config alone: no weight is loaded, nothing is downloaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedModel

from kvdock import compat
from kvdock.errors import UnsupportedError
from kvdock.policy import ModelFacts
from kvdock.rope import make_rotation

DTYPES: dict[str, torch.dtype] = {
    name: getattr(torch, name) for name in ("float32", "float16", "bfloat16")
}


@dataclass(frozen=True, slots=True)
class LayerShape:
    """One layer's cache: heads, head sizes, and the most tokens it holds (None: all)."""

    kv_heads: int
    key_dim: int
    value_dim: int
    window: int | None = None

    def entry(self, dtype: torch.dtype) -> int:
        """Return the bytes of one token of one row."""
        return self.kv_heads * (self.key_dim + self.value_dim) * dtype.itemsize


@dataclass(frozen=True, slots=True)
class Footprint:
    """A model's sizes.

    Args:
        weights: bytes. managed: the layers kvdock manages; others: those it leaves alone.
        hidden, queries, inner: numbers per token in the hidden states, in one layer's queries and
            in the intermediates of its MLP.
        longest: tokens the model is made for, None where its config does not say.
    """

    name: str
    weights: int
    dtype: torch.dtype
    facts: ModelFacts
    managed: tuple[LayerShape, ...]
    others: tuple[LayerShape, ...]
    hidden: int
    queries: int
    inner: int
    longest: int | None


def read_model(path: str | Path, dtype: str | None = None) -> Footprint:
    """Read a folder with a config.json, or that file.

    Args:
        dtype: "float32", "float16" or "bfloat16"; the config's own when None.

    Raises ``UnsupportedError`` for a path that is no model and a model kvdock cannot serve.
    """
    folder = Path(path)
    folder = folder.parent if folder.name == "config.json" else folder
    if not (folder / "config.json").is_file():
        found = "a folder without config.json" if folder.is_dir() else "no such folder"
        raise UnsupportedError(
            f"{str(path)!r}: found {found}, expected a model as transformers saves it, or its"
            " config.json alone. Give the local folder of a model; nothing is downloaded here."
        )
    try:
        # without the last argument transformers asks whoever sits at the terminal
        config = AutoConfig.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
        kind = _dtype(dtype, config)
        model = _skeleton(config, kind)
        shapes = _shapes(model)
    except UnsupportedError:
        raise
    # whatever a damaged config or a model's own code makes of it
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0].rstrip(".")
        raise UnsupportedError(
            f"{str(path)!r}: no model can be made of its config.json ({type(error).__name__}:"
            f" {reason}). Expected a decoder-only model that this transformers knows; models that"
            " bring code of their own are not run."
        ) from error
    return _footprint(model, _stored(folder, config), shapes)


def of_model(model: PreTrainedModel) -> Footprint:
    """Read a model that exists, on the meta device or a real one."""
    return _footprint(model, None, _shapes(model))


def _dtype(name: str | None, config: Any) -> torch.dtype:
    if name is None:
        found = getattr(config.get_text_config(decoder=True), "dtype", None)
        found = found or getattr(config, "dtype", None)
        return found if isinstance(found, torch.dtype) else torch.float32
    if name not in DTYPES:
        raise UnsupportedError(f"dtype is {name!r}, expected one of {', '.join(DTYPES)}.")
    return DTYPES[name]


def _skeleton(config: Any, dtype: torch.dtype) -> PreTrainedModel:
    """Make the model without memory for its weights."""
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, dtype=dtype, trust_remote_code=False
        )
    model.eval()
    return model


def _shapes(model: PreTrainedModel) -> list[LayerShape | None]:
    """Return every layer's shape as the model itself makes it; None where it has no keys."""
    cache = DynamicCache(config=model.config)
    ids = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    with torch.no_grad():
        model(input_ids=ids, **{compat.CACHE: cache}, use_cache=True)
    found: list[LayerShape | None] = []
    for layer in cache.layers:
        key, value = getattr(layer, "keys", None), getattr(layer, "values", None)
        if key is None or value is None:
            found.append(None)
            continue
        window = getattr(layer, "sliding_window", None)
        found.append(LayerShape(key.shape[1], key.shape[-1], value.shape[-1], window))
    return found


def _stored(folder: Path, config: Any) -> int | None:
    """Return the bytes on disk of weights that are quantised, which no config tells."""
    if getattr(config, "quantization_config", None) is None:
        return None
    total = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    if not total:
        raise UnsupportedError(
            f"{str(folder)!r}: found a config of quantised weights without their *.safetensors,"
            " so their size is unknown. Give the whole folder."
        )
    return total


def _footprint(
    model: PreTrainedModel, stored: int | None, shapes: list[LayerShape | None]
) -> Footprint:
    config = model.config.get_text_config(decoder=True)
    managed = compat.managed_layers(config)
    if model.config.is_encoder_decoder or not managed:
        raise UnsupportedError(
            f"{type(model).__name__} has no decoder layer of full attention, so there is nothing to"
            " compress."
        )
    own = [shape for index in managed if (shape := shapes[index]) is not None]
    others = [shape for i, shape in enumerate(shapes) if shape is not None and i not in managed]
    rotate, reason = make_rotation(model, managed)
    head_dim = own[0].key_dim
    facts = ModelFacts(len(managed), rotate, reason, config, None, model.dtype, head_dim)
    weights = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    return Footprint(
        name=type(model).__name__,
        weights=weights if stored is None else stored,
        dtype=model.dtype,
        facts=facts,
        managed=tuple(own),
        others=tuple(others),
        hidden=config.hidden_size,
        queries=config.num_attention_heads * head_dim,
        inner=getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
        longest=getattr(config, "max_position_embeddings", None),
    )
