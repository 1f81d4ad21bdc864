import json

from fedssl.seeding import derive_seed


def test_seeds_depend_on_the_purpose_and_fit_a_generator():
    seeds = {derive_seed(0, "train", r, p) for r in range(50) for p in range(50)}
    assert len(seeds) == 2500
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert derive_seed(0, "train", 1, 2) == derive_seed(0, "train", 1, 2)
    assert json.dumps(derive_seed(0, "a")) != json.dumps(derive_seed(0, "b"))
