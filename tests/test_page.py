"""The page, over HTTP and in a real browser if one is installed, and the sentence that says why nothing is trained."""

import asyncio
import json
import os
import pty
import re
import shutil
import sys
import termios
from contextlib import closing
from types import SimpleNamespace

import httpx
import pytest
import torch
from playwright.async_api import async_playwright, expect
from transformers import AutoModelForCausalLM, AutoTokenizer

from durable import guard, journal
from tests.conftest import ROOT
from tests.records import GOOD, turn
from tests.talking import ALICE, BOB, ask, client, glance, query, rated, rows, until, user
from tests.test_users import Talker, started
from web import learned, terminal, turns
from web.page import MAX_ASKING
from web.why import why_nothing

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(not CHROMIUM, reason="no Chromium is installed: apt-get install chromium")
ATTACK = "<script>document.title = 'taken'</script><img src=x onerror=\"document.title = 'taken'\"> too long, be brief"


@pytest.fixture
async def browser():
    """Any error on the page, and anything blocked by its content security policy, fails the test."""
    async with async_playwright() as playwright:
        chromium = await playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = await chromium.new_page(viewport={"width": 1200, "height": 900})
        page.set_default_timeout(20_000)
        wrong = []
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda message: message.type == "error" and wrong.append(message.text))
        page.on("dialog", lambda dialog: dialog.accept())
        yield page
        await chromium.close()
    assert [text for text in wrong if not re.search(r"status of (401|409)|net::ERR_", text)] == []


def admin_key(program):
    return (program.out / "admin_key").read_text().strip()


def get(program, path, key="none", **options):
    return httpx.get(program.url + path, headers={"Authorization": f"Bearer {key}"}, timeout=30, **options)


def post(program, path, body, key="none", **headers):
    return httpx.post(program.url + path, json=body, headers={"Authorization": f"Bearer {key}", **headers}, timeout=60)


