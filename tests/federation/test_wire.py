"""Models rounded on their way: how much is lost, that it comes later, and what is refused."""

import zlib

import pytest
import torch
from flwr.app import Array, ArrayRecord
from samples import make_simclr

from fedssl.federation.messages import (
    PACKED,
    ROUNDED,
    pack_arrays,
    pack_rounded,
    pack_tensors,
    unpack_arrays,
    unpack_update,
)
from fedssl.federation.wire import (
    DOWN,
    add_update,
    compress,
    decode,
    decompress,
    encode,
    encode_update,
)
from utils import build_method

ROUNDED_WIRES = ["bfloat16", "int8", "int4"]
# Largest error of a number, and how many bits it takes on the way.
ERRORS = {"bfloat16": 2**-8, "int8": 1 / 254, "int4": 0.35}


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def state(seed=0):
    return {
        "weight": normal(8, 4, 3, 3, seed=seed),
        "bias": normal(8, seed=seed),
        "head": normal(5, 300, seed=seed + 1),
        "count": torch.tensor(3),
    }


@pytest.mark.parametrize("wire", ROUNDED_WIRES)
def test_an_error_is_at_most_half_a_step(wire):
    values = state()
    again = decode(encode(values, wire))
    assert list(again) == list(values)
    for name in ("bias", "count"):  # vectors and counters travel as they are
        assert torch.equal(again[name], values[name])
    for name in ("weight", "head"):
        rows = values[name].flatten(1)
        error = (again[name].flatten(1) - rows).abs()
        if wire == "bfloat16":
            assert (error <= ERRORS[wire] * rows.abs()).all()
        elif wire == "int8":
            assert (error <= ERRORS[wire] * rows.abs().amax(1, keepdim=True) * 1.0001).all()
        else:  # 4 bits reach to 4.9 times the root mean square
            assert (error <= ERRORS[wire] * rows.square().mean(1, keepdim=True).sqrt() * 1.01).all()
        assert error.max() > 0


@pytest.mark.parametrize("wire", ROUNDED_WIRES)
def test_what_rounding_takes_comes_with_later_updates(wire):
    """The same change ten times: what arrived is ten changes, but for what is left."""
    start, left, arrived = state(), {}, {}
    change = {name: value * 0.01 for name, value in state(seed=5).items() if value.ndim}
    trained = {n: v + change[n] if n in change else v for n, v in start.items()}
    errors = []
    for times in range(1, 11):
        coded, left = encode_update(start, trained, left, wire)
        told = decode(coded)
        for name in ("weight", "head"):
            arrived[name] = arrived.get(name, 0) + told[name]
        head = arrived["head"] - times * change["head"]
        errors.append(float(head.norm() / (times * change["head"]).norm()))
    assert errors[-1] < 0.2 * errors[0]
    without = decode(encode({"head": change["head"]}, wire))["head"] - change["head"]
    assert errors[-1] < 0.2 * float(without.norm() / change["head"].norm())


@pytest.mark.parametrize("wire", ROUNDED_WIRES)
def test_the_change_is_added_to_the_exact_weights(wire):
    exact = state()
    sent = decode(encode(exact, DOWN[wire]))
    trained = {n: v + 0.01 if v.is_floating_point() else v + 1 for n, v in sent.items()}
    coded, _ = encode_update(sent, trained, {}, wire)
    given = add_update(exact, coded)
    assert torch.equal(given["bias"], trained["bias"])
    assert int(given["count"]) == 4
    assert torch.allclose(given["head"], exact["head"] + 0.01, atol=4e-3)


def test_bytes_of_a_resnet18():
    method = make_simclr()
    exact = {name: value for name, value in method.state_dict().items() if value.ndim}
    trained = {name: v + 0.01 * torch.randn_like(v) for name, v in exact.items()}
    sizes = {}
    for wire in ROUNDED_WIRES:
        coded, _ = encode_update(exact, trained, {}, wire)
        sizes[wire] = len(pack_rounded(coded)[PACKED].data) / 1e6
    plain = len(pack_arrays(ArrayRecord(exact))[PACKED].data) / 1e6
    assert plain == pytest.approx(46, abs=1)
    assert sizes["bfloat16"] < 23.5
    assert sizes["int8"] < 12
    assert sizes["int4"] < 4.2


