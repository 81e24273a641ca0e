"""lmworks audit: look into what was made."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from lmworks.cli.console import answer, table
from lmworks.core.energy.grid import spread

app = typer.Typer(
    help="Look into what was made.\n\nExample: lmworks audit energy runs/quickstart",
    no_args_is_help=True,
    rich_markup_mode=None,
    add_completion=False,
)


@app.callback()
def _audit() -> None:
    """Look into what was made."""


@app.command("energy")
def energy(
    runs: Annotated[list[Path] | None, typer.Argument(help="Run folders; others are held against the first.")] = None,
    metric: Annotated[
        str, typer.Option(help="The column of metrics.jsonl that says how good a run is; less is better.")
    ] = "val_bits_per_byte",
    country: Annotated[
        list[str] | None,
        typer.Option(help="Tell CO2 on this grid as well, as Poland or US-CA; may be given many times."),
    ] = None,
    mixed: Annotated[
        bool, typer.Option("--mixed", help="Compare grids of other years, or counted in other ways, all the same.")
    ] = False,
    power: Annotated[
        Path | None, typer.Option(help="A CSV file of power over time, with units, in the place of runs.")
    ] = None,
    picture: Annotated[Path | None, typer.Option(help="Write quality against CO2 as a PNG file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Answer as JSON.")] = False,
) -> None:
    """What runs took in energy, CO2 and money, what they reached with it, and what each change saved.

    Example: lmworks audit energy runs/quickstart --country France --country Poland
    """
    from lmworks.audit import energy as audit
    from lmworks.audit.power import replay
    from lmworks.core.errors import UsageError

    if (power is None) == (not runs):
        raise UsageError("name run folders, or a file with --power", next_step="lmworks audit energy runs/quickstart")
    if power is not None:
        _power(replay(power), as_json=as_json)
        return
    assert runs is not None, "there are runs or a file"
    content = audit.report(runs, metric=metric, countries=country or [], allow_mixed=mixed)
    if picture is not None:
        audit.draw(content, picture)
    answer(content, as_json=as_json, text=_text(content))


@app.command("sources")
def sources(
    recipe: Annotated[str, typer.Argument(help="A training recipe, or the name of a shipped one.")],
    smoothing: Annotated[
        float,
        typer.Option(help="Occurrences of every token that are added to a source's counts before it is compared."),
    ] = 1.0,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="PATH=VALUE", help="Change a setting; may be given many times.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Answer as JSON.")] = False,
) -> None:
    """Tokens, shares and epochs of a recipe's sources, and how far their token frequencies lie apart.

    Example: lmworks audit sources methods/slimpajama-dc
    """
    from lmworks.audit import sources as audit
    from lmworks.cli.console import Reporter
    from lmworks.core import recipe as recipes
    from lmworks.prove.evidence import plain

    decoded = recipes.load(recipe, verb="train", sets=set_ or [])
    content = audit.report(decoded, smoothing=smoothing, progress=Reporter().preparing)
    answer(plain(content), as_json=as_json, text=_sources(content))


def _sources(content: dict[str, Any]) -> str:
    names = list(content["sources"])
    found = [
        [name, f"{one['tokens']:,}", f"{one['share']:.1%}", f"{one['epochs']:.2f}"]
        for name, one in content["sources"].items()
    ]
    matrix = [[name, *(f"{content['kl_bits'][name][other]:.3f}" for other in names)] for name in names]
    told = (
        f"KL(row || column), bits a token; {content['smoothing']:g} added to each of {content['vocabulary']:,} tokens"
    )
    return "\n".join(
        [table(found, header=["source", "tokens", "share", "epochs"]), "", table(matrix, header=["", *names]), told]
    )


def _power(found: dict[str, float], *, as_json: bool) -> None:
    notes = {"gap_seconds": "s of gaps left out", "missing": "samples missing", "clamped": "samples below 0"}
    told = "".join(f"; {found[name]:g} {text}" for name, text in notes.items() if found[name])
    answer(found, as_json=as_json, text=f"{found['kwh']:.6g} kWh over {found['seconds']:g} s{told}")


def _text(content: dict[str, Any]) -> str:
    """A table of lines, what each change saved, and how everything is known."""
    header = ["run", "n", content["metric"], "kWh", "kg CO2e", "money", "J/token", "front"]
    found = [
        [
            line["name"] + ("" if line["done"] else " (not finished)"),
            str(len(line["runs"])),
            f"{line['quality']:.4f}",
            spread(line["kwh"]),
            spread(line["kg_co2e"]),
            "" if line["money"] is None else f"{line['money']['central']:.3g} {line['money']['currency']}",
            "" if line["joules_per_token"] is None else f"{line['joules_per_token']:.3g}",
            "*" if line["on_front"] else "",
        ]
        for line in content["lines"]
    ]
    parts = [table(found, header=header)]
    if len(content["lines"]) == 2 or len({line["hardware"] for line in content["lines"]}) > 1:
        parts += ["", _beside(content), ""]
    for line in content["lines"]:
        parts += [f"{line['name']}: {kg['central']:.3g} kg CO2e at {grid}" for grid, kg in line["elsewhere"].items()]
        if line["against"] is not None:
            parts.append(_saved(line))
    terms = dict.fromkeys(f"{line['grid']}, PUE {line['pue']:g}" for line in content["lines"])
    parts.append(f"{content['label']}; {'; '.join(terms)}. In brackets: what it may be.")
    parts += _made(content)
    if content["mixed"]:
        parts.append(f"NOT COMPARABLE: {' and '.join(content['mixed'])}")
    if content["tokens_and_kwh"] is not None:
        parts.append(f"tokens and kWh over all runs: r = {content['tokens_and_kwh']:.3f}")
    return "\n".join(parts)


def _beside(content: dict[str, Any]) -> str:
    """Machines, or recipes, as columns; each after the first with what it is of the first."""
    lines = content["lines"]
    names = [f"{line['name']} ({line['hardware']})" for line in lines]
    header = ["", names[0], *(cell for name in names[1:] for cell in (name, "ratio"))]
    currencies = [line["money"]["currency"] for line in lines if line["money"] is not None]
    own = {"quality": content["metric"], "money": f"money ({', '.join(dict.fromkeys(currencies))})"}
    rows = []
    for row in content["beside"]:
        cells = [own.get(row["key"]) or (f"{row['what']} ({row['unit']})" if row["unit"] else row["what"])]
        cells.append(_number(row["values"][0]))
        for value, ratio in zip(row["values"][1:], row["ratios"][1:], strict=True):
            cells += [_number(value), "-" if ratio is None else f"x {ratio:.3g}"]
        rows.append(cells)
    return table(rows, header=header)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _made(content: dict[str, Any]) -> list[str]:
    """A sentence about making the machines, for lines that have it; never summed with what their energy emitted."""
    found = [line for line in content["lines"] if line["kg_co2e_embodied"] is not None]
    told = "; ".join(f"{line['name']} {spread(line['kg_co2e_embodied'])}" for line in found)
    return [f"kg CO2e of making the machines, not in the above: {told}"] if found else []


def _saved(line: dict[str, Any]) -> str:
    against = line["against"]
    energy, carbon = (_share(against[name]) for name in ("kwh_saved", "kg_co2e_share_saved"))
    inside = ", within the seeds' spread" if against["within_spread"] else ""
    change = "; ".join(line["changes"]) or "the same recipe"
    text = f"{line['name']}: {energy} energy, {carbon} CO2 ({change}); quality {against['quality_lost']:+.4f}{inside}"
    requests = against["break_even_requests"]
    return f"{text}; pays back after {requests:.3g} requests" if requests else text


def _share(saved: float) -> str:
    return f"{saved:.0%} less" if saved >= 0 else f"{-saved:.0%} more"
