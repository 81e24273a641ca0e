"""lmworks mix RECIPE: which share of each source to train on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from lmworks.cli.console import Reporter, answer, count, say, table


def mix(
    recipe: Annotated[
        str | None, typer.Argument(help="A recipe file, or the name of a shipped one (stdlib, desk).")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Folder. Default: runs/mix-<name of the recipe>.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="PATH=VALUE", help="Change a setting; may be given many times.")
    ] = None,
    write: Annotated[Path | None, typer.Option("--write", help="Also write the training recipe here.")] = None,
    picture: Annotated[Path | None, typer.Option("--picture", help="Also draw the answer here (PNG).")] = None,
    fit: Annotated[
        list[Path] | None,
        typer.Option("--fit", help="Learn from runs in these files (CSV, Parquet), and make none; may be given twice."),
    ] = None,
    predict: Annotated[
        list[Path] | None,
        typer.Option("--predict", help="With --fit: predict the mixtures of these files, which were not learnt from."),
    ] = None,
    target: Annotated[
        list[str] | None, typer.Option("--target", help="With --fit: a column of losses, or the end of its name.")
    ] = None,
    surrogate: Annotated[
        str, typer.Option("--surrogate", help="With --fit: auto, lightgbm, log-linear, ols, gp or log-gp.")
    ] = "auto",
    check: Annotated[
        bool, typer.Option("--check", help="Decode the recipe, print it with every default, run nothing.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Answer as JSON.")] = False,
) -> None:
    """Search the shares of a run's sources by many small runs; the answer has its spread and what speaks against it.

    Example: lmworks mix desk --out runs/desk --write mixed.toml

    A search that was killed goes on where it was. With --fit, runs that exist already are learnt from.
    """
    if fit:
        _must_be_alone({"RECIPE": recipe, "--out": out, "--set": set_, "--write": write, "--check": check})
        content = _from_tables(fit, predict or [], target or [], surrogate, picture)
        answer(content, as_json=as_json, text=_fitted_text(content) if predict else _text(content))
        return
    _need_fit({"--predict": predict, "--target": target, "--surrogate": surrogate != "auto"})
    _search(_named(recipe), out, set_ or [], write, picture, check=check, as_json=as_json)


def _search(
    name: str,
    out: Path | None,
    sets: list[str],
    write: Path | None,
    picture: Path | None,
    *,
    check: bool,
    as_json: bool,
) -> None:
    from lmworks.core import recipe as recipes

    decoded = recipes.load(name, verb="mix", sets=sets)
    if check:
        typer.echo(recipes.dump(decoded))
        return
    folder = out or Path("runs") / f"mix-{recipes.find(name, 'mix').stem}"
    content = run(decoded, folder)
    answer(content, as_json=as_json, text=_text(content))
    say(f"recipe: {folder / 'recipe.toml'}  runs: {folder / 'runs.parquet'}  picture: {folder / 'mixture.png'}")
    for source, to in ((folder / "recipe.toml", write), (folder / "mixture.png", picture)):
        if to is not None:
            to.write_bytes(source.read_bytes())


def run(decoded: Any, folder: Path) -> dict[str, Any]:
    """Do what a recipe asks for that is not done yet, and draw it."""
    from lmworks.cli.prove import Stages
    from lmworks.mix import outcome
    from lmworks.mix.swarm import Swarm

    swarm = Swarm(decoded, folder, Stages(), Reporter().preparing)
    content = outcome.run(decoded, swarm)
    _draw(content, folder / "mixture.png")
    return content


def _from_tables(
    fit: list[Path], predict: list[Path], target: list[str], surrogate: str, picture: Path | None
) -> dict[str, Any]:
    from lmworks.mix import apply, tables
    from lmworks.mix.advise import Asked

    if predict:
        _must_be_alone({"--picture": picture}, "--predict")
        return apply.predict(tables.read(fit), tables.read(predict), target=target, surrogate=surrogate)
    content = apply.advise_from(tables.read(fit), target=target, asked=Asked(surrogate=surrogate))
    if picture is not None:
        _draw(content, picture)
    return content


def _draw(content: dict[str, Any], path: Path) -> None:
    from lmworks.mix.picture import draw

    draw(content, path)


def _named(recipe: str | None) -> str:
    from lmworks.core.errors import UsageError

    if recipe is None:
        raise UsageError("there is no recipe", legal="lmworks mix RECIPE, or lmworks mix --fit RUNS")
    return recipe


def _must_be_alone(others: dict[str, Any], beside: str = "--fit") -> None:
    from lmworks.core.errors import UsageError

    if given := [name for name, value in others.items() if value]:
        raise UsageError(f"{', '.join(given)} has no effect with {beside}", where="lmworks mix")


def _need_fit(others: dict[str, Any]) -> None:
    from lmworks.core.errors import UsageError

    if given := [name for name, value in others.items() if value]:
        raise UsageError(f"{', '.join(given)} has no effect without --fit", where="lmworks mix")


def _text(content: dict[str, Any]) -> str:
    """The answer for people."""
    advice = content["recommendation"]
    worth = {one["source"]: one for one in content.get("worth", [])}
    header = ["source", "tokens", "natural", "share", "5 to 95 %", "read", "one point more", "without it"]
    rows = [_row(one, worth.get(one["name"])) for one in content["sources"]]
    lines = [table(rows, header=header), "", advice["rule"]]
    if advice["predicted"] is not None:
        gain = advice["gain"] or (0.0, 0.0)
        lines.append(
            f"predicted target {advice['predicted']:.4f} (sd {advice['sd']:.4f}),"
            f" {gain[0]:.4f} (sd {gain[1]:.4f}) less than the natural mixture's"
        )
    for column, found in content.get("surrogates", {}).items():
        scores = ", ".join(f"{s['surrogate']} {_rank(s['spearman'])}" for s in found["cross_validation"])
        lines.append(
            f"{column}: {found['surrogate']} from {found['runs']} runs; rank correlation on rows left out: {scores}"
        )
    unseen = content.get("unseen")
    if unseen and unseen["runs"] >= 3:
        lines.append(f"rank correlation on {unseen['runs']} unseen runs: {_rank(unseen['spearman'])}")
    lines += [*_verified(content.get("verified")), *_spent(content)]
    return "\n".join([*lines, *(f"warning: {text}" for text in advice["warnings"])])


def _rank(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _row(one: dict[str, Any], worth: dict[str, Any] | None) -> list[str]:
    told = ["-", "-"]
    if worth is not None:
        sd = "" if worth["point_sd"] is None else f" (sd {worth['point_sd']:.4f})"
        told = [f"{-worth['point']:+.4f}{sd}", f"{worth['without']:+.4f}"]
    return [
        one["name"],
        "-" if one["tokens"] is None else count(one["tokens"]),
        f"{one['natural']:.1%}",
        f"{one['share']:.1%}",
        f"{one['low']:.1%} to {one['high']:.1%}",
        "-" if one["epochs"] is None else f"{one['epochs']:.1f}x",
        *told,
    ]


def _verified(found: dict[str, Any] | None) -> list[str]:
    if found is None:
        return []
    lines = []
    for name, one in found["mixtures"].items():
        mean = "failed" if one["mean"] is None else f"{one['mean']:.4f}"
        lines.append(f"verified at the target's size: {name} {mean} over {len(one['values'])} seeds")
    if found["seed_sd"] is not None:
        lines.append(f"seeds alone: sd {found['seed_sd']:.4f}")
    for name, less in found.get("chosen_is_less_by", {}).items():
        if less is not None:
            beyond = "beyond" if found["beyond_two_sd"][name] else "not beyond"
            lines.append(f"chosen is {less:.4f} below {name}: {beyond} two sd")
    return lines


def _spent(content: dict[str, Any]) -> list[str]:
    if "cost" not in content:
        return []
    cost = content["cost"]
    seconds = sum(one["seconds"] for one in content["ledger"])
    return [
        f"cost: {cost['search']:.3g} runs of the target's size for the search, {cost['verification']:.3g} to verify;"
        f" {seconds:.0f} s in all"
    ]


def _fitted_text(content: dict[str, Any]) -> str:
    """What was predicted, for people."""
    rows = []
    for column, one in content["columns"].items():
        rank = _rank(one["spearman"])
        best = one["predicted_best"] + (f" (true: {one['true_best']})" if "true_best" in one else "")
        rows.append([column, one["surrogate"], rank, best])
    header = ["column", "surrogate", "rank correlation", "predicted best"]
    lines = [f"{content['fit']['runs']} runs learnt from, {len(content['rows'])} rows predicted", ""]
    return "\n".join([*lines, table(rows, header=header)])