def test_rounded_arrays_survive_the_way():
    arrays = ArrayRecord({n: v for n, v in state().items() if v.is_floating_point()})
    packed = pack_arrays(arrays, "int8")
    sent = ArrayRecord.inflate(packed.deflate(), children=packed.children)
    again = unpack_arrays(sent).to_torch_state_dict()
    expected = decode(encode(arrays.to_torch_state_dict(), "int8"))
    assert list(again) == list(arrays)
    assert all(torch.equal(again[name], value) for name, value in expected.items())


def test_a_row_of_zeros_stays_one():
    for wire in ROUNDED_WIRES:
        assert not decode(encode({"w": torch.zeros(3, 4)}, wire))["w"].any()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("wire", ROUNDED_WIRES)
def test_an_update_that_is_not_finite_is_not_rounded(wire, value):
    odd = torch.ones(3, 4)
    odd[1, 2] = value
    with pytest.raises(FloatingPointError, match="'w' of the update is not finite"):
        encode({"w": odd}, wire)


GIVEN = {name: value for name, value in state().items() if value.is_floating_point()}
CODED = encode(GIVEN, "int8")


def as_record(data):
    return ArrayRecord({PACKED: Array("uint8", (len(data),), ROUNDED, data)})


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "cut off"),
        (b"x" * 100, "can't be decompressed"),
        (compress(pack_tensors(CODED))[:-9], "cut off"),
        (compress(pack_tensors(CODED)) + b"more", "cut off"),
        (zlib.compress(bytes(2**27)), "more than"),
        (compress(b"garbage" * 9), "can't be read"),
        (compress(pack_tensors({**CODED, "odd": torch.ones(2)})), "'odd' is unknown"),
        (compress(pack_tensors({**CODED, "bias": torch.ones(2)})), "'bias' has shape"),
        (
            compress(pack_tensors({**CODED, "step head": torch.ones(2)})),
            "'head' lacks a step for each row",
        ),
        (
            compress(pack_tensors({n: v for n, v in CODED.items() if n != "step head"})),
            "'head' lacks a step",
        ),
        (
            compress(pack_tensors({**CODED, "step head": torch.ones(5, dtype=torch.int8)})),
            "'head' lacks a step",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_damaged_update_is_refused(data, reason):
    with pytest.raises(ValueError, match=reason):
        unpack_update(as_record(data), ArrayRecord(GIVEN))


def test_a_change_of_nothing_is_refused():
    with pytest.raises(ValueError, match="nobody sent"):
        unpack_update(as_record(compress(pack_tensors(CODED))), None)


def test_decompression_stops_at_the_limit():
    bomb = zlib.compress(bytes(10**8))
    assert len(bomb) < 10**6
    with pytest.raises(ValueError, match=r"more than 1\.0 MB"):
        decompress(bomb, 10**6)


def test_a_federation_learns_with_it_and_moves_fewer_bytes(federate):
    # Muon makes every direction of a step as long as any, those of rounding, too.
    once = ("num_rounds=1", "optimizer=sgd")
    plain, (before,), _ = federate(*once)
    first = build_method(plain.run.load_config(), torch.device("cpu")).state_dict()
    share = {"bfloat16": 0.52, "int8": 0.27, "int4": 0.11}
    for wire in ROUNDED_WIRES:
        rounded, (after,), _ = federate(*once, f"wire={wire}")
        assert after.bytes_up < share[wire] * before.bytes_up
        down, exact_down = (m.bytes_moved - m.bytes_up for m in (after, before))
        assert down < share[DOWN[wire]] * exact_down
        assert after.failures == ()
        assert after.train_loss == pytest.approx(before.train_loss, rel=0.01)
        for told, exact in zip(after.clients, before.clients, strict=True):
            assert told.update_norm == pytest.approx(exact.update_norm, rel=0.1)
        name = "encoder.layer4.1.conv2.weight"
        ways = [f.method.state_dict()[name] - first[name] for f in (plain, rounded)]
        cosine = torch.nn.functional.cosine_similarity(*(way.flatten() for way in ways), dim=0)
        assert 0.8 < cosine < 1
