"""Tars whose headers say what their author wants them to say."""

import bz2
import gzip
import lzma
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from tests.hostile.case import FORGED, Case
from tests.hostile.mutations.binary import mutated_bytes, random_bytes
from tests.hostile.mutations.values import hostile_text, pick

_BLOCK = 512
_END = bytes(2 * _BLOCK)
_NAMES = (
    f"0001\n{FORGED}.image.png",
    f"\x1b[31m{FORGED}.image.png",
    "/etc/0001.image.png",
    "../../outside/0001.image.png",
    "0001",
    ".image.png",
    "__meta__/0001.image.png",
    "a/b/c/0001.image.png",
    "0001.IMAGE.PNG",
    "0001.image.png.exe",
    "0001..image.png",
    "\udcff\udc80.image.png",
    "0001.",
    "0001.__key__",
    "0001.__url__",
    "n" * 99,
    "0001.json",
    "",
)


@dataclass(frozen=True)
class Member:
    """A member and, where they lie, what its header says of its size, kind and checksum."""

    name: str
    content: bytes = b""
    kind: bytes = b"0"
    link: str = ""
    size_field: bytes | None = None
    checksum_is_right: bool = True
    magic: bytes = b"ustar\x0000"

    def encoded(self) -> bytes:
        padding = bytes(-len(self.content) % _BLOCK)
        return self._header() + self.content + padding

    def _header(self) -> bytes:
        size = self.size_field if self.size_field is not None else b"%011o\x00" % len(self.content)
        fields = (
            (self.name.encode("utf-8", "surrogateescape"), 100),
            (b"0000644\x00", 8),
            (b"0000000\x00", 8),
            (b"0000000\x00", 8),
            (size, 12),
            (b"00000000000\x00", 12),
            (b" " * 8, 8),
            (self.kind, 1),
            (self.link.encode("utf-8", "surrogateescape"), 100),
            (self.magic, 8),
            (b"", 247),
        )
        header = bytearray(b"".join(value[:width].ljust(width, b"\x00") for value, width in fields))
        header[148:156] = b"%06o\x00 " % (sum(header) + (not self.checksum_is_right))
        return bytes(header)


def encoded(members: Iterable[Member]) -> bytes:
    return b"".join(member.encoded() for member in members) + _END


def pax(**values: str | bytes) -> Member:
    """An extended header for the member that follows."""
    return Member("PaxHeaders/x", b"".join(_pax_line(key, value) for key, value in values.items()), kind=b"x")


def _pax_line(key: str, value: str | bytes) -> bytes:
    text = value if isinstance(value, bytes) else value.encode("utf-8", "surrogatepass")
    body = b" " + key.encode() + b"=" + text + b"\n"
    length = len(body)
    while len(str(length)) + len(body) != length:
        length = len(str(length)) + len(body)
    return str(length).encode() + body


def long_name(name: bytes, kind: bytes = b"L") -> Member:
    return Member("././@LongLink", name + b"\x00", kind=kind)


def mutated_tar(case: Case, samples: list[list[Member]]) -> tuple[str, bytes]:
    """A tar of these samples with something wrong in it: what, in words, and the file."""
    name, mutate = pick(case, _MUTATIONS)
    return name, mutate(case, [list(sample) for sample in samples])


PACKINGS: tuple[tuple[str, Callable[[bytes], bytes]], ...] = (
    (".gz", gzip.compress),
    (".bz2", bz2.compress),
    (".xz", lzma.compress),
)


def compressed(case: Case, content: bytes) -> tuple[str, bytes]:
    """Its ending, and the tar compressed, now and then with more in it or less."""
    ending, pack = pick(case, PACKINGS)
    packed = pack(content)
    if case.chance(0.3):
        packed = pick(
            case,
            (
                lambda: mutated_bytes(case, packed),
                lambda: packed[: case.below(len(packed))],
                lambda: packed + packed,
                lambda: packed + random_bytes(case, 1000),
                lambda: pack(packed),
            ),
        )()
    return ending, packed


