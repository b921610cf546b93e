"""Progress of a training run: a bar over epochs, and a TensorBoard log where TensorBoard is installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tqdm import tqdm


class Progress:
    """A progress bar over epochs with nats per datum, and a TensorBoard log in the run folder."""

    def __init__(self, epochs: int, done: int, show: bool | None, folder: Path | None):
        disable = None if show is None else not show
        self.bar = tqdm(total=epochs, initial=done, desc="fit", unit="epoch", disable=disable)
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
        names = ("loss", "valid_elbo", "train_elbo", "valid_rate", "valid_distortion", "train_rate", "train_distortion")
        short = {n.removeprefix("train_").removeprefix("valid_"): f"{metrics[n]:.2f}" for n in names if n in metrics}
        self.bar.set_postfix(short)
        if self.writer is not None:
            for name, value in metrics.items():
                if name != "epoch":
                    self.writer.add_scalar(name, value, metrics["epoch"])
