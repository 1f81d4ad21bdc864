"""What a user gets who only asks: help, the configuration, completion."""

import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT

from fedssl.config.command_line import flags_to_overrides
from fedssl.config.compose import CONF, flatten, load_config

PROGRAMS = {"config": "main.py", "test": "test.py"}
NEEDED = {"num_clients", "num_rounds", "num_cpus", "num_gpus", "seed", "precision", "resume"}
NEEDED |= {"quiet", "output_dir", "cache_dir", "ray_address", "dataset", "dataset.path", "model"}
NEEDED |= {"partition", "strategy", "train.batch_size", "train.learning_rate", "eval.seeds"}


def ask(script, *arguments, **environment):
    return subprocess.run(
        [sys.executable, "-X", "importtime", str(ROOT / script), *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | environment,
    )


@pytest.fixture(scope="module", params=PROGRAMS)
def helped(request):
    done = ask(PROGRAMS[request.param], "--help")
    assert done.returncode == 0, done.stdout
    return request.param, done


def options(text):
    """List the options of a help text: an example as an override, and the default, if told."""
    for line in text.splitlines():
        found = re.match(r"  (--[\w.]+\S*|[\w.]+=\S+) +[^\[]*(?:\[(.*)\])?$", line)
        if found and not found[1].startswith(("--multirun", "--cfg", "--hydra")):
            yield flags_to_overrides([found[1]])[0], found[2]


def test_help_comes_without_the_wait_for_torch(helped):
    assert not re.search(r"\| +(torch|flwr|ray)$", helped[1].stderr, re.MULTILINE)


def test_help_fits_a_terminal(helped):
    assert max(map(len, helped[1].stdout.splitlines())) <= 80


def test_helps_examples_are_valid_and_its_defaults_those_of_the_configuration(helped):
    name, done = helped
    listed = dict(options(done.stdout))
    assert len(listed) > 10
    assert load_config(name, list(listed))
    known = flatten(load_config(name, []))
    known |= {"model": "resnet18", "partition": "iid", "strategy": "fedavg", "dataset": "digits"}
    told = {example.partition("=")[0]: shown for example, shown in listed.items()}
    assert told.pop("quiet") is None
    for key, shown in told.items():
        if known[key] is not None:  # where it is null, words say what that means
            assert shown == str(known[key]), key


def test_help_lists_what_people_need(helped):
    listed = {example.partition("=")[0] for example, _ in options(helped[1].stdout)}
    if helped[0] == "test":
        seldom = {"feature_batch_size", "supervised.batch_size", "supervised.learning_rate"}
        seldom |= {"supervised.weight_decay"}
        assert listed == flatten(load_config("test", [])).keys() - seldom
    else:
        assert listed >= NEEDED


def test_help_lists_every_option_of_every_group():
    text = ask("main.py", "-h").stdout.replace("\n    ", " ")
    for folder in CONF.iterdir():
        if folder.is_dir() and folder.name != "hydra":
            assert (
                f"{folder.name}: {', '.join(sorted(f.stem for f in folder.glob('*.yaml')))}" in text
            )


def test_help_shows_the_defaults_under_other_options():
    text = ask("main.py", "dataset=cifar10", "--help").stdout
    assert "[cifar10]" in text
    assert "images per step [128]" in text


@pytest.mark.parametrize("question", ["--help", "--cfg=job"])
def test_a_wrong_option_beside_a_question_gets_one_line(question):
    done = ask("main.py", "strategy=fedvag", question)
    assert done.returncode == 2
    errors = [line for line in done.stderr.splitlines() if not line.startswith("import time")]
    assert len(errors) == 1
    assert "did you mean fedavg?" in errors[0]


SHELL = """
eval "$(python main.py -sc install=bash)"
while read -r line; do
    words=($line)
    COMP_LINE=$line COMP_POINT=${#line} COMP_CWORD=$((${#words[@]} - 1))
    COMPREPLY=()
    hydra_bash_completion
    echo "${COMPREPLY[*]}"
done
"""
COMPLETIONS = {
    "python main.py num_c": "num_clients= num_cpus=",
    "python main.py --num_c": "--num_clients= --num_cpus=",
    "python main.py --quiet --num_rounds 3 --multirun model=r": "model=resnet18 model=resnet50",
    "python main.py --dataset ci": "cifar10 cifar100",
    "python main.py partition=dirichlet partition.al": "partition.alpha=",
    "python main.py --multi": "--multirun",
    "python main.py zzz": "",
    "python test.py --label": "--label_fraction=",
}


def test_bash_completes_keys_flags_and_options():
    path = f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", SHELL],
        input="".join(f"{line}\n" for line in COMPLETIONS),
        capture_output=True,
        text=True,
        timeout=120,
        cwd=ROOT,
        env=os.environ | {"PATH": path},
    )
    assert done.stderr == ""
    assert dict(zip(COMPLETIONS, done.stdout.splitlines(), strict=True)) == COMPLETIONS