@needs_browser
@pytest.mark.timeout(600)
async def test_the_page_shows_turns_live_and_takes_ratings_and_admin_commands(fresh, browser):
    """Without keys, on this machine: turns appear live, a rating changes a verdict, admin commands work."""
    program = fresh(batch_size=2, save_every=1, lr=1e-4).wait_ready()
    page = browser
    await page.goto(program.url)
    await expect(page.locator("#why")).to_have_text("Nothing has been asked yet.")
    reply = await ask(client(program, "none"), [user("Why is the sky blue?")])
    card = page.locator(".turn")  # it appears without a reload
    await expect(card.locator(".said.user")).to_have_text("Why is the sky blue?")
    await expect(page.locator("#why")).to_contain_text("No next message yet: 1 answer waits")

    await card.get_by_role("button", name="Bad").click()
    await expect(card.locator(".verdict").first).to_contain_text("verdict -1 by a person")
    await expect(page.locator("#until")).to_have_text("1 of 2 turns until the next step")
    await card.get_by_role("button", name="Good").click()
    await expect(card.locator(".verdict").first).to_contain_text("verdict +1 by a person")
    await card.get_by_role("button", name="Correct…").click()
    await card.get_by_role("textbox").fill("Be short.")
    await card.get_by_role("button", name="Send").click()
    await expect(page.locator("#said")).to_contain_text("The words can't be a hint: a hint has 11 to 300 characters")
    await card.get_by_role("button", name="Correct…").click()
    await card.get_by_role("textbox").fill("Answer in one short sentence, please.")
    await card.get_by_role("button", name="Bad").click()
    await expect(page.locator("#said")).to_have_text("Noted.")
    await expect(card.get_by_role("textbox")).to_have_value("Answer in one short sentence, please.")
    await card.get_by_role("button", name="Send").click()
    await expect(card).to_contain_text("hint: Answer in one short sentence, please. (own words)")
    assert rows(program, "id = ?", reply.id)[0]["hints"] == '["Answer in one short sentence, please."]'

    await page.get_by_role("button", name="Pause").click()
    await expect(page.locator("#why")).to_contain_text("Training is paused by the admin. 1 judged turn waits for it.")
    await rated(program, "and the sea?")
    await expect(page.locator("#until")).to_have_text("2 of 2 turns until the next step")
    assert program.status()["step"] == 0, "pause stops the next step"
    await page.get_by_role("button", name="Resume").click()
    await expect(page.locator("#step")).to_have_text("step 1")
    await expect(page.locator(".outcome").first).to_have_text("trained on in step 1")
    await expect(page.locator("#pleased canvas")).to_be_visible()
    await rated(program, "only one")
    await expect(page.locator("#why")).to_have_text("Waiting for the batch: 1 of 2 turns until the next step.")
    await page.get_by_role("button", name="Train now").click()
    await expect(page.locator("#step")).to_have_text("step 2")

    await page.locator(".turn").first.get_by_role("button", name="Tokens").click()
    seen = page.locator(".turn").first.locator(".token small")
    await expect(seen).to_have_count(12)
    assert all(float(logprob) < 0 for logprob in await seen.all_inner_texts())
    await expect(page.locator(".turn").first.locator(".version")).to_have_text("weights 1")

    await page.select_option("#checkpoint", "1")
    await page.locator("[data-order=rollback]").click()
    await expect(page.locator("#step")).to_have_text("step 1")
    await expect(page.locator("#counts")).to_contain_text("undone by a rollback to step #")

    talk = [user(ATTACK)]
    talk += [(await ask(client(program, "none"), talk)).choices[0].message, user(ATTACK)]
    await ask(client(program, "none"), talk)
    await expect(page.get_by_text("<script>document.title").first).to_be_visible()
    assert await page.locator(".turn script, .turn img").count() == 0 and "taken" not in await page.title()

    await page.select_option("select[name=state]", "trained")
    await expect(page.locator(".turn")).to_have_count(2)
    await page.get_by_role("button", name="Clear").click()
    await expect(page.locator(".turn")).to_have_count(5)
    session = rows(program)[-1]["session"]
    await page.get_by_role("button", name=session).first.click()
    await expect(page.locator(".turn")).to_have_count(2)
    await page.locator(".turn").first.get_by_role("button", name="Leave out").click()
    await expect(page.locator(".reason")).to_have_text(["left out by hand"] * 2)
    assert {r["reason"] for r in rows(program, "session = ?", session)} == {"left out by hand"}

    check_admin_commands_without_a_key(program)
    assert program.stop() < 15 and program.process.returncode == 0, "an open page does not hold up a stop"


def check_admin_commands_without_a_key(program):
    """Without keys, admin commands are accepted only from our own page, and `forget` still needs the admin's key."""
    same = {"Sec-Fetch-Site": "same-origin"}
    assert post(program, "/admin/pause", {}, **same).status_code == 200
    assert post(program, "/admin/resume", {}, **same, Origin=program.url).status_code == 200
    for headers in (
        {},
        {"Sec-Fetch-Site": "none"},
        {"Sec-Fetch-Site": "same-site"},
        {"Sec-Fetch-Site": "cross-site"},
        {**same, "Host": "evil.example"},  # DNS rebinding: the browser takes this page for the server's own
        {**same, "Origin": "http://evil.example"},
        {**same, "X-Forwarded-For": "1.2.3.4"},
    ):
        assert post(program, "/admin/pause", {}, **headers).status_code == 403, headers
    assert post(program, "/admin/forget", {"session": "x"}, **same).status_code == 403
    for wrong in ([], {"user": [0] * 300_000}):
        error = post(program, "/admin/pause", wrong, **same)
        assert error.status_code == 400 and "wrong field" in error.json()["error"]["message"]
    assert glance(program)["training"] == "on"


