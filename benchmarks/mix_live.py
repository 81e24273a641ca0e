"""RegMix live at desk scale: what `lmworks mix desk` finds on five real sources, held against three bars.

    python benchmarks/mix_live.py --out runs/mix-desk

The search is the user's own: the recipe, its folder, its runs; one that was killed goes on. Bars: predictions rank
unseen mixtures (0.8); the chosen mixture beats the natural and the uniform one at the target's size by more than two
standard deviations of seeds; the four verified mixtures come out in the predicted order.
Exit 0: all hold; 4: one does not.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import Any

import evidence_file

from lmworks.cli.mix import run
from lmworks.core import recipe as recipes

RANK = 0.8


def verdicts(content: dict[str, Any]) -> list[dict[str, Any]]:
    """The three bars."""
    unseen, verified = content["unseen"], content["verified"]
    rank = unseen["spearman"]
    told = [
        {"bar": f"rank correlation on {unseen['runs']} unseen runs >= {RANK}", "value": rank, "holds": rank >= RANK}
    ]
    for name in ("natural", "uniform"):
        less, noise = verified["chosen_is_less_by"][name], verified["seed_sd"]
        bar = f"chosen below {name} by more than 2 sd of seeds ({2 * noise / math.log(2):.4f} bits per byte)"
        told.append({"bar": bar, "value": less / math.log(2), "holds": verified["beyond_two_sd"][name]})
    order = verified["order"]
    told.append({"bar": "order of the four as predicted", "value": order["measured"], "holds": order["right"]})
    return told


def main() -> int:
    """Search, judge, write a record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", default="desk")
    parser.add_argument("--out", type=Path, default=Path("runs/mix-desk"))
    parser.add_argument("--set", dest="sets", action="append", default=[])
    parser.add_argument("--dry", action="store_true", help="write no record")
    asked = parser.parse_args()
    content = run(recipes.load(asked.recipe, verb="mix", sets=asked.sets), asked.out)
    told = verdicts(content)
    for one in told:
        print(one)
    kept = {key: value for key, value in content.items() if key not in ("slice", "made_by")}
    record = evidence_file.head("mix_live") | {"verdicts": told, **kept}
    if not asked.dry:
        print(evidence_file.write(record, evidence_file.FOLDER))
    return 0 if all(one["holds"] for one in told) else 4


if __name__ == "__main__":
    sys.exit(main())
