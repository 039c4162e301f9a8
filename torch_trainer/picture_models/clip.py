"""CLIP: how near a picture and its caption are.

Axes: B pictures, D of CLIP's common space.
"""

from collections.abc import Sequence

import PIL.Image
import torch
from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from shared.evaluate.metrics.base import Pixels
from shared.evaluate.metrics.clip_score import Scores
from torch_trainer.prepare_data.model_files import IMAGE_PROCESSOR_FILES, TOKENIZER_FILES, load_model

_FILES = (*IMAGE_PROCESSOR_FILES, *TOKENIZER_FILES, "merges.txt")


class _Processor:
    """What CLIP's inputs are made with. (transformers' own wants torchvision where it finds it: other pixels.)"""

    def __init__(self, folder: str, **options: bool) -> None:
        self.tokenizer = CLIPTokenizer.from_pretrained(folder, **options)
        self.images = CLIPImageProcessorPil.from_pretrained(folder, **options)

    @classmethod
    def from_pretrained(cls, folder: str, **options: bool) -> "_Processor":
        return cls(folder, **options)


def load_scores(name: str, cache_dir: str | None) -> Scores:
    """CLIP from a folder or the Hub: pictures uint8 [H,W,3] and a caption for each → 100 × the cosines, float.

    Captions are cut to what the text encoder takes, with its end in place.

    Raises:
        UserError: it is no CLIP model, or cannot be loaded.
    """
    model, processor, device = load_model(CLIPModel, _Processor, name, _FILES, cache_dir)
    longest = model.config.text_config.max_position_embeddings

    @torch.no_grad()
    def scores(pictures: Sequence[Pixels], captions: Sequence[str]) -> list[float]:
        texts = processor.tokenizer(
            list(captions), padding=True, truncation=True, max_length=longest, return_tensors="pt"
        )
        images = processor.images([PIL.Image.fromarray(picture) for picture in pictures], return_tensors="pt")
        found = model(
            input_ids=texts["input_ids"].to(device),
            attention_mask=texts["attention_mask"].to(device),
            pixel_values=images["pixel_values"].to(device),
        )
        cosines_B = torch.cosine_similarity(found.image_embeds, found.text_embeds, dim=-1)
        return [100 * cosine for cosine in cosines_B.tolist()]

    return scores
