"""All of Flower's strategies that average models: built, run, saved and restored."""

import random

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.supercore.differential_privacy import KEY_NORM_BIT
from samples import make_simclr

from fedssl.errors import UserError
from fedssl.federation.aggregation import (
    aggregate,
    arrays_for_strategy,
    build_strategy,
    fraction_train,
    restore_dtypes,
)
from fedssl.federation.guards import Update
from fedssl.federation.local_grid import LocalGrid
from fedssl.federation.strategy_state import load_strategy_state_dict, strategy_state_dict
from fedssl.runs.checkpoints import Checkpoint, load_checkpoint, save_checkpoint

pytestmark = pytest.mark.usefixtures("narrow")

NUM_CLIENTS = 7  # the least with which Bulyan bears one hostile client
STATE = {
    "layer.weight": torch.arange(6.0).reshape(2, 3) / 10,
    "layer.bias": torch.tensor([0.5, -0.5]),
    "bn.running_var": torch.ones(2),
    "bn.num_batches_tracked": torch.tensor(4),
}
NAMES = ["layer.weight", "layer.bias"]
FEDADAM = {"name": "FedAdam", "eta": 0.01}
PRIVATE = {"noise_multiplier": 0.5, "num_sampled_clients": NUM_CLIENTS}
FIXED, ADAPTIVE = {**PRIVATE, "clipping_norm": 0.3}, {**PRIVATE, "clipped_count_stddev": 1.0}
STRATEGIES = {
    "FedAvg": {},
    "FedAvgM": {"server_learning_rate": 0.9, "server_momentum": 0.5},
    "FedAdam": {"eta": 0.01},
    "FedAdagrad": {"eta": 0.01},
    "FedYogi": {"eta": 0.01},
    "FedProx": {"proximal_mu": 0.1},
    "FedMedian": {},
    "FedTrimmedAvg": {"beta": 0.2},
    "Krum": {"num_malicious_nodes": 1},
    "MultiKrum": {"num_malicious_nodes": 1, "num_nodes_to_select": 3},
    "Bulyan": {"num_malicious_nodes": 1},
    "QFedAvg": {"client_learning_rate": 0.1, "train_loss_key": "train-loss"},
    "DifferentialPrivacyServerSideFixedClipping": {**FIXED, "strategy": FEDADAM},
    "DifferentialPrivacyClientSideFixedClipping": {**FIXED, "strategy": FEDADAM},
    "DifferentialPrivacyServerSideAdaptiveClipping": {**ADAPTIVE, "strategy": FEDADAM},
    "DifferentialPrivacyClientSideAdaptiveClipping": {**ADAPTIVE, "strategy": FEDADAM},
}
WRAPPERS = [name for name in STRATEGIES if name.startswith("Differential")]


def spec_of(name, **changes):
    """Write a strategy as its section of the configuration is resolved."""
    spec = {"_target_": f"flwr.serverapp.strategy.{name}", **STRATEGIES.get(name, {}), **changes}
    if inner := spec.get("strategy"):
        spec["strategy"] = spec_of(**inner) if "name" in inner else inner
    return {key: value for key, value in spec.items() if key != "name"}


def updates_of(round_number, state=STATE):
    """Make the updates of a round; strategies empty the messages, so always anew."""
    generator = np.random.default_rng(round_number)
    made = []
    for number in range(NUM_CLIENTS):
        arrays = {
            name: state[name].numpy() + generator.normal(0, 0.1, state[name].shape)
            for name in NAMES
        }
        arrays = {name: np.float32(value) for name, value in arrays.items()}
        metrics = {"num-examples": 10 + number, "train-loss": 1.0 + number / 10}
        metrics[KEY_NORM_BIT] = number % 2
        content = RecordDict(
            {
                "arrays": ArrayRecord({k: Array(v) for k, v in arrays.items()}),
                "metrics": MetricRecord(metrics),
            }
        )
        own = {name: torch.from_numpy(value.copy()) for name, value in arrays.items()}
        own["bn.running_var"] = torch.full((2,), 1.0 + number)
        own["bn.num_batches_tracked"] = torch.tensor(4 + number)
        message = Message(content, number + 1, "train")
        made.append(Update(number, 10 + number, metrics, own, message, weight=10 + number))
    return made


