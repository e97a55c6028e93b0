"""The server: a thread that reads the socket and looks after everything, beside the engine's.

Whatever a client sends costs that client at most; whatever the engine does, every open request gets
its last message. What the engine's thread posts it sends itself, if the socket is free: to wake
another thread for it would cost a small model's token a tenth of its time, in which the two keep
the interpreter from each other. Socket and exchange belong to whoever holds `_ownership`.
"""

import logging
import os
import secrets
import threading
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field

import zmq
from zmq.auth.thread import ThreadAuthenticator

from . import endpoint as endpoints
from .backend import Backend
from .clock import AwakeClock
from .driver import Driver
from .endpoint import Endpoint
from .exchange import Exchange
from .health import Health, Patience
from .keys import ServerKeys
from .log import event
from .messages import Error
from .metrics import Counters, Snapshot
from .monitor import Monitor
from .registry import RequestLimits
from .router import Router
from .transport import ZAP_DOMAIN, LinkOptions, check_library, server_socket

logger = logging.getLogger(__name__)

_TICK_MS = 250
# Clients and engine are looked after so often while messages flow.
_LOOK_S = 0.02
_MAX_RECEIVED = 64
# How long after a broken connection its client is looked for, and a STATS waits for a fresh count.
_PROBE_S = 2.0
_STATS_S = 0.5
_JOIN_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerOptions:
    """How a server is run; times in seconds."""

    max_waiting: int = 64
    max_per_client: int = 64
    shutdown_timeout_s: float = 30.0
    slow_consumer_s: float = 30.0
    patience: Patience = field(default_factory=Patience)
    link: LinkOptions = field(default_factory=LinkOptions)
    logs_prompts: bool = False


