"""A scripted cluster with a clock of its own: what the pool asks of Ray, without Ray."""

import itertools
from collections import deque

import ray.exceptions

from orchestrator.jobs import HeadLost


class Died(ray.exceptions.RayActorError):
    """A worker's death."""

    def __init__(self, text="killed"):
        Exception.__init__(self, text)

    def __str__(self):
        return str(self.args[0])


class Raised(ray.exceptions.RayTaskError):
    """A worker's exception."""

    def __init__(self, cause):
        self.cause = cause


class Reference:
    def __init__(self):
        self.at, self.value, self.error = None, None, None


class Actor:
    def __init__(self, number):
        self.number, self.queue, self.up, self.dead = number, deque(), None, False


class Script:
    """Actors that are up at once, if there is room, and do as a job's first argument says.

    "ok": takes its second argument, in seconds. "die": so does the worker, after as many.
    "hang": nothing. An exception: it is raised.
    """

    def __init__(self, space=100, births=0.0):
        self.now, self.space, self.births = 0.0, space, births
        self.open_room, self.gone, self.killed, self.submitted = False, "", [], []
        self.actors, self._numbers = [], itertools.count()
        self.events = deque()

    def clock(self):
        return self.now

    # --- Actors --------------------------------------------------------------------------------

    def start(self):
        actor = Actor(next(self._numbers))
        actor.birth = Reference()
        self.actors.append(actor)
        self._house()
        return actor

    def born(self, actor):
        return actor.birth

    def submit(self, actor, job):
        reference = Reference()
        self.submitted.append((actor.number, job.tag))
        actor.queue.append((reference, job))
        if len(actor.queue) == 1:
            self._begin(actor)
        return reference

    def wait(self, references, seconds):
        until = self.now + seconds
        while True:
            ready = [r for r in references if r.at is not None and r.at <= self.now]
            if ready:
                return ready[:1]
            times = [r.at for r in references if r.at is not None]
            if self.events:
                times.append(self.events[0][0])
            if not times or min(times) > until:
                self._pass(until)
                return []
            self._pass(max(self.now, min(times)))

    def result(self, reference):
        for actor in self.actors:
            if actor.queue and actor.queue[0][0] is reference:
                actor.queue.popleft()
                if actor.queue and not actor.dead:
                    self._begin(actor)
        if reference.error is not None:
            raise reference.error
        return reference.value

    def kill(self, actor):
        self.killed.append(actor.number)
        self.lose(actor)
        self._house()

    def room(self):
        if self.gone:
            raise HeadLost(self.gone)
        return self.space if self.open_room else None

    # --- what happens --------------------------------------------------------------------------

    def at(self, time, what):
        """Have something happen at a time; call in order."""
        self.events.append((time, what))

    def lose(self, actor):
        """Have a worker die, with all that it has in hand."""
        actor.dead = True
        for reference, _ in [(actor.birth, None), *actor.queue]:
            if reference.at is None or reference.at > self.now:
                reference.at, reference.error = self.now, Died()

    def resize(self, space):
        """Lose or add nodes: the last workers die first."""
        self.space = space
        for actor in [a for a in self.actors if a.up is not None and not a.dead][space:]:
            self.lose(actor)
        self._house()

    def _pass(self, time):
        while self.events and self.events[0][0] <= time:
            self.now, what = self.events.popleft()
            what()
        self.now = max(self.now, time)

    def _house(self):
        housed = [a for a in self.actors if a.up is not None and not a.dead]
        for actor in self.actors:
            if actor.up is None and not actor.dead and len(housed) < self.space:
                actor.up = actor.birth.at = self.now + self.births
                housed.append(actor)
                if actor.queue:
                    self._begin(actor)

    def _begin(self, actor):
        reference, job = actor.queue[0]
        if actor.up is None and not actor.dead:
            return
        what, seconds = (*job.args, 1.0)[:2]
        end = max(self.now, actor.up or 0.0) + seconds
        if actor.dead:
            reference.at, reference.error = self.now, Died()
        elif what == "ok":
            reference.at, reference.value = end, job.tag
        elif what == "die":
            actor.dead = True
            for queued, _ in actor.queue:
                queued.at, queued.error = end, Died()
        elif isinstance(what, Exception):
            error = what if isinstance(what, ray.exceptions.RayError) else Raised(what)
            reference.at, reference.error = end, error
