"""Tell which heads of every layer this process holds, where several processes share a model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
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
        kv_heads: key/value heads of this part; None where a process has the model to itself.
    """

    rank: int = 0
    size: int = 1
    group: Any = None
    kv_heads: int | None = None

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

    def check(self, kv_heads: int) -> None:
        """Raise where a layer brings other key/value heads than those this part was taken for."""
        if self.kv_heads not in (None, kv_heads):
            import transformers

            raise UnsupportedError(
                f"a layer brings {kv_heads} key/value heads to this process, and {self.kv_heads}"
                f" were expected of part {self.rank + 1} of {self.size}: transformers"
                f" {transformers.__version__} splits this model in a way kvdock does not know."
                " Spread it by layers (device_map), or split it with a newer transformers."
            )


WHOLE = HeadShard()
"""What a process holds that has the model to itself."""


def find_shard(model: Any, config: Any) -> HeadShard:
    """Return this process's part of the model's heads, as transformers has split its weights."""
    import torch.distributed

    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return WHOLE
    from kvdock import compat

    for name, module in model.named_modules():
        if not type(module).__name__.endswith("Attention"):
            continue
        for inner, layer in module.named_modules(prefix=name):
            if compat.splits_states(model, inner, layer) is False:
                continue
            for mesh, split in _splits(layer):
                return _checked(_part(mesh, split), config)
    # a plan that is not understood shows in the heads that arrive
    return WHOLE if (getattr(model, "tp_size", None) or 1) == 1 else _checked(WHOLE, config)


def _splits(layer: Any) -> Iterator[tuple[Any, list[int]]]:
    """Return the mesh of processes, and its dimensions that split the layer's own weights."""
    from torch.distributed.tensor import DTensor, Shard

    from kvdock import compat

    for weight in layer.parameters(recurse=False):
        if isinstance(weight, DTensor):
            split = [dim for dim, place in enumerate(weight.placements) if isinstance(place, Shard)]
            if split:
                yield weight.device_mesh, split
    mesh = compat.plain_mesh(layer)
    if mesh is not None:
        yield mesh, [0]


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
    return replace(shard, kv_heads=kv_heads // shard.size)
