"""Stories: what scripts and story files mean, and what is said when they are wrong."""

from __future__ import annotations

import re
import unicodedata
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from storydiffusion.errors import StoryError
from storydiffusion.resources import resources
from storydiffusion.story import (
    Character,
    Panel,
    Story,
    format_script,
    parse_characters,
    parse_script,
    short_form,
)
from storydiffusion.story_file import dump_story, load_story, parse_story
from storydiffusion.styles import Style, find_style, load_styles

MIRA = Character("Mira", "a rabbit in a striped dress")
TOM = Character("Tom Thumb", "a small bear, wearing a top hat")
CAST = (MIRA, TOM)
PLAIN = Style("none", "No style", "{prompt}", "")
patient = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # busy machines
EXAMPLES = sorted((resources() / "stories").glob("*.toml"))


def story(*panels: Panel, characters: tuple[Character, ...] = CAST, **settings: object) -> Story:
    return Story("A test", characters, panels, **settings)  # type: ignore[arg-type]


def prompt_of(prompt: str, style: Style = PLAIN, characters: tuple[Character, ...] = CAST) -> str:
    it = story(Panel("p1", prompt), characters=characters)
    return it.full_prompt(it.panels[0], style)


def mistake(read: object, *arguments: object) -> StoryError:
    with pytest.raises(StoryError) as caught:
        read(*arguments)  # type: ignore[operator]
    assert caught.value.sentence, "an error without a sentence"
    assert caught.value.remedy, f"no remedy: {caught.value}"
    return caught.value


# --- scripts ---------------------------------------------------------------------------------------


def test_a_line_is_a_panel_with_its_caption_and_characters() -> None:
    panels = parse_script("[Mira] walks the dog # Once upon a time\n[Tom Thumb] meets [Mira] at home", CAST)
    assert panels == (
        Panel("p1", "[Mira] walks the dog", "Once upon a time", ("Mira",)),
        Panel("p2", "[Tom Thumb] meets [Mira] at home", "", ("Tom Thumb", "Mira")),
    )


def test_blank_lines_and_comments_are_skipped_and_lines_still_counted() -> None:
    panels = parse_script("# Act one\n\n  # indented\n[Mira] walks\r\n\r\n\t[Mira] sits\r", CAST)
    assert [(p.id, p.prompt, p.line) for p in panels] == [("p1", "[Mira] walks", 4), ("p2", "[Mira] sits", 6)]


@pytest.mark.parametrize(
    ("line", "prompt", "caption"),
    [
        ("[Mira] sits #caption", "[Mira] sits", "caption"),
        ("[Mira] sits #", "[Mira] sits", ""),
        ("[Mira] sits\t# a # b", "[Mira] sits", "a # b"),
        ("[Mira] reads page#3", "[Mira] reads page#3", ""),
        (r"[Mira] reads \#3 # page \#3", "[Mira] reads #3", "page #3"),
        (r"\#1 [Mira] wins", "#1 [Mira] wins", ""),
        ("[Mira] sits # [Tom] is away] #2", "[Mira] sits", "[Tom] is away] #2"),
        ("  [Mira]   sits  down  ", "[Mira] sits down", ""),
    ],
)
def test_a_number_sign_begins_the_caption_only_after_a_space(line: str, prompt: str, caption: str) -> None:
    (panel,) = parse_script(line, CAST)
    assert (panel.prompt, panel.caption) == (prompt, caption)


@pytest.mark.parametrize("tag", ["[mira]", "[MIRA]", "[ Mira ]"])
def test_names_match_whatever_their_case_and_spacing(tag: str) -> None:
    (panel,) = parse_script(f"{tag} walks", CAST)
    assert panel.characters == ("Mira",)
    assert panel.prompt.startswith(" ".join(tag.split())), "the tag is kept as typed"


def test_names_match_however_an_accent_is_encoded() -> None:
    (panel,) = parse_script("[Rene\u0301] walks", (Character("Ren\u00e9", "a cat"),))
    assert panel.characters == ("Ren\u00e9",)


def test_a_name_said_twice_is_one_character_of_the_panel() -> None:
    assert parse_script("[Mira] sees [mira] in the mirror", CAST)[0].characters == ("Mira",)


