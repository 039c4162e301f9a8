"""Publishing a finished run on the Hugging Face Hub (`--push_to_hub`)."""

import logging
import re
import shlex
from glob import escape
from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HTTPError  # httpx's or httpx2's, whichever huggingface_hub is built on
from huggingface_hub.utils import filter_repo_objects

from shared.config import TrainConfig
from shared.models.trained_parts import UNET_FOLDER
from shared.run import hub_retries
from shared.run.folder import is_uploaded, note_upload
from shared.run.hub_retries import one_line, retried
from shared.untrusted import is_inside, shown
from shared.user_errors import UserError

logger = logging.getLogger(__name__)

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
        UserError: as `writable_repository`.
    """
    if not config.push_to_hub:
        return None
    return writable_repository(config, output_dir)


def writable_repository(config: TrainConfig, output_dir: Path) -> str:
    """The repository of `--hub_model_id`, or with the folder's name, made where it does not exist.

    Raises:
        UserError: no login, a token without the right to write, or the Hub cannot be reached, also when asked again.
    """
    name = config.hub_model_id or output_dir.resolve().name
    api = HfApi(token=_token(config))

    def make() -> str:
        repository = api.create_repo(name, exist_ok=True).repo_id
        api.auth_check(repository, write=True)  # create_repo is content with someone else's public repository
        return repository

    try:
        return retried(make, hub_retries.BEFORE_THE_WORK)
    except (HTTPError, OSError, ValueError) as error:
        raise UserError(
            f"{_asked_by(config)}the repository {shown(repr(name))} cannot be written to on the Hub "
            f"({one_line(error)}). Log in with `hf auth login` or give --hub_token, either with the right to write, "
            f"check --hub_model_id{_way_out(config)}."
        ) from error


def upload_result(config: TrainConfig, output_dir: Path, repository: str | None) -> None:
    """`push` a finished run, unless it asks for none (None) or its report says that it is uploaded.

    Raises:
        UserError: as `push`.
    """
    if repository is None or is_uploaded(output_dir):
        return
    address = push(config, output_dir, repository)
    logger.info("Uploaded: %s", address)
    note_upload(output_dir, address)


def push(config: TrainConfig, output_dir: Path, repository: str, message: str = "End of training") -> str:
    """Upload the final ControlNet, its card, report and pictures, and nothing else; returns the commit's address.

    What is a link to a file elsewhere is left out: whoever put it there may have meant a file that is private.

    Raises:
        UserError: the upload failed, also when tried again; says how to do it later.
    """
    api, ignored = HfApi(token=_token(config)), [escape(name) for name in _lying_elsewhere(output_dir)]

    def upload() -> str:
        return api.upload_folder(
            repo_id=repository,
            folder_path=output_dir,
            commit_message=message,
            allow_patterns=_PUBLISHED,
            ignore_patterns=ignored,
        ).commit_url

    try:
        return retried(upload, hub_retries.AFTER_THE_WORK)
    except MemoryError:
        raise
    except Exception as error:  # what is uploaded by Rust may raise anything, and the result is safe
        words = ["python3", "-m", "shared.publish", str(output_dir), "--hub_model_id", repository]
        raise UserError(
            f"The trained ControlNet stands in {shown(output_dir)}, but it could not be uploaded ({one_line(error)}). "
            f"Upload it later with `{shown(shlex.join(words))}`."
        ) from error


def _lying_elsewhere(output_dir: Path) -> list[str]:
    """Names of files to publish that are links out of the folder, or in a folder that is one."""
    found = [path for path in output_dir.glob("**/*") if path.is_file() and not is_inside(path, [output_dir])]
    names = list(filter_repo_objects((str(path.relative_to(output_dir)) for path in found), allow_patterns=_PUBLISHED))
    for name in names:
        logger.warning("%s is a link that leads out of the folder of the run, and is not uploaded", shown(name))
    return names


def _token(config: TrainConfig) -> str:
    token = get_token() if config.hub_token is None else config.hub_token
    if token is None:
        raise UserError(
            f"{_asked_by(config)}there is no login on the Hub. Log in with `hf auth login` or give --hub_token, "
            f"either with the right to write{_way_out(config)}."
        )
    # HTTP libraries refuse such a token with a message that quotes it.
    if re.fullmatch(r"[!-~]+", token) is None:
        raise UserError(
            f"{_asked_by(config)}the Hub token is empty or holds blanks or characters outside ASCII. Copy it again "
            "from https://huggingface.co/settings/tokens."
        )
    return token


def _asked_by(config: TrainConfig) -> str:
    return "--push_to_hub: " if config.push_to_hub else ""


def _way_out(config: TrainConfig) -> str:
    return ", or leave --push_to_hub away" if config.push_to_hub else ""
