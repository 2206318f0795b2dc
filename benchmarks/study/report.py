"""Tables and pictures of the results: `python -m study report` writes them into docs/study.md and docs/figures."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .pictures import Lines, heat_maps, picture
from .runs import (
    LANGUAGE_PEERS,
    LANGUAGE_TOKENS,
    ON_CPU,
    PLANS,
    RATES,
    RECALL_TOKENS,
    SHORT_NEEDLE_TOKENS,
    best_rates,
    predicted_seconds,
    seconds_per_million,
)
from .training import read_results

ROOT = Path(__file__).resolve().parents[2]
PAGE, FIGURES = ROOT / "docs" / "study.md", ROOT / "docs" / "figures"
NEEDLE_LENGTHS = (512, 4096, 16384, 32768, 65536)  # of the table
SPACING = "32"  # the number of pairs that was trained on
PAIRS = [
    ("nsa", "full"),
    ("nsa+conv", "full+conv"),
    ("nsa-dropped+conv", "full+conv"),
    ("nsa-dropped+conv", "nsa+conv"),
]
Result = dict[str, Any]


def accuracies(results: list[Result], task: str, keep: Callable[[Result], bool], spacing: str = SPACING) -> Lines:
    """Accuracy with a pair for each `spacing` tokens of the runs of a task that `keep` keeps."""
    lines: Lines = {}
    for result in results:
        if result["run"]["task"] != task or "accuracy" not in result.get("scores", {}) or not keep(result):
            continue
        for length, row in result["scores"]["accuracy"].items():
            lines.setdefault(result["run"]["model"], {}).setdefault(int(length), []).append(row[spacing])
    return lines


def cell(values: list[float]) -> str:
    """Mean and, of several, the spread (standard deviation)."""
    mean = f"{statistics.mean(values):.3f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.3f}"


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def recall_table(results: list[Result], task: str, tokens: int, cost: dict[str, float]) -> str:
    """Each model at its best rate, over its seeds: accuracy by length, and what a run cost."""
    rates = best_rates(results, task, tokens)

    def chosen(result: Result) -> bool:
        run = result["run"]
        return run["tokens"] == tokens and run["lr"] == rates.get(run["model"])

    lines = accuracies(results, task, chosen)
    lengths = sorted({length for row in lines.values() for length in row})
    rows = []
    for model, row in lines.items():
        own = [r for r in results if r["run"]["model"] == model and r["run"]["task"] == task and chosen(r)]
        alone = f"{cost[model] * tokens / 1e6:.1f}" if model in cost else ""
        peak = f"{max(r['peak_bytes'] for r in own) / 1e9:.2f}"
        values = [cell(row[length]) if length in row else "" for length in lengths]
        rows.append([model, f"{rates[model]:g}", str(len(own)), *values, alone, peak])
    return table(["model", "rate", "seeds", *map(str, lengths), "s alone", "GB"], rows)


def longest_accuracy(scores: dict[str, Any]) -> float:
    """With the number of pairs that was trained on."""
    return scores["accuracy"][max(scores["accuracy"], key=int)][SPACING]


def longest_bits(scores: dict[str, Any]) -> float:
    return scores["language"][max(scores["language"], key=int)]["bits_per_byte"]


def signs_found(scores: dict[str, Any]) -> float:
    """Single digits of the codes, over all lengths and depths."""
    return statistics.mean(cell for row in scores["needle"]["digits"].values() for cell in row)


def sweep_table(
    results: list[Result], task: str, tokens: int, value: Callable[[dict[str, Any]], float] = longest_accuracy
) -> str:
    """`value` of the scores of every run that is there, by model and rate; "-" for what was not made."""
    runs = [r for r in results if r["run"]["task"] == task and r["run"]["tokens"] == tokens]
    rates = sorted({r["run"]["lr"] for r in runs})
    rows = []
    for model in dict.fromkeys(r["run"]["model"] for r in runs):
        row = [model]
        for lr in rates:
            own = [r for r in runs if r["run"]["model"] == model and r["run"]["lr"] == lr]
            values = [value(r["scores"]) for r in own if r["status"] == "done"]
            row.append(cell(values) if values else (own[0]["status"] if own else "-"))
        rows.append(row)
    return table(["model", *(f"{lr:g}" for lr in rates)], rows)


def paired_table(results: list[Result], task: str, tokens: int, pairs: list[tuple[str, str]]) -> str:
    """Accuracy at the longest length less that of the peer with the same seed and data, both at their best rates."""
    rates = best_rates(results, task, tokens)
    longest: dict[str, dict[int, float]] = {}
    for result in results:
        run = result["run"]
        if (run["task"], run["tokens"]) == (task, tokens) and run["lr"] == rates.get(run["model"]):
            scores = result["scores"]["accuracy"]
            longest.setdefault(run["model"], {})[run["seed"]] = scores[max(scores, key=int)][SPACING]
    rows = []
    for model, peer in pairs:
        seeds = sorted(longest.get(model, {}).keys() & longest.get(peer, {}).keys())
        differences = [longest[model][seed] - longest[peer][seed] for seed in seeds]
        if seeds:
            rows.append([model, peer, ", ".join(map(str, seeds)), cell(differences)])
    return table(["model", "less", "seeds", "difference"], rows)


def language_table(results: list[Result], task: str, lr: float) -> str:
    """Bits per byte of held-out text: over texts of 8,192 and of 1,024 bytes, and less a peer's with the same seed."""
    results = [result for result in results if result["run"]["lr"] == lr]
    scores: dict[str, dict[int, dict[str, float]]] = {}
    for result in results:
        if result["run"]["task"] == task and task in result.get("scores", {}):
            bits = {length: row["bits_per_byte"] for length, row in result["scores"][task].items()}
            scores.setdefault(result["run"]["model"], {})[result["run"]["seed"]] = bits
    rows = []
    for model, seeds in sorted(scores.items(), key=lambda item: statistics.mean(s["8192"] for s in item[1].values())):
        peer = scores.get("full+conv" if model.endswith("+conv") else "full", {})
        less = [bits["8192"] - peer[seed]["8192"] for seed, bits in seeds.items() if seed in peer]
        by_length = [cell([bits[length] for bits in seeds.values()]) for length in ("8192", "1024")]
        rows.append([model, str(len(seeds)), *by_length, cell(less) if less and "full" not in model else ""])
    return table(["model", "seeds", "8,192", "1,024", "less full attention's, at 8,192"], rows)


