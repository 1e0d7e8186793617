"""Particular clients: the text they add around a person's words, the requests they make themselves, and how they name a
session. Nothing depends on this being complete: see sessions.py."""

import json
import re
from collections.abc import Mapping

# OpenClaw appends a user message that starts with this to each request, and removes it before the next.
CARRIER = "<<<BEGIN_OPENCLAW_INTERNAL_CONTEXT>>>"

# Any long input must take linear time: `*+` doesn't backtrack if the rest doesn't match.

# ---- the clients' own requests ----

# How the last user message, or the system message, begins if the client itself asks, inside a person's conversation or
# outside it. In later requests, OpenClaw replaces such a request in the history by a line in brackets.
OWN_REQUESTS = {
    "user": re.compile(
        # OpenClaw, and its heartbeats before 2026.9
        r"\s*+(Pre-compaction memory flush\.|Follow the heartbeat monitor|Read HEARTBEAT\.md|"
        r"Run the following periodic tasks \(only those due|A scheduled (reminder has been|cron event was) triggered|"
        r"An async command (you ran|completion event)|\[System\] |Refresh this session.s progress card now|"
        r"\[OpenClaw (heartbeat poll|exec completion|cron wake|session event)\]|"
        # NextChat
        r"Please generate a four to five word title summarizing our conversation|"
        # Claude Code
        r"\[SUGGESTION MODE\b|The user stepped away and is coming back\.|"
        r"Write the title in the language|CRITICAL: Respond with TEXT ONLY|"
        r"Your task is to create a detailed summary of the conversation so far|"
        # Codex, Cline, Roo Code and Kilo Code, opencode, Zed
        r"You are performing a CONTEXT CHECKPOINT COMPACTION|The current conversation is rapidly running out of|"
        r"Summarize the conversation so far, as described in the prompt instructions|"
        r"Provide a detailed prompt for continuing our conversation above|"
        r"Generate a (concise 3-7 word title for this conversation,|detailed summary of this conversation\. Include:)|"
        # Open WebUI: a title, tags, follow-ups, searches, completions of what is typed, an image, an emoji
        r"### Task:\s+(Generate (a concise(?:,[^\n]{1,20})? title|1-3 broad|a detailed prompt)|(Predict|Suggest) 3-5|"
        r"Analyze the chat history to determine|You are an autocompletion)|"
        r"Your task is to reflect the speaker's likely facial expression)"
    ),
    "system": re.compile(
        r"\s*+(Generate a concise session title|You are a context summarization assistant|"
        r"You are a title generator\. You output ONLY|Summarize the discussion briefly in 200 words|"
        r"Your task is to create a detailed summary of the conversation so far|"
        r"Analyze if this message indicates a new conversation topic|"
        # Aider: a commit message, a summary of the history
        r"You are an expert software engineer that generates concise, one-line Git commit messages|"
        r"\*Briefly\* summarize this partial conversation about programming)"
    ),
}
# How a user message begins if it is a program's output, not a person's words.
OUTPUT = re.compile(
    # Cline, Aider
    r"\s*+(\[\w{1,60}(?: for [^\n]{0,300})?\] Result:|\[ERROR\] You did not use a tool|I ran this command:\n|"
    r"# Fix any errors below|# \d+ SEARCH/REPLACE block|I did `git reset --hard HEAD~1` to discard the last edits|"
    # Claude Code
    r"<task-notification>|\[SYSTEM NOTIFICATION - NOT USER INPUT\]|Stop hook feedback:)"
)
# How Cline's output begins if it is what the person said to its question or plan.
ANSWERED = re.compile(
    r"\s*+\[(?:ask_followup_question|plan_mode_respond)[^\n]{0,300}\] Result:\s*+<(answer|user_message)>"
)
# User messages that Aider adds to the history, and the assistant messages that it puts after them.
FILLER = re.compile(
    r"\s*+(I committed the changes with git hash|I updated the files\.\s*+\Z|I switched to a new code base\.|"
    r"(I have|These files have been) \*added these files to the chat\*|Here are some READ ONLY files, provided for|"
    r"I am not sharing (any files (yet|with you|that you can edit)|the full contents of any files)|"
    r"Here are summaries of some files present in|These are some files we have been discussing|"
    r"Don't try and edit any existing code without asking me to add|Here is the content of http)"
)
FILLER_REPLY = re.compile(
    r"Ok(\.|, (any changes I propose will be|I will use th|I won't try and edit those|based on your requests I)[^\n]*)"
)
# How Aider's format rules begin, which stand after the person's words.
REMINDERS = (
    "# *SEARCH/REPLACE block* Rules:",
    "To suggest changes to a file you MUST return",
    "# File editing rules:\n\nReturn edits similar to",
    "# V4A Diff Format Rules:",
    "NEVER RETURN CODE!",
)
ENDS = 20_000  # characters at each end of a long text that are searched for the next two
# A heartbeat's prompt can be configured, but it always asks for the same answer if all is well.
HEARTBEAT = re.compile(r"(?<!you )\b(reply|respond|answer|say|return|output|send)\b[^\n]{0,60}\bHEARTBEAT_OK\b", re.I)
# Messages from a subagent, another session or a tool contain this line.
ROUTED = re.compile(r"^\[Inter-session message\] .*isUser=false$", re.MULTILINE)
# Replies to such requests that clients hide from the person.
SILENT = re.compile(r"\W*(NO_REPLY\W*)*|\s*HEARTBEAT_OK.{0,300}|.{0,300}HEARTBEAT_OK\W*", re.DOTALL | re.IGNORECASE)
SPEAKING_TOOLS = ("message", "heartbeat_respond")  # their calls may show the person something


