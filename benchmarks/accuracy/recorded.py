"""Which runs are recorded: their names below results/, titles, overrides and evaluations."""

from collections.abc import Sequence

SEEDS = (0, 1, 2)
# How the clients of the older comparisons train: momentum begins every round at zero.
SEVEN_ROUNDS = (
    *("num_rounds=7", "train.max_steps=24", "train.statistics=averaged"),
    *("optimizer.momentum_start=zero", "optimizer.muon_learning_rate=0.05"),
    "optimizer.learning_rate=0.03",
)
TWO_CLASSES = ("partition=pathological", "partition.classes_per_client=2")
# In these the images and steps of all clients together are the same: 840 steps of 64.
COMPARED: dict[str, tuple[str, Sequence[str]]] = {  # title in the table, and overrides
    "clients-5": ("5 clients, IID, FedAvg", ()),
    "centralized": (
        "centralized: one client with all images",
        ("num_clients=1", "train.max_steps=120"),
    ),
    "client-alone": ("one of the 5 clients alone", ("participants=[0]",)),
    "clients-2": ("2 clients", ("num_clients=2", "train.max_steps=60")),
    "clients-4": ("4 clients", ("num_clients=4", "train.max_steps=30")),
    "clients-6": ("6 clients", ("num_clients=6", "train.max_steps=20")),
    "clients-8": ("8 clients", ("num_clients=8", "train.max_steps=15")),
    "clients-10": ("10 clients", ("num_clients=10", "train.max_steps=12")),
    "dirichlet": ("5 clients, Dirichlet 0.1", ("partition=dirichlet", "partition.alpha=0.1")),
    "two-classes": ("5 clients, two classes each", TWO_CLASSES),
    "two-classes-fedprox": (
        "5 clients, two classes each, FedProx",
        (*TWO_CLASSES, "strategy=fedprox"),
    ),
    "two-a-round": (
        "5 clients, IID, FedAvg, two of them a round",
        ("strategy.fraction_train=0.4", "train.max_steps=60"),
    ),
    "server-rate": (
        "5 clients, IID, FedAvgM without momentum, server rate 2",
        ("strategy=fedavgm", "strategy.server_momentum=0", "strategy.server_learning_rate=2"),
    ),
    "short-first-rounds": (
        "5 clients, IID, FedAvg, first rounds short",
        ("train.max_steps=35", "train.round_fractions=[0.2,0.4,0.6,0.8,0.8,1,1]"),
    ),
    "fedavgm": ("5 clients, IID, FedAvgM", ("strategy=fedavgm",)),
    "fedadam": ("5 clients, IID, FedAdam", ("strategy=fedadam",)),
}
FIRST = "clients-5"  # has the baselines too, which are the same for all runs of a seed

# In the federations the steps of each client are the same, 168 of 64 images, so that all take as
# long, but where the title says otherwise.
ROUND_STEPS = 6
OF_20, OF_50 = (  # of many clients a fifth measures, with as many images as one of five holds
    (f"num_clients={count}", "strategy.fraction_evaluate=0.2") for count in (20, 50)
)
# Spares a third of the time and gives the same encoder; older records measured after every round.
SELDOM = ("evaluate_every=7",)
COUNTS_OF_20 = (1, 2, 5, 10, 20)


def steps_of(count: int) -> tuple[str, str]:
    """Let one client take the steps of so many, for which it sees its images more than once."""
    return f"train.max_steps={ROUND_STEPS * count}", "train.local_epochs=4"


FEDERATIONS: dict[str, tuple[str, Sequence[str]]] = {
    "alone": ("one of five clients alone", ("participants=[0]",)),
    "five": ("five clients", ()),
    "five-7-rounds": ("five clients, in 7 rounds", ("num_rounds=7", "train.max_steps=24")),
    "five-14-rounds": ("five clients, in 14 rounds", ("num_rounds=14", "train.max_steps=12")),
    "five-56-rounds": ("five clients, in 56 rounds", ("num_rounds=56", "train.max_steps=3")),
    "five-plain": (
        "five clients, in 7 rounds of FedAvg alone",
        (*SEVEN_ROUNDS, "train.statistics=recomputed"),
    ),
    "central-batch": (
        "all images in one place, the batch of all five",
        ("num_clients=1", "train.batch_size=320"),
    ),
    "central-steps": (
        "all images in one place, the steps of all five",
        ("num_clients=1", *steps_of(5)),
    ),
    "alone-steps": (
        "one of five clients alone, the steps of all five",
        ("participants=[0]", *steps_of(5)),
    ),
    "two-classes-alone": (
        "one of five clients alone, two classes each",
        ("participants=[0]", *TWO_CLASSES),
    ),
    "two-classes": ("five clients, two classes each", TWO_CLASSES),
    "two-classes-plain": (
        "five clients, two classes each, in 7 rounds of FedAvg alone",
        (*SEVEN_ROUNDS, "train.statistics=recomputed", *TWO_CLASSES),
    ),
    "of-50-1": ("one of 50 clients alone", (*OF_50, "participants=[0]")),
    "of-50-50": ("50 clients", OF_50),
}
for count in COUNTS_OF_20:
    FEDERATIONS[f"of-20-{count}"] = (
        f"{count} of 20 clients",
        (*OF_20, *SELDOM, f"participants=[{','.join(map(str, range(count)))}]"),
    )
