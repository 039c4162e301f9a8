"""Publishing a finished run on the Hugging Face Hub (`--push_to_hub`)."""

import re
from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HTTPError  # httpx's or httpx2's, whichever huggingface_hub is built on

from shared.config import TrainConfig
from shared.trained_parts import UNET_FOLDER

_PUBLISHED = [
    "README.md",
    "config.json",
    "diffusion_pytorch_model*.safetensors*",
    f"{UNET_FOLDER}/*",
    "report.json",
    "contact_sheet.png",
    "validation/*",
]


def prepare_repository(config: TrainConfig, output_dir: Path) -> str | None:
    """Create the repository that the run will be pushed to and return its name; None without `--push_to_hub`.

    Called before any work starts, so that a missing login costs a second and not a training run.

    Raises:
        ValueError: no login, a token without the right to write, or the Hub cannot be reached.
    """
    if not config.push_to_hub:
        return None
    name = config.hub_model_id or output_dir.resolve().name
    api = HfApi(token=_token(config))
    try:
        repository = api.create_repo(name, exist_ok=True).repo_id
        api.auth_check(repository, write=True)  # create_repo is content with someone else's public repository
    except (HTTPError, OSError, ValueError) as error:
        raise ValueError(
            f"--push_to_hub: the repository {name!r} cannot be written to on the Hub ({_one_line(error)}). Log in with "
            "`hf auth login` or give --hub_token, either with the right to write, check --hub_model_id, or leave "
            "--push_to_hub away."
        ) from error
    return repository


def push(config: TrainConfig, output_dir: Path, repository: str) -> str:
    """Upload the final ControlNet, its card, report and pictures, and nothing else; returns the commit's address.

    Raises:
        ValueError: the upload failed; says how to do it by hand.
    """
    try:
        commit = HfApi(token=_token(config)).upload_folder(
            repo_id=repository, folder_path=output_dir, commit_message="End of training", allow_patterns=_PUBLISHED
        )
    except (HTTPError, OSError, ValueError) as error:
        include = " ".join(f"--include '{pattern}'" for pattern in _PUBLISHED)
        raise ValueError(
            f"The training is finished and its ControlNet stands in {output_dir}, but it could not be uploaded "
            f"({_one_line(error)}). Upload it with `hf upload {repository} {output_dir} {include}`."
        ) from error
    return commit.commit_url


def _token(config: TrainConfig) -> str:
    token = get_token() if config.hub_token is None else config.hub_token
    if token is None:
        raise ValueError(
            "--push_to_hub needs a login on the Hub and there is none. Log in with `hf auth login`, give --hub_token "
            "with the right to write, or leave --push_to_hub away."
        )
    # HTTP libraries refuse such a token with a message that quotes it.
    if re.fullmatch(r"[!-~]+", token) is None:
        raise ValueError(
            "--push_to_hub: the Hub token is empty or holds blanks or characters outside ASCII. Copy it again from "
            "https://huggingface.co/settings/tokens."
        )
    return token


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
