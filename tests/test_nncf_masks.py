"""nncf's pruning through the interface of masks: against nncf.prune itself, whose hooks stand in the forward."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import nncf
import pytest
import torch
from nncf.torch.function_hook.pruning.magnitude.algo import get_pruned_modules as magnitude_hooks
from nncf.torch.function_hook.pruning.rb.algo import get_pruned_modules as gate_hooks
from pydantic import ValidationError
from test_training import trained
from test_weight_masks import DENSE
from tiny_vision import data, image_folder, network
from torch import Tensor, nn

from sievit.stages.train import TrainConfig
from sievit.stages.vision.dataset import Images, load_splits
from sievit.stages.vision.mask_settings import NncfGates, NncfMagnitude
from sievit.stages.vision.masks import densities
from sievit.stages.vision.masks import pool as weights_of
from sievit.stages.vision.nncf_masks import Gated, magnitude_masks
from sievit.stages.vision.recipe import Recipe


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Images:
    folder = image_folder(tmp_path_factory.mktemp("data") / "i", per_class=16)
    return load_splits(data(str(folder)), Path()).train


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(6, 9, bias=False), nn.Linear(9, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


def of(net: Any) -> dict[str, nn.Parameter]:
    return {"first.weight": net.first.weight, "second.weight": net.second.weight}


@pytest.mark.parametrize(("scope", "mode"), [("global", "GLOBAL"), ("layer", "LOCAL")])
def test_masks_by_magnitude_are_those_of_nncfs_own_prune(scope: Any, mode: str) -> None:
    settings = NncfMagnitude(method="nncf_magnitude", keep=0.3, scope=scope)
    ours = magnitude_masks(of(Layers()), settings, 3, 3)
    theirs = nncf.prune(
        Layers(), nncf.PruneMode[f"UNSTRUCTURED_MAGNITUDE_{mode}"], ratio=0.7, examples_inputs=torch.ones(1, 6)
    )
    hooks = magnitude_hooks(theirs)
    assert all(torch.equal(mask, hooks[name].binary_mask) for name, mask in ours.items())
    earlier = magnitude_masks(of(Layers()), settings, 1, 3)
    assert all(bool((mask <= earlier[name]).all()) for name, mask in ours.items())
    assert int(earlier["first.weight"].sum()) > int(ours["first.weight"].sum())


def test_a_step_with_gates_has_the_gradients_of_nncfs_wrapped_forward() -> None:
    """The same noise in both: nncf draws it within the forward, here it is drawn before."""
    x, ours, theirs = torch.randn(5, 6), Layers(), Layers()
    gated = Gated(NncfGates(method="nncf_rb", keep=0.3), ours, of, total=10, seed=7)  # type: ignore[arg-type]
    wrapped = nncf.prune(theirs, nncf.PruneMode.UNSTRUCTURED_REGULARIZATION_BASED, examples_inputs=x)
    hooks = gate_hooks(wrapped)
    with torch.no_grad():
        for name in of(ours):
            gated.gates[name].mask.copy_(torch.randn_like(gated.gates[name].mask))
            hooks[name].mask.copy_(gated.gates[name].mask)
    seeds: list[int] = []
    real = torch.manual_seed
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "manual_seed", lambda seed: (seeds.append(seed), real(seed))[1])
        gated.project()
    ours(x).square().sum().backward()
    before = {name: gate.mask.detach().clone() for name, gate in gated.gates.items()}
    gated.on_gradients(10)
    torch.manual_seed(seeds[0])
    wrapped.train()(x).square().sum().backward()
    loss = type(gated.loss)(wrapped, target_ratio=0.7)
    loss().backward()
    for name, weight in of(ours).items():
        assert torch.allclose(weight.grad, of(theirs)[name].grad, atol=1e-5)
        assert torch.allclose(gated.gates[name].mask.grad, hooks[name].mask.grad, rtol=1e-4, atol=1e-5)
        assert torch.equal(weight, of(Layers())[name]), "the dense weights stand there again"
        assert not torch.equal(before[name], gated.gates[name].mask)


def test_gates_come_near_the_asked_density_and_the_average_has_the_zeros(images: Images) -> None:
    judged: list[float] = []
    fitted = trained(
        images, Recipe(steps=60, batch_size=8, ema=0.8),
        masks=NncfGates(method="nncf_rb", keep=0.4, lr=0.2),
        judge=lambda net: judged.append(densities(net)["global"]) or 0.0, keep_epochs=(20,),
    )  # fmt: skip
    found = densities(fitted.network)["global"]
    assert found == pytest.approx(0.4, abs=0.05)
    assert judged[-1] == found and judged[0] == 1
    assert set(fitted.network.body.state_dict()) == set(network(classes=2).body.state_dict()), "no name of nncf's"
    assert bool((fitted.early[20]["blocks.0.mlp.fc1.weight"] != 0).all()), "to rewind to are the dense weights"


def test_magnitudes_of_nncf_are_cut_for_good_and_about_as_many_as_asked(images: Images) -> None:
    settings = NncfMagnitude(method="nncf_magnitude", keep=0.4, begin=0.0, end=1.0, every=2)
    fitted = trained(images, DENSE, masks=settings)
    assert densities(fitted.network)["global"] == pytest.approx(0.4, abs=0.001)
    assert set(fitted.network.body.state_dict()) == set(network(classes=2).body.state_dict())


def test_nncf_leaves_loggers_alone_and_can_send_nothing() -> None:
    code = (
        "import logging, sys\nfrom sievit.stages.vision import nncf_masks\nassert 'nncf' not in sys.modules\n"
        "with nncf_masks._quiet():\n    import nncf.torch\n"
        "assert logging.getLoggerClass() is logging.Logger\nassert sys.modules['openvino_telemetry'] is None\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=600)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "nncf_magnitude", "keep": 0.5, "every": 50}, "is a single one; lower every"),
        ({"method": "nncf_magnitude", "keep": 0.5, "begin": 0.8}, "begin after 0.8 of the steps and end after 0.7"),
        ({"method": "nncf_rb", "keep": 0.5, "pattern": "2:4"}, "cannot have a pattern and another mask"),
        ({"method": "nncf_rb", "keep": 1.0}, "less than 1"),
    ],
)
def test_what_contradicts_itself_is_refused(settings: Any, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        TrainConfig(steps=60, masks=settings)


def test_weights_of_the_pool_are_what_nncf_is_shown() -> None:
    net = network()
    masks = magnitude_masks(weights_of(net), NncfMagnitude(method="nncf_magnitude", keep=0.5), 1, 1)
    assert {name: mask.shape for name, mask in masks.items()} == {n: w.shape for n, w in weights_of(net).items()}
