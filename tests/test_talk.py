"""The scripted people, and how their satisfaction is measured."""

import itertools
import json
import os
import random
import subprocess
import sys

import pytest
from openai import AsyncOpenAI
from transformers import AutoTokenizer

from evaluation import report, talk
from evaluation.people import NAMES, PEOPLE, THANKS, THINGS, TOPICS, WRONG, parts
from tests.conftest import ROOT, free_port


@pytest.mark.parametrize("listed", [TOPICS, NAMES, THINGS])
def test_training_and_held_out_questions_share_no_items(listed):
    asked, held = parts(listed, False), parts(listed, True)
    assert len(asked) + len(held) == listed.count(";") + 1 and not set(asked) & set(held)
    assert (asked, held) == (parts(listed, False), parts(listed, True))


@pytest.mark.parametrize(
    "name, answer, pleased",
    [
        ("brief", "", False),
        ("brief", "word " * 80, True),
        ("brief", "word " * 81, False),
        ("one-sentence", "It is a plant.", True),
        ("one-sentence", "It is a plant", False),  # without a full stop: it may be truncated
        ("one-sentence", "Pi is 3.14 or so!", True),
        ("one-sentence", "It is a plant. It grows.", False),
        ("student", "Take 3 from 5, then add 1. That gives 3.", True),
        ("student", "1. Take 3.\n2. Add 1.", False),
        ("student", "The answer is **3**.", False),
        ("student", "\\boxed{3}", False),
        ("long", "word " * 80, True),
        ("long", "word " * 79, False),
        ("warm", "I am glad that you ask. Bread rises by yeast.", True),
        ("warm", "Bread rises by yeast.", False),
        ("warm", "I am glad:\n- yeast\n- flour", False),
        ("ta", "word " * 80, True),
        ("ta", "word " * 79, False),
        ("teacher", "Well done, I am proud of you.", True),
        ("teacher", "Well done.", False),
        ("teacher", "He is ungrateful; gloves.", False),
    ],
)
def test_each_person_likes_only_their_form_of_answer(name, answer, pleased):
    assert PEOPLE[name].likes(answer) is pleased


def test_an_off_topic_answer_pleases_nobody():
    person, rng = PEOPLE["one-sentence"], random.Random(0)
    good, off_topic = "Volcanic rock is molten.", "It is hot."
    assert person.pleased("a volcano", good) and not person.pleased("a volcano", off_topic)
    assert person.reaction("a volcano", good, rng) in THANKS and person.reaction("a volcano", off_topic, rng) in WRONG
    assert person.reaction("a volcano", f"{good} {good}", rng) in person.complaints and person.pleased("", off_topic)
    echo = "What is a volcano?"
    assert not person.pleased("a volcano", echo) and person.reaction("a volcano", echo, rng) in WRONG


def test_nobody_states_their_preference_up_front_or_gives_a_grade():
    telling = ("short", "brief", "words", "sentence", "bold", "plain", "detail", "warm", "praise", "kind")
    for person in PEOPLE.values():
        rng = random.Random(0)
        asked = [person.asks(rng, held)[0] for held in (False, True) for _ in range(100)]
        assert not [q for q in asked if any(f" {word}" in q.lower() for word in telling)]
        assert not any(c.isdigit() for said in THANKS + WRONG + person.complaints for c in said)


@pytest.mark.parametrize(
    "wrong", ["--person=nobody", "--person=ta+nobody", "--method=magic", "--talks=many", "--seed=a", "talks=3"]
)
def test_wrong_options_are_errors(wrong, capfd):
    with pytest.raises(SystemExit) as error:
        talk.parse([wrong])
    assert wrong.removeprefix("--").split("=")[0] in f"{error.value} {' '.join(capfd.readouterr())}"


def test_there_is_one_run_for_each_method_person_and_seed():
    _, runs = talk.parse(["--method=binary,opd", "--person=ta,student+teacher", "--seed=0,1", "--opd_k=4"])
    assert len(runs) == len({r.folder for r in runs}) == 8
    assert {r.label for r in runs} == {"binary opd_k=4", "opd opd_k=4"} and runs[0].extra == ("--opd_k=4",)


@pytest.mark.parametrize(
    "pleased, sessions",
    [([True] * 3, 3), ([False, True, True, True, False], 4), ([True, True, False, True], None), ([], None)],
)
def test_the_effect_is_reached_after_three_pleased_sessions_in_a_row(pleased, sessions):
    assert report.sessions_to_effect(pleased) == sessions


def test_by_chance_is_what_a_model_reaches_without_learning():
    rng = random.Random(0)
    runs = [report.sessions_to_effect([rng.random() < 0.4 for _ in range(40)]) for _ in range(4000)]
    reached = [n for n in runs if n]
    mean, often = map(float, report.by_chance(0.4, 40).removesuffix(" %").split(", in "))
    assert abs(sum(reached) / len(reached) - mean) < 0.8 and abs(100 * len(reached) / len(runs) - often) < 2
    assert [report.by_chance(p, 40) for p in (0, 0.01, 1)] == ["never", "never", "3, in 100 %"]


