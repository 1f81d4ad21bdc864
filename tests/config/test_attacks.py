"""Overrides that try to do more than choose a file and set a key: refused, and nothing runs."""

import re
import shutil
import sys

import pytest
from conftest import ROOT
from flwr.app import Context, RecordDict

import app
from fedssl.config.command_line import run_entry
from fedssl.config.compose import load_config
from fedssl.config.options import model_of_option
from fedssl.errors import UserError

TARGET = "comes from a file below conf/"
FILE = "must be the name of a file below conf/"
LOOKED_UP = "may name a setting, nothing else"
HYDRA = "is Hydra's own"
RUN = "_target_: subprocess.call, args: [touch, TRACE]"
INSTANCES = [  # refused everywhere
    f"+partition.x={{{RUN}}}",
    f"partition={{{RUN}}}",
    f"+x={{a: [{{{RUN}}}]}}",
    "method._target_=os.system",
    "++method._target_=os.system",
    "+augment._target_=os.system",
    "dataset._target_=os.system",
    "dataset._target_=fedssl.data.sources.hub.HubSource",
    "strategy._target_=subprocess.Popen",
    "~method._target_",
    "_target_=os.system",
    "+method._partial_=true",
    "+method._args_=[1]",
    "+method._recursive_=false",
    "+method._convert_=all",
    f"participants=[{{{RUN}}}]",
    f"augment.crop_scale=[{{{RUN}}}, 1]",
    f"monitor={{{RUN}}}",
    f"method.temperature={{{RUN}}},1",
    f"num_clients=choice(1, {{{RUN}}})",
    "train.optimizer._target_=os.system",
    "+strategy.x=${oc.decode:'{_target_: os.system}'}",
]
FILES = [  # likewise
    "experiment=/tmp/evil",
    "experiment=../../tmp/evil",
    "+experiment=[cifar10_cpu,/tmp/evil]",
    "method=/tmp/x",
    "method='../../../tmp/x'",
    "method=.hidden",
    "dataset.source=/tmp/x",
    "train.optimizer=/tmp/x",
    "augment=imagefolder/../../x",
    "hydra/launcher=/tmp/x",
    "method=${oc.env:USER}",
]
PLACES = ["augment@_global_=cifar", "+optimizer@method=muon", "optimizer@method=sgd"]
UNKNOWN = ["+group=../../x", "+schema=Head", "+evil=1", "~num_rounds", "~method"]
RESOLVERS = [  # refused in a federation
    "dataset.name=${oc.env:HOME}",
    "dataset.name='${oc.env:HOME}'",
    "run_dir=${hydra:runtime.cwd}",
    "run_dir=x${now:%H}",
    "dataset.name=\\${oc.env:HOME}",
    "participants=[${oc.decode:0}]",
]
HYDRAS = [
    "hydra.searchpath=[/tmp]",
    "hydra.run.dir=/tmp/x",
    "hydra.job.chdir=true",
    "+hydra.job_logging.x=1",
    "~hydra.run",
    "hydra/job_logging=default",
    "--config-dir=/tmp",
    "-cd=/tmp",
]
EVERYWHERE = [
    *((attack, TARGET) for attack in INSTANCES),
    *((attack, FILE) for attack in FILES),
    *((attack, "place is in conf/") for attack in PLACES),
    *((attack, "unknown key" if "+" in attack else "missing") for attack in UNKNOWN),
]
AT_NODES = [*((a, LOOKED_UP) for a in RESOLVERS), *((a, HYDRA) for a in HYDRAS)]


def refuse(attack, message, trace, **options):
    override = attack.replace("TRACE", str(trace))
    with pytest.raises(UserError) as error:
        load_config("config", [override], **options)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert not trace.exists()


@pytest.mark.parametrize(("attack", "message"), EVERYWHERE)
def test_the_command_line_refuses_it(tmp_path, attack, message):
    refuse(attack, message, tmp_path / "trace")


@pytest.mark.parametrize(("attack", "message"), [*EVERYWHERE, *AT_NODES])
def test_a_federation_refuses_it(tmp_path, attack, message):
    refuse(attack, message, tmp_path / "trace", federated=True)


@pytest.mark.parametrize("attack", [f'"+partition.x={{{RUN}}}"', "hydra.searchpath=[/tmp]", "'a=1"])
def test_a_node_refuses_the_runs_configuration(tmp_path, attack):
    trace = tmp_path / "trace"
    given = {"hydra-overrides": attack.replace("TRACE", str(trace))}
    node = {"partition-id": 0, "num-partitions": 2}
    context = Context(1, 1, node, RecordDict(), given)
    for read in (app.config_text, app.identify):
        with pytest.raises(UserError) as error:
            read(context)
        assert error.value.public == str(error.value)
    assert not trace.exists()


@pytest.mark.parametrize("program", ["config", "test", "embed", "export", "predict", "report"])
@pytest.mark.parametrize("attack", [f"+x={{{RUN}}}", f"+dataset={{{RUN}}}"])
def test_every_program_refuses_it_with_status_2(monkeypatch, capsys, tmp_path, program, attack):
    def job(config):
        raise AssertionError("work started")

    trace = tmp_path / "trace"
    attack = attack.replace("TRACE", str(trace))
    monkeypatch.setattr(sys, "argv", ["program.py", attack])
    with pytest.raises(SystemExit) as ended:
        run_entry(program, job, job)
    said = capsys.readouterr().err
    assert (ended.value.code, said.count("\n")) == (2, 1)
    assert TARGET in said
    assert not trace.exists()


def test_what_the_resolvers_give_stays_on_the_users_machine(monkeypatch):
    monkeypatch.setenv("PLACE", "here")
    given = ["dataset.name=${oc.env:PLACE}", "run_dir=out/${now:%Y}"]
    assert load_config("config", given).dataset.name == "here"
    assert (
        load_config("config", ["dataset.name=${precision}"], federated=True).dataset.name == "auto"
    )


@pytest.mark.parametrize("federated", [False, True])
def test_a_file_of_ones_own_may_name_its_class(tmp_path, monkeypatch, federated):
    conf = tmp_path / "conf"
    shutil.copytree(ROOT / "conf", conf)
    for module in ("compose", "options"):
        monkeypatch.setattr(f"fedssl.config.{module}.CONF", conf)
    (conf / "method" / "mine.yaml").write_text("_target_: my.Method\nx: null\n")
    model_of_option.cache_clear()
    config = load_config("config", ["method=mine", "method.x=3"], federated)
    assert (config.method._target_, config.method.x) == ("my.Method", 3)
    for value in ("{_target_: os.system}", "[{_target_: os.system}]"):
        with pytest.raises(UserError, match=re.escape(TARGET)):
            load_config("config", ["method=mine", f"method.x={value}"], federated)
    model_of_option.cache_clear()
