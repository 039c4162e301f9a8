from pathlib import Path

import pytest

from shared.config.options import FLAGS
from shared.prepare_data.command import SUBCOMMANDS, main


def test_help_lists_subcommands_and_their_flags(capsys: pytest.CaptureFixture[str]) -> None:
    for words in ([], ["--help"], ["-h"]):
        assert main(words) == 0
        text = capsys.readouterr().out
        assert all(f"\n  {name:<8}" in text for name in SUBCOMMANDS)
    for name, subcommand in SUBCOMMANDS.items():
        assert main([name, "--help"]) == 0
        text = capsys.readouterr().out
        assert all(f"\n  --{flag}" in text for flag in subcommand.flags)
        assert text.count("\ndata:") == (not subcommand.hands_on)


def test_flags_that_name_data_mean_what_they_mean_in_training() -> None:
    for name in ("pack", "check", "show"):
        flags = SUBCOMMANDS[name].flags
        for data in (name for name, flag in FLAGS.items() if flag.names == "data" and name != "cached_data"):
            assert flags[data] == FLAGS[data]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["pac"], "'pac' is no subcommand; did you mean pack?"),
        (["paint"], "expected one of index, pack, annotate, caption, cache, check, show"),
        (["index"], "index needs the shards"),
        (["index", "--num_workers", "1"], "index needs the shards"),
        (["index", "absent.tar"], "no file 'absent.tar'"),
        (["index", "https://host.example/a.tar"], "remote shards need --output_file"),
        (["pack", "DIR"], "is no flag; the data are named by flags"),
        (["pack", "--generated_circles", "4"], "--output_dir is missing"),
        (["pack", "--output_dir", "X"], "The training data are missing: give one of --dataset_name"),
        (["pack", "--generated_circles", "4", "--output_dir", "gs://bucket/x"], "an address; expected a folder"),
        (["pack", "--generated_circles", "4", "--train_data_dir", "X"], "each name training data"),
        (
            ["pack", "--generated_circles", "4", "--shards_image_key", "png"],
            "--shards_image_key is about --train_shards",
        ),
        (["check", "--generated_circles", "0"], "--generated_circles must be 1 or more"),
        (["check", "--generated_circles", "4", "--resoltion", "8"], "did you mean --resolution?"),
        (["show", "--train_data_dir", "absent"], "is not a folder"),
        (["show", "--generated_circles", "4", "--output_file", "/proc/x.png"], "--output_file /proc/x.png cannot be"),
        (["check", "--generated_circles", "1", "--report", "/proc/x.json"], "--report /proc/x.json cannot be written"),
    ],
)
def test_a_mistake_is_told_in_a_sentence(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
