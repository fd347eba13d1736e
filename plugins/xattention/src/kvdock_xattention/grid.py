"""Where tiles of S tokens and blocks of them lie on the grid of absolute positions."""

from dataclasses import dataclass

from kvdock.kernels.blocks import BLOCK, BlockGrid


@dataclass(frozen=True, slots=True)
class TileGrid:
    """Place Q queries at the end of N keys on the grid of tiles.

    Tile t of the keys holds positions t·S … t·S + S − 1. Tiles of queries are counted from the
    start of the first query's block; those before the first query are empty.
    """

    queries: int
    keys: int
    stride: int
    block: int = BLOCK

    @property
    def blocks(self) -> BlockGrid:
        """Return the grid of blocks."""
        return BlockGrid(self.queries, self.keys, self.block)

    @property
    def per_block(self) -> int:
        """Return the tiles of a block."""
        return self.block // self.stride

    @property
    def lead(self) -> int:
        """Return how many tokens of the first query's block precede it."""
        return (self.keys - self.queries) % self.block

    @property
    def empty(self) -> int:
        """Return the query tiles that precede the first query."""
        return self.lead // self.stride

    @property
    def first(self) -> int:
        """Return the key tile that query tile 0 stands at."""
        return self.blocks.first * self.per_block

    @property
    def key_tiles(self) -> int:
        """Return the number of tiles that hold a key."""
        return -(-self.keys // self.stride)

    @property
    def query_tiles(self) -> int:
        """Return the number of query tiles, empty ones included."""
        return self.key_tiles - self.first
