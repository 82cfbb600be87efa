"""What came of one or several runs, as one HTML file that needs no network and no server.

    reading    a run folder → `Run`: all that is in it, checked, and one sentence for each part that is not
    rollouts   rollouts.jsonl → curves by step and policy, and the rollouts that are worth a look
    answers    an evaluation's answers, row by row, arm beside arm
    layers     knobs and directions by kind of layer, depth and singular direction
    plots      numbers → small SVG figures without a colour of their own
    page       all of it → HTML

All text that comes from a file is data: it is escaped, and what a browser would act on without showing it is spelled out.
"""

from antipasto.app.report.page import write_report

__all__ = ["write_report"]
