"""Weights from files: which ones are taken, and what is said of those that are not."""

from __future__ import annotations

import collections
import os
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from vosops.inference.settings import ModelSettings, make_tracker
from vosops.io.errors import InputError, VosopsError
from vosops.models.tensorflow import read_variables
from vosops.models.weights import load_weights, read_weights


def module() -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3))


@pytest.fixture
def weights() -> dict[str, torch.Tensor]:
    return {name: torch.randn_like(x.float()).to(x.dtype) for name, x in module().state_dict().items()}


def assert_loaded(found: nn.Module, weights: dict[str, torch.Tensor]) -> None:
    for name, x in found.state_dict().items():
        assert torch.equal(x, weights[name]), name


class TestWhatIsTaken:
    @pytest.mark.parametrize("nested", [None, "state_dict", "model", "model_state"])
    @pytest.mark.parametrize("prefix", ["", "module.", "model.", "module.model."])
    def test_checkpoints(self, tmp_path, weights, nested, prefix):
        stored = collections.OrderedDict((prefix + name, x) for name, x in weights.items())
        path = tmp_path / "w.pth"
        torch.save({nested: stored, "epoch": 3} if nested else stored, path)
        found = module()
        load_weights(found, path)
        assert_loaded(found, weights)

    def test_a_prefix_that_the_modules_own_names_have(self, tmp_path, weights):
        found = nn.ModuleDict({"model": module()})
        for prefix in ("model.", "module.model."):
            torch.save({prefix + name: x for name, x in weights.items()}, tmp_path / "w.pth")
            load_weights(found, tmp_path / "w.pth")
            assert_loaded(found["model"], weights)

    @pytest.mark.parametrize("prefix", ["", "module."])
    def test_what_the_module_does_not_need(self, tmp_path, weights, prefix):
        """A loss beside the network, values that are no tensors, a part that is not run."""
        stored = {f"{prefix}model.{name}": x for name, x in weights.items()}
        stored |= {f"{prefix}loss.weight": torch.zeros(2), f"{prefix}model.fc.bias": torch.zeros(3)}
        torch.save({"state_dict": stored | {"grey_values": [0, 1]}}, tmp_path / "w.pth")
        found = module()
        found.unused_weights = ("loss.", "fc.", "grey_values")
        load_weights(found, tmp_path / "w.pth")
        assert_loaded(found, weights)
        found.unused_weights = ("loss.", "grey_values")
        with pytest.raises(ValueError, match=r"1 unexpected \(fc\.bias\)"):
            load_weights(found, tmp_path / "w.pth")

    def test_the_old_file_format(self, tmp_path, weights):
        path = tmp_path / "w.pth"
        torch.save(weights, path, _use_new_zipfile_serialization=False)
        found = module()
        load_weights(found, path)
        assert_loaded(found, weights)

    def test_safetensors(self, tmp_path, weights):
        path = tmp_path / "w.safetensors"
        save_file(weights, path)
        found = module()
        load_weights(found, path)
        assert_loaded(found, weights)

    def test_the_counters_of_batch_norm_may_be_missing(self, tmp_path, weights):
        del weights["1.num_batches_tracked"]
        torch.save(weights, tmp_path / "w.pth")
        found = module()
        load_weights(found, tmp_path / "w.pth")
        assert torch.equal(found[1].running_var, weights["1.running_var"])

    def test_values_take_the_modules_dtype(self, tmp_path, weights):
        torch.save(weights, tmp_path / "w.pth")
        found = module().double()
        load_weights(found, tmp_path / "w.pth")
        assert found[0].weight.dtype == torch.float64

    @pytest.mark.parametrize("module_name", ["numpy._core.multiarray", "numpy.core.multiarray"])
    def test_a_score_of_numpy_may_lie_beside_the_weights(self, tmp_path, weights, module_name):
        torch.save(
            {"state_dict": weights, "best": np.float64(0.7), "step": np.int64(3)}, tmp_path / "new.pth"
        )
        with (
            zipfile.ZipFile(tmp_path / "new.pth") as new,
            zipfile.ZipFile(tmp_path / "w.pth", "w") as named,
        ):
            for entry in new.infolist():
                named.writestr(
                    entry, new.read(entry).replace(b"numpy._core.multiarray", module_name.encode())
                )
        found = module()
        load_weights(found, tmp_path / "w.pth")
        assert_loaded(found, weights)


