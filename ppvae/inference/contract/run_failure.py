"""The error for a pair that raises an exception when it runs on a batch."""

from __future__ import annotations

from ppvae.errors import ContractError, site_error


def explain_failure(error: Exception, sizes: str) -> ContractError:
    """The ContractError for an exception of Pyro, torch or the pair itself, with the usual cure."""
    text = " ".join(str(error).split())[:300]
    if "must be sampled in trace" in text:
        name = text.removeprefix("site ").split(" must")[0]
        return site_error(
            name, "a guide that samples latents only", "a site with obs=", "move the observation to the model"
        )
    if "plate" in text and ("hape mismatch" in text or "invalid shape" in text):
        return ContractError(
            f"{text}. Expected one rightmost plate over the batch {sizes}; declare the dims of one event with "
            f".to_event(n), and size the plate by the batch, as in pyro.plate('data', len(x))"
        )
    return ContractError(
        f"the pair could not run on a batch of shape {sizes}: {type(error).__name__}: {text}. "
        f"Check that the networks fit the data and that model(*batch) and guide(*batch) take these arguments"
    )
