import pytest
from config.recipes import EXPECTED

from fedssl.config.command_line import flags_to_overrides, is_informative, jobs_of
from fedssl.config.compose import CONF, flatten, load_config
from fedssl.errors import UserError

OPTIONS = [
    f"{folder.name}={file.stem}"
    for folder in sorted(CONF.iterdir())
    if folder.is_dir()
    for file in sorted(folder.glob("*.yaml"))
]


@pytest.mark.parametrize(
    ("arguments", "overrides"),
    [
        (["--num_clients=3"], ["num_clients=3"]),
        (["--num_clients", "3"], ["num_clients=3"]),
        (["--num-clients", "3", "--num_gpus=0.25"], ["num_clients=3", "num_gpus=0.25"]),
        (["--dataset", "cifar10", "seed=1"], ["dataset=cifar10", "seed=1"]),
        (["--train.batch_size", "32"], ["train.batch_size=32"]),
        (["--seed", "-1"], ["seed=-1"]),
        (["--run", "outputs/latest"], ["run=outputs/latest"]),
        (["--multirun", "seed=1,2"], ["--multirun", "seed=1,2"]),
        (["-m", "--seed=1,2"], ["-m", "seed=1,2"]),
        (["--cfg", "job", "--resolve"], ["--cfg", "job", "--resolve"]),
        (["--cfg=job"], ["--cfg=job"]),
        (["--help"], ["--help"]),
        (["--quiet", "seed=1"], ["quiet=true", "seed=1"]),
        (["--quiet"], ["quiet=true"]),
        (["--quiet", "false"], ["quiet=false"]),
        (["--quiet=false"], ["quiet=false"]),
    ],
)
def test_flags_become_overrides_and_hydras_stay(arguments, overrides):
    assert flags_to_overrides(arguments) == overrides


@pytest.mark.parametrize("arguments", [["--num_clients"], ["--num_clients", "--num_rounds=1"]])
def test_a_flag_without_a_value_is_refused(arguments):
    with pytest.raises(UserError, match="--num_clients needs a value"):
        flags_to_overrides(arguments)


@pytest.mark.parametrize("choice", OPTIONS)
def test_a_wrong_option_names_the_valid_ones_and_the_nearest(choice):
    group, _, option = choice.partition("=")
    with pytest.raises(UserError) as error:
        load_config("config", [f"{choice}x"])
    told = str(error.value)
    assert told.startswith(f"{choice}x: unknown {group}; ")
    assert "did you mean " in told
    options = {file.stem for file in (CONF / group).glob("*.yaml")}
    assert options == set(told.partition("known: ")[2].rstrip(")").split(", "))
    assert option in options


def test_hydras_help_needs_no_checks():
    assert is_informative(["--cfg=job"])
    assert not is_informative(["--multirun", "seed=1,2"])


def test_a_sweep_is_every_combination():
    jobs = jobs_of(["-m", "seed=1,2", "num_clients=range(2,4)", "num_rounds=1"])
    assert len(jobs) == 4
    assert ["seed=2", "num_clients=3", "num_rounds=1"] in jobs


@pytest.mark.parametrize("choice", OPTIONS)
def test_every_option_composes(choice):
    group = choice.partition("=")[0]
    config = load_config("config", [choice])
    assert group == "experiment" or config[group]


def test_the_promised_defaults():
    config = load_config("config", [])
    assert (config.num_clients, config.num_rounds) == (5, 7)
    assert (config.eval.label_fraction, config.eval.epochs) == (0.1, 20)
    assert config.dataset.name == "digits"
    assert config.strategy._target_.endswith("FedAvg")


def test_a_dataset_brings_its_views_and_optimization():
    config = load_config("config", ["dataset=cifar10"])
    assert config.augment.flip == 0.5
    assert config.dataset.image_size == 32
    assert load_config("config", ["dataset=cifar10", "augment=digits"]).augment.flip == 0


@pytest.mark.parametrize("dataset", ["digits", "cifar10", "cifar100", "hub", "imagefolder"])
def test_a_dataset_names_its_groups(dataset):
    config = load_config("config", [f"dataset={dataset}"])
    assert config.optimizer.name == ("muon" if dataset == "digits" else "sgd")
    assert config.train.local_epochs == (4 if dataset == "digits" else 1)
    assert config.augment.blur == (0.5 if dataset in ("hub", "imagefolder") else 0)
    rates = (0.01, 0.01) if dataset.startswith("cifar") else (0.03, 0.1)
    for protocol in ("linear", "finetune"):
        head = load_config("config", [f"dataset={dataset}", f"eval={protocol}"]).eval
        assert (head.learning_rate, head.weight_decay) == rates
    whole = load_config("config", [f"dataset={dataset}", "eval=supervised"]).eval
    assert (whole.learning_rate, whole.weight_decay, whole.epochs) == (0.02, 5e-4, 60)