def swelling_gzip(beginning: bytes, gigabytes: int) -> bytes:
    """A `.gz` of some bytes and then gigabytes of zeros, in a megabyte per gigabyte."""
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    head = packer.compress(beginning) + packer.flush(zlib.Z_FULL_FLUSH)
    block = packer.compress(bytes(2**24)) + packer.flush(zlib.Z_FULL_FLUSH)
    return head + block * (gigabytes * 64) + packer.flush(zlib.Z_FINISH)


def _members(samples: list[list[Member]]) -> list[Member]:
    return [member for sample in samples for member in sample]


def _with_member(make: Callable[[Case, Member], Iterable[Member]]) -> Callable[[Case, list[list[Member]]], bytes]:
    """One member replaced by others."""

    def mutate(case: Case, samples: list[list[Member]]) -> bytes:
        members = _members(samples)
        chosen = case.below(len(members))
        return encoded([*members[:chosen], *make(case, members[chosen]), *members[chosen + 1 :]])

    return mutate


def _with_size(field: bytes) -> Callable[[Case, Member], list[Member]]:
    return lambda case, member: [Member(member.name, member.content, size_field=field)]


def _of_kind(kind: bytes, link: Callable[[Case, Member], str]) -> Callable[[Case, Member], list[Member]]:
    return lambda case, member: [Member(member.name, kind=kind, link=link(case, member))]


def _without(part: int) -> Callable[[Case, list[list[Member]]], bytes]:
    def mutate(case: Case, samples: list[list[Member]]) -> bytes:
        del samples[case.below(len(samples))][part]
        return encoded(_members(samples))

    return mutate


def _shuffled(case: Case, samples: list[list[Member]]) -> bytes:
    members = _members(samples)
    order = case.rng.permutation(len(members))
    return encoded(members[index] for index in order)


def _sparse(case: Case, member: Member) -> list[Member]:
    """GNU's format of a file of holes, as PAX spells it."""
    size = pick(case, ("1000000000000", "100", "-1", "x"))
    content = b"1\n0\n10\n".ljust(_BLOCK, b"\x00") + member.content
    return [
        pax(
            **{
                "GNU.sparse.major": "1",
                "GNU.sparse.minor": "0",
                "GNU.sparse.name": member.name,
                "GNU.sparse.realsize": size,
            }
        ),
        Member("GNUSparseFile.0/" + member.name, content),
    ]


def _many(case: Case, samples: list[list[Member]]) -> bytes:
    return encoded([*_members(samples), *(Member(f"{index}.text.txt", b"x") for index in range(30_000))])


