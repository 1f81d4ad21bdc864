"""Write the tables of the README and of docs/ from the recorded runs.

python -m benchmarks.accuracy.tables

A table stands between two comments of a page, `<!-- NAME -->` and `<!-- end -->`.
What has not been recorded is an empty cell or no line.
"""

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from omegaconf import OmegaConf

from benchmarks.accuracy.recorded import (
    COMPARED,
    COUNTS_OF_20,
    FEDERATIONS,
    METHODS,
    PRIVATE,
    SAME_TRAINING,
    SPLITS,
    WIRE_RUNS,
    WIRES,
    method_run,
    wire_run,
)
from benchmarks.markdown import head, line
from benchmarks.performance import tables as performance
from fedssl.env import ROOT

RESULTS = ROOT / "results"
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
DIGITS = (
    ("federated SimCLR", "linear head"),
    ("federated SimCLR", "kNN"),
    ("random encoder", "linear head"),
    ("raw pixels", "logistic regression"),
)
BUDGET_TITLES = {  # what the pages call the runs; experiments have a line without a record, too
    "cifar10_cpu": "`cifar10_cpu`",
    "cifar10_cpu_client_alone": "one of its clients alone",
    "cifar10_cpu_centralized": "all its images in one place",
    "cifar10_cpu_seven_rounds": "`cifar10_cpu` in seven rounds, float32",
    "cifar10_cpu_seven_rounds_client_alone": "one of its clients alone",
    "cifar10_cpu_seven_rounds_centralized": "all its images in one place",
    "cifar10_cpu_long": "`cifar10_cpu_long`",
    "cifar10_cpu_long_seven_rounds": "`cifar10_cpu_long` in seven rounds, float32",
    "cifar10_gpu": "`cifar10_gpu`",
}
SITES = {"digits": "digits", "cifar10": "CIFAR-10"}  # below results/sites, and their titles
MEANINGLESS = 1e4  # an epsilon above which nothing is promised
Results = list[dict[str, Any]]


def read_seeds(name: str) -> list[Results]:
    """Read the evaluations of every recorded seed of a run, none if there is no record."""
    files = sorted((RESULTS / name).glob("seed*/results.json"))
    return [json.loads(file.read_text()) for file in files]


def find_score(
    results: Results, encoder: str, method: str, mode: str = "linear", fraction: float = 0.1
) -> Mapping[str, Any] | None:
    """Find the row of an evaluation, the newest if there are several."""
    for result in reversed(results):
        if result["mode"] == mode and result["protocol"]["label_fraction"] == fraction:
            for row in result["rows"]:
                if (row["encoder"], row["method"]) == (encoder, method):
                    return row
    return None


def show(values: list[float]) -> str:
    """Show the mean in percent and, of several, the sample standard deviation."""
    spread = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.mean(values):.1f}{spread}" if values else ""


def cell(seeds: list[Results], *what: Any, **more: Any) -> str:
    """Show the mean over the seeds' means, and their spread."""
    scores = [find_score(results, *what, **more) for results in seeds]
    return show([score["mean"] for score in scores if score])


def digits_table() -> list[str]:
    """Tabulate the run of `python main.py` by seed, each with the spread over labels.

    The last two lines are means of seeds, of all in float32 and of all in bfloat16.
    """
    seeds = read_seeds("digits")
    lines = head("seed", *(f"{encoder}, {method}, %" for encoder, method in DIGITS))
    for results in seeds:
        rows = [find_score(results, *what) for what in DIGITS]
        lines.append(line(results[0]["seed"], *(show(row["top1"]) for row in rows)))
    for title, name in (("mean of seeds", "digits"), ("in bfloat16", "digits_bfloat16")):
        seeds = read_seeds(name)
        lines.append(line(f"**{title}**", *(cell(seeds, *what) for what in DIGITS)))
    return lines


