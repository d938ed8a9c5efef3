"""Damage to files, by any source of random choices: `random.Random`, or Hypothesis's, which finds the smallest damage.

Bytes are damaged as disks and transfers damage them. Where a format has checksums or is compressed, that finds little
but the checksum; so the content is damaged too, and packed again as if it were meant so: fields of headers, tables,
elements of DICOM data sets, members of archives.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import math
import struct
import zipfile
import zlib
from collections.abc import Callable
from copy import deepcopy
from random import Random
from typing import Any

import nibabel as nib
import numpy as np
import pydicom
import torch
import yaml
from safetensors.torch import load, save

from medseg.bundle.checkpoint import FORMAT, FORMAT_KEY, JSON_KEY, with_digest

Damage = Callable[[bytes, Random], bytes]

WORDS = (b"", b"\0", b"\xff" * 4, b"\xff\xff\xff\x7f", b"\0\0\0\x80", b"\x80" * 8, b"nan", b"../../x", b"{" * 50, b"\n")
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2, 3.5, -0.0, 1e308, -1e308, 2**31, 2**63, -(2**63), 10**30, 1e-320),
    *("", " ", "0", "a", "../../etc/passwd", "/", "\0", "é\u202e", "nan", "1e5", "yes", "null", "a" * 5000, "${a}"),
    *([], [[]], {}, [0], [None], ["a", "a"], {"": ""}, {"a": {"b": [1, {"c": None}]}}, list(range(300))),
)
"""What stands in the place of another value of a table."""
NUMBERS = (0.0, -0.0, 1.0, -1.0, 0.5, 1e30, -1e30, 1e-30, math.nan, math.inf, -math.inf, 127.0, 32768.0, 2.0**31)


def damaged_bytes(data: bytes, rng: Random) -> bytes:
    """One to four changes: flipped bits, foreign words, pieces that are lost, doubled, zeroed or moved, a cut end."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        size = len(changed)
        # Headers decide most: half of the changes lie in the first bytes.
        place = rng.randint(0, min(size, 400)) if rng.random() < 0.5 else rng.randint(0, size)
        length = rng.choice((1, 2, 4, 8, 64, 1000))
        what = rng.randint(0, 6)
        if what == 0 and place < size:
            changed[place] ^= 1 << rng.randint(0, 7)
        elif what == 1 and place < size:
            changed[place] = rng.randint(0, 255)
        elif what == 2:
            word = rng.choice(WORDS)
            changed[place : place + len(word)] = word
        elif what == 3:
            del changed[place : place + length]
        elif what == 4:
            changed[place:place] = changed[place : place + length]
        elif what == 5:
            changed[place : place + length] = bytes(min(length, size - place))
        else:
            del changed[place:]
    return bytes(changed)


def damaged_gzip(data: bytes, rng: Random) -> bytes:
    """What is packed, as `damaged_nifti`, or the packed bytes."""
    if data[:2] != b"\x1f\x8b":
        return damaged_nifti(data, rng)
    if rng.random() < 0.3:
        return damaged_bytes(data, rng)
    return gzip.compress(damaged_nifti(gzip.decompress(data), rng), 1, mtime=0)


def damaged_nifti(data: bytes, rng: Random) -> bytes:
    """Fields of the header, or bytes."""
    kind = {348: nib.Nifti1Header, 540: nib.Nifti2Header}.get(int.from_bytes(data[:4], "little"))
    if kind is None or rng.random() < 0.3:
        return damaged_bytes(data, rng)
    size = kind.template_dtype.itemsize
    header = np.frombuffer(data[:size], dtype=kind.template_dtype.newbyteorder("<")).copy()
    for _ in range(rng.randint(1, 3)):
        field = rng.choice([name for name in header.dtype.names if name != "sizeof_hdr"])
        values = header[field].reshape(-1)
        if values.dtype.kind == "S":
            header[field] = rng.choice(WORDS)
        else:
            with np.errstate(all="ignore"):
                values[rng.randrange(len(values))] = np.array(rng.choice(NUMBERS)).astype(values.dtype)
            header[field] = values.reshape(header[field].shape)
    return header.tobytes() + data[size:]


