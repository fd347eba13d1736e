"""Give entries up in a decode step of fixed shape by one kernel a layer.

Shapes: L layers, B rows, K key/value heads, H query heads, N slots, D head_dim.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cache
from types import ModuleType, SimpleNamespace
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from kvdock.dense import KEY, POSITION, VALUE
from kvdock.kernels.slots import attend_filled, counters
from kvdock.layer import LayerStore
from kvdock.plan import DockPlan
from kvdock.policy import AttentionParams
from kvdock.release import ReleaseRule
from kvdock.views import LayerViews

_log = logging.getLogger("kvdock")


class Held(Protocol):
    """What the device knows of all layers: int64 and bool [L, B], and int64 [B]."""

    live: Tensor
    slots: Tensor
    over: Tensor
    tokens: Tensor


class FusedRelease:
    """Follow the layers' rules with kernels that write slots, states and keys in place.

    Args:
        kernels: the module of kernels, `kernels.release_triton`.
    """

    def __init__(
        self,
        stores: Sequence[LayerStore],
        held: Held,
        rules: Sequence[ReleaseRule],
        kernels: ModuleType,
    ) -> None:
        self._stores, self._held, self._rules, self._kernels = stores, held, rules, kernels
        self._turns: tuple[Tensor, Tensor] | None = None
        self._told: tuple[Tensor, Tensor] | None = None
        positions = [store.dense.table[POSITION] for store in stores]
        self._scratch = positions[0].new_empty(0, dtype=torch.float32)
        self._order: list[Tensor] = []
        self._evicted = torch.zeros_like(held.live)
        if rules[0].worth == "sum":
            for store, rule in zip(stores, rules, strict=True):
                table = store.dense.table
                if rule.state not in table:
                    table[rule.state] = table[POSITION].new_zeros(table[POSITION].shape).float()
        if rules[0].worth == "step":
            self._scratch = self._scratch.new_empty(max(place.numel() for place in positions))
            last = torch.iinfo(torch.int32).max
            for place in positions:
                order = place.masked_fill(place < 0, last).argsort(dim=2, stable=True)
                self._order.append(order.int())
        if rules[0].following is not None:
            for rank, store in enumerate(stores):
                self._follow(rank, store)

    def _follow(self, rank: int, store: LayerStore) -> None:
        """Give a layer the states of entries that follow, its counts where all layers' stand."""
        following = self._rules[rank].following
        assert following is not None
        rows, key = store.views.row_state, store.dense.table[KEY]
        if following.raw not in rows:
            shape = (*key.shape[:2], following.width, key.shape[3])
            rows[following.raw] = key.new_zeros(shape)
        rows[following.raw] = rows[following.raw].contiguous()
        if following.evicted in rows:
            self._evicted[rank] = rows[following.evicted]
        rows[following.evicted] = self._evicted[rank]

    def begin(self) -> None:
        """Compute, once for all layers, how far the entries that follow have to turn."""
        if self._rules[0].following is None:
            return
        turns = self._stores[0].plan.facts.turns
        assert turns is not None
        moved = self._evicted[0] + self._held.over[0]  # layers differ in nothing
        cos, sin = turns(moved[:, None])
        self._turns = cos.contiguous(), sin.contiguous()

    def end(self) -> None:
        """Count what the step evicted."""
        if self._rules[0].following is not None:
            self._evicted.add_(self._held.over)

    def told(self, rank: int, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor] | None:
        """Return where attention has to write its logits and their sums; layers share the place."""
        if self._rules[rank].worth == "age":
            return None
        batch, heads, slots = query.shape[0], query.shape[1], key.shape[2]
        if self._told is None:
            most = max(store.dense.table[KEY].shape[2] for store in self._stores)
            self._told = (
                query.new_empty(batch * heads * most, dtype=torch.float32),
                query.new_empty(batch, heads, dtype=torch.float32),
            )
        logits, total = self._told
        return logits[: batch * heads * slots].view(batch, heads, slots), total

    def release(self, rank: int, table: dict[str, Tensor], released: Tensor) -> None:
        """Do what the policy's `observe_step` and `release` do after a layer's attention."""
        held, rule, kernels = self._held, self._rules[rank], self._kernels
        position, over = table[POSITION], held.over[rank]
        if rule.worth == "age":
            rows, following = self._stores[rank].views.row_state, rule.following
            raw = evicted = None
            if following is not None:
                raw, evicted = rows[following.raw], rows[following.evicted]
            kernels.drop_oldest(
                position, released, over, rule.stays, table[KEY], raw, evicted, self._turns
            )
            return
        assert self._told is not None
        logits, total = self._told
        if rule.worth == "sum":
            kernels.drop_smallest_sum(
                position, released, over, rule.stays, held.tokens, logits, total,
                table[rule.state], mean=rule.mean,
            )  # fmt: skip
        else:
            kernels.drop_least_attended(
                position, released, over, rule.stays, held.live[rank], logits, total,
                self._order[rank], self._scratch, mean=rule.mean, pool=rule.pool,
            )  # fmt: skip


