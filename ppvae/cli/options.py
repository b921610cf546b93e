"""The options of each command; the comments are their help texts."""

import dataclasses
from typing import Literal


@dataclasses.dataclass(kw_only=True)
class Data:
    """Which data, and how they are read."""

    # a name (digits, mnist, fashion-mnist, omniglot, celeba, ...), a folder of images, or a file: a table (.csv, .tsv,
    # .parquet), .npy, .pt, or .npz with the keys x, data or images (of the data), y, label or labels, train, valid and
    # test (or x_train, y_train, ...) for splits of its own; any other array of as many rows is for --context
    data: str = "digits"
    root: str | None = None  # the folder of data sets; else PPVAE_DATA, else a cache folder
    binarize: Literal["none", "fixed", "dynamic"] = "fixed"  # dynamic redraws the training data at every read
    dequantize: bool = False  # add uniform noise within a grey level
    flat: bool = True  # vectors; --no-flat keeps images [C, H, W] and sequences [T, D]
    labels: bool = False  # pass the labels as the batch's second tensor
    # of labels: how many training rows keep theirs, the others having -1, unknown, as have validation and test data
    labelled: int | None = None
    context: tuple[str, ...] = ()  # further arrays of the file to pass after them, in this order, such as lengths
    missing: bool = False  # NaN in a file stands for a missing value; nothing is binarised then
    columns: tuple[str, ...] = ()  # of a table, NAME=KIND: real, count, binary, categorical, label, skip; else guessed
    data_seed: int = 0  # of binarisation and dequantisation
    max_gigabytes: float = 8.0  # that a compressed file (.npz, .pt, .parquet) may unpack to
    lazy: bool = False  # read images or the rows of a .npy file on demand; by itself where they need more than 4 GiB


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
    compile: Literal["auto", "yes", "no"] = "auto"  # compiled steps; auto: where the run is long enough for it to pay
    precision: Literal["float32", "tf32", "bf16", "auto"] = "float32"  # of layers; auto: bf16 where faster
    rows: int = 20_000  # the most (datum, particle) rows at once; a larger batch accumulates gradients
    patience: int | None = None  # epochs without a better validation ELBO before stopping
    device: str | None = None
    runs: str = "runs"  # the folder of runs
    name: str | None = None  # the run's folder below it; by default from the names of pair and data
    resume: bool = False  # go on from the last checkpoint
    report: bool = True  # write report.html at the end


@dataclasses.dataclass(kw_only=True)
class Evaluate:
    """Estimate log p(x) of a run's data by importance sampling, or by annealing, which is slower.

    Draws come from a density refined to each datum; L_K of the guide, which papers print, is computed beside it. With
    --method auto, data on which importance sampling fails go on to annealing from the refined density.

    The same command resumes an interrupted evaluation. Several processes share the data:
    torchrun --nproc-per-node 2 -m ppvae evaluate RUN.
    """

    # bdmc: a bracket of simulated data; particle_filter: of sequences, with the guide as the proposal
    method: Literal["importance", "auto", "annealed", "smc", "bdmc", "particle_filter"] = "importance"
    proposal: Literal["refined", "guide"] = "refined"  # density that draws come from
    # 3000 if refined, 1000 of particle filters, else 5000; auto: adaptive to each datum
    num_particles: int | Literal["auto"] | None = None
    guide_particles: int | None = None  # for L_K of the guide, beside refined: num_particles, else 5000; 0 for none
    bracket: int = 50  # data simulated from the model, on which bounds of both sides certify the proposal; 0 for none
    # of a pair whose parameters, or other latents, are shared by all data: the log predictive density of each datum, as
    # of new data, in place of log p of all data at once; draws come from the guide
    conditional: bool = False
    local_particles: int = 1  # of such a pair: draws of a datum's own latents at each draw of the shared ones
    target_std_error: float = 0.05  # of auto: of log p(x) of each datum, in nats
    max_particles: int = 20_000  # of auto: the largest number for a datum
    split: Literal["test", "valid", "train"] = "test"
    head: int | None = None  # the number of data, from the first; all by default
    seed: int = 0
    root: str | None = None
    rows: int | None = None  # the largest number of (datum, particle) rows at once; memory is proportional to it
    precision: Literal["float32", "tf32", "bf16", "auto"] = "float32"  # of layers, in importance sampling
    device: str | None = None
    num_chains: int = 16  # of annealing, per datum
    num_temperatures: int = 1000  # steps from the guide (or prior) to the posterior
    start: Literal["guide", "prior"] = "guide"  # the distribution that chains start from
    schedule: Literal["sigmoid", "linear", "equal_ess"] = "sigmoid"  # of inverse temperatures
    num_leapfrog: int = 10  # leapfrog steps at each temperature
    resample: float = 0.5  # of smc: chains are resampled where the ESS falls below this fraction of them
    beside: tuple[int, ...] = ()  # further K of importance sampling to compare with annealing, as 50000
    best: bool = False  # the parameters with the best validation ELBO, instead of the last
    dtype: Literal["float32", "float64"] | None = None  # the floating type, instead of the run's own
    trust: bool = False  # run the Python files that the run names, and remember them as trusted
    runs: str = "runs"
    report: bool = True


@dataclasses.dataclass(kw_only=True)
class Examine:
    """Examine a run: inference gaps, latents, calibration, predictive checks; then write the report."""

    gaps: int = 100  # the number of train and of test data whose local posteriors are refit; 0 for none
    num_particles: int = 1000  # for the ELBOs and log p(x) of the gaps
    steps: int = 300  # of a round of the refit; rounds end once the ELBO no longer improves
    latents: int = 1000  # test data for rate, active units and ELBO surgery; 0 for none
    replications: int = 2000  # of the calibration on simulated data; 0 for none
    checks: int = 200  # test data whose statistics are compared with replicated data; 0 for none
    gradients: int = 0  # steps of each gradient estimator on 50 test data, to compare their noise; 0 for none
    seed: int = 0
    root: str | None = None
    device: str | None = None
    best: bool = False  # the parameters with the best validation ELBO
    trust: bool = False  # run the Python files that the run names, and remember them as trusted
    runs: str = "runs"
    report: bool = True


@dataclasses.dataclass(kw_only=True)
class Compare:
    """Compare runs by log p(x) of the same data, from the results of `ppvae evaluate`: paired differences, and caveats.

    NAME=RUN,RUN,... groups runs of several seeds. The folder that `save` wrote, or its file, may stand for a run.
    """

    result: str = "log_marginal"  # the estimate, by the name of its file in the runs' folders
    directory: str | None = None  # the folder for the comparison and its picture
    runs: str = "runs"


@dataclasses.dataclass(kw_only=True)
class Generate:
    """Write samples, reconstructions, interpolations and traversals of a run, as pictures and arrays."""

    count: int = 64
    seed: int = 0
    root: str | None = None
    best: bool = False
    trust: bool = False  # run the Python files that the run names, and remember them as trusted
    runs: str = "runs"


@dataclasses.dataclass(kw_only=True)
class DataSet:
    """Load a data set and say what it is."""

    root: str | None = None
    binarize: Literal["none", "fixed", "dynamic"] = "none"
    dequantize: bool = False
    flat: bool = True
    missing: bool = False  # NaN in a file stands for a missing value
    columns: tuple[str, ...] = ()  # of a table, NAME=KIND: real, count, binary, categorical, label, skip; else guessed
    data_seed: int = 0
    max_gigabytes: float = 8.0  # that a compressed file (.npz, .pt, .parquet) may unpack to
    lazy: bool = False  # read images or the rows of a .npy file on demand; by itself where they need more than 4 GiB