for count in COUNTS_OF_20[1:]:  # with the compute of so many clients
    FEDERATIONS[f"of-20-steps-{count}"] = (
        f"one of 20 clients alone, the steps of {count}",
        (*OF_20, *SELDOM, "participants=[0]", *steps_of(count)),
    )
    FEDERATIONS[f"of-20-together-{count}"] = (
        f"the images of {count} of 20 clients in one place, the steps of all of them",
        (f"num_clients={20 // count}", *SELDOM, "participants=[0]", *steps_of(count)),
    )

# Every method in the federations of five: title in the table, and overrides.
METHODS: dict[str, tuple[str, Sequence[str]]] = {
    "simclr": ("SimCLR", ()),
    "vicreg": ("VICReg", ("method=vicreg",)),
    "barlow_twins": ("Barlow Twins", ("method=barlow_twins",)),
    "moco": ("MoCo", ("method=moco_short",)),
    "simsiam": ("SimSiam", ("method=simsiam",)),
    "byol": ("BYOL", ("method=byol",)),
    "fedbyol": ("FedBYOL: the target averaged, too", ("method=byol", "method.share_target=true")),
    "fedu": ("BYOL, FedU", ("method=byol", "receive=fedu")),
    "fedema": ("BYOL, FedEMA", ("method=byol", "receive=fedema")),
}
SAME_TRAINING = {"fedu": "byol", "fedema": "byol"}  # differ in what a client takes over alone
SPLITS: dict[str, tuple[str, Sequence[str]]] = {  # run of SimCLR, and how images are dealt out
    "iid": ("federation/five", ()),
    "two-classes": ("federation/two-classes", TWO_CLASSES),
}


def method_run(method: str, split: str) -> str:
    """Name the run of a method in the federation of five, or on digits."""
    if method == "simclr":
        return "digits_bfloat16" if split == "digits" else SPLITS[split][0]
    return f"methods/{split}-{method}"


# A thousand clients of 50 images, of which 50 train in each of 12 rounds: epsilon by noise, at
# delta 1e-5. The clipping costs by itself, so it has a line without noise.
THOUSAND = (
    *("experiment=cifar10_sweep", "num_clients=1000", "num_rounds=12"),
    *("strategy.fraction_train=0.05", "strategy.fraction_evaluate=0.02"),
    *("train.local_epochs=3", "train.max_steps=3", "monitor.bank=2000"),
)
PLAINLY = ("model.norm=group", "train.statistics=averaged", "optimizer.momentum_start=zero")
CLIPPED = ("privacy=central", "privacy.clipping_norm=0.2")
NOISE = {"10": 1.84, "4": 4.01, "1": 14.02}  # by epsilon after 12 rounds
FIVE = ("experiment=cifar10_sweep", "num_rounds=7", "train.max_steps=24", "eval.baselines=false")
PRIVATE: dict[str, tuple[str, Sequence[str]]] = {  # title in the table, and overrides
    "thousand": ("1,000 clients, 50 a round", (*THOUSAND, *PLAINLY, "weighting=equal")),
    "thousand-clipped": (
        "the same, clipped to a length of 0.2",
        (*THOUSAND, *CLIPPED, "privacy.noise_multiplier=1e-6", "eval.baselines=false"),
    ),
    **{
        f"thousand-epsilon-{epsilon}": (
            f"the same with noise, epsilon {epsilon}",
            (*THOUSAND, *CLIPPED, f"privacy.noise_multiplier={noise}", "eval.baselines=false"),
        )
        for epsilon, noise in NOISE.items()
    },
    "five": ("5 clients, all in each of 7 rounds", (*FIVE, *PLAINLY)),
    "five-epsilon-10": (
        "the same, clipped to 0.2 with noise, epsilon 10",
        (*FIVE, *CLIPPED, "privacy.noise_multiplier=1.41"),
    ),
}

