"""The address of the store: which setting holds, what is masked, and odd paths."""

from __future__ import annotations

from pathlib import Path

import pytest

from finetune.config.schema import TrackingConfig
from finetune.config.store_address import (
    absolute_uri,
    find_address,
    has_secret,
    masked,
    reveal,
    sqlite_file,
    sqlite_uri,
    ui_command,
    without_secrets,
)

HERE = f"sqlite:///{Path.cwd()}/mlflow.db"
TEAM = {"MLFLOW_TRACKING_URI": "sqlite:////team/x.db", "MLFLOW_EXPERIMENT_NAME": "mine"}
SECRETS = [
    "https://me:s3cr3t@host/",
    "https://s3cr3t@host/path",
    "http://host:5000/?access_token=s3cr3t",
    "http://host:5000/#token=s3cr3t",
    "postgresql://me:s3cr3t@host/db",
    "postgresql://me:a/b?s3cr3t@host/db?sslmode=require",
    "postgresql://me:a@s3cr3t@host/db",
    "postgresql://me%3As3cr3t@host/db",
    "postgresql://host/db?user=me&password=s3cr3t",
    "postgresql://host/db?user=me&p%61ssword=s3cr3t&sslmode=require",
    "postgresql://host/db?sslpassword=s3cr3t",
    "postgresql://host/db?options=-c%20password%3Ds3cr3t",
    "mysql+pymysql://host/db?passwd=s3cr3t",
    "mssql+pyodbc:///?odbc_connect=DRIVER%3D%7BX%7D%3BUID%3Dme%3BPWD%3Ds3cr3t",
]
OPEN = [
    "sqlite:///mlflow.db",
    "sqlite:////a/50%25 of what/b@c.db?timeout=3",
    "http://host:5000/path?x=a@b",
    "postgresql://me@host/db?sslmode=require",
    "mysql+pymysql://host/db?ssl_key=/etc/key.pem",
    "databricks://profile",
]
PLACES = ["50%25 of what?", "a#b", "100%", "ü ñ 東京", "a&b=c;d", "what?mode=ro", "%2e%2e", "x:y@z"]


@pytest.mark.parametrize(
    ("tracking", "environment", "uri", "experiment"),
    [
        (TrackingConfig(), {}, HERE, "finetune"),
        (TrackingConfig(), TEAM, "sqlite:////team/x.db", "mine"),
        (TrackingConfig(uri="http://h:1"), TEAM, "http://h:1", "mine"),
        (TrackingConfig(experiment="e"), TEAM, "sqlite:////team/x.db", "e"),
        (TrackingConfig(uri="http://h:1", experiment="e"), TEAM, "http://h:1", "e"),
        (TrackingConfig(experiment="e"), {"MLFLOW_TRACKING_URI": ""}, HERE, "e"),
    ],
)  # fmt: skip
def test_a_setting_holds_over_the_environment_and_that_over_the_default(
    tracking: TrackingConfig, environment: dict[str, str], uri: str, experiment: str
) -> None:
    """MLflow's own variables are honoured where nothing is set."""
    address = find_address(tracking, environment)
    assert (address.uri, address.experiment) == (uri, experiment)


@pytest.mark.parametrize(
    ("tracking", "environment", "said"),
    [
        (TrackingConfig(), TEAM, "from MLFLOW_TRACKING_URI and MLFLOW_EXPERIMENT_NAME"),
        (TrackingConfig(uri="http://h"), TEAM, "MLFLOW_TRACKING_URI is set too, and not used"),
        (TrackingConfig(), {"MLFLOW_EXPERIMENT_ID": "3"}, "MLFLOW_EXPERIMENT_ID is set too"),
    ],
)
def test_a_part_of_the_environment_is_said(
    tracking: TrackingConfig, environment: dict[str, str], said: str
) -> None:
    """One line tells which of the two holds."""
    assert said in str(find_address(tracking, environment).describe())


def test_nothing_is_said_without_a_part_of_the_environment() -> None:
    """Silent when all is well."""
    assert find_address(TrackingConfig(uri="http://h"), {}).describe() is None


@pytest.mark.parametrize("uri", SECRETS)
def test_a_secret_is_masked_and_taken_from_the_environment_again(uri: str) -> None:
    """Neither the kept address nor a library's message shows it."""
    environment = {"MLFLOW_TRACKING_URI": uri}
    address = find_address(TrackingConfig(), environment)
    assert has_secret(uri)
    assert "s3cr3t" not in address.uri
    assert masked(address.uri) == address.uri
    assert reveal(address.uri, environment) == uri
    assert "s3cr3t" not in without_secrets(f"no answer of {uri}: refused", environment)
    with pytest.raises(ValueError, match="which is not set"):
        reveal(address.uri, {})
    with pytest.raises(ValueError, match="names another store"):
        reveal(address.uri, {"MLFLOW_TRACKING_URI": "http://other"})


@pytest.mark.parametrize("uri", OPEN)
def test_an_address_without_a_secret_stays_as_it_is(uri: str) -> None:
    """Names of files, modes and users are no secrets."""
    assert masked(uri) == uri
    assert reveal(uri, {}) == uri


def test_tokens_of_the_environment_are_never_shown() -> None:
    """A server may repeat what it was sent."""
    environment = {"MLFLOW_TRACKING_TOKEN": "t0k3n", "MLFLOW_TRACKING_PASSWORD": "s3cr3t"}
    assert without_secrets("Bearer t0k3n, s3cr3t", environment) == "Bearer ***, ***"


@pytest.mark.parametrize("name", PLACES)
def test_a_path_with_marks_comes_back(name: str) -> None:
    """What SQLAlchemy decodes and cuts off is encoded first."""
    file = Path("/somewhere") / name / "mlflow.db"
    assert sqlite_file(sqlite_uri(file)) == file
    assert absolute_uri(sqlite_uri(file)) == sqlite_uri(file)


def test_a_file_address_keeps_its_query() -> None:
    """It is the driver's."""
    uri = absolute_uri("sqlite:///mlflow.db?timeout=3")
    assert uri.endswith("/mlflow.db?timeout=3")
    assert sqlite_file(uri) == Path.cwd() / "mlflow.db"


def test_the_command_that_is_printed_is_quoted() -> None:
    """It is there to be pasted."""
    assert ui_command(Path("a b")) == "python -m finetune.ui 'a b'"
