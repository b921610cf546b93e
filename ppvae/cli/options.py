"""The options of each command, with what they mean."""

from __future__ import annotations

import dataclasses
from typing import Literal


@dataclasses.dataclass(kw_only=True)
class Data:
    """Which data, and how they are read."""

    data: str = "digits"  # a name (digits, mnist, fashion-mnist, omniglot, celeba, ...) or a file or folder
    root: str | None = None  # where data sets lie; else PPVAE_DATA, else a cache folder
    binarize: Literal["none", "fixed", "dynamic"] = "fixed"  # dynamic redraws the training data at every read
    dequantize: bool = False  # add uniform noise within a grey level
    flat: bool = True  # vectors; --no-flat gives images [C, H, W]
    labels: bool = False  # pass the labels as the batch's second tensor
    missing: bool = False  # NaN in a file stands for a missing value; nothing is binarised then
    data_seed: int = 0  # of binarisation and dequantisation


@dataclasses.dataclass(kw_only=True)
class Optimizer:
    """A torch optimizer and its schedule, by the names of their classes."""

    name: str = "Adam"  # a class of torch.optim
    lr: float = 1e-3
    eps: float | None = None
    weight_decay: float | None = None
    schedule: Literal["constant", "cosine"] = "constant"  # cosine falls to zero over the epochs


@dataclasses.dataclass(kw_only=True)
class Fit(Data):
    """Train a model/guide pair with stochastic variational inference.

    Several processes share every batch: torchrun --nproc-per-node 2 -m ppvae fit PAIR.
    """

    epochs: int = 50
    batch_size: int = 100
    seed: int = 0
    optimizer: Optimizer = dataclasses.field(default_factory=Optimizer)
    clip: float | None = None  # the largest gradient norm, per datum
    compile: Literal["auto", "yes", "no"] = "auto"  # steps from a compiled graph; auto: where the run is long enough
    precision: Literal["float32", "tf32", "bf16"] = "float32"  # of products in layers; bf16 where hardware has it
    rows: int = 20_000  # the most (datum, particle) rows at once; a larger batch is cut, and gradients are added up
    patience: int | None = None  # epochs without a better validation ELBO before stopping
    device: str | None = None
    runs: str = "runs"  # the folder of runs
    name: str | None = None  # the run's name below it; made from pair and data by default
    resume: bool = False  # go on from the last checkpoint
    report: bool = True  # write report.html at the end


@dataclasses.dataclass(kw_only=True)
class Evaluate:
    """Estimate log p(x) of a run's data: by importance sampling, or by annealing, which is tighter and slower.

    An interrupted evaluation goes on with the same command. Several processes share the data:
    torchrun --nproc-per-node 2 -m ppvae evaluate RUN.
    """

    method: Literal["importance", "annealed", "smc", "bdmc"] = "importance"  # bdmc: a bracket, on simulated data
    num_particles: int | Literal["auto"] = 5000  # of importance sampling, which is run beside annealing; auto: by need
    target_std_error: float = 0.05  # of auto: of log p(x) of each datum, in nats
    max_particles: int = 20_000  # of auto: the most that a datum gets
    split: Literal["test", "valid", "train"] = "test"
    head: int | None = None  # only so many data
    seed: int = 0
    root: str | None = None
    rows: int | None = None  # the most (datum, particle) rows at once; memory is proportional to it
    precision: Literal["float32", "tf32", "bf16"] = "float32"  # of products in layers, in importance sampling
    device: str | None = None
    num_chains: int = 16  # of annealing, per datum
    num_temperatures: int = 1000  # steps from the guide (or prior) to the posterior
    start: Literal["guide", "prior"] = "guide"  # where chains start
    schedule: Literal["sigmoid", "linear", "equal_ess"] = "sigmoid"  # of inverse temperatures
    num_leapfrog: int = 10  # leapfrog steps at each temperature
    resample: float = 0.5  # of smc: chains are resampled where ess falls below this share of them
    beside: tuple[int, ...] = ()  # further K of importance sampling to set beside annealing, as 50000
    best: bool = False  # the parameters with the best validation ELBO, instead of those that the run ended with
    dtype: Literal["float32", "float64"] | None = None  # to compute in, instead of the run's own
    runs: str = "runs"
    report: bool = True


@dataclasses.dataclass(kw_only=True)
class Generate:
    """Write samples, reconstructions, interpolations and traversals of a run, as pictures and arrays."""

    count: int = 64
    seed: int = 0
    root: str | None = None
    best: bool = False
    runs: str = "runs"


@dataclasses.dataclass(kw_only=True)
class Show:
    """Load a data set and say what it is."""

    root: str | None = None
    binarize: Literal["none", "fixed", "dynamic"] = "none"
    dequantize: bool = False
    flat: bool = True
    missing: bool = False  # NaN in a file stands for a missing value
    data_seed: int = 0
