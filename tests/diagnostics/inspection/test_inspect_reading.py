"""Every format is read, nothing in a file is run, and what cannot be read is one line and exit status 2."""

from __future__ import annotations

import builtins
import os
import pickle
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from inspecting import inspected, model, of, train, trained
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
)

import descend
from descend.command.cli import main
from descend.diagnostics.inspection import files
from descend.diagnostics.inspection.files import open_checkpoint
from descend.diagnostics.inspection.optimizers import find_optimizers
from descend.diagnostics.inspection.stored import PIECE


def norms(examination: Any) -> dict[str, float]:
    """Norms of ``exp_avg`` by parameter."""
    params = zip(examination.saved.params, examination.measures, strict=True)
    return {param.label: measures.statistics["exp_avg"].norm for param, measures in params}


def expected_norms(optimizer: torch.optim.Optimizer, net: torch.nn.Module) -> Any:
    names = {param: name for name, param in net.named_parameters()}
    return pytest.approx(
        {names[param]: float(state["exp_avg"].double().norm()) for param, state in optimizer.state.items()}, rel=1e-12
    )


@pytest.fixture
def adam() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    net = model()
    optimizer = torch.optim.Adam(net.named_parameters())
    train(net, optimizer)
    return net, optimizer


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("key", ["", "optimizer", "optimizer_state_dict"])
def test_torch_files(adam: Any, zipped: bool, key: str, tmp_path: Path) -> None:
    net, optimizer = adam
    state = optimizer.state_dict()
    content = {"epoch": 3, key: state, "model": net.state_dict()} if key else state
    torch.save(content, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    examination, found = inspected(tmp_path / "a.pt")
    assert not found
    assert examination.saved.where == key
    assert norms(examination) == expected_norms(optimizer, net)
    assert [param.weight is not None for param in examination.saved.params] == [bool(key)] * 6


def test_several_optimizers_in_one_file(adam: Any, tmp_path: Path) -> None:
    state = adam[1].state_dict()
    torch.save({"optimizer_states": [state, state], "gan": {"optimizer": state}}, tmp_path / "a.ckpt")
    found = find_optimizers(open_checkpoint(tmp_path / "a.ckpt").content)
    # What is shared in the file is one object, and is listed once.
    assert [optimizer.where for optimizer in found] == ["optimizer_states.0"]
    torch.save({"optimizer_states": [state, {**state}], "gan": {"optimizer": {**state}}}, tmp_path / "a.ckpt")
    found = find_optimizers(open_checkpoint(tmp_path / "a.ckpt").content)
    assert [optimizer.where for optimizer in found] == ["optimizer_states.0", "optimizer_states.1", "gan.optimizer"]


@pytest.mark.parametrize("flat", [False, True])
def test_distributed_folder(adam: Any, flat: bool, tmp_path: Path) -> None:
    net, optimizer = adam
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    state = {
        "model": get_model_state_dict(net),
        "optimizer": get_optimizer_state_dict(net, optimizer, options=options),
    }
    with pytest.warns():
        dcp.save(state, checkpoint_id=tmp_path / "folder")
    examination, found = inspected(tmp_path / "folder")
    assert not found
    assert norms(examination) == expected_norms(optimizer, net)
    assert all(param.weight is not None and param.step == 3 for param in examination.saved.params)
    assert (tmp_path / "folder" / "__0_0.distcp").unlink() is None
    assert refused(tmp_path / "folder").endswith("__0_0.distcp is missing.")


def test_parts_of_ranks_are_put_together(tmp_path: Path) -> None:
    folder, whole = tmp_path / "folder", torch.arange(15000.0).reshape(5000, 3)
    with pytest.warns():
        dcp.save({"a": whole[:3000].clone(), "b": whole[3000:].clone()}, checkpoint_id=folder)
    index = pickle.loads((folder / ".metadata").read_bytes())
    places = {key.fqn: place for key, place in index.storage_data.items()}
    entry = index.state_dict_metadata["a"]
    entry.size = whole.shape
    entry.chunks.append(ChunkStorageMetadata(torch.Size([3000, 0]), torch.Size([2000, 3])))
    index.state_dict_metadata = {"w": entry}
    index.storage_data = {MetadataIndex("w", [0, 0]): places["a"], MetadataIndex("w", [3000, 0]): places["b"]}
    index.planner_data = {"w": ("w",)}
    (folder / ".metadata").write_bytes(pickle.dumps(index))
    assert torch.equal(open_checkpoint(folder).content["w"].read(), whole)
    entry.size = torch.Size([1 << 40, 3])
    (folder / ".metadata").write_bytes(pickle.dumps(index))
    assert "w claims 13,194,139,533,312 bytes" in refused(folder)


def test_distributed_folder_of_a_plain_state_dict(adam: Any, tmp_path: Path) -> None:
    net, optimizer = adam
    with pytest.warns():
        dcp.save(optimizer.state_dict(), checkpoint_id=tmp_path / "folder")
    examination, found = inspected(tmp_path / "folder")
    assert not found
    assert norms(examination) == expected_norms(optimizer, net)


@pytest.mark.slow
def test_sharded_tensors_in_a_torch_file(tmp_path: Path) -> None:
    """A file of one rank: its part of each tensor is read, in a process without ranks."""
    program = f"""if True:
        import torch, torch.distributed as dist
        from torch.distributed.tensor import distribute_tensor, Shard, init_device_mesh
        dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
        weight = torch.nn.Parameter(distribute_tensor(torch.ones(4, 3), init_device_mesh("cpu", (1,)), [Shard(0)]))
        optimizer = torch.optim.Adam([weight])
        weight.grad = torch.ones_like(weight)
        optimizer.step()
        torch.save(optimizer.state_dict(), {str(tmp_path / "a.pt")!r})
        dist.destroy_process_group()"""
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)
    done = subprocess.run(
        [sys.executable, "-m", "descend", "inspect", str(tmp_path / "a.pt")], capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "#0  [4, 3] float32, step=1, group 0" in done.stdout


def test_safetensors(adam: Any, tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    net, optimizer = adam
    flat = get_optimizer_state_dict(net, optimizer, options=StateDictOptions(flatten_optimizer_state_dict=True))
    safetensors.save_file({k: v for k, v in flat.items() if isinstance(v, torch.Tensor)}, tmp_path / "a.safetensors")
    examination, _ = inspected(tmp_path / "a.safetensors")
    assert norms(examination) == expected_norms(optimizer, net)


def test_safetensors_is_optional(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", 2) + b"{}")
    original = builtins.__import__

    def without(name: str, *args: Any) -> Any:
        if name.startswith("safetensors"):
            raise ImportError
        return original(name, *args)

    monkeypatch.setattr(builtins, "__import__", without)
    assert "pip install safetensors" in refused(tmp_path / "a.safetensors")


def refused(path: Path) -> str:
    """The one line that the command prints for a file that it cannot read."""
    with pytest.MonkeyPatch.context() as patch:
        lines: list[str] = []
        patch.setattr("builtins.print", lambda *values, file=None: lines.append(" ".join(map(str, values))))
        assert main(["inspect", str(path)]) == 2
    (line,) = lines
    assert line.startswith("descend inspect: ")
    assert str(path) in line or "safetensors" in line
    assert len(line) < 500
    return line


class Payload:
    """Touches a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


def as_pickle(path: Path, content: Any) -> None:
    path.write_bytes(pickle.dumps(content))


def as_zip(path: Path, content: Any) -> None:
    torch.save(content, path)


def as_legacy(path: Path, content: Any) -> None:
    torch.save(content, path, _use_new_zipfile_serialization=False)


def as_index(path: Path, content: Any) -> None:
    path.mkdir()
    (path / ".metadata").write_bytes(pickle.dumps(content))


@pytest.mark.parametrize("write", [as_pickle, as_zip, as_legacy, as_index])
def test_nothing_in_a_file_is_run(write: Callable[[Path, Any], None], tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    write(tmp_path / "bad", {"optimizer": {"state": {}, "param_groups": [], "x": Payload(ran)}})
    line = refused(tmp_path / "bad")
    assert "system" in line or "pickle, which can run any code" in line
    assert not ran.exists()
    # The payload does work.
    pickle.loads(pickle.dumps(Payload(ran)))
    assert ran.exists()


def test_payload_in_a_part_of_a_folder_is_not_run(adam: Any, tmp_path: Path) -> None:
    net, optimizer = adam
    folder = tmp_path / "folder"
    with pytest.warns():
        dcp.save({"optimizer": get_optimizer_state_dict(net, optimizer)}, checkpoint_id=folder)
    ran = tmp_path / "ran"
    part = folder / "__0_0.distcp"
    torch.save(Payload(ran), tmp_path / "payload")
    content = (tmp_path / "payload").read_bytes()
    part.write_bytes((content * (part.stat().st_size // len(content) + 1))[: part.stat().st_size])
    refused(folder)
    assert not ran.exists()


def test_index_may_not_point_outside_its_folder(adam: Any, tmp_path: Path) -> None:
    net, optimizer = adam
    folder = tmp_path / "folder"
    with pytest.warns():
        dcp.save({"optimizer": get_optimizer_state_dict(net, optimizer)}, checkpoint_id=folder)
    index = pickle.loads((folder / ".metadata").read_bytes())
    for place in index.storage_data.values():
        place.relative_path = "../secret"
    (folder / ".metadata").write_bytes(pickle.dumps(index))
    assert "outside of its folder" in refused(folder)


def empty(path: Path) -> None:
    path.touch()


def text(path: Path) -> None:
    path.write_text("lr=0.1\n" * 100)


def cut_off(path: Path) -> None:
    torch.save(trained(), path)
    path.write_bytes(path.read_bytes()[:-2000])


def cut_off_legacy(path: Path) -> None:
    torch.save(trained(), path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes()[:-2000])


def plain_folder(path: Path) -> None:
    path.mkdir()


def other_zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.txt", "text")


def compressed(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\0" * 10_000_000)


def expanded(path: Path) -> None:
    state = trained()
    state["state"][0]["exp_avg"] = torch.zeros(1).expand(1 << 40)
    torch.save(state, path)


def model_only(path: Path) -> None:
    torch.save(model().state_dict(), path)


def other_content(path: Path) -> None:
    torch.save({"epoch": 3, "loss": 0.5}, path)


def too_deep(path: Path) -> None:
    nested: Any = []
    for _ in range(200):
        nested = [nested]
    pickled = pickle.dumps(nested, protocol=2)
    # A thousand levels more than Python's pickler can write.
    deep = b"\x80\x02" + b"]" * 3000 + b"a" * 2999 + b"."
    torch.save(nested, path)
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, deep if content == pickled else content)


def a_tensor(path: Path) -> None:
    torch.save(torch.ones(3), path)


def bad_groups(path: Path) -> None:
    torch.save({"state": {}, "param_groups": 3}, path)


def bad_state(path: Path) -> None:
    torch.save({"state": {0: 5}, "param_groups": [{"params": [0]}]}, path)


def bad_params(path: Path) -> None:
    torch.save({"state": {}, "param_groups": [{"params": 4}]}, path)


def bad_index(path: Path) -> None:
    as_index(path, [1, 2, 3])


def cut_off_index(path: Path) -> None:
    as_index(path, {})
    (path / ".metadata").write_bytes(b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x0f")


def bad_safetensors(path: Path) -> None:
    path.write_bytes(struct.pack("<Q", 20) + b'{"a":{"dtype":"F32",')


def whole_model(path: Path) -> None:
    torch.save(model(), path)


def garbled(path: Path) -> None:
    torch.save({"a": 1}, path)
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, b"\x80\x02\x1a" if name.endswith("data.pkl") else content)


def nothing(path: Path) -> None:
    pass


def fifo(path: Path) -> None:
    os.mkfifo(path)


@pytest.mark.parametrize(
    ("write", "says"),
    [
        (empty, "is empty"),
        (text, "neither a file of torch.save nor safetensors"),
        (cut_off, "damaged or cut off"),
        (cut_off_legacy, "damaged"),
        (plain_folder, "without .metadata"),
        (other_zip, "not one of torch.save"),
        (compressed, "never compresses"),
        (expanded, "claims 1,099,511,627,776 elements"),
        (model_only, "it has 6 tensors with 108 elements, as a model's state_dict()"),
        (other_content, "it has the keys epoch, loss"),
        (too_deep, "nested too deeply"),
        (a_tensor, "it is a tensor [3]"),
        (bad_groups, "param_groups are no list"),
        (bad_state, "state of 0 is a int"),
        (bad_params, "has no list 'params'"),
        (bad_index, "damaged"),
        (cut_off_index, "damaged"),
        (bad_safetensors, "damaged"),
        (whole_model, "holds torch.nn.modules.container.Sequential, which"),
        (garbled, "damaged, or no checkpoint: Unsupported operand 26"),
        (nothing, "does not exist"),
        (fifo, "neither a file nor a folder"),
    ],
)
def test_bad_input_is_one_line(write: Callable[[Path], None], says: str, tmp_path: Path) -> None:
    write(tmp_path / "bad.pt")
    assert says in refused(tmp_path / "bad.pt")


def test_name_that_is_too_long(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "a" * 5000]) == 2
    assert "too long" in capsys.readouterr().err


def test_part_of_a_folder_may_be_empty(adam: Any, tmp_path: Path) -> None:
    net, optimizer = adam
    folder = tmp_path / "folder"
    with pytest.warns():
        dcp.save({"optimizer": get_optimizer_state_dict(net, optimizer)}, checkpoint_id=folder)
    (folder / "__0_0.distcp").write_bytes(b"")
    assert "is cut off" in refused(folder)


def test_folder_of_a_trainer_names_its_file(tmp_path: Path) -> None:
    torch.save(trained(), tmp_path / "optimizer.pt")
    assert f"It has {tmp_path / 'optimizer.pt'}: give that." in refused(tmp_path)


def test_files_are_mapped_and_not_copied(adam: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tensor of several pieces is never converted whole."""
    weight = torch.nn.Parameter(torch.zeros(3 * PIECE))
    optimizer = descend.SGD([weight], lr=0.1, momentum=0.9)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "a.pt")
    loads, largest = [], []
    load, to = torch.load, torch.Tensor.to
    monkeypatch.setattr(files.torch, "load", lambda *args, **kwargs: loads.append(kwargs) or load(*args, **kwargs))
    monkeypatch.setattr(torch.Tensor, "to", lambda self, *args: largest.append(self.numel()) or to(self, *args))
    examination, _ = inspected(tmp_path / "a.pt")
    assert loads == [dict(map_location="cpu", weights_only=True, mmap=True)]
    assert max(largest) == PIECE
    numbers = examination.measures[0].statistics["momentum_buffer"]
    assert numbers is not None
    assert numbers.norm == pytest.approx((3 * PIECE) ** 0.5)


def test_shared_structures_are_not_unfolded(tmp_path: Path) -> None:
    nested: Any = [0]
    for _ in range(60):
        nested = [nested, nested]
    state = trained()
    state["param_groups"][0]["extra"] = nested
    examination, found = of(tmp_path / "a.pt", {"optimizer": state, "other": nested})
    assert not found
    assert main(["inspect", str(tmp_path / "a.pt"), "--json", str(tmp_path / "a.json")]) == 0
    assert examination.saved.where == "optimizer"
