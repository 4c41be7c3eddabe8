"""The frame: lazy imports, atomic files, progress, provenance."""

import errno
import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

import convette
from convette import _files, _progress, _provenance
from convette._provenance import provenance
from convette._symbols import load_symbol
from convette.errors import ConvetteError, StorageError, UsageError, did_you_mean


def test_importing_convette_loads_no_heavy_library():
    code = "import sys, convette; print(','.join(m for m in ('torch', 'numpy', 'rich', 'typer', 'pydantic') if m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


@pytest.mark.parametrize("name", [*convette._PUBLIC, *convette._ROOMS])
def test_every_public_name_resolves_and_says_what_it_is(name):
    assert getattr(convette, name).__doc__


def test_rooms_offer_only_names_they_have():
    for room in convette._ROOMS:
        module = importlib.import_module(f"convette.{room}")
        for name in getattr(module, "__all__", []):
            assert hasattr(module, name), f"{room}.{name}"


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="fitt"):
        convette.fitt  # noqa: B018


def test_a_failed_write_leaves_what_was_there(tmp_path: Path):
    path = tmp_path / "result.json"
    _files.write_json(path, {"old": True})
    with pytest.raises(RuntimeError), _files.replacing(path) as temporary:
        temporary.write_text("half of it")
        raise RuntimeError
    assert json.loads(path.read_text()) == {"old": True}
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_is_one_clear_line_and_harms_nothing(tmp_path: Path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"old")
    with pytest.raises(StorageError, match="no space left") as caught, _files.replacing(path):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_cannot_be_made_is_a_storage_error(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot be written"):
        _files.write_text(tmp_path / "file" / "below.txt", "text")


def test_not_a_number_is_not_written_as_json(tmp_path: Path):
    with pytest.raises(ValueError):
        _files.write_json(tmp_path / "x.json", {"loss": float("nan")})
    assert list(tmp_path.iterdir()) == []


def test_plain_progress_says_rate_and_remaining_time(monkeypatch, capsys):
    clock = iter([0.0, 1.0, 11.0, 12.0])
    monkeypatch.setattr(_progress.time, "monotonic", lambda: next(clock))
    with _progress.progress("decode", 100, "image") as advance:
        advance(10)
        advance(40, "loss 0.5")
        advance(10)
    assert capsys.readouterr().err == "decode: 50/100 images, 4.5 image/s, 11 s left loss 0.5\n"


def test_quiet_silences_notes_and_progress(capsys):
    _progress.set_quiet(True)
    try:
        _progress.note("hello")
        with _progress.progress("x", 1) as advance:
            advance()
    finally:
        _progress.set_quiet(False)
    assert capsys.readouterr().err == ""


def test_suggestions():
    assert did_you_mean("resnet21", ["resnet20", "vgg"]) == " Did you mean 'resnet20'?"
    assert did_you_mean("zzz", ["a", "b"]) == " Known: a, b."
    assert did_you_mean("zzz", [f"name{i}" for i in range(50)]) == ""


def test_exit_codes_are_those_the_documentation_names():
    codes = {cls.__name__: cls.exit_code for cls in ConvetteError.__subclasses__() + UsageError.__subclasses__()}
    assert codes["UsageError"] == codes["FileFormatError"] == 2
    assert (codes["DataError"], codes["BudgetError"], codes["InterruptedRun"], codes["StorageError"]) == (3, 4, 5, 1)


def test_a_command_for_others_leaves_absolute_paths_out(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    inside, outside = str(tmp_path / "a/b.json"), str(tmp_path.parent / "elsewhere")
    monkeypatch.setattr("sys.argv", ["convette", "compare", inside, "--runs", outside, f"--out={inside}", "--seeds=3"])
    assert provenance(1.0)["command"] == "convette compare a/b.json --runs elsewhere --out=a/b.json --seeds=3"
    assert outside in _provenance.command()


def test_provenance_names_no_path_outside_the_project():
    record = provenance(1.23)
    assert set(record) == {"machine", "versions", "command", "seconds"}
    assert str(Path.home()) not in json.dumps(record)


def test_a_symbol_is_found_by_its_module_and_name():
    assert load_symbol("convette.errors:UsageError") is UsageError
    for name, error in (
        ("convette.errors:nothing", AttributeError),
        ("convette.nowhere:x", ImportError),
        ("x", ImportError),
        (":x", ValueError),
    ):
        with pytest.raises(error):
            load_symbol(name)
