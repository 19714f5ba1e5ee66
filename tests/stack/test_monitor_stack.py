"""The monitor with Lightning, transformers, TensorBoard, trackio and Weights & Biases; none of them needs a network."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import give_grads, params_of
from programs import batch, network
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from descend import AdamW, Monitor

# Their advice, and their dependencies' deprecations; but not what we say.
pytestmark = pytest.mark.filterwarnings("ignore", "error:::descend")


def imported(name: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(name, reason="needs pip install 'descend[stack]'")


def train(monitor: Monitor, steps: int = 4) -> None:
    for seed in range(steps):
        give_grads(params_of(monitor.optimizer), seed)
        monitor.optimizer.step()


def test_lightning_logs_every_optimizer(tmp_path: Path) -> None:
    lightning = imported("lightning")

    class Training(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.model = network()

        def training_step(self, samples: list[Tensor], _: int) -> Tensor:
            return nn.functional.cross_entropy(self.model(samples[0]), samples[1])

        def configure_optimizers(self) -> Any:
            return AdamW(self.parameters(), lr=0.01)

    logger = lightning.pytorch.loggers.CSVLogger(tmp_path)
    callback = Monitor.lightning_callback(every=2)
    trainer = lightning.Trainer(
        max_epochs=2,
        default_root_dir=tmp_path,
        accelerator="cpu",
        logger=logger,
        callbacks=[callback],
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    trainer.fit(Training(), DataLoader(TensorDataset(*batch(0, size=32)), batch_size=8))
    (monitor,) = callback.monitors
    assert monitor.step == 8
    assert monitor.optimizer.observer is None, "closed"
    assert "model.0" in monitor.read()["layers"]
    logger.save()
    written = Path(logger.log_dir, "metrics.csv").read_text()
    assert "update_ratio/model.0" in written.splitlines()[0]
    assert len(written.splitlines()) == 5


def test_transformers_keep_the_samples_in_their_history(tmp_path: Path) -> None:
    transformers = imported("transformers")
    imported("accelerate")
    from test_transformers import Sentences, arguments, tiny_model

    callback = Monitor.transformers_callback(every=3)
    trainer = transformers.Trainer(
        model=(model := tiny_model()),
        args=arguments(tmp_path),
        train_dataset=Sentences(),
        optimizers=(AdamW(model.parameters(), lr=0.01), None),
        callbacks=[callback],
    )
    trainer.train()
    (monitor,) = callback.monitors
    assert (monitor.step, monitor.optimizer.observer) == (6, None)
    logged = [entry for entry in trainer.state.log_history if "update_norm" in entry]
    assert [entry["step"] for entry in logged] == [3, 6]
    assert "grad_norm/transformer.h.0.attn.c_attn" in logged[0]


def test_callbacks_refuse_optimizers_of_others(tmp_path: Path) -> None:
    imported("transformers")
    weight = torch.zeros(2, requires_grad=True)
    callback = Monitor.transformers_callback()
    state = type("State", (), {"global_step": 0, "log_history": []})()
    with pytest.raises(TypeError, match=r"Monitor takes an optimizer of descend .* got torch\.optim\.sgd\.SGD"):
        callback.on_train_begin(None, state, None, model=nn.Linear(1, 1), optimizer=torch.optim.SGD([weight]))


def test_tensorboard_reads_what_was_written(tmp_path: Path) -> None:
    imported("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    board = SummaryWriter(str(tmp_path))
    monitor = Monitor(AdamW(network()), every=2, to=board)
    train(monitor)
    board.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    scalars = events.Scalars("update_ratio/0")
    assert [scalar.step for scalar in scalars] == [2, 4]
    assert scalars[-1].value == pytest.approx(monitor.read()["layers"]["0"]["update_ratio"])


def test_weights_and_biases_takes_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = imported("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    run = wandb.init(mode="disabled", project="monitor", dir=str(tmp_path))
    seen: list[Any] = []
    log = run.log
    monkeypatch.setattr(run, "log", lambda metrics, step: (seen.append((metrics, step)), log(metrics, step=step)))
    monitor = Monitor(AdamW(network()), every=2, to=run)
    train(monitor)
    run.finish()
    assert [step for _, step in seen] == [2, 4]


def test_trackio_stores_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path))
    trackio = imported("trackio")
    from trackio.sqlite_storage import SQLiteStorage

    run = trackio.init(project="monitor", name="run", embed=False, auto_log_gpu=False, auto_log_cpu=False)
    monitor = Monitor(AdamW(network()), every=2, to=run)
    train(monitor)
    trackio.finish()
    stored = SQLiteStorage.get_logs("monitor", "run")
    assert [entry["step"] for entry in stored] == [2, 4]
    assert stored[-1]["grad_norm/0"] == monitor.read()["layers"]["0"]["grad_norm"]
    assert (tmp_path / "monitor.db").exists()
