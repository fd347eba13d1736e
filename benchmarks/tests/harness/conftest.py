import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = 120


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A tiny model whose every word is a token, w0 to w119."""
    place = tmp_path_factory.mktemp("tiny") / "tiny"
    vocabulary = {
        word: i for i, word in enumerate(["<s>", "</s>", *(f"w{i}" for i in range(WORDS))])
    }
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<s>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<s>", eos_token="</s>", pad_token="</s>", unk_token="<s>"
    )
    tokenizer.save_pretrained(place)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=0,
        eos_token_id=1,
        # a wide spread, so that attention is sharp and greedy choices are far from ties
        initializer_range=0.4,
    )
    LlamaForCausalLM(config).save_pretrained(place)
    return place
