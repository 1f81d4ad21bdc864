"""Tuning by rounds: what is averaged, what stays, and that it helps."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from evaluation.small import make_data, make_encoder
from torch import nn

from fedssl.evaluation.features import view_logits
from fedssl.networks.state import load_state, state_digest
from fedssl.sites.site import TuneSettings
from fedssl.sites.sums import Head, Standardized, add_up
from fedssl.sites.tuning import (
    Classifying,
    Tuned,
    average,
    begin_with,
    take_apart,
    tune_at_site,
    tune_by_rounds,
    tune_generator,
)

pytestmark = pytest.mark.usefixtures("narrow")

SETTINGS = TuneSettings(4, 2, 16, 0.03, 0.01, 0.001)


def test_rates_fall_along_a_cosine_over_all_rounds():
    factors = [SETTINGS.rate_factor(each, epoch) for each in range(4) for epoch in range(2)]
    assert factors == pytest.approx([(1 + np.cos(np.pi * step / 8)) / 2 for step in range(8)])


def test_the_mean_is_weighted_by_images_and_counters_stay():
    state = {"w": torch.zeros(2), "n": torch.tensor(7)}
    sites = [
        Tuned({"w": torch.tensor([1.0, 2.0]), "n": torch.tensor(9)}, 30),
        Tuned({"w": torch.tensor([3.0, 6.0]), "n": torch.tensor(8)}, 10),
    ]
    averaged = average(state, sites)
    assert averaged["w"].tolist() == [1.5, 3.0]
    assert averaged["w"].dtype == torch.float32
    assert averaged["n"] == 7


def test_rounds_go_on_from_the_mean_and_need_an_answer():
    asked = []

    def ask(state, round_number):
        asked.append((round_number, float(state["w"])))
        return {0: Tuned({"w": state["w"] + 1}, 1), 1: Tuned({"w": state["w"] + 3}, 1)}

    assert tune_by_rounds({"w": torch.tensor(0.0)}, 3, ask)["w"] == 6
    assert asked == [(0, 0.0), (1, 2.0), (2, 4.0)]
    with pytest.raises(ValueError, match="no site has trained"):
        tune_by_rounds({}, 1, lambda state, number: {})


def test_a_round_moves_encoder_and_head_and_no_statistics(digits, rng):
    data, encoder = make_data(digits, 1), make_encoder()
    weight = rng.normal(size=(encoder.feature_size, 10)).astype(np.float32)
    head = Head(weight, np.zeros(10, np.float32))
    before = begin_with(encoder.state_dict(), head)
    network = Classifying(encoder, 10)
    digests = []
    for seed in (0, 0, 1):
        load_state(network, before)
        given = np.asarray(data.train.pixels[:40]), data.train.labels[:40], SETTINGS, 0
        generator = tune_generator(seed, 0, 3)
        tune_at_site(network, *given, data.views, data.backend, generator)
        digests.append(state_digest(network))
    assert digests[0] == digests[1] != digests[2]
    after = network.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name, _ in network.named_parameters()}
    state, again = take_apart(before)
    assert state.keys() == encoder.state_dict().keys()
    assert np.array_equal(again.weight, head.weight)
    assert isinstance(network.head, nn.Linear)


def test_rounds_of_two_sites_fit_labels_that_the_head_alone_does_not(digits):
    data, encoder = make_data(digits, 1), make_encoder()
    parts = np.arange(80), np.arange(80, 160)
    everything = np.concatenate(parts)
    bank = data.features(encoder, data.train.pixels[everything])
    sums = add_up(bank, data.train.labels[everything], 10)
    head = Standardized.of(sums).solve(0.1).sharpened(0.1)
    network, settings = Classifying(encoder, 10), replace(SETTINGS, encoder_learning_rate=0.01)

    def ask(state, round_number):
        tuned = {}
        for site, rows in enumerate(parts):
            load_state(network, state)
            given = np.asarray(data.train.pixels[rows]), data.train.labels[rows], settings
            random = tune_generator(0, round_number, site)
            tune_at_site(network, *given, round_number, data.views, data.backend, random)
            state_of = {name: value.clone() for name, value in network.state_dict().items()}
            tuned[site] = Tuned(state_of, len(rows))
        return tuned

    def surprise(state):
        load_state(network, state)
        pixels, labels = np.asarray(data.train.pixels[everything]), data.train.labels[everything]
        random = tune_generator(1, 0, 0)
        given = pixels, data.views, data.backend, random
        logits = view_logits(network.encoder, network.head, *given)(torch.arange(160))
        return float(F.cross_entropy(logits.detach(), torch.from_numpy(labels)))

    begun = begin_with(encoder.state_dict(), head)
    ended = tune_by_rounds(begun, settings.rounds, ask)
    assert surprise(ended) < 0.9 * surprise(begun)
