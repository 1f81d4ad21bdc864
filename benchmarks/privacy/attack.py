"""Ask one update of a client with 8 images whether an image was among them.

    python -m benchmarks.privacy.attack --trials 30 --out results/privacy/attack.json

Membership inference by the loss: an image that the client trained on has a smaller loss after
its update than before, more than an image that it never saw (Yeom et al.,
https://arxiv.org/abs/1709.01604, for updates instead of models). The attacker knows the global
model, seven images of its own to compare with, and one of:

- the update of the client, as a server gets it without secure aggregation;
- the mean of this client's update and four others', which is what the next global model
  tells everyone, and all that a server learns under secure aggregation;
- that mean clipped and noised for epsilon 10 in this one round;
- the masked update, which is what the server gets of this client under secure aggregation.

The area under the ROC curve is 0.5 for a guess and 1 for certainty; 8 members and 8 others in
each trial, with other images, other seeds and a first round from a random initialization.
"""

import argparse
import json
import secrets
from pathlib import Path

import numpy as np
import torch
from omegaconf import DictConfig
from sklearn.metrics import roc_auc_score
from torch import Tensor

from fedssl.compute import choose_backend
from fedssl.config.compose import load_config
from fedssl.federation.privacy import PrivacySettings
from fedssl.federation.secure.fixed_point import FixedPoint
from fedssl.federation.secure.masks import mask
from fedssl.methods.base import Method
from fedssl.networks.state import load_state
from fedssl.runs.provenance import provenance
from fedssl.seeding import generator_for
from fedssl.training.local import local_train
from utils import build_method, build_schedule, build_train_settings, build_views, open_images

IMAGES, CLIENTS, COMPARED, DRAWS = 8, 5, 7, 4
EPSILON, DELTA = 10.0, 1e-5
OVERRIDES = ["model.norm=group", "train.local_epochs=4", "precision=float32"]
PLAIN, MEAN, NOISED, HIDDEN = (
    "the update itself",
    "the mean of five updates",
    f"that mean, clipped and noised (epsilon {EPSILON:g})",
    "the masked update",
)
State = dict[str, Tensor]


def noise_multiplier_for(epsilon: float) -> float:
    """Find the noise with which one round has this epsilon."""
    low, high = 0.1, 100.0
    for _ in range(40):
        middle = (low * high) ** 0.5
        settings = PrivacySettings("central", middle, 1.0, DELTA, CLIENTS, CLIENTS)
        low, high = (middle, high) if settings.epsilon_after(1) > epsilon else (low, middle)
    return high


class Trial:
    """One client with 8 images, four others, and the images that are asked about."""

    def __init__(self, config: DictConfig, pixels: np.ndarray, number: int) -> None:
        self.config, self.pixels, self.number = config, pixels, number
        self.backend = choose_backend(config.precision)
        self.method: Method = build_method(config, self.backend.device)
        self.start = {n: v.clone() for n, v in self.method.state_dict().items()}
        self.views = build_views(config)
        drawn = np.random.default_rng(number).permutation(len(pixels))
        parts = np.split(drawn[: IMAGES * (CLIENTS + 1)], CLIENTS + 1)
        self.clients, self.strangers = parts[:CLIENTS], parts[CLIENTS]
        self.own = drawn[IMAGES * (CLIENTS + 1) :][:COMPARED]

    def update(self, client: int) -> State:
        """Train a client as in a first round; give the way that its weights went."""
        load_state(self.method, self.start)
        local_train(
            self.method,
            self.pixels,
            self.clients[client],
            self.views,
            build_train_settings(self.config),
            plan=build_schedule(self.config).plan(1),
            proximal_mu=0.0,
            generator=generator_for(self.number, "attack", client),
            backend=self.backend,
        )
        return {n: v - self.start[n] for n, v in self.method.state_dict().items()}

    @torch.no_grad()
    def losses(self, way: State) -> np.ndarray:
        """Give the loss of every image that is asked about, after a step along a way."""
        load_state(self.method, {n: v + way[n] for n, v in self.start.items()})
        self.method.eval()
        found = []
        for image in [*self.clients[0], *self.strangers]:
            batch = torch.from_numpy(self.pixels[[image, *self.own]])
            generator = generator_for(self.number, "views", int(image))
            losses = [
                self.method.loss(self.views.two_views(batch, generator)).reported
                for _ in range(DRAWS)
            ]
            found.append(float(torch.stack(losses).mean()))
        return np.array(found)

    def told(self) -> dict[str, float]:
        """Give the area under the ROC curve of each attacker."""
        ways = [self.update(client) for client in range(CLIENTS)]
        members = [1] * IMAGES + [0] * IMAGES
        before = self.losses({n: torch.zeros_like(v) for n, v in self.start.items()})
        random = torch.Generator().manual_seed(self.number)
        seen = {
            PLAIN: ways[0],
            MEAN: mean_of(ways),
            NOISED: noised(ways, random),
            HIDDEN: masked(ways[0], self.start),
        }
        return {
            name: float(roc_auc_score(members, np.nan_to_num(before - self.losses(way))))
            for name, way in seen.items()
        }


def mean_of(ways: list[State]) -> State:
    """Average updates."""
    return {name: torch.stack([way[name] for way in ways]).mean(dim=0) for name in ways[0]}


def length(way: State) -> float:
    """Measure an update."""
    return float(torch.cat([value.flatten() for value in way.values()]).norm())


def noised(ways: list[State], random: torch.Generator) -> State:
    """Clip updates to the median of their lengths, and noise their mean."""
    limit = float(np.median([length(way) for way in ways]))
    short = [{n: v * min(1.0, limit / length(way)) for n, v in way.items()} for way in ways]
    spread = noise_multiplier_for(EPSILON) * limit / len(ways)
    return {
        name: value + spread * torch.randn(value.shape, generator=random)
        for name, value in mean_of(short).items()
    }


def masked(way: State, start: State) -> State:
    """Read a masked update as if it had no mask."""
    plan = FixedPoint(CLIENTS, largest=64.0, longest=1e9)
    numbers, _ = plan.encode({n: v + way[n] for n, v in start.items()}, start, 1.0)
    numbers += mask(secrets.token_bytes(32), len(numbers))
    after = plan.decode(numbers, start, 1.0)
    return {name: after[name] - value for name, value in start.items()}


def main() -> None:
    """Run the trials, print, and write everything with its provenance."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=30)
    parser.add_argument("--out", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    given = parser.parse_args()
    overrides = [*OVERRIDES, *given.overrides]
    config = load_config("config", overrides)
    pixels = open_images(config).train.pixels
    trials = []
    for number in range(given.trials):
        config.seed = number
        trials.append(Trial(config, pixels, number).told())
        print(json.dumps({name: round(area, 3) for name, area in trials[-1].items()}), flush=True)
    areas = {name: [trial[name] for trial in trials] for name in trials[0]}
    told = {
        name: {
            "mean": float(np.mean(a)),
            "standard_error": float(np.std(a, ddof=1) / len(a) ** 0.5),
        }
        for name, a in areas.items()
    }
    print(json.dumps(told, indent=2))
    if given.out:
        result = {"overrides": overrides, "areas": told, "trials": areas, "measured": provenance()}
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
