"""A training job gives the same losses, bit for bit, wherever its large tensors live."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import egm_alloc
from tests.gpu.conftest import GIB

pytestmark = pytest.mark.gpu


def train(steps: int = 5) -> tuple[list[float], str | None]:
    torch.manual_seed(0)
    table = torch.nn.Embedding(1 << 17, 512).cuda()  # 256 MiB
    layer = torch.nn.TransformerEncoderLayer(512, 8, 1024, dropout=0.0, batch_first=True).cuda()
    parameters = [*table.parameters(), *layer.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    tokens = torch.randint(0, 1 << 17, (4, 64), device="cuda")
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = layer(table(tokens)).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, egm_alloc.info(table.weight).tier


@pytest.mark.filterwarnings("default")  # some of torch's kernels have no deterministic variant
@pytest.mark.parametrize("mode", ["tiered", "managed"])
def test_losses_are_bit_equal_to_plain_torch(budget: Callable[[int], None], mode: str) -> None:
    budget(4 * GIB)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cuda.enable_mem_efficient_sdp(False)
    try:
        egm_alloc.disable()
        plain, plain_tier = train()
        egm_alloc.enable(mode=mode)
        ours, our_tier = train()
    finally:
        torch.backends.cuda.enable_mem_efficient_sdp(True)
        torch.use_deterministic_algorithms(False)
    assert (plain_tier, our_tier) == ("device", "extended")
    assert ours == plain