# How models are rounded on their way; float32 are runs above.
WIRES = ("float32", "bfloat16", "int8", "int4")
WIRE_RUNS = {"digits": "digits_bfloat16", "sweep": "federation/five"}


def wire_run(images: str, wire: str) -> str:
    """Name the run with a wire, on digits or in the federation of five."""
    return WIRE_RUNS[images] if wire == "float32" else f"wire/{images}-{wire}"


# Beside the budget of cifar10_cpu what a federation stands between: as many steps one after the
# other on a fifth of the images, and all images with the steps of both clients of a round.
BETWEEN = ("experiment=cifar10_cpu", "strategy.fraction_train=1", "eval.baselines=false")
BUDGETS = {
    "cifar10_cpu": ["experiment=cifar10_cpu"],
    "cifar10_cpu_client_alone": [*BETWEEN, "participants=[0]"],
    "cifar10_cpu_centralized": [*BETWEEN, "num_clients=1", "train.max_steps=160"],
    "cifar10_cpu_long": ["experiment=cifar10_cpu_long"],
}
# About the same steps of each client in all: 84 of 64 images in 7 rounds, 88 in more.
DIGITS_OFTEN = ("train.local_epochs=1", "optimizer.momentum_start=averaged")
DIGITS = {
    "digits": ["precision=float32"],
    "digits_bfloat16": [],
    "digits_alone": ["participants=[0]"],
    "digits_28_rounds": ["num_rounds=28", *DIGITS_OFTEN],
    "digits_two_classes": [*TWO_CLASSES],
    "digits_two_classes_alone": [*TWO_CLASSES, "participants=[0]"],
    "digits_two_classes_56_rounds": [
        *("num_rounds=56", "train.max_steps=2", *DIGITS_OFTEN, *TWO_CLASSES),
        *("train.statistics=recomputed", "train.global_statistics_from=0.035"),
        "method.shared_negatives=1",
    ],
}
RUNS: dict[str, list[str]] = DIGITS | BUDGETS
RUNS |= {f"privacy/{name}": list(overrides) for name, (_, overrides) in PRIVATE.items()}
RUNS["privacy/digits-secure"] = ["secure_aggregation=true"]
RUNS |= {
    f"sweep/{name}": [
        "experiment=cifar10_sweep",
        *SEVEN_ROUNDS,
        *overrides,
        *([] if name == FIRST else ["eval.baselines=false"]),
    ]
    for name, (_, overrides) in COMPARED.items()
}
RUNS |= {
    f"federation/{name}": ["experiment=cifar10_sweep", *overrides, "eval.baselines=false"]
    for name, (_, overrides) in FEDERATIONS.items()
}
for method, (_, overrides) in METHODS.items():
    if method == "simclr":  # its runs are among those above
        continue
    for split, (_, dealt) in SPLITS.items():
        given = [*overrides, *dealt, *SELDOM, "eval.baselines=false"]
        RUNS[method_run(method, split)] = ["experiment=cifar10_sweep", *given]
    RUNS[method_run(method, "digits")] = list(overrides)
for wire in WIRES[1:]:
    RUNS[wire_run("digits", wire)] = [f"wire={wire}"]
    RUNS[wire_run("sweep", wire)] = [
        *("experiment=cifar10_sweep", f"wire={wire}", "eval.baselines=false"),
    ]
# The budgets take long, and the other strategies get more seeds once a first one helps.
ONE_SEED = {*BUDGETS} | {
    f"sweep/{name}" for name in ("short-first-rounds", "two-classes-fedprox", "fedadam")
}
ONE_SEED |= {name for name in RUNS if name.startswith(("methods/digits-", "privacy/"))}
# Evaluations besides that of main.py, by run.
EVALUATIONS: dict[str, list[list[str]]] = {
    f"sweep/{FIRST}": [
        ["label_fraction=0.01"],
        ["label_fraction=1.0", "seeds=1"],
        ["eval=finetune", "seeds=1", "baselines=false", "batch_size=64"],
        ["eval=supervised", "seeds=1", "baselines=false", "epochs=20"],
    ],
    "sweep/centralized": [
        ["label_fraction=0.01", "baselines=false"],
        ["label_fraction=1.0", "seeds=1", "baselines=false"],
    ],
}
