"""Digests of bundles: the same for the same files only."""

import zipfile
from io import BytesIO

import pytest
from conftest import ROOT
from flwr.cli.build import build_fab_from_disk

from fedssl.deployment.bundle import LIST, BadBundle, digest_of, names_of, own_digest
from fedssl.errors import UserError


@pytest.fixture(scope="module")
def fab():
    return build_fab_from_disk(ROOT)


def files_of(fab):
    with zipfile.ZipFile(BytesIO(fab)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def pack(files, compression=zipfile.ZIP_DEFLATED):
    """Write a zip archive of pairs of names and contents."""
    out = BytesIO()
    with zipfile.ZipFile(out, "w", compression) as archive:
        for name, content in files:
            archive.writestr(name, content)
    return out.getvalue()


def test_a_checkout_and_its_bundle_have_one_digest(fab):
    assert own_digest(ROOT) == digest_of(fab)


def test_how_a_bundle_is_packed_does_not_count(fab):
    again = pack(reversed(files_of(fab).items()), zipfile.ZIP_STORED)
    assert again != fab
    assert digest_of(again) == digest_of(fab)
    assert digest_of(pack({**files_of(fab), LIST: b"another list"}.items())) == digest_of(fab)


@pytest.mark.parametrize(
    "change",
    [
        lambda files: files | {"client.py": files["client.py"] + b"\n"},
        lambda files: files | {"sitecustomize.py": b""},
        lambda files: files | {".info/more.py": b""},
        lambda files: {name: data for name, data in files.items() if name != "model.py"},
        lambda files: {name.replace("model.py", "Model.py"): files[name] for name in files},
        lambda files: files | {"app.py": files["client.py"], "client.py": files["app.py"]},
    ],
)
def test_every_change_of_a_file_counts(fab, change):
    assert digest_of(pack(change(files_of(fab)).items())) != digest_of(fab)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_what_could_be_unpacked_in_two_ways_is_no_bundle(fab):
    with pytest.raises(BadBundle, match="one name"):
        digest_of(pack([*files_of(fab).items(), ("client.py", b"import os")]))


def test_what_is_no_bundle_is_said_so(monkeypatch, fab):
    for data in (b"", b"PK", fab[: len(fab) // 2]):
        with pytest.raises(BadBundle, match="no zip archive"):
            digest_of(data)
    monkeypatch.setattr("fedssl.deployment.bundle.MAX_BYTES", 1000)
    with pytest.raises(BadBundle, match="larger than 1000 bytes"):
        digest_of(fab)


def test_a_bundle_says_its_name(fab):
    assert names_of(fab) == ("federated-simclr/federated-simclr", "1.1.0")
    with pytest.raises(BadBundle, match="names no app"):
        names_of(pack([("pyproject.toml", b"[project]")]))


def test_a_folder_without_an_app_gets_one_line(tmp_path):
    with pytest.raises(UserError, match="no Flower app"):
        own_digest(tmp_path)
