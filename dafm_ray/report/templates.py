"""Pages from the templates beside this file; every text is escaped."""

from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined


def rendered(template: str, **values: Any) -> str:
    """A page; a value that the template asks for and does not get is an error."""
    environment = Environment(
        loader=PackageLoader("dafm_ray", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(**values)
