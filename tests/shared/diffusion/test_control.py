"""The ControlNet's part of the steps, against the lines of diffusers' pipelines."""

import numpy as np
import pytest
import torch

from shared.diffusion.control import Control, grades


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 20, 50])
@pytest.mark.parametrize("start", [0.0, 0.1, 0.25, 1 / 3, 0.9])
@pytest.mark.parametrize("end", [0.05, 0.3, 2 / 3, 0.7, 1.0])
def test_steps_with_control_are_those_of_the_pipelines(steps: int, start: float, end: float) -> None:
    """pipeline_controlnet.py of diffusers 0.42, step 7.2."""
    keep = [1.0 - float(i / steps < start or (i + 1) / steps > end) for i in range(steps)]
    given = Control(0.7, start, end).scales(steps)
    np.testing.assert_array_equal(given, np.float32(0.7) * np.array(keep, np.float32))


def test_grades_are_those_of_the_controlnet() -> None:
    """controlnet.py of diffusers 0.42: `torch.logspace(-1, 0, len(down_block_res_samples) + 1)`."""
    np.testing.assert_allclose(grades(13), torch.logspace(-1, 0, 13), rtol=1e-6)


def test_a_controlnet_that_pools_is_never_graded() -> None:
    plain = Control.of(1.0, 0.0, 1.0, guess_mode=False, pools_globally=False)
    assert plain == Control()
    pooled = Control.of(1.0, 0.0, 1.0, guess_mode=False, pools_globally=True)
    assert (pooled.only_conditional, pooled.graded) == (True, False)
    guessing = Control.of(1.0, 0.0, 1.0, guess_mode=True, pools_globally=False)
    assert (guessing.only_conditional, guessing.graded) == (True, True)
    assert Control.of(1.0, 0.0, 1.0, guess_mode=True, pools_globally=True) == pooled
