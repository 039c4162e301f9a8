"""What addresses hold of secrets is not shown; everything else of them is."""

import string
import time
from dataclasses import replace
from urllib.parse import quote, urlsplit

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from shared.config import TrainConfig, to_yaml
from shared.config.public import public_config
from shared.outgoing.redaction import described, is_shell_command, keep_secret, masked, redacted

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


@given(SCHEMES, NAMES, PATHS, st.sampled_from("?#;"), st.text(st.characters(exclude_categories=["Cs"])))
def test_queries_and_fragments_are_left_out(scheme: str, host: str, path: str, mark: str, rest: str) -> None:
    assert redacted(f"{scheme}://{host}/{path}{mark}{rest}") == f"{scheme}://{host}/{path}"


@given(
    st.sampled_from(
        [
            *("pipe:", "PIPE:", "Pipe:", "pipe: ", "{pipe:", "{a.tar,pipe:", " pipe:", "\t\npipe:", "{a, pipe:"),
            *("\x00pipe:", "p\tipe:", "pi\npe\r:"),  # as URLs are read
        ]
    ),
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
    assume(not is_shell_command(path))
    assume(not any(is_shell_command(path[place:]) for place in _after("{,", path)))
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


@pytest.mark.parametrize("location", ["pipe:x", " pipe:x", "\n\x00PIPE:x", "p\ni\tpe:x", "\x1fpipe:"])
def test_whatever_is_read_as_a_pipe_is_a_command(location: str) -> None:
    assert is_shell_command(location)
    assert urlsplit(location.lstrip("".join(map(chr, range(33))))).scheme == "pipe"


@pytest.mark.parametrize("location", ["pipe", "pipes:x", "a/pipe:x", "https://host/pipe:x", "", "apipe:x", "pipe.tar"])
def test_what_is_no_pipe_is_no_command(location: str) -> None:
    assert not is_shell_command(location)


TOKENS = [
    "hf_AbCdEfGhIjKlMnOpQrStUvWxYz01234567",
    "ghp_AbCdEfGhIjKlMnOpQrStUvWxYz0123456789",
    "gho_AbCdEfGhIjKlMnOpQrStUvWxYz0123456789",
    "github_pat_11ABCDEFG0abcdefghijkl_mnopqrstuvwxyz",
    "glpat-AbCdEfGhIjKlMnOpQrSt",
    "AKIAIOSFODNN7EXAMPLE",
    "sk-proj-AbCdEfGhIjKlMnOpQrStUvWx",
    "AIzaSyA1234567890abcdefghijklmnopqrstuv",
    "ya29.AbCdEfGhIjKlMnOpQrStUvWxYz0123456789",
    "wandb_v1_AbCdEfGhIjKlMnOpQrStUvWxYz",
    "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.dBjftJeZ4CVPmB92K27uhbUJU1p1r",
]


@pytest.mark.parametrize("token", TOKENS)
@pytest.mark.parametrize(
    "around", ["{}", "'{}'", "a {} b", "--seed={}", "{{'token': '{}'}}", "/data/{}/x", "{}\n", "«{}»"]
)
def test_tokens_are_masked_anywhere(token: str, around: str) -> None:
    assert masked(around.format(token)) == around.format("***")


@pytest.mark.parametrize("variable", ["HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY"])
def test_tokens_of_the_environment_are_masked(monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.setenv(variable, "any text at all")
    assert masked("it is 'any text at all'.") == "it is '***'."
    monkeypatch.setenv(variable, "short")
    assert masked("a short text") == "a short text"
    monkeypatch.setenv(variable, "")
    assert masked("a text") == "a text"


def test_the_token_of_a_flag_is_masked_from_then_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shared.outgoing.redaction._known_secrets", set())
    assert masked("my-private-token") == "my-private-token"
    keep_secret("my-private-token")
    keep_secret("my-private-token-2")
    assert masked("my-private-token, my-private-token-2") == "***, ***"


@pytest.mark.parametrize("known", ["https://user", "https://user:PASSWORD@host/x", "https://", "user:PASSWORD"])
def test_a_known_secret_hides_no_other_from_view(monkeypatch: pytest.MonkeyPatch, known: str) -> None:
    monkeypatch.setattr("shared.outgoing.redaction._known_secrets", {known})
    told = masked("https://user:PASSWORD@host/x?key=PASSWORD and https://user:PASSWORD@host/x")
    assert "PASSWORD" not in told


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("see https://user:PW@host/a and s3://KEY:PW/x@bucket/b.", "see https://host/a and s3://bucket/b."),
        ("HTTPS://user:P?W#X@host/a", "HTTPS://host/a"),
        ("no folder https:/user:PW@host/a, https:/host/a?token=PW", "no folder https:/host/a, https:/host/a?***"),
        ("'https://host/a?token=PW'.", "'https://host/a?***'."),
        ("(https://host/a?PW)", "(https://host/a?***)"),
        ("https://host/a#access_token=PW", "https://host/a#***"),
        ("https://host/a;key=PW/b, then", "https://host/a;***, then"),
        ("Authorization: Bearer PW-PW.PW", "Authorization: Bearer ***"),
        ("{'Authorization': 'Basic UFc='}", "{'Authorization': 'Basic ***'}"),
        (f"wandb: api_key={'0a' * 20}", "wandb: api_key=***"),
    ],
)
def test_addresses_and_keys_in_a_text_are_masked(text: str, shown: str) -> None:
    assert masked(text) == shown


@pytest.mark.parametrize(
    "text",
    [
        "https://huggingface.co/settings/tokens",
        "See https://docs.jax.dev/en/latest/notes.html#a-heading; then go on.",
        "Is it https://host.example/x? No: hf://datasets/a/b@main/x.tar, mail@example.org.",
        "hf_transfer, /data/hf_datasets, sk-learn, HF_TOKEN, ghp_, AKIA, --hub_token, eyJ",
        f"revision {'0a' * 20}",
        "http://127.0.0.1:8080/a@b",
        "train_batch_size is 4\n  learning_rate 1e-5",
    ],
)
def test_honest_text_stays_as_it_is(text: str) -> None:
    assert masked(text) == text


@given(st.text())
def test_masking_takes_any_text_and_has_then_done_its_work(text: str) -> None:
    once = masked(text)
    assert masked(once) == once


@pytest.mark.parametrize(
    "text", ["://" * 30_000, "https://a?" * 20_000, "@" * 100_000, "?'" * 50_000, "token " * 20_000]
)
def test_masking_a_long_text_takes_no_time(text: str) -> None:
    started = time.perf_counter()
    masked(text)
    assert time.perf_counter() - started < 5


@pytest.mark.parametrize("text", ["fp8", "1_000", "yes please", "-1", "", "\x1b", "½"])
def test_a_short_wrong_value_is_quoted(text: str) -> None:
    assert described(text) == repr(text)


@pytest.mark.parametrize("text", ["hf_abc", "x" * 17, "AKIA12345678", "s3://a:b@c", "sk-12345"])
def test_a_wrong_value_that_may_be_a_token_is_counted(text: str) -> None:
    assert described(text) == f"a text of {len(text)} characters"