def damaged_png(data: bytes, rng: Random) -> bytes:
    """A chunk whose checksum is right again, lost or doubled; or bytes, of PNG and of other pictures."""
    if not data.startswith(b"\x89PNG") or rng.random() < 0.4:
        return damaged_bytes(data, rng)
    chunks, place = [], 8
    while place < len(data):
        (length,) = struct.unpack(">I", data[place : place + 4])
        chunks.append((data[place + 4 : place + 8], data[place + 8 : place + 8 + length]))
        place += 12 + length
    index = rng.randrange(len(chunks))
    name, content = chunks[index]
    what = rng.randint(0, 3)
    if what == 0:
        del chunks[index]
    elif what == 1:
        chunks.insert(index, chunks[rng.randrange(len(chunks))])
    else:
        chunks[index] = (name, damaged_bytes(content, rng))
    packed = [
        struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
        for name, content in chunks
    ]
    return data[:8] + b"".join(packed)


def damaged_value(table: Any, rng: Random) -> Any:
    """A copy of a table in which one to three values are others, lost, doubled, or stand in another's place."""
    table = {"root": deepcopy(table)}
    for _ in range(rng.randint(1, 3)):
        places = _places(table)
        group, key = rng.choice(places)
        what = rng.randint(0, 5)
        if what <= 2:
            group[key] = deepcopy(rng.choice(VALUES))
        elif what == 3 and group is not table:
            del group[key]
        elif what == 4:
            other, from_key = rng.choice(places)
            group[key] = deepcopy(other[from_key])
        elif isinstance(group, dict) and group is not table:
            group[str(rng.choice(VALUES))[:40]] = group.pop(key)
        elif isinstance(group, list):
            group.insert(key, deepcopy(group[key]))
    return table["root"]


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Everything in a table: the list or dictionary that holds it, and its key there."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    found = [(value, key) for key in keys]
    return found + [place for key in keys for place in _places(value[key])]


def damaged_json(data: bytes, rng: Random) -> bytes:
    """A value of the table, text, or lists without end."""
    if rng.random() < 0.25:
        return damaged_text(data, rng)
    return json.dumps(damaged_value(json.loads(data), rng)).encode("utf-8", "surrogatepass")


def damaged_lines(data: bytes, rng: Random) -> bytes:
    """JSON of one line among others."""
    lines = data.splitlines(keepends=True)
    index = rng.randrange(len(lines))
    return b"".join([*lines[:index], damaged_json(lines[index], rng) + b"\n", *lines[index + 1 :]])


def damaged_yaml(data: bytes, rng: Random) -> bytes:
    """A value of the table, text, aliases that grow, tags, or lists without end."""
    what = rng.random()
    if what < 0.2:
        return damaged_text(data, rng)
    if what < 0.3:
        bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n"
        bomb += "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12))
        return data + bomb.encode()
    if what < 0.4:
        lines = data.decode().splitlines()
        place = rng.randrange(len(lines))
        tag = rng.choice(("!!python/object/apply:os.system [true]", "!!float x", "!!int", "!!timestamp 2020-13-41",
                          "!!binary =", "!!set {a}", "!!omap [1]", "!!pairs [1]", "? [a]\n: b", "<<: 1", "2020-13-01",
                          '"\\UFFFFFFFF"', "!!bool maybe", "!unknown x", "&a *a", "${oc.env:HOME}", "${a"))  # fmt: skip
        lines[place] = lines[place].split(":")[0] + ": " + tag
        return "\n".join(lines).encode()
    return yaml.safe_dump(damaged_value(yaml.safe_load(data), rng)).encode("utf-8", "surrogatepass")


def damaged_text(data: bytes, rng: Random) -> bytes:
    """Bytes, or brackets without end."""
    if rng.random() < 0.2:
        place, depth = rng.randint(0, len(data)), rng.choice((70, 1200, 100_000))
        return data[:place] + rng.choice((b"[", b'{"a":', b"{a: ")) * depth + data[place:]
    return damaged_bytes(data, rng)


