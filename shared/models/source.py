"""Where the files of a model are: from what a user calls a model to files on this machine."""

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
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

from shared.config import TrainConfig
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

CONFIG_FILE = "config.json"
# What the Hub's library raises where a file cannot be had. ValueError: a name that is none, or with a NUL.
_HUB_ERRORS = (HfHubHTTPError, EntryNotFoundError, OSError, ValueError)


@dataclass(frozen=True)
class ModelSource:
    """A model, or a part of one, on this machine or in a repository of the Hugging Face Hub.

    Attributes:
        path_or_repo: a folder in diffusers' (for text encoders, transformers') layout, or `owner/name` on the Hub.
        subfolder: the folder inside it that holds the part, `unet`.
        revision: branch, tag or commit on the Hub.
        variant: of the weights: `fp16` stands for `diffusion_pytorch_model.fp16.safetensors` and nothing else.
        cache_dir: of downloads; the Hub library's own where None.
    """

    path_or_repo: str | Path
    subfolder: str | None = None
    revision: str | None = None
    variant: str | None = None
    cache_dir: str | Path | None = None

    @property
    def name(self) -> str:
        """What it is called in messages: without credentials, on one line."""
        return shown_name("/".join(filter(None, (str(self.path_or_repo), self.subfolder))))

    @property
    def is_local(self) -> bool:
        """Whether it is a folder on this machine. Its subfolder may be missing."""
        return os.path.isdir(self.path_or_repo)

    def file(self, name: str = CONFIG_FILE) -> Path:
        """A small file, on this machine after a download where that is needed.

        Raises:
            UserError: the source is neither a folder nor a repository that can be reached, or has no such subfolder,
                revision or file.
        """
        if self.is_local:
            return self._local_folder(name) / name
        try:
            return self._download(name)
        except _HUB_ERRORS as error:
            raise UserError(self._why_not(name, error)) from error

    def optional_file(self, name: str) -> Path | None:
        """As `file`; None where there is no such subfolder or file, or, offline, no such file in the cache."""
        if self.is_local:
            path = Path(self.path_or_repo, self.subfolder or "", name)
            return path if os.path.lexists(path) else None
        try:
            return self._download(name)
        except EntryNotFoundError:
            return None
        except _HUB_ERRORS as error:
            raise UserError(self._why_not(name, error)) from error

    def pinned(self, name: str) -> "ModelSource":
        """This source at the commit that the file of this name is of now, so that all files are of one version.

        Raises:
            UserError: as `file`.
        """
        return self if self.is_local else self._at_commit_of(self.file(name))

    def folder(self, names: WeightNames) -> Path:
        """The folder with `config.json` and the weights: the local one, or a download of just these files.

        Raises:
            UserError: as `file`, or a repository has no such weights. Those of a local folder are not looked for.
        """
        if self.is_local:
            return self._local_folder(CONFIG_FILE)
        config = self.file(CONFIG_FILE)
        self._at_commit_of(config)._download_weights(names, config.parent)
        return config.parent

    def _local_folder(self, name: str) -> Path:
        """With a file of this name in it."""
        root = Path(self.path_or_repo)
        folder = root / self.subfolder if self.subfolder else root
        if not os.path.isdir(folder):
            there = ", ".join(name for name in names_in(root) if os.path.isdir(root / name)) or "none"
            raise UserError(
                f"{shown(root)} has no subfolder {self.subfolder!r}. Subfolders there: {shown(there)}. Expected "
                "a folder as diffusers' save_pretrained writes it, with unet/, vae/ and scheduler/ for a whole model."
            )
        if not os.path.lexists(folder / name):
            with_file = [part for part in names_in(folder) if os.path.isfile(folder / part / name)]
            hint = f"Pass subfolder=, one of {shown(', '.join(with_file))}" if with_file else "Check the path"
            raise UserError(
                f"{shown(folder)} has no {name}: expected a model's folder as diffusers' save_pretrained writes it. "
                f"{hint}."
            )
        return folder

    def _download(self, name: str) -> Path:
        return Path(
            hf_hub_download(
                str(self.path_or_repo),
                name,
                subfolder=self.subfolder,
                revision=self.revision,
                cache_dir=self.cache_dir,
            )
        )

    def _at_commit_of(self, downloaded: Path) -> "ModelSource":
        # A snapshot's folder is named after its commit. What was downloaded of a commit is found without the network.
        return replace(self, revision=downloaded.parents[len(Path(self.subfolder or "").parts)].name)

    def _download_weights(self, names: WeightNames, snapshot: Path) -> None:
        where = self.name
        try:
            entry = _first_to_be_had(candidates(names, self.variant), snapshot, self._download)
            if entry is None:
                raise UserError(missing_weights_message(names, self.variant, where, self._files_of_repository()))
            for shard in shard_names(snapshot / entry) if is_index(entry) else []:
                self._download(shard)
        except LocalEntryNotFoundError as error:
            raise UserError(
                f"The Hugging Face Hub cannot be reached and not all weights of {where} are in the local cache"
                f"{f' (variant {self.variant!r})' if self.variant else ''}. Go online once to download them, or pass a "
                "local folder."
            ) from error
        except (HfHubHTTPError, OSError) as error:
            raise UserError(
                f"The weights of {where} could not be downloaded ({reason(error)}). Check the network and the room in "
                "the folder of the cache, and try again."
            ) from error

    def _files_of_repository(self) -> list[str]:
        """Names of the files in the subfolder."""
        files = HfApi().list_repo_files(str(self.path_or_repo), revision=self.revision)
        folders_and_names = (file.rpartition("/") for file in files)
        return [name for folder, _, name in folders_and_names if folder == (self.subfolder or "")]

    def _why_not(self, name: str, error: Exception) -> str:
        """Why a file could not be had from the Hub, and what to do."""
        repo, where = shown_name(self.path_or_repo), self.name
        match error:
            case HFValidationError():
                return (
                    f"'{repo}' is not a local folder, nor a repository's name on the Hugging Face Hub: expected an "
                    "existing folder, or owner/name. Check the path."
                )
            case GatedRepoError():
                return (
                    f"{repo} is a gated repository: accept its terms on the Hugging Face Hub and log in "
                    "(hf auth login)."
                )
            case RepositoryNotFoundError():
                return (
                    f"'{repo}' is not a local folder, and the Hugging Face Hub has no such repository that this login "
                    "may read. Check the path or the name; log in (hf auth login) if it is private."
                )
            case RevisionNotFoundError():
                revision = shown(repr(self.revision))
                return f"{repo} has no revision {revision}: expected a branch, tag or commit of it."
            case LocalEntryNotFoundError():
                return (
                    f"'{repo}' is not a local folder, and the Hugging Face Hub cannot be reached to download {name} of "
                    f"{where} (it is not in the local cache either). Pass an existing folder, or go online once to "
                    "download it."
                )
            case EntryNotFoundError():
                return (
                    f"{where} on the Hugging Face Hub has no {name}: expected a model's folder in diffusers' layout. "
                    "Check subfolder=, which a whole pipeline needs ('unet', 'vae', 'text_encoder')."
                )
        return (
            f"{name} of {where} could not be had from the Hugging Face Hub ({reason(error)}). Check the name, the "
            "network and the folder of the cache; or pass an existing folder."
        )


