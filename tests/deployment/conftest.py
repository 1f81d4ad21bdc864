"""A federation of processes, which all end with their test."""

import pytest
from deployment.place import Place


@pytest.fixture
def place(tmp_path):
    made = Place(tmp_path)
    yield made
    made.stop_all()
