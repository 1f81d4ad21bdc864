"""Differential privacy of clients: what the mean is, what it costs, and what is refused."""

import os
import stat

import numpy as np
import pytest
import torch
from conftest import CPU, create_run
from dp_accounting import dp_event
from dp_accounting.rdp import RdpAccountant
from federation.shuffled import FAST
from flwr.serverapp.strategy import FedAvg

import client
from fedssl.config.compose import load_config
from fedssl.errors import UserError
from fedssl.federation.privacy import PrivacySettings, make_private
from fedssl.methods.base import Method
from fedssl.runs.checkpoints import load_checkpoint
from utils import build_method, build_privacy, spent_privacy

pytestmark = pytest.mark.usefixtures("narrow")

SETTINGS = PrivacySettings("central", 1.0, 1.0, 1e-5, population=100, clients_per_round=10)


@pytest.mark.parametrize(
    ("noise", "delta", "rounds"), [(1.0, 1e-5, 7), (0.5, 1e-3, 28), (20.0, 1e-6, 1000)]
)
def test_epsilon_is_that_of_googles_accountant(noise, delta, rounds):
    settings = PrivacySettings("central", noise, 1.0, delta, 100, 10)
    direct = RdpAccountant()
    direct.compose(dp_event.GaussianDpEvent(noise), rounds)
    assert settings.epsilon_after(rounds) == pytest.approx(direct.get_epsilon(delta), abs=1e-6)


def test_a_budget_allows_as_many_rounds_as_fit():
    limit = SETTINGS.epsilon_after(4)
    for max_epsilon, rounds in ((limit, 4), (limit * 0.999, 3), (1e9, 7)):
        settings = PrivacySettings("central", 1.0, 1.0, 1e-5, 100, 10, max_epsilon=max_epsilon)
        assert settings.rounds_within(7) == rounds


def weights(federation, names):
    state = federation.method.state_dict()
    return torch.cat([state[name].flatten() for name in names])


def test_the_mean_is_of_clipped_updates_with_the_noise_that_was_asked_for(federate):
    """Almost no noise shows the clipping; the difference to much shows the noise."""
    common = ["privacy=central", "num_rounds=1", "privacy.clipping_norm=0.5"]
    still, rounds, _ = federate(*common, "privacy.noise_multiplier=1e-9")
    noised, _, _ = federate(*common, "privacy.noise_multiplier=2")
    names = [name for name, _ in still.method.named_parameters()]
    assert set(names) == set(still.method.state_dict())  # nothing travels beside them
    start = build_method(load_config("config", ["privacy=central", FAST]), CPU).state_dict()
    moved = weights(still, names) - torch.cat([start[name].flatten() for name in names])
    assert all(client.update_norm > 0.6 for client in rounds[0].clients)
    assert 0.05 < moved.norm() <= 0.5 + 1e-3
    noise = (weights(noised, names) - weights(still, names)).numpy()
    expected = 2 * 0.5 / 3
    assert noise.std() == pytest.approx(expected, rel=1e-2)
    assert abs(noise.mean()) < 5 * expected / np.sqrt(noise.size)


def test_who_is_missing_counts_as_one_who_did_not_move(federate):
    common = ["privacy=central", "num_rounds=1", "privacy.noise_multiplier=1e-9"]
    common += ["privacy.clipping_norm=1000"]

    def spoil(partition, reply):
        if partition == 2 and "arrays" in reply.content:
            del reply.content["arrays"]
        return reply

    all_three, _, _ = federate(*common)
    two, rounds, _ = federate(*common, tamper=spoil)
    alone = [federate(*common, f"participants=[{number}]")[0] for number in range(2)]
    assert [f.partition for f in rounds[0].failures] == [2]
    names = [name for name, _ in two.method.named_parameters()]
    start = torch.cat([p.flatten() for p in initial(names)])
    ways = [weights(each, names) - start for each in (two, *alone, all_three)]
    assert torch.allclose(ways[0], (ways[1] + ways[2]) / 3, atol=1e-5)
    assert not torch.allclose(ways[0], ways[3], atol=1e-3)


def initial(names):
    method: Method = build_method(load_config("config", ["privacy=central", FAST]), CPU)
    return [method.state_dict()[name] for name in names]


@pytest.mark.parametrize("mechanism", ["central", "adaptive"])
def test_a_resumed_run_has_the_same_epsilon_and_bytes(federate, mechanism):
    given = [f"privacy={mechanism}", "num_rounds=2", "privacy.clipping_norm=0.3"]
    whole, rounds, _ = federate(*given)
    checkpoint = load_checkpoint(whole.run.checkpoints / "round-0001.safetensors")
    again, later, _ = federate(*given, checkpoint=checkpoint)
    assert [m.epsilon for m in later] == [m.epsilon for m in rounds[1:]]
    assert rounds[0].epsilon < rounds[1].epsilon
    assert [m.delta for m in rounds] == [1e-5] * 2
    for name, value in whole.method.state_dict().items():
        assert torch.equal(value, again.method.state_dict()[name]), name
    assert whole.strategy.clipping_norm == again.strategy.clipping_norm


