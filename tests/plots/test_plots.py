"""Pictures of densities over the plane, and how a notebook shows a figure."""

import pytest
import torch

from ppvae import plots
from ppvae.errors import UsageError


def test_a_notebook_shows_a_figure_without_pyplot():
    fig = plots.image_grid(torch.rand(3, 4), (2, 2))
    assert fig._repr_png_() == plots.to_png(fig)
    assert fig._repr_png_().startswith(b"\x89PNG")


def test_a_density_is_drawn_where_it_is():
    """A normal at (2, -1): the image's highest value, in the axes' own coordinates."""
    lattice = plots.plane(4.0, 33)
    assert lattice.shape == (33 * 33, 2)
    log_px = torch.distributions.Normal(torch.tensor([2.0, -1.0]), 0.3).log_prob(lattice).sum(-1)
    fig = plots.density_maps({"data": torch.zeros(5, 2), "map": log_px}, marks={"map": torch.zeros(1, 2)})
    (shown,) = fig.axes[1].get_images()
    row, col = divmod(int(shown.get_array().argmax()), 33)
    left, right, low, high = shown.get_extent()
    assert shown.origin == "lower"
    assert (left + (right - left) * col / 32, low + (high - low) * row / 32) == (2.0, -1.0)


@pytest.mark.parametrize("values", [torch.zeros(7), torch.zeros(4, 3)])
def test_what_is_neither_data_nor_a_lattice_is_refused(values):
    with pytest.raises(UsageError, match=r"odd: expected \[count\^2\] log-densities or data \[N, 2\]"):
        plots.density_maps({"odd": values})


def test_no_panels_are_refused():
    with pytest.raises(UsageError, match="panels: expected at least one"):
        plots.density_maps({})
