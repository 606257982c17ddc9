"""Model directories: what is accepted, what is refused and how, and what a fingerprint notices."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from peftc.diagnostics import PeftcError
from peftc.store.fingerprint import Fingerprint
from peftc.store.model_dir import ModelDir

CONFIG = {"model_type": "bert", "hidden_size": 8, "torch_dtype": "float32", "transformers_version": "4.1"}


def _tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {"embeddings.weight": torch.randn(100, 80), "encoder.weight": torch.randn(8, 8), "bias": torch.randn(8)}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = tmp_path / "base"
    path.mkdir()
    (path / "config.json").write_text(json.dumps(CONFIG))
    save_file(_tensors(), path / "model.safetensors")
    (path / "tokenizer.json").write_text("{}")
    (path / "vocab.txt").write_text("a")
    (path / "generation_config.json").write_text("{}")
    (path / "README.md").write_text("read me")
    return path


def _shard(path: Path) -> dict[str, str]:
    tensors = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    weight_map = {name: f"model-{i + 1:05}-of-00003.safetensors" for i, name in enumerate(tensors)}
    for name, file in weight_map.items():
        save_file({name: tensors[name]}, path / file)
    _write_index(path, weight_map)
    return weight_map


def _write_index(path: Path, weight_map: object) -> None:
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def _refused(path: Path, code: str) -> str:
    with pytest.raises(PeftcError) as caught:
        ModelDir.open(path)
    (diagnostic,) = caught.value.diagnostics
    assert diagnostic.code == code
    assert diagnostic.help
    return diagnostic.render()


def test_single_file_model_is_opened_and_read(base: Path) -> None:
    opened = ModelDir.open(base)
    assert opened.has_weights
    assert opened.config == CONFIG
    assert opened.shapes() == {name: tuple(value.shape) for name, value in _tensors().items()}
    assert all(torch.equal(opened.read(name), value) for name, value in _tensors().items())
    assert opened.nbytes == 4 * sum(value.numel() for value in _tensors().values())
    assert [path.name for path in opened.tokenizer_files] == ["tokenizer.json", "vocab.txt"]


def test_sharded_model_is_the_same_model(base: Path) -> None:
    before = ModelDir.open(base).fingerprint()
    _shard(base)
    after = ModelDir.open(base)
    assert len(after.headers) == 3
    assert all(torch.equal(after.read(name), value) for name, value in _tensors().items())
    assert after.fingerprint() == before


def test_directory_with_a_config_alone_is_allowed(base: Path) -> None:
    (base / "model.safetensors").unlink()
    opened = ModelDir.open(base)
    assert not opened.has_weights
    assert opened.fingerprint()
    with pytest.raises(PeftcError, match=r"E030.*no weights"):
        opened.require_weights()


def test_unknown_tensor_is_answered_with_the_nearest(base: Path) -> None:
    with pytest.raises(PeftcError, match=r"(?s)E040.*did you mean `encoder\.weight`"):
        ModelDir.open(base).read("encoder.weigth")


def test_adapted_directory_is_refused(base: Path) -> None:
    ModelDir.open(base).refuse_adapted()
    (base / "peftc.json").write_text("{}")
    with pytest.raises(PeftcError, match=r"E033.*already adapted"):
        ModelDir.open(base).refuse_adapted()


def _only(*names: str) -> Callable[[Path], object]:
    def keep(path: Path) -> None:
        for entry in path.iterdir():
            entry.unlink()
        for name in names:
            (path / name).write_text(json.dumps(CONFIG))

    return keep


NOT_A_MODEL: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda p: (p / "config.json").unlink(), "there is no config.json"),
    "config not JSON": (lambda p: (p / "config.json").write_text("{"), "is not valid JSON"),
    "config not UTF-8": (lambda p: (p / "config.json").write_bytes(b'{"\xff\xfe'), "is not valid JSON"),
    "config a list": (lambda p: (p / "config.json").write_text("[]"), "not a JSON object"),
    "no model_type": (lambda p: (p / "config.json").write_text("{}"), "names no model_type"),
    "pickled weights": (_only("config.json", "pytorch_model.bin"), "save_pretrained"),
    "gguf weights": (_only("config.json", "model.Q4.gguf"), "model.Q4.gguf"),
    "variant weights": (_only("config.json", "model.fp16.safetensors"), "model.fp16.safetensors"),
    "peft adapter": (_only("adapter_config.json"), "give the directory of its base model"),
    "diffusers pipeline": (_only("model_index.json"), "diffusers pipeline"),
}


@pytest.mark.parametrize("case", NOT_A_MODEL)
def test_directory_that_is_no_model_is_refused_with_a_remedy(case: str, base: Path) -> None:
    spoil, expected = NOT_A_MODEL[case]
    spoil(base)
    assert expected in _refused(base, "E030")


def test_path_that_is_no_directory_is_refused_with_the_nearest(base: Path) -> None:
    assert "did you mean `base`?" in _refused(base.parent / "bsae", "E030")
    assert "downloads nothing" in _refused(Path("no/such/place"), "E030")
    assert "is a file" in _refused(base / "config.json", "E030")
    assert "cannot be read" in _refused(base / ("x" * 5000), "E030")
    assert f"did you mean {base}?" in _refused(base.parent, "E030")


def _break_index(change: Callable[[dict[str, str]], object]) -> Callable[[Path], object]:
    def spoil(path: Path) -> None:
        weight_map = _shard(path)
        change(weight_map)
        _write_index(path, weight_map)

    return spoil


def _lose_shard(path: Path) -> None:
    (path / _shard(path)["bias"]).unlink()


def _truncate(path: Path) -> None:
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (_truncate, "truncated"),
    "dangling link": (
        lambda p: [(p / "model.safetensors").unlink(), (p / "model.safetensors").symlink_to(p / "blob")],
        "cannot be read",
    ),
    "missing shard": (_lose_shard, "lacks 1 of 3 shards"),
    "tensor not in its shard": (_break_index(lambda m: m.update(new=m["bias"])), "in files that lack them: new"),
    "tensor not in the index": (
        _break_index(lambda m: m.update({"bias": m["encoder.weight"]})),
        "in files that lack them: bias",
    ),
    "no weight map": (lambda p: [_shard(p), _write_index(p, [])], "no weight_map"),
    "index not JSON": (
        lambda p: [_shard(p), (p / "model.safetensors.index.json").write_text("x")],
        "is not valid JSON",
    ),
    "shard outside": (_break_index(lambda m: m.update(bias="../secret")), "outside its directory"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_weights_are_refused_with_a_remedy(case: str, base: Path) -> None:
    spoil, expected = BROKEN[case]
    spoil(base)
    assert expected in _refused(base, "E031")


def test_shard_with_more_tensors_than_its_index_is_refused(base: Path) -> None:
    weight_map = _shard(base)
    save_file({"bias": torch.ones(8), "more": torch.ones(1)}, base / weight_map["bias"])
    assert "does not list 1 tensors" in _refused(base, "E031")


def test_support_files_are_copied_and_nothing_else(base: Path, tmp_path: Path) -> None:
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "tool.jinja").write_text("x")
    (base / "spiece.model").symlink_to(base / "vocab.txt")
    copies = ModelDir.open(base).copy_support_files(tmp_path / "out")
    names = {path.relative_to(tmp_path / "out").as_posix() for path in copies}
    expected = {"tokenizer.json", "vocab.txt", "generation_config.json", "spiece.model"}
    assert names == expected | {"additional_chat_templates/tool.jinja"}
    assert not (tmp_path / "out" / "spiece.model").is_symlink()


def _edit_config(base: Path, **changes: object) -> Fingerprint:
    config = {key: value for key, value in (CONFIG | changes).items() if value is not None}
    (base / "config.json").write_text(json.dumps(config))
    return ModelDir.open(base).fingerprint_parts()


def test_fingerprint_ignores_what_differs_between_two_saves_of_one_model(base: Path) -> None:
    before = ModelDir.open(base).fingerprint_parts()
    after = _edit_config(base, transformers_version="5.23", _name_or_path="/x", torch_dtype=None, dtype="torch.float32")
    assert after == before
    assert after.digest == before.digest
    assert Fingerprint.from_json(json.loads(json.dumps(before.to_json()))) == before


def test_fingerprint_tells_in_what_two_models_differ(base: Path) -> None:
    before = ModelDir.open(base).fingerprint_parts()
    assert _edit_config(base, hidden_size=9).differences(before) == ["the config"]
    _edit_config(base)
    save_file(_tensors() | {"bias": torch.zeros(8)}, base / "model.safetensors")
    changed = ModelDir.open(base)
    assert changed.fingerprint_parts().differences(before) == ["the contents of tensors"]
    assert changed.fingerprint() != before.digest
    save_file(_tensors() | {"bias": torch.zeros(9)}, base / "model.safetensors")
    assert ModelDir.open(base).fingerprint_parts().differences(before) == ["the names, dtypes or shapes of tensors"]


def test_fingerprint_without_weights_is_compared_by_its_config(base: Path) -> None:
    before = ModelDir.open(base).fingerprint_parts()
    (base / "model.safetensors").unlink()
    assert ModelDir.open(base).fingerprint_parts().differences(before) == []
    assert _edit_config(base, hidden_size=9).differences(before) == ["the config"]


@pytest.mark.parametrize("position", [0, 4000, 7999])
def test_fingerprint_samples_the_first_middle_and_last_bytes(position: int, base: Path) -> None:
    before = ModelDir.open(base).fingerprint()
    tensors = _tensors()
    tensors["embeddings.weight"].view(-1)[position] += 1
    save_file(tensors, base / "model.safetensors")
    assert ModelDir.open(base).fingerprint() != before
