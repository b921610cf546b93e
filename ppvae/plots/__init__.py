"""Figures of training, of generated data, and of evaluation results: each function returns a matplotlib `Figure`.

With `ax=`, a function draws into given axes, one for each of its panels, and returns their figure. A figure holds no
warnings: `notes(figure)` has them. `log_px_histogram`, `bound_curve` and `diagnosis` take several
estimates, {name: estimate}.

No function uses pyplot or changes matplotlib's settings. Nats are per datum.
"""

from ppvae.plots.annealing import bracket, looseness_curve
from ppvae.plots.calibration import calibration_ranks
from ppvae.plots.compare import differences
from ppvae.plots.density import density_maps, plane
from ppvae.plots.estimates import bound_curve, diagnosis, log_px_histogram
from ppvae.plots.gaps import gap_bars
from ppvae.plots.gradients import gradient_noise
from ppvae.plots.images import image_grid
from ppvae.plots.latents import latent_map
from ppvae.plots.parallel_coordinates import parallel_coordinates
from ppvae.plots.predictive import predictive_checks
from ppvae.plots.representation import kl_per_dim, rate_distortion
from ppvae.plots.style import DPI, notes, to_png
from ppvae.plots.training import curves

__all__ = [
    "DPI", "bound_curve", "bracket", "calibration_ranks", "curves", "density_maps", "diagnosis", "differences",
    "gap_bars", "gradient_noise", "image_grid", "kl_per_dim", "latent_map", "log_px_histogram", "looseness_curve",
    "notes", "parallel_coordinates", "plane", "predictive_checks", "rate_distortion", "to_png",
]  # fmt: skip
