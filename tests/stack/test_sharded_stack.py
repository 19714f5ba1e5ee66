"""FSDP2 through Accelerate and Lightning, on two ranks of a CPU.

Accelerate chooses FSDP2 on accelerators only: on a CPU it would take DDP. Told otherwise, it does all of it there:
shard the model, and put the sharded parameters into an optimizer that was made with the whole ones.
"""

from __future__ import annotations

import os
import warnings
from typing import Any

import pytest
import torch
from programs import batch, network
from ranks import on_ranks
from sharded import whole
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from descend import AdamW

for package in ("accelerate", "lightning"):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip(package, reason="needs pip install 'descend[stack]'")

STEPS = 4
OPTIONS: dict[str, Any] = dict(lr=0.01, weight_decay=0.1)


def alone() -> nn.Module:
    """The model after the same training in one process, by torch."""
    model = network().double()
    optimizer = torch.optim.AdamW(model.parameters(), **OPTIONS)
    for seed in range(STEPS):
        optimizer.zero_grad()
        loss_in(model, seed).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
    return model


def loss_in(model: nn.Module, seed: int) -> Tensor:
    inputs, classes = batch(seed)
    return nn.functional.cross_entropy(model(inputs.double()), classes)


def assert_trained(model: nn.Module, is_sharded: bool) -> None:
    for ours, theirs in zip(model.parameters(), alone().parameters(), strict=True):
        assert hasattr(ours, "placements") == is_sharded
        torch.testing.assert_close(whole(ours), theirs.detach(), rtol=1e-12, atol=1e-12)


def through_accelerate(rank: int, is_sharded: bool) -> None:
    import accelerate
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")  # asked for, though the group exists already
    try:
        accelerator = accelerate.Accelerator(cpu=True)
        assert accelerator.num_processes == 2
        if is_sharded:
            accelerator.state.distributed_type = DistributedType.FSDP
            accelerator.state.fsdp_plugin = accelerate.FullyShardedDataParallelPlugin(
                fsdp_version=2, reshard_after_forward=True, auto_wrap_policy="no_wrap"
            )
        model = network().double()
        optimizer = AdamW(model.parameters(), max_norm=0.1, **OPTIONS)
        model, optimizer = accelerator.prepare(model, optimizer)
        for seed in range(STEPS):
            optimizer.zero_grad()
            accelerator.backward(loss_in(model, seed))
            optimizer.step()
        assert {placement.backend for placement in optimizer.optimizer.backends()} == {"cpu"}
        assert_trained(model, is_sharded)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("is_sharded", [True, False], ids=["FSDP2", "DDP"])
def test_accelerate_on_two_ranks(is_sharded: bool) -> None:
    on_ranks(2, through_accelerate, is_sharded)


def through_lightning(rank: int) -> None:
    import lightning
    from lightning.pytorch.strategies import ModelParallelStrategy
    from torch.distributed.fsdp import fully_shard

    class Training(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = network().double()

        def configure_model(self) -> None:
            fully_shard(self.model, mesh=self.device_mesh["data_parallel"])

        def training_step(self, samples: list[Tensor], index: int) -> Tensor:
            return loss_in(self.model, index)

        def configure_optimizers(self) -> Any:
            return AdamW(self.parameters(), max_norm=0.1, **OPTIONS)

    module = Training()
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1),
        max_steps=STEPS,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    trainer.fit(module, DataLoader(TensorDataset(torch.zeros(2 * STEPS))))
    assert_trained(module.model, True)


def test_lightning_shards_a_model_on_two_ranks() -> None:
    on_ranks(2, through_lightning)
