"""Secure aggregation: the same mean, nothing else to be seen, and clients that drop out."""

from collections import Counter
from contextlib import suppress

import numpy as np
import pytest
import torch
from conftest import create_run
from federation.shuffled import FAST, change
from flwr.app import ConfigRecord, Error, Message, RecordDict
from scipy.stats import chisquare

import main as program
from benchmarks.robustness.client_faults import FAULTY, FaultyClientApp, kill_process
from client import make_client_app, simulated
from fedssl.config.compose import load_config
from fedssl.errors import UserError
from fedssl.federation.local_grid import LocalGrid
from fedssl.federation.messages import DIED, unpack_arrays
from fedssl.federation.secure import client as steps
from fedssl.federation.secure.fixed_point import FixedPoint, float_names
from fedssl.federation.secure.masks import agree, combine, mask, new_secret, public_of, share
from fedssl.federation.secure.server import SecureSettings
from fedssl.federation.secure.signing import check_signatures, sign
from fedssl.runs.checkpoints import load_checkpoint

pytestmark = pytest.mark.usefixtures("narrow")

SECURE = "secure_aggregation=true"


def spread(states):
    """Measure how far two states are apart, at most."""
    one, other = states
    return max(
        float((one[name].double() - other[name].double()).abs().max()) for name in float_names(one)
    )


def gone(reply):
    """Make an error of a training reply, as Flower does of a client that fails."""
    error = Message(Error(2, "the machine is gone"), reply_to=reply)
    error.metadata.__dict__["_reply_to_message_id"] = reply.metadata.reply_to_message_id
    return error


# --- whole rounds ------------------------------------------------------------------


@pytest.mark.parametrize("weighting", ["images", "equal"])
def test_the_mean_is_the_plain_one_within_a_step(federate, weighting):
    given = ["num_rounds=1", "partition=dirichlet", f"weighting={weighting}"]
    plain, open_rounds, _ = federate(*given)
    masked, rounds, _ = federate(*given, SECURE)
    states = [each.method.state_dict() for each in (plain, masked)]
    step = FixedPoint(3, 64.0, 1.0).step
    counts = [client.num_examples for client in rounds[0].clients]
    weights = [n / max(counts) for n in counts] if weighting == "images" else [1, 1, 1]
    assert 0 < spread(states) <= 3 * step / 2 / sum(weights) + 2e-6  # and float32's own rounding
    assert states[0]["encoder.bn1.num_batches_tracked"].equal(
        states[1]["encoder.bn1.num_batches_tracked"]
    )
    assert rounds[0].train_loss == open_rounds[0].train_loss
    assert all(client.update_norm is None for client in rounds[0].clients)
    assert rounds[0].failures == ()


def test_masks_are_drawn_anew_and_change_nothing(federate):
    given = [SECURE, "strategy=fedavgm", "num_rounds=1"]
    runs = [federate(*given)[0].method.state_dict() for _ in range(2)]
    assert all(runs[0][name].equal(runs[1][name]) for name in runs[0])


def test_one_of_five_who_drops_out_is_taken_out_of_the_sum(federate):
    """It fails after its masks were agreed on, which is the case that needs the shares."""

    def die(partition, reply):
        return gone(reply) if partition == 3 else reply

    given = ["num_clients=5", "num_rounds=1"]
    masked, rounds, _ = federate(*given, SECURE, tamper=die)
    plain, _, _ = federate(*given, tamper=die)
    assert [(f.partition, f.reason) for f in rounds[0].failures] == [(3, "the machine is gone")]
    assert spread([plain.method.state_dict(), masked.method.state_dict()]) < 1e-5


@pytest.mark.slow
@pytest.mark.whole  # processes of Ray know nothing of narrow ones
def test_one_of_five_whose_process_is_killed_is_taken_out_of_the_sum(tmp_path):
    """In processes of Ray; it dies after it trained, twice, since Ray starts it again."""
    given = ["num_clients=5", "num_rounds=1", "num_cpus=1", "precision=float32", FAST]
    given += [
        "train.local_epochs=1",
        "train.max_steps=1",
        "monitor.bank=100",
        "max_update_ratio=10",
    ]
    runs = []
    for masks in ([SECURE], []):
        places = [f"output_dir={tmp_path}", f"cache_dir={tmp_path}/cache"]
        config = load_config("config", [*given, *places, *masks])
        resources, image_set = program.prepare(config)
        config.num_cpus, config.num_gpus = resources.num_cpus, resources.num_gpus
        run = create_run(tmp_path / f"run{len(runs)}", config)
        clients = FaultyClientApp(make_client_app(simulated(config)), [kill_process])
        program.train(config, resources, image_set, run, clients=clients)
        (metrics,) = run.read_metrics()
        assert [(f.partition, f.reason) for f in metrics.failures] == [(FAULTY, DIED)]
        runs.append(load_checkpoint(run.last_checkpoint()).state)
    assert 0 < spread(runs) < 1e-5


