"""The grid on which tensors are worked on. It is part of what fixes a result's bytes, and never moves."""

from __future__ import annotations

from bigmerge.storage.digests import PIECE

#: Elements of one window of input and of one block of arithmetic. Blocks are counted from each tensor's first
#: element: vectorised arithmetic rounds a block's tail differently. A block and its scratch buffers fit the cache.
BLOCK = 1 << 18
#: elements of one step: what the journal records, what is digested as one piece
STEP = PIECE