@pytest.mark.parametrize("line", ["[NC] a quiet forest", "[nc] a quiet forest", "a quiet forest [NC]"])
def test_nc_is_a_panel_without_characters(line: str) -> None:
    assert parse_script(line, CAST)[0].characters == ()
    assert parse_script(line, ())[0].characters == (), "needs no character at all"


@pytest.mark.parametrize("known", [CAST, (MIRA,), ()])
def test_a_line_without_names_is_refused_with_both_remedies(known: tuple[Character, ...]) -> None:
    error = mistake(parse_script, "[NC] a house\nwalks the dog", known)
    assert error.line == 2
    assert "“walks the dog”" in error.sentence
    assert "[Mira]" in error.remedy
    assert "[NC]" in error.remedy


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("[Mira]", "not what is to be seen"),
        ("[Mira], [Tom Thumb].", "not what is to be seen"),
        ("[Mira] # only a caption", "not what is to be seen"),
        ("[NC] # meanwhile", "not what is to be seen"),
        ("[NC] a forest with [Mira]", "[Mira] is named too"),
        ("[Mira walks", "do not match up"),
        ("Mira] walks", "do not match up"),
        ("[[Mira]] walks", "do not match up"),
        ("[] walks", "hold no name"),
        ("[ ] walks", "hold no name"),
    ],
)
def test_a_panel_that_cannot_be_drawn_is_refused_with_its_line(line: str, says: str) -> None:
    error = mistake(parse_script, f"[Mira] walks\n\n{line}", CAST)
    assert error.line == 3
    assert says in error.sentence


def test_an_unknown_name_is_answered_with_the_nearest() -> None:
    error = mistake(parse_script, "[Mria] walks", CAST)
    assert error.line == 1
    assert "“Mria”" in error.sentence
    assert "[Mira]" in error.remedy
    assert "[Tom Thumb]" in mistake(parse_script, "[tom thum] walks", CAST).remedy


def test_an_unknown_name_like_no_other_is_answered_with_all() -> None:
    assert "Mira, Tom Thumb" in mistake(parse_script, "[Xy] walks", CAST).remedy


def test_a_name_where_nobody_is_described_says_so() -> None:
    assert "no character is described" in mistake(parse_script, "[Mira] walks", ()).sentence


@pytest.mark.parametrize("text", ["", "\n\n", "# nothing but a comment"])
def test_a_script_without_panels_is_refused(text: str) -> None:
    assert "no panels" in mistake(parse_script, text, CAST).sentence


def test_a_panel_of_symbols_only_is_not_empty() -> None:
    assert parse_script("[NC] 🌲", ())[0].prompt == "[NC] 🌲"


def test_errors_show_long_lines_shortened() -> None:
    assert len(mistake(parse_script, "walks " * 500, CAST).sentence) < 120


tags = st.sampled_from(["[Mira]", "[mira]", "[Tom Thumb]", "[Mira] and [Tom Thumb]", "[NC]"])
any_text = st.text(max_size=30)
free_text = any_text.map(lambda text: text.replace("[", "(").replace("]", ")"))
hashes = st.text(alphabet="# \\a", max_size=12)


@patient
@given(st.lists(st.tuples(free_text | hashes, tags, free_text | hashes, any_text | hashes), min_size=1))
def test_panels_become_a_script_and_the_same_panels_again(parts: list[tuple[str, str, str, str]]) -> None:
    panels = tuple(
        Panel(
            f"p{number}",
            " ".join(f"{before} {tag} seen {after}".split()),
            " ".join(caption.split()),
            parse_script(f"{tag} seen", CAST)[0].characters,
        )
        for number, (before, tag, after, caption) in enumerate(parts, start=1)
    )
    assert parse_script(format_script(panels), CAST) == panels


@patient
@given(st.lists(st.tuples(tags, hashes, hashes), min_size=1))
def test_a_script_that_was_written_by_us_is_written_the_same_again(lines: list[tuple[str, str, str]]) -> None:
    script = "\n".join(f"{tag} seen{prompt} # {caption}" for tag, prompt, caption in lines)
    written = format_script(parse_script(script, CAST))
    assert format_script(parse_script(written, CAST)) == written