def test_fewer_than_the_threshold_end_the_run_with_the_reason(federate):
    def die(partition, reply):
        return gone(reply)

    with pytest.raises(RuntimeError, match=r"0 clients gave masked updates, .* needs 3 .*gone"):
        federate("num_rounds=1", SECURE, tamper=die)


def test_an_update_beyond_the_clipping_ends_the_run(federate, monkeypatch):
    """A client that does not clip moves the mean further than clipped ones can."""

    def stretch(partition, reply):
        def how(state):
            state["encoder.conv1.weight"] += 10.0 * (partition == 1)

        return change(reply, how)

    clipped, _, _ = federate("num_rounds=1", SECURE, "secagg.max_ratio=0.01", tamper=stretch)
    assert clipped.done == 1
    encode = FixedPoint.encode

    def unclipped(self, *given):
        return encode(FixedPoint(self.clients, self.largest, 1e9), *given)

    monkeypatch.setattr(FixedPoint, "encode", unclipped)
    with pytest.raises(RuntimeError, match="round 1: the mean of the masked updates moved by"):
        federate("num_rounds=1", SECURE, "secagg.max_ratio=0.01", tamper=stretch)


def test_what_the_server_gets_looks_like_noise(federate, monkeypatch):
    """The bytes of a masked update are uniform; those of a plain one are not."""
    seen = {}
    answer = LocalGrid.answer

    def look(self, message, context):
        reply = answer(self, message, context)
        if message.metadata.message_type == "train":
            arrays = unpack_arrays(reply.content.array_records["arrays"])
            seen[context.node_config["partition-id"]] = {n: arrays[n].numpy() for n in arrays}
        return reply

    monkeypatch.setattr(LocalGrid, "answer", look)
    federate("num_rounds=1", SECURE)
    assert set(seen) == {0, 1, 2}
    for arrays in seen.values():
        assert list(arrays) == ["masked"]
        counts = np.bincount(arrays["masked"].view(np.uint8), minlength=256)
        assert chisquare(counts).pvalue > 1e-4
    numbers = [arrays["masked"] for arrays in seen.values()]
    together = np.bincount((numbers[0] + numbers[1]).view(np.uint8), minlength=256)
    assert chisquare(together).pvalue > 1e-4  # two of three tell nothing either
    federate("num_rounds=1")
    plain = np.concatenate([value.ravel() for value in seen[0].values()])
    assert chisquare(np.bincount(plain.view(np.uint8), minlength=256)).pvalue < 1e-9


# --- numbers -----------------------------------------------------------------------


def test_the_sum_of_encoded_updates_is_exact():
    rng = torch.Generator().manual_seed(0)
    start = {"a.weight": torch.randn(50, 20, generator=rng), "bn.running_var": torch.rand(7)}
    states = [
        {n: value + 0.1 * torch.randn(value.shape, generator=rng) for n, value in start.items()}
        for _ in range(5)
    ]
    weights = [1.0, 0.5, 0.25, 1.0, 0.1]
    plan = FixedPoint(5, 64.0, 1e9)
    encoded = [plan.encode(s, start, w)[0] for s, w in zip(states, weights, strict=True)]
    mean = plan.decode(np.add.reduce(encoded, dtype=np.uint32), start, sum(weights))
    for name in start:
        expected = sum(w * s[name].double() for w, s in zip(weights, states, strict=True))
        error = (mean[name].double() - expected / sum(weights)).abs().max()
        assert error <= 5 * plan.step / 2 / sum(weights) + 1e-7


