"""The contract every method keeps, as functions a plugin's author can call.

``CHECKS[name](Case("snapkv", "llama"))`` raises ``AssertionError`` where a promise is broken;
`check_method` runs them all and collects the outcome.
"""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

import kvdock
from kvdock.attach import Dock
from kvdock.compat import CACHE
from kvdock.method import Method
from kvdock.registry import default_host
from kvdock.testing_models import FAMILIES, left_padded, tiny_model

__all__ = ["CHECKS", "FAMILIES", "Case", "check_method", "left_padded", "residue", "tiny_model"]

LENGTHS = (97, 70, 33)
BUDGET = 48
NEW = 16


@dataclass(frozen=True)
class Case:
    """One method (or composition) on one family.

    Args:
        budget: small enough that two of three prompts are compressed.
        options: the method's options.
    """

    method: str
    family: str = "llama"
    budget: int | str = BUDGET
    options: dict[str, Any] = field(default_factory=dict, hash=False)

    @property
    def records(self) -> list[Method]:
        """Return the records of the composed methods."""
        return [default_host().load(id) for id in self.method.split("+")]

    @property
    def kinds(self) -> set[str]:
        """Return the kinds of the composed methods."""
        return {record.kind for record in self.records}

    def model(self) -> PreTrainedModel:
        """Return the case's model, always the same."""
        own_form = self.kinds & {"quantisation", "channel-pruning"}
        return tiny_model(self.family, **({"head_dim": 32} if own_form else {}))

    def attach(self, model: PreTrainedModel, **changes: Any) -> Dock:
        """Attach the method; ``changes`` override budget and options."""
        settings = {"budget": self.budget, **self._options("contract"), **self.options, **changes}
        if not any(record.default_budget for record in self.records):
            del settings["budget"]
        return kvdock.attach(model, self.method, **settings)

    def attach_lossless(self, model: PreTrainedModel) -> Dock:
        """Attach the method so that the output has to be the plain model's."""
        return self.attach(model, budget=4096, **self._options("lossless"))

    def _options(self, kind: str) -> dict[str, Any]:
        return {
            f"{record.id}.{name}": value
            for record in self.records
            for name, value in getattr(record, kind).items()
        }


def generate(model: Any, batch: dict[str, Tensor], **kwargs: Any) -> Tensor:
    """Return the greedy continuation, [B, NEW]."""
    settings = {"max_new_tokens": NEW, "do_sample": False, **kwargs}
    output: Tensor = model.generate(**batch, **settings)
    return output[:, batch["input_ids"].shape[1] :]


def alone(row: Tensor) -> dict[str, Tensor]:
    """Return a batch of one row without padding."""
    return {"input_ids": row[None], "attention_mask": torch.ones_like(row)[None]}


@functools.lru_cache(maxsize=16)
def _fresh(case: Case, index: int) -> Tensor:
    """Return the answer to one of the prompts on a model that saw no other, [NEW]; made once."""
    model = case.model()
    with case.attach(model):
        return generate(model, alone(left_padded(LENGTHS)[1][index]))[0]


def check_generous_budget(case: Case) -> None:
    """With a budget of at least the prompt, or lossless options, tokens are the plain model's."""
    model, (batch, _) = case.model(), left_padded(LENGTHS)
    plain = generate(model, batch)
    with case.attach_lossless(model) as dock:
        same = generate(model, batch)
        report = dock.report()
    assert torch.equal(same, plain), "output differs from the plain model's"
    assert report.bytes_after_prefill == _prompt_bytes(model, LENGTHS)


def check_padded_batch(case: Case) -> None:
    """A row's tokens do not depend on its padding or its neighbours."""
    model, (batch, _) = case.model(), left_padded(LENGTHS)
    with case.attach(model):
        together = generate(model, batch)
    for index, row in enumerate(together):
        assert torch.equal(row, _fresh(case, index)), f"row {index} differs from its run alone"


def check_prefill_exact(case: Case) -> None:
    """Compression never changes the prompt's own logits, bit for bit."""
    if "sparse-prefill" in case.kinds:
        return
    model, (_, rows) = case.model(), left_padded(LENGTHS)
    with torch.no_grad():
        plain = model(**alone(rows[0])).logits
        with case.attach(model) as dock:
            docked = model(**alone(rows[0]), **{CACHE: dock.new_cache()}).logits
    assert torch.equal(docked, plain), f"logits differ by {(docked - plain).abs().max():.2e}"


def check_chunked_prefill(case: Case) -> None:
    """A prompt fed in chunks gives the tokens of the prompt in one piece, if the method says so."""
    if not all(record.capabilities.exact_chunks for record in case.records):
        return
    model, (batch, _) = case.model(), left_padded(LENGTHS)
    with case.attach(model):
        whole = generate(model, batch)
        for size in (16, LENGTHS[0] - 1):  # the second leaves a last chunk of one token
            chunked = generate(model, batch, prefill_chunk_size=size)
            assert torch.equal(chunked, whole), f"chunks of {size} give other tokens"


def check_memory(case: Case) -> None:
    """Held bytes equal predicted bytes, belong to no larger storage, and are fewer than full."""
    model, (batch, _) = case.model(), left_padded(LENGTHS)
    with case.attach(model) as dock:
        generate(model, batch)
        report = dock.report()  # raises when held and predicted bytes differ
        assert dock.cache is not None
        for layer in dock.cache.docked:
            for name, tensor in layer.store.storage.tensors().items():
                allocated = tensor.untyped_storage().nbytes()
                assert allocated == tensor.numel() * tensor.element_size(), f"{name} keeps a view"
    if case.kinds != {"sparse-prefill"}:
        assert report.bytes_after_prefill is not None
        full = _prompt_bytes(model, LENGTHS)
        assert report.bytes_after_prefill < full, "nothing was freed"