def long_language_table(results: list[Result], task: str, peers: dict[str, str]) -> str:
    """Bits per byte of each model after its share of its peer's time, and less the peer's with the same seed."""
    bits: dict[str, dict[int, float]] = {}
    runs: dict[str, dict[str, Any]] = {}
    for result in results:
        if result["run"]["task"] == task and "language" in result.get("scores", {}):
            run = result["run"]
            bits.setdefault(run["model"], {})[run["seed"]] = longest_bits(result["scores"])
            runs[run["model"]] = run
    rows = []
    for peer in dict.fromkeys(peers.values()):
        for model in (peer, *(m for m, p in peers.items() if p == peer)):
            if model in bits:
                common = bits[model].keys() & bits.get(peer, {}).keys()
                less = cell([bits[model][seed] - bits[peer][seed] for seed in sorted(common)]) if common else ""
                tokens, lr = f"{runs[model]['tokens'] / 1e6:g} M", f"{runs[model]['lr']:g}"
                rows.append([model, lr, tokens, str(len(bits[model])), cell([*bits[model].values()])])
                rows[-1].append("" if model == peer else less)
    return table(["model", "rate", "bytes", "seeds", "bits per byte", "less its peer's"], rows)


def needle_table(results: list[Result], task: str, lengths: tuple[int, ...]) -> str:
    """Codes found, over all depths, by length, and single signs at the longest; the mean over seeds."""
    found: dict[tuple[str, int, float], list[Result]] = {}
    for result in results:
        run = result["run"]
        if run["task"] == task and "needle" in result.get("scores", {}):
            found.setdefault((run["model"], run["tokens"], run["lr"]), []).append(result["scores"]["needle"])
    rows = []
    for (model, tokens, lr), scores in found.items():
        codes = [cell([statistics.mean(s["codes"][str(n)]) for s in scores]) for n in lengths]
        signs = cell([statistics.mean(s["digits"][str(max(lengths))]) for s in scores])
        rows.append([model, f"{lr:g}", f"{tokens / 1e6:g} M", str(len(scores)), *codes, signs])
    if not rows:
        return f"No run yet: `python -m study plan {task}`."
    head = ["model", "rate", "tokens", "seeds", *(f"{n:,}" for n in lengths), f"signs at {max(lengths):,}"]
    return table(head, rows)


def lengths_table(lines: Lines) -> str:
    lengths = sorted({length for row in lines.values() for length in row})
    rows = [[model, *(cell(row[n]) if n in row else "" for n in lengths)] for model, row in lines.items()]
    return table(["model", *map(str, lengths)], rows)


def steps_table(out: Path, task: str) -> str:
    """Milliseconds of a step, each model alone."""
    measured = json.loads((out / f"_steps_{task}.json").read_text())
    times: dict[str, dict[int, float]] = {}
    for row in measured["rows"]:
        times.setdefault(row["model"], {})[row["length"]] = row["ms"]
    lengths = sorted({row["length"] for row in measured["rows"]})
    rows = [[model, *(f"{row[n]:.2f}" if n in row else "" for n in lengths)] for model, row in times.items()]
    return table(["model", *map(str, lengths)], rows)