def test_the_largest_numbers_of_all_clients_fit():
    start = {"bn.running_var": torch.zeros(3)}
    for clients in (2, 3, 1000):
        plan = FixedPoint(clients, 64.0, 1.0)
        for sign_of in (1, -1):
            state = {"bn.running_var": sign_of * torch.tensor([64.0, 63.0, 1e9])}
            numbers, cut = plan.encode(state, start, 1.0)
            total = (numbers.astype(np.uint64) * clients).astype(np.uint32)
            mean = plan.decode(total, start, clients)["bn.running_var"] * sign_of
            assert torch.allclose(mean, torch.tensor([64.0, 63.0, 64.0]), atol=plan.step)
            assert cut == 1


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_update_that_is_not_finite_is_the_clients_failure(federate, value):
    """Under a mask it would be a number like any other."""

    def spoil(partition, reply):
        def how(state):
            state["encoder.bn1.running_mean"][0] = value

        return change(reply, how) if partition == 1 else reply

    with pytest.raises(RuntimeError, match=r"array 'encoder.bn1.running_mean' is not finite"):
        federate("num_rounds=1", SECURE, tamper=spoil)


def test_numbers_that_were_cut_are_told(federate):
    _, (row,), _ = federate("num_rounds=1", SECURE, "secagg.largest=0.001")
    assert all(client.numbers_cut > 0 for client in row.clients)
    assert sum("numbers of its update (secagg.largest)" in text for text in row.warnings) == 3


def test_weights_are_clipped_and_statistics_are_not():
    start = {"a.weight": torch.zeros(4), "bn.running_mean": torch.zeros(4)}
    state = {name: torch.full((4,), 5.0) for name in start}
    plan = FixedPoint(1, 64.0, longest=2.0)
    mean = plan.decode(plan.encode(state, start, 1.0)[0], start, 1.0)
    assert mean["a.weight"].norm() == pytest.approx(2.0)
    assert mean["bn.running_mean"].tolist() == pytest.approx([5.0] * 4)


# --- primitives --------------------------------------------------------------------


def test_two_clients_agree_and_a_third_does_not():
    secrets = [new_secret() for _ in range(3)]
    publics = [public_of(secret) for secret in secrets]
    shared = agree(secrets[0], publics[1], b"mask", b"run|1")
    assert shared == agree(secrets[1], publics[0], b"mask", b"run|1")
    others = [
        agree(secrets[0], publics[2], b"mask", b"run|1"),
        agree(secrets[0], publics[1], b"mask", b"run|2"),
        agree(secrets[0], publics[1], b"seal", b"run|1"),
    ]
    assert len({shared, *others}) == 4
    assert mask(shared, 10_000).tolist() == mask(shared, 10_000).tolist()


def test_enough_shares_give_a_secret_back_and_fewer_do_not():
    secret = new_secret()
    shares = share(secret, 3, 5)
    assert combine(shares[2:]) == combine([shares[0], shares[4], shares[1]]) == secret
    with suppress(ValueError):
        assert combine(shares[:2]) != secret


@pytest.mark.parametrize(
    ("clients", "share_of", "least"), [(5, 0.67, 4), (3, 0.67, 3), (2, 0.5, 2)]
)
def test_the_threshold_is_above_half(clients, share_of, least):
    assert SecureSettings(share_of, 64, 1).least(clients) == least
    assert SecureSettings(0.0, 64, 1).least(clients) > clients / 2


# --- what a client refuses -----------------------------------------------------------


class Clients:
    """Clients of one round, called step by step, as a server that lies would."""

    def __init__(self, count=3):
        self.contexts = list(LocalGrid(None, count).contexts.values())
        self.told = [
            self.call(n, steps.answer_keys, {}, n, 10, steps.Signing()) for n in range(count)
        ]

    def call(self, number, step, said, *more):
        config = {"run": "a" * 32, "server-round": 1}
        config |= {f"secure-{name}": value for name, value in said.items()}
        message = Message(RecordDict({"config": ConfigRecord(config)}), number, "query")
        return step(message, self.contexts[number], *more).content.config_records["config"]

    def lists(self, threshold=3):
        publics, seals, signatures = zip(*(told["keys"] for told in self.told), strict=True)
        return {
            "partitions": list(range(len(self.told))),
            "publics": list(publics),
            "seals": list(seals),
            "signatures": list(signatures),
            "threshold": threshold,
        }


def test_a_client_refuses_keys_that_are_not_its_own_or_twice():
    clients = Clients()
    lists = clients.lists()
    wrong = {
        "was changed": {"publics": [lists["publics"][1], *lists["publics"][1:]]},
        "twice": {"publics": [*lists["publics"][:2], lists["publics"][1]]},
        "not in order": {"partitions": [2, 1, 0]},
        "threshold of 1": {"threshold": 1},
        "pair of keys": {"seals": lists["seals"][:2]},
    }
    for line, change_of in wrong.items():
        with pytest.raises(ValueError, match=line):
            clients.call(0, steps.answer_shares, lists | change_of, steps.Signing())
    clients.call(0, steps.answer_shares, lists, steps.Signing())
    with pytest.raises(ValueError, match="shared already"):  # else by two lists both secrets open
        clients.call(0, steps.answer_shares, lists, steps.Signing())