@pytest.fixture
def play():
    """Run a round of a strategy, as the server does; return the new state."""
    grid = LocalGrid(None, NUM_CLIENTS)

    def run(strategy, round_number, state=STATE):
        random.seed(round_number)
        np.random.seed(round_number)  # of the noise of differential privacy
        arrays = ArrayRecord({name: state[name] for name in NAMES})
        messages = list(strategy.configure_train(round_number, arrays, ConfigRecord(), grid))
        assert len(messages) == NUM_CLIENTS
        combined = aggregate(strategy, round_number, updates_of(round_number, state), state, NAMES)
        return {**state, **combined}

    return run


def test_all_strategies_of_flower_are_here_but_those_for_trees():
    import flwr.serverapp.strategy as strategies

    others = {"Result", "Strategy", "FedXgbBagging", "FedXgbCyclic"}
    assert set(STRATEGIES) == set(strategies.__all__) - others


QUICK = ("FedAdam", "Krum", "DifferentialPrivacyServerSideAdaptiveClipping")


@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in STRATEGIES]
)
def test_a_strategy_goes_on_from_a_checkpoint_with_the_same_bytes(tmp_path, play, name):
    strategy = build_strategy(spec_of(name, acts_on="parameters"))
    first = play(strategy, 1)
    assert not torch.equal(first["layer.weight"], STATE["layer.weight"])
    saved = strategy_state_dict(strategy)
    save_checkpoint(tmp_path, Checkpoint(1, first, saved), keep=1)
    loaded = load_checkpoint(tmp_path / "round-0001.safetensors")
    restored = build_strategy(spec_of(name))
    load_strategy_state_dict(restored, loaded.strategy)
    again = strategy_state_dict(restored)
    assert again.tree == saved.tree
    assert again.arrays.keys() == saved.arrays.keys()
    for place, array in saved.arrays.items():
        assert again.arrays[place].dtype == array.dtype
        np.testing.assert_array_equal(again.arrays[place], array)
    for round_number in (2, 3):
        second = play(strategy, round_number, first)
        other = play(restored, round_number, loaded.state)
        for key, tensor in second.items():
            assert tensor.numpy().tobytes() == other[key].numpy().tobytes(), key


@pytest.mark.parametrize("name", ["FedAvgM", "FedAdam", "FedYogi", "FedAdagrad", *WRAPPERS])
def test_without_its_state_a_strategy_would_go_on_differently(play, name):
    strategy = build_strategy(spec_of(name))
    first = play(strategy, 1)
    second, other = play(strategy, 2, first), play(build_strategy(spec_of(name)), 2, first)
    assert not torch.equal(second["layer.weight"], other["layer.weight"])


@pytest.mark.parametrize("side", ["Server", "Client"])
def test_an_adaptive_clipping_norm_is_remembered(play, side):
    name = f"DifferentialPrivacy{side}SideAdaptiveClipping"
    strategy, other = build_strategy(spec_of(name)), build_strategy(spec_of(name))
    play(strategy, 1)
    assert strategy.clipping_norm != other.clipping_norm
    load_strategy_state_dict(other, strategy_state_dict(strategy))
    assert other.clipping_norm == strategy.clipping_norm
    assert other.strategy.m_t.keys() == strategy.strategy.m_t.keys()


@pytest.mark.parametrize("name", STRATEGIES)
def test_it_begins_with_whatever_nodes_there_are(name):
    strategy = build_strategy(spec_of(name))
    least = getattr(strategy, "strategy", strategy)
    assert (least.min_train_nodes, least.min_available_nodes, least.min_evaluate_nodes) == (1, 1, 1)


