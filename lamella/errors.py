"""Every exception of Lamella.

    LamellaError
    ├── CaptureError            a model can't be turned into a graph
    │   └── ModelFileError      a file of a model is missing, corrupt or lies
    ├── GraphError              a graph is asked for something it doesn't have
    │   └── VerificationError   a graph breaks an invariant (all violations listed)
    ├── MissingRuleError        a rule table has no entry for an operator
    ├── RewriteError            a rewrite rule did something illegal
    ├── IncrementalError        a graph can't continue from a cache
    ├── GenerationError         text can't be generated as asked (also a ValueError)
    ├── PassError               a pass failed; names pass, node and operator
    │   ├── LossError           a pass cost more than `max_loss`
    │   └── NumericError        an exact pass changed the outputs
    ├── BudgetError             a budget can't be met; names the smallest that can
    ├── PlanError               a bit plan is malformed, or is for another model (also a ValueError)
    ├── RecipeError             a pipeline is misspelled (also a ValueError)
    ├── PluginError             a plugin failed to load
    ├── SamplesError            samples don't fit the model (also a ValueError)
    ├── BackendError            a backend can't do what is asked
    │   ├── UnsupportedError    operators without an emitter (all listed)
    │   └── ProviderError       an execution provider is missing or did not load
    ├── CheckpointError         a graph can't be written for another runtime (all reasons listed)
    └── ArtifactError           a saved folder is missing, corrupt or from elsewhere

A message is one sentence in lower case without a full stop: what is wrong, where, what was
expected, what to do.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class LamellaError(Exception):
    """The root of all exceptions that Lamella raises on purpose."""


class CaptureError(LamellaError):
    """A model can't be turned into a graph."""


class ModelFileError(CaptureError):
    """A file of a model is missing, corrupt, or says something that is not so."""


class GraphError(LamellaError):
    """A graph is asked for something it doesn't have, or an edit is illegal."""


class VerificationError(GraphError):
    """A graph breaks an invariant; the message lists every violation."""


class MissingRuleError(LamellaError):
    """A rule table has no entry for an operator of the graph; the message lists all."""


class RewriteError(LamellaError):
    """A rewrite rule returned something that can't replace what it matched."""


class IncrementalError(LamellaError):
    """A graph can't be made to continue from a cache; the message says which operation, why."""


class GenerationError(LamellaError, ValueError):
    """Text can't be generated as asked: no cache, a prompt too long, a mask that doesn't fit."""


class PassError(LamellaError):
    """A pass failed; the message names the pass, and the node where there is one."""


class LossError(PassError):
    """A pass cost more than the `max_loss` that was allowed."""


class NumericError(PassError):
    """A pass that declares itself exact changed the outputs."""


class BudgetError(LamellaError, ValueError):
    """A budget can't be met; the message names the smallest that can."""


class PlanError(LamellaError, ValueError):
    """A bit plan is missing, malformed, or was made for another model."""


class RecipeError(LamellaError, ValueError):
    """A pipeline, a pass or an option is misspelled or malformed."""


class PluginError(LamellaError):
    """A plugin failed to load; the message names its distribution."""


class SamplesError(LamellaError, ValueError):
    """Samples don't fit the model."""


class BackendError(LamellaError):
    """A backend can't do what is asked."""


class UnsupportedError(BackendError):
    """A graph holds operators that the backend has no emitter for; all are listed."""


class ProviderError(BackendError):
    """An execution provider or a runtime package is missing, doubled or did not load."""


class CheckpointError(LamellaError):
    """A graph can't be written in a format of another runtime; the message lists every reason."""


class ArtifactError(LamellaError):
    """A saved folder is missing, corrupt, or was made by or for something else."""


GIVE_SAMPLES = "pass samples=, an iterable of input dicts"
"""What to do where there are none; the command line says it in its own words."""


def closest(name: str, known: Iterable[str]) -> str:
    """``"; did you mean 'x'?"`` for the known name closest to `name`, or nothing."""
    found = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {found[0]!r}?" if found else ""


def known_names(name: str, known: Iterable[str]) -> str:
    """`closest`, and all known names: the end of a message about a name that is unknown."""
    names = list(known)
    hint = closest(name, names)
    return f"{hint} known are {', '.join(names)}" if hint else f"; known are {', '.join(names)}"