@pytest.mark.timeout(600)
async def test_each_user_is_told_why_nothing_is_training(fresh):
    """Each user has a turn that is not trained on for a different reason, and is shown that reason."""
    names = ("open", "side", "cold", "stale", "fine")
    program = fresh(batch_size=2, max_staleness=0, key=",".join(f"{n}:k-{n}" for n in names)).wait_ready()
    why = lambda name: glance(program, f"k-{name}")["why"]  # noqa: E731
    answer = lambda name, **options: ask(client(program, f"k-{name}"), [user("hello")], **options)  # noqa: E731
    rate = lambda name, reply: post(  # noqa: E731
        program, "/v1/feedback", {"completion_id": reply.id, "score": 1}, f"k-{name}"
    ).raise_for_status()
    assert why("open") == "Nothing has been asked yet."
    await answer("open")
    assert why("open") == "No next message yet: 1 answer waits for what the person says next."
    await answer("side", extra_headers={"X-Turn-Type": "side"})
    assert why("side").endswith("it was a side request: the client's own, not a person's.")
    rate("cold", await answer("cold", temperature=0))
    assert why("cold").endswith(
        "it was sampled in a way that can't be trained on, and there is no hint (temperature 0 is below 0.3)."
    )
    old = await answer("stale")
    rate("fine", await answer("fine"))
    mine = "fine has 1 queued turn; a step takes 2, from all users together."
    assert why("fine") == f"Waiting for the batch: {mine}"
    assert glance(program, admin_key(program))["why"] == "Waiting for the batch: 1 of 2 turns until the next step."
    rate("fine", await answer("fine"))
    await until(lambda: program.status()["step"] == 1)
    await until(lambda: why("fine") == "All turns are trained on: the next step waits for new ones.")
    rate("stale", old)
    await until(lambda: why("stale").endswith("generated by weights more than --max_staleness steps old."))
    assert post(program, "/admin/pause", {}, admin_key(program)).status_code == 200
    assert why("fine") == "Training is paused by the admin. 0 judged turns wait for it."


def test_reasons_that_are_hard_to_cause_in_a_running_program(tmp_path):
    """More reasons are tested elsewhere: judge down and stopped by the guard in tests/test_program.py, disk full in
    tests/trials."""
    db = journal.open_journal(tmp_path / "j.db")
    idle = {
        "training": "on",
        "stepping": False,
        "batch_size": 4,
        "batch_wait": 0,
        "judge_error": "",
        "disk_full": False,
        "user": None,
    }

    def why(**changes):
        newest = turns.rows(db, "state, reason, no_rl", turns.newest(db, 20))
        seen = {
            "turns": journal.counts(db),
            "newest": [dict(r) for r in newest],
            "together": journal.counts(db).get("queued", 0),
        }
        return why_nothing(idle | seen | changes)

    users = {"turns": {"queued": 8}, "together": 1}
    assert why(**users) == "Waiting for the batch: 1 of 4 turns until the next step."
    assert "paused or stopped for alice; 8 judged turns wait" in why(**users, paused={"alice": "paused by the admin"})

    journal.record_turn(db, turn("t1"))
    journal.record_next(db, "t1", [user("What is a cow?")])
    assert why() == "The judge is reading 1 turn."
    assert why(judge_error="Connection error.") == "The judge is down, and 1 turn waits for it: Connection error."
    journal.record_verdict(db, "t1", journal.Verdict(0, [0], 0.9, [], "", "m", "judge"))
    assert why().endswith("the next message said nothing about the answer (neutral).")
    journal.record_turn(db, turn("t2", created=0.0))
    assert why().startswith("No next message yet: 1 answer waits") and "neutral" in why()
    journal.expire(db, 1)
    journal.record_turn(db, turn("t3", created=1.0))
    journal.expire(db, 1)
    assert why() == "3 of the last 3 answers can't be trained on. The most common reason (2): no next message came."
    assert why(training="waits: the disk is full").startswith("The disk is full") and why(disk_full=True) == why(
        training="waits: the disk is full"
    )
    journal.record_turn(db, turn("t4"))
    journal.record_verdict(db, "t4", GOOD)
    assert why() == "Waiting for the batch: 1 of 4 turns until the next step."
    assert why(batch_wait=60.0).endswith("It starts without the rest if no turn comes for 60 s.")
    assert why(stepping=True) == "A step is running." and why(training="off").startswith("Training has ended")
    said = f"stopped: {guard.IN_A_ROW} steps in a row reverted, the last one: on the probe, nll is 9.00"
    assert why(training=said).startswith("Training is stopped by the guard: 3 steps in a row reverted")


