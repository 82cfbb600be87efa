"""The report of one or several runs, as one HTML file that needs no network and no server.

    reading    a run folder → `Run`: its contents, checked, and one sentence for each missing part
    rollouts   rollouts.jsonl → curves by step and policy, and a selection of rollouts
    answers    an evaluation's answers, row by row, all arms side by side
    layers     knobs and directions by kind of layer, depth and singular direction
    plots      numbers → small SVG figures, coloured by the style sheet
    page       all of it → HTML

Text from files is escaped, and its invisible characters are spelled out.
"""

from antipasto.app.report.page import write_report

__all__ = ["write_report"]
