"""Full fp32 weights from the engine's own files, and what is refused."""

from __future__ import annotations

import os
import pickle
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron.errors import UserError
from megatron.inference.safe_load import load_file
from megatron.inference.weights import (
    WEIGHTS_FILE,
    find_state,
    full_weights,
    load_weights,
    own_part,
    write_safetensors,
)
from megatron.model.gpt import build_layers
from megatron.model.sharding import SequentialGPT

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).with_name("save_checkpoint.py")


def train(output: Path, processes: int, *flags: str) -> Path:
    """A checkpoint of the real engine in ``output``; returns the checkpoint's directory."""
    output.mkdir()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    root = str(SCRIPT.parents[3])
    shared = os.environ | {
        "WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "PYTHONPATH": root,
        "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, str(SCRIPT), str(output), *flags]
    running = [
        subprocess.Popen(command, env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, stderr=subprocess.PIPE)
        for rank in range(processes)
    ]
    for process in running:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors.decode()[-3000:]
    return output / "global_step2"


@pytest.fixture(scope="module")
def half_precision(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """bf16, ZeRO 1 on two ranks: fp32 weights are in two optimizer files only, cut in the middle of parameters."""
    return train(tmp_path_factory.mktemp("bf16") / "run", 2, "--bf16")


@pytest.fixture(scope="module")
def fp16(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """``fp16(stage)``: a checkpoint of fp16 training with a dynamic loss scale, of two ranks, as a GPU would write."""
    made: dict[str, Path] = {}

    def make(stage: str) -> Path:
        if stage not in made:
            made[stage] = train(tmp_path_factory.mktemp(f"fp16_{stage}") / "run", 2, "fp16", "--zero-stage", stage)
        return made[stage]

    return make


@pytest.fixture(scope="module")
def full_precision(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """fp32 on one rank."""
    return train(tmp_path_factory.mktemp("fp32") / "run", 1)


def compare(found: dict[str, torch.Tensor], checkpoint: Path) -> None:
    truth = torch.load(checkpoint.parent / "truth.pt", weights_only=True)
    assert found.keys() == truth.keys()
    for name, value in truth.items():
        assert found[name].dtype == torch.float32 and torch.equal(found[name], value), name


def test_half_precision_weights_are_the_optimizers_fp32_ones(half_precision: Path) -> None:
    found = full_weights(half_precision)
    compare(found, half_precision)
    rounded = load_file(half_precision / "mp_rank_00_model_states.pt")["module"]
    assert any(not torch.equal(found[name], rounded[name].float()) for name in found)
    assert all(torch.equal(found[name].bfloat16(), rounded[name]) for name in found)


@pytest.mark.parametrize("stage", ["1", "3"])
def test_fp16_weights_are_the_optimizers_fp32_ones(fp16: Callable[[str], Path], stage: str) -> None:
    checkpoint = fp16(stage)
    found = full_weights(checkpoint)
    compare(found, checkpoint)
    state = find_state(checkpoint, found.keys(), load_optimizer=True)
    assert state.step == 2 and set(state.values) == {"weight", "exp_avg", "exp_avg_sq"}  # both steps were applied
    assert all(float(value().abs().max()) > 0 for value in state.values["exp_avg"].values())
    rounded = load_file(next(checkpoint.glob("*mp_rank_00_model_states.pt")))["module"]
    assert {value.dtype for value in rounded.values()} == {torch.float16}
    if stage == "1":
        assert any(not torch.equal(found[name], rounded[name].float()) for name in found)
        assert all(torch.equal(found[name].half(), rounded[name]) for name in found)


def test_full_precision_weights_need_no_optimizer_files(full_precision: Path, tmp_path: Path) -> None:
    compare(full_weights(full_precision), full_precision)
    model_only = tmp_path / "global_step2"
    model_only.mkdir()
    shutil.copy(full_precision / "mp_rank_00_model_states.pt", model_only)
    shutil.copy(full_precision.parent / "truth.pt", tmp_path)
    compare(full_weights(model_only), model_only)


def test_reading_imports_no_deepspeed(half_precision: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from megatron.inference.weights import full_weights;"
        f"full_weights(Path({str(half_precision)!r})); sys.exit('deepspeed' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"PYTHONPATH": str(SCRIPT.parents[3])})


def test_half_precision_model_file_alone_is_widened(half_precision: Path, tmp_path: Path) -> None:
    shutil.copy(half_precision / "mp_rank_00_model_states.pt", tmp_path)
    rounded = load_file(tmp_path / "mp_rank_00_model_states.pt")["module"]
    found = full_weights(tmp_path)
    assert all(torch.equal(value, rounded[name].float()) for name, value in found.items())


def test_a_missing_rank_or_a_mixed_one_is_named(half_precision: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(half_precision, copy)
    (copy / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt").unlink()
    with pytest.raises(UserError, match="data-parallel rank 0"):
        full_weights(copy)
    (copy / "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt").rename(
        copy / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"
    )
    with pytest.raises(UserError, match="files are mixed"):
        full_weights(copy)


class Malicious:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("echo executed > executed",)


def test_code_in_a_checkpoint_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "mp_rank_00_model_states.pt"
    torch.save({"module": {"weight": torch.zeros(2)}, "args": Malicious()}, path)
    with pytest.raises(UserError, match=r"refused: it holds more than tensors \(.*system") as caught:
        full_weights(tmp_path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", pickle.dumps({"a": 1}), pickle.dumps(Malicious())])
def test_other_files_end_with_one_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "mp_rank_00_model_states.pt"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        full_weights(tmp_path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_no_weights_at_all(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no weights"):
        full_weights(tmp_path)
    (tmp_path / WEIGHTS_FILE).write_bytes(b"\x00" * 20)
    with pytest.raises(UserError, match="is damaged"):
        full_weights(tmp_path)


def test_safetensors_and_loading(tmp_path: Path, config) -> None:  # type: ignore[no-untyped-def]
    model = SequentialGPT(build_layers(config(), 8, 3, causal=True), config())
    weights = {name: torch.randn(value.shape) for name, value in model.named_parameters()}
    write_safetensors(tmp_path / WEIGHTS_FILE, weights)
    found = full_weights(tmp_path)
    load_weights(model, found)
    assert all(torch.equal(value, weights[name]) for name, value in model.named_parameters())
    assert model.layers[-1].weight is model.layers[0].word_embeddings.weight
    del found["layers.3.final_layernorm.weight"]
    with pytest.raises(UserError, match=r"has no layers\.3\.final_layernorm\.weight"):
        load_weights(model, found)
    with pytest.raises(UserError, match=r"has other, which"):
        load_weights(model, weights | {"other": torch.zeros(1)})
    with pytest.raises(UserError, match="has shape"):
        load_weights(model, weights | {"layers.3.final_layernorm.weight": torch.zeros(5)})


def test_own_part_of_a_tensor_parallel_rank(config) -> None:  # type: ignore[no-untyped-def]
    model = config(num_key_value_heads=4, ffn_hidden_size=6, num_attention_heads=4)
    gate_up = torch.arange(12.0).view(12, 1).expand(12, 32)
    name = "layers.1.mlp.dense_h_to_4h.weight"
    assert own_part(name, gate_up, model, 8, 1, 2)[:, 0].tolist() == [3, 4, 5, 9, 10, 11]
    assert own_part(name, gate_up, model, 8, 0, 1) is gate_up
    norm = torch.arange(32.0)
    assert own_part("layers.1.input_layernorm.weight", norm, model, 8, 1, 2) is norm
    rows = own_part("layers.0.word_embeddings.weight", torch.arange(8.0).view(8, 1).expand(8, 32), model, 8, 1, 2)
    assert rows[:, 0].tolist() == [4, 5, 6, 7]
