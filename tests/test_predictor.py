"""The Semantic Motion Predictor: the interpolation until it is trained, and the panels at its ends always."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import MotionAdapter, UNetMotionModel

from storydiffusion.motion.predictor import SemanticMotionPredictor, frame_times, interpolate, joined
from tiny import tiny_unet


def predictor(**more: int) -> SemanticMotionPredictor:
    torch.manual_seed(0)
    return SemanticMotionPredictor(**{"channels": 12, "tokens": 5, "width": 16, "layers": 2, "heads": 2, **more}).eval()


@pytest.fixture
def panels() -> tuple[torch.Tensor, torch.Tensor]:
    return tuple(torch.randn(2, 2, 5, 12, generator=torch.Generator().manual_seed(1)).unbind())  # type: ignore[return-value]


def trained(model: SemanticMotionPredictor, panels: tuple[torch.Tensor, torch.Tensor]) -> float:
    """Teach it one bent way between two panels; the share of the error that is left."""
    times = frame_times(8)
    bent = interpolate(*panels, times) + torch.sin(torch.pi * times).view(1, -1, 1, 1)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    before = (model.predict(*panels, times) - bent).square().mean().item()
    for _ in range(150):
        optimizer.zero_grad()
        loss = (model.predict(*panels, times) - bent).square().mean()
        loss.backward()
        optimizer.step()
    return loss.item() / before


def test_untrained_it_is_the_interpolation(panels: tuple[torch.Tensor, torch.Tensor]) -> None:
    times = frame_times(6)
    made = predictor().predict(*panels, times)
    assert made.shape == (2, 6, 5, 12)
    assert torch.equal(made, interpolate(*panels, times))
    assert torch.allclose(made[:, 3], 0.4 * panels[0] + 0.6 * panels[1], atol=1e-6)


def test_it_learns_a_way_that_is_not_straight_and_keeps_its_ends(panels: tuple[torch.Tensor, torch.Tensor]) -> None:
    model = predictor()
    assert trained(model, panels) < 0.05
    with torch.no_grad():
        for frames in (8, 13):
            made = model.predict(*panels, frame_times(frames))
            assert torch.equal(made[:, 0], panels[0])
            assert torch.allclose(made[:, -1], panels[1], atol=1e-6)
        middle = model.predict(*panels, torch.tensor([0.5]))[:, 0] - (panels[0] + panels[1]) / 2
    assert middle.mean() == pytest.approx(1, abs=0.25), "a time it was not trained on is far from its neighbours"


def test_every_frame_knows_of_the_others(panels: tuple[torch.Tensor, torch.Tensor]) -> None:
    model = predictor()
    trained(model, panels)
    few, many = (model.predict(*panels, torch.tensor(times)) for times in ([0.0, 0.5, 1.0], [0.5]))
    assert not torch.allclose(few[:, 1], many[:, 0], atol=1e-4)


def test_it_is_saved_and_loaded_as_safetensors(tmp_path: Path, panels: tuple[torch.Tensor, torch.Tensor]) -> None:
    model = predictor(cross_attention_dim=16)
    torch.nn.init.normal_(model.proj_out.weight)
    model.save_pretrained(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"config.json", "diffusion_pytorch_model.safetensors"}
    again = SemanticMotionPredictor.from_pretrained(tmp_path)
    times = frame_times(4)
    assert torch.equal(model(*panels, times), again(*panels, times))
    assert again(*panels, times).shape == (2, 4, 5, 16)


def test_text_and_predicted_tokens_are_each_frames_keys_and_values(panels: tuple[torch.Tensor, torch.Tensor]) -> None:
    adapter = MotionAdapter((8, 16), 1, motion_num_attention_heads=2, motion_norm_num_groups=4)
    unet = UNetMotionModel.from_unet2d(tiny_unet(), adapter).eval()
    model = predictor(cross_attention_dim=16)
    torch.nn.init.normal_(model.to_context[1].weight, std=2)
    text = torch.randn(2, 3, 16)
    context = joined(text, model(*panels, frame_times(4)))
    assert context.shape == (8, 8, 16)
    assert torch.equal(context[:4, :3], text[:1].expand(4, -1, -1)), "the first four rows are the first clip's"
    noise = torch.randn(2, 4, 4, 8, 8)
    with torch.no_grad():
        made = unet(noise, 500, context).sample
        without = unet(noise, 500, text.repeat_interleave(4, 0)).sample
        swapped = unet(noise, 500, joined(text, model(*panels[::-1], frame_times(4)))).sample
    assert made.shape == noise.shape
    assert not torch.allclose(made, without, atol=1e-4)
    assert not torch.allclose(made, swapped, atol=1e-4)
