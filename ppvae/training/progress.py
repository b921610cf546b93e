"""Progress of a training run: a bar over epochs, and a TensorBoard log where TensorBoard is installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tqdm import tqdm

BAR = "{desc}: {n_fmt:>5}/{total_fmt} |{bar}| {remaining} left{postfix}"  # no wider than 80 columns


class Progress:
    """A progress bar over epochs with nats per datum, and a TensorBoard log in the run folder."""

    def __init__(self, epochs: int, done: int, show: bool | None, folder: Path | None):
        disable = None if show is None else not show
        self.bar = tqdm(total=epochs, initial=done, desc="fit", unit="epoch", bar_format=BAR, disable=disable)
        self.writer: Any = None
        if folder is not None:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                return
            self.writer = SummaryWriter(folder / "tensorboard", purge_step=done + 1)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()
        if self.writer is not None:
            self.writer.close()

    def show(self, metrics: dict[str, Any]) -> None:
        self.bar.update()
        self.bar.set_postfix_str(progress_words(metrics))
        if self.writer is not None:
            for name, value in metrics.items():
                if name != "epoch":
                    self.writer.add_scalar(name, value, metrics["epoch"])


def progress_words(metrics: dict[str, Any]) -> str:
    """The bound of an epoch, of the validation data where there are some, as text of constant width.

    >>> progress_words({"loss": 25.3, "valid_elbo": -26.08, "valid_rate": 7.5, "valid_distortion": 18.58})
    'ELBO   -26.08, rate    7.50 nats'
    >>> progress_words({"loss": 25.3})
    'loss    25.30 nats'
    """
    split = "valid" if "valid_elbo" in metrics else "train"
    names = {"ELBO": f"{split}_elbo", "rate": f"{split}_rate"}
    shown = [f"{label} {metrics[name]:8.2f}" for label, name in names.items() if name in metrics]
    return ", ".join(shown or [f"loss {metrics['loss']:8.2f}"]) + " nats"
