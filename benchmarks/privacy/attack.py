"""Ask one update of a client with 8 images whether an image was among them.

    python -m benchmarks.privacy.attack --out results/privacy/attack.json

The gradient of a linear layer is a sum of outer products with the layer's inputs, so the rows
of its update lie in the span of the features of the client's views (Geiping et al.,
https://arxiv.org/abs/2003.14053, section 3.1, recover inputs from it). The attacker draws views
of its own of an image, encodes them by the global model, and looks how much of the features
lies outside of the span of the update's strongest 32 directions: less for an image that was
trained on. It knows the global model, which was trained on other images before, and one of:

- the update of the client, as a server gets it without secure aggregation;
- the mean of this client's update and four others', which is what the next global model
  tells everyone, and all that a server learns under secure aggregation;
- that mean clipped and noised for epsilon 10 in this one round;
- the masked update, which is what the server gets of this client under secure aggregation.

The area under the ROC curve is 0.5 for a guess and 1 for certainty; 8 members and 8 others in
each trial, drawn anew from one pool of images, against one global model: trials share images, so
their standard error is a little small. Rank and number of views were chosen on other draws.
"""

import argparse
import json
import secrets
from collections.abc import Mapping
from dataclasses import replace
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
from fedssl.networks.state import load_state
from fedssl.runs.provenance import provenance
from fedssl.seeding import generator_for
from fedssl.training.local import local_train
from utils import build_method, build_schedule, build_train_settings, build_views, open_images

IMAGES, CLIENTS = 8, 5
STEPS, WARM_ROUND = 100, 4  # of the global model before; the round whose learning rate it has
RANK, VIEWS = 32, 16
EPSILON, DELTA = 10.0, 1e-5
LAYER = "projection_head.0.weight"
OVERRIDES = ["model.norm=group", "precision=float32"]
PLAIN, MEAN, NOISED, HIDDEN = (
    "the update itself",
    "the mean of five updates",
    f"that mean, clipped and noised, epsilon {EPSILON:g}",
    "the masked update",
)
State = Mapping[str, Tensor]


def noise_multiplier_for(epsilon: float) -> float:
    """Find the noise with which one round has this epsilon."""
    low, high = 0.1, 100.0
    for _ in range(40):
        middle = (low * high) ** 0.5
        settings = PrivacySettings("central", middle, 1.0, DELTA, CLIENTS, CLIENTS)
        low, high = (middle, high) if settings.epsilon_after(1) > epsilon else (low, middle)
    return high


