"""Old names of settings: on the command line, and in the files of older runs."""

import sys

import pytest
from conftest import ROOT
from omegaconf import OmegaConf

from benchmarks.accuracy.recorded import RUNS
from fedssl.config.checks import check_settings
from fedssl.config.command_line import read_arguments
from fedssl.config.compose import flatten, load_config, to_mapping
from fedssl.config.moved import RENAMED, modernize, modernize_overrides
from fedssl.deployment.checks import check_run_config
from fedssl.errors import UserError
from fedssl.runs.directory import RunDirectory
from fedssl.runs.resume import check_same

EVERY = sorted(ROOT.glob("results/**/config.yaml"))
RECORDED = [file for file in EVERY if "temperature" in OmegaConf.load(file).train]  # with old names
MOVED = [
    ("train.temperature=0.1", "method.temperature=0.1"),
    ("train.optimizer=sgd", "optimizer=sgd"),
    ("train.learning_rate=0.1", "optimizer.learning_rate=0.1"),
    ("train.momentum=0.8", "optimizer.momentum=0.8"),
    ("train.weight_decay=0", "optimizer.weight_decay=0"),
    ("train.muon_learning_rate=0.1", "optimizer.muon_learning_rate=0.1"),
    ("train.muon_momentum=0.8", "optimizer.muon_momentum=0.8"),
    ("train.view_sizes=[8]", "train.train_resolutions=[8]"),
    ("train.encode_size=8", "train.eval_resolution=8"),
    ("train.round_lengths=[1]", "train.round_fractions=[1]"),
    ("max_step_ratio=5", "max_update_ratio=5"),
    ("eval.mode=finetune", "eval=finetune"),
    ("dataset.source=digits", "dataset=digits"),
    ("augment=cifar100", "augment=cifar"),
    ("augment=imagefolder", "augment=photos"),
    ("train=hub", "train=default"),
]


@pytest.mark.parametrize(("old", "new"), MOVED)
def test_an_old_name_means_the_new_one_and_a_line_says_so(old, new):
    rewritten, notices = modernize_overrides([old])
    assert (rewritten, len(notices)) == ([new], 1)
    assert modernize_overrides([new]) == ([new], [])
    before, after = flatten(load_config("config", [old])), flatten(load_config("config", [new]))
    del before["run_dir"], after["run_dir"]
    assert before == after


def test_all_names_that_moved_are_tried():
    tried = {old.partition("=")[0] for old, _ in MOVED} | {"mode"}
    assert RENAMED.keys() <= tried


def test_settings_of_labels_alone_go_to_that_protocol_and_else_away():
    given = ["eval.mode=supervised", "eval.supervised.epochs=3"]
    assert modernize_overrides(given)[0] == ["eval=supervised", "eval.epochs=3"]
    assert modernize_overrides(["mode=supervised", "supervised.epochs=3"])[0][1] == "epochs=3"
    rewritten, notices = modernize_overrides(["supervised.epochs=3", "seed=1"])
    assert rewritten == ["seed=1"]
    assert notices == ["supervised.epochs counts with another protocol only and is left out"]


def test_an_old_head_of_cifar_stays():
    config = load_config("config", ["eval=cifar10"])
    assert (config.eval.learning_rate, config.eval.weight_decay) == (0.01, 0.01)


def test_flags_and_signs_are_understood(capsys):
    given = ["--train.temperature=0.1", "--train.optimizer", "sgd", "+train.view_sizes=[8]"]
    assert read_arguments("config", given) == [
        *("method.temperature=0.1", "optimizer=sgd", "+train.train_resolutions=[8]"),
    ]
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.splitlines()[0] == "train.temperature is now method.temperature"
    assert len(said.err.splitlines()) == 3
    read_arguments("config", [*given, "--quiet"])
    assert capsys.readouterr().err == ""


def test_a_run_configuration_may_hold_old_names(capsys):
    checked = check_run_config('hydra-overrides="train.temperature=0.1"', ["train.optimizer=sgd"])
    assert checked == {"hydra-overrides": "method.temperature=0.1 optimizer=sgd"}
    assert "train.optimizer is now optimizer" in capsys.readouterr().err


def test_the_overrides_of_an_older_run_come_under_todays_names(tmp_path):
    run = RunDirectory(tmp_path)
    run.overrides.write_text("- train.temperature=0.1\n- seed=1\n")
    assert run.read_overrides() == ["method.temperature=0.1", "seed=1"]


@pytest.mark.parametrize("file", RECORDED, ids=lambda file: str(file.parent.relative_to(ROOT)))
def test_a_recorded_configuration_becomes_one_of_today(file):
    old = OmegaConf.load(file)
    config = RunDirectory(file.parent).load_config()
    assert modernize(config) == config
    check_settings("config", to_mapping(config))
    assert flatten(config).keys() - {"run_dir"} >= flatten(old).keys() - {
        *RENAMED,
        *(key for key in flatten(old) if key.startswith("eval.")),
    }
    assert config.method.temperature == old.train.temperature
    assert config.optimizer.name == old.train.get("optimizer", "sgd")
    assert config.optimizer.learning_rate == old.train.learning_rate
    assert config.train.train_resolutions == old.train.view_sizes
    assert config.eval.learning_rate == config.head.learning_rate == old.eval.learning_rate
    assert config.max_update_ratio == old.max_step_ratio


@pytest.mark.parametrize(
    "file",
    sorted({*EVERY} - {*RECORDED}),
    ids=lambda file: str(file.parent.relative_to(ROOT)),
)
def test_a_newer_recorded_configuration_is_one_of_today(file):
    config = RunDirectory(file.parent).load_config()
    check_settings("config", to_mapping(config))
    assert flatten(OmegaConf.load(file)).items() <= flatten(config).items()


def test_a_recorded_run_of_a_recipe_can_go_on():
    """Its configuration is the one that its command composes to today."""
    recorded = RunDirectory(ROOT / "results/sweep/clients-5/seed1").load_config()
    today = load_config("config", [*RUNS["sweep/clients-5"], "seed=1"])
    check_same(flatten(today), flatten(recorded))


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("train:\n", "train: 5\nx:\n", "train is no section"),
        ("num_clients: 5", "num_clients: -5", "num_clients=-5: must be at least 1"),
        ("IidPartitioner", "Os", "partition._target_="),
        ("mode: linear", "mode: cubic", "eval._target_=cubic"),
    ],
)
def test_a_damaged_configuration_is_refused_in_a_line(tmp_path, old, new, reason):
    text = RECORDED[0].read_text()
    assert old in text
    (tmp_path / "config.yaml").write_text(text.replace(old, new))
    with pytest.raises(UserError) as error:
        RunDirectory(tmp_path).load_config()
    assert reason in str(error.value)
    assert str(tmp_path) in str(error.value)


def test_a_program_says_it_once(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["test.py", "mode=finetune"])
    arguments = read_arguments("test", sys.argv[1:])
    assert arguments == ["eval=finetune"]
    assert capsys.readouterr().err == "mode is now eval\n"


@pytest.mark.parametrize("mode", ["mode=finetune", "eval.mode=finetune"])
@pytest.mark.parametrize("first", [True, False])
def test_tuning_at_the_sites_can_be_said_in_two_words(mode, first):
    given = [mode, "eval=federated"] if first else ["eval=federated", mode]
    assert modernize_overrides([*given, "seeds=2"])[0] == ["eval=federated_finetune", "seeds=2"]
