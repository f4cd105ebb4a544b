"""Queued jobs: tenants take turns, and each one's jobs go in the order they came."""

from collections import OrderedDict, deque

from server.jobs.job import Job

REMEMBERED = 1024  # tenants whose turn is known; one that had it before all of these comes first, as a new one does


class FairQueue:
    """The next job is of the tenant whose job began longest ago; of several that had none yet, of the first to come."""

    def __init__(self) -> None:
        self._lines: dict[str, deque[Job]] = {}  # by tenant, none of them empty
        self._begun: OrderedDict[str, None] = OrderedDict()  # tenants by their last turn, the latest at the end

    def __bool__(self) -> bool:
        return bool(self._lines)

    def append(self, job: Job) -> None:
        self._lines.setdefault(job.tenant, deque()).append(job)

    def pop(self) -> Job:
        """The next one, which is its tenant's turn. Raises ValueError if there is none."""
        turns = {tenant: turn for turn, tenant in enumerate(self._begun)}
        tenant = min(self._lines, key=lambda each: turns.get(each, -1))
        self._begun[tenant] = None
        self._begun.move_to_end(tenant)
        if len(self._begun) > REMEMBERED:
            self._begun.popitem(last=False)
        job = self._lines[tenant][0]
        self.remove(job)
        return job

    def remove(self, job: Job) -> bool:
        """Whether it was there."""
        line = self._lines.get(job.tenant, deque())
        if job not in line:
            return False
        line.remove(job)
        if not line:
            del self._lines[job.tenant]
        return True