def test_a_plain_script_is_written_as_it_was_typed() -> None:
    script = "[Mira] walks the dog # Once upon a time\n[NC] page#3\n[mira] meets [Tom Thumb]\n"
    assert format_script(parse_script(script, CAST)) == script


# --- characters ------------------------------------------------------------------------------------


def test_characters_are_described_one_a_line() -> None:
    text = "# who is who\n[Mira] a rabbit in a striped dress\n\n  [Tom  Thumb]a small bear, wearing a top hat\n"
    assert parse_characters(text) == CAST


@pytest.mark.parametrize(
    ("text", "line", "says"),
    [
        ("[Mira] a rabbit\n[mira ] a cat", 2, "Two characters are called “Mira”"),
        ("[Mira] a rabbit\n[Tom]", 2, "no description"),
        ("[Mira] ...", 1, "no description"),
        ("[NC] a cat", 1, "cannot be a character's name"),
        ("[nc] a cat", 1, "cannot be a character's name"),
        ("[] a cat", 1, "no name"),
        ("[A #1] a cat", 1, "cannot be written in a script"),
        ("[Mira] a rabbit\nin a dress", 2, "does not say which one character"),
        ("Mira: a rabbit", 1, "does not say which one character"),
        ("[Mira] a rabbit [Tom] a bear", 1, "does not say which one character"),
        ("", 0, "No character is described"),
        ("\n# nobody", 0, "No character is described"),
    ],
)
def test_a_mistake_among_the_characters_has_its_line(text: str, line: int, says: str) -> None:
    error = mistake(parse_characters, text)
    assert (error.line, says in error.sentence) == (line, True), str(error)


# --- prompts and seeds -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "full"),
    [
        ("[Mira] walks in the forest", "a rabbit in a striped dress walks in the forest"),
        ("at night, [mira] sits", "at night, a rabbit in a striped dress sits"),
        ("[Mira] walks and [Mira] sits", "a rabbit in a striped dress walks and the rabbit sits"),
        ("[Mira] lost [Mira]'s hat", "a rabbit in a striped dress lost the rabbit's hat"),
        (
            "[Tom Thumb] meets [Mira] , [Tom Thumb] waves",
            "a small bear, wearing a top hat meets a rabbit in a striped dress, the small bear waves",
        ),
        ("[NC] a quiet   forest", "a quiet forest"),
        ("a forest [NC], night", "a forest, night"),
        ("[NC], a {prompt} 1.5 m high .", "a {prompt} 1.5 m high."),
    ],
)
def test_the_full_prompt_says_descriptions_for_names(prompt: str, full: str) -> None:
    assert prompt_of(prompt) == full


def test_the_style_is_put_around_the_prompt() -> None:
    style = Style("x", "X", "drawing of {prompt} , in ink", "photo")
    assert prompt_of("[Mira] sits", style) == "drawing of a rabbit in a striped dress sits, in ink"


def test_two_characters_with_the_same_short_form_are_told_apart_by_name() -> None:
    twins = (Character("Mia", "a cat in a red coat"), Character("Leo", "a cat in a blue coat"))
    said = prompt_of("[Mia] meets [Leo], [Mia] waves, [Leo] jumps", characters=twins)
    assert said == "a cat in a red coat meets a cat in a blue coat, Mia waves, Leo jumps"
    alone = prompt_of("[Mia] sits, [Mia] waves", characters=twins)
    assert alone == "a cat in a red coat sits, the cat waves", "a namesake elsewhere does not matter"


def test_a_description_is_said_as_it_stands_whatever_it_contains() -> None:
    odd = Character("Odd", r"a robot \1 {prompt} [Mira].")
    assert prompt_of("[Odd] sits", characters=(odd,)) == r"a robot \1 {prompt} [Mira] sits"