def damaged_csv(data: bytes, rng: Random) -> bytes:
    """A cell, a line, or bytes."""
    what = rng.randint(0, 3)
    if what == 0:
        return damaged_text(data, rng)
    lines = [line.split(b",") for line in data.splitlines()]
    line = rng.choice(lines)
    if what == 1:
        line[rng.randrange(len(line))] = str(rng.choice(VALUES)).encode("utf-8", "surrogatepass")
    elif what == 2:
        line[rng.randrange(len(line))] = b'"' + b"x" * rng.choice((3, 200_000)) + rng.choice((b'"', b""))
    else:
        lines.append(lines[rng.randrange(len(lines))])
    return b"\n".join(b",".join(line) for line in lines) + b"\n"


def damaged_checkpoint(data: bytes, rng: Random) -> bytes:
    """What a stranger can make: tensors or description are others, and the digest is right."""
    if rng.random() < 0.3:
        return damaged_safetensors(data, rng)
    (size,) = struct.unpack("<Q", data[:8])
    text = json.loads(data[8 : 8 + size])["__metadata__"][JSON_KEY]
    tensors = load(data)
    for _ in range(rng.randint(0, 2)):
        name = rng.choice(sorted(tensors))
        what = rng.randint(0, 5)
        if what == 0:
            del tensors[name]
        elif what == 1:
            tensors[str(rng.choice(VALUES))[:40]] = tensors.pop(name)
        elif what == 2:
            tensors[name] = tensors[name].reshape(-1).clone()
        elif what == 3:
            tensors[name] = tensors[name].to(rng.choice((torch.int64, torch.float16, torch.bool)))
        elif what == 4:
            tensors[name] = torch.full_like(tensors[name], rng.choice((0, 1, -1)))
        else:
            tensors[f"{name.partition('.')[0]}.{rng.choice(('', '0', 'x.y', '-1.step', '9999.exp_avg'))}"] = torch.ones(
                3
            )
    if rng.random() < 0.7:
        text = damaged_json(text.encode(), rng).decode("utf-8", "replace")
    return save(tensors, with_digest(tensors, {JSON_KEY: text, FORMAT_KEY: str(FORMAT)}))


def damaged_safetensors(data: bytes, rng: Random) -> bytes:
    """The table at the beginning, or bytes."""
    (size,) = struct.unpack("<Q", data[:8])
    if rng.random() < 0.4:
        return damaged_bytes(data, rng)
    table = json.loads(data[8 : 8 + size])
    if rng.random() < 0.5 and "__metadata__" in table:  # the trainer's own table
        key = rng.choice(sorted(table["__metadata__"]))
        value = table["__metadata__"][key].encode()
        damage = damaged_json if value.startswith((b"{", b"[")) else damaged_text
        table["__metadata__"][key] = damage(value, rng).decode("utf-8", "replace")
        text = json.dumps(table).encode()
    else:
        text = damaged_json(data[8 : 8 + size], rng)
    return struct.pack("<Q", len(text)) + text + data[8 + size :]


def damaged_zip(data: bytes, rng: Random, inside: Damage = damaged_bytes) -> bytes:
    """Bytes of the archive, or content or name of one member."""
    if rng.random() < 0.4:
        return damaged_bytes(data, rng)
    written = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as archive, zipfile.ZipFile(written, "w", zipfile.ZIP_DEFLATED) as target:
        names = archive.namelist()
        victim = rng.choice(names)
        for name in names:
            content = archive.read(name)
            if name != victim:
                target.writestr(name, content)
            elif rng.random() < 0.3:
                target.writestr(rng.choice(("../x", "/x", "a\\..\\..\\x", "x" * 300, "..", "a/", "CON")), content)
            else:
                target.writestr(name, inside(content, rng))
    return written.getvalue()


