"""The encoder of a simulation tuned by rounds, as if no label left its client."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fedssl.evaluation.base import EvaluationData
from fedssl.networks.encoder import Encoder
from fedssl.networks.state import load_state
from fedssl.runs.results import FROM_SUMS, TUNED, TUNED_AT_SITES, Score
from fedssl.sites.evaluation import EvaluationAtSites
from fedssl.sites.heads import SiteScores, fit_from_sums, score, score_tuned, to_score
from fedssl.sites.site import LocalSites, TuneSettings
from fedssl.sites.sums import leave_out_rare
from fedssl.sites.tuning import (
    Classifying,
    State,
    Tuned,
    begin_with,
    take_apart,
    tune_at_site,
    tune_by_rounds,
    tune_generator,
)


@dataclass(frozen=True)
class FederatedFineTuning(EvaluationAtSites):
    """Encoder and head tuned by FedAvg over the sites, from the head from sums.

    Beside it each site's own head over the tuned encoder, and the head from sums over the
    encoder as it was.

    Attributes:
        epochs: passes over the labelled images of each site in a round.
        rounds: of FedAvg.
        encoder_learning_rate: of the encoder, which has no weight decay.
    """

    mode = TUNED_AT_SITES

    rounds: int
    encoder_learning_rate: float

    @property
    def settings(self) -> TuneSettings:
        """How the sites train."""
        return TuneSettings(
            self.rounds,
            self.epochs,
            self.batch_size,
            self.learning_rate,
            self.weight_decay,
            self.encoder_learning_rate,
        )

    def run(self, name: str, encoder: Encoder, data: EvaluationData) -> list[Score]:
        """Score tuned copies of the encoder, one for each draw of labels.

        Raises:
            UserError: no site draws enough labels of a class.
            RuntimeError: the loss is not finite any more.
        """
        test = data.features(encoder, data.test.pixels)
        draws = [self.draw(data, seed) for seed in data.seeds]
        scores: dict[str, list[SiteScores]] = {}
        first: State = {}
        sites_of_draws = self.encode_sites(encoder, draws, test, data)
        for seed, draw, sites in zip(data.seeds, draws, sites_of_draws, strict=True):
            asked = LocalSites(sites, seed)
            _, head = fit_from_sums(asked, self.folds)
            (frozen,) = score(asked, [head])
            network = Classifying(copy.deepcopy(encoder), data.num_classes)
            begun = begin_with(encoder.state_dict(), head)
            try:
                state, tuned = take_apart(self.tune(network, begun, draw, data, seed))
            except FloatingPointError as error:
                raise RuntimeError(str(error)) from error
            load_state(network.encoder, state)
            tuned_test = data.features(network.encoder, data.test.pixels)
            (again,) = self.encode_sites(network.encoder, [draw], tuned_test, data)
            for what, found in score_tuned(LocalSites(again, seed), tuned).items():
                scores.setdefault(what, []).append(found)
            scores.setdefault(FROM_SUMS, []).append(frozen)
            first = first or state
        return [
            to_score(name, what, found, None, first if what == TUNED else None)
            for what, found in scores.items()
        ]

    def tune(
        self,
        network: Classifying,
        begun: State,
        draw: Sequence[np.ndarray],
        data: EvaluationData,
        seed: int,
    ) -> State:
        """Tune by rounds from a state, one site after the other in the same network.

        Args:
            draw: rows of each site whose labels are seen.
            seed: of the draw.
        """
        kept = {}
        for number, rows in enumerate(draw):
            places, _ = leave_out_rare(data.train.labels[rows], data.num_classes, self.min_images)
            if len(places):
                kept[number] = rows[places]

        def ask(state: State, round_number: int) -> Mapping[int, Tuned]:
            tuned = {}
            for number, rows in kept.items():
                load_state(network, state)
                tune_at_site(
                    network,
                    np.asarray(data.train.pixels[rows]),
                    data.train.labels[rows],
                    self.settings,
                    round_number,
                    data.views,
                    data.backend,
                    tune_generator(seed, round_number, number),
                )
                tuned[number] = Tuned(
                    {name: value.cpu().clone() for name, value in network.state_dict().items()},
                    len(rows),
                )
            return tuned

        return tune_by_rounds(begun, self.rounds, ask)
