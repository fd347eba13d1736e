"""The host: finds methods by entry points and keeps a broken one from harming the rest."""

from __future__ import annotations

import difflib
import functools
import logging
import os
from collections.abc import Iterable, Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any, NamedTuple

import pluggy

from kvdock import hookspecs
from kvdock.errors import MethodConflictError, MethodLoadError, UnknownMethodError
from kvdock.hookspecs import COMMAND_GROUP, ENTRY_POINT_GROUP, PROJECT, SPEC_VERSION, hookimpl
from kvdock.method import Method, canonical
from kvdock.options import Options

logger = logging.getLogger("kvdock")


class Loaded(NamedTuple):
    """The outcome of loading everything: the methods, and the reason for each one that failed."""

    methods: list[Method]
    failed: dict[str, str]


class _CoreDefaults:
    """The core's own answers, given after every plugin's."""

    @hookimpl(trylast=True)
    def kvdock_build_policy(self, method: Method, options: Options) -> Any:
        return method.create(options)


class Host:
    """Discover, load and hold methods; independent of every other host."""

    def __init__(self, *, discover: bool = True, environ: Mapping[str, str] = os.environ) -> None:
        """Make a host.

        Args:
            discover: look at the entry points of installed packages; False leaves only `register`.
            environ: where KVDOCK_DISABLE, KVDOCK_STRICT and KVDOCK_TRACE are read.
        """
        self.manager = pluggy.PluginManager(PROJECT)
        self.manager.add_hookspecs(hookspecs)
        self.manager.register(_CoreDefaults(), PROJECT)
        self._discover = discover
        self._environ = environ
        self._methods: dict[str, Method] = {}
        if environ.get("KVDOCK_TRACE") == "1":
            self.manager.trace.root.setwriter(logger.info)
            self.manager.enable_tracing()

    def available(self) -> list[str]:
        """List the ids of the installed methods without importing any."""
        entries = self._entries(ENTRY_POINT_GROUP)
        if self._strict:
            for id, claims in entries.items():
                _sole(id, claims)
        return sorted({*entries, *self._methods} - self._disabled)

    def installed(self) -> set[str]:
        """Return the ids of all installed methods, hidden and colliding ones included."""
        return {*self._entries(ENTRY_POINT_GROUP), *self._methods}

    def sources(self, id: str) -> list[str]:
        """Name the distributions that bring a method, with their versions."""
        return [_source(entry) for entry in self._entries(ENTRY_POINT_GROUP).get(id, [])]

    def resolve(self, name: str) -> str:
        """Return the id for any spelling of an installed method's name."""
        return self._resolve(name, self._entries(ENTRY_POINT_GROUP))

    def load(self, name: str) -> Method:
        """Return the record of a method, importing its plugin if that has not happened yet."""
        id = canonical(name)
        # reading the entry points takes longer than all the rest of an attachment
        if id in self._methods and id not in self._disabled:
            return self._methods[id]
        entries = self._entries(ENTRY_POINT_GROUP)
        id = self._resolve(name, entries)
        return self._load(id, entries.get(id, []))

    def load_all(self) -> Loaded:
        """Load every installed method; one that fails is reported, unless KVDOCK_STRICT=1."""
        entries = self._entries(ENTRY_POINT_GROUP)
        methods, failed = [], {}
        for id in sorted({*entries, *self._methods} - self._disabled):
            try:
                methods.append(self._load(id, entries.get(id, [])))
            except (MethodLoadError, MethodConflictError) as error:
                if self._strict:
                    raise
                logger.info("%s", error, exc_info=True)
                failed[id] = str(error)
        return Loaded(methods, failed)

    def register(self, plugin: object, name: str | None = None) -> list[Method]:
        """Register a plugin object of this process (a notebook, a test) and return its methods."""
        name = self.manager.register(plugin, name)
        try:
            self.manager.check_pending()
            methods = self._records(plugin)
            for method in methods:
                if method.id in self._methods:
                    raise MethodConflictError(
                        f"method {method.id!r} is already registered in this host."
                    )
        except BaseException:
            self.manager.unregister(plugin)
            raise
        self._methods.update({method.id: method for method in methods})
        return methods

    def unregister(self, plugin: object) -> None:
        """Take a plugin out again, with its methods."""
        for method in self._records(plugin):
            self._methods.pop(method.id, None)
        self.manager.unregister(plugin)

    def configure(self, settings: Mapping[str, Any]) -> None:
        """Pass settings to every plugin, also to those that are loaded later."""
        self.manager.hook.kvdock_configure.call_historic(kwargs={"settings": settings})

    def select_kernel(self, op: str, device: str, dtype: str) -> str | None:
        """Return the backend a plugin insists on; None leaves the choice to `kvdock.kernels`."""
        choice: str | None = self.manager.hook.kvdock_select_kernel(
            op=op, device=device, dtype=dtype
        )
        return choice

    def build_policy(self, method: Method, options: Options) -> Any:
        """Return the policy for a method and its checked options."""
        return self.manager.hook.kvdock_build_policy(method=method, options=options)

    def add_commands(self, app: Any) -> dict[str, str]:
        """Let the packages of kvdock.commands add theirs to `app`; return the failures by name."""
        failed = {}
        for name, claims in sorted(self._entries(COMMAND_GROUP).items()):
            if name in self._disabled:
                continue
            try:
                plugin = self._import(name, _sole(name, claims))
                self._caller("kvdock_commands", plugin)(app=app)
            except (MethodLoadError, MethodConflictError) as error:
                failed[name] = str(error)
            except Exception as error:
                failed[name] = f"{_source(claims[0])} failed to add its commands: {_reason(error)}"
            if name in failed and self._strict:
                raise MethodLoadError(failed[name])
        return failed

    @property
    def _strict(self) -> bool:
        return self._environ.get("KVDOCK_STRICT") == "1"

    @property
    def _disabled(self) -> set[str]:
        return {
            canonical(name)
            for name in self._environ.get("KVDOCK_DISABLE", "").split(",")
            if name.strip()
        }

    def _entries(self, group: str) -> dict[str, list[EntryPoint]]:
        """Group the entry points by id; more than one for an id is a collision."""
        found: dict[str, list[EntryPoint]] = {}
        if self._discover:
            for entry in entry_points(group=group):
                found.setdefault(canonical(entry.name), []).append(entry)
        return found

    def _resolve(self, name: str, known: Iterable[str]) -> str:
        id = canonical(name)
        installed = {*known, *self._methods}
        if id in self._disabled and id in installed:
            raise UnknownMethodError(
                f"method {id!r} is installed but hidden: KVDOCK_DISABLE names it."
            )
        usable = sorted(installed - self._disabled)
        if id in usable:
            return id
        near = difflib.get_close_matches(id, usable, n=1)
        guess = f" Did you mean {near[0]!r}?" if near else ""
        raise UnknownMethodError(
            f"unknown method {name!r}.{guess} Installed: {', '.join(usable) or 'none'}. "
            f"If it is a kvdock method, install it: pip install kvdock-{id}"
        )

    def _load(self, id: str, claims: list[EntryPoint]) -> Method:
        if id in self._methods:
            return self._methods[id]
        entry = _sole(id, claims)
        plugin = self._import(id, entry)
        try:
            records = {method.id: method for method in self._records(plugin)}
        except Exception as error:
            self.manager.unregister(plugin)
            raise _failure(id, entry, _reason(error)) from error
        if id not in records:
            self.manager.unregister(plugin)
            brings = ", ".join(records) or "none"
            raise _failure(
                id, entry, f"its entry point promises {id!r}, its kvdock_methods() brings {brings}"
            )
        self._methods[id] = records[id]
        return records[id]

    def _import(self, name: str, entry: EntryPoint) -> Any:
        """Import one plugin, check it and register it once."""
        try:
            plugin = entry.load()
        # a plugin that calls sys.exit() at import must not end the host either
        except (Exception, SystemExit) as error:
            raise _failure(name, entry, _reason(error)) from error
        wanted = getattr(plugin, "SPEC_VERSION", SPEC_VERSION)
        if wanted != SPEC_VERSION:
            found = f"it is written for hook specification {wanted}, this kvdock has {SPEC_VERSION}"
            raise _failure(name, entry, found)
        if self.manager.is_registered(plugin):
            return plugin
        try:
            self.manager.register(plugin)
            self.manager.check_pending()
        except Exception as error:
            # pluggy 1.6 keeps the name of a plugin that failed its validation
            if self.manager.is_registered(plugin):
                self.manager.unregister(plugin)
            raise _failure(name, entry, _reason(error)) from error
        return plugin

    def _records(self, plugin: object) -> list[Method]:
        methods = [method for batch in self._caller("kvdock_methods", plugin)() for method in batch]
        for method in methods:
            if not isinstance(method, Method):
                raise TypeError(
                    f"kvdock_methods() returned {method!r}, expected kvdock.Method records"
                )
        return methods

    def _caller(self, hook: str, plugin: object) -> pluggy.HookCaller:
        others = [other for other in self.manager.get_plugins() if other is not plugin]
        return self.manager.subset_hook_caller(hook, others)


@functools.cache
def default_host() -> Host:
    """Return the host of this process, made on first use."""
    return Host()


def _sole(id: str, claims: list[EntryPoint]) -> EntryPoint:
    if len(claims) > 1:
        both = " and ".join(_source(entry) for entry in claims)
        raise MethodConflictError(
            f"{id!r} is claimed by {both}. Uninstall one of them: pip uninstall DISTRIBUTION"
        )
    return claims[0]


def _source(entry: EntryPoint) -> str:
    return f"{entry.dist.name} {entry.dist.version}" if entry.dist else entry.value


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def _failure(id: str, entry: EntryPoint, reason: str) -> MethodLoadError:
    package = entry.dist.name if entry.dist else f"kvdock-{id}"
    return MethodLoadError(
        f"{id!r} ({_source(entry)}) cannot be loaded: {reason}. "
        f"Try: pip install --upgrade {package} (or hide it: KVDOCK_DISABLE={id})"
    )
