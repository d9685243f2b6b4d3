"""Damaged and malicious artifacts raise a clear error, without much memory and without code."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import os
import random
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from test_artifact import assert_equal, contents, small_artifact

from qdiff_engine.runtime import artifact_config, tensor_file
from qdiff_engine.runtime.artifact import FILES, ArtifactError, load_artifact, save_artifact

CONFIG, GRAPH, MODEL = "config.json", "graph.json", "model.safetensors"


@pytest.fixture(autouse=True)
def no_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    """What these tests do to a process does not need the disk to be waited for."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a valid artifact."""
    folder = tmp_path_factory.mktemp("good") / "a"
    save_artifact(small_artifact(), folder)
    return contents(folder)


def write(folder: Path, data: dict[str, bytes]) -> Path:
    """Write the files of an artifact, whatever they hold."""
    folder.mkdir(exist_ok=True)
    for name, content in data.items():
        (folder / name).write_bytes(content)
    return folder


def resealed(data: dict[str, bytes], config: Any = None) -> dict[str, bytes]:
    """The same files with the digests made right again, as a stranger with bad intentions would."""
    config = json.loads(data[CONFIG]) if config is None else copy.deepcopy(config)
    config.pop("sha256", None)
    digests = {name: hashlib.sha256(data[name]).hexdigest() for name in (GRAPH, MODEL)}
    text = (json.dumps(config, sort_keys=True, indent=2, separators=(",", ": ")) + "\n").encode()
    with contextlib.suppress(ValueError):  # where it has no canonical form, the reader must say so itself
        text = artifact_config.seal(config, digests)
    return {**data, CONFIG: text}


def refused(folder: Path) -> str:
    """Load, which must fail with a message of one line that is no traceback in disguise; returns it."""
    with pytest.raises((ValueError, OSError)) as caught:
        load_artifact(folder)
    message = str(caught.value)
    assert message and "\n" not in message and len(message) < 1000, message
    return message


def _flip(data: bytes, rng: random.Random) -> bytes:
    out = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 16])):
        out[rng.randrange(len(out))] ^= 1 << rng.randrange(8)
    return bytes(out)


DAMAGE: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "flip": _flip,
    "truncate": lambda data, rng: data[: rng.randrange(len(data))],
    "extend": lambda data, rng: data + rng.randbytes(rng.randrange(1, 100)),
    "random": lambda data, rng: rng.randbytes(rng.randrange(2 * len(data))),
    "zeros": lambda data, rng: bytes(len(data)),
    "cut": lambda data, rng: data[: (at := rng.randrange(len(data)))] + data[at + 1 + rng.randrange(50) :],
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", [CONFIG, GRAPH, MODEL])
def test_damage(tmp_path: Path, good: dict[str, bytes], name: str, damage: str) -> None:
    """Twenty damaged copies of each file, with the digests as they were: every one is noticed, and names a file."""
    rng = random.Random(f"{name} {damage}")
    for _ in range(20):
        damaged = DAMAGE[damage](good[name], rng)
        if damaged != good[name]:
            assert name in refused(write(tmp_path / "a", {**good, name: damaged}))


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", [GRAPH, MODEL])
def test_damage_with_digests_made_right(tmp_path: Path, good: dict[str, bytes], name: str, damage: str) -> None:
    """The deeper checks see the damage: an error, or an artifact that is valid in itself."""
    rng = random.Random(f"resealed {name} {damage}")
    for _ in range(20):
        data = resealed({**good, name: DAMAGE[damage](good[name], rng)})
        load_or_refuse(write(tmp_path / "a", data), tmp_path)


def load_or_refuse(folder: Path, scratch: Path) -> str:
    """Either a clear error, which is returned, or an artifact that can be saved and loaded again."""
    try:
        artifact = load_artifact(folder)
    except (ValueError, OSError) as error:
        message = str(error)
        assert message and "\n" not in message and len(message) < 1000, message
        assert isinstance(error, OSError) or any(name in message for name in FILES), message
        return message
    save_artifact(artifact, scratch / "again")
    assert_equal(load_artifact(scratch / "again"), artifact)
    return ""


