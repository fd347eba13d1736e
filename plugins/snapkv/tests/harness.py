"""SnapKV on one layer of the core, without a model around it."""

from kvdock.testing_layers import LayerDriver, random_states
from kvdock_snapkv.options import SnapKVOptions
from kvdock_snapkv.policy import SnapKVPolicy


def make_layer(budget, *, params=None, **options):
    return LayerDriver(SnapKVPolicy(SnapKVOptions(**options)), budget, params=params)


def states(seed, *, rows=1, kv_heads=2, group=2, columns=60, head_dim=64, sharpness=1.0):
    """Return random q, k, v; ``sharpness`` spreads the logits."""
    q, k, v = random_states(seed, rows, kv_heads, group, columns, head_dim)
    return q * sharpness, k, v
