"""What runs froze, when, why, and what it bought: records to numbers, to charts, to one page.

==============  ================================================================================
`read`          run folders and studies, as their files tell them
`timeline`      what each layer group did when, and the decisions that made it so
`costs`         where the time of a run went; what freezing was predicted and measured to save
`results`       quality, cost and curves per strategy, seeds together
`mistakes`      what the model got wrong on the test split
`repeat`        the command, versions and settings that give the same again
`numbers`       all of these of a set of runs: everything that a report shows
`charts`        numbers to Vega-Lite charts
`page`          numbers and charts to one HTML file
`figures`       numbers and charts to JSON, CSV, SVG and PNG files
==============  ================================================================================

Only records are read; the last four need the extra ``report``.
"""
