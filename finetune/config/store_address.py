"""The MLflow tracking URI: the setting or variable it comes from, and masking of its secrets.

A password or token in an address is never written or printed: files have the masked address, and
`reveal` takes the secret from MLFLOW_TRACKING_URI again.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from finetune.config.schema import TrackingConfig

DEFAULT_URI = "sqlite:///mlflow.db"
DEFAULT_EXPERIMENT = "finetune"
URI_VARIABLE, EXPERIMENT_VARIABLE = "MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"
SECRET_VARIABLES = ("MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN")
LOOPBACK = ("localhost", "127.0.0.1", "::1")
MASK = "***"
SQLITE = re.compile(r"sqlite(\+pysqlite)?:///")
# Names of parameters whose values are secret; ssl_key, passfile and the like name files.
HIDDEN = (
    r"\w*(?:password|passwd|pwd|passphrase|token|secret|api[_-]?key|access[_-]?key|secret[_-]?key"
    r"|private[_-]?key|credentials?|signature)|pass|auth|sig"
)
SECRET_VALUE = re.compile(rf"(?i)(?<![\w-])((?:{HIDDEN})\s*=\s*)([^\s&;,'\"()\[\]{{}}<>]+)")
USER_INFO = re.compile(r"([A-Za-z][\w+.-]*://)([^\s/@:'\"]*):([^\s@/'\"]+)@")


@dataclass(frozen=True)
class Address:
    """Store and experiment of a sweep; `uri` is absolute, its secrets are masked."""

    uri: str
    experiment: str
    uri_key: str = "tracking.uri"  # the setting or variable that it comes from
    experiment_key: str = "tracking.experiment"
    unused: tuple[str, ...] = ()  # variables that are set, but overridden

    def describe(self) -> str | None:
        """Return a line on store and experiment if environment variables set or contradict them."""
        keys = [k for k in (self.uri_key, self.experiment_key) if not k.startswith("tracking.")]
        if not keys and not self.unused:
            return None
        line = f"tracking: {self.uri}, experiment {self.experiment}"
        if keys:
            line += f" (from {' and '.join(keys)})"
        return line + "".join(
            f"; {key} is set too, and not used, since {over} is set" for key, over in _over(self)
        )


def _over(address: Address) -> Iterator[tuple[str, str]]:
    for key in address.unused:
        yield key, address.uri_key if key == URI_VARIABLE else address.experiment_key


def find_address(tracking: TrackingConfig, environment: Mapping[str, str] = os.environ) -> Address:
    """Resolve store and experiment: the setting, else MLflow's variable, else the default."""
    uri, uri_key, uri_unused = _resolve(
        ("tracking.uri", tracking.uri), URI_VARIABLE, environment, DEFAULT_URI
    )
    experiment, experiment_key, unused = _resolve(
        ("tracking.experiment", tracking.experiment),
        EXPERIMENT_VARIABLE, environment, DEFAULT_EXPERIMENT,
    )  # fmt: skip
    if not environment.get(EXPERIMENT_VARIABLE) and environment.get("MLFLOW_EXPERIMENT_ID"):
        unused = ("MLFLOW_EXPERIMENT_ID",)
    return Address(
        masked(absolute_uri(uri)), experiment, uri_key, experiment_key, (*uri_unused, *unused)
    )


def _resolve(
    setting: tuple[str, str | None], variable: str, environment: Mapping[str, str], default: str
) -> tuple[str, str, tuple[str, ...]]:
    """Return the value, the key that it is from, and the variable where it is overridden."""
    key, value = setting
    other = environment.get(variable)
    if value is not None:
        return value, key, (variable,) if other and other != value else ()
    return (other, variable, ()) if other else (default, key, ())


def reveal(uri: str, environment: Mapping[str, str] = os.environ) -> str:
    """Return a masked address with its secret, which only the environment has.

    Raises:
        ValueError: MLFLOW_TRACKING_URI does not hold this address.
    """
    if masked(uri) != uri or MASK not in uri:
        return uri
    typed = environment.get(URI_VARIABLE)
    if typed and masked(absolute_uri(typed)) == uri:
        return typed
    state = "names another store" if typed else "is not set"
    raise ValueError(
        f"the secret of {uri} is taken from {URI_VARIABLE}, which {state}; set it to that address"
    )


def needs_typing(uri: str, environment: Mapping[str, str] = os.environ) -> bool:
    """Return whether a recorded address is a server that neither this machine nor its user names.

    The folder of a sweep may come from somebody else; runs and credentials go to the address.
    """
    named = environment.get(URI_VARIABLE)
    if sqlite_file(uri) is not None or (named and masked(absolute_uri(named)) == masked(uri)):
        return False
    try:
        host = urlsplit(uri).hostname if is_server(uri) else None
    except ValueError:
        return True
    return host not in LOOPBACK


