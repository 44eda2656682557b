"""Tables that a script writes into a page of docs/, each between the marks `<!-- name -->` and `<!-- /name -->`."""

from collections.abc import Mapping


def fill(page: str, tables: Mapping[str, str]) -> str:
    """The text of a page with its tables, {name: Markdown that ends with a newline}, up to date."""
    for name, table in tables.items():
        begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->\n"
        before, rest = page.split(begin)
        _, after = rest.split(end)
        page = f"{before}{begin}\n{table}\n{end}{after}"
    return page