@pytest.mark.parametrize(
    ("description", "short"),
    [
        ("a rabbit", "the rabbit"),
        ("An old man, wearing a black suit", "the old man"),
        ("the teddy bear with a bow.", "the teddy bear"),
        ("a man, black hair", "Ann"),
        ("a tall, thin man", "Ann"),
        ("a rabbit and a duck", "Ann"),
        ("rabbit", "Ann"),
        ("a very very very old man", "Ann"),
    ],
)
def test_the_short_form_is_plain_or_the_name(description: str, short: str) -> None:
    assert short_form(Character("Ann", description)) == short


def test_negative_prompts_of_story_and_style_are_joined() -> None:
    style = Style("x", "X", "{prompt}", "photo")
    assert story(Panel("p1", "[NC] x")).full_negative_prompt(style) == "photo"
    assert story(Panel("p1", "[NC] x"), negative_prompt="rain,").full_negative_prompt(style) == "rain, photo"
    assert story(Panel("p1", "[NC] x")).full_negative_prompt(PLAIN) == ""


def test_the_seed_of_a_panel_follows_from_story_seed_and_id_alone() -> None:
    first, second = Panel("p1", "[Mira] walks"), Panel("p2", "[Mira] walks")
    it = story(first, second, seed=7)
    assert it.panel_seed(first) == 6660075034706068285, "old stories would be drawn differently"
    assert it.panel_seed(first) == it.panel_seed(replace(first, prompt="[Tom Thumb] sits", locked=True))
    assert it.panel_seed(first) != it.panel_seed(second)
    assert it.panel_seed(first) != replace(it, seed=8).panel_seed(first)


def test_the_panels_own_seed_wins() -> None:
    panel = Panel("p1", "[Mira] walks", seed=0)
    assert story(panel, seed=7).panel_seed(panel) == 0


@patient
@given(st.integers(0, 2**63 - 1), st.from_regex(r"[A-Za-z0-9_-]{1,64}", fullmatch=True))
def test_panel_seeds_fit_in_63_bits(seed: int, panel_id: str) -> None:
    panel = Panel(panel_id, "[NC] x")
    assert 0 <= story(panel, seed=seed).panel_seed(panel) < 2**63


# --- a story that exists is valid ------------------------------------------------------------------


def test_a_story_reads_the_characters_of_its_panels() -> None:
    assert story(Panel("p1", "[mira] walks")).panels[0].characters == ("Mira",)
    stale = Panel("p1", "[Tom Thumb] walks", characters=("Mira",))
    assert story(stale).panels[0].characters == ("Tom Thumb",)


@pytest.mark.parametrize(
    ("panels", "characters", "says"),
    [
        ((), CAST, "no panels"),
        ((Panel("p1", "[Mira] a"), Panel("p1", "[Mira] b")), CAST, "Two panels have the id “p1”"),
        ((Panel("../p1", "[Mira] a"),), CAST, "cannot be a panel's id"),
        ((Panel("", "[Mira] a"),), CAST, "cannot be a panel's id"),
        ((Panel("p1\n", "[Mira] a"),), CAST, "cannot be a panel's id"),
        ((Panel("p1", "[Mira] a", seed=-1),), CAST, "seed of panel “p1” is -1"),
        ((Panel("p1", ""),), CAST, "The panel is empty"),
        ((Panel("p1", "walks"),), CAST, "Nobody is named"),
        ((Panel("p1", "[Mira] a"),), (), "no character is described"),
        ((Panel("p1", "[Mira] a"),), (MIRA, MIRA), "Two characters are called"),
    ],
)
def test_an_invalid_story_cannot_be_made(
    panels: tuple[Panel, ...], characters: tuple[Character, ...], says: str
) -> None:
    assert says in mistake(Story, "t", characters, panels).sentence


@pytest.mark.parametrize(
    "settings",
    [
        {"width": 56},
        {"height": 4104},
        {"width": 250},
        {"seed": -1},
        {"seed": 2**63},
        {"guidance_scale": float("nan")},
        {"guidance_scale": float("inf")},
        {"guidance_scale": -1.0},
        {"num_inference_steps": 0},
    ],
)
def test_a_setting_out_of_range_is_refused(settings: dict[str, object]) -> None:
    mistake(lambda: story(Panel("p1", "[Mira] walks"), **settings))


