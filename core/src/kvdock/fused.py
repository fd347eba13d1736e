"""Run a captured step's small operations as fused kernels, on this model's instances only.

A decode step of one token is some forty small kernels a layer beside its matrix products, and each
costs its launch whatever it computes. During a captured step the `forward` of norms, MLPs,
attention and decoder layers is replaced on the instance; it calls the same submodules with the same
weights. A kind of module is replaced only if the fused form gives what the module itself gives.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from kvdock.attention import dock_attention
from kvdock.cache import KVHandle
from kvdock.compat import CACHE
from kvdock.layout import BatchLayout
from kvdock.products import Products, products_of

FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen3")
"""Families whose attention rotates halves and whose layer is norm, attention, norm, MLP."""
UNITS = 8
"""Units in the last place of the largest value by which a fused form may differ on a small case."""

_log = logging.getLogger("kvdock")


class FusedStep:
    """Hold the fused forwards of a model and put them in place while a step runs.

    Args:
        kernels: the module of kernels, `kernels.step_triton`.
        products: what runs several linear layers as one; by default each runs itself.
    """

    def __init__(
        self, model: nn.Module, kernels: ModuleType, products: Products | None = None
    ) -> None:
        self._kernels = kernels
        self.products = products or Products(None)
        """Has to be prepared for a number of rows before it changes anything."""
        self._ready: tuple[Tensor, Tensor] | None = None
        """The last sum of a layer's states and the norm of it that the next module asks for."""
        self._verdicts: dict[Any, bool] = {}
        self._forwards: list[tuple[nn.Module, Callable[..., Any]]] = []
        floating = {p.dtype for p in model.parameters() if p.is_floating_point()}
        if len(floating) == 1:  # else a norm's output has another dtype than its input
            with torch.no_grad():
                self._find(model, floating.pop())

    @property
    def count(self) -> int:
        """Return the number of modules that run fused."""
        return len(self._forwards)

    @contextmanager
    def active(self) -> Iterator[None]:
        """Replace the forwards inside the block."""
        before: list[Any] = [module.__dict__.get("forward") for module, _ in self._forwards]
        for module, forward in self._forwards:
            module.__dict__["forward"] = forward
        try:
            yield
        finally:
            self._ready = None
            for (module, _), own in zip(self._forwards, before, strict=True):
                if own is None:
                    del module.__dict__["forward"]
                else:
                    module.__dict__["forward"] = own

    def _find(self, model: Any, dtype: torch.dtype) -> None:
        """Collect the modules whose fused form gives what they give themselves."""
        hidden = tokens(model.config.hidden_size, model.device, dtype)
        normed: set[nn.Module] = set()
        layers = []
        for module in model.modules():
            name = type(module).__name__
            if not type(module).__module__.startswith("transformers.") or changed(module):
                continue
            if name.endswith("RMSNorm"):
                states = tokens(module.weight.shape[-1], model.device, dtype)
                if self._keep(module, self._norm(module), states):
                    normed.add(module)
            elif name.endswith("MLP") and hasattr(module, "down_proj"):
                mlp = gated_mlp(module, self._kernels, self.products)
                if mlp is not None and self._keep(module, mlp, hidden):
                    self.products.add(openings(module), gated=True)
                    self.products.add([module.down_proj])
            elif name in {f"{family}Attention" for family in FAMILIES}:
                case = _attention_case(module, hidden)
                if self._keep(module, self._attention(module), hidden, *case):
                    self.products.add([module.q_proj, module.k_proj, module.v_proj])
                    self.products.add([module.o_proj])
            elif name in {f"{family}DecoderLayer" for family in FAMILIES}:
                layers.append(module)
        # a layer ends with the norm that the next one begins with
        norms = [layer.input_layernorm for layer in layers[1:]]
        last = getattr(getattr(model, "model", model), "norm", None)
        for layer, following in zip(layers, [*norms, last], strict=False):
            if {layer.post_attention_layernorm, following} <= normed:
                self._forwards.append((layer, self._layer(layer, following)))

    def _keep(self, module: nn.Module, fused: Callable[..., Any], *case: Any) -> bool:
        """Take the fused form if it agrees with the module on a small case; one per kind."""
        shapes = tuple(tuple(weight.shape) for weight in module.parameters())
        kind = type(module), shapes, getattr(module, "variance_epsilon", None)
        if kind not in self._verdicts:
            self._verdicts[kind] = agrees(module, fused, *case)
        if self._verdicts[kind]:
            self._forwards.append((module, fused))
        return self._verdicts[kind]

    # -- fused forwards ----------------------------------------------------------------------------

    def _norm(self, module: Any) -> Callable[..., Tensor]:
        def forward(hidden_states: Tensor) -> Tensor:
            ready = self._ready
            if ready is not None and ready[0] is hidden_states:
                self._ready = None
                return ready[1]
            made: Tensor = self._kernels.rms_norm(
                hidden_states, module.weight, module.variance_epsilon
            )
            return made

        return forward

    def _attention(self, module: Any) -> Callable[..., Any]:
        """Return an attention that turns queries and keys in one kernel."""
        norms = hasattr(module, "q_norm"), hasattr(module, "k_norm")

        def forward(
            hidden_states: Tensor,
            position_embeddings: tuple[Tensor, Tensor],
            attention_mask: Any,
            *cache: Any,
            **kwargs: Any,
        ) -> tuple[Tensor, None]:
            shape = (*hidden_states.shape[:-1], -1, module.head_dim)
            layers = module.q_proj, module.k_proj, module.v_proj
            query, key, value = (x.view(shape) for x in self.products(layers, hidden_states))
            value = value.transpose(1, 2)
            query = module.q_norm(query) if norms[0] else query
            key = module.k_norm(key) if norms[1] else key
            query, key = self._kernels.rotate(query, key, *position_embeddings)
            (held,) = cache or (kwargs.pop(CACHE),)  # as the model hands it over, or by place
            key, value = held.update(key, value, module.layer_idx)
            output, _ = dock_attention(
                module, query, key, value, attention_mask, scaling=module.scaling, **kwargs
            )
            output = output.reshape(*hidden_states.shape[:-1], -1)
            return self.products([module.o_proj], output)[0], None

        return forward

    def _layer(self, layer: Any, following: Any) -> Callable[..., Tensor]:
        """Return a decoder layer whose sums also give the norm that is asked for next."""
        middle = layer.post_attention_layernorm

        def summed(left: Tensor, right: Tensor, norm: Any) -> Tensor:
            made = self._kernels.add_rms_norm(left, right, norm.weight, norm.variance_epsilon)
            self._ready = made
            total: Tensor = made[0]
            return total

        def forward(hidden_states: Tensor, **kwargs: Any) -> Tensor:
            attended, _ = layer.self_attn(
                hidden_states=layer.input_layernorm(hidden_states), **kwargs
            )
            hidden_states = summed(hidden_states, attended, middle)
            return summed(hidden_states, layer.mlp(middle(hidden_states)), following)

        return forward


