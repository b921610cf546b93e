"""The data plate, the roles, shapes and scales of a pair's sites; each check raises one error that names the site."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ppvae.errors import ContractError, DataError, site_error
from ppvae.inference.contract.independence import check_not_coupled, run_at, take_batch_rows
from ppvae.inference.contract.support import base_distribution, check_support, check_type_of_values, is_factor
from ppvae.inference.structure import Role
from ppvae.inference.tracing import Node, Program, find_subsample, node_log_prob


@dataclass(frozen=True)
class DataPlate:
    """The plate over independent data, at dim -1."""

    name: str
    size: int  # rows in one run
    full_size: int
    draws_subsample: bool  # it draws `size` rows of a batch that is the whole data set
    has_subsample_size: bool  # it is given a subsample_size

    @property
    def scale(self) -> float:
        return self.full_size / self.size


def plates_of(node: Node) -> dict[str, Any]:
    """The plates around a site by name, loops included."""
    return {f.name: f for f in node["cond_indep_stack"]}


def find_data_plate(
    program: Program, model: Mapping[str, Node], traces: Sequence[Any], batch: tuple[Any, ...]
) -> DataPlate:
    """The data plate: the one plate at dim -1 around all observed sites, over the data of the batch.

    Either side may give it a subsample_size: Pyro replays the guide's subsample in the model.
    """
    observed = {name: node for name, node in model.items() if node["is_observed"]}
    check_something_is_observed(observed, model)
    observed = {name: node for name, node in observed.items() if not is_factor(node)} or observed
    check_batch_holds_data(batch)
    frame: Any = None
    for name, node in observed.items():
        if not any(f.dim == -1 for f in node["cond_indep_stack"]):
            check_not_coupled(program, batch, model, name)
        other = rightmost_plate(name, node)
        check_single_data_plate(name, frame, other)
        frame = other
    count, full_size = len(batch[0]), int(frame.full_size or frame.size)
    size = frame.size
    if size < 0:  # a plate without a size goes over whatever it is given
        size = full_size = count
    subsamples = [site["fn"] for trace in traces if (site := find_subsample(trace, frame.name)) is not None]
    has_subsample_size = any(fn.subsample_size is not None for fn in subsamples)
    draws_subsample = size < full_size and full_size == count and has_subsample_size
    plate = DataPlate(frame.name, size, full_size, draws_subsample, has_subsample_size)
    elsewhere = [f for node in observed.values() for f in node["cond_indep_stack"] if f.dim != -1 and f.size == count]
    check_plate_size(plate, batch[0].shape, elsewhere)
    if elsewhere:
        check_plate_follows_batch(program, batch, frame, elsewhere[0])
    return plate


def check_something_is_observed(observed: Mapping[str, Node], model: Mapping[str, Node]) -> None:
    """The model has an observed site."""
    if not observed:
        raise ContractError(
            "the model observes nothing: expected a site with obs=, found none among "
            f"{sorted(model)}. Condition the data: pyro.sample('x', ..., obs=x)"
        )


def check_batch_holds_data(batch: tuple[Any, ...]) -> None:
    """The first argument of a batch is a tensor with the data in its first dim."""
    if not batch or not isinstance(batch[0], Tensor) or not batch[0].dim():
        raise DataError(f"a batch: expected a tensor with the data in its first dim, found {type(batch[0]).__name__}")


def rightmost_plate(name: str, node: Node) -> Any:
    """The plate at dim -1 around an observed site."""
    rightmost = [f for f in node["cond_indep_stack"] if f.dim == -1]
    if not rightmost:
        raise site_error(
            name,
            "a vectorised plate over the data, at dim -1",
            f"plates {sorted((n, f.dim) for n, f in plates_of(node).items()) or 'none'}",
            "write `with pyro.plate('data', len(x)):` around the sites of one datum",
        )
    return rightmost[0]


def check_single_data_plate(name: str, plate: Any, other: Any) -> None:
    """All observed sites stand in one plate at dim -1."""
    if plate is not None and plate.name != other.name:
        raise site_error(
            name,
            f"the data plate {plate.name!r}",
            f"plate {other.name!r} at dim -1",
            "put all observed sites into one plate over the data",
        )


def check_plate_size(plate: DataPlate, shape: Sequence[int], elsewhere: Sequence[Any]) -> None:
    """The plate goes over the batch's first dim."""
    if plate.size == shape[0] or plate.draws_subsample:
        return
    transposed = ""
    if plate.full_size in shape[1:]:
        dim = list(shape).index(plate.full_size, 1)
        transposed = f"; or, if dim {dim} of the batch's first tensor holds the data, pass it as x.movedim({dim}, 0)"
    raise _wrong_plate(plate.name, shape[0], f"found size {plate.full_size}", elsewhere, transposed)


