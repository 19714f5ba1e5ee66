"""The Trainer of transformers: an optimizer handed in, checkpoints, resuming from a folder."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from programs import EXACT_TWINS, FIRST_ORDER, assert_same_model, build, params_for
from torch import Tensor

from descend import AdamW

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    transformers = pytest.importorskip("transformers", reason="needs pip install 'descend[stack]'")
    pytest.importorskip("accelerate", reason="needs pip install 'descend[stack]'")

# Their advice, and their dependencies' deprecations; but not what we say, nor schedulers that see no step.
pytestmark = pytest.mark.filterwarnings("ignore", "error:::descend", "error:Detected call of `lr_scheduler.step")

STEPS = 6


class Sentences(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Random tokens, the same every time."""

    def __init__(self) -> None:
        self.tokens = torch.randint(0, 20, (8, 6), generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.tokens[index], "labels": self.tokens[index]}


def tiny_model() -> Any:
    """A language model with random weights: nothing is downloaded."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=20, n_positions=8, n_embd=8, n_layer=1, n_head=2, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
    )
    return transformers.GPT2LMHeadModel(config)


def arguments(folder: Path, **options: Any) -> Any:
    return transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        save_steps=STEPS // 2,
        per_device_train_batch_size=4,
        learning_rate=0.01,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        logging_strategy="no",
        **options,
    )


def train(kind: Any, folder: Path, resume: str | None = None) -> Any:
    """Train and return the trainer; a checkpoint is written half-way."""
    model = tiny_model()
    optimizer = build(kind, params_for(kind, model), lr=0.01)
    trainer = transformers.Trainer(
        model=model, args=arguments(folder), train_dataset=Sentences(), optimizers=(optimizer, None)
    )
    trainer.train(resume_from_checkpoint=resume)
    assert type(trainer.optimizer.optimizer) is kind  # Accelerate's wrapper holds it
    assert not any(map(torch.equal, model.parameters(), tiny_model().parameters()))
    return trainer


def test_trainer_makes_the_optimizer_of_a_class_it_is_given(tmp_path: Path) -> None:
    trainer = transformers.Trainer(
        model=tiny_model(),
        args=arguments(tmp_path, weight_decay=0.1),
        train_dataset=Sentences(),
        optimizer_cls_and_kwargs=(AdamW, dict(lr=0.01, max_norm=1.0, nonfinite="raise")),
    )
    trainer.train()
    optimizer = trainer.optimizer.optimizer
    assert type(optimizer) is AdamW
    assert (optimizer.max_norm, optimizer.nonfinite) == (1.0, "raise")
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]  # the Trainer's own groups
    assert all(float(state["step"]) == STEPS for state in optimizer.state.values())


@pytest.mark.parametrize("name", [name for name in FIRST_ORDER if name in EXACT_TWINS])
def test_trainer_trains_as_with_torch(name: str, tmp_path: Path) -> None:
    ours, theirs = (train(kind, tmp_path / kind.__module__).model for kind in EXACT_TWINS[name])
    for (key, mine), his in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        if key.endswith("attn.c_attn.bias"):
            continue  # the gradient of the keys' bias is zero but for rounding, which adaptive methods blow up
        torch.testing.assert_close(mine, his, rtol=1e-4, atol=1e-4, msg=key)  # float32, six steps of 0.01


@pytest.mark.parametrize("name", FIRST_ORDER)
def test_trainer_resumed_from_a_folder_equals_an_uninterrupted_run(name: str, tmp_path: Path) -> None:
    whole = train(FIRST_ORDER[name], tmp_path)
    resumed = train(FIRST_ORDER[name], tmp_path / "other", resume=str(tmp_path / f"checkpoint-{STEPS // 2}"))
    assert resumed.state.global_step == STEPS
    assert_same_model(resumed.model, whole.model)
