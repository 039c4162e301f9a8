"""From checked options to the model that they ask for."""

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from shared.outgoing.messages import set_up_logging
from shared.prepare_data.command import read_command
from shared.prepare_data.options import DEFAULT_ANNOTATORS, AnnotateOptions, CaptionOptions, ModelCondition
from shared.run.interruption import exit_code_of
from shared.user_errors import UserError

if TYPE_CHECKING:
    from shared.prepare_data.annotating import Annotator


class _Maker(NamedTuple):
    """What makes a condition: `package` is what its module needs beside PyTorch, and how that is had."""

    package: str
    install: str
    module: str
    opens: str


_TRANSFORMERS = "transformers", "pip install transformers"
_CONTROLNET_AUX = "controlnet_aux", "pip install controlnet_aux torchvision"
_MAKERS: dict[ModelCondition, _Maker] = {
    "depth": _Maker(*_TRANSFORMERS, "depth", "open_depth"),
    "segmentation": _Maker(*_TRANSFORMERS, "segmentation", "open_segmentation"),
    "pose": _Maker(*_CONTROLNET_AUX, "controlnet_aux_detectors", "open_pose"),
    "soft_edges": _Maker(*_CONTROLNET_AUX, "controlnet_aux_detectors", "open_soft_edges"),
    "landmarks": _Maker("dlib", "pip install dlib", "landmarks", "open_landmarks"),
}


def main(words: Sequence[str]) -> int:
    """The exit code, as that of `shared.prepare_data.command.main`."""
    goes_on = "Interrupted. The same command goes on where it was stopped."
    return exit_code_of(partial(_main, words), interrupted=goes_on)


def _main(words: Sequence[str]) -> int:
    options = read_command(words).options
    set_up_logging("shared")
    if isinstance(options, CaptionOptions):
        return _caption(options)
    assert isinstance(options, AnnotateOptions), "nothing else is handed on"
    return _annotate(options)


def _annotate(options: AnnotateOptions) -> int:
    from shared.prepare_data.annotating import run_with_model

    condition = options.model_condition
    assert condition is not None, "others are not handed on"
    model = options.annotator_model or DEFAULT_ANNOTATORS[condition]
    if model is None:
        raise UserError(
            f"--annotator_model is missing: --condition {condition} has no usual one. Name dlib's file of 68 points, "
            "shape_predictor_68_face_landmarks.dat (from dlib.net)."
        )
    maker = _MAKERS[condition]
    _check_installed(f"--condition {condition}", maker.package, maker.install)
    return run_with_model(options, model, partial(_open_annotator, maker, model))


def _open_annotator(maker: _Maker, model: str) -> "Annotator":
    opens: Callable[[str], Any] = getattr(_module(maker.module), maker.opens)
    return opens(model)


def _caption(options: CaptionOptions) -> int:
    from shared.prepare_data.captioning import run_with_model

    _check_installed("caption", *_TRANSFORMERS)
    return run_with_model(options, lambda: _module("captions").open_captioner(options.captioner_model))


def _module(name: str) -> Any:
    """Imported when it is asked for: a mistake in the flags need not wait for PyTorch."""
    return importlib.import_module(f"torch_trainer.prepare_data.{name}")


def _check_installed(what: str, package: str, install: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise UserError(f"{what} needs the package {package}, which is not installed. Run: {install}")
