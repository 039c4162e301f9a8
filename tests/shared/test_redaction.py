"""What addresses hold of secrets is not shown; everything else of them is."""

import string
from dataclasses import replace
from urllib.parse import quote, urlsplit

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from shared.config import TrainConfig, to_yaml
from shared.config.public import public_config
from shared.redaction import redacted

# Secrets are written in capitals and everything that may be shown in small letters, so that none hides in the other.
SECRETS = st.text(string.ascii_uppercase, min_size=1, max_size=20)
NAMES = st.text(string.ascii_lowercase + string.digits, min_size=1, max_size=8)
SCHEMES = st.sampled_from(["https", "http", "hf", "s3", "gs", "sftp", "file"])
PATHS = st.lists(NAMES | st.sampled_from(["{000..099}", "{a,b}", "[0-9]*", "a b", "name@main", "ü"]), min_size=1).map(
    "/".join
)
# What a password, query or command may hold besides letters and digits.
MARKS = st.text(string.punctuation + " ", max_size=4)


@given(SCHEMES, NAMES, SECRETS, MARKS, SECRETS, NAMES, st.none() | st.integers(1, 65535), PATHS)
def test_no_part_of_a_password_survives(
    scheme: str, user: str, start: str, marks: str, end: str, host: str, port: int | None, path: str
) -> None:
    assume("/" not in marks)
    address = f"{host}:{port}" if port else host
    assert redacted(f"{scheme}://{user}:{start}{marks}{end}@{address}/{path}") == f"{scheme}://{address}/{path}"


@given(SCHEMES, SECRETS, NAMES, PATHS)
def test_a_token_in_the_users_place_does_not_survive(scheme: str, token: str, host: str, path: str) -> None:
    assert redacted(f"{scheme}://{token}@{host}/{path}") == f"{scheme}://{host}/{path}"


@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), NAMES, NAMES, PATHS)
def test_any_escaped_password_is_left_out(password: str, user: str, host: str, path: str) -> None:
    shown = redacted(f"https://{user}:{quote(password, safe='')}@{host}/{path}")
    assert shown == f"https://{host}/{path}"


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("s3://AKIA:ab/Cd/eF@bucket/x.tar", "s3://bucket/x.tar"),
        ("https://user:AB@CD?EF@host/x.tar", "https://host/x.tar"),
        ("https://AB?CD#EF@host/x.tar", "https://host/x.tar"),
        ("https://user:A#B@host:80/name@main/x.tar", "https://host:80/name@main/x.tar"),
    ],
)
def test_what_should_have_been_escaped_in_a_password_does_not_show_it(address: str, shown: str) -> None:
    assert redacted(address) == shown


@given(SCHEMES, NAMES, PATHS, st.sampled_from("?#"), st.text(st.characters(exclude_categories=["Cs"])))
def test_queries_and_fragments_are_left_out(scheme: str, host: str, path: str, mark: str, rest: str) -> None:
    assert redacted(f"{scheme}://{host}/{path}{mark}{rest}") == f"{scheme}://{host}/{path}"


@given(
    st.sampled_from(["pipe:", "PIPE:", "Pipe:", "pipe: ", "{pipe:", "{a.tar,pipe:"]),
    st.sampled_from(["curl -H ", "curl -u", "curl\t", "curl\n", "curl<", "curl;", "curl'", "a=", "'", "$("]),
    MARKS,
    SECRETS,
    MARKS,
)
def test_nothing_of_a_commands_arguments_survives(
    scheme: str, program: str, before: str, secret: str, after: str
) -> None:
    shown = redacted(f"{scheme}{program}{before}{secret}{after} https://host/{secret}?{secret}")
    assert not set(shown) & set(string.ascii_uppercase)
    assert shown.partition(" (sha256 ")[0] in ("pipe:curl …", "pipe: …")


@pytest.mark.parametrize(
    ("location", "shown"),
    [
        ("pipe:gsutil cat gs://bucket/a.tar", "pipe:gsutil …"),
        ("pipe: /opt/bin/get.sh TOKEN", "pipe:/opt/bin/get.sh …"),
        ("pipe:cat", "pipe:cat …"),
        ("pipe:TOKEN=abc curl x", "pipe: …"),
        ('pipe:TOKEN="abc def" curl x', "pipe: …"),
        ("pipe:", "pipe: …"),
    ],
)
def test_the_program_of_a_command_is_shown(location: str, shown: str) -> None:
    assert redacted(location).startswith(f"{shown} (sha256 ")


@given(st.sets(st.text(st.characters(exclude_categories=["Cs"])), min_size=2, max_size=5))
def test_commands_stay_distinguishable(arguments: set[str]) -> None:
    commands = [f"pipe:curl {argument}" for argument in arguments]
    shown = [redacted(command) for command in commands]
    assert len(set(shown)) == len(commands)
    assert shown == [redacted(command) for command in commands], "the same in every run, for manifests are compared"


@given(st.text(st.characters(exclude_categories=["Cs"])))
@example("data/train-{000..099}.tar")
@example("~/a b?*.tar")
@example("C:\\data\\a.tar")
@example("user@host#1")
@example("data/pipe:a.tar")
def test_what_is_neither_url_nor_command_stays_as_it_is(path: str) -> None:
    assume("://" not in path)
    assume(not any(path.lower().startswith("pipe:", place) for place in (0, *_after("{,", path))))
    assert redacted(path) == path


def _after(marks: str, text: str) -> list[int]:
    return [place + 1 for place, character in enumerate(text) if character in marks]


@given(st.text(st.characters(exclude_categories=["Cs"])), st.text(st.characters(exclude_categories=["Cs"])))
@example("http://[x", "")
@example("https", "us\u2100er:SECRET@h/x")  # urllib refuses it with a message that quotes it
def test_no_text_is_too_odd_and_redacting_again_changes_nothing(before: str, after: str) -> None:
    once = redacted(f"{before}://{after}")
    if not once.startswith("pipe:"):
        assert redacted(once) == once


@given(NAMES, NAMES, PATHS)
def test_an_address_without_secrets_stays_as_it_is(host: str, name: str, path: str) -> None:
    for location in (f"https://{host}.example:8080/{path}", f"hf://datasets/{host}/{name}@main/{path}"):
        assert redacted(location) == location
        assert urlsplit(location).netloc == urlsplit(redacted(location)).netloc


def test_several_addresses_in_braces() -> None:
    assert redacted("{https://u:PW@h/a,https://u:PW@h/b}.tar") == "{https://h/a,https://h/b}.tar"
    assert "SIG" not in redacted("{https://h/a.tar?SIG,https://h/b.tar?SIG}")


def test_the_public_configuration_differs_in_its_shards_alone() -> None:
    shards = ("a-{0..9}.tar", "https://user:PASSWORD@host/a.tar?SIGNATURE", "pipe:curl -H TOKEN x")
    config = TrainConfig(train_shards=shards, allow_shell_urls=True, seed=5)
    public = public_config(config)
    assert public.train_shards == ("a-{0..9}.tar", "https://host/a.tar", redacted(shards[2]))
    assert replace(public, train_shards=shards) == config
    assert not any(secret in to_yaml(public) for secret in ("PASSWORD", "SIGNATURE", "TOKEN"))
    assert config.train_shards == shards
    other = TrainConfig(dataset_name="fusing/fill50k")
    assert public_config(other) == other
