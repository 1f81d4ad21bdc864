"""The encoder of a simulation measured as if no label left its client."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fedssl.errors import UserError
from fedssl.evaluation.base import EvaluationData
from fedssl.evaluation.classifier import ClassifierEvaluation
from fedssl.evaluation.converged import fit_converged_head
from fedssl.evaluation.linear import train_linear_head
from fedssl.networks.encoder import Encoder
from fedssl.networks.state import state_digest
from fedssl.runs.results import AT_SITES, Score
from fedssl.sites.heads import SiteScores, score_heads, to_score
from fedssl.sites.site import HeadSettings, LocalSites, Site, deal_like, draw_at_site


@dataclass(frozen=True)
class EvaluationAtSites(ClassifierEvaluation):
    """What evaluations share whose labels stay at the sites.

    The labels of `label_fraction` are drawn at each site; the test images of a simulation
    are dealt out by the classes that a site holds.

    Attributes:
        min_images: of a class at a site, for its sum to leave it.
        folds: of sites at most, which choose the weight decay of the head from sums.
    """

    needs_partitions = True

    min_images: int
    folds: int

    def count_labelled(self, data: EvaluationData) -> int:
        """Count the labels that all sites draw together."""
        return sum(map(len, self.draw(data, data.seeds[0])))

    def draw(self, data: EvaluationData, seed: int) -> list[np.ndarray]:
        """Draw at each site the rows whose labels may be seen, int64."""
        labels = data.train.labels
        return [
            rows[draw_at_site(labels[rows], self.label_fraction, seed, number)]
            for number, rows in enumerate(data.partitions)
        ]

    def make_sites(
        self,
        banks: Sequence[np.ndarray],
        draw: Sequence[np.ndarray],
        test: np.ndarray,
        data: EvaluationData,
    ) -> dict[int, Site]:
        """Give each partition, by its number, its labelled features and its test features.

        Args:
            banks: features of each site's drawn rows.
            test: features of all test images, (M, D).

        Raises:
            UserError: no site draws enough labels of a class.
        """
        labels, test_labels = data.train.labels, data.test.labels
        dealt = deal_like(data.partitions, labels, test_labels, data.seeds[0])
        sites = {
            number: Site.of(
                bank,
                labels[drawn],
                test[tested],
                test_labels[tested],
                data.num_classes,
                self.min_images,
            )
            for number, (bank, drawn, tested) in enumerate(zip(banks, draw, dealt, strict=True))
        }
        drawn_classes = {label for site in sites.values() for label in site.labels.tolist()}
        if len(drawn_classes) < 2:
            lacking = "a second class" if drawn_classes else "a class"
            raise UserError(
                f"min_images={self.min_images}: no site draws so many labels of {lacking}; "
                "lower it, or raise label_fraction"
            )
        return sites

    def encode_sites(
        self,
        encoder: Encoder,
        draws: Sequence[Sequence[np.ndarray]],
        test: np.ndarray,
        data: EvaluationData,
    ) -> list[dict[int, Site]]:
        """Encode the drawn images once, and give the sites of each draw.

        Args: as of `make_sites`, whose errors it raises.
        """
        rows = np.unique(np.concatenate([drawn for each in draws for drawn in each]))
        features = data.features(encoder, data.train.pixels[rows])
        return [
            self.make_sites(
                [features[np.searchsorted(rows, drawn)] for drawn in draw], draw, test, data
            )
            for draw in draws
        ]


@dataclass(frozen=True)
class FederatedEvaluation(EvaluationAtSites):
    """Two heads, and the score, from what the sites add up; beside them each site's own.

    Below stand the heads that all drawn labels in one place give.
    """

    mode = AT_SITES

    def run(self, name: str, encoder: Encoder, data: EvaluationData) -> list[Score]:
        """Score the heads of each draw.

        Raises:
            UserError: no site draws enough labels of a class.
            RuntimeError: the encoder changed, which would be a defect.
        """
        digest = state_digest(encoder)
        test = data.features(encoder, data.test.pixels)
        draws = [self.draw(data, seed) for seed in data.seeds]
        scores: dict[str, list[SiteScores]] = {}
        central: dict[str, list[float]] = {}
        sites_of_draws = self.encode_sites(encoder, draws, test, data)
        for seed, sites in zip(data.seeds, sites_of_draws, strict=True):
            for what, found in score_heads(LocalSites(sites, seed), self.folds, self.head).items():
                scores.setdefault(what, []).append(found)
            bank = np.concatenate([site.features for site in sites.values()])
            labels = np.concatenate([site.labels for site in sites.values()])
            in_one_place = {
                "linear head": train_linear_head(bank, labels, data.num_classes, self, seed),
                "converged head": fit_converged_head(bank, labels, seed),
            }
            for what, predict in in_one_place.items():
                central.setdefault(what, []).append(data.top1(predict(test)))
        if state_digest(encoder) != digest:
            raise RuntimeError("the frozen encoder changed during the evaluation")
        return [
            *(to_score(name, what, found, digest) for what, found in scores.items()),
            *(
                Score(name, f"{what}, labels in one place", values, encoder_sha256=digest)
                for what, values in central.items()
            ),
        ]

    @property
    def head(self) -> HeadSettings:
        """How the head by rounds is trained."""
        return HeadSettings(self.epochs, self.batch_size, self.learning_rate, self.weight_decay)