def is_automatic(text: str) -> bool:
    """Is a user message a heartbeat, or from a subagent, another session or a tool?"""
    text = text if len(text) < 2 * ENDS else f"{text[:ENDS]}\n{text[-ENDS:]}"
    found = "HEARTBEAT_OK" in text and HEARTBEAT.search(text)  # the plain search first: it is much faster
    return bool(found or "isUser=false" in text and ROUTED.search(text))


# ---- text around a person's words ----

# What OpenClaw's history keeps of its own requests: lines before the person's next message, after the time.
MARKS = re.compile(
    r"\A(\s*+(?:\[[^\]\n]{0,150}\d\d?:\d\d[^\]\n]{0,150}\]\s)?)"
    r"(?:\[OpenClaw (?:heartbeat poll|exec completion|cron wake|session event)\]\n++"
    r"(?:Disable automatic completion turns with [^\n]*+\n++)?+)++(?!Disable automatic|\s*+\Z)"
)
# Everything before this line is context (OpenClaw in a group chat).
CURRENT = "[Current message - respond to this]\n"
# A channel and a time in brackets, or a time alone: "[WhatsApp +15550100 Sun 10:01] No." (OpenClaw and its relatives),
# and a retry after an error.
ENVELOPE = re.compile(
    r"\A\s*+\[(?:(?:WhatsApp|Telegram|Signal|Discord|Slack|iMessage|SMS|Matrix|Teams|Mattermost|LINE|Zalo|WebChat|Email|"
    r"Google Chat|Nostr|Feishu|Queued user message)\b[^\]\n]{0,300}|[^\]\n]{0,150}\b\d\d?:\d\d[^\]\n]{0,150})\]\s?"
)
# Messages that came while OpenClaw's agent was busy, and the line before each of them.
QUEUED = re.compile(r"\A\s*+\[Queued messages while agent was busy\]\s*+")
NUMBERED = re.compile(r"^---\nQueued #\d+[^\n]{0,200}\n", re.MULTILINE)
INTERRUPTED = re.compile(r"\A\s*+\[Request interrupted by user[^\]\n]{0,40}\]")  # Claude Code
FOOTER = re.compile(r"Runtime: agent=|Current time: |\[message_id: ")  # how a last line of metadata begins
# A line before a block of metadata, and the keys that distinguish metadata from JSON that a person pasted.
LABEL = re.compile(r"\s*+[^\n{}<]{0,100}(?:\(untrusted[^()\n]{0,80}\):|⟦openclaw:ctx⟧)[ \t]*\n")
METADATA = re.compile(r"(sender|timestamp|message_?id|chat_?id|conversation|channel|provider|surface)", re.I)
# A tagged block of context, by the name of its tag; other tags may be a person's own.
CONTEXT_TAG = re.compile(
    r"context|reminder|environment|metadata|caveat|notice|instruction|memor|workspace|attach|editor|ide_|selection|"
    r"open_files|additional_data|command|stdout|system|history|session|rules|skills|documents|sources",
    re.IGNORECASE,
)
# Such a tag is a person's own nevertheless if it ends the message, or is all of it.
OWN_TAG = re.compile(r"instructions?|rules?|history|system|documents|command", re.IGNORECASE)
# A tag around the person's own words (Cursor, Copilot, Cline, Open WebUI).
WORDS_TAG = re.compile(r"(user_?(query|message|request|input|prompt|question)|task|feedback|query|question)", re.I)
# Open WebUI's instructions before retrieved documents.
PREAMBLE = re.compile(r"\A\s*+### Task:\s+Respond to (?s:.{0,6000}?)\n(?=<context>|<source)")
OPENS = re.compile(r"\s*+<([A-Za-z][\w-]{1,60})(?:\s[^<>]{0,300})?>")
CLOSES = re.compile(r"</([A-Za-z][\w-]{1,60})>\s*\Z")


def leading_block(text: str) -> tuple[str, str, str] | None:
    """(name, content, the text after it) of the tagged block that a text begins with."""
    if (opened := OPENS.match(text)) and (end := text.find(f"</{opened[1]}>", opened.end())) >= 0:
        return opened[1], text[opened.end() : end], text[end + len(opened[1]) + 3 :]
    return None


def trailing_block(text: str) -> tuple[str, str, str] | None:
    """(name, content, the text before it) of the tagged block that a text ends with, on lines of its own."""
    tail = len(text) - 200
    if closed := CLOSES.search(text, max(0, tail)):
        at = text.rfind(f"\n<{closed[1]}", 0, closed.start())
        if at >= 0 and (opened := OPENS.match(text, at)) and opened[1] == closed[1]:
            return closed[1], text[opened.end() : closed.start()], text[:at]
    return None


