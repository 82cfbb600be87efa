"""`antipasto watch`: score the rollouts of any trainer with the model that training started from.

config     the options
sources    files of any trainer → rollouts
scoring    rollouts → scores at the reference, and other scores to compare with
auc        the area under the ROC curve, with its interval
compare    scores against labels, by window of steps
job        all of it; can be interrupted at any moment
result     the result
command    printing on the terminal
page       the result → one HTML file
"""
