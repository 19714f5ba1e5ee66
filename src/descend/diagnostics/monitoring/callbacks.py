"""``Monitor`` in programs that make their optimizers themselves: Lightning, and the Trainer of transformers."""

from __future__ import annotations

from importlib import import_module
from typing import Any


def lightning(cls: Any, options: dict[str, Any]) -> Any:
    """See ``Monitor.lightning_callback``."""
    base = _imported("lightning.pytorch", "Lightning").Callback

    class MonitorCallback(base):  # type: ignore[misc, valid-type]
        """See ``Monitor.lightning_callback``."""

        def __init__(self) -> None:
            self.monitors: list[Any] = []

        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            self._close()
            chosen = {"to": list(trainer.loggers), **options, "names": pl_module, "step": trainer.global_step}
            self.monitors = _monitors(cls, trainer.optimizers, chosen)

        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            self._close()

        def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
            self._close()

        def _close(self) -> None:
            for monitor in self.monitors:
                monitor.close()

    return MonitorCallback()


def transformers(cls: Any, options: dict[str, Any]) -> Any:
    """See ``Monitor.transformers_callback``."""
    base = _imported("transformers", "transformers").TrainerCallback

    class MonitorCallback(base):  # type: ignore[misc, valid-type]
        """See ``Monitor.transformers_callback``."""

        def __init__(self) -> None:
            self.monitors: list[Any] = []

        def on_train_begin(self, args: Any, state: Any, control: Any, **around: Any) -> None:
            self._close()  # an error may have ended the training before

            def log(metrics: dict[str, float], step: int) -> None:
                state.log_history.append({**metrics, "step": step})

            chosen = {"to": log, **options, "names": around["model"], "step": state.global_step}
            optimizer = around["optimizer"]  # accelerate wraps it
            self.monitors = _monitors(cls, [getattr(optimizer, "optimizer", optimizer)], chosen)

        def on_train_end(self, args: Any, state: Any, control: Any, **around: Any) -> None:
            self._close()

        def _close(self) -> None:
            for monitor in self.monitors:
                monitor.close()

    return MonitorCallback()


def _monitors(cls: Any, optimizers: list[Any], options: dict[str, Any]) -> list[Any]:
    """A monitor for each optimizer that can have one; an error if none can."""
    able = [optimizer for optimizer in optimizers if hasattr(optimizer, "observe")]
    return [cls(optimizer, **options) for optimizer in able or optimizers]


def _imported(module: str, package: str) -> Any:
    try:
        return import_module(module)
    except ImportError as error:
        raise ImportError(f"Monitor: this callback needs {package}: pip install 'descend[stack]'.") from error