@pytest.mark.parametrize("swap", [(CONFIG, GRAPH), (CONFIG, MODEL), (GRAPH, MODEL)])
def test_swapped_files(tmp_path: Path, good: dict[str, bytes], swap: tuple[str, str]) -> None:
    a, b = swap
    data = {**good, a: good[b], b: good[a]}
    assert refused(write(tmp_path / "a", data)).startswith(CONFIG if CONFIG in swap else GRAPH)
    if CONFIG not in swap:
        assert refused(write(tmp_path / "a", resealed(data))).startswith(GRAPH)


@pytest.mark.parametrize("name", [CONFIG, GRAPH, MODEL])
def test_files_of_two_artifacts(tmp_path: Path, good: dict[str, bytes], name: str) -> None:
    """A file of another valid artifact is noticed too."""
    save_artifact(small_artifact(1, rows=6), tmp_path / "b")
    data = {**good, name: contents(tmp_path / "b")[name]}
    if data != good:
        assert "model.safetensors" in refused(write(tmp_path / "a", data))


@pytest.mark.parametrize("name", [CONFIG, GRAPH])
def test_another_spelling_is_refused(tmp_path: Path, good: dict[str, bytes], name: str) -> None:
    """The same values with other white space: what is not in canonical form is not what was saved."""
    data = {**good, name: json.dumps(json.loads(good[name]), indent=1).encode()}
    assert "canonical form" in refused(write(tmp_path / "a", data if name == CONFIG else resealed(data)))


@pytest.mark.parametrize("name", [CONFIG, GRAPH, MODEL])
def test_missing_and_strange_files(tmp_path: Path, good: dict[str, bytes], name: str) -> None:
    """Missing, a folder, a pipe without a writer, an endless device, a link to nothing: no hang, and the file named."""
    folder = write(tmp_path / "a", good)
    path = folder / name
    path.unlink()
    assert refused(folder).startswith(f"{name}: the file is missing")
    makers: list[Callable[[], Any]] = [
        path.mkdir,
        lambda: os.mkfifo(path),
        lambda: path.symlink_to("/dev/zero"),
        lambda: path.symlink_to("nothing"),
    ]
    for make in makers:
        make()
        assert name in refused(folder)
        path.rmdir() if path.is_dir() else path.unlink()


