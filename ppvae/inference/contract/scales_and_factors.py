"""What the sites of a pair add up to: scales, and terms that are no density, as factors and improper priors."""

from collections.abc import Sequence

from torch import Tensor

from ppvae.errors import site_error
from ppvae.inference.contract.plates_and_roles import DataPlate, plates_of
from ppvae.inference.structure import Structure
from ppvae.inference.tracing import Node


def find_common_scale(nodes: Sequence[tuple[str, Node]], plate: DataPlate) -> float:
    """The factor by which one poutine.scale multiplies every site of a pair; 1 where there is none.

    Beside it, a site in the data plate has the plate's scale, any other site scale 1.
    """
    for name, node in nodes:
        check_scale_is_a_number(name, node)
    factors = [float(node["scale"]) / plate_scale(node, plate) for _, node in nodes]
    common = factors[0] if factors[0] > 0 and all(abs(f - factors[0]) <= 1e-6 * factors[0] for f in factors) else 1.0
    for name, node in nodes:
        check_scale(name, node, plate, common)
    return 1.0 if abs(common - 1) <= 1e-6 else common


def plate_scale(node: Node, plate: DataPlate) -> float:
    """The scale that the data plate gives a site: its full size over its batch inside, 1 outside."""
    return plate.scale if plate.name in plates_of(node) else 1.0


def check_scale_is_a_number(name: str, node: Node) -> None:
    """A site has one scale for all of its elements."""
    if isinstance(node["scale"], Tensor) and node["scale"].numel() > 1:
        raise site_error(
            name,
            "one scale for all data, a number",
            f"a tensor of scales, of shape {list(node['scale'].shape)}, under which no log p(x) of a datum is left",
            "train it on an objective of Pyro's, such as Trace_ELBO, and leave the weights out where log p(x) is asked "
            "for",
        )


def check_scale(name: str, node: Node, plate: DataPlate, common: float) -> None:
    """A site has the data plate's scale where it stands in that plate, else 1, times the pair's common scale."""
    expected, found = plate_scale(node, plate) * common, float(node["scale"])
    if abs(found - expected) > 1e-6 * expected:
        raise site_error(
            name,
            f"scale {expected:g}, the data plate's full size over its batch" if expected != 1 else "scale 1",
            f"scale {found:g}",
            "keep the model a normalised density: leave poutine.scale to the objective (beta), put it around the whole "
            "of model and guide, or write pyro.plate('data', N, subsample=x) for mini-batches; and do not subsample an "
            "inner plate",
        )


def check_factor(name: str, node: Node, plate: DataPlate, has_global_latents: bool) -> None:
    """A factor is one of a datum, or all data have a joint weight."""
    if plate.name not in plates_of(node) and not has_global_latents:
        raise site_error(
            name,
            "a factor of one datum, inside the data plate",
            "a factor of the batch as a whole, under which data are not independent and none has a log p(x) of its own",
            "move it into the data plate as one number a datum; or train it on an objective of Pyro's, such as "
            "Trace_ELBO, and leave it out where log p(x) is asked for",
        )


def check_normalized(s: Structure, consumer: str) -> None:
    """Every site of the model is a density, so that draws from the sites are draws from the model."""
    for name in s.unnormalized:
        raise site_error(
            name,
            f"a model made of densities, for {consumer}",
            "a factor or an improper prior: draws of the other sites are not draws from the model",
            "leave it out, or write it as a distribution",
        )