def test_long_texts_and_thinking_are_cut_visibly(tmp_path):
    with closing(journal.open_journal(tmp_path / "journal.db")) as db:
        long = "x" * (turns.SHOWN + 1)
        journal.record_turn(db, turn("t1", text=f"<think>{long}</think>The answer."))
        journal.record_turn(db, turn("t2", text=long, messages=[user(long * 9)]))
    with closing(turns.connect(tmp_path / "journal.db")) as db:
        second, first = turns.listed(db)
    assert first["answer"] == "The answer."
    assert second["answer"] == second["request"][0]["text"] == long[:-1] + "…"


def test_the_reason_is_given_while_some_users_training_is_paused():
    now = {"turns": {"waiting": 1}, "training": "on", "batch_size": 1, "batch_wait": 60.0, "disk_full": False}
    now |= {"stepping": False, "judge_error": "", "together": 0, "paused": ["alice"], "newest": [{"state": "waiting"}]}
    assert why_nothing(now).startswith("No next message yet")
    now["turns"] = {"queued": 2}
    assert why_nothing(now) == "Training is paused or stopped for alice; 2 judged turns wait."


async def test_users_see_and_rate_only_their_own_turns(program):
    """The page's files need no key. Its data does, and a user's key gives access only to that user's turns."""
    for path in ("/", "/web/page.js", "/web/page.css"):
        reply = httpx.get(program.url + path)
        policy = reply.headers["content-security-policy"]
        assert (
            reply.status_code == 200 and "default-src 'none'; script-src 'self';" in policy and "unsafe" not in policy
        )
    reply = await ask(client(program), [user("a secret of alice")], extra_body={"ignore_eos": True})
    (mine,) = rows(program, "id = ?", reply.id)
    number = query(program, "SELECT number FROM turns WHERE id = ?", reply.id)[0]["number"]
    for path in ("/web/events", "/web/turns", f"/web/turns/{number}", "/web/learned"):
        assert get(program, path).status_code == 401
    assert post(program, "/web/leave_out", {"session": mine["session"]}).status_code == 401
    seen = {key: get(program, "/web/turns", key) for key in (ALICE, BOB, admin_key(program))}
    assert [reply.id in [t["id"] for t in found.json()] for found in seen.values()] == [True, False, True]
    asked_for = get(program, "/web/turns", BOB, params={"user": "alice", "session": mine["session"]})
    assert asked_for.json() == []
    opened = [get(program, f"/web/turns/{number}", key) for key in (ALICE, BOB, admin_key(program))]
    assert [o.status_code for o in opened] == [200, 404, 200]
    assert len(opened[0].json()["tokens"]) == len(opened[0].json()["logprobs"]) == 12
    assert glance(program, BOB)["checkpoints"] == [] and not glance(program, BOB)["admin"]
    assert sum(glance(program, admin_key(program))["turns"].values()) >= sum(glance(program, ALICE)["turns"].values())

    rating = {"completion_id": reply.id, "score": -1}
    assert post(program, "/v1/feedback", rating, BOB).status_code == 404
    assert post(program, "/v1/feedback", rating, admin_key(program)).status_code == 200
    assert query(program, "SELECT score, judge FROM turns WHERE id = ?", reply.id)[0]["judge"] == "admin"
    for key, left_out in ((BOB, 0), (ALICE, 1)):
        done = post(program, "/web/leave_out", {"session": mine["session"]}, key).json()["done"]
        assert done == f"{left_out} answers of this conversation will not be trained on"
    assert rows(program, "id = ?", reply.id)[0]["reason"] == journal.LEFT_OUT
    for number in ("0", "x", "9" * 18, "9" * 5000):
        assert get(program, f"/web/turns/{number}", ALICE).status_code == 404
    assert get(program, "/web/turns?state=x", ALICE).status_code == 400
    assert get(program, "/web/turns?before=x", ALICE).status_code == 400


