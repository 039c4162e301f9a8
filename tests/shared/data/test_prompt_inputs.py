"""What models are told with a caption: of Stable Diffusion XL twice the tokens, and six sizes."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pytest

from shared.data.batches import BatchLoader, BatchSpec
from shared.data.sources import open_source
from shared.data.tokenization import PromptInputs, XLInputs
from shared.models.xl import sizes_of_crop
from tests.shared.data.pictures import LATENT_SHAPE, captions_in, config, tokenize


def backwards(captions: Sequence[str]) -> npt.NDArray[np.int32]:
    """The second tokenizer's stand-in."""
    return tokenize([caption[::-1] for caption in captions])


XL = PromptInputs(tokenize, XLInputs(backwards, sizes_of_crop(32, 5, 3)))


@pytest.mark.parametrize("proportion_empty_prompts", [0.0, 0.5, 1.0])
def test_batches_for_xl_have_two_rows_of_tokens_and_the_sizes(proportion_empty_prompts: float) -> None:
    """The same captions, and the same of them dropped, for both text encoders; all else is as in other batches."""
    settings = config(generated_circles=16, proportion_empty_prompts=proportion_empty_prompts)
    of_xl, of_others = (
        BatchLoader(open_source(settings), settings, prompt_inputs, BatchSpec(8, 1, 2), LATENT_SHAPE, 1000).batch(0)
        for prompt_inputs in (XL, PromptInputs(tokenize))
    )
    assert of_xl.keys() - of_others.keys() == {"input_ids_2", "time_ids"}
    for name, array in of_others.items():
        np.testing.assert_array_equal(of_xl[name], array)
    second = captions_in({"input_ids": of_xl["input_ids_2"]})
    assert second == [caption[::-1] for caption in captions_in(of_xl)]
    assert (second.count("") / 16 == proportion_empty_prompts) or 0 < proportion_empty_prompts < 1
    assert of_xl["time_ids"].dtype == np.float32
    np.testing.assert_array_equal(of_xl["time_ids"], np.tile(np.float32([32, 32, 5, 3, 32, 32]), (2, 8, 1)))


def test_pictures_are_asked_for_whole() -> None:
    asked = XL.of_whole_images(32, 32)(["red"])
    np.testing.assert_array_equal(asked["time_ids"], [[32, 32, 0, 0, 32, 32]])
    assert PromptInputs(tokenize).of_whole_images(32, 32)(["red"]).keys() == {"input_ids"}
