"""Where a library reads what others wrote: whatever it throws at such files becomes a sentence."""

import pickle
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from shared.untrusted.text import shown
from shared.user_errors import UserError


@contextmanager
def foreign_library(what: str, fix: str) -> Iterator[None]:
    """Around a call of diffusers, transformers, datasets, Orbax, … on files that may be damaged or hostile.

    Such libraries promise nothing about what they raise there: KeyError, TypeError, RecursionError and errors of their
    Rust parts were all seen. Use it around that call alone, so that a fault of ours does not pass for one of the file.

    Args:
        what: the file or folder, and that it cannot be read, as the beginning of the sentence.
        fix: what the user can do about it.

    Raises:
        UserError: in place of what the library raised. Running out of memory is left as it is.
    """
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        raise UserError(f"{what} ({reason(error)}). {fix}") from error


@contextmanager
def unpickling(where: str, failure: str, fix: str, instead: str) -> Iterator[None]:
    """Around what has PyTorch read tensors of a pickle, with `weights_only`.

    Args:
        where: the file or repository.
        failure: that it cannot be read, after its name.
        fix: what the user can do about that.
        instead: what to do where it holds something else than tensors.

    Raises:
        UserError: as `foreign_library`, and for a pickle that builds anything else.
    """
    try:
        with foreign_library(f"{where} {failure}", fix), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what an untrusted file makes torch remark upon
            yield
    except UserError as error:
        if not isinstance(error.__cause__, pickle.UnpicklingError):
            raise
        raise UserError(
            f"{where} holds something else than tensors, and reading that could run code that its author chose. "
            f"{instead}"
        ) from error


def reason(error: BaseException) -> str:
    """An exception in a few words on one line; a mistake of the user's needs no name."""
    lines = str(error).strip().splitlines()
    if isinstance(error, UserError):
        return shown(lines[0])
    return f"{type(error).__name__}: {shown(lines[0])}" if lines else type(error).__name__
