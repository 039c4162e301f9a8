"""What every model here can do: start from random values, be read from and written to diffusers' folders.

A model is an `nnx.Module` built as `Model(config)`, whose parameters' paths are PyTorch's state-dict names. Its
constructor may take more, such as how to compute, which the functions here hand on as `options`. Subclasses
name their configuration and their files in class variables; everything else is inherited.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from flax_trainer.models.layers import basic as layers
from flax_trainer.models.params import HostParams, Params, from_torch_layout, split, to_torch_layout, torch_shape
from shared.models.configs import Architecture, read_config
from shared.models.fitting import fitting_weights
from shared.models.initialisation import ModuleKind, initial_values
from shared.models.source import CONFIG_FILE, ModelSource
from shared.models.weight_files import DIFFUSERS, WeightNames, write_weights
from shared.outgoing.atomic_files import write_text_atomically

_KINDS: dict[type[nnx.Module], ModuleKind] = {
    layers.Conv: ModuleKind.AFFINE,
    layers.PointwiseConv: ModuleKind.AFFINE,
    layers.Linear: ModuleKind.AFFINE,
    layers.GroupNorm: ModuleKind.NORM,
    layers.LayerNorm: ModuleKind.NORM,
    layers.Embedding: ModuleKind.EMBEDDING,
}


class PretrainedModel(nnx.Module):
    """Base of the models. A subclass is constructed as `Model(config)` and sets `self.config`.

    Class variables:
        config_class: its `Architecture`.
        identity: what `config.json` needs beside the architecture for diffusers or transformers to recognise it.
        weight_names: how its weight files are called.
        embedding_std: spread of embeddings in random initialisation.
        zero_initialised: names, or dotted prefixes of names, of the modules that start at zero.
    """

    config_class: ClassVar[type[Architecture]]
    identity: ClassVar[dict[str, Any]]
    weight_names: ClassVar[WeightNames] = DIFFUSERS
    embedding_std: ClassVar[float] = 1.0
    zero_initialised: ClassVar[tuple[str, ...]] = ()

    config: Any

    def __init__(self, config: Any):
        self.config = config

    # --- construction -----------------------------------------------------------------------------------------------

    @classmethod
    def abstract(cls, config: Architecture | Mapping[str, Any], **options: Any) -> Self:
        """The model with `jax.ShapeDtypeStruct`s for values: its structure, without its memory."""
        config = cls._as_config(config)
        return nnx.eval_shape(lambda: cls(config, **options))

    @classmethod
    def from_config(cls, config: Architecture | Mapping[str, Any], *, seed: int = 0, **options: Any) -> Self:
        """The model with random float32 values, the same for the same seed in either backend.

        Raises:
            UserError: the configuration is not supported.
        """
        model = cls.abstract(config, **options)
        definition, _ = split(model)
        values = cls.initial_params(model, seed)
        return definition.bind({name: jnp.asarray(value) for name, value in values.items()})

    @classmethod
    def initial_params(cls, model: Self, seed: int) -> HostParams:
        """Random float32 values for every parameter of a model, abstract or not (`shared.models.initialisation`)."""
        values: HostParams = {}
        for name, module in _layers(model):
            parameters = {key: param for key, param in vars(module).items() if isinstance(param, nnx.Param)}
            drawn = initial_values(
                seed,
                name,
                ModuleKind.ZERO if cls._starts_at_zero(name) else _KINDS[type(module)],
                {key: torch_shape(param.shape, param.layout) for key, param in parameters.items()},
                embedding_std=cls.embedding_std,
            )
            for key, param in parameters.items():
                values[f"{name}.{key}"] = np.ascontiguousarray(from_torch_layout(drawn[key], param.layout))
        return values

    # --- files ------------------------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls,
        path_or_repo: str | Path,
        *,
        subfolder: str | None = None,
        revision: str | None = None,
        variant: str | None = None,
        dtype: jax.typing.DTypeLike = jnp.float32,
        cache_dir: str | Path | None = None,
        **options: Any,
    ) -> Self:
        """Read a model from a local folder or a repository of the Hugging Face Hub.

        Args:
            path_or_repo, subfolder, revision, variant, cache_dir: as in `ModelSource`.
            dtype: dtype of the values, whatever the file's.
            options: of the constructor.

        Raises:
            UserError: there is no such folder, repository, subfolder, revision or variant; the configuration is not
                supported; parameters are missing, unexpected or of another shape.
        """
        source = ModelSource(path_or_repo, subfolder, revision, variant, cache_dir)
        config, host_params = cls.load_params(source, dtype=dtype)
        definition, _ = split(cls.abstract(config, **options))
        params: Params = {}
        while host_params:  # emptied on the way: two whole copies of a model may not fit
            name, value = host_params.popitem()
            params[name] = jnp.asarray(value)
        return definition.bind(params)

    @classmethod
    def load_config(cls, source: ModelSource) -> Any:
        """Only the configuration, of a folder or repository that need not hold weights; raises as `from_pretrained`."""
        return read_config(source.file(CONFIG_FILE), cls.config_class)

    @classmethod
    def load_params(cls, source: ModelSource, *, dtype: jax.typing.DTypeLike = jnp.float32) -> tuple[Any, HostParams]:
        """`from_pretrained` for those who work with flat parameters: the configuration and host arrays in `dtype`.

        The arrays are numpy, in this project's layouts, so the caller decides where on the devices they go.
        """
        folder = source.folder(cls.weight_names)
        config = read_config(folder / CONFIG_FILE, cls.config_class)
        return config, cls._fitting_params(config, folder, source.variant, dtype)

    def save_pretrained(
        self, directory: str | Path, *, variant: str | None = None, max_shard_size: int | str | None = None
    ) -> None:
        """Write `config.json` and safetensors that diffusers (for text encoders, transformers) reads.

        Args:
            directory: made where missing. Weights of the same variant there are replaced.
            variant: `fp16` writes `diffusion_pytorch_model.fp16.safetensors`; it changes the name, not the dtype.
            max_shard_size: bytes, or a text like `"5GB"`; one file where None.
        """
        definition, params = split(self)
        self.save_params(
            directory, self.config, params, definition.layouts, variant=variant, max_shard_size=max_shard_size
        )

    @classmethod
    def save_params(
        cls,
        directory: str | Path,
        config: Architecture,
        params: Mapping[str, jax.Array | np.ndarray],
        layouts: Mapping[str, str],
        *,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
    ) -> None:
        """`save_pretrained` for flat parameters. `layouts` is `ModelDef.layouts`."""
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        torch_params = {name: _TorchView(value, layouts[name]) for name, value in params.items()}
        write_weights(folder, torch_params, cls.weight_names, variant, max_shard_size)
        text = json.dumps(cls.identity | config.to_dict(), indent=2, sort_keys=True) + "\n"
        write_text_atomically(folder / CONFIG_FILE, text)

    # --- internals --------------------------------------------------------------------------------------------------

    @classmethod
    def _as_config(cls, config: Architecture | Mapping[str, Any]) -> Architecture:
        return cls.config_class.from_dict(config) if isinstance(config, Mapping) else config

    @classmethod
    def _starts_at_zero(cls, name: str) -> bool:
        return any(name == zero or name.startswith(f"{zero}.") for zero in cls.zero_initialised)

    @classmethod
    def _fitting_params(
        cls, config: Architecture, folder: Path, variant: str | None, dtype: jax.typing.DTypeLike
    ) -> HostParams:
        """A folder's arrays in this project's names and layouts, held against the model."""
        definition, abstract = split(cls.abstract(config))
        layouts = definition.layouts
        expected = {name: torch_shape(value.shape, layouts[name]) for name, value in abstract.items()}
        weights = fitting_weights(
            folder, cls.weight_names, variant, expected, cls.__name__, cls.config_class.published_name
        )
        return {
            name: np.ascontiguousarray(from_torch_layout(array, layouts[name]), np.dtype(dtype))
            for name, array in weights
        }


class _TorchView:
    """A parameter that is fetched and transposed only when its shard is written."""

    def __init__(self, value: jax.Array | np.ndarray, layout: str):
        self.value = value
        self.layout = layout
        self.nbytes = value.nbytes

    def __array__(self, dtype: np.dtype | None = None, copy: bool | None = None) -> np.ndarray:
        return np.ascontiguousarray(to_torch_layout(np.asarray(self.value), self.layout), dtype)


def _layers(model: nnx.Module) -> Iterator[tuple[str, nnx.Module]]:
    """Every module that owns parameters, with its dotted name."""
    for path, module in nnx.iter_modules(model):
        if any(isinstance(value, nnx.Param) for value in vars(module).values()):
            yield ".".join(map(str, path)), module
