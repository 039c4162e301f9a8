"""Which members of a WebDataset sample are its image, its condition and its caption.

webdataset splits a member's name at the first dot of its last path component: `0001.image.png` is the key `0001` with
the extension `image.png`. Extensions compare in lower case.
"""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass

from shared.data.sample import RawSample, captions_of

IMAGE_ENDINGS = ("png", "jpg", "jpeg", "webp", "bmp", "tif", "tiff", "ppm")
_IMAGE_NAMES = ("image", "target")
_CONDITIONING_NAMES = ("conditioning_image", "conditioning", "condition", "cond", "source")
_CAPTION_NAMES = ("text", "caption", "prompt")

_MEMBER = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)")
_META = re.compile(r"__[^/]*__($|/)")


@dataclass(frozen=True)
class ShardKeys:
    """Extensions that may hold each part, best first."""

    image: tuple[str, ...]
    conditioning_image: tuple[str, ...]
    caption: tuple[str, ...]

    def find(self, extensions: Iterable[str]) -> tuple[str | None, str | None, str | None]:
        """The extension of (image, conditioning image, caption) among those of one sample, None for a missing one."""
        present = set(extensions)
        wanted = (self.image, self.conditioning_image, self.caption)
        image, conditioning, caption = (next((e for e in choice if e in present), None) for choice in wanted)
        return image, conditioning, caption

    def check(self, extensions: Iterable[str], where: str) -> None:
        """ValueError naming the extensions of the first sample when one of the three parts is not among them."""
        seen = sorted(extensions)
        flags = ("--shards_image_key", "--shards_conditioning_key", "--shards_caption_key")
        missing = [flag for flag, found in zip(flags, self.find(seen), strict=True) if found is None]
        if missing:
            raise ValueError(
                f"the first sample of {where} has the keys {', '.join(seen)}, among which no image, conditioning image "
                f"and caption could be told; set {', '.join(missing)} to the right ones"
            )


def shard_keys(image: str | None, conditioning_image: str | None, caption: str | None) -> ShardKeys:
    """The keys to look for: those given (alternatives separated by ";", as webdataset writes them), else the usual.

    By default the image is `image.<ending>`, `target.<ending>` or plain `<ending>`; the condition `<name>.<ending>`
    with a name such as conditioning_image, cond, source; the caption `text.txt`, `caption.txt`, `txt`, `json`, ….
    """
    return ShardKeys(
        _given(image) or (*_with_endings(_IMAGE_NAMES, IMAGE_ENDINGS), *IMAGE_ENDINGS),
        _given(conditioning_image) or _with_endings(_CONDITIONING_NAMES, IMAGE_ENDINGS),
        _given(caption) or (*_with_endings(_CAPTION_NAMES, ("txt", "json")), "txt", "json"),
    )


def split_member(name: str) -> tuple[str, str] | None:
    """(key, extension) as webdataset splits a member's name, None for members it leaves out."""
    match = None if _META.match(name) else _MEMBER.fullmatch(name)
    return (match[1], match[2].lower()) if match else None


def raw_sample(
    name: str, image: bytes | None, conditioning_image: bytes | None, caption: tuple[str, bytes] | None
) -> RawSample:
    """The sample of three members' contents; the caption comes with its extension."""
    captions, defect = _captions(*caption) if caption else ((), "")
    return RawSample(image, conditioning_image, captions, name, defect)


def _given(key: str | None) -> tuple[str, ...]:
    return tuple(part.strip().lower() for part in key.split(";")) if key else ()


def _with_endings(names: tuple[str, ...], endings: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(extension for name in names for extension in (*(f"{name}.{ending}" for ending in endings), name))


def _captions(extension: str, content: bytes) -> tuple[tuple[str, ...], str]:
    try:
        text = content.decode("utf-8")
        if extension.rsplit(".", 1)[-1] != "json":
            return (text.strip(),), ""
        value = json.loads(text)
    except ValueError as error:
        return (), f"its caption (.{extension}) cannot be read: {error}"
    if isinstance(value, dict):
        value = next((value[key] for key in _CAPTION_NAMES if key in value), None)
    return captions_of(value), ""
