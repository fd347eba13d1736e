"""FlexAttention behind the block lists: whatever is asked in turn, in one process."""

from itertools import product

import pytest
import torch

from kvdock.kernels.blocks import BlockGrid
from kvdock.policy import AttentionParams

from .sparse_oracle import block_mask, oracle, random_lists, states

pytestmark = pytest.mark.versionless

USUAL_LIMIT = 8


def test_more_shapes_than_torch_compiles_by_default():
    flex = pytest.importorskip("kvdock.kernels.sparse_flex")
    programs = []

    def count(graph, inputs):
        programs.append(graph)
        return graph

    compiled = torch.compile(flex.flex_attention, dynamic=True, fullgraph=True, backend=count)
    backend = flex.FlexSparse(compiled)
    for rows, kv_heads, dim, length in product((1, 2), (1, 2), (16, 32), (1, 40)):
        grid, heads = BlockGrid(length, length, 16), 2 * kv_heads
        query, key, value = states(grid, dim, rows=rows, heads=heads, kv_heads=kv_heads)
        # every block: a program that is not lowered to a kernel attends densely
        lists = random_lists(grid, rows=rows, heads=heads, share=1.1)
        with torch.no_grad():
            found = backend.attend(query, key, value, lists, AttentionParams(dim**-0.5))
        mask = block_mask(grid, rows=rows, heads=heads, share=1.1)
        expected = oracle(query, key, value, mask, grid, dim**-0.5)
        torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)
        if len(programs) > USUAL_LIMIT:
            break
    assert len(programs) > USUAL_LIMIT