def _places(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """Paths of every value inside nested dicts and lists."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*path, key)
        yield from _places(inner, (*path, key))


NASTY: list[Any] = [None, True, False, 0, 1, -1, 2, 4.0, 1e300, -0.0, 2**31, 2**63 - 1, 2**63, 2**64 - 1, 2**70, [], {}]
NASTY += [
    "",
    "x",
    "A4",
    "%q0",
    "%",
    "$freqs",
    "$",
    "B",
    "0B",
    "٣B",
    "999999999B",
    "../../etc/passwd",
    "\ud800",
    "a" * 300,
]
NASTY += [[[]], [1, 2], [2**40, 2**40], [0, 0], [1] * 100, {"a": 1}, {"dtype": "float32"}, {"dtype": []}]
NASTY += [{"float": "inf"}, {"float": []}, [[[[[[[1]]]]]]], float("nan"), float("inf"), "group:²", "eval", "int8"]


def _mutate(value: Any, rng: random.Random) -> Any:
    """A copy of nested JSON with one place replaced, removed, copied over, renamed, repeated or nudged."""
    value = copy.deepcopy(value)
    places = list(_places(value))
    *parents, last = rng.choice(places)
    parent = value
    for key in parents:
        parent = parent[key]
    action = rng.choice(["replace", "replace", "replace", "remove", "copy", "rename", "repeat", "nudge"])
    if action == "remove":
        del parent[last]
    elif action == "copy":
        source: Any = value
        for key in rng.choice(places):
            source = source[key]
        parent[last] = copy.deepcopy(source)
    elif action == "rename" and isinstance(parent, dict):
        parent[rng.choice([s for s in NASTY if isinstance(s, str)])] = parent.pop(last)
    elif action == "repeat" and isinstance(parent, list):
        parent.insert(rng.randrange(len(parent) + 1), copy.deepcopy(parent[last]))
    elif action == "nudge" and type(parent[last]) in (int, float):
        parent[last] += rng.choice([-1, 1])
    else:
        parent[last] = copy.deepcopy(rng.choice(NASTY))
    return value


def test_mutated_config(tmp_path: Path, good: dict[str, bytes]) -> None:
    """Valid JSON with right digests and wrong values, of any type and anywhere."""
    rng = random.Random(1)
    config = json.loads(good[CONFIG])
    outcomes = [
        load_or_refuse(write(tmp_path / "a", resealed(good, _mutate(config, rng))), tmp_path) for _ in range(300)
    ]
    assert sum(map(bool, outcomes)) > 150
    assert len({message[:25] for message in outcomes}) > 15


def test_mutated_graph(tmp_path: Path, good: dict[str, bytes]) -> None:
    rng = random.Random(2)
    graph = json.loads(good[GRAPH])
    outcomes = []
    for _ in range(300):
        data = {**good, GRAPH: canonical_graph(_mutate(graph, rng))}
        outcomes.append(load_or_refuse(write(tmp_path / "a", resealed(data)), tmp_path))
    assert sum(map(bool, outcomes)) > 150
    assert len({message[:25] for message in outcomes}) > 15


def canonical_graph(graph: Any) -> bytes:
    """The form in which a graph is stored, for a graph that may be broken."""
    try:
        nodes = ",\n".join("  " + json.dumps(node) for node in graph["nodes"])
        rest = {key: json.dumps(graph[key]) for key in ("inputs", "output")}
        extra = "".join(
            f',\n "{k}": {json.dumps(v)}' for k, v in graph.items() if k not in ("inputs", "nodes", "output")
        )
    except (KeyError, TypeError):
        return json.dumps(graph).encode()
    text = f'{{\n "inputs": {rest["inputs"]},\n "nodes": [\n{nodes}\n ],\n "output": {rest["output"]}{extra}\n}}\n'
    return text.encode("utf-8", "surrogatepass")


def test_mutated_tensors(tmp_path: Path, good: dict[str, bytes]) -> None:
    """Values out of range, other types and shapes, tensors missing and added, with right digests."""
    rng = random.Random(3)
    original = safetensors.torch.load(good[MODEL])
    outcomes = []
    for _ in range(300):
        tensors = {name: tensor.clone() for name, tensor in original.items()}
        name = rng.choice(sorted(tensors))
        tensors[name] = _mutate_tensor(tensors[name], rng)
        action = rng.randrange(12)
        if action == 0:
            del tensors[name]
        elif action == 1:
            tensors[rng.choice(["extra", "weight.out.q1", "constant.", "table.scale2"])] = tensors[name].clone()
        elif action == 2:
            tensors[rng.choice(sorted(tensors))] = tensors[name].clone()
        data = resealed({**good, MODEL: safetensors.torch.save(tensors)})
        outcomes.append(load_or_refuse(write(tmp_path / "a", data), tmp_path))
    assert sum(map(bool, outcomes)) > 150


def _mutate_tensor(tensor: torch.Tensor, rng: random.Random) -> torch.Tensor:
    kind = rng.randrange(5)
    if kind == 0:
        return tensor.to(rng.choice([torch.float32, torch.float16, torch.int8, torch.uint8, torch.int32, torch.bool]))
    if kind == 1:
        return tensor.flatten()
    if kind == 2:
        return torch.cat([tensor, tensor])
    values = [float("nan"), float("inf"), 0.0, -1.0, 1e-44] if tensor.is_floating_point() else [-128, 127, 255, 100, 0]
    if tensor.dtype != torch.bool:
        value = torch.tensor(rng.choice(values)).to(tensor.dtype)
        tensor.view(-1)[rng.randrange(tensor.numel())] = value
    return tensor


VALUES = {
    "table.scale": ([float("nan"), float("inf"), 0.0, -1.0, 1e-44], "table.scale must be"),
    "table.bits": ([0, 5, 255], "table.bits must be"),
    "table.zero_point": ([-129, 128, 2**31 - 1], "table.zero_point must lie"),
    "table.output_scale": ([float("nan"), float("inf")], "table.output_scale must be finite"),
    "table.output_shift": ([float("nan"), float("-inf")], "table.output_shift must be finite"),
    "weight.out.scale0": ([float("nan"), float("inf"), 0.0, -1.0], "weight.out.q0 and .scale0: scale must be"),
    "weight.up.0.conv.q0": ([-128], "weight.up.0.conv.q0 and .scale0: values must lie"),
    "weight.out.q0": ([255], "padded with 0"),
    "constant.freqs": ([float("nan")], "constant.freqs holds NaN"),
}


@pytest.mark.parametrize("name", VALUES)
def test_one_bad_value(tmp_path: Path, good: dict[str, bytes], name: str) -> None:
    """The message names model.safetensors, the tensor and the rule."""
    values, message = VALUES[name]
    for value in values:
        tensors = safetensors.torch.load(good[MODEL])
        tensors["table.bits"].fill_(8)
        tensors[name].view(-1)[-1] = value
        found = refused(write(tmp_path / "a", resealed({**good, MODEL: safetensors.torch.save(tensors)})))
        assert found.startswith(f"{MODEL}: ") and message in found


FIELDS: dict[str, tuple[Callable[[dict], Any], str]] = {
    "newer": (lambda c: c.update(schema_version=2), "'schema_version' must be 1, got '2'"),
    "boolean version": (lambda c: c.update(schema_version=True), "'schema_version' must be 1"),
    "no version": (lambda c: c.pop("schema_version"), "'schema_version' must be 1"),
    "unknown": (lambda c: c.update(postscript=1), "field 'postscript' is unknown"),
    "missing": (lambda c: c.pop("plan"), "field 'plan' is missing"),
    "type": (lambda c: c.update(sites={}), "field 'sites' must be of type list"),
    "recipe": (lambda c: c["recipe"].update(weight_bits=3), "field 'recipe': weight_bits must be one of"),
    "recipe field": (lambda c: c["recipe"].update(colour=3), "field 'recipe': recipe has no field 'colour'"),
    "mode": (lambda c: c["plan"][1].update(mode="A5"), r"field 'plan'\[1\].mode must be one of"),
    "order": (lambda c: c["plan"].reverse(), "plan: timesteps must be strictly descending"),
    "empty plan": (lambda c: c.update(plan=[]), "field 'plan' has no rows"),
    "row": (lambda c: c["plan"].pop(), "table.* must be"),
    "site": (lambda c: c["sites"].__setitem__(0, "nowhere"), "no node reads the site 'nowhere'"),
    "bits": (lambda c: c["weights"]["out"][0].update(bits=5), "weights of 'out', segment 0: bits must be 4 or 8"),
    "shape": (lambda c: c["weights"]["out"][0].update(shape=[6, 9]), "tensor 'weight.out.q0' must be"),
    "huge": (lambda c: c["weights"]["out"][0].update(shape=[2**31, 2**31]), "must hold sizes of a tensor"),
    "constant": (lambda c: c["constants"].pop("mask"), "tensor 'constant.mask' is not expected"),
    "dtype": (lambda c: c["constants"]["mask"].update(dtype="object"), "dtype must be one of"),
}


@pytest.mark.parametrize("case", FIELDS)
def test_one_bad_field(tmp_path: Path, good: dict[str, bytes], case: str) -> None:
    """The message names the file and the field."""
    change, message = FIELDS[case]
    config = json.loads(good[CONFIG])
    change(config)
    with pytest.raises(ArtifactError, match=message) as caught:
        load_artifact(write(tmp_path / "a", resealed(good, config)))
    assert any(name in str(caught.value) for name in FILES)


TEXTS = {
    "deep": (b"[" * 100_000 + b"]" * 100_000, "deeper than"),
    "deep objects": (b'{"a":' * 60_000 + b"1" + b"}" * 60_000, "deeper than"),
    "rather deep": (b"[" * 50 + b"]" * 50, "deeper than"),
    "twice": (b'{"schema_version": 1, "schema_version": 1}', "'schema_version' is given twice"),
    "NaN": (b'{"a": NaN}', "NaN is not"),
    "infinity": (b'{"a": 1e999}', "finite"),
    "long integer": (b'{"a": ' + b"9" * 1_000_000 + b"}", "digits"),
    "long fraction": (b'{"a": 0.' + b"9" * 1_000_000 + b"}", "digits"),
    "wide integer": (b'{"a": 18446744073709551616}', "64 bits"),
    "not UTF-8": (b'{"a": "\xff\xfe"}', "utf-8"),
    "byte order mark": (b"\xef\xbb\xbf{}", "BOM"),
    "UTF-16": ('{"a": 1}'.encode("utf-16"), "utf-8"),
    "nothing": (b"", "Expecting value"),
    "a list": (b"[]", "must"),
    "a number": (b"1", "must"),
    "many values": (b"[" + b"[]," * 5_000_000 + b"[]]", "holds more than"),
}


@pytest.mark.parametrize("name", [CONFIG, GRAPH, MODEL])
@pytest.mark.parametrize("case", TEXTS)
def test_hostile_json(tmp_path: Path, good: dict[str, bytes], case: str, name: str) -> None:
    """In each of the three places where JSON is read, without much memory."""
    text, message = TEXTS[case]
    content = len(text).to_bytes(8, "little") + text if name == MODEL else text
    data = {**good, name: content}
    folder = write(tmp_path / "a", data if name == CONFIG else resealed(data))
    tracemalloc.start()
    try:
        found = refused(folder)
        assert tracemalloc.get_traced_memory()[1] < 5 * len(content) + 2**20
    finally:
        tracemalloc.stop()
    assert found.startswith(f"{name}: ") and message in found


@pytest.mark.parametrize("name,size", [(CONFIG, 16 * 2**20 + 1), (GRAPH, 64 * 2**20 + 1)])
def test_oversized_json(tmp_path: Path, good: dict[str, bytes], name: str, size: int) -> None:
    folder = write(tmp_path / "a", good)
    os.truncate(folder / name, size)
    tracemalloc.start()
    try:
        assert f"over the limit of {size - 1}" in refused(folder)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def _header(good: dict[str, bytes]) -> tuple[dict[str, Any], bytes]:
    length = int.from_bytes(good[MODEL][:8], "little")
    return json.loads(good[MODEL][8 : 8 + length]), good[MODEL][8 + length :]


@pytest.mark.parametrize("case", ["gap", "overlap", "reversed", "negative", "float", "huge", "text", "short", "shared"])
def test_bad_offsets(tmp_path: Path, good: dict[str, bytes], case: str) -> None:
    """Offsets that do not tile the file are refused, though names, types and shapes are right."""
    header, body = _header(good)
    entry = header["weight.out.q0"]
    first, last = entry["data_offsets"]
    entry["data_offsets"] = {
        "gap": [first + 1, last + 1],
        "overlap": [first - 1, last - 1],
        "reversed": [last, first],
        "negative": [-1, last],
        "float": [float(first), float(last)],
        "huge": [2**63 - 1, 2**63 - 1 + last - first],
        "text": [str(first), str(last)],
        "short": [first],
        "shared": header["table.scale"]["data_offsets"],
    }[case]
    text = json.dumps(header).encode()
    data = {**good, MODEL: len(text).to_bytes(8, "little") + text + body}
    assert "data_offsets" in refused(write(tmp_path / "a", resealed(data)))


def test_memory_is_bounded_by_the_file(tmp_path: Path, good: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    """Config and header agree on a terabyte: refused before anything is allocated."""
    config, (header, body) = json.loads(good[CONFIG]), _header(good)
    shape = [2**20, 2**18]
    config["constants"]["freqs"] = {"dtype": "float32", "shape": shape}
    header["constant.freqs"] = {"dtype": "F32", "shape": shape, "data_offsets": [0, 2**40]}
    for name, entry in header.items():
        if name != "constant.freqs":
            entry["data_offsets"] = [o - 64 + 2**40 for o in entry["data_offsets"]]
    text = json.dumps(header).encode()
    data = {**good, MODEL: len(text).to_bytes(8, "little") + text + body}
    folder = write(tmp_path / "a", resealed(data, config))
    monkeypatch.setattr(tensor_file.torch, "empty", lambda *a, **k: pytest.fail("allocated"))
    assert "truncated" in refused(folder)


@pytest.mark.parametrize("length", [0, 7, 8, 2**20, 2**40, 2**64 - 1])
def test_header_length(tmp_path: Path, good: dict[str, bytes], length: int) -> None:
    content = length.to_bytes(8, "little") + good[MODEL][8:] if length > 8 else good[MODEL][:length]
    assert refused(write(tmp_path / "a", resealed({**good, MODEL: content}))).startswith(MODEL)
