"""Loops over pixels, compiled by Numba, which run without Python's lock.

Compiling takes seconds. Numba keeps what it compiled in `__pycache__` beside the function, in the user's cache folder
where that may not be written, or in the folder that NUMBA_CACHE_DIR names.
"""

import logging
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar, cast

import numba
import numpy as np

from shared.untrusted import shown

logger = logging.getLogger(__name__)

Function = TypeVar("Function", bound=Callable[..., Any])


def array(dtype: type[np.generic], axes: int, *, read_only: bool = False) -> numba.types.Array:
    """The type of a contiguous array. What is only read may be either; what is written may not be `read_only`."""
    return numba.types.Array(numba.from_dtype(np.dtype(dtype)), axes, "C", readonly=read_only)


def compiled(*signatures: Any) -> Callable[[Function], Function]:
    """Compile a function for these types of arguments, now, so that no thread waits for it later.

    Inside it integers are 64 bits wide unless they are cast, an index may not be negative where it is unsigned, and
    nothing checks indices.
    """

    def decorate(function: Function) -> Function:
        jit = partial(numba.njit, list(signatures), nogil=True, error_model="numpy")
        try:
            result = jit(cache=True)(function)
        # No folder to write to, a full disk, or a damaged file there, which pickle answers with anything.
        except Exception as error:
            logger.info("%s is compiled anew in this run: its cache is of no use (%s)", function.__name__, shown(error))
            result = jit()(function)
        return cast(Function, result)

    return decorate
