"""Makes the demo's base model, `shared/demo_model`: a tiny Stable Diffusion that draws coloured circles.

`python3 -m torch_trainer.make_demo_model --output_dir … --seed …`
"""