@needs_browser
async def test_the_page_asks_for_a_key(program, browser):
    await ask(client(program), [user("only alice reads this")])
    await browser.goto(program.url)
    await browser.get_by_label("API key").fill(ALICE)
    await browser.get_by_role("button", name="Continue").click()
    await expect(browser.get_by_text("only alice reads this").first).to_be_visible()
    await expect(browser.locator("#orders")).to_be_hidden()
    assert await browser.evaluate("sessionStorage.getItem('key')") == ALICE


@needs_browser
@pytest.mark.timeout(600)
async def test_the_admin_can_select_a_user_with_an_adapter(fresh, browser):
    """The page then shows that user's steps, and its commands apply only to that user."""
    program = started(fresh, ("alice", "bob"), save_every=1)
    alice, bob = Talker(program, "alice"), Talker(program, "bob")
    await alice.learn(2)
    await bob.learn()
    page = browser
    await page.goto(program.url)
    await page.get_by_label("API key").fill(admin_key(program))
    await page.get_by_role("button", name="Continue").click()
    await expect(page.locator("#step")).to_have_text("step 3")
    for of_one in ("#checkpoint", "#probe_kl"):
        await expect(page.locator(of_one)).to_be_hidden()
    await page.locator(".turn").get_by_role("button", name="alice").first.click()
    await expect(page.locator("#step")).to_have_text("step 2 of alice")
    await expect(page.locator(".turn")).to_have_count(2)
    await expect(page.locator("#checkpoint option")).to_have_text(["step 2", "step 1", "the starting weights"])
    await expect(page.locator("#probe_kl canvas")).to_be_visible()

    await page.get_by_role("button", name="Pause").click()
    await expect(page.locator("#why")).to_contain_text("Training is paused by the admin.")
    alice.complain("while paused")
    await expect(page.locator("#until")).to_have_text("1 of 1 turns until the next step")
    await bob.learn()
    assert alice.status()["step"] == 2
    await page.get_by_role("button", name="Resume").click()
    await expect(page.locator("#step")).to_have_text("step 3 of alice")

    await page.select_option("#checkpoint", "1")
    await page.locator("[data-order=rollback]").click()
    await expect(page.locator("#step")).to_have_text("step 1 of alice")
    assert [who.status()["step"] for who in (alice, bob)] == [1, 2]
    await page.get_by_role("button", name="Clear").click()
    await expect(page.locator("#step")).to_have_text("step 3")
    await expect(page.locator("#checkpoint")).to_be_hidden()
    for key, seen in ((admin_key(program), ["alice"]), ("key-bob", ["bob"])):  # a user can't select another
        headers = {"Authorization": f"Bearer {key}"}
        with httpx.stream("GET", f"{program.url}/web/events?user=alice", headers=headers) as reply:
            event = json.loads(next(reply.iter_lines())[6:])
        assert ([event["user"]], {t["user"] for t in event["listed"]}) == (seen, set(seen))
        assert [s["step"] for s in event["curves"]["steps"]] == {"alice": [1], "bob": [1, 2]}[seen[0]]


