"""With vLLM itself, as far as it goes without a GPU: its block pool, and the source at hand."""

from __future__ import annotations

import importlib.metadata
from typing import Any

import pytest

from egm_alloc.vllm import contract, plugin
from egm_alloc.vllm.block_queue import HbmFirstQueue

pytest.importorskip("vllm", reason="needs vLLM")

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.filterwarnings("ignore"),  # vLLM's own, at its import
]

N, H = 16, 6


@pytest.fixture
def pool() -> Any:
    """vLLM's block pool with prefix caching, its first blocks in HBM."""
    from vllm.v1.core.block_pool import BlockPool

    pool = BlockPool(N, enable_caching=True, hash_block_size=16)
    pool.free_block_queue = HbmFirstQueue(pool.free_block_queue, H)
    return pool


def ids(blocks: list[Any]) -> list[int]:
    """Return the ids of blocks."""
    return [block.block_id for block in blocks]


def test_queue_has_every_method_of_vllms() -> None:
    from vllm.v1.core.kv_cache_utils import FreeKVCacheBlockQueue

    public = {name for name in vars(FreeKVCacheBlockQueue) if not name.startswith("_")}
    assert public <= set(dir(HbmFirstQueue))


def test_blocks_in_hbm_are_handed_out_while_any_is_free(pool: Any) -> None:
    first = pool.get_new_blocks(3)
    assert ids(first) == [1, 2, 3]  # 0 is the null block
    pool.free_blocks(reversed(first))
    assert max(ids(pool.get_new_blocks(5))) < H
    assert ids(pool.get_new_blocks(2)) == [6, 7]
    assert pool.get_num_free_blocks() == N - 1 - 7
    with pytest.raises(ValueError, match="Cannot get 9 free blocks"):
        pool.get_new_blocks(9)


def test_block_in_hbm_that_was_freed_comes_before_an_unused_extended_one(pool: Any) -> None:
    for _ in range(10):
        blocks = pool.get_new_blocks(4)
        assert max(ids(blocks)) < H
        pool.free_blocks(reversed(blocks))


def test_prefix_in_a_free_block_is_found_and_taken_out_of_the_queue(pool: Any) -> None:
    from vllm.v1.core.kv_cache_utils import BlockHash, make_block_hash_with_group_id

    blocks = pool.get_new_blocks(8)
    near, far = blocks[0], blocks[-1]
    assert near.block_id < H <= far.block_id
    for number, block in enumerate((near, far)):
        key = make_block_hash_with_group_id(BlockHash(bytes([number]) * 32), 0)
        block.set_block_hash(key)
        pool.cached_block_hash_to_block.insert(key, block)
    pool.free_blocks(reversed(blocks))
    before = pool.get_num_free_blocks()
    for number, block in enumerate((near, far)):
        found = pool.get_cached_block(BlockHash(bytes([number]) * 32), [0])
        assert found == [block]
        pool.touch(found)
    assert pool.get_num_free_blocks() == before - 2
    # The prefixes are kept until every other block of their part is taken.
    assert near.block_id not in ids(pool.get_new_blocks(4))
    pool.free_blocks([near, far])
    assert pool.reset_prefix_cache() is False  # four blocks are in use


def test_source_at_hand_is_the_one_that_was_checked() -> None:
    version = importlib.metadata.version("vllm")
    for part in (plugin.CHECKS, plugin.WEIGHTS, plugin.KV_CACHE):
        needs = (*part.needs, *contract.allocators(contract.read_installed))
        assert contract.why_not(needs, contract.read_installed, version, False) is None