def fill(page: str, name: str, text: str) -> str:
    """The page with `text` between <!-- name --> and <!-- /name -->. ValueError where it has no such place."""
    place = re.compile(rf"(<!-- {re.escape(name)} -->\n).*?(\n?<!-- /{re.escape(name)} -->)", re.DOTALL)
    if not place.search(page):
        raise ValueError(f"the page has no place <!-- {name} --> ... <!-- /{name} -->")
    return place.sub(lambda found: f"{found[1]}{text}\n{found[2].lstrip()}", page, count=1)


def plans_table(out: Path) -> str:
    """Every plan: its runs, how many are there, and what the others would take, where step times are known."""
    existing = {result["name"] for result in read_results(out)}
    rows = []
    for name, plan in PLANS.items():
        if name in ON_CPU:
            continue
        runs = plan(out)
        left = [run for run in runs if run.name not in existing]
        seconds = predicted_seconds(out, left)
        needs = "what it follows from" if not runs else "step times" if seconds is None else f"{seconds:.0f} s"
        rows.append([f"`{name}`", str(len(runs)), str(len(runs) - len(left)), needs if left or not runs else "-"])
    return table(["plan", "runs", "there", "still needs"], rows)


def write(out: Path, page: Path = PAGE, figures: Path = FIGURES) -> None:
    """Fill the page's places and draw its pictures from the results in `out`."""
    results = read_results(out)
    cost = seconds_per_million(out, "recall")
    first = {result["run"]["model"]: result for result in results if result["run"]["task"] == "recall"}

    def one_rate(result: Result) -> bool:
        run = result["run"]
        return run["tokens"] == RECALL_TOKENS and run["lr"] == 1e-3 and run["seed"] == 0

    choice = accuracies(results, "recall", lambda r: one_rate(r) and "+conv" in r["run"]["model"])
    places = {
        "steps": steps_table(out, "recall"),
        "sweep": sweep_table(results, "recall", RECALL_TOKENS),
        "recall": recall_table(results, "recall", RECALL_TOKENS, cost),
        "paired": paired_table(results, "recall", RECALL_TOKENS, PAIRS),
        "mqar": recall_table(results, "mqar", RECALL_TOKENS, cost),
        "mqar-paired": paired_table(results, "mqar", RECALL_TOKENS, PAIRS),
        "mqar-sweep": sweep_table(results, "mqar", RECALL_TOKENS),
        "choice": lengths_table(choice),
        "language": language_table(results, "language", RATES[0]),
        "language-sweep": sweep_table(results, "language", LANGUAGE_TOKENS, longest_bits),
        "language-32k": long_language_table(results, "language-32k", LANGUAGE_PEERS),
        "language-32k-steps": steps_table(out, "language-32k"),
        "needle-sweep": sweep_table(results, "needle-8k", SHORT_NEEDLE_TOKENS, signs_found),
        "needle": needle_table(results, "needle", NEEDLE_LENGTHS),
        "needle-rare": needle_table(results, "needle-rare", NEEDLE_LENGTHS),
        "needle-ten": needle_table(results, "needle-ten", NEEDLE_LENGTHS),
        "needle-mini": needle_table(results, "needle-mini", (256, 512)),
        "needle-steps": steps_table(out, "needle"),
        "reformer": lengths_table(accuracies(results, "recall", lambda r: r["run"]["model"] == "reformer")),
        "mini": lengths_table(accuracies(results, "recall-mini", lambda result: True, spacing="16")),
        "plans": plans_table(out),
        "parameters": table(
            ["model", "parameters", "SwiGLU"],
            [[m, f"{r['parameters']:,}", str(r["mlp_width"])] for m, r in sorted(first.items()) if "parameters" in r],
        ),
    }
    if heat_maps(results, "needle-ten", figures / "study-needle-ten.png"):
        places["needle-ten"] += "\n\n![three rare signs, found by length and depth](figures/study-needle-ten.png)"
    text = page.read_text()
    for name, place in places.items():
        text = fill(text, name, place)
    page.write_text(text)
    rates = best_rates(results, "recall", RECALL_TOKENS)
    best = accuracies(
        results,
        "recall",
        lambda r: r["run"]["tokens"] == RECALL_TOKENS and r["run"]["lr"] == rates.get(r["run"]["model"]),
    )
    if best:
        picture(best, "Associative recall in noise: accuracy, mean and range over seeds", figures / "study-recall.png")
    heat_maps(results, "needle", figures / "study-needle.png")