def test_a_strategy_that_asks_nobody_for_an_evaluation_goes_on_asking_nobody():
    assert build_strategy(spec_of("FedAvg", fraction_evaluate=0.0)).min_evaluate_nodes == 0


def test_the_fraction_is_that_of_the_inner_strategy():
    assert fraction_train(build_strategy(spec_of("FedAvg", fraction_train=0.25))) == 0.25
    inner = spec_of("FedAvg", fraction_train=0.5)
    assert fraction_train(build_strategy(spec_of(WRAPPERS[0], strategy=inner))) == 0.5


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        (spec_of("FedTrimmedAvg", beta=0.7), "FedTrimmedAvg refuses its arguments"),
        (spec_of("FedAvg", fraction=1), "unexpected keyword argument 'fraction'"),
        (spec_of(WRAPPERS[0], clipping_norm=-1), "clipping norm should be a positive value"),
        (spec_of("FedGuess"), "FedGuess refuses its arguments"),
    ],
)
def test_wrong_arguments_get_one_line(spec, reason):
    with pytest.raises(UserError, match=reason) as error:
        build_strategy(spec)
    assert "\n" not in str(error.value)


def test_averages_are_weighted_by_samples_whoever_makes_them(play):
    updates = updates_of(1)
    weights = torch.tensor([float(update.num_examples) for update in updates])
    weights /= weights.sum()
    result = play(build_strategy(spec_of("FedAvg")), 1)
    for name in [*NAMES, "bn.running_var"]:
        stack = torch.stack([update.state[name] for update in updates])
        torch.testing.assert_close(result[name], torch.tensordot(weights, stack, dims=1))
    counts = torch.tensor([float(update.state["bn.num_batches_tracked"]) for update in updates])
    assert int(result["bn.num_batches_tracked"]) == round(float(weights @ counts))


@pytest.mark.parametrize("name", STRATEGIES)
def test_the_dtypes_of_the_model_stay(play, name):
    result = play(build_strategy(spec_of(name)), 1)
    assert {k: v.dtype for k, v in result.items()} == {k: v.dtype for k, v in STATE.items()}
    assert all(torch.isfinite(tensor).all() for tensor in result.values())


def test_restored_counters_are_rounded_not_cut():
    result = restore_dtypes({"bn.num_batches_tracked": np.float64(7.6)}, STATE)
    assert result["bn.num_batches_tracked"].equal(torch.tensor(8))


def test_a_strategy_without_a_result_gets_one_line():
    strategy = build_strategy(spec_of("Bulyan"))
    with pytest.raises(RuntimeError, match=r"round 4: Bulyan makes nothing of 6 updates"):
        aggregate(strategy, 4, updates_of(1)[1:], STATE, NAMES)


def test_a_strategy_that_gives_up_gets_one_line(play):
    """As adaptive clipping by clients does where the clients have not its mod."""
    strategy = build_strategy(spec_of("DifferentialPrivacyClientSideAdaptiveClipping"))
    updates = updates_of(1)
    for update in updates:
        del update.message.content["metrics"][KEY_NORM_BIT]
    with pytest.raises(RuntimeError, match=r"round 1: .*Clipping gave up \(.*norm_bit") as error:
        aggregate(strategy, 1, updates, STATE, NAMES)
    assert "\n" not in str(error.value)


def test_a_strategy_acts_on_parameters_or_on_all_floats():
    method = make_simclr()
    parameters = [name for name, _ in method.named_parameters()]
    assert arrays_for_strategy(method, "parameters") == parameters
    floats = arrays_for_strategy(method, "floats")
    left_out = [name for name in method.state_dict() if name not in floats]
    assert left_out
    assert all(name.endswith("num_batches_tracked") for name in left_out)
    assert floats == [name for name in method.state_dict() if name not in left_out]
