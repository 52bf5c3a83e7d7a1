import pytest

from jaxgen import data


@pytest.fixture(scope="session")
def digits_dir(tmp_path_factory):
    """A data directory in which the digits are prepared; tests only read it."""
    directory = tmp_path_factory.mktemp("tfds")
    data.load("digits", split="test", data_dir=directory)
    return directory
