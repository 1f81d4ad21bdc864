"""How the cost grows: seconds over images per client, image size, clients, rounds, model size.

    python -m benchmarks.performance.growth --path cifar10-parquet --out results/growth.json
    python -m benchmarks.performance.growth --draw results/growth.json    # the pictures again

Each of the five is varied alone. Clients, rounds and images are measured in simulations by
`python main.py` on CIFAR-10, image size and model size in this process by `local_train`. A
straight line through the logarithms gives the exponent of the growth. The broken line is an
estimate: what the same would take where ten machines like this one share the clients, each of
which still is on one machine alone.
"""

import argparse
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator
from torch import nn

from fedssl.compute import choose_backend, count_cores
from fedssl.config.compose import load_config
from fedssl.env import ROOT
from fedssl.reporting.figures import BLUE, ORANGE, WIDTH, save_figure
from fedssl.runs.provenance import provenance
from fedssl.seeding import generator_for
from fedssl.training.local import local_train
from fedssl.training.schedule import RoundPlan
from utils import build_method, build_train_settings, build_views

CLIENTS = 4  # where their number is not what varies
MACHINES = 10  # of the estimate
IMAGES = 50_000  # of CIFAR-10
SMALL = ["dataset=cifar10", "model.stem=imagenet", "num_cpus=1", "eval.baselines=false"]
SMALL += ["eval.seeds=1", "figures.map_images=10", "monitor.bank=100", "monitor.queries=50"]
SIZES = (16, 32, 64, 96, 128)
NETWORKS = [(e, s) for e in ("resnet18", "resnet50") for s in ("imagenet", "conv3x3_stride2")]
NETWORKS += [("resnet18", "conv3x3_stride1")]
STEPS = 4
TITLES = {
    "images": "images of each client",
    "size": "side of the images, pixels",
    "clients": "clients",
    "rounds": "rounds",
    "model": "multiplications for a view, millions",
}


@dataclass(frozen=True)
class Point:
    """What one amount of work takes.

    Attributes:
        amount: of what varies.
        seconds: of a round, of all rounds, or of a step.
        apart: of these, what more machines do not share: the server, the way of the weights.
        clients: that share the rest.
    """

    amount: float
    seconds: float
    apart: float
    clients: int

    def estimate(self) -> float:
        """Give the seconds with ten machines, on each of which a client takes all cores."""
        return self.apart + (self.seconds - self.apart) / min(MACHINES, self.clients)


def simulate(path: str, *overrides: str) -> list[dict[str, Any]]:
    """Run main.py up to the encoder, and give the numbers of its rounds."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["main.py", *SMALL, f"dataset.path={path}", f"output_dir={folder}", *overrides]
        run = subprocess.Popen([sys.executable, *command], cwd=ROOT, stdout=subprocess.DEVNULL)
        latest = Path(folder, "latest")
        while run.poll() is None and not (latest / "encoder.safetensors").exists():
            time.sleep(0.5)
        if run.poll():
            raise SystemExit(f"the run failed with status {run.returncode}: {overrides}")
        rows = [json.loads(text) for text in (latest / "metrics.jsonl").open()]
        run.send_signal(signal.SIGINT)  # without the evaluation
        run.wait()
        return rows


def apart_of(row: dict[str, Any], cores: int) -> float:
    """Give what is not training of a round: its time less that of the clients' steps."""
    trained = [client for client in row["clients"] if client.get("images")]
    spent = sum(client["images"] / client["images_per_second"] for client in trained)
    return max(0.0, row["seconds"] - spent / min(cores, len(trained)))


def by_images(path: str, cores: int) -> list[Point]:
    """Vary the images of each of four clients; a round is one pass over them."""
    points = []
    for each in (250, 500, 1_000, 2_000, 4_000):
        count, taking_part = IMAGES // each, list(range(CLIENTS))
        given = (f"num_clients={count}", f"participants={taking_part}".replace(" ", ""))
        *_, row = simulate(path, *given, "num_rounds=2")
        points.append(Point(each, row["seconds"], apart_of(row, cores), CLIENTS))
    return points


def by_clients(path: str, cores: int) -> list[Point]:
    """Vary the clients, each with 1,000 images."""
    points = []
    for count in (2, 4, 8, 16, 32):
        taking_part = f"participants={list(range(count))}".replace(" ", "")
        *_, row = simulate(path, f"num_clients={IMAGES // 1_000}", taking_part, "num_rounds=2")
        points.append(Point(count, row["seconds"], apart_of(row, cores), count))
    return points


def by_rounds(path: str, cores: int) -> list[Point]:
    """Add up the rounds of one run."""
    taking_part = f"participants={list(range(CLIENTS))}".replace(" ", "")
    rows = simulate(path, f"num_clients={IMAGES // 500}", taking_part, "num_rounds=16")
    points = []
    for count in (1, 2, 4, 8, 16):
        part = rows[:count]
        apart = sum(apart_of(row, cores) for row in part)
        points.append(Point(count, sum(row["seconds"] for row in part), apart, CLIENTS))
    return points


