"""Sharded weights (FSDP1 and FSDP2, two processes on CPU): the gradients of an uncompressed run, the weights for free.

A sharded module's weights are gathered before it runs, and their storage is emptied after: before its backward they are
gathered again. So a weight can be referred to where its own module saves it, but what another module saves must not be
made again from it.
"""

import logging
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.multiprocessing
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_tinykg import Ledger, TinyKGCallback, compress_activations
from lightning_tinykg.activations.storages import is_freed

pytestmark = [
    pytest.mark.ddp,
    pytest.mark.timeout(120),
    pytest.mark.skipif(not distributed.is_available(), reason="no torch.distributed"),
]

WIDTH, ROWS = 64, 100


class Block(nn.Module):
    """Saves its weights in several ways: a product with a view, a norm's weight and bias, an elementwise product."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)
        self.scale = nn.Parameter(torch.rand(WIDTH) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm(self.linear(x)).tanh() * self.scale


class Table(nn.Module):
    """Rows of an embedding, of which some are saved in here, and some by who gets them."""

    def __init__(self) -> None:
        super().__init__()
        self.rows, self.scale = nn.Embedding(50, WIDTH), nn.Parameter(torch.rand(WIDTH) + 0.5)

    def forward(self, index: Tensor) -> tuple[Tensor, Tensor]:
        rows = self.rows(index)
        return rows, rows * self.scale


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = Table()
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(WIDTH, 8)

    def forward(self, index: Tensor, x: Tensor) -> Tensor:
        rows, scaled = self.table(index)
        for block in self.blocks:
            x = block(x * rows)
        # a tensor: calls of modules and functions are untyped
        return self.head(x * scaled)  # type: ignore[no-any-return]


# -- two processes --------------------------------------------------------------------------------------------------


def on_two_processes(function: Callable[..., None], *args: Any) -> None:
    """Run a function on two forked processes of one group; an assertion in any of them is raised here."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.start_processes(  # type: ignore[attr-defined]  # public, and not exported
        _start, args=(port, function, *args), nprocs=2, start_method="fork"
    )


def _start(rank: int, port: int, function: Callable[..., None], *args: Any) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"LOCAL_RANK": str(rank), "NODE_RANK": "0"}
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", rank=rank, world_size=2)
    try:
        function(*args)
    finally:
        distributed.destroy_process_group()


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# -- plain PyTorch --------------------------------------------------------------------------------------------------


def fsdp2(**options: Any) -> nn.Module:
    model, mesh = Net(), init_device_mesh("cpu", (2,))
    for part in (model.table, *model.blocks, model.head):
        fully_shard(part, mesh=mesh, **options)
    fully_shard(model, mesh=mesh, **options)
    return model


def fsdp1() -> nn.Module:
    policy = ModuleWrapPolicy({Table, Block})
    return FullyShardedDataParallel(Net(), auto_wrap_policy=policy, device_id=torch.device("cpu"), use_orig_params=True)