def check_later_turn(case: Case) -> None:
    """A second turn on the same cache works, pads in the middle included, as each row alone."""
    model, (batch, rows) = case.model(), left_padded(LENGTHS)
    follow, follow_rows = left_padded((9, 5, 7), seed=1)

    def two_turns(dock: Any, first: dict[str, Tensor], second: dict[str, Tensor]) -> Tensor:
        cache = dock.new_cache()
        answer = generate(model, first, max_new_tokens=NEW // 2, **{CACHE: cache})
        real = torch.ones_like(answer)
        history = {
            "input_ids": torch.cat([first["input_ids"], answer, second["input_ids"]], dim=1),
            "attention_mask": torch.cat(
                [first["attention_mask"], real, second["attention_mask"]], dim=1
            ),
        }
        result = generate(model, history, **{CACHE: cache})
        dock.report()
        return result

    with case.attach(model) as dock:
        together = two_turns(dock, batch, follow)
        for index, (row, more) in enumerate(zip(rows, follow_rows, strict=True)):
            single = two_turns(dock, alone(row), alone(more))[0]
            assert torch.equal(together[index], single), f"row {index} differs in its second turn"


def check_modes(case: Case) -> None:
    """Beam search, sampling and several returned sequences run, with exact accounting."""
    model, (batch, rows) = case.model(), left_padded(LENGTHS)
    with case.attach(model) as dock:
        beams = generate(model, batch, num_beams=3, max_new_tokens=10)
        dock.report()
        for index, row in enumerate(rows):
            single = generate(model, alone(row), num_beams=3, max_new_tokens=10)[0]
            assert torch.equal(beams[index], single), f"row {index} differs under beam search"
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            sampled = generate(model, batch, do_sample=True, num_return_sequences=2)
        assert sampled.shape == (6, NEW)
        dock.report()


def check_sequence(case: Case) -> None:
    """Prompts one after the other equal fresh runs: no state outlives its cache."""
    model, (_, rows) = case.model(), left_padded(LENGTHS)
    order = (0, 1, 2, 0)
    with case.attach(model):
        in_a_row = [generate(model, alone(rows[index]))[0] for index in order]
    for place, (index, found) in enumerate(zip(order, in_a_row, strict=True)):
        assert torch.equal(found, _fresh(case, index)), (
            f"prompt {place} depends on the prompts before it"
        )


def check_residue(case: Case) -> None:
    """Detaching gives back the model and the libraries as they were, also after an exception."""
    model, (batch, _) = case.model(), left_padded(LENGTHS)
    before, logits = residue(model), model(**batch).logits
    with case.attach(model):
        generate(model, batch)
    assert residue(model) == before, "something stayed behind"
    try:
        with case.attach(model):
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    assert residue(model) == before, "something stayed behind after an exception"
    assert torch.equal(model(**batch).logits, logits), "the plain model's logits changed"


CHECKS: dict[str, Callable[[Case], None]] = {
    "generous budget = plain model": check_generous_budget,
    "padded batch = row by row": check_padded_batch,
    "prefill logits exact": check_prefill_exact,
    "chunked = one-shot": check_chunked_prefill,
    "held bytes = predicted bytes": check_memory,
    "second turn": check_later_turn,
    "beams, sampling, several sequences": check_modes,
    "prompts in sequence = fresh runs": check_sequence,
    "no residue after detach": check_residue,
}


def check_method(
    method: str, families: tuple[str, ...] = FAMILIES, **options: Any
) -> list[tuple[str, bool, str]]:
    """Run the whole contract; return (family: check, kept, what was found) per promise."""
    return list(outcomes(method, families, **options))


def outcomes(
    method: str, families: tuple[str, ...] = FAMILIES, **options: Any
) -> Iterator[tuple[str, bool, str]]:
    """Yield what `check_method` returns as it comes."""
    for family in families:
        for name, check in CHECKS.items():
            try:
                check(Case(method, family, options=options))
                yield f"{family}: {name}", True, ""
            except Exception as error:  # a crash breaks the promise too
                yield f"{family}: {name}", False, f"{type(error).__name__}: {error}"


def residue(model: PreTrainedModel) -> dict[str, Any]:
    """Snapshot everything an attachment could leave behind."""
    gc.collect()
    return {
        "attention functions": sorted(AttentionInterface()),
        "mask functions": sorted(AttentionMaskInterface()),
        "implementation": model.config._attn_implementation,
        "config": model.config.to_json_string(),
        "instance": {name: sorted(module.__dict__) for name, module in model.named_modules()},
        # transformers notes on the class, once, what it found in its source file
        "class": sorted(x for x in vars(type(model)) if not x.endswith("_cached_value")),
        "hooks": [
            (name, len(module._forward_hooks), len(module._forward_pre_hooks))
            for name, module in model.named_modules()
        ],
        "dtype": torch.get_default_dtype(),
        "rng": torch.get_rng_state().tolist(),
        "grad": torch.is_grad_enabled(),
    }


def _prompt_bytes(model: PreTrainedModel, lengths: tuple[int, ...]) -> int:
    """Return the bytes of every real token's keys and values, rows as long as the longest."""
    config = model.config
    entry = 2 * config.head_dim * config.num_key_value_heads * 4
    return int(entry * config.num_hidden_layers * len(lengths) * max(lengths))
