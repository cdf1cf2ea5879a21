"""From `RunResults` to pages: paired statistics, comparison tables, HTML, Markdown, CSV and a terminal table.

Knows scores, texts and seconds. Must not know HELM, tensors or how an answer was made.
"""
