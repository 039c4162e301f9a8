"""`caption`: what BLIP says of an image (Li et al. 2022, "BLIP: Bootstrapping Language-Image Pre-training").

Axes: B images at once, C h w as the model takes them.
"""

import torch
from transformers import BlipForConditionalGeneration, BlipProcessor, GenerationConfig

from shared.prepare_data.captioning import Captioner
from torch_trainer.prepare_data.equal_shapes import ForModel, for_any_images
from torch_trainer.prepare_data.model_files import IMAGE_PROCESSOR_FILES, TOKENIZER_FILES, load_model

_LONGEST = 40  # tokens; CLIP reads 75


def open_captioner(name: str) -> Captioner:
    """The most likely word after the other, so that an image has the same caption every time.

    Raises:
        UserError: it is no BLIP model for captions, or cannot be loaded.
    """
    files = (*IMAGE_PROCESSOR_FILES, *TOKENIZER_FILES)
    model, processor, device = load_model(BlipForConditionalGeneration, BlipProcessor, name, files)
    model.text_decoder.generation_config = GenerationConfig(max_new_tokens=_LONGEST, do_sample=False, num_beams=1)

    def run(pixels_BChw: torch.Tensor, group: list[ForModel]) -> list[str]:
        tokens = model.generate(pixel_values=pixels_BChw.to(device))
        return [text.strip() for text in processor.batch_decode(tokens, skip_special_tokens=True)]

    return Captioner(*for_any_images(name, processor.image_processor, run))
