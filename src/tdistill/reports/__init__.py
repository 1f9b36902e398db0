"""Reports: what a finished run's JSON files say, as a web page, a model card, Markdown and plain text."""