def agrees(
    module: nn.Module, fused: Callable[..., Any], *case: Any, what: str = "captured decode"
) -> bool:
    """Say whether a fused form gives on a small case what the module itself gives."""
    try:
        wanted, found = type(module).forward(module, *case), fused(*case)
        if isinstance(wanted, tuple):
            wanted, found = wanted[0], found[0]
        off = (found.double() - wanted.double()).abs().max() / wanted.double().abs().max()
        good = bool(off <= UNITS * torch.finfo(wanted.dtype).eps) and found.dtype == wanted.dtype
        reason = f"differs by {float(off):.1e}"
    except Exception as error:  # another signature, no compiler, a dtype without a kernel
        good, reason = False, f"{type(error).__name__}: {error}"
    if not good:
        _log.info("%s runs unfused in %s: %s", type(module).__name__, what, reason)
    return good


def openings(module: Any) -> list[nn.Module]:
    """Return the layers that make gate and up, or the one that makes both."""
    together = getattr(module, "gate_up_proj", None)
    return [module.gate_proj, module.up_proj] if together is None else [together]


def gated_mlp(
    module: Any, kernels: ModuleType, products: Products | None = None
) -> Callable[..., Any] | None:
    """Return an MLP whose gate is one kernel; None where the activation is another one."""
    activation = getattr(module, "act_fn", getattr(module, "activation_fn", None))
    if not isinstance(activation, nn.SiLU) and "SiLU" not in type(activation).__name__:
        return None
    products = products or Products(None)

    def forward(x: Tensor) -> Any:
        layers = openings(module)
        opened = products.gated(layers, x)
        if opened is None:
            made = [layer(x) for layer in layers]
            gate, up = made if len(made) == 2 else made[0].chunk(2, dim=-1)
            opened = kernels.gated(gate, up)
        return products([module.down_proj], opened)[0]

    return forward


def changed(module: nn.Module) -> bool:
    """Say whether somebody replaced this instance's forward; the core's slices do not count."""
    own = module.__dict__.get("forward")
    if getattr(own, "__name__", "") == "sliced_forward":
        own = getattr(own, "__wrapped__", None)
    return own is not None and getattr(own, "__func__", None) is not type(module).forward


def tokens(channels: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return states of one token in each of two rows, [2, 1, C]."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 1, channels, generator=generator).to(device, dtype)


def _attention_case(module: Any, hidden: Tensor) -> tuple[Any, ...]:
    """Return turns, a layout and a cache whose attention shows queries, keys and values alike."""
    angle = torch.arange(module.head_dim, device=hidden.device) + torch.tensor(
        [[[0.3]], [[1.1]]], device=hidden.device
    )  # the two halves need not be turned alike
    turns = angle.cos().to(hidden.dtype), angle.sin().to(hidden.dtype)

    def attend(rank: int, query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> Tensor:
        group = query.shape[1] // key.shape[1]
        mixed = query + (2 * key - value).repeat_interleave(group, 1)
        return mixed.transpose(1, 2).contiguous()

    plan = SimpleNamespace(config=module.config)
    layer = SimpleNamespace(session=SimpleNamespace(plan=plan, attend=attend), rank=0)

    def update(key: Tensor, value: Tensor, *more: Any, **named: Any) -> tuple[KVHandle, KVHandle]:
        handle = KVHandle(layer, key, value)
        return handle, handle

    return turns, BatchLayout(None, 2, 1, 0), SimpleNamespace(update=update)


def fused_step(model: Any) -> FusedStep | None:
    """Return the fused forwards of a model on a GPU; None where Triton is missing."""
    if model.device.type != "cuda":
        return None
    try:
        from kvdock.kernels import step_triton
    except Exception:  # not installed, or broken: the model's own operations do the same
        return None
    return FusedStep(model, step_triton, products_of(model.device))
