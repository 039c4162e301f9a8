"""The command lines of diffusers' ControlNet guides, of its port to MindSpore, and of the blog post "Train your
ControlNet with diffusers".

https://github.com/huggingface/diffusers/blob/main/examples/controlnet/README.md and README_sdxl.md,
https://github.com/huggingface/diffusers/blob/main/docs/source/en/training/controlnet.md,
https://huggingface.co/blog/train-your-controlnet,
https://github.com/mindspore-lab/mindone/blob/master/examples/diffusers/controlnet/README_sdxl.md (the commands of its
README.md and docs/diffusers/training/controlnet.md are diffusers'). What follows the script's name, with $MODEL_DIR and
the like replaced by the values that the guides give them.
"""

_PAIRS = [
    *("--validation_image", "./conditioning_image_1.png", "./conditioning_image_2.png"),
    *("--validation_prompt", "red circle with blue background", "cyan circle with brown floral background"),
]
_FILL50K = [
    *("--pretrained_model_name_or_path=stable-diffusion-v1-5/stable-diffusion-v1-5", "--output_dir=path to save model"),
    *("--dataset_name=fusing/fill50k", "--resolution=512", "--learning_rate=1e-5", *_PAIRS),
]
_WITHOUT_RATE = [word for word in _FILL50K if word != "--learning_rate=1e-5"]
FACES = "multimodalart/facesyntheticsspigacaptioned"
_BLOG = [
    *("--pretrained_model_name_or_path=stabilityai/stable-diffusion-2-1-base", "--output_dir=model_out"),
    *(f"--dataset_name={FACES}", "--conditioning_image_column=spiga_seg", "--image_column=image"),
    *("--caption_column=image_caption", "--resolution=512", "--learning_rate=1e-5", "--validation_image"),
    *("./face_landmarks1.jpeg", "./face_landmarks2.jpeg", "./face_landmarks3.jpeg", "--validation_prompt"),
    "High-quality close-up dslr photo of man wearing a hat with trees in the background",
    "Girl smiling, professional dslr photograph, dark background, studio lights, high quality",
    "Portrait of a clown face, oil on canvas, bittersweet expression",
    *("--train_batch_size=4", "--num_train_epochs=3", "--tracker_project_name=controlnet"),
    *("--enable_xformers_memory_efficient_attention", "--checkpointing_steps=5000", "--validation_steps=5000"),
    *("--report_to", "wandb", "--push_to_hub"),
]
_SDXL = [
    "--pretrained_model_name_or_path=stabilityai/stable-diffusion-xl-base-1.0",
    *("--dataset_name=fusing/fill50k", "--mixed_precision=fp16", "--learning_rate=1e-5", *_PAIRS),
    *("--validation_steps=100", "--train_batch_size=1"),
]
_ACCUMULATE = ["--train_batch_size=1", "--gradient_accumulation_steps=4"]
_LOW_MEMORY = ["--gradient_checkpointing", "--enable_xformers_memory_efficient_attention", "--set_grads_to_none"]

XL_COMMANDS = {
    "SDXL": [
        *(*_SDXL, "--output_dir=path to save model", "--resolution=1024", "--max_train_steps=15000"),
        *("--gradient_accumulation_steps=4", "--report_to=wandb", "--seed=42", "--push_to_hub"),
    ],
    "SDXL, 24 GB": [
        *(*_SDXL, "--resolution=512", "--max_train_steps=15000"),
        *("--gradient_accumulation_steps=4", "--report_to=wandb", "--seed=1337", "--push_to_hub"),
    ],
    "SDXL, MindONE": [
        *(*_SDXL, "--output_dir=path to save model", "--resolution=1024", "--max_train_steps=60000", "--seed=42"),
    ],
}
TORCH_COMMANDS = {
    "first": [*_FILL50K, "--train_batch_size=4"],
    "accumulation": [*_FILL50K, *_ACCUMULATE],
    "to the hub": [*_FILL50K, *_ACCUMULATE, "--push_to_hub"],
    "many GPUs": [
        *_FILL50K,
        *("--train_batch_size=4", "--mixed_precision=fp16", "--tracker_project_name=controlnet-demo"),
        "--report_to=wandb",
    ],
    "16 GB": [*_FILL50K, *_ACCUMULATE, "--gradient_checkpointing", "--use_8bit_adam"],
    "12 GB": [*_FILL50K, *_ACCUMULATE, "--use_8bit_adam", *_LOW_MEMORY],
    "8 GB": [*_WITHOUT_RATE, *_ACCUMULATE, *_LOW_MEMORY, "--mixed_precision", "fp16"],
    "blog": _BLOG,
    "blog, 16 GB": [*_BLOG, *_ACCUMULATE, "--gradient_checkpointing", "--use_8bit_adam"],
    "blog, 12 GB": [*_BLOG, *_ACCUMULATE, "--gradient_checkpointing", "--use_8bit_adam", "--set_grads_to_none"],
    **XL_COMMANDS,
}
FLAX_COMMANDS = {
    "fill50k": [
        *(*_FILL50K, "--validation_steps=1000", "--train_batch_size=2", "--revision=non-ema", "--from_pt"),
        *("--report_to=wandb", "--tracker_project_name=controlnet-fill-circle", "--num_train_epochs=11"),
        *("--push_to_hub", "--hub_model_id=controlnet-fill-circle"),
    ],
    "streaming": [
        "--pretrained_model_name_or_path=stable-diffusion-v1-5/stable-diffusion-v1-5",
        *("--output_dir=runs/uncanny-faces-{timestamp}", f"--dataset_name={FACES}"),
        *("--streaming", "--conditioning_image_column=spiga_seg", "--image_column=image"),
        *("--caption_column=image_caption", "--resolution=512", "--max_train_samples", "100000"),
        *("--learning_rate=1e-5", "--train_batch_size=1", "--revision=flax", "--report_to=wandb"),
        "--tracker_project_name=controlnet-uncanny-faces",
    ],
    "checkpoints": [*_FILL50K, "--checkpointing_steps=500", "--controlnet_model_name_or_path=./control_out/500"],
    "Min-SNR": [*_FILL50K, "--snr_gamma=5.0"],
}