def masked(uri: str) -> str:
    """Return an address with passwords and tokens replaced, in user part, query and fragment."""
    scheme, mark, rest = uri.partition("://")
    if not mark:
        return uri
    end = re.search(r"[?#]", rest)
    if not _is_http(scheme) and "@" in rest and (end is None or "@" not in rest[: end.start()]):
        end = re.search(r"[?#]", rest[rest.index("@") :])  # a password may hold a bare ? or #
        cut = len(rest) if end is None else end.start() + rest.index("@")
    else:
        cut = len(rest) if end is None else end.start()
    head, query = rest[:cut], rest[cut:]
    return f"{scheme}://{_masked_user(scheme, head)}{_masked_query(query)}"


def _masked_user(scheme: str, head: str) -> str:
    """Mask a password before the host, which may hold unquoted characters in a database's."""
    if _is_http(scheme):
        host, slash, path = head.partition("/")
        before, at, name = host.rpartition("@")
        return f"{MASK}@{name}{slash}{path}" if at else head
    before, at, rest = head.rpartition("@")
    user = re.match(r"([^:/@%]*(?:%(?!3[aA])[^:/@%]*)*)(?::|%3[aA])", before)
    return f"{user[1]}:{MASK}@{rest}" if at and user else head


def _masked_query(query: str) -> str:
    """Mask the values of secret parameters, also inside a value that is a connection string."""
    parts = re.split(r"([?#&;])", query)
    for number, part in enumerate(parts):
        name, equals, value = part.partition("=")
        if value and SECRET_VALUE.search(f"{_decoded(name)}={_decoded(value)}"):
            parts[number] = f"{name}{equals}{MASK}"
    return "".join(parts)


def _decoded(text: str) -> str:
    return unquote(unquote(text)).replace("+", " ")


def has_secret(uri: str) -> bool:
    """Return whether an address holds a password or a token."""
    return masked(uri) != uri


def without_secrets(text: str, environment: Mapping[str, str] = os.environ) -> str:
    """Return a message of any library without passwords and tokens."""
    for secret in _secrets(environment):
        text = text.replace(secret, MASK)
    text = USER_INFO.sub(rf"\1\2:{MASK}@", text)
    return SECRET_VALUE.sub(rf"\1{MASK}", text)


def _secrets(environment: Mapping[str, str]) -> Iterator[str]:
    """Yield the secrets of a store in the environment, as they are and decoded."""
    uri = environment.get(URI_VARIABLE, "")
    if has_secret(uri):
        before, _, after = masked(uri).partition(MASK)
        yield uri
        if MASK not in after and uri.startswith(before) and uri.endswith(after):
            secret = uri[len(before) : len(uri) - len(after)]
            yield from (one for one in (secret, unquote(secret)) if len(one) > 2)
    yield from (environment[name] for name in SECRET_VARIABLES if environment.get(name))


def absolute_uri(uri: str) -> str:
    """Return the store's address, a SQLite file's path made absolute."""
    file = sqlite_file(uri)
    return uri if file is None else sqlite_uri(file, uri)


def sqlite_file(uri: str) -> Path | None:
    """Return the file of a SQLite address, None for any other and for one without a file."""
    prefix = SQLITE.match(uri)
    if prefix is None:
        return None
    name = uri[prefix.end() :]
    if "%" in name or "?" in name:
        from sqlalchemy.engine import make_url  # which knows what its versions decode

        name = make_url(uri).database or ""
    return None if name in ("", ":memory:") else Path(name).absolute()


def sqlite_uri(file: Path, like: str = DEFAULT_URI) -> str:
    """Return a SQLite file's address; `like` is one with its query, if any."""
    if "?" not in f"{file}{like}" and "%" not in str(file):
        return f"sqlite:///{file}"
    from sqlalchemy.engine import make_url

    # For sqlite:/// MLflow makes the folder of the address as it is written, with its % and ?.
    url = make_url(like).set(drivername="sqlite+pysqlite", database=str(file))
    return url.render_as_string(hide_password=False)


def is_server(uri: str) -> bool:
    """Return whether the store has a UI of its own."""
    return _is_http(uri.partition("://")[0])


def _is_http(scheme: str) -> bool:
    return scheme.lower() in ("http", "https")


def ui_command(sweep: Path) -> str:
    """Return the shell command that shows a sweep in MLflow."""
    return f"python -m finetune.ui {shlex.quote(str(sweep))}"


def sync_command(sweep: Path, uri: str) -> str:
    """Return the shell command that sends a sweep's missing events to its store."""
    server = f"--uri {shlex.quote(uri)} " if needs_typing(uri) else ""
    return f"python -m finetune.sync {server}{shlex.quote(str(sweep))}"