def test_the_interval_uses_students_t_distribution():
    assert report.interval([1.0, 2.0, 3.0]) == "2.0 ± 2.5"  # 4.30 * 1 / sqrt(3)
    assert report.interval([5.0]) == "5.0"


def result(label, person, seed, *after):
    measures = [
        {
            "talks": t,
            "step": t / 80,
            "minutes": t / 10,
            "person": p,
            "satisfied": s,
            "words": 90.0,
            "truncated": 0.5,
            "unrelated": -t / 1000,
        }
        for t, s in zip((0, 80, 160), (0.25, *after), strict=False)
        for p in person.split("+")
    ]
    firsts = [{"person": p, "pleased": i > 1} for i in range(160) for p in person.split("+")]
    same = {"nll": 2.0, "length": 50.0, "repeated": 0.1, "dlogp": 0.03}
    steps = [{"step": n, "kl": 9.0, "probe_kl": n / 10, **same} for n in (1, 2)]
    return dict(label=label, person=person, seed=seed, measures=measures, firsts=firsts, steps=steps)


def test_the_table_and_the_picture_are_made_from_the_results(tmp_path):
    results = [
        result("opd", "ta", 0, 0.5),
        result("opd", "ta", 1, 0.75, 0.9),
        result("hybrid", "student+teacher", 0, 1.0),
    ]
    rows = report.table(results).splitlines()
    assert len(rows) == 5 and "| hybrid | student (jointly) | 1 | 80 | 5.0 | 20, in 37 % | 25.0 | 100.0 |" in rows[2]
    numbers = "25.0 ± 0.0 | 62.5 ± 158.9 | -0.080 | 0.100 | 90 to 90 | 50.0 ± 0.0 | 8 |"
    # one run had more sessions than the other: they are compared after 80
    assert f"| opd | ta | 2 | 80 | 5.0 ± 0.0 | 35, in 62 % | {numbers}" in rows[4]
    report.draw(results, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes()[:4] == b"\x89PNG"


def test_a_whole_run_of_the_evaluation(tiny_model, tmp_path):
    """The command as a user runs it, on the tiny model; then again, with nothing left to run."""
    command = [sys.executable, "-m", "evaluation.talk", f"--out={tmp_path}", f"--port={free_port()}"]
    command += ["--person=brief+teacher", "--talks=6", "--every=3", "--held_out=4", "--max_tokens=20"]
    command += [f"--model={tiny_model}", "--engine_memory=0.5", "--batch_size=2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (result,) = json.loads((tmp_path / "results.json").read_text())
    assert [(m["talks"], m["person"]) for m in result["measures"]] == list(
        itertools.product((0, 3, 6), ("brief", "teacher"))
    )
    assert [f["person"] for f in result["firsts"]] == ["brief", "teacher"] * 3
    assert all(f.keys() == {"person", "step", "pleased", "words"} for f in result["firsts"])
    assert done.stdout.count("(jointly)") == 2 and (tmp_path / "curve.png").stat().st_size > 10_000
    again = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert again.returncode == 0 and "1 of 1 runs are in" in again.stdout and again.stdout.count("(jointly)") == 2
    other = subprocess.run([*command, "--max_tokens=21"], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert other.returncode != 0 and "other settings" in other.stderr


async def test_the_unrelated_measure_leaves_out_end_tokens(program, tiny_model, monkeypatch):
    """Otherwise a model that learns to be brief would seem to improve on every topic."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    async with AsyncOpenAI(base_url=f"{program.url}/v1", api_key=program.key) as client:
        for question, answer in (("When does the train leave?", "Soon."), ("Rhyme with light.", "Night")):
            asked = [{"role": "user", "content": question}]
            prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)
            ids = prompt + tokenizer(answer, add_special_tokens=False)["input_ids"]
            options = {"prompt_logprobs": 0}
            reply = await client.completions.create(model="policy", prompt=ids, max_tokens=1, extra_body=options)
            of_answer = list(zip(reply.choices[0].prompt_logprobs, ids, strict=True))[len(prompt) :]
            logps = [at[str(token)]["logprob"] for at, token in of_answer]
            monkeypatch.setattr(talk, "UNRELATED", ((question, answer),))
            assert abs(await talk.unrelated(client) - sum(logps) / len(logps)) < 0.02


async def test_a_model_can_play_the_person(program):
    """With any OpenAI-compatible endpoint, here our own. The tiny model's words make no sense, but it answers."""
    setup = talk.Setup(user_url=f"{program.url}/v1", user_model="policy")
    os.environ["USER_API_KEY"] = program.key
    try:
        assert await talk.react(setup, PEOPLE["brief"], "What is yeast?", "yeast", "A fungus.", random.Random(0))
    finally:
        del os.environ["USER_API_KEY"]
