"""Reports, independent of models: figures as text, plots and pages.

    formatting.py   numbers, sizes and lengths as text
    plots.py        lines, bars and heat maps as SVG, by matplotlib; svg.py has their colours
    pages.py        words, tables and plots as Markdown and HTML, by the jinja2 templates in templates/

matplotlib and jinja2 are lazy imports, because most commands need neither.
"""