def budget_table() -> list[str]:
    """Tabulate the experiments with a fixed budget."""
    names = ("linear head, 10 %", "kNN, 10 %", "random encoder", "raw pixels", "rounds", "all")
    lines = head("experiment", *names)
    for name, title in BUDGET_TITLES.items():
        seeds, times = read_seeds(name), ["", ""]
        if not seeds and "`" not in title:
            continue
        if seeds:
            folder = RESULTS / name / "seed0"
            rounds = [json.loads(text) for text in (folder / "metrics.jsonl").open()]
            commands = json.loads((folder / "commands.json").read_text())
            spent = (sum(row["seconds"] for row in rounds), commands[0]["wall_s"])
            times = [f"{seconds / 60:.0f} min" for seconds in spent]
        rows = [find_score(results, *what) for results in seeds[:1] for what in DIGITS]
        cells = [show(row["top1"]) if row else "" for row in rows] or [""] * len(DIGITS)
        lines.append(line(title, *cells, *times))
    return lines


def comparison_table() -> list[str]:
    """Tabulate the comparison of federations, as far as it is recorded."""
    ours = ("federated SimCLR", "linear head")
    names = ("1 % of labels", "10 %", "100 %", "kNN, 10 %", "fine-tuned, 10 %", "seeds")
    lines = head("", *names)
    for name, (title, _) in COMPARED.items():
        seeds = read_seeds(f"sweep/{name}")
        if not seeds:
            continue
        fractions = (cell(seeds, *ours, fraction=fraction) for fraction in (0.01, 0.1, 1.0))
        knn = cell(seeds, "federated SimCLR", "kNN")
        tuned = cell(seeds, "federated SimCLR", "fine-tuned", mode="finetune")
        lines.append(line(title, *fractions, knn, tuned, len(seeds)))
    seeds, untrained = read_seeds("sweep/clients-5"), ("random encoder", "linear head")
    if not seeds:
        return lines if len(lines) > 2 else ["Not recorded yet."]
    fractions = (cell(seeds, *untrained, fraction=fraction) for fraction in (0.01, 0.1, 1.0))
    knn = cell(seeds, "random encoder", "kNN")
    lines.append(line("random encoder", *fractions, knn, "", len(seeds)))
    labels = cell(seeds, "labels only", "supervised", mode="supervised")
    lines.append(line("the network trained on the labels alone", "", labels, *[""] * 3, len(seeds)))
    return lines


def cost_columns(name: str) -> tuple[str, str, str]:
    """Tell what a recorded run cost: steps of each client, images of all, megabytes of each.

    The first is the time of a real federation, the second the compute of a simulation (the
    images that all clients trained on, in thousands), the third is empty for one client.
    """
    folder = RESULTS / name / "seed0"
    rounds = [json.loads(text) for text in (folder / "metrics.jsonl").open()]
    batch = OmegaConf.load(folder / "config.yaml").train.batch_size
    clients = [client for row in rounds for client in row["clients"] if client.get("images")]
    count = len({client["partition"] for client in clients})
    images = sum(client["images"] for client in clients)
    steps = images / count / batch
    moved = sum(row["bytes_moved"] for row in rounds) / count / 1e6
    of_batch = "" if batch == 64 else f" of {batch}"
    return f"{steps:,.0f}{of_batch}", f"{images / 1000:,.0f}", f"{moved:,.0f}" if count > 1 else ""


def scores_of(name: str) -> list[str]:
    """Show a run's linear head, converged head and kNN."""
    seeds = read_seeds(name)
    methods = ("linear head", "converged head", "kNN")
    return [cell(seeds, "federated SimCLR", method) for method in methods]


def federations_table() -> list[str]:
    """Tabulate what federations reach and cost, as far as it is recorded."""
    costs = ("steps each", "thousand images, all", "MB each")
    lines = head("", *costs, "linear head", "converged head", "kNN", "seeds")
    for name, (title, _) in FEDERATIONS.items():
        run = f"federation/{name}"
        if not name.startswith("of-20") and (seeds := read_seeds(run)):
            lines.append(line(title, *cost_columns(run), *scores_of(run), len(seeds)))
    return lines


def twenty_table() -> list[str]:
    """Tabulate clients of twenty against the same time and the same compute, head and kNN."""
    lines = head(
        "clients",
        "the federation",
        "the same time: one of them alone",
        "the same compute: one of them alone",
        "the same compute: their images in one place",
    )

    alone = both_scores("federation/of-20-1")
    for count in COUNTS_OF_20:
        same = (both_scores(f"federation/of-20-{how}-{count}") for how in ("steps", "together"))
        if found := both_scores(f"federation/of-20-{count}"):
            lines.append(line(count, found, alone, *(same if count > 1 else (alone, alone))))
    return lines if len(lines) > 2 else ["Not recorded yet."]


