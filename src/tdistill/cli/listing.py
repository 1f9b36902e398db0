"""What there is: objectives, recipes, runs."""

from __future__ import annotations

from dataclasses import MISSING, fields
from pathlib import Path

from tdistill.errors import ConfigError, did_you_mean
from tdistill.objectives import Objective, objective_class, objective_names


def listing(what: str, folder: Path | None = None) -> list[dict[str, str]]:
    """Rows of names and facts.

    Args:
        what: ``objectives``, ``recipes`` or ``runs``.
        folder: where to look for recipes (default ``recipes``) or runs (default ``runs``).
    Raises:
        ConfigError: nothing of that name can be listed, or a folder is given for objectives.
    """
    kinds = {"objectives": _objectives, "recipes": _recipes, "runs": _runs}
    if what not in kinds:
        raise ConfigError(f"Cannot list '{what}'.{did_you_mean(what, kinds)}")
    return kinds[what](folder)


def _objectives(folder: Path | None) -> list[dict[str, str]]:
    if folder is not None:
        raise ConfigError(f"--folder = {folder} is for recipes and runs; objectives are in packages. Leave it out.")
    rows = []
    for name in objective_names():
        try:
            cls = objective_class(name)
        except ConfigError as error:  # another package's; the others are still worth a look
            rows.append({"name": name, "minimises": str(error), "needs": "", "settings": ""})
            continue
        settings = [f"{f.name}={f.default}" for f in fields(cls) if f.default is not MISSING]  # type: ignore[arg-type]
        minimises = (cls.__doc__ or "").splitlines()[0]
        rows.append({"name": name, "minimises": minimises, "needs": _needs(cls), "settings": " ".join(settings)})
    return rows


def _needs(cls: type[Objective]) -> str:
    """What an objective with its default settings needs, the store first, which all do."""
    if any(field.default is MISSING and field.default_factory is MISSING for field in fields(cls)):  # type: ignore[arg-type]
        return "depends on its settings"
    own = cls()
    needs = {"teacher in memory": own.needs_teacher, "rollouts": own.needs_rollouts}
    needs["dense logits"] = own.needs_teacher or own.support == "vocabulary"
    return ", ".join(["store", *(what for what, needed in needs.items() if needed)])


def _recipes(folder: Path | None) -> list[dict[str, str]]:
    return [{"path": str(path)} for path in sorted((folder or Path("recipes")).glob("**/*.yaml"))]


def _runs(folder: Path | None) -> list[dict[str, str]]:
    rows = []
    for recipe in sorted((folder or Path("runs")).glob("*/recipe.yaml")):
        done = (recipe.parent / "report.html").is_file()
        rows.append({"path": str(recipe.parent), "state": "finished" if done else "unfinished"})
    return rows
