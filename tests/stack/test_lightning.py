"""Lightning: automatic and manual optimization, clipping by the trainer, resuming bit for bit."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from programs import FIRST_ORDER, OURS, TWINS, Words, assert_same_model, bags, batch, build, exact_adamw, network
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    lightning = pytest.importorskip("lightning", reason="needs pip install 'descend[stack]'")
    from lightning.pytorch.plugins import MixedPrecision

# Their advice, and their dependencies' deprecations; but not what we say, nor schedulers that see no step.
pytestmark = pytest.mark.filterwarnings("ignore", "error:::descend", "error:Detected call of `lr_scheduler.step")


QUIET = dict(
    accelerator="cpu",
    logger=False,
    enable_progress_bar=False,
    enable_model_summary=False,
    enable_checkpointing=False,
)


class Training(lightning.LightningModule):
    """The small classifier, with an optimizer and a scheduler."""

    def __init__(self, kind: Any, is_manual: bool = False, options: dict[str, Any] | None = None) -> None:
        super().__init__()
        self.kind, self.options, self.automatic_optimization = kind, {"lr": 0.01, **(options or {})}, not is_manual
        self.model = network()

    def training_step(self, samples: list[Tensor], _: int) -> Tensor | None:
        inputs, classes = samples
        loss = nn.functional.cross_entropy(self.model(inputs), classes)
        if self.automatic_optimization:
            return loss
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        return None

    def configure_optimizers(self) -> Any:
        optimizer = build(self.kind, self.parameters(), **self.options)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.5)]


def fit(module: Training, folder: Path, epochs: int, resume: Path | None = None, **options: Any) -> Any:
    """Train on the same batches in the same order, and return the trainer."""
    inputs, classes = batch(0, size=32)
    trainer = lightning.Trainer(max_epochs=epochs, default_root_dir=folder, **QUIET, **options)
    trainer.fit(module, DataLoader(TensorDataset(inputs, classes), batch_size=8), ckpt_path=resume)
    assert not torch.equal(module.model[0].weight.float(), network()[0].weight)
    assert isinstance(trainer.optimizers[0], module.kind)
    return trainer


@pytest.mark.parametrize("is_manual", [False, True], ids=["automatic", "manual"])
@pytest.mark.parametrize(
    "name", [name for name in FIRST_ORDER if name in TWINS and name != "Muon"]
)  # torch's takes no biases
def test_lightning_trains_as_with_torch(name: str, is_manual: bool, tmp_path: Path) -> None:
    ours, theirs = (Training(kind, is_manual) for kind in TWINS[name])
    for module in (ours, theirs):
        fit(module, tmp_path, epochs=2, precision="64-true")
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=1e-10, atol=1e-12)  # float64, 8 steps


def test_lightning_clips_for_ours_as_for_torchs(tmp_path: Path) -> None:
    ours, theirs = (Training(kind, options={"lr": 0.5}) for kind in TWINS["SGD"])
    for module in (ours, theirs):
        fit(module, tmp_path, epochs=1, gradient_clip_val=0.05, precision="64-true")
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=1e-10, atol=1e-12)  # float64, 4 steps
    unclipped = Training(TWINS["SGD"][0], options={"lr": 0.5})
    fit(unclipped, tmp_path, epochs=1, precision="64-true")
    assert not torch.allclose(unclipped.model[0].weight, ours.model[0].weight)


def test_clipping_in_the_step_is_what_lightning_does(tmp_path: Path) -> None:
    inside = Training(OURS["SGD"], options={"lr": 0.5, "max_norm": 0.05})
    outside = Training(OURS["SGD"], options={"lr": 0.5})
    fit(inside, tmp_path, epochs=1, precision="64-true")
    fit(outside, tmp_path, epochs=1, gradient_clip_val=0.05, precision="64-true")
    torch.testing.assert_close(inside.state_dict(), outside.state_dict(), rtol=1e-10, atol=1e-12)  # float64, 4 steps


@pytest.mark.parametrize("name", FIRST_ORDER)
def test_resumed_run_equals_an_uninterrupted_one_bit_for_bit(name: str, tmp_path: Path) -> None:
    whole, first, second = (Training(FIRST_ORDER[name], options={"max_norm": 1.0}) for _ in range(3))
    fit(whole, tmp_path, epochs=4)
    saved = tmp_path / "half.ckpt"
    fit(first, tmp_path, epochs=2).save_checkpoint(saved)
    trainer = fit(second, tmp_path, epochs=4, resume=saved)
    assert trainer.global_step == 16
    assert_same_model(second, whole)


def half_precision() -> Any:
    """Autocast in float16 with a scaler; Lightning itself would take bfloat16 on a CPU."""
    return MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu"))


def test_scaler_and_fused_amp_train_alike(tmp_path: Path) -> None:
    modules = [Training(OURS["AdamW"], options={"max_norm": 0.05, "amp": amp}) for amp in ("fused", None)]
    for module in modules:
        fit(module, tmp_path, epochs=2, plugins=[half_precision()])
    torch.testing.assert_close(modules[0].state_dict(), modules[1].state_dict(), rtol=1e-5, atol=1e-6)  # float32


def test_lightning_refuses_to_clip_what_is_still_scaled(tmp_path: Path) -> None:
    fit(Training(OURS["SGD"]), tmp_path, epochs=1, plugins=[half_precision()], gradient_clip_val=0.05)
    with pytest.raises(RuntimeError, match="SGD, does not allow for gradient clipping"):
        fit(
            Training(OURS["SGD"], options={"amp": "fused"}),
            tmp_path,
            epochs=1,
            plugins=[half_precision()],
            gradient_clip_val=0.05,
        )


def test_lbfgs_refuses_lightnings_scaler(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="LBFGS does not work with GradScaler"):
        fit(Training(OURS["LBFGS"]), tmp_path, epochs=1, plugins=[half_precision()])


class WordTraining(lightning.LightningModule):
    """Bags of words, with a sparse table or a dense one."""

    def __init__(self, is_sparse: bool) -> None:
        super().__init__()
        self.is_sparse, self.model = is_sparse, Words(is_sparse).double()

    def training_step(self, samples: list[Tensor], _: int) -> Tensor:
        return self.model(*samples)["loss"]

    def configure_optimizers(self) -> Any:
        if not self.is_sparse:
            optimizer: Any = torch.optim.AdamW(self.model.parameters(), lr=0.01, weight_decay=0.1)
        else:
            optimizer = exact_adamw(self.model)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.5)]


def fit_words(is_sparse: bool, folder: Path, epochs: int, resume: Path | None = None, save: Path | None = None) -> Any:
    module = WordTraining(is_sparse)
    trainer = lightning.Trainer(max_epochs=epochs, default_root_dir=folder, **QUIET)
    trainer.fit(module, DataLoader(TensorDataset(*bags()), batch_size=4), ckpt_path=resume)
    if save:
        trainer.save_checkpoint(save)
    if is_sparse:
        trainer.optimizers[0].settle()
    return module


def test_exact_sparse_training_is_dense_training_and_resumes(tmp_path: Path) -> None:
    dense, sparse = (fit_words(is_sparse, tmp_path, epochs=4) for is_sparse in (False, True))
    torch.testing.assert_close(sparse.state_dict(), dense.state_dict(), rtol=1e-8, atol=1e-10)  # float64, 32 steps
    fit_words(True, tmp_path, epochs=2, save=tmp_path / "half.ckpt")
    resumed = fit_words(True, tmp_path, epochs=4, resume=tmp_path / "half.ckpt")
    torch.testing.assert_close(resumed.state_dict(), dense.state_dict(), rtol=1e-8, atol=1e-10)


def test_lightning_gives_lbfgs_its_closure(tmp_path: Path) -> None:
    module = Training(OURS["LBFGS"], options={"lr": 0.5})
    trainer = fit(module, tmp_path, epochs=1)
    assert trainer.optimizers[0].result.n_eval > 1
