"""What all sources have in common, and the sources that conf/ names."""

import numpy as np
import pytest

from fedssl.config.compose import load_config
from fedssl.data.sources.base import list_file_states, split_rows
from fedssl.data.sources.digits import DigitsSource
from fedssl.data.sources.folder import FolderSource
from fedssl.data.sources.hub import HubSource
from fedssl.env import ROOT
from fedssl.errors import UserError
from utils import open_source

KINDS = {
    "digits": DigitsSource,
    "cifar10": HubSource,
    "cifar100": HubSource,
    "hub": HubSource,
    "imagefolder": FolderSource,
}


def test_every_data_set_of_conf_makes_its_source():
    names = [file.stem for file in (ROOT / "conf" / "dataset").glob("*.yaml")]
    sources = {n: open_source(load_config("config", [f"dataset={n}"]).dataset) for n in names}
    assert {name: type(source) for name, source in sources.items()} == KINDS
    assert [name for name in names if not sources[name].is_here] == ["imagefolder"]
    assert sources["cifar100"].place == "dataset.name=uoft-cs/cifar100"


@pytest.mark.parametrize(
    "section",
    [
        {"_target_": "fedssl.data.sources.digits.DigitsSource", "name": "digits"},
        {"_target_": "fedssl.data.sources.nowhere.Source", "name": "digits"},
        {"_target_": "builtins.dict", "name": "digits"},
        {"name": "digits"},
    ],
)
def test_a_section_without_a_source_gets_one_line(section):
    with pytest.raises(UserError, match="dataset") as error:
        open_source(section)
    assert "\n" not in str(error.value)


def test_a_split_keeps_the_class_shares():
    labels = np.repeat([0, 1, 2], 10)
    parts = split_rows(30, labels, 0.2, seed=0)
    assert np.bincount(labels[parts["test"]]).tolist() == [2, 2, 2]
    assert sorted([*parts["train"], *parts["test"]]) == list(range(30))
    assert list(split_rows(30, None, 0.2, seed=0)) == ["train"]
    with pytest.raises(UserError, match=r"dataset\.test_fraction=0\.2.*add images"):
        split_rows(3, np.arange(3), 0.2, seed=0)


def test_files_are_listed_with_size_and_age(tmp_path):
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "b").write_text("bb")
    (tmp_path / "link").symlink_to("nothing")
    link, below = list_file_states(tmp_path)
    assert link == f"{tmp_path}/link missing"
    assert below.startswith(f"{tmp_path}/below/b 2 ")
