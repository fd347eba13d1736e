"""Tell which heads of every layer this process holds, where several processes share a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvdock.errors import UnsupportedError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class HeadShard:
    """Stand for one of ``size`` equal parts of a model's heads, in their order.

    Under tensor parallelism every process sees the keys, values and queries of its own heads only.
    A policy that decides per head need not know; one that counts or numbers heads asks here.

    Args:
        group: the processes that share the model, for torch.distributed.
    """

    rank: int = 0
    size: int = 1
    group: Any = None

    def place(self, heads: int) -> slice:
        """Return where this process's ``heads`` lie among the heads of all."""
        return slice(self.rank * heads, (self.rank + 1) * heads)

    def total(self, part: Tensor) -> Tensor:
        """Return the sum of every process's ``part``, the same bits in all of them."""
        if self.size == 1:
            return part
        import torch.distributed

        whole = part.clone()
        torch.distributed.all_reduce(whole, group=self.group)
        return whole


WHOLE = HeadShard()
"""What a process holds that has the model to itself."""


def find_shard(model: Any, config: Any) -> HeadShard:
    """Return this process's part of the model's heads, as transformers has split its weights."""
    import torch.distributed

    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return WHOLE
    from torch.distributed.tensor import DTensor, Shard

    for module in model.modules():
        if not type(module).__name__.endswith("Attention"):
            continue
        for weight in module.parameters():
            if not isinstance(weight, DTensor):
                continue
            split = [dim for dim, place in enumerate(weight.placements) if isinstance(place, Shard)]
            if split:
                return _checked(_part(weight.device_mesh, split), config)
    return WHOLE


def _part(mesh: Any, split: list[int]) -> HeadShard:
    names = mesh.mesh_dim_names or ()
    if "tp" in names:
        mesh = mesh["tp"]
    elif mesh.ndim > 1 or len(split) > 1:
        raise UnsupportedError(
            f"the model's attention is split over a mesh of dimensions {names or mesh.ndim}; kvdock"
            " needs to know which of them splits heads. Name it 'tp', as transformers does."
        )
    return HeadShard(mesh.get_local_rank(), mesh.size(), mesh.get_group())


def _checked(shard: HeadShard, config: Any) -> HeadShard:
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    if heads % shard.size or kv_heads % shard.size:
        raise UnsupportedError(
            f"{heads} query heads and {kv_heads} key/value heads cannot be split evenly over"
            f" {shard.size} processes. Use a divisor of {kv_heads}."
        )
    return shard