def methods_table() -> list[str]:
    """Compare methods in the federations of five and on digits, as far as they are recorded."""
    names = ("head / kNN", "rank", "two classes: head / kNN", "rank", "digits: head / kNN")
    lines = head("", *names, "pace", "MB a round", "seeds of CIFAR-10")
    for method, (title, _) in METHODS.items():
        even, uneven, digits = (method_run(method, split) for split in (*SPLITS, "digits"))
        cells = [both_scores(even), last_rank(even), both_scores(uneven), last_rank(uneven)]
        cells.append(both_scores(digits, 1))
        if any(cells):
            moved = bytes_a_round(even)[1] if cells[0] else ""
            counts = dict.fromkeys(str(n) for run in (even, uneven) if (n := len(read_seeds(run))))
            pace = performance.pace_of(SAME_TRAINING.get(method, method))
            lines.append(line(title, *cells, pace, moved, ", ".join(counts)))
    return lines


def both_scores(run: str, count: int | None = None) -> str:
    """Show a run's linear head and kNN, of the first so many seeds; nothing if there is none.

    Records older than other methods call every one of them SimCLR.
    """
    seeds = read_seeds(run)[:count]
    if not seeds:
        return ""
    name = seeds[0][0]["rows"][0]["encoder"]
    return " / ".join(cell(seeds, name, what) for what in ("linear head", "kNN"))


def last_rank(run: str) -> str:
    """Show the effective rank of the projections after the last round, the mean over the seeds."""
    files = sorted((RESULTS / run).glob("seed*/metrics.jsonl"))
    if not files:
        return ""
    ranks = [json.loads(file.read_text().splitlines()[-1])["effective_rank"] for file in files]
    return f"{statistics.mean(ranks):.0f}"


def read_sites(images: str) -> list[list[dict[str, Any]]]:
    """Read how sites were compared on some images: for each way to deal out what each seed gave."""
    files = sorted((RESULTS / "sites" / images).glob("seed*.json"))
    by_seed = [json.loads(file.read_text())["results"] for file in files]
    return [list(entries) for entries in zip(*by_seed, strict=True)]


def over_seeds(values: Sequence[Sequence[float]]) -> str:
    """Show means of seeds and their spread; of one seed the spread of its draws."""
    return show([statistics.mean(each) for each in values] if len(values) > 1 else [*values[0]])


def sites_table() -> list[str]:
    """Compare heads from sums with those of all labels in one place."""
    heads = ("head from sums", "head by rounds", "own head at each site", "linear head")
    names = ("same predictions as ridge in one place, %", *heads[:3], "20-epoch head in one place")
    lines = head("images", "dealt out", "sites", *names)
    for images in SITES:
        for entries in read_sites(images):
            same = f"{100 * min(min(entry['agreement']) for entry in entries):.2f}"
            scores = [over_seeds([entry[name]["top1"] for entry in entries]) for name in heads]
            first = entries[0]
            lines.append(line(SITES[images], first["dealt"], first["sites"], same, *scores))
    return lines


def tuned_table() -> list[str]:
    """Compare encoders that sites tuned with the frozen one."""
    names = ("fine-tuned by rounds", "tuned encoder, own head at each site")
    lines = head("images", "dealt out", "frozen, head from sums", *names)
    for images in SITES:
        for entries in read_sites(images):
            if "tuned" not in entries[0]:
                continue
            frozen = show([entry["head from sums"]["top1"][0] for entry in entries])
            tuned = [show([entry["tuned"][name] for entry in entries]) for name in names]
            lines.append(line(SITES[images], entries[0]["dealt"], frozen, *tuned))
    return lines


def rounding_table() -> list[str]:
    """Tabulate what rounding on the way costs and spares: megabytes up, scores, by wire."""
    titles = {"digits": "digits", "sweep": "`cifar10_sweep`, momentum travels too"}
    names = ("MB up a round", "MB in all a round", "linear head", "converged head", "kNN", "seeds")
    lines = head("", "wire", *names)
    for images in WIRE_RUNS:
        for wire in WIRES:
            run = wire_run(images, wire)
            if seeds := read_seeds(run):
                lines.append(
                    line(titles[images], wire, *bytes_a_round(run), *scores_of(run), len(seeds))
                )
    return lines


