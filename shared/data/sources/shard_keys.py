"""Which members of a WebDataset sample are its image, its condition and its caption.

webdataset splits a member's name at the first dot of its last path component: `0001.image.png` is the key `0001` with
the extension `image.png`. Extensions compare in lower case.
"""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import msgspec

from shared.data.sample import NO_CAPTIONS, BadSampleError, RawSample, captions_of
from shared.data.sources.json_lines import Text, text_of
from shared.untrusted import MIB, shown
from shared.untrusted.pictures import LARGEST_FILE
from shared.untrusted.text import decoded
from shared.user_errors import UserError

IMAGE_ENDINGS = ("png", "jpg", "jpeg", "webp", "bmp", "tif", "tiff", "ppm")
_IMAGE_NAMES = ("image", "target")
_CONDITIONING_NAMES = ("conditioning_image", "conditioning", "condition", "cond", "source")
_CAPTION_NAMES = ("text", "caption", "prompt")

MOST_MEMBERS = 10_000
"""Of one sample, of which a few matter."""

_MOST_LISTED, _LONGEST_LISTED = 30, 60  # in a message

_LARGEST_CAPTION = 16 * MIB  # a JSON caption may come with much else about its picture

_MEMBER = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)")
_decode_object = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_META = re.compile(r"__[^/]*__($|/)")


@dataclass(frozen=True)
class ShardKeys:
    """Extensions that may hold each part, best first; none of captions where those are not asked for."""

    image: tuple[str, ...]
    conditioning_images: tuple[tuple[str, ...], ...]
    caption: tuple[str, ...]

    @property
    def columns(self) -> list[list[str]]:
        """Those of each part in the order of `find`."""
        return [list(self.image), *map(list, self.conditioning_images), list(self.caption)]

    def find(self, extensions: Iterable[str]) -> list[str | None]:
        """The extensions of image, conditions and caption among those of one sample, None for a missing one."""
        present = set(extensions)
        return [next((extension for extension in choice if extension in present), None) for choice in self.columns]

    def wants(self, extension: str) -> bool:
        """Whether a member with this extension may be a part of its sample."""
        return extension in self.caption or self._is_picture(extension)

    def too_large(self, extension: str, size: int) -> str:
        """Why a member of that size is left unread, empty where it is not."""
        if size <= (LARGEST_FILE if self._is_picture(extension) else _LARGEST_CAPTION):
            return ""
        return f"its member .{shown(extension)} has {size:,} bytes, more than any honest one"

    def check(self, extensions: Iterable[str], where: str) -> None:
        """UserError naming the extensions of the first sample when one of its parts is not among them."""
        seen = sorted(extensions)
        listed = ", ".join(shown(extension, _LONGEST_LISTED) for extension in seen[:_MOST_LISTED])
        conditions = ["--shards_conditioning_key"] * len(self.conditioning_images)
        flags = ("--shards_image_key", *conditions, "--shards_caption_key")
        wanted = zip(flags, self.columns, self.find(seen), strict=True)
        missing = dict.fromkeys(flag for flag, choice, found in wanted if choice and found is None)
        if missing:
            raise UserError(
                f"the first sample of {where} has the keys {listed}, among which no image, conditioning image "
                f"and caption could be told; set {', '.join(missing)} to the right ones"
            )

    def _is_picture(self, extension: str) -> bool:
        return any(extension in choice for choice in (self.image, *self.conditioning_images))


def shard_keys(image: str | None, conditioning_images: Sequence[str] | None, caption: str | None) -> ShardKeys:
    """The keys to look for: those given (alternatives separated by ";", as webdataset writes them), else the usual.

    By default the image is `image.<ending>`, `target.<ending>` or plain `<ending>`; the condition, of which there
    is one, `<name>.<ending>` with a name such as conditioning_image, cond, source; the caption `text.txt`,
    `caption.txt`, `txt`, `json`, …. `NO_CAPTIONS` stands for none.
    """
    usual = (*_with_endings(_CAPTION_NAMES, ("txt", "json")), "txt", "json")
    return ShardKeys(
        _given(image) or (*_with_endings(_IMAGE_NAMES, IMAGE_ENDINGS), *IMAGE_ENDINGS),
        tuple(map(_given, conditioning_images or ())) or (_with_endings(_CONDITIONING_NAMES, IMAGE_ENDINGS),),
        () if caption == NO_CAPTIONS else _given(caption) or usual,
    )


def condition_members(count: int) -> tuple[str, ...]:
    """The extensions of the conditions of a sample in shards that are made here."""
    return ("conditioning_image.png",) if count == 1 else tuple(f"conditioning_image_{n + 1}.png" for n in range(count))


def split_member(name: str) -> tuple[str, str] | None:
    """(key, extension) as webdataset splits a member's name, None for members it leaves out."""
    match = None if _META.match(name) else _MEMBER.fullmatch(name)
    return (match[1], match[2].lower()) if match else None


def raw_sample(
    name: str, image: bytes | None, conditioning_images: Sequence[bytes | None], caption: tuple[str, bytes] | None
) -> RawSample:
    """The sample of its members' contents; the caption comes with its extension."""
    captions, defect = _captions(*caption) if caption else ((), "")
    return RawSample(image, tuple(conditioning_images), captions, name, defect)


def twice(shard: object, name: str) -> UserError:
    """The error of a shard that holds a member twice."""
    return UserError(f"{shown(shard)} holds {shown(name)!r} twice; write each member of a sample once")


def _given(key: str | None) -> tuple[str, ...]:
    return tuple(part.strip().lower() for part in key.split(";")) if key else ()


def _with_endings(names: tuple[str, ...], endings: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(extension for name in names for extension in (*(f"{name}.{ending}" for ending in endings), name))


def _captions(extension: str, content: bytes) -> tuple[tuple[str, ...], str]:
    try:
        text = decoded(content)
    except UnicodeDecodeError as error:
        return (), f"its caption (.{shown(extension)}) cannot be read: {error}"
    if extension.rsplit(".", 1)[-1] != "json":
        return (text.strip(),), ""
    try:
        return captions_of(_caption_in(text)), ""
    except BadSampleError as error:
        return (), str(error)
    except (ValueError, RecursionError) as error:
        return (), f"its caption (.{shown(extension)}) cannot be read: {shown(error)}"


def _caption_in(text: str) -> Text:
    """The caption in a JSON text: the text itself, a list of texts, or what an object has under a usual name."""
    try:
        value = _decode_object(text)
    except msgspec.ValidationError:
        return text_of(msgspec.Raw(text))
    except msgspec.DecodeError:  # NaN, half a character
        value = json.loads(text)
        if not isinstance(value, dict):
            return text_of(value)
    return text_of(next((value[key] for key in _CAPTION_NAMES if key in value), None))
