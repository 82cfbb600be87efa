"""`antipasto watch`: how hack-ward anybody's rollouts are, by the model that they were trained from.

sources    files of any trainer → rollouts
scoring    rollouts → scores at the reference, and those of what one would compare them with
auc        the area under a ROC curve, with its interval
compare    scores against labels, by window of steps
job        all of it, so that it can be interrupted at any moment
result     what came of it
command    what it says on a terminal
page       what came of it → one HTML file
"""

from antipasto.app.watch.job import WatchConfig, watch
from antipasto.app.watch.result import Watched
from antipasto.app.watch.sources import Columns

__all__ = ["Columns", "WatchConfig", "Watched", "watch"]