def test_a_budget_ends_the_run_with_the_last_round_within_it(federate):
    given = ["privacy=central", "num_rounds=5"]
    limit = SETTINGS.epsilon_after(2) * 1.001
    federation, rounds, _ = federate(*given, f"privacy.max_epsilon={limit}", "evaluate_every=50")
    assert [row.round for row in rounds if row.eval_loss is not None] == [rounds[-1].round]
    assert [m.round for m in rounds] == [1, 2]
    assert rounds[-1].epsilon <= limit
    assert federation.done == 2
    config = federation.run.load_config()
    told = spent_privacy(federation.run, config, 2)
    assert told["epsilon"] == rounds[-1].epsilon
    assert told["noise_multiplier"] == 1.0
    assert "how many images each has" in told["not_covered"]


def test_clients_clip_where_they_are_asked_and_who_does_not_is_left_out(federate, monkeypatch):
    given = ["privacy=central", "privacy.clipping=client", "num_rounds=1"]
    given += ["privacy.clipping_norm=0.5"]
    clip = client.clip_if_asked

    def forget(message, context, call_next):
        if context.node_config["partition-id"] == 1:
            return call_next(message, context)
        return clip(message, context, call_next)

    monkeypatch.setattr(client, "clip_if_asked", forget)
    _, rounds, _ = federate(*given)
    norms = {c.partition: c.update_norm for c in rounds[0].clients if c.update_norm is not None}
    assert norms == {0: pytest.approx(0.5, rel=1e-4), 2: pytest.approx(0.5, rel=1e-4)}
    (failure,) = rounds[0].failures
    assert failure.partition == 1
    assert "not clipped to 0.5" in failure.reason


@pytest.mark.parametrize("first", [1e-3, 1e3])
def test_adaptive_clipping_goes_to_the_length_that_the_quantile_has(first):
    """From far below and far above, by a noise that does not count."""
    settings = PrivacySettings("adaptive", 1e-6, first, 1e-5, 100, 8, count_noise=1e-3)
    strategy = make_private(FedAvg(), settings, bytes(32))
    for _ in range(100):
        strategy.after_round([1, 2, 3, 4, 5, 6, 7, 8])
    assert 3 < strategy.clipping_norm < 6
    before = strategy.clipping_norm
    strategy.after_round([1, 2])  # the others are missing, which moves it neither up nor down
    assert strategy.clipping_norm == pytest.approx(before * np.exp(-0.2 / 8), rel=1e-3)


def test_adaptive_noise_is_worth_what_it_says():
    """Theorem 1 of Andrew et al.: squares of the inverse multipliers add up."""
    settings = PrivacySettings("adaptive", 1.0, 1.0, 1e-5, 100, 10)
    count, updates = settings.split_noise()
    assert count == 1.0
    assert updates**-2 + (2 * count) ** -2 == pytest.approx(1.0)


def test_a_federations_noise_comes_from_a_key_that_stays_with_its_run(tmp_path):
    before = os.umask(0o077)  # as app.py sets it
    try:
        run = create_run(tmp_path / "run", load_config("config", [f"output_dir={tmp_path}"]))
        key = run.noise_key()
    finally:
        os.umask(before)
    assert (len(key), run.noise_key()) == (32, key)
    (file,) = run.path.glob(".noise*")
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    settings = PrivacySettings("central", 1.0, 1.0, 1e-5, 5, 5)
    drawn = [
        make_private(FedAvg(), settings, each).words_of_noise(number)
        for each, number in ((key, 1), (key, 2), (bytes(32), 1), (key, 1))
    ]
    assert drawn[0] == drawn[3]
    assert len({tuple(words) for words in drawn}) == 3


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("model.norm=batch", "model.norm=batch: privacy=central needs model.norm=group"),
        ("optimizer.momentum_start=averaged", "momentum would travel"),
        ("weighting=images", "needs weighting=equal"),
        ("max_update_ratio=10", "needs max_update_ratio=null"),
        ("strategy.acts_on=floats", "needs strategy.acts_on=parameters"),
        ("strategy=krum", "strategy=krum: privacy=central needs fedavg or fedprox"),
        ("strategy=fedadam", "needs fedavg or fedprox"),
        ("train.statistics=recomputed", "model.norm=group has no statistics"),
        ("privacy.delta=0.3", "privacy.delta=0.3: must be below 1 / num_clients, 0.2"),
        ("privacy.noise_multiplier=0", "must be above 0"),
        ("privacy.clipping=both", "server"),
    ],
)
def test_what_would_go_past_the_noise_is_refused(override, line):
    with pytest.raises(UserError) as refused:
        load_config("config", ["privacy=central", override])
    assert line in str(refused.value)
    assert "\n" not in str(refused.value)


def test_clients_that_clip_do_not_round_afterwards():
    given = ["privacy=central", "wire=int4"]
    assert load_config("config", given).wire == "int4"  # the server clips what it decoded
    with pytest.raises(UserError, match=r"wire=int4: privacy\.clipping=client needs wire=float32"):
        load_config("config", [*given, "privacy.clipping=client"])


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["privacy=central", "privacy.max_epsilon=1"], "privacy.max_epsilon=1: one round with"),
        (["privacy=adaptive", "privacy.count_noise=0.4"], "must be above half of"),
    ],
)
def test_what_can_never_be_is_refused_before_any_work(overrides, line):
    with pytest.raises(UserError) as refused:
        build_privacy(load_config("config", overrides))
    assert line in str(refused.value)


@pytest.mark.parametrize("method", ["simclr", "vicreg", "byol", "simsiam", "moco"])
def test_no_method_has_anything_that_travels_beside_the_weights(method):
    config = load_config("config", ["privacy=central", f"method={method}", FAST])
    built = build_method(config, CPU)
    assert set(built.shared_state()) <= {name for name, _ in built.named_parameters()}
