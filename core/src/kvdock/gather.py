"""Move the entries a policy chose."""

from __future__ import annotations

from torch import Tensor

from kvdock.policy import Selection
from kvdock.storage import RowGroup


def gather(group: RowGroup, choice: Selection | None) -> RowGroup:
    """Take the chosen entries, with the policy's replacements for keys or values."""
    if choice is None:
        return group

    def take(tensor: Tensor) -> Tensor:
        index = choice.index.view(*choice.index.shape, *[1] * (tensor.dim() - 3))
        return tensor.gather(2, index.expand(*choice.index.shape, *tensor.shape[3:]))

    return RowGroup(
        group.rows,
        take(group.keys) if choice.keys is None else choice.keys,
        take(group.values) if choice.values is None else choice.values,
        take(group.positions),
        {name: take(state) for name, state in group.slot_state.items()} | choice.slot_state,
    )