def is_metadata(value: object) -> bool:
    return isinstance(value, dict) and sum(bool(METADATA.match(k)) for k in value) >= 2


FENCE = re.compile(r"\s*+(```(?:json)?[ \t]*\n\s*)?(?=\{)")


def parsed(text: str, at: int) -> tuple[object, int]:
    """The JSON value that begins at index `at`, and where it ends; (None, at) if there is none."""
    try:
        return json.JSONDecoder().raw_decode(text, at)
    except (ValueError, RecursionError):
        return None, at


def without_metadata(text: str) -> str:
    """The text without JSON about sender and time at its beginning or end, fenced or not, labelled or not."""
    label = LABEL.match(text)
    if opened := FENCE.match(text, label.end() if label else 0):
        value, end = parsed(text, opened.end())
        if value is not None and (label or is_metadata(value)):
            return re.sub(r"\A\s*```[ \t]*\n?" if opened[1] else r"\A\s*", "", text[end:])
    if (at := text.rfind("\n{")) >= 0:
        value, end = parsed(text, at + 1)
        if is_metadata(value) and text[end:].strip() in ("", "```"):
            rest = text[:at].removesuffix("```json").removesuffix("```").rstrip()
            return re.sub(r"(^|\n)[^\n]{0,100}(\(untrusted[^()\n]{0,80}\)|metadata|⟦openclaw:ctx⟧):?\s*\Z", "", rest)
    return text


def without_last_line(text: str) -> str:
    lines = text.rstrip().rsplit("\n", 1)
    return lines[0].rstrip() if len(lines) == 2 and FOOTER.match(lines[1]) else text


def without_marks(text: str) -> str:
    """The text without MARKS at its beginning. A text of nothing else stays."""
    return MARKS.sub(r"\1", text)


def is_output(text: str) -> bool:
    """Is a user message a program's output, without words of the person's in it?"""
    return bool(OUTPUT.match(text)) and not said_in_output(text)


def said_in_output(text: str) -> str:
    """What the person said in Cline's output: the answer to a question, or feedback at the end; "" if nothing."""
    if opened := ANSWERED.match(text):
        tag, at = opened[1], opened.end()
    else:
        tag, at = "feedback", text.rfind("\n<feedback>") + len("\n<feedback>")
        if at < len("\n<feedback>"):
            return ""
    end = text.rfind(f"</{tag}>", at)
    after = text[end:].removeprefix(f"</{tag}>").lstrip()
    return text[at:end].strip() if end >= 0 and (not after or after.startswith("<environment_details>")) else ""


def is_filler(message: dict, reply: dict) -> bool:
    """Is this user message, with the assistant message after it, a pair that Aider adds?"""
    asked, said = message.get("content"), reply.get("content")
    both = message.get("role") == "user" and reply.get("role") == "assistant"
    both = both and isinstance(asked, str) and isinstance(said, str)
    return both and bool(FILLER.match(asked) and FILLER_REPLY.fullmatch(said))


PASSES = 8  # over a text at most, to bound the work


def persons_words(text: str) -> str:
    """The person's own words in a user message; "" if all of it is the client's."""
    if text.isspace():
        return ""
    queued = QUEUED.match(text)
    parts = NUMBERED.split(text[queued.end() :], 100) if queued else [text]
    return "\n".join(filter(None, map(unwrapped, parts)))


def unwrapped(text: str) -> str:
    """The person's own words in one message.

    Each pass removes something from the text's beginning or end. Tagged blocks that the person may have written stay.
    """
    text = without_marks(text.rpartition(CURRENT)[2])
    if OUTPUT.match(text) and (said := said_in_output(text)):
        return said
    for reminder in REMINDERS:
        before, found, _ = text.partition(f"\n\n{reminder}")
        text = before.rstrip() if found else text
    words = INTERRUPTED.sub("", PREAMBLE.sub("", text))
    for _ in range(PASSES):
        before = words
        words = ENVELOPE.sub("", without_last_line(without_metadata(words)))
        first, last = leading_block(words), trailing_block(words)
        if first and CONTEXT_TAG.search(first[0]) and (first[2].strip() or not OWN_TAG.fullmatch(first[0])):
            words = first[2]
        elif last and CONTEXT_TAG.search(last[0]) and not OWN_TAG.fullmatch(last[0]):
            words = last[2]
        if words == before and first and WORDS_TAG.fullmatch(first[0]) and not first[2].strip():
            words = first[1]
        if words == before:
            break
    return words.strip() if words != text else text


# ---- headers ----


def named_session(headers: Mapping[str, str]) -> str | None:
    """The session that a request belongs to, if its headers name one."""
    # OpenClaw's has a count of the session's compactions at its end.
    affinity = re.sub(r":\d+$", "", headers.get("x-session-affinity", ""))
    return headers.get("x-session-id") or affinity or headers.get("x-openwebui-chat-id")