def base_source(config: TrainConfig, subfolder: str) -> ModelSource:
    """A part of a run's base model."""
    return ModelSource(
        str(config.pretrained_model_name_or_path), subfolder, config.revision, config.variant, config.cache_dir
    )


def vae_source(config: TrainConfig) -> ModelSource:
    """A run's VAE."""
    if config.pretrained_vae_model_name_or_path is None:
        return base_source(config, "vae")
    return ModelSource(config.pretrained_vae_model_name_or_path, cache_dir=config.cache_dir)


def controlnet_source(config: TrainConfig) -> ModelSource | None:
    """The ControlNet that a run starts from; None where it starts from the UNet."""
    if config.controlnet_model_name_or_path is None:
        return None
    return ModelSource(
        config.controlnet_model_name_or_path, revision=config.controlnet_revision, cache_dir=config.cache_dir
    )


def tokenizer_source(config: TrainConfig) -> ModelSource:
    """The tokenizer of a run that has one; Stable Diffusion XL has two."""
    if config.tokenizer_name is None:
        return base_source(config, "tokenizer")
    return ModelSource(config.tokenizer_name, cache_dir=config.cache_dir)


def xl_tokenizer_sources(config: TrainConfig) -> tuple[ModelSource, ModelSource]:
    """Stable Diffusion XL's two, which `--tokenizer_name` has in the same subfolders as the base model."""

    def source(subfolder: str) -> ModelSource:
        if config.tokenizer_name is None:
            return base_source(config, subfolder)
        return ModelSource(config.tokenizer_name, subfolder, cache_dir=config.cache_dir)

    return source("tokenizer"), source("tokenizer_2")


def shown_name(path_or_repo: str | Path) -> str:
    """What a user calls a model, for messages: without credentials, on one line."""
    return shown(redacted(str(path_or_repo)))


def _first_to_be_had(wanted: list[str], snapshot: Path, download: Callable[[str], Path]) -> str | None:
    """The first of the wanted files that exists, which lies in the snapshot afterwards; None if there is none."""
    for name in wanted:
        if (snapshot / name).is_file():  # no need to ask the network what a pinned commit holds
            return name
    for name in wanted:
        try:
            download(name)
        except LocalEntryNotFoundError:
            raise
        except EntryNotFoundError:
            continue
        return name
    return None
