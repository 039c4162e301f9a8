"""The second phase: a text encoder that has learnt which colours its captions name, before any UNet listens to it.

Stable Diffusion's text encoder is trained before its UNet as well (CLIP, Radford et al. 2021). Denoising alone teaches
colour names slowly: only under the strongest noise does the caption say anything that the picture does not.

Axes: N captions, B batch, L tokens, D features.
"""

import logging

import torch
from transformers import CLIPTextConfig, CLIPTextModel

from shared.data.sources.circles import Circle
from torch_trainer.make_demo_model.schedule import one_cycle

logger = logging.getLogger("make_demo_model")

_BATCH_SIZE = 64
_LEARNING_RATE = 2e-3
_LOG_EVERY = 100
_CONFIG = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
}


def train_text_encoder(
    input_ids_NL: torch.Tensor, truths: list[Circle], vocabulary_size: int, steps: int, seed: int
) -> CLIPTextModel:
    """A text encoder whose hidden states say, linearly, the colours of circle and background.

    Args:
        input_ids_NL: the captions of `truths`, by the tokenizer of `tokenizer.py`: its last tokens are start and end.
    """
    torch.manual_seed(seed)
    start, end = vocabulary_size - 2, vocabulary_size - 1
    text_encoder = CLIPTextModel(
        CLIPTextConfig(vocab_size=vocabulary_size, bos_token_id=start, eos_token_id=end, pad_token_id=end, **_CONFIG)
    )
    colours_N6 = torch.tensor([[*truth.colour, *truth.background] for truth in truths]) / 127.5 - 1.0
    to_colours = torch.nn.Linear(text_encoder.config.hidden_size, colours_N6.shape[1])
    parameters = [*text_encoder.parameters(), *to_colours.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=_LEARNING_RATE, weight_decay=0.0)
    schedule = one_cycle(optimizer, steps)
    for step in range(1, steps + 1):
        chosen_B = torch.randint(len(truths), (_BATCH_SIZE,))
        hidden_states_BLD = text_encoder(input_ids_NL[chosen_B]).last_hidden_state
        loss = torch.nn.functional.mse_loss(to_colours(hidden_states_BLD.mean(dim=1)), colours_N6[chosen_B])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step % _LOG_EVERY == 0 or step == steps:
            logger.info("Text encoder step %d: colours' mean squared error %.5f", step, loss.item())
    return text_encoder
