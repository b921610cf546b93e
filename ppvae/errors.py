"""The errors that ppvae raises: each names the thing, what was expected, what was found, and the usual cure."""


class PpvaeError(Exception):
    """The common base, so that a caller can catch every error the library raises on purpose."""


class ContractError(PpvaeError, ValueError):
    """A model/guide pair breaks the contract under which weights and log p(x) are right."""


class DataError(PpvaeError, ValueError):
    """A file or an array that cannot be taken as data."""


class CheckpointError(PpvaeError):
    """A checkpoint or run folder that is missing, damaged, or does not fit the pair."""


class TrainingError(PpvaeError):
    """Training cannot go on, for example because a loss or a gradient is not finite."""


class UsageError(PpvaeError, ValueError):
    """An argument or option that does not exist or cannot be used as given."""


def refused(site: str, expected: str, found: str, cure: str) -> ContractError:
    """The error for a site that breaks the contract."""
    return ContractError(f"site {site!r}: expected {expected}; found {found}. {cure[:1].upper()}{cure[1:]}.")
