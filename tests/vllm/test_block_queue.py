"""The free queue that hands out blocks in HBM first, over a queue of vLLM's kind."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from egm_alloc.vllm.block_queue import HbmFirstQueue

N, H = 12, 5


class Block:
    """A KV block."""

    def __init__(self, block_id: int) -> None:
        self.block_id = block_id
        self.prev_free_block: Block | None = None
        self.next_free_block: Block | None = None


class Queue:
    """A queue with the methods of vLLM's, over a list."""

    def __init__(self, blocks: list[Block]) -> None:
        self._blocks = list(blocks)

    @property
    def num_free_blocks(self) -> int:
        return len(self._blocks)

    def popleft(self) -> Block:
        if not self._blocks:
            raise ValueError("No free blocks available")
        return self._blocks.pop(0)

    def popleft_n(self, n: int) -> list[Block]:
        assert n <= len(self._blocks)
        taken, self._blocks = self._blocks[:n], self._blocks[n:]
        return taken

    def remove(self, block: Block) -> None:
        self._blocks.remove(block)

    def append(self, block: Block) -> None:
        self._blocks.append(block)

    def append_n(self, blocks: list[Block]) -> None:
        self._blocks += blocks

    def prepend_n(self, blocks: list[Block]) -> None:
        self._blocks[:0] = blocks

    def get_all_free_blocks(self) -> list[Block]:
        return list(self._blocks)

    def iter_blocks_after(self, cursor: Block | None) -> Iterator[Block]:
        yield from (
            self._blocks if cursor is None else self._blocks[self._blocks.index(cursor) + 1 :]
        )


def ids(blocks: list[Block]) -> list[int]:
    return [block.block_id for block in blocks]


def queue_of(blocks: list[Block]) -> HbmFirstQueue:
    return HbmFirstQueue(Queue(blocks), H)


class Machine(RuleBasedStateMachine):
    """Against a model: one list in vLLM's order, from which HBM's blocks are taken first."""

    def __init__(self) -> None:
        super().__init__()
        blocks = [Block(i) for i in range(N)]
        self.queue = queue_of(blocks)
        self.free = list(blocks)
        self.held: list[Block] = []

    def order(self) -> list[Block]:
        return sorted(self.free, key=lambda block: block.block_id >= H)  # stable

    @rule(n=st.integers(0, N))
    def take(self, n: int) -> None:
        n = min(n, len(self.free))
        expected = self.order()[:n]
        assert self.queue.popleft_n(n) == expected
        self.free = [block for block in self.free if block not in expected]
        self.held += expected

    @precondition(lambda self: self.free)
    @rule()
    def take_one(self) -> None:
        block = self.queue.popleft()
        assert block is self.order()[0]
        self.free.remove(block)
        self.held.append(block)

    @precondition(lambda self: self.free)
    @rule(data=st.data())
    def take_a_certain_one(self, data: st.DataObject) -> None:
        block = data.draw(st.sampled_from(self.free))
        self.queue.remove(block)
        self.free.remove(block)
        self.held.append(block)

    @rule(data=st.data(), how=st.sampled_from(["append", "append_n", "prepend_n"]))
    def give_back(self, data: st.DataObject, how: str) -> None:
        if not self.held:
            return
        back = data.draw(st.lists(st.sampled_from(self.held), min_size=1, unique=True))
        for block in back:
            self.held.remove(block)
        if how == "append":
            for block in back:
                self.queue.append(block)
        else:
            getattr(self.queue, how)(back)
        self.free = back + self.free if how == "prepend_n" else self.free + back

    @invariant()
    def order_is_vllms_within_each_part(self) -> None:
        assert self.queue.num_free_blocks == len(self.free)
        expected = self.order()
        assert self.queue.get_all_free_blocks() == expected
        assert list(self.queue.iter_blocks_after(None)) == expected
        for at, cursor in enumerate(expected):
            assert list(self.queue.iter_blocks_after(cursor)) == expected[at + 1 :]


TestOrder = Machine.TestCase
TestOrder.settings = settings(max_examples=50, deadline=None)


def test_empty_queue_is_vllms_error() -> None:
    queue = queue_of([Block(i) for i in range(N)])
    queue.popleft_n(N)
    with pytest.raises(ValueError, match="No free blocks available"):
        queue.popleft()


def test_queue_of_a_pool_whose_null_block_was_taken_keeps_it_out() -> None:
    queue = queue_of([Block(i) for i in range(1, N)])
    assert ids(queue.get_all_free_blocks()) == list(range(1, N))
    assert queue.num_free_blocks == N - 1


def test_change_between_the_tiers_is_one_line_each(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    queue = queue_of([Block(i) for i in range(N)])
    with caplog.at_level("INFO", logger="vllm.egm_alloc"):
        near = queue.popleft_n(H)
        assert caplog.messages == []
        far = queue.popleft_n(2)
        queue.append_n(near)
        clock[0] += 1
        queue.append(far[0])
        assert len(caplog.messages) == 1
        queue.prepend_n([far[1]])
    assert ["extended ones are in use now" in m for m in caplog.messages] == [True, False]
    assert "no extended KV block is in use any more" in caplog.messages[1]


def test_blocks_that_come_and_go_do_not_flood_the_log(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    queue = queue_of([Block(i) for i in range(N)])
    queue.popleft_n(H)
    with caplog.at_level("INFO", logger="vllm.egm_alloc"):
        for _ in range(1000):
            queue.append(queue.popleft())
            clock[0] += 0.01
    assert len(caplog.messages) <= 4


def test_extended_block_that_was_taken_before_is_not_in_use(
    caplog: pytest.LogCaptureFixture,
) -> None:
    queue = HbmFirstQueue(Queue([Block(i) for i in range(1, N)]), 0)
    with caplog.at_level("INFO", logger="vllm.egm_alloc"):
        queue.append_n([])
    assert caplog.messages == []