def bytes_a_round(run: str) -> tuple[str, str]:
    """Show the megabytes that a client sends in a round, and those in both directions.

    Rounds that end without an evaluation, which move less, are left out.
    """
    every = [json.loads(t) for t in (RESULTS / run / "seed0" / "metrics.jsonl").open()]
    rounds = [row for row in every if row["eval_loss"] is not None]
    clients = sum(1 for row in rounds for client in row["clients"] if client.get("images"))
    both = sum(row["bytes_moved"] for row in rounds) / clients / 1e6
    up = [row.get("bytes_up") for row in rounds]
    # Records older than rounding have what moved both ways alone.
    return "" if None in up else f"{sum(up) / clients / 1e6:.1f}", f"{both:.1f}"


def privacy_table() -> list[str]:
    """Tabulate what an encoder is worth at an epsilon, beside a random one."""
    methods = ("linear head", "converged head", "kNN")
    lines = head("", "epsilon", *methods)
    for name, (title, _) in PRIVATE.items():
        if read_seeds(run := f"privacy/{name}"):
            lines.append(line(title, epsilon_of(run), *scores_of(run)))
    untrained = read_seeds("privacy/thousand")
    lines.append(
        line("a random encoder", "", *(cell(untrained, "random encoder", m) for m in methods))
    )
    return lines


def epsilon_of(run: str) -> str:
    """Show the epsilon of a recorded run; none where its noise is nothing."""
    file = RESULTS / run / "seed0" / "metrics.jsonl"
    epsilon = json.loads(file.read_text().splitlines()[-1]).get("epsilon")
    return "none" if epsilon is None or epsilon > MEANINGLESS else f"{epsilon:.1f}"


def attack_table() -> list[str]:
    """Tabulate how well images of a client are told from others, by what is seen."""
    file = RESULTS / "privacy" / "attack.json"
    if not file.exists():
        return ["Not recorded yet."]
    lines = head("the attacker sees", "area under the ROC curve")
    for name, area in json.loads(file.read_text())["areas"].items():
        lines.append(line(name, f"{area['mean']:.2f} ± {area['standard_error']:.2f}"))
    return lines


def masking_table() -> list[str]:
    """Tabulate seconds and megabytes of a round, plain and masked."""
    file = RESULTS / "privacy" / "masking.json"
    if not file.exists():
        return ["Not recorded yet."]
    lines = head("encoder", "round", "seconds", "of these the server", "times the plain one", "MB")
    for encoder, kinds in json.loads(file.read_text())["rounds"].items():
        plain = kinds["plain"]["seconds"]
        for kind, cost in kinds.items():
            seconds = f"{cost['seconds']:.1f}", f"{cost['seconds_of_server']:.1f}"
            more = f"{cost['seconds'] / plain:.1f}", f"{cost['megabytes']:,.0f}"
            lines.append(line(encoder, kind, *seconds, *more))
    return lines


TABLES: dict[str, Callable[[], list[str]]] = {
    "digits": digits_table,
    "budgets": budget_table,
    "comparison": comparison_table,
    "federations": federations_table,
    "twenty": twenty_table,
    "methods": methods_table,
    "sites": sites_table,
    "tuned": tuned_table,
    "privacy": privacy_table,
    "attack": attack_table,
    "masking": masking_table,
    "rounding": rounding_table,
    **performance.TABLES,
}


def fill(text: str) -> str:
    """Put the tables of recorded runs in their places on a page.

    Raises:
        ValueError: a place has no end.
    """
    for name, table in TABLES.items():
        before, place, rest = text.partition(f"<!-- {name} -->\n")
        if not place:
            continue
        _, end, after = rest.partition("<!-- end -->")
        if not end:
            raise ValueError(f"the place of the table {name!r} has no end")
        text = f"{before}{place}" + "\n".join(table()) + f"\n{end}{after}"
    return text


def main() -> None:
    """Fill all pages and say which ones changed."""
    pages = {page: page.read_text() for page in PAGES}
    for name in TABLES:
        if not any(f"<!-- {name} -->\n" in text for text in pages.values()):
            raise SystemExit(f"no page has a place for the table {name!r}: <!-- {name} -->")
    for page, text in pages.items():
        filled = fill(text)
        page.write_text(filled)
        print(f"{page.relative_to(ROOT)}: {'as it was' if filled == text else 'written'}")


if __name__ == "__main__":
    main()