_MUTATIONS: tuple[tuple[str, Callable[[Case, list[list[Member]]], bytes]], ...] = (
    ("tar mutated", lambda case, samples: mutated_bytes(case, encoded(_members(samples)))),
    ("tar mutated", lambda case, samples: mutated_bytes(case, encoded(_members(samples)))),
    ("tar cut", lambda case, samples: (content := encoded(_members(samples)))[: case.below(len(content))]),
    ("tar without its end", lambda case, samples: encoded(_members(samples))[: -len(_END)]),
    ("tar and another", lambda case, samples: encoded(_members(samples)) * 2),
    ("tar after a zero block", lambda case, samples: bytes(_BLOCK) + encoded(_members(samples))),
    ("empty tar", lambda case, samples: _END),
    ("tar of thousands", _many),
    ("members shuffled", _shuffled),
    ("sample without its picture", _without(0)),
    ("sample without its condition", _without(1)),
    ("sample without its caption", _without(2)),
    ("member twice", _with_member(lambda case, member: [member, member])),
    ("member again after others", _with_member(lambda case, member: [member, Member("x.text.txt", b"x"), member])),
    ("member of another name", _with_member(lambda case, member: [Member(pick(case, _NAMES), member.content)])),
    ("member of another name", _with_member(lambda case, member: [Member(pick(case, _NAMES), member.content)])),
    (
        "member of a long name",
        _with_member(lambda case, member: [long_name(hostile_text(case).encode("utf-8", "surrogatepass")), member]),
    ),
    (
        "member of a huge name",
        _with_member(lambda case, member: [Member("././@LongLink", b"", b"L", size_field=b"77777777777\x00"), member]),
    ),
    ("link of a huge name", _with_member(lambda case, member: [long_name(b"x" * 10**6, b"K"), member])),
    ("PAX size of 10^12", _with_member(lambda case, member: [pax(size=str(10**12)), member])),
    (
        "PAX size of 10^12 of itself",
        _with_member(
            lambda case, member: [
                Member("PaxHeaders/x", b"30 size=1\n", b"x", size_field=b"\x80" + (10**12).to_bytes(11, "big")),
                member,
            ]
        ),
    ),
    (
        "global PAX size of 10^12",
        _with_member(
            lambda case, member: [
                Member("PaxHeaders/x", b"30 size=1\n", b"g", size_field=b"\x80" + (10**12).to_bytes(11, "big")),
                member,
            ]
        ),
    ),
    ("PAX size negative", _with_member(lambda case, member: [pax(size="-1000"), member])),
    ("PAX size no number", _with_member(lambda case, member: [pax(size="x"), member])),
    ("PAX name", _with_member(lambda case, member: [pax(path=hostile_text(case)[:5000]), member])),
    ("PAX name with NUL", _with_member(lambda case, member: [pax(path="0001\x00.image.png"), member])),
    ("PAX without numbers", _with_member(lambda case, member: [Member("x", b"xx path=a\n", b"x"), member])),
    ("PAX of zero length", _with_member(lambda case, member: [Member("x", b"0 path=a\n", b"x"), member])),
    ("PAX of many lines", _with_member(lambda case, member: [Member("x", b"10 a=bcde\n" * 200_000, b"x"), member])),
    (
        "PAX alone at the end",
        lambda case, samples: b"".join(m.encoded() for m in _members(samples)) + pax(path="x").encoded(),
    ),
    ("PAX after PAX", _with_member(lambda case, member: [*[pax(path="x.text.txt")] * 3000, member])),
    ("size beyond the file", _with_member(_with_size(b"77777777777\x00"))),
    ("size of 2^90", _with_member(_with_size(b"\x80" + (2**85).to_bytes(11, "big")))),
    ("size negative", _with_member(_with_size(b"\xff" * 12))),
    ("size a little negative", _with_member(_with_size(b"\xff" * 10 + b"\xfe\x00"))),
    ("size no number", _with_member(_with_size(b"xxxxxxxxxxx\x00"))),
    ("size zero", _with_member(_with_size(b"00000000000\x00"))),
    (
        "checksum wrong",
        _with_member(lambda case, member: [Member(member.name, member.content, checksum_is_right=False)]),
    ),
    ("magic wrong", _with_member(lambda case, member: [Member(member.name, member.content, magic=b"xxxxxxxx")])),
    ("sparse member", _with_member(_sparse)),
    ("sparse member of old", _with_member(lambda case, member: [Member(member.name, member.content, b"S")])),
    ("symbolic link out", _with_member(_of_kind(b"2", lambda case, member: str(case.outside / "private.png")))),
    ("symbolic link to itself", _with_member(_of_kind(b"2", lambda case, member: member.name))),
    ("hard link out", _with_member(_of_kind(b"1", lambda case, member: str(case.outside / "private.png")))),
    ("hard link to nothing", _with_member(_of_kind(b"1", lambda case, member: "nowhere"))),
    ("device", _with_member(_of_kind(b"3", lambda case, member: ""))),
    ("pipe", _with_member(_of_kind(b"6", lambda case, member: ""))),
    ("folder", _with_member(_of_kind(b"5", lambda case, member: ""))),
    ("contiguous member", _with_member(lambda case, member: [Member(member.name, member.content, b"7")])),
    ("unknown kind", _with_member(lambda case, member: [Member(member.name, member.content, b"Z")])),
)
