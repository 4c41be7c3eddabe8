"""The model file: what is written comes back bit for bit, and nothing else is believed."""

import json
import struct

import pytest
import torch
from tests.surgery.nets import OptionAResNet, half, randomise
from torch import nn

from convette import surgery
from convette.errors import FileFormatError, UsageError
from convette.surgery import ModelCard, Origin, _compact

IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def build(origin):
    assert origin.constructor == "test:net"
    return OptionAResNet(**origin.arguments)


@pytest.fixture
def saved(tmp_path):
    torch.manual_seed(1)
    model = surgery.set_origin(randomise(OptionAResNet(blocks=1)), Origin("test:net", {"blocks": 1}))
    surgery.apply(model, surgery.trace(model, IMAGES).shrink(half(surgery.trace(model, IMAGES))))
    surgery.set_card(model, ModelCard(class_names=("a", "b"), history=({"step": "train", "loss": 0.5},)))
    path = tmp_path / "model.safetensors"
    surgery.save_model(model, path)
    return model, path


def rewrite(path, change):
    raw = path.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + length])
    content = json.loads(header["__metadata__"]["convette"])
    change(header, content)
    if "convette" in header.get("__metadata__", {}):
        header["__metadata__"]["convette"] = json.dumps(content)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])


def test_round_trip(saved):
    model, path = saved
    header = surgery.read_header(path)
    assert header.origin == Origin("test:net", {"blocks": 1})
    assert [edit.kind for edit in header.edits] == ["shrink"]
    assert header.card.class_names == ("a", "b") and header.size_bytes == path.stat().st_size
    again = surgery.load_model(path, build)
    assert not again.training and surgery.card_of(again) == surgery.card_of(model)
    with torch.no_grad():
        assert torch.equal(again(IMAGES), model(IMAGES))
    # A loaded model goes on: shrink, fold, save, load.
    surgery.apply(again, surgery.trace(again, IMAGES).shrink(half(surgery.trace(again, IMAGES), 1)))
    folded = surgery.fold(again, IMAGES)
    surgery.save_model(folded, path)
    last = surgery.load_model(path, build)
    assert [edit.kind for edit in surgery.structure_log(last).edits][:2] == ["shrink", "shrink"]
    assert not [m for m in last.modules() if isinstance(m, nn.BatchNorm2d)]
    with torch.no_grad():
        assert torch.equal(last(IMAGES), folded(IMAGES))


def test_half_precision_and_channels_last_come_back(saved, tmp_path):
    model, _ = saved
    model = model.to(torch.bfloat16).to(memory_format=torch.channels_last)
    surgery.save_model(model, tmp_path / "half.safetensors")
    again = surgery.load_model(tmp_path / "half.safetensors", build)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]) and tensor.dtype == again.state_dict()[name].dtype


def test_shared_tensors_are_written_once(tmp_path):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
            self.b.weight = self.a.weight

    model = surgery.set_origin(Tied(), Origin("test:tied"))
    path = tmp_path / "tied.safetensors"
    surgery.save_model(model, path)
    assert dict(surgery.read_header(path).shared) == {"b.weight": "a.weight"}
    again = surgery.load_model(path, lambda origin: Tied())
    assert again.a.weight is again.b.weight and torch.equal(again.a.weight, model.a.weight)


def test_unknown_origin_is_not_saved(tmp_path):
    with pytest.raises(UsageError, match="set_origin"):
        surgery.save_model(nn.Linear(2, 2), tmp_path / "x.safetensors")
    assert not (tmp_path / "x.safetensors").exists()


def _cut_index(header, content):
    content["edits"][0]["indices"][0] = [[0, 9999]]


def _backwards(header, content):
    content["edits"][0]["indices"][0] = [[5, 2]]


def _huge_run(header, content):
    content["edits"][0]["indices"][0] = [[0, 1 << 40]]


def _attribute(header, content):
    content["edits"][0]["attributes"]["layer1"] = {"training": 5}


def _private(header, content):
    content["edits"][0]["attributes"].setdefault("conv1", {})["_version"] = 5


def _text_attribute(header, content):
    content["edits"][0]["attributes"].setdefault("conv1", {})["out_channels"] = "os.system"


def _kind(header, content):
    content["edits"][0]["kind"] = "execute"


def _no_edits(header, content):
    content["edits"] = []


def _no_origin(header, content):
    del content["origin"]


def _bad_origin(header, content):
    content["origin"] = {"constructor": 5}


def _format(header, content):
    content["format"] = 99


def _no_metadata(header, content):
    del header["__metadata__"]


def _unknown_parameter(header, content):
    content["edits"][0]["kept"]["nowhere.weight"] = {"0": 0}


def _dim(header, content):
    name = next(iter(content["edits"][0]["kept"]))
    content["edits"][0]["kept"][name] = {"7": 0}


def _card(header, content):
    content["card"] = {"class_names": "abc"}


def _shared(header, content):
    content["shared"] = {"conv1.weight": "nothing"}


def _renamed(header, content):
    header["other"] = header.pop("conv1.weight")


TAMPERED = [
    _cut_index, _backwards, _huge_run, _attribute, _private, _text_attribute, _kind, _no_edits, _no_origin, _bad_origin,
    _format, _no_metadata, _unknown_parameter, _dim, _card, _shared, _renamed,
]  # fmt: skip


