"""The API reference: a page for each public module, with everything that its `__all__` names."""

import ast
from pathlib import Path

import catalogue

ROOT = Path(__file__).parents[2]
TITLES = {
    "ppvae": "ppvae: what every script imports",
    "ppvae.data": "ppvae.data: data sets and columns",
    "ppvae.nn": "ppvae.nn: networks",
    "ppvae.priors": "ppvae.priors: p(z)",
    "ppvae.likelihoods": "ppvae.likelihoods: p(x | z)",
    "ppvae.posteriors": "ppvae.posteriors: q(z | x)",
    "ppvae.models": "ppvae.models: pairs, and their factories",
    "ppvae.distributions": "ppvae.distributions: densities that Pyro lacks",
    "ppvae.inference": "ppvae.inference: a pair to log-densities; SVI",
    "ppvae.objectives": "ppvae.objectives: bounds as losses",
    "ppvae.objectives.gradients": "ppvae.objectives.gradients: gradient estimators and control variates",
    "ppvae.objectives.auxiliary": "ppvae.objectives.auxiliary: a second loss beside a bound",
    "ppvae.objectives.schedules": "ppvae.objectives.schedules: coefficients by step",
    "ppvae.training": "ppvae.training: fit, check, load, runs",
    "ppvae.evaluation": "ppvae.evaluation: log p(x), reliability, diagnosis",
    "ppvae.generate": "ppvae.generate: samples and latent spaces",
    "ppvae.plots": "ppvae.plots: figures",
    "ppvae.report": "ppvae.report: the page on a run",
    "ppvae.errors": "ppvae.errors: what is raised",
}
PLACES = {  # of names that `ppvae` loads on first use, or that a module has too
    "ppvae.VAE": "ppvae.models.vae.VAE",
    "ppvae.fit": "ppvae.training.fit.fit",
    "ppvae.check": "ppvae.training.inspection.check",
    "ppvae.log_marginal": "ppvae.evaluation.evidence.log_marginal.log_marginal",
    "ppvae.load": "ppvae.training.run.load",
    "ppvae.terms": "ppvae.inference.inspection.terms",
}
TOP = [name.removeprefix("ppvae.") for name in PLACES]


def pages() -> tuple[dict[str, str | bytes], list[str | dict[str, str]]]:
    """Pages by path, and the navigation."""
    made: dict[str, str | bytes] = {}
    nav: list[str | dict[str, str]] = []
    for module, title in TITLES.items():
        made[f"reference/{module}.md"] = _page(module, title)
        nav.append({module: f"reference/{module}.md"})
    return made, nav


def _page(module: str, title: str) -> str:
    tree = ast.parse(_file(module).read_text())
    doc = (ast.get_docstring(tree) or "").strip()
    parts = [f"# {title}", doc]
    room = module.removeprefix("ppvae.")
    there = catalogue.entries().get(room, {})
    if there:
        parts.append("In the catalogue: " + ", ".join(f"[{n}](../catalogue/{room}/{n}.md)" for n in there) + ".")
    for name in TOP if module == "ppvae" else _public(tree):
        if name in there:
            continue
        public = f"{module}.{name}"
        place = PLACES.get(public) or (_source(tree, name) if _file(public).exists() else None) or public
        parts.append(f"::: {place}\n    options: {{heading: {public}, toc_label: {name}}}")
    return "\n\n".join(parts) + "\n"


def _file(module: str) -> Path:
    path = ROOT / module.replace(".", "/")
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def _source(tree: ast.Module, name: str) -> str | None:
    """Where a module imports a name from."""
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and name in [alias.name for alias in node.names]:
            return f"{node.module}.{name}"
    return None


def _public(tree: ast.Module) -> list[str]:
    """The names of `__all__`, else the public functions and classes that the module defines."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            return list(ast.literal_eval(node.value))
    kinds = (ast.FunctionDef, ast.ClassDef)
    return [node.name for node in tree.body if isinstance(node, kinds) and not node.name.startswith("_")]
