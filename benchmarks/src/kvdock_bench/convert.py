"""Turn a GGUF file into a safetensors folder, weights bit for bit as transformers reads them."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def convert_gguf(gguf: Path, target: Path) -> None:
    """Load a GGUF model in float32 and save model and tokenizer into the target folder.

    transformers refuses to save a model that came from GGUF, so a fresh one is built from its
    config and takes over the weights.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # the bar of the GGUF reader knows no switch
    with quiet_transformers(), contextlib.redirect_stderr(io.StringIO()):
        source = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.float32
        )
        read = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        tokenizer = rebuild_tokenizer(read, source.config)
        plain = AutoModelForCausalLM.from_config(_plain_config(source), dtype=torch.float32)
        plain.load_state_dict(source.state_dict())
        plain.generation_config = source.generation_config
        plain.save_pretrained(target)
        tokenizer.save_pretrained(target)


def rebuild_tokenizer(read: Any, config: Any) -> Any:
    """Return the byte-level tokenizer of a GGUF file, the same for every transformers release.

    Releases read the same words and merges, but differ in the special tokens they name and in
    what they add around a text, so only words and merges are taken over.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    content = json.loads(read.backend_tokenizer.to_str())
    words = content["model"]["vocab"]
    merges = [tuple(pair) for pair in content["model"]["merges"]]
    raw = Tokenizer(models.BPE(words, merges))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    special = sorted((token["id"], token["content"]) for token in content["added_tokens"])
    raw.add_special_tokens(
        [AddedToken(text, special=True, normalized=False) for _, text in special if text in words]
    )
    names = {number: word for word, number in words.items()}
    end = names[config.eos_token_id]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token=names[config.bos_token_id], eos_token=end, pad_token=end
    )
    tokenizer.chat_template = read.chat_template
    return tokenizer


def set_pad_token(tokenizer: Any) -> None:
    """Give a tokenizer without a pad token its end token; padding is masked anyway."""
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token


def _plain_config(model: Any) -> Any:
    fields = {
        name: value
        for name, value in model.config.to_dict().items()
        # private fields name the temporary folder the file was read from
        if name != "quantization_config" and not name.startswith("_")
    }
    return type(model.config)(**fields)


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence transformers' bars and notes for a block, and restore them after it."""
    from transformers.utils import logging

    bars, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