def damaged_model(data: bytes, rng: Random) -> bytes:
    """A bundle's zip: bytes, names, or the content of a member, whose size and SHA-256 may stand in the manifest."""
    if rng.random() < 0.3:
        return damaged_zip(data, rng)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    victim = rng.choice(sorted(members))
    members[victim] = damaged_member(victim, members[victim], rng)
    if victim != "manifest.json" and rng.random() < 0.7:  # as a stranger would
        manifest = json.loads(members["manifest.json"])
        content = members[victim]
        manifest["files"][victim] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        members["manifest.json"] = json.dumps(manifest).encode()
    written = io.BytesIO()
    with zipfile.ZipFile(written, "w", zipfile.ZIP_DEFLATED) as target:
        for name, content in members.items():
            target.writestr(name, content)
    return written.getvalue()


def damaged_member(name: str, data: bytes, rng: Random) -> bytes:
    """A file of a bundle, by the ending of its name."""
    ending = name.rpartition(".")[2]
    return {"json": damaged_json, "yaml": damaged_yaml, "safetensors": damaged_checkpoint}.get(ending, damaged_text)(
        data, rng
    )


def damaged_dicom(data: bytes, rng: Random) -> bytes:
    """Elements of the data set, at any depth, or bytes."""
    if rng.random() < 0.35:
        return damaged_bytes(data, rng)
    dataset = pydicom.dcmread(io.BytesIO(data))
    for _ in range(rng.randint(1, 3)):
        _damage_element(dataset, rng)
    written = io.BytesIO()
    try:
        dataset.save_as(written, enforce_file_format=True)
    except Exception:  # pydicom refuses to write some values; what it writes is of interest here
        return damaged_bytes(data, rng)
    return written.getvalue()


TEXTS = (
    "",
    "0",
    "-1",
    "nan",
    "inf",
    "1e40",
    "0\\0",
    "1\\2\\3\\4\\5\\6\\7",
    "x",
    "é",
    "9" * 16,
    "0.0\\-0.0\\1",
    "ORIGINAL",
)


def _damage_element(dataset: pydicom.Dataset, rng: Random) -> None:
    elements = [element for element in dataset if element.tag.group != 2]
    if not elements:
        return
    element = rng.choice(elements)
    if element.VR == "SQ":
        items = list(element.value)
        what = rng.randint(0, 4)
        if items and what <= 2:
            _damage_element(rng.choice(items), rng)
        elif items and what == 3:
            del element.value[rng.randrange(len(items))]
        elif items:
            element.value.append(deepcopy(rng.choice(items)))
        return
    if rng.random() < 0.2:
        del dataset[element.tag]
        return
    with np.errstate(all="ignore"):
        try:
            _set_value(element, rng)
        except Exception:  # pydicom checks some values when they are set
            del dataset[element.tag]


def _set_value(element: pydicom.DataElement, rng: Random) -> None:
    if element.VR in ("US", "SS", "UL", "SL", "UV", "SV"):
        element.value = rng.choice((0, 1, 2, 3, 7, 8, 16, 255, 32767, 65535))
    elif element.VR in ("FD", "FL"):
        element.value = rng.choice(NUMBERS)
    elif element.VR in ("OB", "OW", "UN", "OF", "OD"):
        element.value = damaged_bytes(bytes(element.value or b""), rng)
    elif element.VR == "AT":
        element.value = rng.choice((0x0020_0032, 0, 0xFFFF_FFFF))
    else:
        text = rng.choice(TEXTS)
        current = element.value
        if element.VR in ("DS", "IS") and not isinstance(current, str) and hasattr(current, "__len__") and len(current):
            values = [str(v) for v in current]
            values[rng.randrange(len(values))] = text
            text = "\\".join(values)
        # As text that a file holds, not as numbers that pydicom would check
        element._value = text if element.VR not in ("DS", "IS") else _Raw(text)


class _Raw(str):
    """A text that is written as it is, in the place of numbers."""

    original_string: str

    def __new__(cls, text: str) -> _Raw:
        self = super().__new__(cls, text)
        self.original_string = text
        return self