def test_a_size_off_the_grid_is_answered_with_its_neighbours() -> None:
    assert "248 or 256" in mistake(lambda: story(Panel("p1", "[Mira] walks"), width=250)).remedy


# --- story files -----------------------------------------------------------------------------------

HEAD = 'title = "Mira"\nseed = 7\n'
WHO = '[[characters]]\nname = "Mira"\ndescription = "a rabbit"\n'
PANEL = '[[panels]]\nprompt = "[Mira] walks"\n'


def test_a_story_file_with_a_script_is_read() -> None:
    it = parse_story(
        'title = "T"\nstyle = "comic"\nmodel = "sdxl"\nwidth = 512\nheight = 768\nseed = 3\n'
        'negative_prompt = "rain"\nguidance_scale = 5\nsteps = 4\n'
        'script = """\n[Mira] walks # Once\n[NC] a forest\n"""\n' + WHO
    )
    assert it == Story(
        title="T",
        characters=(Character("Mira", "a rabbit"),),
        panels=(Panel("p1", "[Mira] walks", "Once", ("Mira",)), Panel("p2", "[NC] a forest")),
        style="comic",
        width=512,
        height=768,
        seed=3,
        negative_prompt="rain",
        model="sdxl",
        guidance_scale=5,
        num_inference_steps=4,
    )
    assert [panel.line for panel in it.panels] == [11, 12], "panels know their lines in the file"


def test_a_story_file_with_panel_tables_is_read() -> None:
    it = parse_story(
        WHO + '[[panels]]\nid = "home"\nprompt = "[Mira] #1 sits"\ncaption = "a\\nb"\nseed = 5\nlocked = true\n'
        '[[panels]]\nprompt = "[NC] a forest"\n'
    )
    assert it.panels == (
        Panel("home", "[Mira] #1 sits", "a\nb", ("Mira",), 5, True),
        Panel("p2", "[NC] a forest"),
    )
    assert [panel.line for panel in it.panels] == [4, 10]


def test_ids_left_out_never_collide_with_given_ones() -> None:
    it = parse_story(WHO + '[[panels]]\nid = "p2"\nprompt = "[Mira] a"\n' + PANEL + PANEL)
    assert [panel.id for panel in it.panels] == ["p2", "p3", "p4"]


