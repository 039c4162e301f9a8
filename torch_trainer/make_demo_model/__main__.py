"""`python3 -m torch_trainer.make_demo_model --output_dir DIR --seed N`: train the demo's base model and write it."""

import argparse
import logging
import time
from pathlib import Path

import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline
from transformers import CLIPTokenizer

from torch_trainer.make_demo_model.autoencoder import encode, train_autoencoder
from torch_trainer.make_demo_model.circles import draw_circles
from torch_trainer.make_demo_model.folder import NOISE_SCHEDULE, write_folder, write_readme
from torch_trainer.make_demo_model.quality import caption_quality, reconstruction_quality
from torch_trainer.make_demo_model.text_encoder import train_text_encoder
from torch_trainer.make_demo_model.text_to_image import Examples, train_text_to_image
from torch_trainer.make_demo_model.tokenizer import caption_words, write_word_tokenizer

logger = logging.getLogger("make_demo_model")

_GUIDANCE_SCALES = (1.0, 3.0, 7.5)


def main() -> None:
    arguments = _parse_arguments()
    output_dir, seed = arguments.output_dir, arguments.seed
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S", level=logging.INFO)
    started = time.perf_counter()

    # --- the circles to learn from, and others to measure with -------------------------------------------------------
    circles = draw_circles(arguments.circles, seed)
    test_circles = draw_circles(arguments.test_circles, seed + 1)

    # --- the autoencoder ---------------------------------------------------------------------------------------------
    vae = train_autoencoder(circles.pixels_NCHW, arguments.vae_steps, seed)

    # --- tokenizer and text encoder ----------------------------------------------------------------------------------
    write_word_tokenizer(output_dir / "tokenizer", caption_words())
    tokenizer = CLIPTokenizer.from_pretrained(output_dir / "tokenizer")
    input_ids_NL = _tokenized(tokenizer, [truth.caption for truth in circles.truths])
    text_encoder = train_text_encoder(input_ids_NL, circles.truths, len(tokenizer), arguments.text_steps, seed)

    # --- the UNet, and the text encoder further ----------------------------------------------------------------------
    means_NCHW, stds_NCHW = (latents * vae.config.scaling_factor for latents in encode(vae, circles.pixels_NCHW))
    examples = Examples(means_NCHW, stds_NCHW, input_ids_NL, empty_ids_L=_tokenized(tokenizer, [""])[0])
    unet, text_encoder = train_text_to_image(
        examples, text_encoder, DDPMScheduler(**NOISE_SCHEDULE), arguments.unet_steps, seed
    )

    # --- the folder, and what the model in it is worth ---------------------------------------------------------------
    write_folder(output_dir, vae, unet, text_encoder, tokenizer)
    minutes = (time.perf_counter() - started) / 60
    pipeline = StableDiffusionPipeline.from_pretrained(output_dir)
    figures = {"autoencoder": reconstruction_quality(pipeline.vae, test_circles)} | {
        f"captions, guidance {scale}": caption_quality(pipeline, test_circles.truths, scale, seed)
        for scale in _GUIDANCE_SCALES
    }
    write_readme(output_dir, arguments, minutes, figures)
    logger.info("%s", (output_dir / "README.md").read_text(encoding="utf-8"))


def _tokenized(tokenizer: CLIPTokenizer, captions: list[str]) -> torch.Tensor:
    """int64 [N,L], L = 77."""
    return tokenizer(captions, padding="max_length", return_tensors="pt").input_ids


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python3 -m torch_trainer.make_demo_model",
        description="Train the demo's base model, a tiny Stable Diffusion, and write it in diffusers' layout.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--output_dir", type=Path, required=True, help="the folder to write")
    parser.add_argument("--seed", type=int, default=1000, help="of the circles, the weights and the training")
    parser.add_argument("--circles", type=int, default=20_000, help="circles to learn from")
    parser.add_argument("--test_circles", type=int, default=100, help="circles to measure with")
    parser.add_argument("--vae_steps", type=int, default=4_000, help="steps of the autoencoder, 16 circles each")
    parser.add_argument("--text_steps", type=int, default=1_500, help="steps of the text encoder, 64 captions each")
    parser.add_argument("--unet_steps", type=int, default=2_500, help="steps of UNet and text encoder, 64 circles each")
    return parser.parse_args()


if __name__ == "__main__":
    main()
