"""The example tasks, by name."""

from .casing import CASING
from .core import Item, Split, Task
from .dates import DATE_ISO
from .legal import LEGAL_V2
from .sentiment import SENTIMENT
from .sql import SQL_V1
from .tickets import TICKET_ROUTER
from .units import UNITS_JSON

TASKS: dict[str, Task] = {
    task.name: task for task in (CASING, DATE_ISO, LEGAL_V2, SENTIMENT, SQL_V1, TICKET_ROUTER, UNITS_JSON)
}

__all__ = ["TASKS", "Item", "Split", "Task"]
