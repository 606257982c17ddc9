"""Bad adapters: each is one error with its code, its cause and a remedy, and nothing is written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from badinput.command import refused
from safetensors.torch import load_file, save_file

from interop.subjects import model

KEY = "base_model.model.model.layers.{}.self_attn.{}.lora_{}.weight"
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("base") / "llama"
    model("llama").float().save_pretrained(place)
    return place


@pytest.fixture
def adapter(tmp_path: Path, base: Path) -> Path:
    """A LoRA on q and v of both layers, written by hand from the documented layout."""
    place = tmp_path / "adapter"
    place.mkdir()
    tensors: Tensors = {}
    for layer in range(2):
        for name, out in (("q_proj", 32), ("v_proj", 16)):
            tensors[KEY.format(layer, name, "A")] = torch.randn(4, 32)
            tensors[KEY.format(layer, name, "B")] = torch.randn(out, 4)
    save_file(tensors, place / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
    (place / "adapter_config.json").write_text(json.dumps(config))
    return place


def change(adapter: Path, edit: Callable[[Tensors], object]) -> None:
    """Write the tensors again after `edit`."""
    tensors = load_file(adapter / "adapter_model.safetensors")
    edit(tensors)
    save_file(tensors, adapter / "adapter_model.safetensors", metadata={"format": "pt"})


def configure(adapter: Path, **options: object) -> None:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **options}))


def told(code: str, adapter: Path, base: Path) -> str:
    """The refusal of an import, which leaves nothing behind."""
    before = {entry.name for entry in adapter.parent.iterdir()}
    said = refused(code, "import", adapter, "--model", base, "-o", adapter.parent / "out")
    assert {entry.name for entry in adapter.parent.iterdir()} == before
    assert "= help: " in said
    return said


def test_adapter_written_by_hand_imports(adapter: Path, base: Path) -> None:
    from badinput.command import run

    assert run("import", adapter, "--model", base, "-o", adapter.parent / "out").code == 0


def test_directory_without_configuration_is_refused(tmp_path: Path, base: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "there is no adapter_config.json" in told("E080", tmp_path / "empty", base)


def test_configuration_that_is_cut_short_is_refused(adapter: Path, base: Path) -> None:
    (adapter / "adapter_config.json").write_text('{"peft_type": "LO')
    assert "is not valid JSON" in told("E080", adapter, base)


def test_adapter_without_tensors_is_refused(adapter: Path, base: Path) -> None:
    (adapter / "adapter_model.safetensors").unlink()
    assert "no tensors" in told("E080", adapter, base)


@pytest.mark.parametrize("name", ["POLY", "LORAA", "__class__"])
def test_unknown_method_is_refused_with_those_that_are_read(name: str, adapter: Path, base: Path) -> None:
    configure(adapter, peft_type=name)
    said = told("E081", adapter, base)
    assert name in said and "peftc reads" in said and "LORA" in said


@pytest.mark.parametrize(
    ("option", "value"),
    [("layer_replication", [[0, 2]]), ("init_lora_weights", "pissa"), ("a_new_option", 3), ("use_qalora", True)],
)
def test_option_that_changes_what_is_computed_is_refused(option: str, value: object, adapter: Path, base: Path) -> None:
    configure(adapter, **{option: value})
    assert option in told("E081", adapter, base)


def test_missing_tensor_is_named(adapter: Path, base: Path) -> None:
    change(adapter, lambda tensors: tensors.pop(KEY.format(1, "v_proj", "B")))
    assert "model.layers.1.self_attn.v_proj.lora_B.weight is missing" in told("E082", adapter, base)


def test_missing_layer_is_named(adapter: Path, base: Path) -> None:
    def drop(tensors: Tensors) -> None:
        for half in "AB":
            del tensors[KEY.format(1, "v_proj", half)]

    change(adapter, drop)
    assert "model.layers.1.self_attn.v_proj" in told("E082", adapter, base)


def test_unexpected_tensor_is_named(adapter: Path, base: Path) -> None:
    change(adapter, lambda tensors: tensors.update({"base_model.model.model.layers.0.gate": torch.ones(3)}))
    assert "base_model.model.model.layers.0.gate is no tensor of a LORA adapter" in told("E082", adapter, base)


def test_tensor_of_a_module_that_is_no_target_is_named(adapter: Path, base: Path) -> None:
    configure(adapter, target_modules=["q_proj"])
    assert "v_proj" in told("E082", adapter, base)


def test_layer_that_the_model_lacks_is_named(adapter: Path, base: Path) -> None:
    def move(tensors: Tensors) -> None:
        for half in "AB":
            tensors[KEY.format(7, "q_proj", half)] = tensors.pop(KEY.format(0, "q_proj", half))

    change(adapter, move)
    said = told("E082", adapter, base)
    assert "model.layers.7.self_attn.q_proj, which the model lacks" in said


def test_stacked_weights_of_experts_are_told_as_such(adapter: Path, tmp_path: Path) -> None:
    """PEFT keeps the two in one module, one wrapped around the other."""
    place, experts = tmp_path / "mixtral", "base_model.model.model.layers.0.mlp.experts"
    model("mixtral").float().save_pretrained(place)
    tensors = {
        f"{experts}.{inner}lora_{half}.weight": torch.ones(6, 6) for inner in ("base_layer.", "") for half in "AB"
    }
    change(adapter, lambda old: (old.clear(), old.update(tensors)))
    configure(adapter, target_modules=[], target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"])
    said = told("E081", adapter, place)
    assert "on the stacked weights of the experts model.layers.0.mlp.experts" in said and "not read yet" in said


def test_wrong_base_is_told_by_shapes(adapter: Path, base: Path) -> None:
    change(adapter, lambda tensors: tensors.update({KEY.format(0, "q_proj", "A"): torch.randn(4, 64)}))
    said = told("E082", adapter, base)
    assert "[4, 64]" in said and "[4, 32]" in said


def test_base_that_is_not_here_is_told(adapter: Path) -> None:
    configure(adapter, base_model_name_or_path="some-org/some-model")
    said = refused("E030", "import", adapter, "-o", adapter.parent / "out")
    assert "some-org/some-model" in said and "--model" in said


def test_corrupt_safetensors_are_refused(adapter: Path, base: Path) -> None:
    file = adapter / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-20])
    assert "truncated" in told("E031", adapter, base)


def test_nan_is_refused(adapter: Path, base: Path) -> None:
    change(adapter, lambda tensors: tensors[KEY.format(0, "q_proj", "A")].fill_(float("nan")))
    assert KEY.format(0, "q_proj", "A") in told("E042", adapter, base)


class Hostile:
    """What a pickle may do when it is loaded."""

    ran = False

    def __reduce__(self) -> tuple[object, ...]:
        return (_run, ())


def _run() -> None:
    Hostile.ran = True


def test_pickle_is_read_as_tensors_alone(adapter: Path, base: Path) -> None:
    from badinput.command import run

    file = adapter / "adapter_model.safetensors"
    torch.save(load_file(file), adapter / "adapter_model.bin")
    file.unlink()
    assert run("import", adapter, "--model", base, "-o", adapter.parent / "out").code == 0


def test_pickle_that_runs_code_is_refused_and_not_run(adapter: Path, base: Path) -> None:
    (adapter / "adapter_model.safetensors").unlink()
    torch.save({"x": Hostile()}, adapter / "adapter_model.bin")
    told("E031", adapter, base)
    assert not Hostile.ran


def test_regular_expression_that_may_take_forever_is_not_run(adapter: Path, base: Path) -> None:
    configure(adapter, alpha_pattern={"(.*)*x(.*)*y": 3})
    assert "regular expression" in told("E081", adapter, base)


def test_prefix_is_refused_with_what_is_read(adapter: Path, base: Path) -> None:
    """PEFT counts the tokens' positions from the end of the prefix, which no rule says yet."""
    configure(adapter, peft_type="PREFIX_TUNING")
    assert "PREFIX_TUNING are not read" in told("E081", adapter, base)
