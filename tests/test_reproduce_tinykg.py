"""TinyKG's table: each run is made once and kept, an interrupted one goes on, and the page says what was kept."""

import doctest
import importlib
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

DATA = "synthetic:1000"
REPRODUCE = Path(__file__).parents[1] / "examples" / "reproduce"
MODULES = ("tinykg_ways", "tinykg_runs", "tinykg_tables", "tinykg_plots", "tinykg")


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The script and its siblings, as Python finds them when the script is run."""
    monkeypatch.syspath_prepend(REPRODUCE)
    monkeypatch.setenv("COLUMNS", "300")  # or lines are folded
    return {name: importlib.import_module(name) for name in MODULES}


def call(script: ModuleType, monkeypatch: pytest.MonkeyPatch, out: Path, *options: str) -> None:
    monkeypatch.setattr(sys, "argv", ["tinykg.py", "--sets", DATA, "--out", str(out), *options])
    script.main()


def kept(out: Path, model: str) -> dict[tuple[str, int], dict[str, Any]]:
    lines = (out / f"{model}-synthetic1000.jsonl").read_text().splitlines()
    return {(row["way"], row["seed"]): row for row in map(json.loads, lines)}


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings(modules: dict[str, Any], name: str) -> None:
    assert doctest.testmod(modules[name]).failed == 0


def test_a_run_is_made_once(
    modules: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--models", "kgcn-ctr", "--ways", "none", "2", "paper-2", "budget", "checkpoint", "bf16", "--seeds", "0")
    call(modules["tinykg"], monkeypatch, tmp_path, *options, "--epochs", "2")
    assert "| 2 bits, the paper's recipe | 1 |" in capsys.readouterr().out
    rows = kept(tmp_path, "kgcn-ctr")
    assert [way for way, _ in rows] == list(options[3:9])
    assert not list((tmp_path / "checkpoints").iterdir())

    plain, two, paper, budget, checkpoint, bf16 = rows.values()
    assert {len(row["curve"]) for row in rows.values()} == {2}
    assert {row["raw_mib"] for row in rows.values()} == {plain["stored_mib"]}
    assert two["stored_mib"] < paper["stored_mib"] < bf16["stored_mib"] < plain["stored_mib"]
    assert checkpoint["stored_mib"] < two["stored_mib"]
    assert checkpoint["curve"] == plain["curve"]  # it makes again what it did not keep, and changes nothing
    assert paper["curve"] != plain["curve"]  # by the rules two bits are too exact here to be seen in five digits
    assert budget["mean_stored_mib"] < budget["stored_mib"]  # its first step is kept at 8 bits

    before = (tmp_path / "kgcn-ctr-synthetic1000.jsonl").read_text()
    call(modules["tinykg"], monkeypatch, tmp_path, *options, "--epochs", "2")
    assert (tmp_path / "kgcn-ctr-synthetic1000.jsonl").read_text() == before
    with pytest.raises(SystemExit, match=r"none, seed 0 was made with other settings"):
        call(modules["tinykg"], monkeypatch, tmp_path, *options, "--epochs", "1")


@pytest.mark.parametrize("model", ["kgcn-ctr", "kgat"])
def test_an_interrupted_run_goes_on(
    modules: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, model: str
) -> None:
    """At the end of an epoch all is in the checkpoint, the noise of the rounding too: the result is the same."""
    record = modules["tinykg_runs"].Record
    begin = record.on_train_epoch_start
    options = ("--models", model, "--ways", "anneal", "--seeds", "1", "--epochs", "4")
    call(modules["tinykg"], monkeypatch, tmp_path / "whole", *options)

    def fail(self: Any, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch == 2:
            raise ConnectionError("the machine is gone")
        begin(self, trainer, pl_module)

    monkeypatch.setattr(record, "on_train_epoch_start", fail)
    with pytest.raises(ConnectionError):
        call(modules["tinykg"], monkeypatch, tmp_path / "cut", *options)
    assert not (tmp_path / "cut" / f"{model}-synthetic1000.jsonl").exists()

    seen = []
    monkeypatch.setattr(
        record, "on_train_epoch_start", lambda *rest: (seen.append(rest[1].current_epoch), begin(*rest))
    )
    with pytest.raises(SystemExit, match="begun with other settings"):
        call(modules["tinykg"], monkeypatch, tmp_path / "cut", *options[:-1], "5")
    call(modules["tinykg"], monkeypatch, tmp_path / "cut", *options)
    assert seen == [2, 3]
    whole, cut = kept(tmp_path / "whole", model)["anneal", 1], kept(tmp_path / "cut", model)["anneal", 1]
    assert (whole.pop("resumed"), cut.pop("resumed")) == (False, True)
    del whole["seconds_per_epoch"], cut["seconds_per_epoch"]
    if model == "kgat":  # Lightning does not restore the generator that dropout draws from
        for row in (whole, cut):
            row["curve"] = row["curve"][:2]
            for name in ("best", "test/recall@20", "test/ndcg@20"):
                del row[name]
    assert cut == whole


def test_a_config_may_validate_rarely(modules: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    case = modules["tinykg_runs"].Case
    assert case("kgcn", "music").read()["validates_every"] == 3
    read = case.read
    monkeypatch.setattr(case, "read", lambda self: read(self) | {"validates_every": 2})
    options = ("--models", "kgcn-ctr", "--ways", "none", "--seeds", "0", "--epochs", "4")
    call(modules["tinykg"], monkeypatch, tmp_path, *options)
    found = kept(tmp_path, "kgcn-ctr")["none", 0]
    assert (found["epochs"], len(found["curve"])) == (4, 2)


def test_popularity_has_one_row(modules: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    call(modules["tinykg"], monkeypatch, tmp_path, "--models", "popularity")
    ((key, row),) = kept(tmp_path, "popularity").items()
    assert key == ("none", 0)
    assert 0 < row["test/recall@20"] < 1


def test_a_way_that_is_none_is_refused(modules: dict[str, Any]) -> None:
    for name in ("3", "paper-32", "ours-2", "fp8"):
        with pytest.raises(ValueError, match=f"way must be one of .*, got '{name}'"):
            modules["tinykg_ways"].settings(name, epochs=1)


def test_each_model_has_a_config(modules: dict[str, Any]) -> None:
    case = modules["tinykg_runs"].Case
    for model in modules["tinykg"].MODELS:
        for name in ("music", "ml-1m", "last-fm"):
            settings = case(model, name).settings("2", epochs=3)
            assert model == "popularity" or (settings["epochs"], settings["compression"]) == (3, {"bits": 2})
    assert case("kgat", "last-fm").read()["config"] == "kgat-lastfm.yaml"
    assert case("kgcn", "ml-1m").read()["config"] == "kgcn-ml1m.yaml"
    assert case("kgat", "ml-1m").read()["config"] == "kgat-ml1m.yaml"
    assert case("lightgcn", "ml-1m").read()["config"] == "lightgcn-ml1m.yaml"
    assert case("lightgcn", "last-fm").read()["config"] == "lightgcn-music.yaml"  # for want of its own


def row(way: str, seed: int, recall: float, **more: Any) -> dict[str, Any]:
    numbers = {"raw_mib": 8.0, "stored_mib": 8.0, "epochs": 2, "seconds_per_epoch": 1.5, "curve": [0.1, recall]}
    key = {"model": "kgcn", "set": "music", "way": way, "seed": seed}
    return key | {"test/recall@20": recall, "test/ndcg@20": recall / 2} | numbers | more


def test_the_page_is_made_of_the_kept_runs(modules: dict[str, Any], tmp_path: Path) -> None:
    compressed = {"stored_mib": 1.0, "mean_raw_mib": 4.0, "mean_stored_mib": 0.25}
    rows = [row("none", 0, 0.2), row("none", 1, 0.4), row("2", 0, 0.1, **compressed), row("2", 1, 0.4, **compressed)]
    results = tmp_path / "results"
    results.mkdir()
    (results / "kgcn-music.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows[::-1]))
    (results / "kgcn-music.md").write_text("Two bits: {{2 Recall@20}}, {{2 - none}}, {{2 mean x fewer}} times fewer.")
    (results / "after.md").write_text("Not run: more.")
    (results / "kgcn-music-stopped-early.jsonl").write_text(json.dumps(rows[0]) + "\n")
    page, image, _ = modules["tinykg_tables"].render(results, tmp_path / "docs")
    text = page.read_text()
    assert "--models kgcn --sets music --ways none 2 --seeds 0 1\n" in text
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    plain, two = (dict(zip(lines[0], line, strict=True)) for line in lines[2:4])
    assert (plain["Recall@20"], plain["seeds"], plain["x fewer"]) == ("0.3000 ± 0.1414", "2", "1.0")
    assert (two["NDCG@20"], two["to uncompressed"]) == ("0.1250 ± 0.1061", "-16.67 ± 16.67 %")
    assert (two["raw"], two["stored"], two["x fewer"]) == ("8.00 MiB", "1.00 MiB", "8.0")
    assert (two["mean stored"], two["mean x fewer"]) == ("256.00 KiB", "16.0")
    assert "Two bits: 0.2500 ± 0.2121, -16.67 ± 16.67 %, 16.0 times fewer." in text
    earlier = text.partition("## kgcn on music, stopped early\n\n")[2]
    assert earlier.startswith("| activations")  # nothing makes these runs again
    assert text.endswith("Not run: more.\n")
    assert image.read_bytes().startswith(b"\x89PNG")

    (results / "kgcn-music.md").write_text("{{4 Recall@20}}")
    with pytest.raises(ValueError, match="must name a way of none, 2 and a column"):
        modules["tinykg_tables"].render(results, tmp_path / "docs")


def test_the_page_in_docs_is_up_to_date(modules: dict[str, Any], tmp_path: Path) -> None:
    page, *images = modules["tinykg_tables"].render(REPRODUCE / "results", tmp_path)
    docs = REPRODUCE.parents[1] / "docs"
    assert page.read_text() == (docs / "results.md").read_text()
    assert {path.name for path in images} == {path.name for path in docs.glob("results-*.png")}


def test_a_run_in_weights_and_biases(
    modules: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, wandb_logger: Any
) -> None:
    """`wandb_logger` is here for its folders and its end; the script makes its own logger."""
    from offline_runs import records

    monkeypatch.setenv("WANDB_MODE", "offline")
    pytest.importorskip("wandb").teardown()  # which reads the environment once, and may have done so in another test
    loggers: list[Any] = []
    make = modules["tinykg"].wandb_logger
    monkeypatch.setattr(modules["tinykg"], "wandb_logger", lambda *args: loggers.append(make(*args)) or loggers[-1])
    options = ("--models", "kgcn-ctr", "--ways", "2", "--seeds", "3", "--epochs", "1", "--wandb", "the-table")
    call(modules["tinykg"], monkeypatch, tmp_path, *options)
    result = kept(tmp_path, "kgcn-ctr")["2", 3]

    files, found = records(loggers[0])
    (run,) = [record["run"] for record in found if record["type"] == "run"][-1:]
    assert (run["project"], run["run_group"]) == ("the-table", f"kgcn-ctr/{DATA}/2")
    rows = [record["history"]["item"] for record in found if record["type"] == "history"]
    merged = {name: value for line in rows for name, value in line.items()}
    assert merged["test/auc"] == pytest.approx(result["test/auc"])
    assert merged["val/auc"] == pytest.approx(result["best"])
    assert merged["result/stored_mib"] == pytest.approx(result["stored_mib"])
    table = json.loads((files / merged["tinykg/ledger.path"]).read_text())
    stored = table["columns"].index("stored_bytes")
    assert sum(line[stored] for line in table["data"]) == pytest.approx(result["stored_mib"] * 2**20)


def test_each_model_is_searched_as_often(
    modules: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By hand first; no trial is tested, a finished one is not repeated, and the page shows them."""
    tuning = importlib.import_module("tuning")
    assert doctest.testmod(tuning).failed == 0
    options = ("--data", ".", "--set", DATA, "--models", "lightgcn", "bprmf", "--epochs", "1", "--out", str(tmp_path))

    def search(trials: int, *more: str) -> list[dict[str, Any]]:
        monkeypatch.setattr(sys, "argv", ["tuning.py", *options, "--trials", str(trials), *more])
        tuning.main()
        return [json.loads(line) for line in (tmp_path / "tuning.jsonl").read_text().splitlines()]

    first = search(2)
    assert [(row["model"], row["trial"]) for row in first] == [
        ("lightgcn", 0),
        ("bprmf", 0),
        ("lightgcn", 1),
        ("bprmf", 1),
    ]
    assert not any(name.startswith("test/") for row in first for name in row)
    assert first[1]["settings"]["model"][1]["num_layers"] == 0
    assert first[0]["tuned"]["lr"] != first[2]["tuned"]["lr"]
    assert search(3)[:4] == first
    assert "| bprmf on synthetic:1000 | 3 |" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="trial 0 of lightgcn was made with other settings"):
        search(3, "--patience", "3")
    call(modules["tinykg"], monkeypatch, tmp_path, "--render", "--docs", str(tmp_path / "docs"))
    assert "--models lightgcn bprmf --trials 3" in (tmp_path / "docs" / "results.md").read_text()
    assert (tmp_path / "docs" / "results-tuning.png").exists()