def time_steps(overrides: Sequence[str]) -> tuple[float, float]:
    """Time steps of 64 images by one client with all cores.

    Returns:
        Seconds of a step, and the multiplications of the encoder for a view, in millions.
    """
    config = load_config("config", ["dataset=cifar10", "train.batch_size=64", *overrides])
    backend, side = choose_backend(config.precision), config.dataset.image_size
    method = build_method(config, backend.device)
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (64 * STEPS, 3, side, side), dtype=np.uint8)
    settings = build_train_settings(config)

    def train(occasion: int) -> float:
        began = time.perf_counter()
        local_train(
            method,
            pixels,
            np.arange(len(pixels)),
            build_views(config),
            settings,
            plan=RoundPlan(1.0, 0.0, 0.1),
            proximal_mu=0.0,
            generator=generator_for(0, "growth", occasion),
            backend=backend,
        )
        return (time.perf_counter() - began) / STEPS

    train(0)
    seconds = float(np.median([train(occasion) for occasion in (1, 2, 3)]))
    return seconds, count_multiplications(method.encoder, side) / 1e6


def count_multiplications(encoder: nn.Module, side: int) -> int:
    """Count the multiplications of an encoder's convolutions and matrices for one image."""
    total = 0

    def count(layer: nn.Module, given: Any, output: torch.Tensor) -> None:
        nonlocal total
        weight = layer.weight
        assert isinstance(weight, torch.Tensor)
        total += weight[0].numel() * output[0].numel()

    layers = [m for m in encoder.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    hooks = [layer.register_forward_hook(count) for layer in layers]
    encoder.eval()
    with torch.no_grad():
        encoder(torch.zeros(1, 3, side, side))
    for hook in hooks:
        hook.remove()
    return total


def by_size() -> list[Point]:
    """Vary the side of the images, with a ResNet-18 of stride 2."""
    stem = "model.stem=conv3x3_stride2"
    found = [(side, time_steps([stem, f"dataset.image_size={side}"])[0]) for side in SIZES]
    return [Point(side, seconds, 0.0, 1) for side, seconds in found]


def by_model() -> list[Point]:
    """Vary the network, by its multiplications."""
    found = [time_steps([f"model={e}", f"model.stem={s}"]) for e, s in NETWORKS]
    return [Point(size, seconds, 0.0, 1) for seconds, size in sorted(found, key=lambda f: f[1])]


def exponent_of(points: Sequence[Point]) -> tuple[float, float]:
    """Fit seconds = factor * amount ** exponent by least squares of the logarithms."""
    amounts, seconds = zip(*[(p.amount, p.seconds) for p in points], strict=True)
    exponent, logarithm = np.polyfit(np.log(amounts), np.log(seconds), 1)
    return float(exponent), float(np.exp(logarithm))


def draw(name: str, points: Sequence[Point], file: Path) -> None:
    """Draw the points, the law, and the estimate for ten machines where they would help."""
    figure = Figure(figsize=(WIDTH, 2.8), layout="constrained")
    axes = figure.subplots()
    amounts = np.array([point.amount for point in points])
    exponent, factor = exponent_of(points)
    axes.plot(amounts, [p.seconds for p in points], "o", color=BLUE, label="measured")
    law = f"amount to the power of {exponent:.2f}"
    axes.plot(amounts, factor * amounts**exponent, "-", color=BLUE, linewidth=1, label=law)
    guessed = [point.estimate() for point in points]
    if any(g < 0.99 * p.seconds for g, p in zip(guessed, points, strict=True)):
        axes.plot(amounts, guessed, "--", color=ORANGE, label="ten machines: an estimate")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks(amounts, [f"{amount:,.0f}" for amount in amounts])
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(lambda seconds, place: f"{seconds:g}")
    axes.minorticks_off()
    axes.set_xlabel(TITLES[name])
    what = "a step" if name in ("size", "model") else "all" if name == "rounds" else "a round"
    axes.set_ylabel(f"seconds, {what}")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize="small")
    save_figure(figure, file)


def draw_all(record: dict[str, Any]) -> None:
    """Draw every picture of a record."""
    for name, rows in record["points"].items():
        file = ROOT / "images" / f"cost_{name}.png"
        draw(name, [Point(**row) for row in rows], file)


def main() -> None:
    """Measure, print the exponents, draw, and write everything with its provenance."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--path", help="a local copy of uoft-cs/cifar10")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--draw", type=Path, help="only draw what was recorded here")
    given = parser.parse_args()
    if given.draw:
        draw_all(json.loads(given.draw.read_text()))
        return
    if not given.path:
        parser.error("--path is missing: a local copy of uoft-cs/cifar10")
    path, cores = str(Path(given.path).resolve()), count_cores()
    torch.set_num_threads(cores)
    found = {"size": by_size(), "model": by_model()}
    found["images"] = by_images(path, cores)
    found["clients"] = by_clients(path, cores)
    found["rounds"] = by_rounds(path, cores)
    for name, points in found.items():
        print(f"{name}: {exponent_of(points)[0]:.2f}", [vars(point) for point in points])
    if given.out:
        rows = {name: [vars(point) for point in points] for name, points in found.items()}
        exponents = {name: round(exponent_of(points)[0], 3) for name, points in found.items()}
        record = {"cores": cores, "points": rows, "exponents": exponents}
        record |= {"command": "python -m benchmarks.performance.growth", "measured": provenance()}
        given.out.write_text(json.dumps(record, indent=2) + "\n")
        draw_all(record)


if __name__ == "__main__":
    main()
