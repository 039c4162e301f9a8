"""The built-in demo: either entry point without flags. It needs no network, no data and no accelerator."""

from pathlib import Path

# Made for this demo; see its README.md.
BASE_MODEL = Path(__file__).parents[1] / "demo_model"


def demo_arguments() -> list[str]:
    """The command line that trains a ControlNet to put circles where outlines say, in the colours that captions say."""
    return [
        *("--pretrained_model_name_or_path", str(BASE_MODEL)),
        *("--generated_circles", "16384", "--resolution", "64"),
        *("--train_batch_size", "8", "--max_train_steps", "740"),
        # Found by trials: docs/training_recipes.md.
        *("--learning_rate", "2e-3", "--lr_scheduler", "linear", "--lr_warmup_steps", "50"),
        *("--adam_beta2", "0.95", "--max_grad_norm", "0.1"),
        *("--num_evaluation_samples", "32", "--evaluation_fidelity", "circles"),
        *("--validation_steps", "370", "--guidance_scale", "2"),
        *("--output_dir", "runs/demo/{timestamp}"),
    ]
