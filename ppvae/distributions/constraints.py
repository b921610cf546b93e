"""Supports that torch lacks, each with a `cure` for values outside it, for error texts; and arguments in a range."""

from torch import Tensor
from torch.distributions.constraints import Constraint

from ppvae.errors import UsageError, support_name


def positive(name: str, value: float) -> float:
    """The value of an argument; UsageError, by its name, unless it is positive."""
    if not value > 0:
        raise UsageError(f"{name}: expected a positive number, found {value}")
    return float(value)


class EquallySpacedLevels(Constraint):
    """Equally spaced levels 0, top / (levels - 1), ..., top, up to the rounding error of float32."""

    is_discrete = True

    def __init__(self, levels: int, top: float = 1.0):
        self.levels, self.top = levels, top
        super().__init__()

    @property
    def cure(self) -> str:
        if self.top != 1:
            return f"Number the {self.levels} values of the column from 0, and leave NaN where one is missing"
        top = self.levels - 1
        return (
            f"Divide whole numbers 0..{top} by {top}, or set levels= to those of the data; other values in [0, 1] "
            "suit likelihoods.ContinuousBernoulli or Beta, any real numbers Normal, Laplace or StudentT"
        )

    def check(self, value: Tensor) -> Tensor:
        scaled = value * ((self.levels - 1) / self.top)
        at_level = (scaled - scaled.round()).abs() <= max(1e-3, 2e-7 * self.levels)
        return at_level & (value >= 0) & (value <= self.top)

    def __repr__(self) -> str:
        if self.levels == 2:
            return f"{{0, {self.top:g}}}"
        step = "1" if self.top == self.levels - 1 else f"{self.top:g}/{self.levels - 1}"
        return f"{{0, {step}, ..., {self.top:g}}}"


class OpenUnitInterval(Constraint):
    """The open interval (0, 1)."""

    lower_bound, upper_bound = 0.0, 1.0
    cure = (
        "Its density is zero or infinite at 0 and 1: load with dequantize=True, which keeps off them, or use "
        "likelihoods.ContinuousBernoulli for grey values in [0, 1] and Normal, Laplace or StudentT for any real number"
    )

    def check(self, value: Tensor) -> Tensor:
        return (value > 0) & (value < 1)

    def __repr__(self) -> str:
        return "the open interval (0, 1)"


class CountsWithTotal(Constraint):
    """Counts [..., D] that sum to a total [...]; the check is elementwise, true where the row is valid."""

    is_discrete = True
    cure = (
        "Give each row's own sum as the batch's second tensor (context); counts without a total suit "
        "likelihoods.Poisson or NegativeBinomial"
    )

    def __init__(self, total: Tensor):
        self.total = total
        super().__init__()

    def check(self, value: Tensor) -> Tensor:
        sums = (value.sum(-1) == self.total).unsqueeze(-1)
        inside = (value >= 0) & (value == value.floor()) & sums
        while inside.dim() > value.dim():
            inside = inside.all(0)
        return inside

    def __repr__(self) -> str:
        return "counts that sum to the total given as context"


open_unit_interval = OpenUnitInterval()


class ZeroOr(Constraint):
    """Zero, which has a mass of its own, beside the numbers of another support."""

    has_point_mass = True

    def __init__(self, others: Constraint):
        self.others = others
        super().__init__()

    def check(self, value: Tensor) -> Tensor:
        return (value == 0) | self.others.check(value)

    def __repr__(self) -> str:
        return f"0 or {support_name(self.others)}"
