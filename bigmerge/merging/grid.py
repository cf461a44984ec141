"""The sizes in which tensors are worked on, in elements counted from each tensor's first."""

from __future__ import annotations

from bigmerge.storage.digests import PIECE

#: what the journal records, what is digested as one piece; whole blocks
STEP = PIECE
#: What is computed at a time, by preference. Every operation of the interpreter's lock costs
#: the same, however long the block, and several threads compete for it; a block and its scratch buffers should
#: fit the cache. Elementwise arithmetic gives the same bytes for all of them: vectorised loops treat a tensor's last
#: few elements differently, and these are the same few whatever the block.
BLOCKS = (1 << 19, 1 << 18, 1 << 17, 1 << 16)
#: What is read past the page cache at a time: whole blocks, and long requests, for nobody reads ahead there.
DIRECT_WINDOWS = (STEP, STEP // 2, STEP // 4)
#: the block of sums over whole tensors, which do depend on it
SUM_BLOCK = 1 << 18
