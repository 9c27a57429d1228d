"""One page about any number of runs and distilled sets, as HTML and as Markdown."""