async def test_a_user_sees_their_corrections_and_can_ask_again(program):
    """A user's corrections are listed with their counts. `Ask again` sends the request to the starting weights and to
    the current ones, and shows both answers with the complaint. Only someone who may see the turn can do that."""
    said = "Say it shorter, please. I want one short sentence."
    for k in range(2):
        talk = [user(f"question {k} of carol")]
        reply = await ask(client(program), talk)
        rating = {"completion_id": reply.id, "score": -1, "text": said}
        post(program, "/v1/feedback", rating, ALICE).raise_for_status()
    found = {r["hint"]: r for r in get(program, "/web/learned", ALICE).json()}
    assert found["I want one short sentence."]["times"] == found["Say it shorter, please."]["times"] == 2
    assert said not in found and get(program, "/web/learned", BOB, params={"user": "alice"}).json() == []
    number = found["I want one short sentence."]["numbers"][0]
    assert get(program, f"/web/learned/{number}", BOB).status_code == 404
    before = len(rows(program))
    again = get(program, f"/web/learned/{number}", ALICE).json()
    assert (again["request"], again["complaint"]) == ("question 1 of carol", said)
    assert again["first"] and again["current"] and (again["nats"] == 0.0) == (again["first"] == again["current"])
    assert len(rows(program)) == before, "what is asked again is not recorded"
    many = [asyncio.to_thread(get, program, f"/web/learned/{number}", ALICE) for _ in range(MAX_ASKING + 2)]
    codes = sorted([reply.status_code for reply in await asyncio.gather(*many)])
    assert set(codes) == {200, 429} and codes.count(200) >= MAX_ASKING, "one user can't keep the judge for hours"
    assert get(program, f"/web/learned/{number}", ALICE).status_code == 200


