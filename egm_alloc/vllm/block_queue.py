"""The queue of free KV blocks that hands out blocks in HBM while any is free.

It stands in for vLLM's own queue (``FreeKVCacheBlockQueue`` in ``vllm/v1/core/kv_cache_utils.py``)
in one block pool, and is made of two of them, so each part keeps vLLM's order.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

logger = logging.getLogger("vllm.egm_alloc")

# At a load that HBM just holds, blocks of both kinds come and go in every step.
_LEAST_SECONDS_BETWEEN_LINES = 10.0


class HbmFirstQueue:
    """Free blocks: those in HBM first, then the extended ones, each in vLLM's own order.

    Parameters
    ----------
    queue : FreeKVCacheBlockQueue
        vLLM's; its blocks move here, and it must not be used any more.
    hbm_blocks : int
        Blocks with ids below this one are in HBM.

    Attributes
    ----------
    most_extended : int
        The most extended blocks that were in use at a time.
    """

    def __init__(self, queue: Any, hbm_blocks: int) -> None:
        blocks = queue.get_all_free_blocks()
        for block in blocks:
            block.prev_free_block = block.next_free_block = None
        make: Callable[[list[Any]], Any] = type(queue)
        near = [block for block in blocks if block.block_id < hbm_blocks]
        far = [block for block in blocks if block.block_id >= hbm_blocks]
        self._hbm_blocks = hbm_blocks
        self._near = make(near)
        self._far = make(far)
        # Blocks that were taken before, such as vLLM's null block, never come back.
        self._most_far = self._far.num_free_blocks
        self.most_extended = 0
        self._extended_in_use = False
        self._last_line = -_LEAST_SECONDS_BETWEEN_LINES

    @property
    def num_free_blocks(self) -> int:
        """The number of all free blocks."""
        return int(self._near.num_free_blocks + self._far.num_free_blocks)

    def popleft(self) -> Any:
        """Take the next block."""
        return self.popleft_n(1)[0] if self.num_free_blocks else self._near.popleft()

    def popleft_n(self, n: int) -> list[Any]:
        """Take the next `n` blocks."""
        near = min(n, self._near.num_free_blocks)
        blocks: list[Any] = self._near.popleft_n(near)
        if n > near:
            blocks += self._far.popleft_n(n - near)
            self._far_taken()
        return blocks

    def remove(self, block: Any) -> None:
        """Take a certain block, which is free but still holds a prefix."""
        self._part_of(block).remove(block)
        self._far_taken()

    def append(self, block: Any) -> None:
        """Give a block back, to be taken last of its part."""
        self._part_of(block).append(block)
        self._say_if_changed()

    def append_n(self, blocks: list[Any]) -> None:
        """Give blocks back, to be taken last of their part."""
        for part, of_part in self._parted(blocks):
            part.append_n(of_part)
        self._say_if_changed()

    def prepend_n(self, blocks: list[Any]) -> None:
        """Give blocks back, to be taken first of their part."""
        for part, of_part in self._parted(blocks):
            part.prepend_n(of_part)
        self._say_if_changed()

    def get_all_free_blocks(self) -> list[Any]:
        """Return the free blocks in the order in which they will be taken."""
        return [*self._near.get_all_free_blocks(), *self._far.get_all_free_blocks()]

    def iter_blocks_after(self, cursor: Any | None) -> Iterator[Any]:
        """Iterate over the free blocks behind one of them, in that order; None for all."""
        if cursor is None or cursor.block_id < self._hbm_blocks:
            yield from self._near.iter_blocks_after(cursor)
            cursor = None
        yield from self._far.iter_blocks_after(cursor)

    def _part_of(self, block: Any) -> Any:
        return self._near if block.block_id < self._hbm_blocks else self._far

    def _parted(self, blocks: Sequence[Any]) -> Iterator[tuple[Any, list[Any]]]:
        for part in (self._near, self._far):
            of_part = [block for block in blocks if self._part_of(block) is part]
            if of_part:
                yield part, of_part

    def _far_taken(self) -> None:
        self.most_extended = max(self.most_extended, self._most_far - self._far.num_free_blocks)
        self._say_if_changed()

    def _say_if_changed(self) -> None:
        in_use = self._far.num_free_blocks < self._most_far
        if in_use == self._extended_in_use:
            return
        now = time.monotonic()
        if in_use and now - self._last_line < _LEAST_SECONDS_BETWEEN_LINES:
            return  # said with the first change after that
        self._last_line = now
        self._extended_in_use = in_use
        if in_use:
            logger.info("egm_alloc: HBM's KV blocks are all taken; extended ones are in use now")
        else:
            logger.info("egm_alloc: no extended KV block is in use any more")
