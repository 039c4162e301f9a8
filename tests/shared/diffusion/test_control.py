"""The ControlNet's part of the steps, against the lines of diffusers' pipelines."""

import numpy as np
import pytest
import torch

from shared.diffusion.control import Control, Strength, grades


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 20, 50])
@pytest.mark.parametrize("start", [0.0, 0.1, 0.25, 1 / 3, 0.9])
@pytest.mark.parametrize("end", [0.05, 0.3, 2 / 3, 0.7, 1.0])
def test_steps_with_control_are_those_of_the_pipelines(steps: int, start: float, end: float) -> None:
    """pipeline_controlnet.py of diffusers 0.42, step 7.2."""
    keep = [1.0 - float(i / steps < start or (i + 1) / steps > end) for i in range(steps)]
    given = Strength(0.7, start, end).scales(steps)
    np.testing.assert_array_equal(given, np.float32(0.7) * np.array(keep, np.float32))


def test_grades_are_those_of_the_controlnet() -> None:
    """controlnet.py of diffusers 0.42: `torch.logspace(-1, 0, len(down_block_res_samples) + 1)`."""
    np.testing.assert_allclose(grades(13), torch.logspace(-1, 0, 13), rtol=1e-6)


@pytest.mark.parametrize("pools", [(False,), (True,), (False, True), (True, False)])
@pytest.mark.parametrize("guess_mode", [False, True])
def test_whose_residuals_are_graded(pools: tuple[bool, ...], guess_mode: bool) -> None:
    """pipeline_controlnet.py of diffusers 0.42 asks the first (`nets[0]`), controlnet.py each for itself."""
    strengths = [Strength(0.1 * number) for number in range(len(pools))]
    given = Control.of(strengths, guess_mode=guess_mode, pools_globally=pools)
    guessing = guess_mode or pools[0]
    assert given.only_conditional == guessing
    assert [strength.graded for strength in given.strengths] == [guessing and not each for each in pools]
    assert [strength.conditioning_scale for strength in given.strengths] == [0.0, 0.1][: len(pools)]


def test_each_has_its_own_steps() -> None:
    given = Control((Strength(0.5, end=0.5), Strength(0.7, start=0.5))).scales(4)
    np.testing.assert_array_equal(given, np.float32([[0.5, 0], [0.5, 0], [0, 0.7], [0, 0.7]]))
