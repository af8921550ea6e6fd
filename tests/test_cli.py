"""The command line as a person meets it: files where they should be, sentences, exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from storydiffusion.cli import main
from storydiffusion.pictures import embedded_text, load_picture
from storydiffusion.resources import resources
from storydiffusion.story_file import parse_story

STORY = """
title = "A test"
width = 256
height = 256
steps = 2
seed = 3
script = '''
[Mira] walks in the forest # One.
[Mira] sits at the beach # Two.
[Mira] jumps in the city # Three.
'''
[[characters]]
name = "Mira"
description = "a rabbit in a dress"
"""


@pytest.fixture
def story(tmp_path: Path) -> Path:
    path = tmp_path / "story.toml"
    path.write_text(STORY)
    return path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    (folder / "in.toml").write_text(STORY)
    assert main(["generate", str(folder / "in.toml"), "-o", str(folder / "out"), "--json"]) == 0
    return folder / "out"


def test_generate_writes_every_panel_a_sheet_and_the_story(made: Path) -> None:
    assert {p.name for p in made.iterdir()} == {"p1.png", "p2.png", "p3.png", "contact.sheet.png", "story.toml"}
    assert load_picture(made / "p1.png").shape == (256, 256, 3)


def test_a_panel_carries_the_story_it_belongs_to(made: Path) -> None:
    text = embedded_text(made / "p2.png")
    assert text["storydiffusion:panel"] == "p2"
    assert parse_story(text["storydiffusion:story"]).title == "A test"


def test_generate_twice_keeps_the_earlier_takes(
    story: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    for _ in range(2):
        assert main(["generate", str(story), "-o", str(out), "--json"]) == 0
    assert np.array_equal(load_picture(out / "p1.png"), load_picture(out / "p1.take2.png"))
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["panels"][0].endswith("p1.take2.png")


def test_a_sliding_window_makes_other_panels_of_the_same_story(made: Path, story: Path, tmp_path: Path) -> None:
    out = tmp_path / "sliding"
    assert main(["generate", str(story), "-o", str(out), "--window", "2", "--sliding", "--json"]) == 0
    assert not np.array_equal(load_picture(out / "p3.png"), load_picture(made / "p3.png"))


def test_regenerate_adds_a_take_made_from_the_others(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = load_picture(made / "p3.png")
    assert main(["regenerate", str(made), "--panel", "p3", "--new-seed", "--json"]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    take = Path(report["panels"][0])
    assert take.name.startswith("p3.take")
    assert not np.array_equal(load_picture(take), before)
    assert np.array_equal(load_picture(made / "p3.png"), before), "the first take was changed"


def test_regenerate_inside_a_mask_leaves_the_rest(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mask = np.zeros((256, 256), np.uint8)
    mask[100:200, 100:200] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    assert main(["regenerate", str(made), "--panel", "p2", "--mask", str(tmp_path / "mask.png"), "--json"]) == 0
    take = load_picture(Path(json.loads(capsys.readouterr().out.splitlines()[-1])["panels"][0]))
    assert np.array_equal(take[mask == 0], load_picture(made / "p2.png")[mask == 0])


def test_words_the_model_never_saw_are_named(story: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    story.write_text(STORY.replace("walks in the forest", "programs a spaceship"))
    assert main(["generate", str(story), "-o", str(tmp_path / "o"), "--json"]) == 0
    captured = capsys.readouterr()
    assert "spaceship" in captured.err
    assert json.loads(captured.out.splitlines()[-1])["unknown_words"] == ["programs", "spaceship"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["generate", "{story}", "-o", "{out}", "--plan", "papre"], "papre"),
        (["generate", "missing.toml", "-o", "{out}"], "missing.toml"),
        (["generate", "{story}", "-o", "{out}", "--model", "no-such-model"], "no-such-model"),
        (["regenerate", "{out}", "--panel", "p1"], "story.toml"),
        (["evaluate", "consistency", "--rows", "nonsense"], "nonsense"),
    ],
)
def test_a_wrong_request_is_a_sentence_and_exit_code_1(
    arguments: list[str], words: str, story: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    filled = [a.format(story=story, out=tmp_path / "out") for a in arguments]
    assert main(filled) == 1
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists(), "something was written for a request that failed"


def test_an_unknown_panel_is_refused_with_the_ones_there_are(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["regenerate", str(made), "--panel", "p9"]) == 1
    assert "p1, p2, p3" in capsys.readouterr().err


def test_a_script_mistake_names_its_line(story: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    story.write_text(STORY.replace("[Mira] sits", "[Mirra] sits"))
    assert main(["generate", str(story), "-o", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert "Line" in error
    assert "Mira" in error


def test_a_wrong_command_line_is_exit_code_2() -> None:
    with pytest.raises(SystemExit) as stop:
        main(["generate"])
    assert stop.value.code == 2


def test_models_lists_the_embedded_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "--json"]) == 0
    assert "storyworld" in [m["id"] for m in json.loads(capsys.readouterr().out)]


# The embedded model ---------------------------------------------------------------------------------


def test_the_embedded_model_loads_in_stock_diffusers_with_nothing_of_ours() -> None:
    pipe = StableDiffusionPipeline.from_pretrained(resources() / "models" / "storyworld", torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    image = pipe("a red cat in the city", num_inference_steps=2, output_type="np").images[0]
    assert image.shape == (256, 256, 3)
    assert image.std() > 0.05


def test_the_embedded_model_is_at_most_60_mb_of_safetensors() -> None:
    folder = resources() / "models" / "storyworld"
    files = [p for p in folder.rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) <= 60_000_000
    assert not [p for p in files if p.suffix in (".bin", ".ckpt", ".pt", ".pth", ".pkl")]
