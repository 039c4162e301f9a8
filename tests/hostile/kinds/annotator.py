"""Hostile models that make conditions and captions, in transformers' layout, at work on two circles."""

import json

import transformers.pipelines  # noqa: F401 (in the warm process, for its children)

from tests.hostile.case import Case
from tests.hostile.kinds import originals
from tests.hostile.mutations.binary import malicious_pickle, malicious_torch_zip
from tests.hostile.mutations.places import copy_tree, files_in, mutate_file, plant
from tests.hostile.mutations.values import pick
from tests.hostile.signs import signs_in_files
from tests.hostile.watched import Attempt
from torch_trainer.prepare_data import captions, depth, segmentation  # noqa: F401 (as above)
from torch_trainer.prepare_data.command import main

_KINDS = ("depth", "segmentation", "captions")
_HONEST = 0.1


def build(case: Case) -> Attempt:
    """One file of a model is another, or code lies beside it."""
    kind = pick(case, _KINDS)
    folder = copy_tree(originals() / kind, case.inputs / "model")
    is_honest = case.chance(_HONEST)
    what = "nothing"
    if not is_honest:
        what = _with_code(case) if case.chance(0.2) else mutate_file(case, pick(case, files_in(folder)))
        if case.chance(0.1):
            what += f", {plant(case, folder)}"
    words = [
        "--generated_circles",
        "2",
        "--resolution",
        "32",
        "--num_workers",
        "0",
        "--output_dir",
        str(case.out / "s"),
    ]
    if kind == "captions":
        words = ["caption", *words, "--captioner_model", str(folder)]
    else:
        words = ["annotate", *words, "--condition", kind, "--annotator_model", str(folder)]
    return Attempt(f"{kind}: {what}", lambda: main(words), lambda: signs_in_files(case, case.out), is_honest=is_honest)


def _with_code(case: Case) -> str:
    """What some loaders run."""
    folder = case.inputs / "model"
    (folder / "code.py").write_text(f"import os\nos.mkdir({str(case.executed)!r})\n")
    if case.chance(0.4):
        (folder / "model.safetensors").unlink()
        pickled = malicious_pickle(case) if case.chance(0.5) else malicious_torch_zip(case)
        (folder / "pytorch_model.bin").write_bytes(pickled)
        return "a pickle in place of its weights"
    path = pick(case, [path for path in files_in(folder) if path.suffix == ".json"])
    classes = (
        "AutoConfig",
        "AutoModel",
        "AutoModelForDepthEstimation",
        "AutoImageProcessor",
        "AutoProcessor",
        "AutoTokenizer",
    )
    settings = json.loads(path.read_text()) | {"auto_map": dict.fromkeys(classes, "code.Code")}
    if case.chance(0.5):
        settings |= {"model_type": "unknown", "tokenizer_class": "Code", "image_processor_type": "Code"}
    path.unlink()  # a hard link to the original
    path.write_text(json.dumps(settings))
    return f"code named by {path.name}"
