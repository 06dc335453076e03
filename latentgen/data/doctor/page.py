"""What was found, as JSON and as a page that needs no other file and loads nothing."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

from latentgen.data.doctor.checks import CHECKS, Patient, Trouble

SEVERITIES = ("error", "warning", "note")
SHOWN = 24
"""Troubles of a kind that are shown with pictures; the others are listed by name, up to `LISTED`."""
LISTED = 2000

_CSS = """
:root { color-scheme: light dark; --page: #f6f7f9; --card: #fff; --ink: #1b1f24; --soft: #5b6470; --edge: #d9dde3;
  --error: #b3261e; --warning: #8a4b00; --note: #1f5fbf; }
@media (prefers-color-scheme: dark) { :root { --page: #14171b; --card: #1d2126; --ink: #e8ebef; --soft: #a2abb6;
  --edge: #343b43; --error: #ff8a80; --warning: #ffc978; --note: #7db0ff; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1100px; margin: 0 auto; padding: 20px 16px 48px; }
h1 { font-size: 1.5rem; margin: 0; overflow-wrap: anywhere; }
details { background: var(--card); border: 1px solid var(--edge); border-radius: 8px; margin: 10px 0; }
details { padding: 8px 12px; }
summary { cursor: pointer; font-weight: 600; }
summary span { font-weight: 400; color: var(--soft); }
.error summary b { color: var(--error); } .warning summary b { color: var(--warning); }
.note summary b { color: var(--note); }
ul.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(240px, 1fr)); gap: 10px; padding: 0; }
ul.cards li { list-style: none; border: 1px solid var(--edge); border-radius: 6px; padding: 6px 8px; min-width: 0; }
li div { overflow-wrap: anywhere; font-size: .86rem; } .soft { color: var(--soft); }
img { max-width: 112px; max-height: 112px; margin: 0 4px 4px 0; background: #fff; }
"""


class Finding(NamedTuple):
    """All troubles of one kind."""

    kind: str
    troubles: list[Trouble]

    @property
    def severity(self) -> str:
        return CHECKS[self.kind].severity


def examine(patient: Patient) -> list[Finding]:
    """What is wrong, the worst first; kinds of which nothing is found are left out."""
    found = [Finding(kind, list(check.find(patient))) for kind, check in CHECKS.items()]
    return sorted((f for f in found if f.troubles), key=lambda finding: SEVERITIES.index(finding.severity))


def as_json(where: str, pictures: int, findings: Sequence[Finding]) -> dict[str, Any]:
    """The findings as plain values; keys are only ever added."""
    return {
        "set": where,
        "pictures": pictures,
        "counts": counts(findings),
        "findings": [
            {
                "kind": finding.kind,
                "severity": finding.severity,
                "title": CHECKS[finding.kind].title,
                "remedy": CHECKS[finding.kind].remedy,
                "troubles": [{"names": list(t.names), "why": t.why} for t in finding.troubles],
            }
            for finding in findings
        ],
    }


def counts(findings: Sequence[Finding]) -> Mapping[str, int]:
    """Troubles by severity."""
    return {s: sum(len(f.troubles) for f in findings if f.severity == s) for s in SEVERITIES}


def as_page(where: str, pictures: int, findings: Sequence[Finding]) -> str:
    """The page. All that comes from names and captions is escaped."""
    style = base64.b64encode(hashlib.sha256(_CSS.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'sha256-{style}'"
    told = ", ".join(f"{count} {severity}s" for severity, count in counts(findings).items())
    body = "".join(map(_section, findings)) or "<p>Nothing was found.</p>"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(where)}: findings</title><style>{_CSS}</style></head><body><main>"
        f'<h1>{escape(where)}</h1><p class="soft">{pictures} pictures; {told}</p>{body}</main></body></html>\n'
    )


def _section(finding: Finding) -> str:
    check, troubles = CHECKS[finding.kind], finding.troubles
    cards = "".join(map(_card, troubles[:SHOWN]))
    rest = troubles[SHOWN:LISTED]
    more = "".join(f"<div>{escape(' = '.join(t.names))}: {escape(t.why)}</div>" for t in rest)
    listed = f"<details><summary>{len(troubles) - SHOWN} more</summary>{more}</details>" if rest else ""
    opened = " open" if finding.severity != "note" else ""
    return (
        f'<details class="{finding.severity}"{opened}><summary><b>{finding.severity}</b> {escape(check.title)}: '
        f"{len(troubles)} <span>({escape(check.remedy)})</span></summary>"
        f'<ul class="cards">{cards}</ul>{listed}</details>'
    )


def _card(trouble: Trouble) -> str:
    coded = [base64.b64encode(thumb).decode() for thumb in trouble.pictures[:4]]
    images = "".join(f'<img alt="" src="data:image/jpeg;base64,{content}">' for content in coded)
    names = "".join(f"<div>{escape(name)}</div>" for name in trouble.names[:6])
    more = f'<div class="soft">and {len(trouble.names) - 6} more</div>' if len(trouble.names) > 6 else ""
    return f'<li>{images}{names}{more}<div class="soft">{escape(trouble.why)}</div></li>'
