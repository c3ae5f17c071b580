"""What a person looks at after a run, as files: a report in HTML and a model card.

`survey.py` gathers and measures, `charts.py` draws, `page.py` and `card.py` write. Only the first computes anything.
"""