def check_plate_follows_batch(program: Program, batch: tuple[Any, ...], plate: Any, other: Any) -> None:
    """Of two plates of the batch's size, the one at dim -1 is that over the data: it shrinks with the batch."""
    count = len(batch[0])
    try:
        nodes = run_at(program, take_batch_rows(batch, torch.arange(count - 1), count), {})
    except (ValueError, RuntimeError, IndexError):
        return
    sizes = {f.name: f.size for node in nodes.values() for f in node["cond_indep_stack"]}
    if (sizes.get(plate.name), sizes.get(other.name)) == (count, count - 1):
        raise _wrong_plate(plate.name, count, f"found size {count} for any batch", [other])


def _wrong_plate(name: str, count: int, found: str, elsewhere: Sequence[Any], transposed: str = "") -> ContractError:
    where = f", and plate {elsewhere[0].name!r} over them at dim {elsewhere[0].dim}" if elsewhere else ""
    return ContractError(
        f"plate {name!r}: expected the rightmost plate to go over the {count} data of the batch, {found}{where}. "
        f"Use pyro.plate('data', len(x), dim=-1), and .to_event(n) or dims left of -1 for everything else{transposed}"
    )


def guide_roles(model: Mapping[str, Node], guide: Mapping[str, Node]) -> dict[str, Role]:
    """The role of each site of the guide."""
    return {name: _guide_role(name, node, model) for name, node in guide.items()}


def model_roles(model: Mapping[str, Node], guide: Mapping[str, Node]) -> dict[str, Role]:
    """The role of each site of the model."""
    return {name: _model_role(name, node, model, guide) for name, node in model.items()}


def global_latents(model: Mapping[str, Node], roles: Mapping[str, Role], plate: str) -> list[str]:
    """The latents outside the data plate, which all data share."""
    latent = (Role.LATENT, Role.ENUMERATED)
    return [name for name, role in roles.items() if role in latent and plate not in plates_of(model[name])]


def _guide_role(name: str, node: Node, model: Mapping[str, Node]) -> Role:
    if node["is_observed"]:
        check_guide_does_not_observe(name, node)
        return Role.FACTOR
    if name not in model:
        check_is_auxiliary(name, node, model)
        return Role.AUXILIARY
    check_model_does_not_observe(name, model[name])
    check_same_plates(name, model[name], node)
    check_whole_support_enumerated(name, model[name])
    check_whole_support_enumerated(name, node)
    return Role.ENUMERATED if _is_enumerated(node) else Role.LATENT


def _model_role(name: str, node: Node, model: Mapping[str, Node], guide: Mapping[str, Node]) -> Role:
    if node["is_observed"]:
        return Role.FACTOR if is_factor(node) else Role.OBSERVED
    if name in guide:
        return Role.LATENT
    if _is_enumerated(node):
        check_whole_support_enumerated(name, node)
        return Role.ENUMERATED
    check_is_unobserved_half(name, node, model, guide)
    return Role.CANCELLED


def _infer(node: Node) -> dict[str, Any]:
    return node["infer"] or {}


def _is_enumerated(node: Node) -> bool:
    return _infer(node).get("enumerate") in ("parallel", "sequential")


def check_guide_does_not_observe(name: str, node: Node) -> None:
    """The guide observes helpers and terms of the loss alone."""
    if not _infer(node).get("is_auxiliary"):
        raise site_error(
            name,
            "a guide that samples latents only",
            "a site with obs=",
            "move the observation to the model, or mark a term of the loss alone with infer={'is_auxiliary': True}",
        )


def check_is_auxiliary(name: str, node: Node, model: Mapping[str, Node]) -> None:
    """A site of the guide that the model does not have is marked as a helper."""
    if not _infer(node).get("is_auxiliary"):
        raise site_error(
            name,
            f"a latent of the model (one of {sorted(n for n in model if not model[n]['is_observed'])})",
            "a guide site that the model does not have",
            "rename or remove it, or mark a helper, which a Delta makes a latent, with infer={'is_auxiliary': True}",
        )


def check_model_does_not_observe(name: str, p: Node) -> None:
    """A latent of the guide is not observed in the model."""
    if p["is_observed"]:
        raise site_error(
            name, "a latent", "a site that the model observes and the guide samples", "remove it from the guide"
        )


def check_same_plates(name: str, p: Node, q: Node) -> None:
    """A latent of the guide stands in the plates that it has in the model."""
    model, guide = ({f.name for f in node["cond_indep_stack"] if f.dim is not None} for node in (p, q))
    if guide < model:
        raise site_error(
            name,
            f"the model's plates {sorted(model)} in the guide too",
            f"{sorted(guide) or 'none'}: in the model it is sampled for each datum or element of these plates",
            "if all data share it, read it before the plate in the model, a PyroSample attribute by its name; else "
            "open the same plates, by the same names, around it in the guide",
        )
    if model != guide:
        raise site_error(
            name,
            f"the model's plates {sorted(model) or 'none'} in the guide too",
            f"{sorted(guide) or 'none'}",
            "open the same plates, by the same names, around a latent in model and guide",
        )


