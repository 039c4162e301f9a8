"""Publishing a finished run on the Hugging Face Hub (`--push_to_hub`)."""

from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

from shared.config import TrainConfig


def prepare_repository(config: TrainConfig, output_dir: Path) -> str | None:
    """Create the repository that the run will be pushed to and return its name; None without `--push_to_hub`.

    Called before any work starts, so that a missing login costs a second and not a training run.

    Raises:
        ValueError: no login, a token without the right to write, or the Hub cannot be reached.
    """
    if not config.push_to_hub:
        return None
    name = config.hub_model_id or output_dir.resolve().name
    try:
        return HfApi(token=config.hub_token).create_repo(name, exist_ok=True).repo_id
    except (HfHubHTTPError, LocalTokenNotFoundError, OSError) as error:
        # The text of an HTTP error carries no header, hence no token; a request that was never sent is an OSError.
        raise ValueError(
            f"--push_to_hub: the repository {name!r} cannot be created on the Hub ({type(error).__name__}: {error}). "
            "Log in with `hf auth login` or give --hub_token with the right to write, check --hub_model_id, or leave "
            "--push_to_hub away."
        ) from error


def push(config: TrainConfig, output_dir: Path, repository: str) -> str:
    """Upload the final ControlNet, its card and its pictures, not the checkpoints; returns the commit's address."""
    commit = HfApi(token=config.hub_token).upload_folder(
        repo_id=repository,
        folder_path=output_dir,
        commit_message="End of training",
        ignore_patterns=["checkpoint-*", f"{config.logging_dir}/*", "*.tmp"],
    )
    return commit.commit_url