class TestWhatIsRefused:
    def test_names_what_is_missing_unexpected_and_misshapen_and_changes_nothing(self, tmp_path, weights):
        del weights["0.bias"]
        weights["0.weight"] = torch.zeros(3, 2, 3, 3)
        weights |= {f"more.{i}": torch.zeros(1) for i in range(5)}
        torch.save(weights, tmp_path / "w.pth")
        found = module()
        before = {name: x.clone() for name, x in found.state_dict().items()}
        with pytest.raises(ValueError) as error:
            load_weights(found, tmp_path / "w.pth")
        message = str(error.value)
        assert "1 missing (0.bias)" in message
        assert "5 unexpected (more.0, more.1, more.2, ...)" in message
        assert "1 misshapen (0.weight is (3, 2, 3, 3) and must be (3, 2, 1, 1))" in message
        assert_loaded(found, before)

    def test_code_is_never_run(self, tmp_path):
        class Harmful:
            def __reduce__(self):
                return os.mkdir, (str(tmp_path / "harm"),)

        torch.save({"weight": Harmful()}, tmp_path / "w.pth")
        with pytest.raises(ValueError, match=r"must be a checkpoint of tensors"):
            read_weights(tmp_path / "w.pth")
        assert not (tmp_path / "harm").exists()

    @pytest.mark.parametrize("content", [b"\x89PNG\r\n", b""])
    def test_nobody_is_told_to_run_what_a_file_holds(self, tmp_path, content):
        path = tmp_path / "w.pth"
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"checkpoint of tensors, got .*w.pth: it is ") as error:
            read_weights(path)
        assert "weights_only" not in str(error.value)
        with pytest.raises(ValueError, match=r"npz of arrays, got .*w.pth: \S") as error:
            read_variables(path)
        assert "pickle" not in str(error.value)

    @pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
    def test_a_file_of_another_kind(self, tmp_path, name):
        (tmp_path / name).write_text("this is no checkpoint")
        with pytest.raises(
            ValueError, match=rf"weights must be a (checkpoint of tensors|safetensors file), got .*{name}: \S"
        ):
            read_weights(tmp_path / name)

    @pytest.mark.parametrize("stored", [[1, 2], {}, {"weight": torch.zeros(1), "epoch": 3}])
    def test_what_holds_no_tensors_by_name(self, tmp_path, stored):
        torch.save(stored, tmp_path / "w.pth")
        with pytest.raises(ValueError, match="weights must be tensors by their names"):
            read_weights(tmp_path / "w.pth")

    def test_no_file(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="none.pth"):
            read_weights(tmp_path / "none.pth")


class TestOnTheCommandLine:
    """What `vosops segment --model stm` says."""

    def test_a_network_needs_weights(self):
        with pytest.raises(InputError, match="--model stm needs --weights FILE"):
            make_tracker(ModelSettings("stm", device="cpu"))

    def test_a_wrong_file_is_told_by_its_keys(self, tmp_path):
        torch.save({"module.Encoder_M.conv1.weight": torch.zeros(64, 4, 7, 7)}, tmp_path / "w.pth")
        with pytest.raises(VosopsError) as error:
            make_tracker(ModelSettings("stm", tmp_path / "w.pth", device="cpu"))
        message = str(error.value)
        assert "\n" not in message
        assert "missing (Encoder_M.mean, Encoder_M.std, Encoder_M.conv1_m.weight, ...)" in message
        assert "Encoder_M.conv1.weight is (64, 4, 7, 7) and must be (64, 3, 7, 7)" in message
