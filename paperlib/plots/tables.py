"""The tables below a figure: numbers by setting, gates, and contrasts with their verdict."""

from collections.abc import Mapping

import pandas as pd

RESULTS = ("passed", "failed", "not applicable")


def numbers(runs: pd.DataFrame, columns: Mapping[str, str]) -> pd.DataFrame:
    """Return the mean and standard deviation over seeds, and the least n, by network and setting.

    Args:
        runs: Columns network, label and those of `columns`, a row a run.
        columns: Column of `runs` -> its name in the table.

    Returns:
        A row a setting. Numbers have 2 digits after the point, or 4 if all means of their column
        are below 1 in magnitude.
    """
    groups = runs.groupby(["network", "label"], sort=False)
    parts = {name: groups[column].agg(["mean", "std"]) for column, name in columns.items()}
    table = pd.concat(parts, axis=1).rename(columns={"std": "sd"}, level=1)
    table["n", ""] = groups[list(columns)].count().min(axis=1)
    for name in columns.values():
        table[name] = table[name].round(2 if table[name, "mean"].abs().max() >= 1 else 4)
    return table.rename_axis(["network", "setting"])


def gates(frame: pd.DataFrame) -> pd.DataFrame:
    """Count the settings that pass each gate, by network, and describe the first two failures.

    Args:
        frame: Gates as `gates.table` and `Loaded.gates` return them.
    """
    rows = []
    for (gate, network), group in frame.groupby(["gate", "network"], sort=False):
        failed = group[group.passed == "failed"]
        words = [f"{r.setting}: {r.text}" if r.setting else r.text for r in failed.itertuples()]
        counts = {word: int((group.passed == word).sum()) for word in RESULTS}
        rows.append({"gate": gate, "network": network, **counts, "failures": "; ".join(words[:2])})
    columns = ["gate", "network", *RESULTS, "failures"]
    return pd.DataFrame(rows, columns=columns).set_index(["gate", "network"]).sort_index()


def verdict(claims: pd.DataFrame) -> pd.DataFrame:
    """Return the contrasts of claims for people: estimates with intervals, p, power and verdict.

    Args:
        claims: A row a contrast, as `claims.to_frame` and `Loaded.claims` return it.

    Returns:
        A row a contrast. Empty columns are left out.
    """

    def text(values: pd.Series, form: str) -> list[str]:
        return ["" if pd.isna(value) else format(value, form) for value in values]

    def interval(estimate: float, low: float, high: float) -> str:
        if pd.isna(estimate):
            return ""
        form = "+.2f" if pd.isna(low) or high - low >= 0.02 else "+.4f"  # delta_w is small
        return format(estimate, form) + ("" if pd.isna(low) else f" [{low:{form}}, {high:{form}}]")

    estimates = claims[["estimate", "low", "high"]].to_numpy()
    table = pd.DataFrame(
        {
            "estimate [95%]": [interval(*row) for row in estimates],
            "outcome": claims.outcome.fillna(""),
            "kind": claims.kind.fillna(""),
            "pairs": text(claims.n, ".0f"),
            "p": text(claims.p, ".2g"),
            "p (sign flip)": text(claims.sign_flip, ".2g"),
            "p (Holm)": text(claims.holm, ".2g"),
            "note": claims.note.fillna(""),
        }
    )
    table = table.loc[:, (table != "").any() | (table.columns == "estimate [95%]")]
    power = text(claims.power, ".2f")
    about = claims[["claim", "verdict", "runs"]].assign(power=power, contrast=claims.contrast)
    return table.set_index(pd.MultiIndex.from_frame(about.fillna("none tested")))
