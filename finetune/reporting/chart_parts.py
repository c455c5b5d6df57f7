"""Parts that a report's charts share: colours, the parameter of the run that was clicked, data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import altair as alt

# Altair looks for pandas in sys.modules, and would find it half imported where another thread of a
# sweep imports it at that time; this waits for its end.
import pandas  # noqa: F401

# Okabe and Ito's palette (2008), for colour-blind readers; its black and yellow are left out.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
GREY = "#888888"
PICKED = alt.param(name="picked", value=None)
IS_OTHER = "isValid(picked) && picked !== datum.run"
IS_PICKED = "!isValid(picked) || picked === datum.run"
PARALLEL = "parallel"  # the name of the chart of many settings
MOST_NAMED = 40  # runs with their labels on an axis; of more, hovering says which
MOST_COLOURS = len(COLOURS)
MOST_FACETS = 24  # small multiples of a heat map
HEIGHT = 260

Spec = dict[str, Any]
Records = list[dict[str, Any]]


@dataclass(frozen=True)
class Chart:
    """One chart: the name of its file, its caption, and its spec without a width."""

    section: str  # of the page: scores, settings, training or cost
    name: str
    caption: str
    spec: Spec

    @property
    def is_wide(self) -> bool:
        """True if it takes the page's width: small multiples, parallel coordinates."""
        return "facet" in self.spec or self.name == PARALLEL


def build_chart(section: str, name: str, caption: str, drawn: alt.TopLevelMixin) -> Chart:
    """Return a chart of the page, in which a clicked run is seen."""
    spec = cast(Any, drawn).add_params(PICKED).to_dict(validate=False)
    spec.pop("config", None)  # of the page, in light or dark
    return Chart(section, name, caption, spec)


def fade_others() -> Any:
    """Return the opacity of marks: all but those of the clicked run fade."""
    return alt.OpacityValue(0.12, condition={"test": IS_PICKED, "value": 1.0})


def inline(records: Records) -> Any:
    """Return records as data within the spec."""
    return alt.InlineData(values=records)
