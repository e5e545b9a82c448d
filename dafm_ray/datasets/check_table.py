"""A finished check as a readable table and as JSON."""

from collections import defaultdict
from dataclasses import asdict
from typing import Any

from dafm_ray.datasets.base import Finding
from dafm_ray.datasets.check import Check, Part
from dafm_ray.datasets.order import JUDGED
from dafm_ray.markdown import markdown_table

_HEADER = (
    *("split", "category", "protocol", "images", "queries", "with targets"),
    *(f"R@{JUDGED} by file order alone", "by chance", "p"),
)

SHOWN = 5
"""Findings of one kind that are printed; JSON holds all."""


def to_text(check: Check) -> str:
    """The parts as a Markdown table, then the findings by kind, what changes a metric first."""
    images = (
        f"{check.images_checked:,} images decoded, {check.images_per_second:,.0f} a second"
        if check.images_checked
        else "annotations alone, no image opened"
    )
    notes = len(check.findings) - check.changes_metric
    lines = [
        f"{check.name}: {images}",
        "",
        markdown_table(_HEADER, [_cells(part) for part in check.parts], words=3),
        "",
        f"{check.changes_metric:,} findings that would change a metric, {notes:,} notes",
    ]
    kinds: defaultdict[tuple[bool, str], list[Finding]] = defaultdict(list)
    for finding in check.findings:
        kinds[not finding.changes_metric, finding.check].append(finding)
    for (harmless, kind), found in sorted(kinds.items(), key=lambda item: item[0][0]):
        lines += ["", f"{'note' if harmless else 'CHANGES A METRIC'}: {kind} ({len(found):,})"]
        lines += [f"  {finding.detail}" for finding in found[:SHOWN]]
        if len(found) > SHOWN:
            lines.append(f"  and {len(found) - SHOWN:,} more (--json FILE lists all)")
    return "\n".join(lines)


def to_json(check: Check) -> dict[str, Any]:
    """Everything, for machines."""
    return {**asdict(check), "changes_metric": check.changes_metric}


def _cells(part: Part) -> list[str]:
    words = [part.split or "-", part.category or "-", part.protocol]
    counts = [f"{part.images:,}", f"{part.queries:,}", f"{part.labelled:,}"]
    if part.leak is None:
        return [*words, *counts, "-", "-", "-"]
    leak = part.leak
    shares = [f"{100 * hits / leak.queries:.2f} %" for hits in (leak.hits[JUDGED], leak.chance)]
    return [*words, *counts, *shares, f"{leak.p:.3f}"]
