"""From the kept runs to tables, and to ``docs/results.md``: no number there is typed by hand."""

from __future__ import annotations

import json
import re
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from reporting import spread
from tinykg_plots import plot, plot_tuning
from tinykg_runs import Case
from tinykg_ways import PLAIN, WAYS, label

from lightning_tinykg.activations.ledger import format_bytes

Row = dict[str, Any]

METRICS = {"test/auc": "AUC", "test/f1": "F1", "test/recall@20": "Recall@20", "test/ndcg@20": "NDCG@20"}


def read(path: Path) -> list[Row]:
    """The kept runs of a file; none if it isn't there."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def keep(path: Path, row: Row) -> None:
    """Add a run. The file is written anew and put in place at once: whatever happens, its lines are whole."""
    new = path.with_suffix(".tmp")
    new.write_text("".join(json.dumps(one) + "\n" for one in [*read(path), row]))
    new.rename(path)


def is_kept(path: Path, key: Row, settings: Row, name: str) -> bool:
    """Whether a run is among the kept ones.

    Args:
        path: the file they are kept in.
        key: what tells it from the others.
        settings: what it would be made with.
        name: what it is called.

    Raises:
        SystemExit: if it was made with other settings.
    """
    rows = [row for row in read(path) if all(row[field] == value for field, value in key.items())]
    if rows and rows[0]["settings"] != settings:
        raise SystemExit(f"{path}: {name} was made with other settings: choose another --out")
    return bool(rows)


def by_way(rows: list[Row]) -> dict[str, list[Row]]:
    """The runs of each way, in the order of the table."""
    ways = sorted({row["way"] for row in rows}, key=WAYS.index)
    return {way: sorted((row for row in rows if row["way"] == way), key=lambda row: row["seed"]) for way in ways}


def metrics(rows: list[Row]) -> list[str]:
    """The test metrics of these runs, the first of which decides."""
    return [name for name in METRICS if name in rows[0]]


def difference(rows: list[Row], way: str, to: str = "none") -> str:
    """The first metric's mean relative difference between two ways, over the seeds that both have run with.

    The number after the ± is the standard error of the mean, of the differences seed by seed.

    Example:
        >>> runs = [("none", 0, 0.5), ("none", 1, 0.7), ("2", 0, 0.5), ("2", 1, 0.6)]
        >>> difference([{"way": way, "seed": seed, "test/auc": auc} for way, seed, auc in runs], "2")
        '-8.33 ± 8.33 %'
    """
    name = metrics(rows)[0]
    found = {key: {row["seed"]: row[name] for row in rows if row["way"] == key} for key in (way, to)}
    seeds = sorted(found[way].keys() & found[to].keys())
    if not seeds:
        return "-"
    base = mean(found[to][seed] for seed in seeds)
    apart = [100 * (found[way][seed] - found[to][seed]) / base for seed in seeds]
    error = f" ± {stdev(apart) / len(apart) ** 0.5:.2f}" if len(apart) > 1 else ""
    return f"{round(mean(apart), 2) + 0.0:+.2f}{error} %"  # + 0.0: no minus before a zero


def cells(rows: list[Row], way: str) -> dict[str, str]:
    """What the table says of a way, by column, all as text."""
    own = by_way(rows)[way]
    out = {METRICS[name]: spread([row[name] for row in own]) for name in metrics(rows)}
    out = {"activations": label(way), "seeds": str(len(own))} | out
    out["to uncompressed"] = "" if way == "none" else difference(rows, way)
    if "raw_mib" not in own[0]:
        return out
    raw, stored = (mean(row[name] for row in own) * 2**20 for name in ("raw_mib", "stored_mib"))
    out |= {"raw": format_bytes(raw), "stored": format_bytes(stored), "x fewer": f"{raw / stored:.1f}"}
    if way not in PLAIN:
        raw, stored = (mean(row[name] for row in own) * 2**20 for name in ("mean_raw_mib", "mean_stored_mib"))
        out |= {"mean stored": format_bytes(stored), "mean x fewer": f"{raw / stored:.1f}"}
    out["epochs"] = f"{mean(row['epochs'] for row in own):.0f}"
    out["s / epoch"] = f"{mean(row['seconds_per_epoch'] for row in own):.2f}"
    return out


def table(rows: list[Row]) -> str:
    """A table in Markdown, a row for each way: mean and standard deviation over the seeds."""
    names = ["activations", "seeds", *(METRICS[name] for name in metrics(rows)), "to uncompressed"]
    names += ["raw", "stored", "x fewer", "mean stored", "mean x fewer", "epochs", "s / epoch"]
    lines = [names, ["---" if name == "activations" else "---:" for name in names]]
    for way in by_way(rows):
        found = cells(rows, way)
        lines.append([found.get(name, "") for name in names])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def tuning_table(rows: list[Row]) -> str:
    """What a random search found for each model: trial 0, which was chosen by hand, beside the best, in Markdown.

    Example:
        >>> run = {"model": "kgat", "set": "music", "tuned": {"lr": 0.01}}
        >>> print(tuning_table([run | {"trial": 0, "best": 0.3}, run | {"trial": 1, "best": 0.2}]).splitlines()[-1])
        | kgat on music | 2 | 0.3000 | 1 | lr 0.01 | 0.3000 | lr 0.01 |
    """
    names = ["model", "trials", "by hand", "its place", "its settings", "the best", "its settings"]
    lines = [names, ["---" if name in ("model", "its settings") else "---:" for name in names]]
    for model, of in dict.fromkeys((row["model"], row["set"]) for row in rows):
        own = [row for row in rows if (row["model"], row["set"]) == (model, of)]
        by_hand = next(row for row in own if row["trial"] == 0)
        best = max(own, key=lambda row: row["best"])
        place = 1 + sum(row["best"] > by_hand["best"] for row in own)
        said = [", ".join(f"{name} {value}" for name, value in row["tuned"].items()) for row in (by_hand, best)]
        found = f"{by_hand['best']:.4f}", str(place), said[0], f"{best['best']:.4f}", said[1]
        lines.append([f"{model} on {of}", str(len(own)), *found])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def tuning_commands(rows: list[Row]) -> list[str]:
    """What makes these trials: a command for each data set.

    Example:
        >>> run = {"model": "kgat", "set": "ml-1m", "trial": 3, "settings": {"patience": 10}}
        >>> print(*tuning_commands([run]))
        python examples/reproduce/tuning.py --data PATH/TO/DATA --set ml-1m --models kgat --trials 4 --patience 10
    """
    found = []
    for of in dict.fromkeys(row["set"] for row in rows):
        own = [row for row in rows if row["set"] == of]
        models = " ".join(dict.fromkeys(row["model"] for row in own))
        count, patience = 1 + max(row["trial"] for row in own), own[0]["settings"]["patience"]
        found.append(
            f"python examples/reproduce/tuning.py --data PATH/TO/DATA --set {of} --models {models} --trials {count} "
            f"--patience {patience}"
        )
    return found


def commands(rows: list[Row]) -> list[str]:
    """What makes these runs: a command for each set of seeds, kind of device and number of epochs.

    Example:
        >>> run = {"model": "kgat", "set": "music", "way": "2", "seed": 0}
        >>> [command.partition("--sets ")[2] for command in commands([run, run | {"seed": 1, "device": "NVIDIA A100"}])]
        ['music --ways 2 --seeds 0', 'music --ways 2 --seeds 1 --accelerator gpu']
        >>> commands([run | {"settings": {"epochs": 3}}])[0].partition("--seeds ")[2]
        '0 --epochs 3'
    """
    usual = Case(rows[0]["model"], rows[0]["set"]).read().get("epochs")

    def options(row: Row) -> str:
        epochs = row.get("settings", {}).get("epochs", usual)
        limit = "" if epochs == usual else f" --epochs {epochs}"
        return limit + ("" if row.get("device", "cpu") == "cpu" else " --accelerator gpu")

    calls: dict[tuple[str, str], list[str]] = {}
    for way, own in by_way(rows).items():
        for given in dict.fromkeys(options(row) for row in own):
            seeds = " ".join(str(row["seed"]) for row in own if options(row) == given)
            calls.setdefault((seeds, given), []).append(way)
    start = (
        f"python examples/reproduce/tinykg.py --data PATH/TO/DATA --models {rows[0]['model']} --sets {rows[0]['set']}"
    )
    return [f"{start} --ways {' '.join(ways)} --seeds {seeds}{given}" for (seeds, given), ways in calls.items()]


def fill(words: str, rows: list[Row]) -> str:
    """Numbers in place of ``{{WAY COLUMN}}`` and of ``{{WAY - WAY}}``, the difference of the two.

    Raises:
        ValueError: for what names no number.

    Example:
        >>> fill("It is {{2 AUC}}.", [{"way": "2", "seed": 0, "test/auc": 0.5}])
        'It is 0.5000.'
    """

    def number(match: re.Match[str]) -> str:
        way, _, rest = match[1].strip().partition(" ")
        if way in by_way(rows):
            if rest.startswith("- ") and rest[2:] in by_way(rows):
                return difference(rows, way, rest[2:])
            if found := cells(rows, way).get(rest):
                return found
        raise ValueError(f"{match[0]} must name a way of {', '.join(by_way(rows))} and a column or another way")

    return re.sub(r"\{\{(.+?)\}\}", number, words)


def render(results: Path, docs: Path) -> list[Path]:
    """Write ``results.md`` and a plot for each kept table.

    The words stand beside the results: ``before.md``, ``after.md``, and one beside each table that has any. Runs of a
    config that has been replaced lie in ``MODEL-SET-WORDS.jsonl``, and have no command that would make them again.

    Args:
        results: the folder of the kept runs.
        docs: the folder to write to.

    Returns:
        The files that were written.
    """
    docs.mkdir(parents=True, exist_ok=True)
    parts, written = [_words(results / "before.md")], []
    for path in sorted(results.glob("*.jsonl"), key=lambda path: path.stem):
        rows = [row for row in read(path) if "way" in row]  # the runs of other scripts lie here too
        if not rows:
            continue
        image = docs / f"results-{path.stem}.png"
        if trained := any("curve" in row for row in rows):  # the most popular items need no training
            plot(by_way(rows), metrics(rows)[0], METRICS[metrics(rows)[0]], image)
            written.append(image)
        name, stem = f"{rows[0]['model']} on {rows[0]['set']}", f"{rows[0]['model']}-{rows[0]['set'].replace(':', '')}"
        if earlier := path.stem.removeprefix(stem):  # with a config that is none any more: its words say which
            name += f", {earlier.strip('-').replace('-', ' ')}"
            parts.append(f"## {name}\n\n{table(rows)}")
        else:
            shown = "\n".join(commands(rows))
            parts.append(f"## {name}\n\n```bash\n{shown}\n```\n\n{table(rows)}")
        if trained:
            parts.append(f"![{name}]({image.name})")
        parts.append(fill(_words(path.with_suffix(".md")), rows))
    if trials := read(results / "tuning.jsonl"):
        image = docs / "results-tuning.png"
        plot_tuning(trials, image)
        written.append(image)
        shown = "\n".join(tuning_commands(trials))
        parts.append(f"## Tuning\n\n```bash\n{shown}\n```\n\n{tuning_table(trials)}\n\n![tuning]({image.name})")
        parts.append(_words(results / "tuning.md"))
    parts.append(_words(results / "after.md"))
    page = docs / "results.md"
    page.write_text("\n\n".join(part for part in parts if part) + "\n")
    return [page, *written]


def _words(path: Path) -> str:
    return path.read_text().strip() if path.exists() else ""