def test_the_command_line_wins_over_the_experiment_and_that_over_the_data_set():
    assert load_config("config", ["experiment=cifar10_cpu"]).optimizer.name == "muon"
    chosen = load_config("config", ["optimizer=sgd", "experiment=cifar10_cpu", "dataset=hub"])
    assert (chosen.optimizer.name, chosen.dataset.image_size) == ("sgd", 64)
    assert (chosen.augment.blur, chosen.train.max_steps) == (0.5, 80)


@pytest.mark.parametrize("recipe", EXPECTED)
def test_a_recipe_has_its_numbers(recipe):
    values = flatten(load_config("config", [recipe] if recipe else []))
    del values["run_dir"]
    assert values == EXPECTED[recipe]
    assert {key: type(value) for key, value in values.items()} == {
        key: type(value) for key, value in EXPECTED[recipe].items()
    }


@pytest.mark.parametrize("protocol", ["linear", "finetune", "supervised"])
def test_main_and_test_share_the_protocol(protocol):
    own = flatten(load_config("test", [f"eval={protocol}"]))
    shared = flatten(load_config("config", [f"eval={protocol}"]).eval)
    for key in ("learning_rate", "weight_decay"):  # as the run's
        assert own.pop(key) is None
        del shared[key]
    assert shared.items() <= own.items()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("dataset=cifr10", "unknown dataset; did you mean cifar10?"),
        ("model=resnet34", "unknown model; did you mean resnet"),
        ("strategy=krumm", "unknown strategy; did you mean krum?"),
        ("partition=zzz", "unknown partition; known: dirichlet, iid, pathological"),
        ("num_client=5", "num_client: unknown key; did you mean num_clients?"),
        ("optimizer.learning_rte=1", "did you mean optimizer.learning_rate?"),
        ("learning_rate=1", "did you mean"),
        ("+foo=1", "foo: unknown key; see --help"),
        ("+monitor.foo=1", "monitor.foo: unknown key"),
        ("dataset=digits optimizer=sgd optimizer.muon_momentum=0.5", "only muon has it"),
        ("optimizer.name=adam", "optimizer.name=adam: known: sgd, muon"),
        ("~train.batch_size", "train.batch_size: missing"),
        ("~partition", "partition: missing; choose an option"),
        ("output_dir=???", "output_dir"),
        ("monitor=5", "monitor=5: must be a section"),
        ("monitor.bank=0", "monitor.bank=0: must be at least 1"),
        ("quiet=1", "quiet=1: must be true or false"),
        ("num_clients=null", "must be a whole number"),
        ("strategy=fedadam strategy.beta_1=1", "must be at least 0 and below 1"),
        ("+partition.x={_target_:os.system}", "choose one with partition=NAME"),
        ("partition=dirichlet partition.alpha={_target_:os.system}", "from a file below conf/"),
        ("partition._target_=os.system", "_target_ comes from a file below conf/"),
        ("dataset._target_=os.system", "choose one with dataset=NAME"),
        ("method._target_=model.SimCLRs", "choose one with method=NAME"),
        ("num_clients=0", "num_clients=0: must be at least 1"),
        ("participants=[x]", "participants=['x']: must be a list of whole numbers, from 0 on"),
        ("model.deep_supervision=[layer5]", "no layer5; did you mean layer3?"),
        ("train.round_fractions=[0,1]", "must be a list of numbers above 0 and at most 1"),
        ("train.round_fractions=[0.5,2]", "must be a list of numbers above 0 and at most 1"),
        ("train.train_resolutions=[2]", "must be a list of whole numbers, 4 to 4096"),
        ("train.eval_resolution=9", "the images have 8 pixels; at most these"),
        ("experiment=cifar", "did you mean cifar10_"),
        ("num_clients=-3", "num_clients=-3: must be at least 1"),
        ("num_clients=2.5", "must be a whole number"),
        ("num_clients=many", "must be a whole number"),
        ("num_clients=true", "must be a whole number"),
        ("num_rounds=0", "must be at least 1"),
        ("num_cpus=0", "must be at least 1"),
        ("num_cpus=lots", "must be a whole number"),
        ("num_gpus=-1", "must be at least 0"),
        ("eval.label_fraction=0", "must be above 0 and at most 1"),
        ("eval.label_fraction=1.1", "must be above 0 and at most 1"),
        ("precision=fp16", "precision=fp16: known: auto, float32, bfloat16"),
        ("train.batch_size=1", "must be at least 2"),
        ("method.temperature=0", "must be above 0"),
        ("optimizer.learning_rate=nan", "must be a finite number"),
        ("augment.crop_scale=0.2", "must be a list"),
        ("augment.crop_scale=[0.2]", "must be a list of 2 numbers"),
        ("augment.crop_scale=[0.9,0.1]", "must rise"),
        ("dataset.path=~/a", "quote odd characters"),
        ("dataset.path=a=b", "not of the form key=value"),
        ("num_clients=1,2", "num_clients=1,2"),
        ("num_rounds", "num_rounds: not of the form key=value"),
        ("model.stem=conv", "model.stem=conv"),
    ],
)
def test_a_wrong_override_gets_one_line_with_the_remedy(override, message):
    with pytest.raises(UserError) as error:
        load_config("config", override.split())
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_folder_may_be_called_by_a_number():
    config = load_config("config", ["dataset=imagefolder", "dataset.path=2021", "cache_dir=7"])
    assert (config.dataset.path, config.cache_dir) == ("2021", "7")
    for path in ("2021_05", "007", "+5"):
        config = load_config("config", ["dataset=imagefolder", f"dataset.path={path}"])
        assert config.dataset.path == path
    assert load_config("test", ["run=3"]).run == "3"
    with pytest.raises(UserError, match=r"cache_dir=\[1\.5\]: must be text"):
        load_config("config", ["cache_dir=[1.5]"])


