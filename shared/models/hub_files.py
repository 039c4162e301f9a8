"""From what a user calls a model to a local folder that holds its configuration and weights."""

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from shared.models.weight_files import (
    WeightNames,
    candidates,
    is_index,
    missing_weights_message,
    names_in,
    shard_names,
)
from shared.outgoing.redaction import redacted
from shared.untrusted import shown
from shared.untrusted.border import reason
from shared.user_errors import UserError


def locate_folder(
    path_or_repo: str | Path,
    names: WeightNames,
    *,
    subfolder: str | None = None,
    revision: str | None = None,
    variant: str | None = None,
    cache_dir: str | Path | None = None,
    token: str | bool | None = None,
) -> Path:
    """A folder with `config.json` and weights: the local one, or a download of just these files from the Hub.

    Raises:
        UserError: it is neither a folder nor a repository that can be reached, or has no such subfolder, revision,
            configuration or weights.
    """
    if os.path.isdir(path_or_repo):
        return _local_folder(Path(path_or_repo), subfolder)
    return _download(str(path_or_repo), names, subfolder, revision, variant, cache_dir, token)


def locate_config(
    path_or_repo: str | Path,
    *,
    subfolder: str | None = None,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    token: str | bool | None = None,
) -> Path:
    """The `config.json` of a local folder, which need not hold weights, or a download of it from the Hub.

    Raises:
        UserError: as `locate_folder` does.
    """
    if os.path.isdir(path_or_repo):
        return _local_folder(Path(path_or_repo), subfolder) / "config.json"
    where = "/".join(filter(None, (shown_name(path_or_repo), subfolder)))
    return _download_config(str(path_or_repo), where, subfolder, revision, cache_dir, token)


def shown_name(path_or_repo: str | Path) -> str:
    """What a user calls a model, for messages: without credentials, on one line."""
    return shown(redacted(str(path_or_repo)))


def _local_folder(root: Path, subfolder: str | None) -> Path:
    folder = root / subfolder if subfolder else root
    if not os.path.isdir(folder):
        there = ", ".join(name for name in names_in(root) if os.path.isdir(root / name)) or "none"
        raise UserError(f"{shown(root)} has no subfolder {subfolder!r}. Subfolders there: {shown(there)}.")
    if not os.path.lexists(folder / "config.json"):
        with_config = [name for name in names_in(folder) if os.path.isfile(folder / name / "config.json")]
        hint = f"Pass subfolder=, one of {shown(', '.join(with_config))}" if with_config else "Check the path"
        raise UserError(
            f"{shown(folder)} has no config.json: expected a model's folder as diffusers' save_pretrained writes it. "
            f"{hint}."
        )
    return folder


def _download(
    repo: str,
    names: WeightNames,
    subfolder: str | None,
    revision: str | None,
    variant: str | None,
    cache_dir: str | Path | None,
    token: str | bool | None,
) -> Path:
    where = "/".join(filter(None, (shown_name(repo), subfolder)))
    config = _download_config(repo, where, subfolder, revision, cache_dir, token)
    # A snapshot's folder is named after its commit: pinning it keeps all files of one version, and works offline.
    commit = config.parents[len(Path(subfolder or "").parts)].name
    get = partial(hf_hub_download, repo, subfolder=subfolder, revision=commit, cache_dir=cache_dir, token=token)
    try:
        entry = _download_entry(get, config.parent, candidates(names, variant))
        if entry is None:
            files = HfApi(token=token).list_repo_files(repo, revision=commit)
            present = [file.rpartition("/")[2] for file in files if file.rpartition("/")[0] == (subfolder or "")]
            raise UserError(missing_weights_message(names, variant, where, present))
        for shard in shard_names(config.parent / entry) if is_index(entry) else []:
            get(shard)
    except LocalEntryNotFoundError as error:
        raise UserError(
            f"The Hugging Face Hub cannot be reached and not all weights of {where} are in the local cache"
            f"{f' (variant {variant!r})' if variant else ''}. Go online once to download them, or pass a local folder."
        ) from error
    except (HfHubHTTPError, OSError) as error:
        raise UserError(
            f"The weights of {where} could not be downloaded ({reason(error)}). Check the network and the room in the "
            "folder of the cache, and try again."
        ) from error
    return config.parent


def _download_entry(get: Callable[[str], str], snapshot: Path, wanted: list[str]) -> str | None:
    """Make sure that the first of the wanted files that exists lies in the snapshot; its name, or None."""
    for name in wanted:
        if (snapshot / name).is_file():  # no need to ask the network what a pinned commit holds
            return name
    for name in wanted:
        try:
            get(name)
        except LocalEntryNotFoundError:
            raise
        except EntryNotFoundError:
            continue
        return name
    return None


def _download_config(
    repo: str,
    where: str,
    subfolder: str | None,
    revision: str | None,
    cache_dir: str | Path | None,
    token: str | bool | None,
) -> Path:
    name = shown_name(repo)
    try:
        return Path(
            hf_hub_download(
                repo, "config.json", subfolder=subfolder, revision=revision, cache_dir=cache_dir, token=token
            )
        )
    except HFValidationError as error:
        raise UserError(
            f"'{name}' is neither a folder on this machine nor a repository's name on the Hugging Face Hub: expected "
            "an existing folder, or owner/name. Check the path."
        ) from error
    except GatedRepoError as error:
        raise UserError(
            f"{name} is a gated repository: accept its terms on the Hugging Face Hub and log in (hf auth login), or "
            "pass token=."
        ) from error
    except RepositoryNotFoundError as error:
        raise UserError(
            f"'{name}' is no folder on this machine, and the Hugging Face Hub has no such repository that this login "
            "may read. Check the path or the name; log in (hf auth login) if it is private."
        ) from error
    except RevisionNotFoundError as error:
        raise UserError(
            f"{name} has no revision {shown(repr(revision))}: expected a branch, tag or commit of it."
        ) from error
    except LocalEntryNotFoundError as error:
        raise UserError(
            f"'{name}' is no folder on this machine, and the Hugging Face Hub cannot be reached to download {where} "
            "(it is not in the local cache either). Pass an existing folder, or go online once to download it."
        ) from error
    except EntryNotFoundError as error:
        raise UserError(
            f"{where} on the Hugging Face Hub has no config.json: expected a model's folder in diffusers' layout. "
            "Check subfolder=, which a whole pipeline needs ('unet', 'vae', 'text_encoder')."
        ) from error
    except (HfHubHTTPError, OSError, ValueError) as error:  # ValueError: a NUL in a name
        raise UserError(
            f"{where} could not be had from the Hugging Face Hub ({reason(error)}). Check the name, the network and "
            "the folder of the cache; or pass an existing folder."
        ) from error