@pytest.mark.parametrize(
    ("text", "line", "says", "remedy"),
    [
        ('titel = "x"\n' + WHO + PANEL, 1, "“titel”", "“title”"),
        (HEAD + "zzz = 1\n" + WHO + PANEL, 3, "“zzz”", "title, style"),
        (WHO + 'descripton = "x"\n' + PANEL, 1, "Character 1 has a setting “descripton”", "“description”"),
        (WHO + PANEL + PANEL + "lock = true\n", 6, "Panel 2 has a setting “lock”", "“locked”"),
        (WHO + PANEL + 'style = "comic"\n', 4, "“style”", "move “style” above"),
        ("title = 3\n" + WHO + PANEL, 1, "“title” has to be text", "title"),
        ("seed = true\n" + WHO + PANEL, 1, "“seed” has to be a whole number", "seed"),
        ("width = 256.0\n" + WHO + PANEL, 1, "“width” has to be a whole number", "width"),
        ('guidance_scale = "5"\n' + WHO + PANEL, 1, "“guidance_scale” has to be a number", "guidance"),
        ("guidance_scale = nan\n" + WHO + PANEL, 1, "“guidance_scale” is nan", "0 to 100"),
        ("steps = 0\n" + WHO + PANEL, 1, "“steps” is 0", "1 to 1000"),
        (HEAD + "width = 250\n" + WHO + PANEL, 3, "not a multiple of 8", "248 or 256"),
        (HEAD + "height = 5000\n" + WHO + PANEL, 3, "“height” is 5000", "64 to 4096"),
        (f"width = {10**400}\n" + WHO + PANEL, 1, "“width” is 1000", "64 to 4096"),
        (
            'style = "comc"\n' + WHO + PANEL,
            1,
            "no style “comc”",
            "Did you mean “comic”? The styles are: none",
        ),
        ('style = "qqq"\n' + WHO + PANEL, 1, "no style “qqq”", "The styles are: none, storybook"),
        (HEAD + WHO, 0, "no panels", "panel"),
        (HEAD + 'script = ""\n' + WHO, 0, "no panels", "panel"),
        (HEAD + PANEL, 3, "no character is described", "Describe “Mira”"),
        (HEAD + 'script = "[Mira] walks"\n' + WHO + PANEL, 3, "both a script and [[panels]]", "one of them"),
        (HEAD + 'panels = "x"\n' + WHO, 3, "“panels” has to be a list of tables", "[[panels]]"),
        ("panels = [1]\n", 1, "“panels” has to be a list of tables", "[[panels]]"),
        (HEAD + '[characters]\nname = "Mira"\n', 0, "“characters” has to be a list", "[[characters]]"),
        (WHO + "[[panels]]\nprompt = 3\n", 4, "Panel 1: “prompt” has to be text", "prompt"),
        (WHO + PANEL + 'locked = "yes"\n', 4, "“locked” has to be true or false", "locked"),
        (WHO + PANEL + "seed = -4\n", 4, "The seed of panel “p1” is -4", "0 to"),
        (WHO + PANEL + '[[panels]]\ncaption = "x"\n', 6, "The panel is empty", "[Mira]"),
        (WHO + PANEL + '[[panels]]\nprompt = "walks"\n', 6, "Nobody is named", "[NC]"),
        (WHO + WHO + PANEL, 4, "Two characters are called “Mira”", "another name"),
        ('[[characters]]\ndescription = "a rabbit"\n' + PANEL, 1, "no name", "name"),
        ('[[characters]]\nname = "Mira"\n' + PANEL, 1, "no description", "looks like"),
        (HEAD + "style = \n", 3, "not valid TOML", "quotes"),
        (HEAD + "\n[[panels]\n", 4, "not valid TOML", "quotes"),
        (HEAD + 'script = """\n[Mira] walks\n', 4, "not valid TOML", "quotes"),
        (HEAD + "seed = 8\n", 3, "not valid TOML", "quotes"),
        ("a = " + "[" * 100_000, 0, "not valid TOML", "quotes"),
    ],
)
def test_a_mistake_in_a_story_file_has_line_and_remedy(text: str, line: int, says: str, remedy: str) -> None:
    error = mistake(parse_story, text)
    assert says in error.sentence, str(error)
    assert remedy in error.remedy, str(error)
    assert error.line == line, str(error)


def test_a_mistake_in_a_script_has_its_line_in_the_file_and_in_the_script() -> None:
    error = mistake(parse_story, HEAD + 'script = """\n# Act one\n[Mria] walks\n"""\n' + WHO)
    assert error.line == 5
    assert "In line 2 of the script, “[Mria] walks”: Nobody called “Mria”" in error.sentence
    assert str(error).count("Line ") == 1, "one line number to look at"
    windows = (HEAD + 'script = """\n# Act one\n[Mria] walks\n"""\n' + WHO).replace("\n", "\r\n")
    assert mistake(parse_story, windows).line == 5


def test_where_a_script_is_not_written_as_it_reads_no_line_of_the_file_is_claimed() -> None:
    error = mistake(parse_story, 'script = "[Mira] walks\\n[Mria] walks"\n' + WHO)
    assert error.line == 0
    assert "In line 2 of the script, “[Mria] walks”" in error.sentence


def test_headers_inside_a_script_do_not_lead_lines_astray() -> None:
    text = 'title = """\n[[panels]]\n"""\n' + WHO + '[[panels]]\nprompt = "walks"\n'
    assert mistake(parse_story, text).line == 0, "the header could be either of two lines"


@patient
@given(st.text(max_size=200))
def test_any_text_is_a_story_or_a_story_error(text: str) -> None:
    with suppress(StoryError):
        parse_story(text)


names = st.from_regex(r"[^\W_][\w '.-]{0,12}", fullmatch=True).filter(lambda name: short_key(name) != "nc")