def whole(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def steps(
    model: nn.Module, bits: int | None, number: int = 2, recompute: str = "cheap"
) -> tuple[list[Tensor], list[Tensor], list[Ledger]]:
    """Each step's gradients, the weights after the last, and each step's ledger."""
    generator = torch.Generator().manual_seed(distributed.get_rank())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    context = None if bits is None else compress_activations(bits, recompute=recompute)
    grads, ledgers = [], []
    for _ in range(number):
        index = torch.randint(50, (ROWS,), generator=generator)
        x, y = torch.randn(ROWS, WIDTH, generator=generator), torch.randn(ROWS, 8, generator=generator)
        optimizer.zero_grad()
        if context is None:
            loss = F.mse_loss(model(index, x).float(), y)
        else:
            with context as ledger:
                loss = F.mse_loss(model(index, x).float(), y)
            ledgers.append(ledger)
        loss.backward()
        shards = [p.grad for p in model.parameters() if p.grad is not None and p.grad.numel()]
        grads.append(torch.cat([whole(g).flatten() for g in shards]))
        optimizer.step()
    return grads, [whole(p) for p in model.parameters()], ledgers


def assert_same_gradients(make: Callable[[], nn.Module], weight_shapes: set[tuple[int, ...]], sharded: bool) -> None:
    want, weights, _ = steps(make(), None)
    exact, exact_weights, ledgers = steps(make(), 32)
    assert all(torch.equal(a, b) for a, b in zip(exact, want, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(exact_weights, weights, strict=True))
    for a, b in zip(steps(make(), 8)[0], want, strict=True):
        assert float((a - b).norm() / b.norm()) < 0.05
    rounded, rounded_weights, rounded_ledgers = steps(make(), 8, recompute="off")
    for a, b in zip(rounded, want, strict=True):
        assert 0 < float((a - b).norm() / b.norm()) < 0.05
    for ledger in (*ledgers, *rounded_ledgers):  # the first step, in which FSDP makes its buffers, is no exception
        of_weights = [entry for entry in ledger if entry.shape in weight_shapes]
        assert len(of_weights) >= 6
        assert {(entry.codec, entry.raw_bytes, entry.stored_bytes) for entry in of_weights} == {("held", 0, 0)}
    assert ledgers[0].raw_bytes == ledgers[1].raw_bytes == rounded_ledgers[0].raw_bytes
    if not sharded:
        return
    for tensor in rounded_weights:  # gathered from both ranks, so the same on both
        other = tensor.clone()
        distributed.broadcast(other, 0)
        assert torch.equal(tensor, other)


WEIGHTS = {(WIDTH, WIDTH), (WIDTH,), (WIDTH, 8)}


@pytest.mark.parametrize("reshard", [True, False])
def test_fsdp2(reshard: bool) -> None:
    on_two_processes(_fsdp2, {"reshard_after_forward": reshard})


def test_fsdp2_in_mixed_precision() -> None:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    on_two_processes(_fsdp2, {"reshard_after_forward": True, "mp_policy": policy})


def _fsdp2(options: dict[str, Any]) -> None:
    assert_same_gradients(lambda: fsdp2(**options), WEIGHTS, sharded=True)


def test_fsdp1() -> None:
    on_two_processes(_fsdp1)


def _fsdp1() -> None:
    assert_same_gradients(fsdp1, WEIGHTS, sharded=False)


def test_gathered_weights_are_freed_after_the_forward() -> None:
    """What is kept by reference does not keep their memory, and finds it again when it has been gathered again."""
    on_two_processes(_freed)


def _freed() -> None:
    model = fsdp2(reshard_after_forward=True)
    gathered: list[Tensor] = []
    assert isinstance(model, Net)
    for block in model.blocks:
        block.norm.register_forward_pre_hook(lambda norm, args: gathered.append(norm.weight))
    with compress_activations(8):
        loss = model(torch.arange(50), torch.randn(50, WIDTH)).square().mean()
    assert len(gathered) == 3
    assert all(is_freed(weight) for weight in gathered)
    loss.backward()


def test_modules_go_by_the_class_they_were_written_as() -> None:
    """FSDP2 makes an FSDPBlock of a Block."""
    on_two_processes(_classes)


def _classes() -> None:
    model = fsdp2()
    assert type(model.get_submodule("head")).__name__ == "FSDPLinear"
    with compress_activations(8, modules=["Block"], root=model) as ledger:
        model(torch.arange(50), torch.randn(50, WIDTH)).square().mean()
    kept = {(entry.module.partition(".")[0], entry.codec) for entry in ledger if entry.shape == (50, WIDTH)}
    assert {("blocks", "int8"), ("Net", "exact")} <= kept
    assert ("Net", "int8") not in kept


# -- Lightning ------------------------------------------------------------------------------------------------------


class Module(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = Net()
        self.grads: list[Tensor] = []

    def configure_model(self) -> None:
        mesh = self.device_mesh["data_parallel"]  # type: ignore[index]  # as it was made here
        for part in (self.net.table, *self.net.blocks, self.net.head, self.net):
            fully_shard(part, mesh=mesh)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        index, x, y = batch
        # the penalty's parameters are DTensors here: no module is running
        penalty = sum(whole_sum(p) for p in self.parameters())
        return F.mse_loss(self.net(index, x), y) + 1e-4 * penalty

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.grads.append(torch.cat([whole(p.grad).flatten() for p in self.parameters()]))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)

    def train_dataloader(self) -> Any:
        generator = torch.Generator().manual_seed(1)
        index = torch.randint(50, (256,), generator=generator)
        x, y = torch.randn(256, WIDTH, generator=generator), torch.randn(256, 8, generator=generator)
        return DataLoader(TensorDataset(index, x, y), batch_size=32)


def whole_sum(parameter: Tensor) -> Tensor:
    # a tensor: calls of modules and functions are untyped
    return parameter.square().sum().full_tensor()  # type: ignore[operator,no-any-return]


def fit(bits: int | None, **options: Any) -> tuple[Module, TinyKGCallback | None]:
    callback = None if bits is None else TinyKGCallback(bits, **options)
    strategy = ModelParallelStrategy(2, 1, process_group_backend="gloo")
    trainer = L.Trainer(
        callbacks=[callback] if callback else [],
        strategy=strategy,
        accelerator="cpu",
        devices=2,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        max_epochs=1,
    )
    module = Module()
    trainer.fit(module)
    assert torch._C._autograd._top_saved_tensors_default_hooks(True) is None
    assert not nn.modules.module._global_forward_hooks
    return module, callback


def test_model_parallel_strategy(tmp_path: Path) -> None:
    on_two_processes(_model_parallel)


def _model_parallel() -> None:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    plain, _ = fit(None)
    exact, _ = fit(32, summary=False)
    assert len(plain.grads) == 4
    assert all(torch.equal(a, b) for a, b in zip(exact.grads, plain.grads, strict=True))
    rounded, callback = fit(8, summary=False, modules=["!Linear"])
    for a, b in zip(rounded.grads, plain.grads, strict=True):
        assert 0 < float((a - b).norm() / b.norm()) < 0.05
    assert callback is not None
    assert callback.largest is not None
    entries = list(callback.largest)
    of_weights = {(e.codec, e.raw_bytes, e.stored_bytes) for e in entries if e.shape in WEIGHTS}
    assert of_weights == {("held", 0, 0), ("reference", 0, 0)}  # the latter are the penalty's
    of_norm = {e.codec for e in entries if e.module == "net.blocks.1.norm" and e.shape == (32, WIDTH)}
    assert of_norm in ({"int8"}, {"recipe"})
    for parameter in rounded.parameters():
        other = whole(parameter)
        distributed.broadcast(other, 0)
        assert torch.equal(other, whole(parameter))
