"""Clusters as data, and what a person can get wrong in one."""

from __future__ import annotations

from pathlib import Path

import pytest

from lmworks.core.errors import RecipeError, UsageError
from lmworks.core.recipe import recipes_folder
from lmworks.plan import cluster as clusters
from lmworks.plan.cluster import Efficiency, Figure


@pytest.mark.parametrize("name", clusters.names())
def test_every_shipped_cluster_loads_and_says_where_its_figures_are_from(name: str) -> None:
    found = clusters.load(name)
    figures = [value for value in vars(found).values() if isinstance(value, Figure)]
    figures += [figure for level in found.links for figure in (level.bytes_per_second, level.latency_seconds)]
    assert len(figures) >= 8
    assert all(len(figure.source) > 5 for figure in figures)
    assert all(entry.source for entry in (*found.price, *found.carbon))
    assert found.links[-1].ranks is None
    assert found.bf16.value >= found.fp32.value
    assert 0 < found.efficiency.matrix <= 1
    assert found.idle_watts.value < found.watts.value


def test_links_get_slower_outwards() -> None:
    for name in clusters.names():
        rates = [level.bytes_per_second.value for level in clusters.load(name).links]
        assert rates == sorted(rates, reverse=True)


def test_an_unknown_cluster_is_named_with_the_nearest() -> None:
    with pytest.raises(UsageError, match="did you mean 'hgx-h100'"):
        clusters.load("hgx-h10")


def _changed(tmp_path: Path, old: str, new: str) -> str:
    text = (recipes_folder() / "clusters" / "dgx-a100.toml").read_text()
    assert old in text
    path = tmp_path / "mine.toml"
    path.write_text(text.replace(old, new))
    return str(path)


def test_a_file_of_ones_own_is_read_and_its_mistakes_are_told(tmp_path: Path) -> None:
    assert clusters.load(_changed(tmp_path, "Selene-like", "mine")).name.endswith("(mine)")
    with pytest.raises(RecipeError, match="no setting 'wats'"):
        clusters.load(_changed(tmp_path, "watts = { value = 812.5", "wats = { value = 812.5"))
    with pytest.raises(RecipeError, match="from 0 up"):
        clusters.load(_changed(tmp_path, "value = 312e12", "value = -312e12"))
    with pytest.raises(RecipeError, match="multiple of the 1 ranks"):
        clusters.load(_changed(tmp_path, "ranks = 8", "ranks = 1"))
    with pytest.raises(RecipeError, match="joins all nodes"):
        clusters.load(_changed(tmp_path, "ranks = 8\n", ""))
    with pytest.raises(RecipeError, match="no fit is called 'a10'"):
        clusters.load(_changed(tmp_path, 'fit = "a100"', 'fit = "a10"')).efficiency  # noqa: B018


def test_what_nobody_checked_is_listed() -> None:
    listed = clusters.load("dgx-a100").unchecked()
    assert "host_bytes_per_second" in listed
    assert "NVLink 3 latency_seconds" in listed
    assert "bf16" not in listed


def test_a_device_without_eight_bits_says_so() -> None:
    with pytest.raises(UsageError, match="multiplies no fp8"):
        clusters.load("dgx-a100").flops("fp8")


def test_half_of_the_share_is_reached_at_the_half_width() -> None:
    found = Efficiency(matrix=0.8, half_width=64.0, source="a test", fitted=True)
    assert found.share(64) == pytest.approx(0.4)
    assert found.share(1e9) == pytest.approx(0.8)