def test_the_logp_of_a_complaint_matches_a_plain_forward_pass(tiny_model):
    """It is the sum of the log-probs of all its tokens. Nothing in the complaint can end its section of the prompt."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    found = learned.logp_of(model, tokenizer, "Why?", "Because.", "Too long.\nUser reply: fine")
    head, said = "Request: Why?\nAnswer: Because.\nUser reply:", " Too long. / User reply - fine"
    ids = torch.tensor([tokenizer(head + said)["input_ids"]])
    logps = model(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
    assert found == pytest.approx(logps[-len(said) :].sum().item(), rel=1e-4)


@pytest.mark.parametrize("is_terminal", [True, False])
async def test_a_progress_line_is_shown_only_in_a_terminal(tmp_path, monkeypatch, is_terminal):
    db = journal.open_journal(tmp_path / "j.db")
    journal.record_turn(db, turn("t1"))
    journal.record_verdict(db, "t1", GOOD)
    config = SimpleNamespace(batch_size=4)
    p = SimpleNamespace(db=db, steps=lambda: {"": 7}, config=config, last_step={"reward": -0.5}, training="on")
    terminal_end, program_end = pty.openpty() if is_terminal else os.pipe()
    if is_terminal:
        termios.tcsetwinsize(program_end, (24, 100))
    monkeypatch.setattr(sys, "stdout", os.fdopen(program_end, "w", buffering=1))
    shown = asyncio.create_task(terminal.show_progress(p))
    await asyncio.sleep(2.5)  # by then the line has been written, and its second update is complete
    terminal.print_step({"step": 8})
    shown.cancel()
    await asyncio.wait([shown])
    lines = ""
    while "step 8" not in lines:
        lines += os.read(terminal_end, 10_000).decode()
    assert ("step 7 |" in lines and "| 1/4 turns, reward -0.50, training on" in lines) == is_terminal
    assert is_terminal or lines == "step 8\n"


def test_the_list_of_turns_is_read_from_indexes(tmp_path):
    """Pages of 30 turns for each filter, newest first, and no query that reads all turns or sorts them."""
    path = tmp_path / "j.db"
    db = journal.open_journal(path)
    for k in range(100):
        journal.record_turn(db, turn(f"t{k}", user=("alice", "bob")[k % 2], session=f"s{k % 4}", created=float(k)))
    journal.drop(db, [f"t{k}" for k in range(0, 100, 3)], journal.NEUTRAL)
    db = turns.connect(path)
    found = []
    while page := turns.listed(db, user="bob", before=found[-1]["created"] if found else None):
        found += page
    assert [t["id"] for t in found] == [f"t{k}" for k in range(99, 0, -2)]
    assert [t["id"] for t in turns.listed(db, session="s1", state="dropped")] == [
        f"t{k}" for k in range(99, -1, -1) if k % 4 == 1 and k % 3 == 0
    ]
    assert {t["state"] for t in turns.listed(db, state="dropped")} == {"dropped"}
    assert turns.listed(db, session="s1", user="alice") == []
    plans = []
    db.set_trace_callback(lambda sql: plans.append(sql) if "INDEXED BY" in sql else None)
    for where in ({}, {"user": "bob"}, {"state": "dropped"}, {"user": "bob", "state": "waiting"}):
        turns.newest(db, 30, **where)
    db.set_trace_callback(None)
    for sql in plans:
        plan = [r["detail"] for r in db.execute(f"EXPLAIN QUERY PLAN {sql}")]
        assert not [step for step in plan if re.match(r"SCAN turns", step)]
        assert sum("TEMP B-TREE" in step for step in plan) <= 1, plan  # sorts only the 30 newest of each state


def test_the_share_of_pleased_replies_counts_the_last_ten_non_neutral_ones(tmp_path):
    """The replies are in order of time. Neutral replies and those of other users do not count."""
    db = journal.open_journal(tmp_path / "j.db")
    assert turns.pleased(db, None) == {"window": 10, "shares": []}
    for k, score in enumerate([-1] * 10 + [0] * 5 + [1] * 10):
        journal.record_turn(db, turn(f"t{k}", created=float(k)))
        journal.record_verdict(db, f"t{k}", journal.Verdict(score, [score], 1.0, [], "", "m", "judge"))
    journal.record_turn(db, turn("other", user="bob"))
    found = turns.pleased(db, "alice")["shares"]
    assert [at for at, _ in found] == [float(k) for k in [*range(10), *range(15, 25)]]
    assert [share for _, share in found[9:]] == [k / 10 for k in range(11)]
    assert turns.pleased(db, "bob")["shares"] == []


def test_a_very_long_message_is_cut_in_the_journal(tmp_path):
    db = journal.open_journal(tmp_path / "j.db")
    sent = [
        user("x" * 10**6),
        {"role": "assistant", "content": "a"},
        {"role": "tool", "content": [{"text": "y" * 10**5}]},
    ]
    journal.record_turn(db, turn("t1", messages=sent))
    journal.record_turn(db, turn("t2", messages=sent[:1]))
    second, first = turns.listed(db)
    assert [(m["role"], len(m["text"])) for m in (*first["request"], *second["request"])] == [
        ("tool", turns.SHOWN + 1),
        ("user", turns.SHOWN + 1),
    ]


def test_steps_are_read_from_the_end_of_their_file(tmp_path):
    file = tmp_path / "metrics.jsonl"
    assert turns.steps(file, True, "") == []
    names = ("step", "time", "probe_kl", "probe_length", "pause_s", "reward", "length", "dlogp")
    file.write_text("".join(json.dumps(dict.fromkeys(names, k)) + "\n" for k in range(30_000)))
    found = turns.steps(file, True, "")
    assert found[-1]["step"] == 29_999 and 250 <= len(found) <= 500 and found[0]["step"] > 0
    assert set(turns.steps(file, False, "")[0]) == {"step", "time", "probe_kl", "probe_length", "pause_s"}


def test_the_page_fits_on_500_lines():
    assert sum(len((ROOT / "web" / f"page.{kind}").read_text().splitlines()) for kind in ("html", "css", "js")) <= 500
