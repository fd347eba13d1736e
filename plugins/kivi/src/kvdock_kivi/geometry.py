"""Where the packed codes lie: planes of tokens inside blocks, and what they cost in memory.

A word of 16 bits holds the codes of ``planes`` tokens that stand ``plane`` tokens apart, so that
one mask turns a run of words into the codes of consecutive tokens under one key scale.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

LARGEST_BLOCK = 128
SCALE_BYTES = 2
"""Scales and zeros are float16."""


@dataclass(frozen=True, slots=True)
class Geometry:
    """Describe the packed layout of one choice of options.

    Args:
        bits: of a code, 2 or 4. group: tokens (keys) or channels (values) under one scale.
        residual: newest tokens kept as they are; keys are packed this many at a time.
    """

    bits: int
    group: int
    residual: int

    @property
    def planes(self) -> int:
        """Return the codes in a word, P."""
        return 16 // self.bits

    @property
    def plane(self) -> int:
        """Return the tokens of one plane, n: they share a key scale, and blocks fill windows."""
        return math.gcd(self.group, self.residual // self.planes, LARGEST_BLOCK // self.planes)

    @property
    def block(self) -> int:
        """Return the tokens of one block, P·n."""
        return self.planes * self.plane

    @property
    def levels(self) -> int:
        """Return the largest code, L."""
        return 2**self.bits - 1

    def key_tokens(self, tokens: int) -> int:
        """Return how many of a row's tokens have packed keys: all whole windows."""
        return tokens // self.residual * self.residual

    def value_tokens(self, tokens: int) -> int:
        """Return how many of a row's tokens have packed values: all but the last R."""
        return max(tokens - self.residual, 0)

    def value_blocks(self, tokens: int) -> int:
        """Return the blocks that the packed values of ``tokens`` tokens need."""
        return -(-self.value_tokens(tokens) // self.block)

    def rest(self, tokens: int) -> int:
        """Return the tokens that have room in full precision."""
        return min(tokens, self.residual)

    def nbytes(self, capacity: int, key_dim: int, value_dim: int, full: int) -> int:
        """Return the bytes of one row and head with room for ``capacity`` tokens.

        Args:
            key_dim: packed key channels. full: bytes of one token as it is.
        """
        keys, values = self.key_tokens(capacity), self.value_blocks(capacity) * self.block
        codes = (keys * key_dim + values * value_dim) * self.bits // 8
        scales = 2 * SCALE_BYTES * (keys * key_dim + values * value_dim) // self.group
        return codes + scales + self.rest(capacity) * full