@st.composite
def stories(draw: st.DrawFn) -> Story:
    cast = draw(
        st.lists(names, max_size=3, unique_by=short_key).map(
            lambda found: tuple(Character(name, draw(any_text) + "a cat") for name in found)
        )
    )
    who = st.sampled_from([f"[{c.name}]" for c in cast] or ["[NC]"])
    panels = draw(
        st.lists(
            st.builds(
                Panel,
                id=st.from_regex(r"[A-Za-z0-9_-]{1,64}", fullmatch=True),
                prompt=st.tuples(who | st.just("[NC]"), free_text).map(lambda parts: f"{parts[0]} seen {parts[1]}"),
                caption=any_text,
                seed=st.none() | st.integers(0, 2**63 - 1),
                locked=st.booleans(),
            ),
            min_size=1,
            max_size=5,
            unique_by=lambda panel: panel.id,
        )
    )
    return Story(
        title=draw(any_text),
        characters=cast,
        panels=tuple(panels),
        style=draw(st.sampled_from(list(load_styles()))),
        width=8 * draw(st.integers(8, 512)),
        height=8 * draw(st.integers(8, 512)),
        seed=draw(st.integers(0, 2**63 - 1)),
        negative_prompt=draw(any_text),
        model=draw(any_text),
        guidance_scale=draw(st.none() | st.floats(0, 100)),
        num_inference_steps=draw(st.none() | st.integers(1, 1000)),
    )


def short_key(name: str) -> str:
    return unicodedata.normalize("NFKC", " ".join(name.split()).casefold())


@patient
@given(stories())
def test_a_story_is_saved_and_read_back_the_same(it: Story) -> None:
    assert parse_story(dump_story(it)) == it


def test_a_saved_story_is_read_from_its_file(tmp_path: Path) -> None:
    it = story(Panel("p1", "[Mira] walks", "“Grüß Gott!”"))
    path = tmp_path / "story.toml"
    path.write_text(dump_story(it), encoding="utf-8")
    assert load_story(path) == load_story(str(path)) == it
    path.write_text("\ufeff" + dump_story(it), encoding="utf-8")
    assert load_story(path) == it, "Windows editors put a byte order mark first"


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    assert "absent.toml" in mistake(load_story, tmp_path / "absent.toml").sentence
    assert str(tmp_path) in mistake(load_story, tmp_path).sentence
    (tmp_path / "latin.toml").write_bytes('title = "Grün"'.encode("latin-1"))
    assert "not UTF-8" in mistake(load_story, tmp_path / "latin.toml").sentence


# --- what the project carries ----------------------------------------------------------------------


def test_styles_are_templates_of_one_prompt_and_none_leaves_it_alone() -> None:
    styles = load_styles()
    assert len(styles) >= 10
    assert next(iter(styles)) == "none"
    assert (styles["none"].prompt, styles["none"].negative_prompt) == ("{prompt}", "")
    for key, style in styles.items():
        assert (style.id, style.prompt.count("{prompt}"), bool(style.title)) == (key, 1, True), key
    assert len({style.title for style in styles.values()}) == len(styles)


def test_what_a_caller_does_to_the_styles_stays_with_the_caller() -> None:
    load_styles().clear()
    assert find_style("comic").title == "Comic"


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_stories_use_only_words_that_the_embedded_model_understands(path: Path) -> None:
    captions = pytest.importorskip("training.captions", reason="the wheel carries no training code")
    it = load_story(path)
    known = set(captions.vocabulary())
    assert it.model == "storyworld"
    for panel in it.panels:
        said = set(re.findall(r"[\w-]+", it.full_prompt(panel, find_style(it.style))))
        assert said <= known, f"{path.name}, {panel.id}: {said - known}"
        assert panel.caption


def test_the_examples_show_one_character_two_characters_and_a_long_story() -> None:
    assert {path.stem for path in EXAMPLES} == {"demo", "two_friends", "around_the_world"}
    told = {path.stem: load_story(path) for path in EXAMPLES}
    assert (len(told["demo"].characters), len(told["demo"].panels)) == (1, 4)
    assert len(told["two_friends"].characters) == 2
    assert any(len(panel.characters) == 2 for panel in told["two_friends"].panels)
    assert len(told["around_the_world"].panels) == 8
