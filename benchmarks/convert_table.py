"""What ``convert.py`` prints of its results: the table, and a summary of the targets."""

from __future__ import annotations

import statistics
from typing import Any

from rich.table import Table


def ratio(result: dict[str, Any], pivot: str, tool: str) -> float | None:
    theirs = result.get(tool, {}).get("seconds")
    mine = result["pivots"].get(pivot, {}).get("seconds")
    return mine["sum"] / theirs["sum"] if theirs and mine else None


def summarise(results: list[dict[str, Any]], pivots: list[str]) -> dict[str, Any]:
    """The targets of the issue, over all networks."""
    good = [r for r in results if "error" not in r]
    summary: dict[str, Any] = {
        "networks": len(good),
        "failed": [r["network"] for r in results if "error" in r],
    }
    for pivot in pivots:
        noise = [r["pivots"][pivot]["noise_ratio"] for r in good if pivot in r["pivots"]]
        ratios = {r["network"]: ratio(r, pivot, "brevitas") for r in good}
        known = {name: value for name, value in ratios.items() if value is not None}
        limit = 1.0 if pivot == "max" else 2.0
        memory = {r["network"]: (r["peak_memory_over_weights"] or {}).get(pivot) for r in good}
        heavy = {name: round(value, 2) for name, value in memory.items() if value and value > 2.5}
        summary[pivot] = {
            "noise_ratio_median": statistics.median(noise) if noise else None,
            "noise_ratio_max": max(noise, default=None),
            "over_brevitas_median": statistics.median(known.values()) if known else None,
            "over_brevitas_max": max(known.values(), default=None),
            "slower_than_allowed": {
                name: round(value, 2) for name, value in known.items() if value > limit
            },
            "memory_above_2.5": heavy,
        }
    for tool in ("brevitas", "aimet"):
        summary[tool] = {
            "channels_that_we_leave": {
                r["network"]: r[tool]["not_rescaled_by_us"]
                for r in good
                if r.get(tool, {}).get("not_rescaled_by_us")
            },
            "failed_on": {
                r["network"]: r[tool]["failed"] for r in good if "failed" in r.get(tool, {})
            },
        }
    recognised = {r["network"]: r["recognise_seconds"] for r in good if r["recognise_seconds"]}
    summary["recognise_seconds_max"] = max(
        recognised.items(), key=lambda pair: pair[1], default=None
    )
    return summary


def table_of(
    results: list[dict[str, Any]], pivots: list[str], others: dict[str, str | None]
) -> Table:
    table = Table(title="conversion (CPU seconds, one thread)", title_justify="left")
    columns = ["network", "M par."]
    for pivot in pivots:
        columns += [f"{pivot} s", "noise", "mem."]
    columns += ["in all s", "channels block", "network"]
    for tool in ("brevitas", "aimet"):
        columns += [f"{tool} s", "sets", "channels", "noise", *(f"{pivot} ×" for pivot in pivots)]
    for column in columns:
        table.add_column(
            column, justify="left" if column == "network" and not table.columns else "right"
        )
    for r in results:
        if "error" in r:
            table.add_row(r["network"], r["error"])
            continue
        row = [r["network"], f"{r['parameters'] / 1e6:.1f}"]
        for pivot in pivots:
            one = r["pivots"].get(pivot, {})
            row += [
                _number(one.get("seconds", {}).get("sum"), 2),
                _number(one.get("noise_ratio"), 2),
            ]
            row.append(_number((r["peak_memory_over_weights"] or {}).get(pivot), 2))
        row += [_number(r.get("total_seconds", {}).get("sum"), 1)]
        row += [
            str(r["pivots"].get(pivots[0], {}).get("channels_block", "")),
            str(r["channels_network"]),
        ]
        for tool in ("brevitas", "aimet"):
            one = r.get(tool)
            if one is None:
                row += [
                    "not installed" if not others[tool] else "does not import",
                    "",
                    "",
                    "",
                    *("" for _ in pivots),
                ]
            elif "failed" in one:
                row += ["failed", "", "", "", *("" for _ in pivots)]
            else:
                row += [_number(one["seconds"]["sum"], 2), str(one["sets"]), str(one["channels"])]
                row += [
                    _number(one["noise_ratio"], 2),
                    *(_number(ratio(r, pivot, tool), 2) for pivot in pivots),
                ]
        table.add_row(*row)
    return table


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"