@pytest.mark.parametrize("change", TAMPERED, ids=lambda change: change.__name__)
def test_tampered_files_are_refused_in_one_line(saved, change):
    _, path = saved
    rewrite(path, change)
    with pytest.raises(FileFormatError) as caught:
        surgery.load_model(path, build)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"abc",
        b"PK\x03\x04" + bytes(100),
        b"\x80\x02}q\x00." + bytes(100),
        struct.pack("<Q", 1 << 60) + b"{}",
        struct.pack("<Q", 1 << 20) + b"{}",
        struct.pack("<Q", 4) + b"\xff\xfe\xfd\xfc",
        struct.pack("<Q", 4) + b"[1]\n",
        struct.pack("<Q", 200_000) + b"[" * 200_000,
    ],
    ids=["empty", "short", "zip", "pickle", "huge header", "cut header", "no text", "no object", "deep"],
)
def test_other_files_are_refused(tmp_path, raw):
    path = tmp_path / "model.safetensors"
    path.write_bytes(raw)
    with pytest.raises(FileFormatError) as caught:
        surgery.read_header(path)
    assert str(path) in str(caught.value)


def test_cut_and_missing_files(saved):
    _, path = saved
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(FileFormatError):
        surgery.load_model(path, build)
    with pytest.raises(UsageError, match="no such file"):
        surgery.read_header(path.with_name("gone.safetensors"))


def test_a_failed_write_leaves_the_old_file(saved, monkeypatch):
    import safetensors.torch

    model, path = saved
    before = path.read_bytes()

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(Exception, match="no space left"):
        surgery.save_model(model, path)
    assert path.read_bytes() == before and [item.name for item in path.parent.iterdir()] == [path.name]


def test_a_layer_that_asks_which_version_wrote_its_state_loads(tmp_path):
    class Versioned(nn.Linear):
        _version = 3

        def _load_from_state_dict(self, state_dict, prefix, local_metadata, *rest):
            if local_metadata.get("version") != 3:
                raise ValueError("no version")
            super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)

    model = surgery.set_origin(nn.Sequential(Versioned(3, 4)), surgery.Origin("test"))
    surgery.save_model(model, tmp_path / "m.safetensors")
    again = surgery.load_model(tmp_path / "m.safetensors", lambda origin: nn.Sequential(Versioned(3, 4)))
    assert torch.equal(again.state_dict()["0.weight"], model.state_dict()["0.weight"])


class FewBits(nn.Module):
    """As packed layers keep their weights: bytes beside floats."""

    def __init__(self):
        super().__init__()
        self.register_buffer("packed", torch.arange(7, dtype=torch.uint8))
        self.register_buffer("scale", torch.tensor([0.5, 2.0]))
        self.register_buffer("wide", torch.tensor(1 << 40))
        self.register_buffer("alias", self.scale)


@pytest.fixture
def small(tmp_path):
    path = tmp_path / "few.safetensors"
    surgery.save_model(surgery.set_origin(FewBits(), Origin("test:few")), path)
    return path


def record_of(path):
    raw = path.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + length])
    return header, json.loads(_compact.plain(header["__metadata__"]["convette"], 1 << 20)), raw[8 + length :]


def put(path, header, text, data):
    header["__metadata__"]["convette"] = text
    written = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(written)) + written + data)


def test_networks_in_few_bits_are_written_small_and_come_back(small):
    header, content, data = record_of(small)
    assert set(header) == {"__metadata__", "tensors"} and len(data) == 7 + 8 + 8
    assert [name for name, _, _ in content["tensors"]] == ["wide", "scale", "packed"]
    assert content["shared"] == {"alias": "scale"}
    assert surgery.read_header(small).tensors["packed"] == ("U8", (7,))
    again = surgery.load_model(small, lambda origin: FewBits())
    for name, tensor in FewBits().state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor) and again.state_dict()[name].dtype == tensor.dtype
    assert surgery.file_size(surgery.set_origin(FewBits(), Origin("test:few"))) == small.stat().st_size


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda table: table[0].__setitem__(2, [3]), "bytes, the file has"),
        (lambda table: table[0].__setitem__(1, "X9"), "malformed"),
        (lambda table: table.append(table[0]), "malformed"),
        (lambda table: table[0].__setitem__(2, [-1]), "malformed"),
        (lambda table: table[0].__setitem__(0, "other"), "lacks"),
    ],
)
def test_a_table_that_does_not_fit_is_refused(small, change, message):
    header, content, data = record_of(small)
    change(content["tensors"])
    put(small, header, _compact.compressed(json.dumps(content)), data)
    with pytest.raises(FileFormatError, match=message):
        surgery.load_model(small, lambda origin: FewBits())


def test_a_record_that_swells_or_is_damaged_is_refused(small):
    header, content, data = record_of(small)
    text = _compact.compressed(json.dumps(content))
    for wrong in (text[: len(text) // 2], "zlib:" + "!" * 40, _compact.compressed(" " * (65 << 20))):
        put(small, dict(header), wrong, data)
        with pytest.raises(FileFormatError, match=r"cut short|damaged"):
            surgery.read_header(small)
    del header["tensors"]
    put(small, header, text, b"")
    with pytest.raises(FileFormatError, match="lie in one"):
        surgery.read_header(small)
