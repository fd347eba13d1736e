"""What a dock holds and how long it took, read from the memory really allocated."""

from __future__ import annotations

from dataclasses import dataclass

from kvdock.cache import DockCache
from kvdock.errors import AccountingError


@dataclass(frozen=True, slots=True)
class LayerReport:
    """One managed layer: columns seen, slots per key/value head (fullest row), bytes."""

    layer: int
    logical_length: int
    slots: int
    bytes: int


@dataclass(frozen=True, slots=True)
class Report:
    """Sizes in bytes, times in seconds; under tensor parallelism this process's part of the sizes.

    Args:
        bytes_held: allocated for keys and values, unused room included.
        bytes_predicted: the same from the method's own formula.
        bytes_full: what transformers' plain cache would hold now.
        bytes_state: positions and the method's own per-entry tensors, on top of ``bytes_held``.
        bytes_after_prefill: ``bytes_held`` right after the prompt, before any new token.
        ratio: ``bytes_held / bytes_full``.
        prefill_s: time to the first token; None unless `generate` ran.
        decode_s_per_token: None before a second token.
    """

    methods: tuple[str, ...]
    bytes_held: int
    bytes_predicted: int
    bytes_full: int
    bytes_state: int
    bytes_after_prefill: int | None
    ratio: float
    prefill_s: float | None
    decode_s_per_token: float | None
    layers: tuple[LayerReport, ...]

    def __str__(self) -> str:
        lines = [
            f"{' + '.join(self.methods)}: holds {_size(self.bytes_held)} of"
            f" {_size(self.bytes_full)} ({self.ratio:.1%}), predicted"
            f" {_size(self.bytes_predicted)}, state {_size(self.bytes_state)}",
        ]
        if self.prefill_s is not None:
            lines.append(f"time to first token {self.prefill_s:.3f} s")
        if self.decode_s_per_token is not None:
            lines.append(f"{self.decode_s_per_token * 1e3:.2f} ms per token after it")
        lines.append(f"{'layer':>6} {'columns':>9} {'slots':>9} {'bytes':>12}")
        lines += [
            f"{row.layer:>6} {row.logical_length:>9} {row.slots:>9} {row.bytes:>12}"
            for row in self.layers
        ]
        return "\n".join(lines)


def held_bytes(cache: DockCache) -> int:
    """Return the bytes allocated for keys and values over the managed layers."""
    stores = (layer.store for layer in cache.docked if layer.is_initialized)
    return sum(store.storage.nbytes for store in stores if not store.storage.empty)


def make_report(
    cache: DockCache,
    bytes_after_prefill: int | None,
    prefill_s: float | None,
    decode_s_per_token: float | None,
) -> Report:
    """Read the cache; raises ``AccountingError`` when held and predicted bytes differ."""
    layers, predicted, full, state = [], 0, 0, 0
    for index, layer in zip(cache.plan.managed, cache.docked, strict=True):
        store = layer.store
        if store.storage.empty:
            continue
        expected = store.expected_nbytes
        slots, held = max(store.storage.live), store.storage.nbytes
        agree = held == expected and store.storage.live == store.ledger.live
        if not store.open and not agree:
            raise AccountingError(
                f"layer {index} holds {held} bytes ({store.storage.live} entries per row), the"
                f" formula of {'+'.join(cache.plan.methods)} predicts {expected}"
                f" ({store.ledger.live}). This is a defect of the method or the core: please"
                " report it."
            )
        layers.append(LayerReport(index, store.columns, slots, held))
        predicted += held if store.open else expected
        full += store.shape.dense_entry * store.columns
        state += store.storage.state_nbytes
        state += sum(tensor.untyped_storage().nbytes() for tensor in store.views.row_state.values())
    held_total = held_bytes(cache)
    return Report(
        methods=cache.plan.methods,
        bytes_held=held_total,
        bytes_predicted=predicted,
        bytes_full=full,
        bytes_state=state,
        bytes_after_prefill=bytes_after_prefill,
        ratio=held_total / full if full else 1.0,
        prefill_s=prefill_s,
        decode_s_per_token=decode_s_per_token,
        layers=tuple(layers),
    )


def _size(count: int) -> str:
    size, units = float(count), ["B", "KiB", "MiB", "GiB", "TiB"]
    while size >= 1024 and len(units) > 1:
        size, units = size / 1024, units[1:]
    return f"{size:.4g} {units[0]}"
