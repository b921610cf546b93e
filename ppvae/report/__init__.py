"""The report of a run: one self-contained HTML file on training, generated data and the reliability of log p(x)."""

from ppvae.report.estimate_section import least_reliable
from ppvae.report.writer import pictures, write, write_generated

__all__ = ["least_reliable", "pictures", "write", "write_generated"]
