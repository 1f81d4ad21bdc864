"""What a user gets who only asks: help, the configuration, completion."""

import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT

from fedssl.config.command_line import flags_to_overrides
from fedssl.config.compose import CONF, flatten, load_config
from fedssl.config.help import help_text, show

PROGRAMS = {"config": "main.py", "test": "test.py"}


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
    """List the keys of a help text, each as an override with the value that it shows."""
    for line in text.splitlines():
        found = re.match(r"  ([a-z_.]+)=(\S+)( |$)", line)
        if found:
            yield found[1], found[2]


def test_help_comes_without_the_wait_for_torch(helped):
    assert not re.search(r"\| +(torch|flwr|ray)$", helped[1].stderr, re.MULTILINE)


def test_help_fits_a_terminal(helped):
    assert max(map(len, helped[1].stdout.splitlines())) <= 80


def test_help_lists_every_key_with_a_value_that_can_be_given(helped):
    name, done = helped
    listed = dict(options(done.stdout))
    known = flatten(load_config(name, []))
    hidden = {key for key in known if key.endswith(("_target_", "acts_on"))}
    assert listed.keys() == known.keys() - hidden
    for key in listed.keys() - {"run_dir"}:
        assert listed[key] == show(known[key]), key
    again = flatten(load_config(name, [f"{k}={v}" for k, v in listed.items() if "~" not in v]))
    assert again | {"run_dir": ""} == known | {"run_dir": ""}


def test_helps_examples_are_valid(helped):
    name, done = helped
    script = PROGRAMS[name]
    examples = [line.split()[2:] for line in done.stdout.splitlines() if f"python {script}" in line]
    assert len(examples) > 2
    for example in examples:
        load_config(name, flags_to_overrides(example))


def test_help_lists_every_option_of_every_group():
    text = " ".join(ask("main.py", "-h").stdout.split())
    for folder in CONF.iterdir():
        if folder.is_dir():
            known = ", ".join(sorted(file.stem for file in folder.glob("*.yaml")))
            assert f"{folder.name} {known}" in text


def test_help_shows_the_values_under_other_options():
    text = ask("main.py", "dataset=cifar10", "--help").stdout
    assert "[cifar10]" in text
    assert "train.batch_size=128 " in text


@pytest.mark.parametrize("name", ["embed", "export", "predict", "report"])
def test_the_scripts_help_comes_from_the_schema_too(name):
    text = help_text(name, [])
    assert dict(options(text)).keys() == flatten(load_config(name, [])).keys()
    assert max(map(len, text.splitlines())) <= 80


@pytest.mark.parametrize("protocol", sorted(file.stem for file in (CONF / "eval").glob("*.yaml")))
def test_the_help_of_an_evaluation_shows_the_values_of_its_protocol(protocol):
    text = help_text("test", [f"eval={protocol}", "dataset=imagefolder", "dataset.path=here"])
    assert f"[{protocol}]" in text
    epochs = load_config("test", [f"eval={protocol}"]).epochs
    assert f"epochs={epochs} " in text


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
    "python main.py sch": "",
    "python main.py optim": "optimizer. optimizer=",
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


@pytest.mark.parametrize(
    ("command", "line"),
    [
        (["main.py", "num_round=3"], "error: num_round: unknown key; did you mean num_rounds?"),
        (["main.py", "strategy=fedadam", "strategy.eta=-1"], "error: strategy.eta=-1: must be"),
        (["main.py", "-m", "seed=1,2", "num_clients=0"], "error: num_clients=0: must be at least"),
        (["test.py", "seeds=x"], "error: seeds=x: must be a whole number"),
        (["test.py", "dataset.image_size=9"], "error: dataset.image_size=9: is that of the run"),
    ],
)
def test_a_wrong_value_gets_its_line_before_torch_is_imported(command, line):
    python = [sys.executable, "-X", "importtime", *command]
    done = subprocess.run(python, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    imported = [text.rpartition("|")[2].strip() for text in done.stderr.splitlines()]
    assert "pydantic" in imported  # so that the list is one
    assert not {"torch", "flwr", "ray", "sklearn"} & set(imported)
    (told,) = [text for text in done.stderr.splitlines() if not text.startswith("import time:")]
    assert told.startswith(line)