def test_negatives_of_others_need_one_normalization():
    given = ["method.shared_negatives=1", "train.global_statistics_from=0.1"]
    for lacking in ([given[0]], given, [given[0], "train.statistics=recomputed"]):
        with pytest.raises(
            UserError, match=r"^method\.shared_negatives=1: needs one normalization"
        ):
            load_config("config", lacking)
    assert load_config("config", [*given, "train.statistics=recomputed"])


def test_what_trains_by_the_statistics_of_all_clients_needs_them_after_every_round():
    given = ["train.statistics=recomputed", "train.global_statistics_from=0.5"]
    assert load_config("config", given)
    assert load_config("config", [given[0], "evaluate_every=4"])
    with pytest.raises(UserError, match=r"^evaluate_every=4: .*=0\.5 .* give evaluate_every=1$"):
        load_config("config", [*given, "evaluate_every=4"])


@pytest.mark.parametrize("name", ["1e5", "1_000", "007", "1.50", "true", "nan", "-0"])
def test_a_text_stays_as_it_was_written(name):
    given = ["dataset=hub", f"dataset.path={name}", f"dataset.config_name={name}", f"resume={name}"]
    config = load_config("config", given)
    assert [config.dataset.path, config.dataset.config_name, config.resume] == [name] * 3
    assert load_config("config", ["dataset=hub", "dataset.path=null"]).dataset.path is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["=1"], "=1: no key"),
        (["--", "num_clients=2"], "=num_clients=2: no key"),
        (["-x"], "-x: no such flag"),
        (["-x=1"], "-x=1: no such flag"),
        (["seed=1", "num_clients=[1,"], "num_clients=[1,: not of the form"),
        (["--multirun", "seed=1", "num_clients=choice("], "num_clients=choice(: not of the form"),
        (["num_clients=1,2"], "num_clients=1,2: several values; several runs need --multirun"),
        (["seed=${nowhere}"], "seed=${nowhere}: "),
        (["strategy=null"], "strategy=null: "),
        (["hydra.run.dir=/proc/x"], "choose the place with run_dir=DIR"),
        (["--config-dir", "/tmp", "seed=-1"], "seed=-1: must be at least 0"),
        (["seed='1'"], "seed='1': must be a whole number"),
        (["output_dir="], "output_dir=: must be text, and not empty"),
    ],
)
def test_what_a_command_line_gets_wrong_is_named(arguments, message):
    def read():
        for job in jobs_of(flags_to_overrides(arguments)):
            load_config("config", job)

    with pytest.raises(UserError) as error:
        read()
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("experiment", sorted(f.stem for f in (CONF / "experiment").iterdir()))
@pytest.mark.parametrize("method", sorted(f.stem for f in (CONF / "method").iterdir()))
def test_every_experiment_takes_every_method(experiment, method):
    plain = load_config("config", [f"experiment={experiment}"])
    chosen = load_config("config", [f"experiment={experiment}", f"method={method}"])
    expected = load_config("config", [f"method={method}"]).method
    assert chosen.method._target_ == expected._target_
    assert chosen.train == plain.train
    assert chosen.optimizer == plain.optimizer


@pytest.mark.parametrize("experiment", sorted(f.stem for f in (CONF / "experiment").iterdir()))
def test_every_experiment_takes_every_optimizer(experiment):
    for optimizer in (f.stem for f in (CONF / "optimizer").iterdir()):
        chosen = load_config("config", [f"experiment={experiment}", f"optimizer={optimizer}"])
        assert chosen.optimizer.name == optimizer.partition("_")[0]


def test_a_key_of_two_methods_names_both():
    with pytest.raises(UserError, match="only SimCLR and MoCo have it"):
        load_config("config", ["method=vicreg", "method.temperature=0.2"])
