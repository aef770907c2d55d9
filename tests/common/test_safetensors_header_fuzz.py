"""Whatever bytes a header holds: a Header that the safetensors library accepts too, or a UserError."""

import json
import random
import time

import pytest
import safetensors

from library.common.errors import UserError
from library.common.safetensors_header import MAX_HEADER_BYTES, Header, parse_header, read_header

ODD_VALUES = [
    None, True, -1, 0, 1, 2**31, 2**63, 2**64, 10**400, 1.5, 1e308, float("nan"), float("inf"), "", "F32", "f32", "BF16", "Q4",
    "\ud800", [], [0], [-1], [2**62, 2**62, 2**62], [[]], [0, 4], [4, 0], [0, 2**63], {}, {"dtype": "F32"}, [1] * 70,
]  # fmt: skip


def file_bytes(header: object, data_bytes: int = 0) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(data_bytes)


def sample_header() -> dict:
    tensors, position = {"__metadata__": {"format": "pt", "title": "tëst"}}, 0
    for index, (dtype, width) in enumerate([("F32", 4), ("BF16", 2), ("F8_E4M3", 1), ("I64", 8), ("F16", 2)]):
        size = 3 * (index + 1) * width
        tensors[f"block.{index}.weight"] = {
            "dtype": dtype,
            "shape": [3, index + 1],
            "data_offsets": [position, position + size],
        }
        position += size
    tensors["empty"] = {"dtype": "F32", "shape": [0, 7], "data_offsets": [position, position]}
    return tensors


def mutated(rng: random.Random) -> bytes:
    """A whole small file: a valid one with one to three random faults in its header's structure or bytes."""
    header = sample_header()
    for _ in range(rng.randint(0, 2)):
        entry = rng.choice([value for value in header.values() if isinstance(value, dict)] or [header])
        if entry and rng.random() < 0.8:
            key = rng.choice(list(entry))
            inner = entry[key]
            if isinstance(inner, list) and inner and rng.random() < 0.5:
                inner[rng.randrange(len(inner))] = rng.choice(ODD_VALUES)
            elif rng.random() < 0.2:
                del entry[key]
            else:
                entry[key] = rng.choice(ODD_VALUES)
        else:
            header[rng.choice(["x", "block.1.weight", "__metadata__", "\udfff"])] = rng.choice(ODD_VALUES)
    text = bytearray(json.dumps(header).encode())
    for _ in range(rng.choice([0, 0, 0, 1, 1, 2, 5])):
        place = rng.randrange(len(text) + 1)
        kind = rng.randrange(4)
        if kind == 0 and place < len(text):
            text[place] = rng.randrange(256)
        elif kind == 1:
            del text[place : place + rng.randint(1, 20)]
        elif kind == 2:
            start = rng.randrange(len(text) + 1)
            text[place:place] = text[start : start + rng.randint(1, 60)]
        else:
            text[place:place] = rng.choice(
                [b" ", b"[" * 3000, b"9" * 5000, b'"', b"-", b"\x00", b"1e9", b"{}", b"\xff\xfe"]
            )
        text = text or bytearray(b"{")
    whole = bytearray(file_bytes(bytes(text), rng.choice([159, 159, 159, 0, 7, 200])))
    if rng.random() < 0.15:
        whole[rng.randrange(8)] = rng.randrange(256)
    if rng.random() < 0.1:
        del whole[rng.randrange(len(whole)) :]
    return bytes(whole)


def test_10000_mutated_headers_give_nothing_but_usererror():
    rng, accepted, reasons = random.Random(0), 0, set()
    for _ in range(10_000):
        data = mutated(rng)
        try:
            header = parse_header(data, len(data), "model.safetensors")
        except UserError as error:
            text = error.as_text()
            assert text.startswith("model.safetensors") and len(text) < 600
            reasons.add(text[:60])
        else:
            accepted += 1
            names = {name for name, _ in safetensors.deserialize(data)}  # raises where the library would refuse
            assert header.tensors.keys() == names
    assert accepted > 300 and len(reasons) > 100


def test_a_valid_header_is_read_as_the_library_reads_it():
    data = file_bytes(sample_header(), 159)
    header = parse_header(data, len(data))
    reference = dict(safetensors.deserialize(data))
    assert header.metadata == {"format": "pt", "title": "tëst"}
    assert {k: (list(v.shape), v.dtype) for k, v in header.tensors.items()} == {
        k: (v["shape"], v["dtype"]) for k, v in reference.items()
    }


F32_4 = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        ({"a": F32_4, "b": {**F32_4, "data_offsets": [8, 24]}}, "overlaps"),
        ({"a": {**F32_4, "data_offsets": [4, 20]}}, "gap"),
        ({"a": {**F32_4, "data_offsets": [16, 0]}}, "does not fill"),
        ({"a": {**F32_4, "shape": [2, 3]}}, "does not fill"),
        ({"a": {**F32_4, "shape": [2, -2]}}, "impossible shape"),
        ({"a": {**F32_4, "shape": [2**62, 2**62]}}, "does not fill"),
        ({"a": {**F32_4, "shape": [2**80]}}, "impossible shape"),
        ({"a": {**F32_4, "shape": [float("nan")]}}, "NaN"),
        ({"a": {**F32_4, "shape": [4.0]}}, "impossible shape"),
        ({"a": {**F32_4, "dtype": "Q4_K"}}, "unknown dtype"),
        ({"a": {"dtype": "F32", "shape": [4]}}, "lacks"),
        ({"__metadata__": {"a": 1}}, "__metadata__"),
        ([], "not a JSON object"),
        (b'{"a": ' + json.dumps(F32_4).encode() + b', "a": ' + json.dumps(F32_4).encode() + b"}", "twice"),
        (b"{" + b"\xff" * 9, "UTF-8"),
        (b'{"a": ' + b"[" * 100_000, "nested"),
        (b'{"a": {"shape": [' + b"9" * 10_000 + b"]}}", "not valid JSON"),
        (b'{"\\ud800": ' + json.dumps(F32_4).encode() + b"}", "valid text"),
    ],
)
def test_each_fault_is_named(header, reason):
    data = file_bytes(header, 16)
    with pytest.raises(UserError, match=reason):
        parse_header(data, len(data))


@pytest.mark.parametrize(("data_bytes", "reason"), [(15, "cut short"), (17, "belong to no tensor")])
def test_the_files_length_must_be_what_the_header_says(data_bytes, reason):
    data = file_bytes({"a": F32_4}, data_bytes)
    with pytest.raises(UserError, match=reason):
        parse_header(data, len(data))


def test_a_huge_announced_header_is_refused_without_reading_it(tmp_path):
    path = tmp_path / "huge.safetensors"
    with path.open("wb") as file:  # a sparse file: 64 MiB by its length alone
        file.write((MAX_HEADER_BYTES + 1).to_bytes(8, "little"))
        file.truncate(2 * MAX_HEADER_BYTES)
    start = time.perf_counter()
    with pytest.raises(UserError, match="announce a header of"):
        read_header(path)
    assert time.perf_counter() - start < 0.5


def test_reading_from_disk_gives_the_same_header(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(file_bytes({"a": F32_4}, 16))
    header = read_header(path)
    assert isinstance(header, Header) and header.tensors["a"].shape == (2, 2)
    assert header.data_start == path.stat().st_size - 16