def test_a_client_opens_its_shares_once_and_never_below_the_threshold():
    clients = Clients()
    lists = clients.lists()
    sealed = [
        clients.call(n, steps.answer_shares, lists, steps.Signing())["sealed"] for n in range(3)
    ]
    state = clients.contexts[0].state
    with pytest.raises(ValueError, match="has masked nothing"):
        clients.call(0, steps.answer_unmask, {"answered": [0, 1, 2]})
    given = [sealed[other][0] for other in range(3)]
    state["secure"] = ConfigRecord({**state["secure"], "chosen": [0, 1, 2], "sealed": given})
    for answered, line in (([0, 1], "below the threshold"), ([1, 2], "does not fit")):
        with pytest.raises(ValueError, match=line):
            clients.call(0, steps.answer_unmask, {"answered": answered})
    shares = clients.call(0, steps.answer_unmask, {"answered": [0, 1, 2]})["shares"]
    assert len(shares) == 3
    with pytest.raises(ValueError, match="no keys of this round"):
        clients.call(0, steps.answer_unmask, {"answered": [0, 1, 2]})


def test_a_client_gives_no_open_update_where_the_run_hides_them(federate, monkeypatch):
    monkeypatch.setattr("fedssl.federation.rounds.Federation._train_masked", None)
    monkeypatch.setattr("utils.select", lambda kind, section: None)
    with pytest.raises(RuntimeError, match="the server asks for an update without a mask"):
        federate("num_rounds=1", SECURE)


def test_signatures_tell_keys_of_nodes_from_those_of_others(tmp_path):
    from cryptography.hazmat.primitives import serialization as form
    from cryptography.hazmat.primitives.asymmetric import ec

    from fedssl.config.roster import Member, write_roster

    members = []
    for number in range(2):
        key = ec.generate_private_key(ec.SECP384R1())
        text = key.private_bytes(form.Encoding.PEM, form.PrivateFormat.OpenSSH, form.NoEncryption())
        (tmp_path / f"node{number}").write_bytes(text)
        public = key.public_key().public_bytes(form.Encoding.OpenSSH, form.PublicFormat.OpenSSH)
        members.append(Member(number, f"node{number}", public.decode()))
    roster = tmp_path / "nodes.yaml"
    write_roster(roster, members)
    told = {n: (b"keys %d" % n, sign(tmp_path / f"node{n}", b"keys %d" % n)) for n in range(2)}
    check_signatures(roster, told, 2)
    with pytest.raises(ValueError, match="a threshold of 1 is not above half of the 2 nodes"):
        check_signatures(roster, told, 1)
    for wrong in ((b"other", told[1][1]), (told[1][0], told[0][1]), (told[1][0], b"")):
        with pytest.raises(ValueError, match="partition 1 are not signed by its node"):
            check_signatures(roster, told | {1: wrong}, 2)
    with pytest.raises(ValueError, match="partition 7 is not in nodes-file"):
        check_signatures(roster, {7: told[0]}, 2)
    with pytest.raises(UserError, match=r"signing-key=.*no private key"):
        sign(roster, b"text")


# --- settings ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("strategy=krum", "strategy=krum: needs single updates"),
        ("strategy=fedmedian", "strategy=fedmedian: needs single updates"),
        ("max_update_ratio=3", "secagg.max_ratio"),
        ("train.statistics=recomputed", "would travel without a mask"),
        ("privacy=central", "needs privacy.mechanism=none"),
        ("wire=int8", "needs wire=float32; masks need every bit of the sum"),
        ("secagg.threshold=0.2", "at least 0.5"),
    ],
)
def test_what_masks_rule_out_is_refused_in_a_line(override, line):
    with pytest.raises(UserError) as refused:
        load_config("config", [SECURE, override])
    assert line in str(refused.value)
    assert "\n" not in str(refused.value)


def test_no_mask_serves_twice(monkeypatch, federate):
    """Neither between pairs of clients nor over rounds."""
    keys = []
    draw = steps.mask

    def note(key, count):
        keys.append(key)
        return draw(key, count)

    monkeypatch.setattr(steps, "mask", note)
    federate("num_rounds=2", SECURE)
    found = Counter(Counter(keys).values())
    assert found == {1: 2 * 3, 2: 2 * 3}  # own ones, and those of pairs, which both use
