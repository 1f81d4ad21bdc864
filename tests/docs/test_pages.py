"""README and docs/: commands that can be typed, files and links that are there."""

import re

import pytest
import yaml
from conftest import ROOT
from docs.pages import FENCE, NAMES, PAGES, README, anchors, blocks, commands

from fedssl.config.command_line import flags_to_overrides, jobs_of
from fedssl.config.compose import load_config
from fedssl.config.fields import layout_of
from fedssl.config.moved import RENAMED
from fedssl.config.schema import GROUPS, PROGRAMS
from fedssl.deployment.checks import check_node_config, check_run_config
from scripts.embed import name_folder

CONFIGURED = {  # programs that read conf/, and the name of their configuration
    "main.py": "config",
    "test.py": "test",
    "scripts.embed": "embed",
    "scripts.export": "export",
    "scripts.predict": "predict",
    "scripts.report": "report",
}
LISTED = {name: commands(name) for name in NAMES}
ELSEWHERE = (
    "CHANGELOG.md",
    "docs/extending.md",
)  # commands of the past, and of what is to be written
CURRENT = [(name, words) for name in NAMES if name not in ELSEWHERE for words in LISTED[name]]
OLD = ("benchmarks/poison.py", "pytest", "venv")  # the first is named as of its time
PYTHON = [case for case in CURRENT if case[1][0] == "python" and not {*case[1]} & {*OLD}]
DEPLOYED = [case for case in CURRENT if case[1][0].startswith(("flower-", "flwr"))]
TO_BE_WRITTEN = re.compile(r"/(test_)?(x|ressl|npz|ema|mlp)\.|/strategies/$")  # by who extends it


def readable(case):
    return f"{case[0]}: {' '.join(case[1])}"


@pytest.mark.parametrize("words", [w for _, w in PYTHON], ids=map(readable, PYTHON))
def test_a_command_of_python_is_valid(words):
    program, *arguments = words[2:] if words[1] == "-m" else words[1:]
    if words[1] == "-m":
        file = ROOT / f"{program.replace('.', '/')}.py"
        assert file.is_relative_to(ROOT / "scripts") or file.is_relative_to(ROOT / "benchmarks")
    else:
        file = ROOT / program
    source = file.read_text()
    if program in CONFIGURED:
        check_settings(program, arguments)
        return
    flags = [argument.partition("=")[0] for argument in arguments if argument.startswith("--")]
    assert [flag for flag in flags if f'"{flag}"' not in source] == []
    load_config("config", [a for a in arguments if re.match(r"[\w.]+=", a)])


def check_settings(program, arguments):
    given = flags_to_overrides([a for a in arguments if not a.startswith("install=")])
    if program in ("scripts.embed", "scripts.predict"):
        given = name_folder(given)
    for job in jobs_of(given):
        load_config(CONFIGURED[program], job)


@pytest.mark.parametrize("words", [w for _, w in DEPLOYED], ids=map(readable, DEPLOYED))
def test_a_command_of_a_federation_is_valid(words):
    program, *arguments = words
    for flag, check in (
        ("--node-config", check_node_config),
        ("--run-config", lambda text: check_run_config(text, [])),
    ):
        if flag in arguments:
            value = arguments[arguments.index(flag) + 1]
            check(value.replace(' data-path="/data/images"', ""))
    if program == "flower-server-app" and len(arguments) > 1:
        assert arguments[0] == "app:server"
        overrides = [a for a in arguments[1:] if re.match(r"[\w.]+=", a)]
        load_config("config", overrides, federated=True)
    if program == "flower-client-app" and arguments:
        assert arguments[0] in ("app:client", "app:client1", "app:client2")


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links_and_pictures_are_there(page):
    for target in re.findall(r"\]\(([^)\s]+)\)|src=\"([^\"]+)\"", page.read_text()):
        address = next(filter(None, target))
        if address.startswith("http"):
            continue
        path, _, anchor = address.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), address
        if anchor:
            assert anchor in anchors(file), address


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_the_files_that_a_page_names_are_there(page):
    named = re.findall(
        r"`((?:fedssl|conf|tests|scripts|benchmarks|docs)/[\w/.]*)`", page.read_text()
    )
    missing = {name for name in named if not (ROOT / name).exists()}
    if page.name in ("extending.md", "CONTRIBUTING.md"):
        missing = {name for name in missing if not TO_BE_WRITTEN.search(name)}
    assert missing == set()


@pytest.mark.parametrize(
    "page", [p for p in PAGES if p.name != "CHANGELOG.md"], ids=lambda p: p.stem
)
def test_the_settings_that_a_page_names_are_known(page):
    named = re.findall(r"(?<=[` ])([a-z_]+(?:\.[a-z_]+)?)=[^` ]", inline(page.read_text()))
    assert set(named) <= {*settings(), *RENAMED, "key"}, page


def inline(text):
    """Give what stands in backquotes within sentences, apart from signatures and commands."""
    quoted = re.findall(r"`([^`]+)`", re.sub(r"^```.*?^```", "", text, flags=FENCE))
    return " ".join(f"`{words}`" for words in quoted if "(" not in words and "--" not in words)


def settings():
    """Name all settings of all programs and groups, and the groups."""
    yield from GROUPS
    yield "experiment"
    for program in PROGRAMS.values():
        yield from layout_of(program.settings)
    for group, plan in GROUPS.items():
        for model in plan.models.values():
            yield from (f"{group}.{key}" for key in layout_of(model))
            if group == "eval":  # at the top of test.py's
                yield from layout_of(model)


def test_every_page_can_be_reached_from_the_readme():
    linked = set(re.findall(r"\]\((docs/[\w-]+\.md)", README))
    assert linked == {name for name in NAMES if name.startswith("docs/")}


def test_the_options_of_every_group_are_those_of_conf():
    usage = (ROOT / "docs" / "usage.md").read_text()
    table = usage.partition("| group | options |\n")[2].partition("\n\n")[0]
    rows = [re.findall(r"`([^`]+)`", row) for row in table.splitlines()[1:]]
    assert {group for group, *_ in rows} == {*GROUPS, "experiment"}
    for group, *options in rows:
        files = {file.stem for file in (ROOT / "conf" / group).glob("*.yaml")}
        assert files <= set(options), group


def test_the_blocks_of_yaml_are_yaml():
    for page in PAGES:
        for block in blocks(page.read_text(), "yaml"):
            assert isinstance(yaml.safe_load(block), dict), page


def test_the_readme_is_short():
    assert len(README.encode()) < 12_000


def test_the_readme_has_one_line_for_each_set_up():
    lines = [line for line in README.splitlines() if line.startswith("python3 -m venv")]
    assert len(lines) == 2
    assert lines[0].endswith("pip install -r requirements.txt && python main.py")
    assert lines[1].endswith("pip install -r requirements-dev.txt && python -m pytest")


def test_the_readme_documents_the_four_commands_of_a_federation():
    four = [
        ["flower-superlink", "--insecure"],
        ["flower-client-app", "app:client1", "--insecure"],
        ["flower-client-app", "app:client2", "--insecure"],
        ["flower-server-app", "app:server", "--insecure"],
    ]
    listed = LISTED["README.md"]
    place = listed.index(four[0])
    assert listed[place : place + 4] == four
