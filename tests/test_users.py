"""The scripted person and the measure."""

import pytest

import users


def test_no_topic_is_both_asked_and_held_out():
    asked, held = users.questions()
    topics = {t.strip() for t in users.TOPICS}
    in_asked = {t for t in topics for q in asked if any(q == form.format(t) for form in users.FORMS)}
    in_held = {t for t in topics for q in held if any(q == form.format(t) for form in users.FORMS)}
    assert in_asked | in_held == topics and not in_asked & in_held
    assert len(held) >= 64 and (asked, held) == users.questions()


@pytest.mark.parametrize("words, pleased", [(0, False), (1, True), (80, True), (81, False)])
def test_the_brief_person_counts_words(words, pleased):
    assert users.PEOPLE["brief"].pleased("word " * words) is pleased


def test_nobody_states_the_preference_up_front_or_says_a_number():
    asked, held = users.questions()
    for person in users.PEOPLE.values():
        assert not any(w in q.lower() for q in asked + held for w in ("short", "brief", "words", "sentence"))
        assert not any(c.isdigit() for said in person.thanks + person.complaints for c in said)


def test_wrong_options_are_errors(capsys):
    for wrong in (["--person=nobody"], ["--steps=many"], ["steps=3"]):
        with pytest.raises(SystemExit) as error:
            users.main(wrong)
        assert wrong[0].removeprefix("--").split("=")[0] in str(error.value)


def test_the_picture_is_drawn(tmp_path):
    measures = [
        {"step": s, "satisfied": 20.0 + s, "words": 90.0 - s, "unrelated": -3.0, "questions": 8} for s in (0, 5)
    ]
    result = {"setup": {"person": "brief"}, "measures": measures, "firsts": [(0, False, 99), (1, True, 50)]}
    users.draw(result, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes()[:4] == b"\x89PNG"
    assert "25.0 %" in users.table(result)
