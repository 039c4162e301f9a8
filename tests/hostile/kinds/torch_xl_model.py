"""Hostile models of Stable Diffusion XL, read by a training with PyTorch."""

from tests.hostile.case import Case
from tests.hostile.kinds import place_of
from tests.hostile.kinds.model_folders import XL, hostile_model
from tests.hostile.kinds.torch_runs import attempt
from tests.hostile.watched import Attempt


def build(case: Case) -> Attempt:
    what, words, is_honest = hostile_model(case, place_of(case.number).rank, XL)
    return attempt(case, what, words, is_honest)
