"""The looks of the form, in the dashboard's colours. Head, help and marks have one size whatever they say."""

from __future__ import annotations

from miles_cli.dashboard.styles import AMBER, CYAN, DIM, FAINT, INK, PAPER, RED

FIELD, FOCUSED = "#1a212c", "#24435c"

CSS = f"""
Screen {{ background: {PAPER}; color: {INK}; }}
#head {{ height: 1; background: #1d2531; }}
#body {{ height: 1fr; }}
#questions {{ width: 45%; min-width: 36; max-width: 64; padding: 0 1 0 0; }}
#panel {{ width: 1fr; border-left: vkey {FAINT}; padding: 0 1; }}
.ascii #panel {{ border-left: ascii {FAINT}; }}
#seen {{ height: auto; }}
#help {{ height: 4; color: {DIM}; padding: 0 1; border-top: solid {FAINT}; }}
.ascii #help {{ border-top: ascii {FAINT}; }}
#keys {{ height: 1; color: {DIM}; padding: 0 1; }}
.group {{ color: {CYAN}; text-style: bold; padding: 0 0 0 1; }}
.roomy .group {{ margin: 1 0 0 0; }}
.row {{ height: 1; }}
.mark {{ width: 2; color: {DIM}; }}
.title {{ width: 16; color: {DIM}; }}
.given .mark {{ color: {AMBER}; }}
.given .title {{ color: {INK}; }}
.open .mark, .open .title {{ color: {RED}; text-style: bold; }}
Input, Turner {{ width: 1fr; height: 1; color: {INK}; background: {FIELD}; padding: 0; border: none; }}
Turner {{ text-wrap: nowrap; text-overflow: ellipsis; }}
Input:focus, Turner:focus {{ background: {FOCUSED}; border: none; }}
.current .title {{ color: #ffffff; text-style: bold; }}
VerticalScroll {{ scrollbar-size-vertical: 1; scrollbar-color: #3a5a70; scrollbar-background: {PAPER}; }}
WriteAnyway {{ align: center middle; background: {PAPER} 60%; }}
#question {{ width: 60; max-width: 90%; height: auto; padding: 1 2; }}
#question {{ border: round {RED}; background: #141a23; }}
.ascii #question {{ border: ascii {RED}; }}
"""