def fused_release(stores: Sequence[LayerStore], held: Held) -> FusedRelease | None:
    """Return what follows the policy's rules by kernels; None where the policy has to do it."""
    policy = stores[0].plan.cache_policy
    if policy is None or not policy.acts_on_decode:
        return None
    rules = [policy.release_rule(slots) for slots in held.slots]
    found = [rule for rule in rules if rule is not None]
    turns = stores[0].plan.facts.turns
    if len(found) < len(rules) or (found[0].following is not None and turns is None):
        return None
    kernels = release_kernels()
    if kernels is None or not _agrees(stores[0], kernels):
        return None
    return FusedRelease(stores, held, found, kernels)


_verdicts: WeakKeyDictionary[DockPlan, bool] = WeakKeyDictionary()


def _agrees(store: LayerStore, kernels: ModuleType) -> bool:
    """Say, once per attachment, whether kernels give up what the policy does on a small case."""
    plan = store.plan
    if plan not in _verdicts:
        try:
            _verdicts[plan] = _same(store, kernels)
            reason = "a small case differs"
        except Exception as error:  # no compiler, or not for this chip
            _verdicts[plan], reason = False, f"{type(error).__name__}: {error}"
        if not _verdicts[plan]:
            _log.warning("decode gives entries up by torch, which is slower: %s", reason)
    return _verdicts[plan]


def _same(store: LayerStore, kernels: ModuleType) -> bool:
    """Compare one step of a full and of a shorter row, of the layer's own shapes and dtype."""
    plan, held_key = store.plan, store.dense.table[KEY]
    policy, device = plan.cache_policy, held_key.device
    assert policy is not None
    slots, heads, dim = 79, held_key.shape[1], held_key.shape[3]
    group = plan.config.num_attention_heads // heads
    generator = torch.Generator().manual_seed(0)

    def states(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, held_key.dtype)

    query, key = states(2, heads * group, 1, dim), states(2, heads, slots + 1, dim)
    position = torch.arange(slots + 1, device=device, dtype=torch.int32).repeat(2, heads, 1)
    position[0, :, 9], position[0, :, 9 + slots // 2], position[1, :, -9:] = 200, 9, -1
    live, allowed = torch.tensor([[slots, slots - 9]]), torch.full((1, 2), slots)
    held = SimpleNamespace(
        live=live.to(device), slots=allowed.to(device), over=(live >= allowed).to(device),
        tokens=torch.tensor([200, slots - 9], device=device),
    )  # fmt: skip
    rule, params = policy.release_rule(held.slots[0]), AttentionParams(dim**-0.5)
    assert rule is not None
    table = {KEY: key, VALUE: key, POSITION: position}
    if rule.state:
        table[rule.state] = torch.zeros(position.shape, device=device)
    mine = {name: tensor.clone() for name, tensor in table.items()}
    views = LayerViews(0, plan.facts.layers)
    shown = views.slots(query, table, held.over[0], held.slots[0], params, {})
    if policy.observes_decode:
        table |= policy.observe_step(shown)
        shown = views.slots(query, table, held.over[0], held.slots[0], params, {})
    wanted = policy.release(shown)
    keys = key.clone()
    if wanted.rewrite_slots is not None and wanted.rewrite_keys is not None:
        index = wanted.rewrite_slots[..., None].expand_as(wanted.rewrite_keys)
        keys.scatter_(2, index, wanted.rewrite_keys)
    layer: Any = SimpleNamespace(
        plan=plan, dense=SimpleNamespace(table=mine), views=LayerViews(0, plan.facts.layers)
    )
    fused = FusedRelease([layer], held, [rule], kernels)
    fused.begin()
    told = fused.told(0, query, mine[KEY])
    if told is not None:
        attend_filled(query, mine[KEY], mine[VALUE], params, position=mine[POSITION],
                      used=held.live[0], told=told,
                      arrived=counters(2, heads, device))  # fmt: skip
    released = torch.zeros(2, heads, dtype=torch.int64, device=device)
    fused.release(0, mine, released)
    same = torch.equal(released[0], wanted.slot[0]) and torch.equal(mine[POSITION][1], position[1])
    near = [(mine[KEY], keys)] + [(mine[name], table[name]) for name in mine if name == rule.state]
    emptied = mine[POSITION].gather(2, released[..., None])[0]
    return (
        same and bool((emptied == -1).all())
        and all(torch.allclose(a.float(), b.float(), atol=1e-2, rtol=1e-2) for a, b in near)
    )  # fmt: skip


@cache
def release_kernels() -> ModuleType | None:
    """Return the module of kernels, None where Triton cannot be imported."""
    try:
        from kvdock.kernels import release_triton
    except Exception as error:  # not installed, or broken: plain torch does the same
        _log.info("decode gives entries up by torch: %s: %s", type(error).__name__, error)
        return None
    return release_triton