class Server:
    """Serves one backend at one endpoint until it is told to stop, or the backend dies.

    `run` blocks its thread, which owns the socket; `stop` may be called from any thread and from a
    signal handler. `address` is where clients connect, known once `run` has bound it.
    """

    def __init__(
        self,
        backend: Backend,
        endpoint: Endpoint,
        *,
        keys: ServerKeys | None = None,
        options: ServerOptions | None = None,
        version: str = "",
    ) -> None:
        check_library()
        endpoints.refuse_exposed(endpoint, has_keys=keys is not None)
        self.address = endpoint.address
        self.instance = secrets.token_hex(8)
        self._backend = backend
        self._endpoint = endpoint
        self._keys = keys
        self._options = options or ServerOptions()
        self._version = version
        self._clock = AwakeClock()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._ownership = threading.Lock()
        self._is_serving = False
        self._counters = Counters()
        self._health = Health(self._options.patience, clock=self._clock)
        self._limits = RequestLimits(
            max_running=backend.max_running,
            max_waiting=self._options.max_waiting,
            max_per_client=self._options.max_per_client,
        )
        self._driver = Driver(
            backend,
            notify=self._posted,
            clock=self._clock,
            slow_consumer_s=self._options.slow_consumer_s,
        )
        self._probe_until_s = self._next_probe_s = 0.0
        self._num_stops = 0
        self._drain_until_s: float | None = None

    def run(self, *, on_bound: Callable[[str], None] | None = None) -> int:
        """Serve; returns 0 after a stop that was asked for, 1 if the engine died."""
        with ExitStack() as stack:
            stack.enter_context(endpoints.Claim(self._endpoint))
            context = zmq.Context()
            stack.callback(context.term)
            if self._keys is not None:
                authenticator = ThreadAuthenticator(context)
                authenticator.start()
                stack.callback(authenticator.stop)
                authenticator.configure_curve(
                    domain=ZAP_DOMAIN.decode(), location=str(self._keys.allowed)
                )
            socket = server_socket(context, self._options.link, keys=self._keys)
            stack.callback(socket.close)
            monitor = Monitor(socket, self._counters.connections)
            stack.callback(monitor.close)
            socket.set(zmq.IPV6, int(":" in self._endpoint.host))
            socket.bind(self._endpoint.address)
            self.address = str(socket.getsockopt_string(zmq.LAST_ENDPOINT))
            self._router = Router(socket, clock=self._clock)
            self._snapshot = self._driver.start()
            self._exchange = Exchange(
                self._backend,
                self._driver,
                self._router,
                limits=self._limits,
                counters=self._counters,
                health=self._health,
                clock=self._clock,
                instance=self.instance,
                version=self._version,
                logs_prompts=self._options.logs_prompts,
            )
            event(logger, logging.INFO, "serving", address=self.address, instance=self.instance)
            if on_bound is not None:
                on_bound(self.address)
            self._is_serving = True
            stack.callback(self._retire)
            code = self._loop(monitor)
            event(logger, logging.INFO, "stopped", exit_code=code)
            return code

    def stop(self) -> None:
        """The first call lets open requests finish and takes no new ones; the second ends them."""
        self._num_stops += 1
        self._notify()

    def close(self) -> bool:
        """Give the backend back; False if the engine's thread hangs, so that nothing can be."""
        if not self._driver.stop(_JOIN_S):
            return False
        os.close(self._wake)
        self._backend.close()
        return True

    def _notify(self) -> None:
        os.eventfd_write(self._wake, 1)

    def _posted(self) -> None:
        """On the engine's thread: send what it posted, or leave it to the socket's."""
        if self._ownership.acquire(blocking=False):
            try:
                if self._is_serving:
                    self._hand_on()
                    # To send may use up the only sign that something came in.
                    if not (self._is_urgent or self._router.has_input):
                        return
            finally:
                self._ownership.release()
        self._notify()

    def _retire(self) -> None:
        with self._ownership:
            self._is_serving = False

    @property
    def _is_urgent(self) -> bool:
        return bool(self._num_stops or self._driver.error is not None or self._router.num_kept)

    def _loop(self, monitor: Monitor) -> int:
        poller = zmq.Poller()
        for one in (self._router.descriptor, monitor.socket, self._wake):
            poller.register(one, zmq.POLLIN)
        looked_s = -_LOOK_S
        while True:
            with self._ownership:
                has_input = self._router.has_input
            ready = [one for one, _ in poller.poll(0 if has_input else _TICK_MS)]
            self._clock.tick()
            if self._wake in ready:
                os.eventfd_read(self._wake)
            with self._ownership:
                self._hand_on()
                self._receive()
                if monitor.socket in ready and monitor.read():
                    self._probe_until_s = self._clock.now_s + _PROBE_S
                # Not at each message: the engine's thread waits for the interpreter meanwhile.
                is_due = self._clock.now_s - looked_s >= _LOOK_S
                if self._is_urgent or is_due or not ready:
                    looked_s = self._clock.now_s
                    self._look_after_clients()
                    code = self._look_after_engine()
                    if code is not None:
                        return code

    def _hand_on(self) -> None:
        for posted in self._driver.take():
            if isinstance(posted, Snapshot):
                self._snapshot = posted
                self._exchange.answer_stats(posted)
            else:
                self._exchange.deliver(posted)

    def _receive(self) -> None:
        for _ in range(_MAX_RECEIVED):
            received = self._router.receive()
            if received is None:
                return
            self._exchange.handle(*received)

    def _look_after_clients(self) -> None:
        for client in self._router.retry():
            self._exchange.forget(client)
        for client in self._router.slow(self._options.slow_consumer_s):
            self._exchange.cut(client)
        if self._next_probe_s <= self._clock.now_s < self._probe_until_s:
            self._next_probe_s = self._clock.now_s + _TICK_MS / 1000
            self._exchange.probe()
        self._exchange.answer_stats(self._snapshot, older_than_s=_STATS_S)

    def _look_after_engine(self) -> int | None:
        """The exit code if it is over."""
        self._health.look(
            self._driver.progress,
            is_busy=self._driver.is_busy,
            num_failures=self._driver.num_failures,
        )
        if self._driver.error is not None or self._health.is_hanging:
            reason = (
                f"the engine has made no progress for {self._health.silent_s:.0f} s"
                if self._driver.error is None
                else f"the engine died: {type(self._driver.error).__name__}"
            )
            self._health.is_dead = True
            event(logger, logging.CRITICAL, "engine dead", reason=reason)
            self._exchange.end_all(Error(code="engine_dead", message=reason))
            return 1
        if not self._num_stops:
            return None
        if self._drain_until_s is None:
            self._health.is_draining = True
            self._drain_until_s = self._clock.now_s + self._options.shutdown_timeout_s
            event(logger, logging.INFO, "draining", open=len(self._exchange.registry))
        is_late = self._clock.now_s >= self._drain_until_s
        if self._num_stops > 1 or is_late:
            error = Error(code="shutting_down", message="the server was told to stop")
            self._exchange.end_all(error)
            return 0
        return None if len(self._exchange.registry) or self._router.num_kept else 0