class Attack:
    """A global model that was trained for a while, and images that it has not seen."""

    def __init__(self, config: DictConfig) -> None:
        """Train the global model on one half of the images."""
        self.config, self.backend = config, choose_backend(config.precision)
        self.pixels = open_images(config).train.pixels
        self.method = build_method(config, self.backend.device)
        self.views, self.schedule = build_views(config), build_schedule(config)
        self.settings = build_train_settings(config)
        order = np.random.default_rng(config.seed).permutation(len(self.pixels))
        seen, self.unseen = np.array_split(order, 2)
        longer = replace(self.settings, local_epochs=STEPS, max_steps=STEPS)
        self._train(seen, longer, "warm")
        self.start = self._state()

    def _state(self) -> dict[str, Tensor]:
        return {name: value.clone() for name, value in self.method.state_dict().items()}

    def _train(self, rows: np.ndarray, settings, *purpose: int | str) -> None:
        local_train(
            self.method,
            self.pixels,
            rows,
            self.views,
            settings,
            plan=self.schedule.plan(WARM_ROUND),
            proximal_mu=0.0,
            generator=generator_for(self.config.seed, "attack", *purpose),
            backend=self.backend,
        )

    def update(self, rows: np.ndarray, trial: int, client: int) -> dict[str, Tensor]:
        """Train a client for a round; give the way that its weights went."""
        load_state(self.method, self.start)
        self._train(rows, self.settings, trial, client)
        return {n: v - self.start[n] for n, v in self.method.state_dict().items()}

    @torch.no_grad()
    def features(self, rows: np.ndarray, trial: int) -> list[Tensor]:
        """Give the features (VIEWS, D) of views of each image, by the global model."""
        load_state(self.method, self.start)
        found = []
        for row in rows:
            generator = generator_for(self.config.seed, "attacker's views", trial, int(row))
            batch = torch.from_numpy(self.pixels[[row] * (VIEWS // 2)])
            found.append(self.method.encoder(self.views.two_views(batch, generator)).double())
        return found

    def try_once(self, trial: int) -> dict[str, float]:
        """Give the area under the ROC curve for each thing that an attacker may see."""
        drawn = np.random.default_rng(trial).permutation(self.unseen)
        *clients, strangers = np.split(drawn[: IMAGES * (CLIENTS + 1)], CLIENTS + 1)
        ways = [self.update(rows, trial, place) for place, rows in enumerate(clients)]
        random = torch.Generator().manual_seed(trial)
        seen = {
            PLAIN: ways[0][LAYER],
            MEAN: mean_of(ways)[LAYER],
            NOISED: noised(ways, random)[LAYER],
            HIDDEN: masked(ways[0][LAYER]),
        }
        features = self.features(np.concatenate([clients[0], strangers]), trial)
        members = [1] * IMAGES + [0] * IMAGES
        return {
            name: float(roc_auc_score(members, [-outside(way, each) for each in features]))
            for name, way in seen.items()
        }


def outside(way: Tensor, features: Tensor) -> float:
    """Tell what share of features (V, D) lies outside of the rows of a layer's way (H, D)."""
    _, _, directions = torch.linalg.svd(way.double(), full_matrices=False)
    span = directions[:RANK]
    left = features - features @ span.T @ span
    return float((left.norm(dim=1) / features.norm(dim=1)).mean())


def mean_of(ways: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Average updates."""
    return {name: torch.stack([way[name] for way in ways]).mean(dim=0) for name in ways[0]}


def length(way: State) -> float:
    """Measure an update."""
    return float(torch.cat([value.flatten() for value in way.values()]).norm())


def noised(ways: list[dict[str, Tensor]], random: torch.Generator) -> dict[str, Tensor]:
    """Clip updates to the median of their lengths, and noise their mean."""
    limit = float(np.median([length(way) for way in ways]))
    short = [{n: v * min(1.0, limit / length(way)) for n, v in way.items()} for way in ways]
    spread = noise_multiplier_for(EPSILON) * limit / len(ways)
    return {
        name: value + spread * torch.randn(value.shape, generator=random)
        for name, value in mean_of(short).items()
    }


def masked(way: Tensor) -> Tensor:
    """Read the masked update of a layer as if it had no mask."""
    plan, zero = FixedPoint(CLIENTS, largest=64.0, longest=1e9), {LAYER: torch.zeros_like(way)}
    numbers, _ = plan.encode({LAYER: way}, zero, 1.0)
    numbers += mask(secrets.token_bytes(32), len(numbers))
    return plan.decode(numbers, zero, 1.0)[LAYER]


def main() -> None:
    """Run the trials, print, and write everything with its provenance."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=40)
    parser.add_argument("--first", type=int, default=0, help="number of the first trial")
    parser.add_argument("--out", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    given = parser.parse_args()
    overrides = [*OVERRIDES, *given.overrides]
    attack = Attack(load_config("config", overrides))
    trials = []
    for number in range(given.first, given.first + given.trials):
        trials.append(attack.try_once(number))
        print(json.dumps({name: round(area, 3) for name, area in trials[-1].items()}), flush=True)
    areas = {name: [trial[name] for trial in trials] for name in trials[0]}
    told = {
        name: {
            "mean": float(np.mean(each)),
            "standard_error": float(np.std(each, ddof=1) / len(each) ** 0.5),
        }
        for name, each in areas.items()
    }
    print(json.dumps(told, indent=2))
    if given.out:
        result = {"overrides": overrides, "areas": told, "trials": areas, "measured": provenance()}
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