def check_whole_support_enumerated(name: str, node: Node) -> None:
    """The guide enumerates all values of a site."""
    if num_samples := _infer(node).get("num_samples"):
        raise site_error(
            name,
            "a latent that is sampled, or enumerated over its whole support",
            f"enumeration by num_samples={num_samples}",
            "leave num_samples out",
        )


def check_is_unobserved_half(name: str, node: Node, model: Mapping[str, Node], guide: Mapping[str, Node]) -> None:
    """A latent that only the model samples is the unobserved half of an `obs_mask` site."""
    if name.endswith("_unobserved") and name.removesuffix("_unobserved") + "_observed" in model:
        return
    enumerable = getattr(node["fn"], "has_enumerate_support", False)
    raise site_error(
        name,
        "a site of the same name in the guide",
        f"a latent ({type(base_distribution(node['fn'])).__name__}) that the guide omits; it samples {sorted(guide)}",
        "sample it in the guide"
        + (", or mark it infer={'enumerate': 'parallel'} in the model to sum it out" if enumerable else ""),
    )


def check_event(name: str, node: Node) -> None:
    """A site has one log-density per element of its plates: all other dims are declared as an event."""
    check_has_shapes(name, node)
    check_type_of_values(name, node)
    plates = {f.dim: f.size for f in node["cond_indep_stack"] if f.dim is not None}
    shape = _log_prob_shape(name, node)
    for i, size in enumerate(reversed(shape), 1):
        if size > 1 and -i not in plates:
            raise site_error(
                name,
                "one log-density per datum, its other dims declared as an event",
                f"log-density of shape {list(shape)} with plates at dims {sorted(plates)}",
                "sum it to one number per datum"
                if is_factor(node)
                else f"add .to_event(n) to its {type(base_distribution(node['fn'])).__name__}",
            )
    value, event = node["value"], len(getattr(node["fn"], "event_shape", ()))
    for dim in (dim for dim, size in plates.items() if size < 0):  # a plate without a size goes over what it is given
        plates[dim] = value.shape[dim - event] if event - dim <= value.dim() else 1
    check_one_density_per_element(name, node, shape, plates)


def check_has_shapes(name: str, node: Node) -> None:
    """A distribution tells its batch shape and event shape."""
    fn = node["fn"]
    if not (hasattr(fn, "batch_shape") and hasattr(fn, "event_shape")):
        raise site_error(
            name,
            "a distribution with a batch_shape and an event_shape",
            f"{type(fn).__name__}, which has none",
            "derive it from pyro.distributions.TorchDistribution, and pass both to super().__init__",
        )


def check_one_density_per_element(name: str, node: Node, shape: Sequence[int], plates: Mapping[int, int]) -> None:
    """A log-density has a number for each element of a site's plates: one number would be spread over all of them."""
    for dim, size in plates.items():
        found = shape[dim] if -dim <= len(shape) else 1
        if found != size:
            raise site_error(
                name,
                f"one log-density for each of the {size} elements of its plate at dim {dim}",
                f"log-density of shape {list(shape)}",
                f"let log_prob of its {type(base_distribution(node['fn'])).__name__} return one number per element of "
                f"its batch_shape, with the dims of one event in its event_shape, which no .to_event then declares",
            )


def _log_prob_shape(name: str, node: Node) -> tuple[int, ...]:
    try:
        return node_log_prob(node).shape
    except (KeyError, NotImplementedError) as error:
        raise site_error(
            name,
            "a density that can be evaluated at given values",
            f"{type(base_distribution(node['fn'])).__name__}, which has none: {error or type(error).__name__}",
            "choose a distribution with a log_prob, such as a flow with an inverse; only a guide can do without",
        ) from error
    except (ValueError, RuntimeError) as error:
        if node["is_observed"]:
            check_subsample_observed(name, node)
            check_support(name, node)
        fn = node["fn"]
        raise site_error(
            name,
            f"a value of shape {list(fn.batch_shape)} + event {list(fn.event_shape)} in its support",
            f"{list(node['value'].shape)}: {' '.join(str(error).split())[:160]}",
            "check that the data fit the network",
        ) from error


def check_subsample_observed(name: str, node: Node) -> None:
    """An observed site has the rows that its plate draws, where Pyro replays a subsample of the guide's, too."""
    for f in node["cond_indep_stack"]:
        if f.dim == -1 and f.size < int(f.full_size or f.size) and f.full_size in node["value"].shape[:1]:
            raise site_error(
                name, f"the {f.size} rows that plate {f.name!r} draws by the subsample_size of model or guide",
                f"all {f.full_size}", f"write `with pyro.plate({f.name!r}, {f.full_size}, subsample_size={f.size}) as "
                f"rows:` in both and observe x[rows], or leave subsample_size out",
            )  # fmt: skip
