"""What a person looks at after a run, as files: a report in HTML and a model card.

In: run directories. Out: report.html, MODEL_CARD.md. `survey.py` gathers and measures, `charts.py` draws, `page.py` and
`card.py` write; only the first computes anything.

Others use `survey`, `write_page` and `write_card`.
"""
